"""The first cell of every notebook, a study with human votes, and how notebooks run."""

import csv
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minildm.evaluation.intervals import Measured, proportion_interval
from minildm.teaching import plots
from minildm.training.loop import pick_device

SCALES = ("smoke", "cpu", "gpu")
KERNEL = "python3"  # of the environment that this runs in
SIDES = ("left", "right")


def setup(scale: str, seed: int, run_dir: str | os.PathLike[str]) -> tuple[torch.device, Path]:
    """Check a notebook's parameters, seed torch, make the folder: (device, run_dir/SCALE-SEED).

    Raises ValueError for an unknown scale or an invalid seed.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is not known; known: {', '.join(SCALES)}")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r} must be an integer in 0..2**63 - 1")
    torch.manual_seed(seed)
    folder = Path(run_dir) / f"{scale}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    return pick_device(), folder


def preference_study(
    first: Tensor,
    second: Tensor,
    folder: str | os.PathLike[str],
    *,
    names: tuple[str, str] = ("first", "second"),
    question: str = "Which looks better?",
    seed: int = 0,
    choose: Callable[[int, Tensor, Tensor], str] | None = None,
) -> Measured | None:
    """Two-alternative forced choice, LDM Tab. 4: the share that prefers names[0], if any voted.

    first, second: images (N, 3, H, W) in [-1, 1]; first[i] and second[i] are a pair. The seed
    draws the order of the pairs and the side of each image. Each vote is a line of
    folder/votes.csv (pair, left, right, chosen); an unfinished study continues.
    choose(pair, left, right) -> "left" or "right" votes for the remaining pairs, "" stops; without
    it, each pair is shown and the vote is typed. Raises ValueError for votes of another study.
    """
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(first), generator=draw).tolist()
    swapped = torch.randint(2, (len(first),), generator=draw).tolist()
    pairs = [[str(i), *(names[::-1] if swapped[i] else names)] for i in order]  # pair, left, right
    path = Path(folder) / "votes.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    votes = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
    if [row[:3] for row in votes] != pairs[: len(votes)]:
        raise ValueError(f"{path} holds votes of another study")
    for i, row in list(zip(order, pairs, strict=True))[len(votes) :]:
        images = (second[i], first[i]) if swapped[i] else (first[i], second[i])
        side = choose(i, *images) if choose else _typed(question, *images)
        if not side:
            break
        votes.append([*row, row[1 + SIDES.index(side)]])
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(votes[-1])
    chosen = [row[3] for row in votes]
    return proportion_interval(chosen.count(names[0]), len(chosen)) if chosen else None


def _typed(question: str, left: Tensor, right: Tensor) -> str:
    """Show a pair and read a side; "" for another answer, and where nobody can answer."""
    from IPython.display import clear_output, display

    clear_output(wait=True)
    display(plots.image_grid(torch.stack([left, right]), SIDES, scale=2, title=question))
    with suppress(NotImplementedError):  # a notebook that is executed without a person
        return {"l": "left", "r": "right"}.get(input("l, r, or nothing to stop: ")[:1], "")
    return ""


def run_notebook(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    parameters: Mapping[str, Any] | None = None,
) -> Path:
    """Execute a notebook with papermill, from a fresh kernel; the executed copy goes to `out`.

    parameters: values for names in the cell tagged `parameters`; an unknown name is a ValueError
    before anything runs. The kernel works in the caller's folder. A cell that fails raises
    papermill's PapermillExecutionError, and `out` shows where.
    """
    import papermill  # takes a second: not for notebooks that only want `setup`

    path, out, parameters = Path(path).resolve(), Path(out).resolve(), dict(parameters or {})
    known = list(papermill.inspect_notebook(str(path)))
    unknown = ", ".join(sorted(set(parameters) - set(known)))
    if unknown:
        raise ValueError(f"parameters={unknown}: {path.name} has {', '.join(known) or 'none'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    options = {"kernel_name": KERNEL, "progress_bar": False, "cwd": str(Path.cwd())}
    options |= {"extra_arguments": ["--log-level=CRITICAL"]}  # what fails is raised here
    papermill.execute_notebook(str(path), str(out), parameters, **options)
    return out
