"""Trainings for one process or several, in float64; also a script, for `accelerate launch`.

python several.py whole|rest FOLDER: FOLDER holds the first stage. Each process says in
`said-RANK.json` what it met.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from conftest import TinyPictures, vq_gan
from lines import CONFIG, CPU, Line
from torch import Tensor, nn
from trainings import DATA, TRAIN

from minildm import (
    AutoencoderConfig,
    ConditionerConfig,
    Record,
    UNetConfig,
    processes,
    train_autoencoder,
    train_judge,
    train_ldm,
    training,
)
from minildm.experiments import AutoencoderExperiment, JudgeExperiment, LatentDiffusionExperiment
from minildm.loop import optimise
from minildm.runs import RunFolder

AUTOENCODER = AutoencoderConfig(
    z_channels=2, width=8, width_mult=(1, 2), res_blocks=1, groups=4, mid_attn=False
)
UNET = UNetConfig(
    in_channels=2,
    out_channels=2,
    width=8,
    width_mult=(1, 2),
    res_blocks=1,
    attn_levels=(1,),
    d_head=4,
    d_cond=8,
    groups=4,
    dropout=0.1,
)
CLASS = LatentDiffusionExperiment(
    unet=UNET,
    train=TRAIN,
    data=DATA,
    conditioner=ConditionerConfig(kind="class", d_cond=8, p_uncond=0.5),
)
EXPERIMENTS = {
    "kl": AutoencoderExperiment(model=AUTOENCODER, train=replace(TRAIN, accumulate=2), data=DATA),
    "vq-gan": vq_gan(AUTOENCODER),  # two optimisers, a batch norm, codes that move
    "class": CLASS,
    "judge": JudgeExperiment(train=TRAIN, data=DATA, width=8),
}
ENCODED: list[str] = []  # the keys of all latents that this process encoded
HELD = replace(CLASS, train=replace(TRAIN, seed=1))  # the run that is killed


class Doubles(TinyPictures):
    """The tiny pictures, in float64."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = super().__getitem__(i)
        return {**item, "image": item["image"].double()}


@contextmanager
def in_float64() -> Iterator[None]:
    """Models are made, and latents read, in float64; only the latents' file is float32."""
    cached = training.cached_moments

    def doubled(key: str, compute: Callable[[], Tensor]) -> Tensor:
        return cached(key, lambda: ENCODED.append(key) or compute()).double()

    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(training, "cached_moments", doubled):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def start(experiment: Any, run_dir: Path, first_stage: Path) -> Iterator[Record]:
    """One of the trainings, on its data."""
    where = {"run_dir": run_dir, "device": "cpu"}
    if isinstance(experiment, AutoencoderExperiment):
        return train_autoencoder(experiment, Doubles(), **where)
    if isinstance(experiment, JudgeExperiment):
        return train_judge(experiment, Doubles(), **where)
    return train_ldm(experiment, Doubles(), first_stage=first_stage, **where)


def line(folder: Path, wrong: Any) -> Iterator[Record]:
    """A line is fitted; wrong(loss, step): what becomes of the loss."""
    model = nn.Linear(2, 1).double()

    def loss(batch: dict, step: int) -> dict[str, Tensor]:
        return {"loss": wrong((model(batch["x"]) - batch["y"]).square().mean(), step)}

    run = RunFolder(folder, {"line": "fitted"})
    return optimise(
        model, loss, Line(), CONFIG, run, device=CPU, precision="fp32", save=lambda ema: None
    )


def caught(records: Iterator[Record]) -> str:
    """What ends a training, and after which step."""
    step = 0
    try:
        for record in records:
            step = record.step
    except (ValueError, FloatingPointError) as error:
        return f"{step}: {type(error).__name__}: {error}"
    return f"{step}: nothing"


def say(folder: Path, **found: Any) -> None:
    path = folder / f"said-{processes.rank()}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | found))


def whole(folder: Path, stage: Path) -> None:
    """All trainings; two that fail alike everywhere; one that waits, unfinished, to be killed."""
    for name, experiment in EXPERIMENTS.items():
        records = list(start(experiment, folder / name, stage))
        say(folder, **{name: [record.terms for record in records]})
    odd = replace(CLASS, train=replace(TRAIN, batch_size=3))
    say(folder, odd=caught(start(odd, folder / "odd", stage)), processes=processes.world())

    def poisoned(loss: Tensor, step: int) -> Tensor:
        return loss * float("nan") if (step, processes.rank()) == (4, 1) else loss

    say(folder, poisoned=caught(line(folder / "line", poisoned)))
    for record in start(HELD, folder / "held", stage):
        if record.step == 5:
            say(folder, held=True, encoded=len(ENCODED))
            time.sleep(600)


def rest(folder: Path, stage: Path) -> None:
    """The killed training goes on; then one process alone meets something wrong."""
    steps = [record.step for record in start(HELD, folder / "held", stage)]
    say(folder, late=steps)

    def alone(loss: Tensor, step: int) -> Tensor:
        if (step, processes.rank()) == (2, 1):
            say(folder, failed=time.time())
            raise ValueError("a picture that only one process sees")
        return loss

    list(line(folder / "alone", alone))


if __name__ == "__main__":
    with in_float64():
        {"whole": whole, "rest": rest}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[2]) / "stage")
