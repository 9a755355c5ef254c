"""Tiny trainings of every kind, and how to compare what they leave."""

import functools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyImages, shaken, tiny_autoencoder_config, tiny_unet_config
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path

from minildm.compression.autoencoder import Autoencoder
from minildm.compression.loss import AdversarialConfig
from minildm.conditioning import ClassConfig
from minildm.training.checkpoint import save_model
from minildm.training.configs import (
    AutoencoderExperiment,
    ClassifierExperiment,
    DataConfig,
    LatentDiffusionExperiment,
    TrainConfig,
)
from minildm.training.loop import STATE, Record, read_log
from minildm.training.stages import train_autoencoder, train_classifier, train_ldm

SAVES = {"warmup_steps": 2, "save_every": 2}
TRAIN = TrainConfig(steps=6, batch_size=4, lr=0.01, ema_decay=0.5, precision="fp32", **SAVES)
DATA = DataConfig(size=16)
VQ = tiny_autoencoder_config(regularizer="vq", codebook_size=16)
GAME = AdversarialConfig(start=3, disc_channels=8, disc_layers=1)
STAGES = tempfile.TemporaryDirectory()


@functools.cache
def stage() -> Path:
    """The folder of a first stage with random weights and a scale."""
    autoencoder = shaken(Autoencoder(tiny_autoencoder_config()))
    autoencoder.scale.fill_(2.0)
    save_model(autoencoder, Path(STAGES.name) / "ae")
    return Path(STAGES.name) / "ae"


@dataclass
class Training:
    """One of the trainings, on the tiny images."""

    experiment: Any

    def __call__(self, run_dir: Path, experiment: Any = None, **options: Any) -> Iterator[Record]:
        experiment = experiment or self.experiment
        options = {"data": TinyImages(), "device": "cpu", "run_dir": run_dir, **options}
        if isinstance(experiment, AutoencoderExperiment):
            return train_autoencoder(experiment, **options)
        if isinstance(experiment, ClassifierExperiment):
            return train_classifier(experiment, **options)
        return train_ldm(experiment, **{"first_stage": stage(), **options})

    def changed(self, **changes: Any) -> Any:
        """The experiment with other fields; those of its TrainConfig too."""
        train = {name: changes.pop(name) for name in [*changes] if hasattr(TRAIN, name)}
        return replace(self.experiment, train=replace(TRAIN, **train), **changes)


SAME: dict[str, Any] = {"train": TRAIN, "data": DATA}
KL = Training(AutoencoderExperiment(model=tiny_autoencoder_config(), **SAME))
GAN = Training(AutoencoderExperiment(model=VQ, restart_dead=2, adversarial=GAME, **SAME))
CLASSES = ClassConfig(d_cond=8, p_uncond=0.5)
UNET = tiny_unet_config(dropout=0.1)
LDM = Training(LatentDiffusionExperiment(unet=UNET, conditioner=CLASSES, **SAME))
CLASSIFIER = Training(ClassifierExperiment(channels=8, **SAME))
TRAININGS = {"kl": KL, "vq-gan": GAN, "ldm": LDM, "classifier": CLASSIFIER}
each = pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)


def state_of(run_dir: Path) -> dict[str, Any]:
    """What a training saved last, to resume from."""
    return torch.load(run_dir / STATE, weights_only=True)


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a training leaves, by its place, except how long it took."""
    left: dict[str, Any] = {file.name: load_file(file) for file in run_dir.glob("*.safetensors")}
    left["card"] = json.loads((run_dir / "config.json").read_text())
    left["state"] = state_of(run_dir)
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
