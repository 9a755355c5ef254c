"""Seconds of a level, measured alone: with nothing else running, before the runs begin.

Runs share a machine, and their own clocks with it. So the time axis of a sweep is steps times the
step time that is measured here, and "equal steps" and "equal time" are two views of the same runs.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minildm.autoencoder import Autoencoder
from minildm.checkpoints import load_model, save_model
from minildm.demo import describe
from minildm.diffusion import LatentDiffusion
from minildm.loop import pick_device
from minildm.presets import PIXELS
from minildm.sweeps.measuring import asked_of
from minildm.sweeps.settings import Plan, trained
from minildm.sweeps.sweep import Run
from minildm.training import train_ldm

WARM, TIMED = 8, 24  # steps of a training: not counted, and counted
DRAWN = 32  # pictures of a timed sampling


def time_level(content: dict[str, Any], device: str = "", threads: int = 1) -> dict[str, Any]:
    """What a level of a sweep costs here, from one of its runs (`Run.as_dict`).

    step_seconds: the median over TIMED steps of the real training, data included, on a first
    stage with random weights; epoch_seconds: as many steps as an epoch has. For the plain and
    every other sampling the pictures a second, decoding included, at the trained size and, where
    the model can, at twice the size.
    """
    run, before = Run.from_dict(content), torch.get_num_threads()
    plan, place = run.plan(), pick_device(device.partition(":")[0] or None)
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as folder, _cache_in(folder):
            found: dict[str, Any] = {"level": run.level, "device": describe(place)}
            if plan.experiment is not None:
                found |= _training(plan, Path(folder), place)
            model = trained(plan.model) if plan.model else load_model(Path(folder) / "model")
            model = model.to(place).eval()
            samplings = {"plain": plan.sampling}
            samplings |= {name: {**plan.sampling, **o} for name, o in run.samplings.items()}
            found["pictures_per_second"] = {
                name: _sampling(model, plan, options) for name, options in samplings.items()
            }
            # Of a model that is trained here; and where no condition decides the size.
            if plan.experiment is not None and model.config.conditioner.concat == "none":
                found["pictures_per_second_twice_the_size"] = _sampling(
                    model, plan, plan.sampling, 2
                )
            found["parameters"] = sum(p.numel() for p in model.unet.parameters())
            return found
    finally:
        torch.set_num_threads(before)


def _training(plan: Plan, folder: Path, place: torch.device) -> dict[str, Any]:
    """Step and epoch of the level's training; leaves its model in folder/model."""
    experiment = plan.experiment
    _first_stage(plan, folder / "first")
    short = replace(
        experiment,
        train=replace(experiment.train, steps=WARM + TIMED, save_every=WARM + TIMED),
        alone_steps=0,
    )
    ticks = [clock(place)]
    where = {"first_stage": folder / "first", "run_dir": folder / "model", "device": place.type}
    for _ in train_ldm(short, **where):
        ticks.append(clock(place))
    # The last step saves; a training does that once in hundreds.
    steps = [b - a for a, b in zip(ticks[WARM:-2], ticks[WARM + 1 : -1], strict=True)]
    median, pictures = statistics.median(steps), len(experiment.data.dataset("train"))
    batch = experiment.train.batch_size * experiment.train.accumulate
    return {
        "step_seconds": median,
        "step_quartiles": statistics.quantiles(steps, n=4)[::2],
        "training_pictures_per_second": batch / median,
        "epoch_seconds": median * pictures / batch,
    }


def _first_stage(plan: Plan, folder: Path) -> None:
    """One of the level's shape; its weights do not change what a step costs."""
    if plan.trained_first_stage is not None:
        model = trained(plan.trained_first_stage)
        save_model(model if isinstance(model, Autoencoder) else model.autoencoder, folder)
    else:
        save_model(Autoencoder(plan.first_stage.model if plan.first_stage else PIXELS), folder)


@torch.no_grad()
def _sampling(model: LatentDiffusion, plan: Plan, options: dict[str, Any], k: int = 1) -> float:
    """Pictures a second at k times the size, from one batch after a first one of two steps."""
    data = plan.experiment.data if plan.experiment else None
    asked = asked_of(model, data, DRAWN, 0)
    what: dict[str, Any] = {"y": asked.y} if asked.y is not None else {"n": asked.n}
    what |= {"size": k * model.config.image_size} if k > 1 else {}
    model.sample(**what, seed=0, **{**options, "steps": min(2, options["steps"])})
    began = clock(model.device)
    x = model.sample(**what, seed=0, **options)
    return len(x) / (clock(model.device) - began)


def clock(place: torch.device) -> float:
    """Seconds: on one thread of a CPU its own time, which waiting for others does not change."""
    if place.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if _single(place) else time.perf_counter()


def _single(place: torch.device) -> bool:
    return place.type == "cpu" and torch.get_num_threads() == 1


@contextmanager
def _cache_in(folder: str) -> Iterator[None]:
    """Latents of random first stages are not worth keeping."""
    before = os.environ.get("MINILDM_CACHE")
    os.environ["MINILDM_CACHE"] = str(Path(folder) / "cache")
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINILDM_CACHE"]
        else:
            os.environ["MINILDM_CACHE"] = before
