"""Tiny trainings of every kind, how to compare what they leave, and a script of two processes."""

import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import TinyImages, shaken, tiny_autoencoder_config, tiny_unet_config
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path
from torch.utils.data import Dataset

from minildm.compression.autoencoder import Autoencoder
from minildm.compression.loss import AdversarialConfig, DiscriminatorConfig
from minildm.conditioning import ClassConfig
from minildm.layers import BatchRandom
from minildm.training import loop, stages
from minildm.training.checkpoint import Record, read_log, save_model
from minildm.training.configs import (
    AutoencoderExperiment,
    ClassifierExperiment,
    DataConfig,
    LatentDiffusionExperiment,
    TrainConfig,
)
from minildm.training.loop import LossFn, open_run, optimise
from minildm.training.stages import train_autoencoder, train_classifier, train_ldm

SAVES = {"warmup_steps": 2, "save_every": 2}
TRAIN = TrainConfig(steps=6, batch_size=4, lr=0.01, ema_decay=0.5, precision="fp32", **SAVES)
DATA = DataConfig(size=16)
VQ = tiny_autoencoder_config(regularizer="vq", codebook_size=16)
GAME = AdversarialConfig(start=3, discriminator=DiscriminatorConfig(channels=8, layers=1))
STAGES = tempfile.TemporaryDirectory()


@functools.cache
def stage() -> Path:
    """The folder of a first stage with random weights and a scale."""
    return make_stage(Path(STAGES.name) / "ae")


def make_stage(folder: Path) -> Path:
    """Such a folder."""
    autoencoder = shaken(Autoencoder(tiny_autoencoder_config()))
    autoencoder.scale.fill_(2.0)
    save_model(autoencoder, folder)
    return folder


@dataclass
class Training:
    """One of the trainings, on the tiny images."""

    experiment: Any
    first_stage: Path | None = None

    def __call__(self, run_dir: Path, experiment: Any = None, **options: Any) -> Iterator[Record]:
        experiment = experiment or self.experiment
        options = {"data": TinyImages(), "device": "cpu", "run_dir": run_dir, **options}
        if isinstance(experiment, AutoencoderExperiment):
            return train_autoencoder(experiment, **options)
        if isinstance(experiment, ClassifierExperiment):
            return train_classifier(experiment, **options)
        return train_ldm(experiment, **{"first_stage": self.first_stage or stage(), **options})


