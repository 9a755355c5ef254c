"""Seconds of a level, measured before this call's runs begin, by a process like that of a run.

Runs share a machine, and their own clocks with it. So the time axis of a sweep is steps times the
step time that is measured here, and "equal steps" and "equal time" are two views of the same runs.

Two timings of one folder never overlap. The runs of another process that shares the folder, and
whatever else the machine does, may go on meanwhile: on one thread of a CPU that changes little,
since its own processor time is counted; elsewhere it is the user who must see to it.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minildm.autoencoder import Autoencoder
from minildm.checkpoints import load_model, save_model
from minildm.demo import describe
from minildm.diffusion import LatentDiffusion
from minildm.files import lock, write_json
from minildm.loop import pick_device
from minildm.presets import PIXELS
from minildm.sweeps.execution import Place, Stop, end_with_parent, in_process, last_line, summary
from minildm.sweeps.measuring import asked_of
from minildm.sweeps.one_run import settled
from minildm.sweeps.settings import Plan, trained
from minildm.sweeps.sweep import Run
from minildm.training import train_ldm

WARM, TIMED = 8, 24  # steps of a training: not counted, and counted
DRAWN = 32  # pictures of a timed sampling
FOLDER = "timing"
Timing = dict[str, Any]


def timing_path(folder: Path, run: Run) -> Path:
    """Where a level's seconds are."""
    return folder / FOLDER / f"{run.name.rpartition('-')[0]}.json"


def timings(folder: Path) -> dict[str, Timing]:
    """What was measured of a sweep's levels, by level."""
    paths = sorted((folder / FOLDER).glob("*.json"))
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return {timing["level"]: timing for timing in found}


def time_levels(
    folder: Path,
    runs: Sequence[Run],
    measure: Callable[[Sequence[Run], Path], str],
    say: Callable[[str], None],
) -> None:
    """Measure the level of each run, where it was not; one at a time in all of the folder.

    measure: `time_here`, or an engine's way to it; it returns what was said on stderr. A level
    that cannot be timed is said, and the others go on.
    """
    left = _untimed(folder, runs)
    said = ""
    try:
        if left:
            said = _measured(folder, left, measure, say)
    except Exception as error:  # the runs will say more
        said = summary(error)
    for run in _untimed(folder, left):
        lines = [line for line in said.splitlines() if line.startswith(f"{run.name}: ")]
        why = lines[-1].partition(": ")[2] if lines else last_line(said)
        say(f"{run.sweep}={run.level}: has no time, {why or 'its process was killed'}")


def _measured(
    folder: Path,
    runs: Sequence[Run],
    measure: Callable[[Sequence[Run], Path], str],
    say: Callable[[str], None],
) -> str:
    """`measure` for what is still left when it is our turn."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    with lock(folder / FOLDER / ".lock"):
        if not (left := _untimed(folder, runs)):
            return ""
        levels = ", ".join(run.level for run in left)
        say(f"{left[0].sweep}: measuring the time of {levels}, one after the other")
        return measure(left, folder)


def _untimed(folder: Path, runs: Sequence[Run]) -> list[Run]:
    """A run of each level that has no time."""
    first: dict[Path, Run] = {}
    for run in runs:
        first.setdefault(timing_path(folder, run), run)
    return [run for path, run in first.items() if not path.is_file()]


def time_here(
    folder: str | Path,
    contents: Sequence[dict[str, Any]],
    place: Place = Place(),  # noqa: B008, a tuple
    stop: Stop | None = None,
) -> str:
    """Measure levels, each from one of its runs (`Run.as_dict`), in a process on this machine.

    Leaves a file for each in folder/timing; returns what the process said on stderr.
    """
    with tempfile.TemporaryDirectory() as scratch:
        write_json(Path(scratch) / "runs.json", contents)
        words = [str(folder), place.kind, scratch]
        # Latents of random first stages are not worth keeping.
        cache = {"MINILDM_CACHE": str(Path(scratch) / "cache")}
        return in_process(__name__, words, place, stop or Stop(), **cache)[1]


def main() -> None:
    """Of that process: a level that fails is said in one line that begins with its run."""
    end_with_parent()
    folder, device, scratch = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    contents = json.loads((scratch / "runs.json").read_text(encoding="utf-8"))
    for run in _untimed(folder, list(map(Run.from_dict, contents))):  # some a lost worker has done
        try:
            found = time_level(run, folder, scratch / run.name, device)
            write_json(timing_path(folder, run), found)
        except Exception as error:  # the other levels go on
            traceback.print_exc()
            sys.stderr.write(f"{run.name}: {summary(error)}\n")


def time_level(run: Run, shared: Path, scratch: Path, device: str = "") -> Timing:
    """What a level of a sweep costs in this process.

    step_seconds: the median over TIMED steps of the real training, data included, on a first
    stage with random weights; epoch_seconds: as many steps as an epoch has. For the plain and
    every other sampling the pictures a second, decoding included, at the trained size and, where
    the model can, at twice the size. shared: the sweep's folder; scratch: an empty one.
    """
    plan, place = settled(run.plan(), shared, device or None), pick_device(device or None)
    found: Timing = {"level": run.level, **hardware(place)}
    if plan.experiment is not None:
        found |= {"precision": plan.experiment.train.precision, **_training(plan, scratch, place)}
    model = trained(plan.model) if plan.model else load_model(scratch / "model")
    model = model.to(place).eval()
    samplings = {"plain": plan.sampling}
    samplings |= {name: {**plan.sampling, **o} for name, o in run.samplings.items()}
    found["pictures_per_second"] = {
        name: _sampling(model, plan, options) for name, options in samplings.items()
    }
    # Of a model that is trained here; and where no condition decides the size.
    if plan.experiment is not None and model.config.conditioner.concat == "none":
        found["pictures_per_second_twice_the_size"] = _sampling(model, plan, plan.sampling, 2)
    found["parameters"] = sum(p.numel() for p in model.unet.parameters())
    return found


def hardware(place: torch.device) -> dict[str, Any]:
    """What seconds depend on: they are compared only where this is the same."""
    return {
        "device": describe(place),
        "threads": torch.get_num_threads(),
        "machine": platform.node(),
    }


def _training(plan: Plan, folder: Path, place: torch.device) -> dict[str, Any]:
    """Step and epoch of the level's training; leaves its model in folder/model."""
    experiment = plan.experiment
    _first_stage(plan, folder / "first")
    steps = WARM + TIMED + 1  # the last one saves; a training does that once in hundreds
    train = replace(experiment.train, steps=steps, save_every=steps)
    short = replace(experiment, train=train, alone_steps=0)
    ticks = [clock(place)]
    where = {"first_stage": folder / "first", "run_dir": folder / "model", "device": place.type}
    for _ in train_ldm(short, **where):
        ticks.append(clock(place))
    seconds = [b - a for a, b in zip(ticks[WARM:-2], ticks[WARM + 1 : -1], strict=True)]
    median, pictures = statistics.median(seconds), len(experiment.data.dataset("train"))
    batch = experiment.train.batch_size * experiment.train.accumulate
    return {
        "step_seconds": median,
        "step_quartiles": statistics.quantiles(seconds, n=4)[::2],
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
    if place.type != "cpu":
        getattr(torch, place.type).synchronize()  # cuda, mps: what was asked for is done
    return time.process_time() if _single(place) else time.perf_counter()


def _single(place: torch.device) -> bool:
    return place.type == "cpu" and torch.get_num_threads() == 1
