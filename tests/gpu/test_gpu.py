"""Every small preset trains on a GPU as on a CPU; `make gpu` runs the tests marked `gpu`."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from training.trainings import Training

from minildm import PRESETS, Autoencoder, ImageDataset, override, save_model
from minildm.data.scenes import CropsDataset, ScenesDataset
from minildm.layers import BatchRandom
from minildm.training import loop
from minildm.training.presets import FIRST_STAGES, PIXELS

SMALL = [name for name in PRESETS if name not in FIRST_STAGES and not name.endswith("-gpu")]
PARITY = {"steps": 2, "batch_size": 8, "precision": "fp32", "log_every": 1}


class HostRandom(BatchRandom):
    """Draws on the CPU from the generator's seed: the same numbers for every device."""

    def __new__(cls, generator: torch.Generator, rank: int = 0, world: int = 1) -> "HostRandom":
        host = torch.Generator().manual_seed(generator.initial_seed())
        return super().__new__(cls, host, rank, world)


def few(experiment: Any) -> ImageDataset:
    """The first images of the experiment's training data."""
    if experiment.data.kind in ("scenes", "crops"):
        scenes = ScenesDataset("train", 64, n=16, background=experiment.data.background)
        return CropsDataset(scenes) if experiment.data.kind == "crops" else scenes
    data = experiment.data.dataset("train")
    small = copy.copy(data)
    small.columns = {key: column[:16] for key, column in data.columns.items()}
    small.images, small.fingerprint = data.images[:16], f"16 of {data.fingerprint}"
    return small


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_two_steps_equal_those_on_a_cpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "BatchRandom", HostRandom)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)  # each device draws its own
    experiment = override(PRESETS[name], {f"train.{key}": v for key, v in PARITY.items()})
    f = int((re.search(r"-f(\d+)$", name) or [0, 4])[1])
    config = PIXELS if f == 1 else getattr(experiment, "model", PRESETS[f"emoji-kl-f{f}"].model)
    torch.manual_seed(0)
    save_model(Autoencoder(config), tmp_path / "stage")
    options: dict[str, Any] = {"data": few(experiment)}
    if hasattr(experiment, "model"):  # a first stage: a new codebook would start on random latents
        options["init"] = tmp_path / "stage"
    if hasattr(experiment, "unet"):
        options["first_stage"] = tmp_path / "stage"
    train = Training(experiment)
    cpu, gpu = (
        [r.terms for r in train(tmp_path / place, device=place, **options)]
        for place in ("cpu", "cuda")
    )
    assert len(cpu) == 2
    for here, there in zip(cpu, gpu, strict=True):
        usage = here.pop("code_usage", 0.0)  # a tie between two codes may change it by one code
        assert there.pop("code_usage", 0.0) == pytest.approx(usage, abs=2e-3)
        assert there == pytest.approx(here, rel=1e-3, abs=1e-6)
