"""The trainings on the tiny pictures, and what to compare of what they leave."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from minildm import (
    Record,
)
from minildm.experiments import (
    DataConfig,
    TrainConfig,
)

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
KINDS = ("autoencoder", "vq-gan", "ldm", "judge")


@dataclass
class Training:
    """One of the trainings, on the tiny pictures."""

    start: Callable[..., Iterator[Record]]
    experiment: Any
    options: dict[str, Any]

    def __call__(self, run_dir: Path, experiment: Any = None, **more: Any) -> Iterator[Record]:
        experiment = experiment or self.experiment
        return self.start(experiment, run_dir=run_dir, device="cpu", **{**self.options, **more})


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """A nested state as path -> leaf."""
    pairs = state.items() if isinstance(state, dict) else enumerate(state)
    leaves: dict[str, Any] = {}
    for key, value in pairs:
        nested = isinstance(value, dict | list | tuple)
        leaves |= flat(value, f"{prefix}{key}/") if nested else {f"{prefix}{key}": value}
    return leaves


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a training leaves, but for how long it took."""
    left: dict[str, Any] = {"config": json.loads((run_dir / "config.json").read_text())}
    for file in sorted(run_dir.glob("*.safetensors")):
        left[file.name] = load_file(file)
    left["state"] = torch.load(run_dir / "training/state.pt", weights_only=True)
    rows = [line.split(",") for line in (run_dir / "log.csv").read_text().splitlines()]
    left["log"] = [row[:2] + row[3:] for row in rows]
    return {k: v for k, v in flat(left).items() if k != "state/seconds"}


def identical(one: Path, other: Path) -> bool:
    first, second = outcome(one), outcome(other)
    assert first.keys() == second.keys()
    assert any("optimizer" in key for key in first)
    differ = [
        key
        for key, value in first.items()
        if not (
            torch.equal(value, second[key]) if isinstance(value, Tensor) else value == second[key]
        )
    ]
    assert not differ, differ[:10]
    return True
