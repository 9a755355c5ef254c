"""Tiny trainings of every kind, how to compare what they leave, and a script of two processes."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from helpers import TinyImages, shaken, tiny_autoencoder_config, tiny_unet_config
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from minildm.compression.autoencoder import Autoencoder
from minildm.compression.loss import AdversarialConfig, DiscriminatorConfig
from minildm.conditioning import ClassConfig
from minildm.layers import BatchRandom
from minildm.training import loop, stages
from minildm.training.checkpoint import Record, save_model
from minildm.training.configs import (
    AutoencoderExperiment,
    ClassifierExperiment,
    DataConfig,
    LatentDiffusionExperiment,
    TrainConfig,
)
from minildm.training.loop import Run, open_run, optimise
from minildm.training.stages import train_autoencoder, train_classifier, train_ldm

STEPS = 6
TRAIN = TrainConfig(
    steps=STEPS,
    batch_size=4,
    lr=0.01,
    warmup_steps=2,
    ema_decay=0.5,
    precision="fp32",
    save_every=2,
)
DATA = DataConfig(size=16)
VQ = tiny_autoencoder_config(regularizer="vq", codebook_size=16)
EXPERIMENTS: dict[str, Any] = {
    "kl": AutoencoderExperiment(model=tiny_autoencoder_config(), train=TRAIN, data=DATA),
    "vq-gan": AutoencoderExperiment(
        model=VQ,
        train=TRAIN,
        data=DATA,
        restart_dead=2,
        adversarial=AdversarialConfig(
            start=3, discriminator=DiscriminatorConfig(channels=8, layers=1)
        ),
    ),
    "ldm": LatentDiffusionExperiment(
        unet=tiny_unet_config(dropout=0.1),
        train=TRAIN,
        data=DATA,
        conditioner=ClassConfig(d_cond=8, p_uncond=0.5),
    ),
    "classifier": ClassifierExperiment(train=TRAIN, data=DATA, channels=8),
}


@dataclass
class Training:
    """One of the trainings, on the tiny images."""

    experiment: Any
    stage: Path  # a first stage

    def __call__(self, run_dir: Path, experiment: Any = None, **options: Any) -> Iterator[Record]:
        experiment, options = experiment or self.experiment, {"device": "cpu", **options}
        data = options.pop("data", None) or TinyImages()
        if isinstance(experiment, AutoencoderExperiment):
            return train_autoencoder(experiment, data, run_dir=run_dir, **options)
        if isinstance(experiment, ClassifierExperiment):
            return train_classifier(experiment, data, run_dir=run_dir, **options)
        options = {"first_stage": self.stage, **options}
        return train_ldm(experiment, data, run_dir=run_dir, **options)


def make_stage(folder: Path) -> Path:
    """A first stage with random weights and a scale, saved."""
    autoencoder = shaken(Autoencoder(tiny_autoencoder_config()))
    autoencoder.scale.fill_(2.0)
    save_model(autoencoder, folder)
    return folder


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """A nested state as path -> leaf."""
    pairs = state.items() if isinstance(state, dict) else enumerate(state)
    leaves: dict[str, Any] = {}
    for key, value in pairs:
        nested = isinstance(value, dict | list | tuple)
        leaves |= flat(value, f"{prefix}{key}/") if nested else {f"{prefix}{key}": value}
    return leaves


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a training leaves, except how long it took."""
    left: dict[str, Any] = {"config": json.loads((run_dir / "config.json").read_text())}
    for file in sorted(run_dir.glob("*.safetensors")):
        left[file.name] = load_file(file)
    left["state"] = torch.load(run_dir / "training/state.pt", weights_only=True)
    left["state"]["log"] = [(step, *rest[1:]) for step, _, *rest in left["state"]["log"]]
    rows = [line.split(",") for line in (run_dir / "log.csv").read_text().splitlines()]
    left["log"] = [row[:2] + row[3:] for row in rows]
    return flat(left)


def difference(one: Path, other: Path, atol: float = 0.0) -> list[str]:
    """The names of all that two trainings left and that differs."""
    first, second = outcome(one), outcome(other)
    assert first.keys() == second.keys()
    assert any("optimizer" in key for key in first)
    return [key for key in first if not _same(first[key], second[key], atol)]


def _same(one: Any, other: Any, atol: float) -> bool:
    if isinstance(one, float):
        return abs(one - other) <= atol
    if isinstance(one, Tensor) and one.is_floating_point():
        return torch.allclose(one.double(), other.double(), rtol=0, atol=atol)
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


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
        with torch.no_grad():
            self.weight.fill_(slope)
            self.bias.zero_()

    @property
    def vector(self) -> Tensor:
        """A copy of all weights."""
        return torch.cat([p.detach().flatten() for p in self.parameters()]).clone()


LineLoss = Callable[[dict[str, Any], int, BatchRandom], dict[str, Tensor]]
LINE = replace(TRAIN, lr=0.1)


def square(model: nn.Module) -> LineLoss:
    """The squared error, a second term, and one that is not a scalar."""

    def loss(batch: dict[str, Any], step: int, rng: BatchRandom) -> dict[str, Tensor]:
        error = (model(batch["x"]) - batch["y"]).square().mean()
        return {"loss": error, "double": 2 * error, "index": batch["index"]}

    return loss


def line_run(folder: Path, config: TrainConfig = LINE) -> Run:
    """An opened run for `optimise`."""
    return open_run(folder, LineExperiment(config), "cpu", Line())


def fit(
    folder: Path, model: nn.Module, loss: LineLoss, config: TrainConfig = LINE, **options: Any
) -> Iterator[Record]:
    """Train on the line; the model's folder is not written."""
    return optimise(model, loss, Line(), line_run(folder, config), card={}, **options)


# --- two processes ---


class Doubles(TinyImages):
    """The tiny images, in float64."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = super().__getitem__(i)
        return {**item, "image": item["image"].double()}


STILL = replace(EXPERIMENTS["ldm"], unet=tiny_unet_config())  # without dropout
SHARED = {
    "kl": replace(EXPERIMENTS["kl"], train=replace(TRAIN, accumulate=2)),
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
    found = []
    odd = replace(STILL, train=replace(TRAIN, batch_size=3))
    for experiment in (odd, EXPERIMENTS["vq-gan"]):
        try:
            next(Training(experiment, folder / "stage")(folder / "none", experiment))
        except ValueError as error:
            found.append(str(error))

    model = Fit()

    def poisoned(batch: dict[str, Any], step: int, rng: BatchRandom) -> dict[str, Tensor]:
        bad = float("nan") if (step, rng.rank) == (4, 1) else 1.0
        return {"loss": bad * square(model)(batch, step, rng)["loss"]}

    try:
        with patch.object(loop, "save_model"):
            list(fit(folder / "line", model, poisoned))
    except FloatingPointError as error:
        found.append(str(error))
    (folder / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    {"shared": shared, "refused": refused}[sys.argv[1]](Path(sys.argv[2]))