SAME: dict[str, Any] = {"train": TRAIN, "data": DATA}
KL = Training(AutoencoderExperiment(model=tiny_autoencoder_config(), **SAME))
GAN = Training(AutoencoderExperiment(model=VQ, restart_dead=2, adversarial=GAME, **SAME))
CLASSES = ClassConfig(d_cond=8, p_uncond=0.5)
UNET = tiny_unet_config(dropout=0.1)
LDM = Training(LatentDiffusionExperiment(unet=UNET, conditioner=CLASSES, **SAME))
CLASSIFIER = Training(ClassifierExperiment(channels=8, **SAME))
TRAININGS = {"kl": KL, "vq-gan": GAN, "ldm": LDM, "classifier": CLASSIFIER}
each = pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a training leaves, by its place, except how long it took."""
    left: dict[str, Any] = {file.name: load_file(file) for file in run_dir.glob("*.safetensors")}
    left["card"] = json.loads((run_dir / "config.json").read_text())
    left["state"] = torch.load(run_dir / "training/state.pt", weights_only=True)
    left["log"] = [(r.step, r.images, r.lr, r.terms) for r in read_log(run_dir)]
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(left)[0]}


def difference(one: Path, other: Path, atol: float = 0.0) -> list[str]:
    """The places of all that two trainings left and that differs."""
    first, second = outcome(one), outcome(other)
    assert first.keys() == second.keys() and any("optimizer" in key for key in first)
    return [key for key in first if not _same(first[key], second[key], atol)]


def _same(one: Any, other: Any, atol: float) -> bool:
    if not isinstance(one, float | Tensor):
        return one == other
    one, other = (torch.as_tensor(value, dtype=torch.float64) for value in (one, other))
    return torch.allclose(one, other, rtol=0, atol=atol)


# --- the smallest thing that the loop can train on ---


class Line(Dataset[dict[str, Any]]):
    """y = 3 x - 1 with a little noise, in float64."""

    fingerprint = "line"

    def __init__(self, n: int = 16) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 2, generator=draw, dtype=torch.float64)
        self.y = 3 * self.x[:, :1] - 1 + 0.1 * self.x[:, 1:]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": self.x[i], "y": self.y[i], "index": i}


@dataclass(frozen=True)
class LineExperiment:
    """An experiment for `open_run`."""

    train: TrainConfig


class Fit(nn.Linear):
    """A linear model in float64, which starts at slope 0.5."""

    def __init__(self, slope: float = 0.5) -> None:
        super().__init__(2, 1, dtype=torch.float64)
        nn.init.constant_(self.weight, slope)
        nn.init.zeros_(self.bias)

    @property
    def vector(self) -> Tensor:
        """A copy of all weights."""
        return nn.utils.parameters_to_vector(self.parameters()).detach().clone()


LINE = replace(TRAIN, lr=0.1)


def square(model: nn.Module) -> LossFn:
    """The squared error, a second term, and one that is not a scalar."""

    def loss(batch: dict[str, Any], step: int, rng: BatchRandom) -> dict[str, Tensor]:
        error = (model(batch["x"]) - batch["y"]).square().mean()
        return {"loss": error, "double": 2 * error, "index": batch["index"]}

    return loss


def fit(
    folder: Path, model: nn.Module, loss: LossFn, config: TrainConfig = LINE, **options: Any
) -> Iterator[Record]:
    """Train on the line."""
    run = open_run(folder, LineExperiment(config), "cpu", Line())
    return optimise(model, loss, Line(), run, card={}, **options)


# --- two processes ---


class Doubles(TinyImages):
    """The tiny images, in float64."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = super().__getitem__(i)
        return {**item, "image": item["image"].double()}


STILL = replace(LDM.experiment, unet=tiny_unet_config())  # without dropout
SHARED = {
    "kl": KL.experiment,
    "ldm": replace(STILL, train=replace(TRAIN, log_every=2)),
    "held": replace(STILL, train=replace(TRAIN, seed=1)),  # killed at step 5
}


def shared(folder: Path) -> None:
    """All trainings, in float64; then one that waits to be killed."""
    encode = stages.encode_dataset  # whose cache is float32
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(stages, "encode_dataset", lambda *args: encode(*args).double()):
            for name, experiment in SHARED.items():
                training = Training(experiment, folder / "stage")
                for record in training(folder / name, data=Doubles()):
                    if name == "held" and record.step == 5 and "RANK" in os.environ:
                        (folder / f"holds-{os.environ['RANK']}").touch()
                        time.sleep(600)
    finally:
        torch.set_default_dtype(torch.float32)


def refused(folder: Path) -> None:
    """Write down what two processes cannot do, and how a loss that is NaN in one of them ends."""
    model = Fit()

    def poisoned(batch: dict[str, Any], step: int, rng: BatchRandom) -> dict[str, Tensor]:
        bad = float("nan") if (step, rng.rank) == (4, 1) else 1.0
        return {"loss": bad * square(model)(batch, step, rng)["loss"]}

    odd, found = Training(replace(STILL, train=replace(TRAIN, batch_size=3)), folder / "stage"), []
    for run in (odd(folder / "odd"), GAN(folder / "gan"), fit(folder / "line", model, poisoned)):
        try:
            with patch.object(loop, "save_model"):
                list(run)
        except (ValueError, FloatingPointError) as error:
            found.append(str(error))
    (folder / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    {"shared": shared, "refused": refused}[sys.argv[1]](Path(sys.argv[2]))
