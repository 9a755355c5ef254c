"""The first cell of every notebook, two interactive cells, and how notebooks run."""

import base64
import csv
import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from minildm.data.emoji import STYLES
from minildm.data.transforms import style_caption
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.evaluation.intervals import Measured, proportion_interval
from minildm.files import atomic_write, data_dir, write_json
from minildm.teaching import plots
from minildm.training.loop import pick_device

SCALES = ("smoke", "cpu", "gpu")
KERNEL = "python3"  # of the environment that this runs in
WIDGET = "application/vnd.jupyter.widget-view+json"  # such as a progress bar
SIDES = ("left", "right")


def setup(
    scale: str, seed: int, run_dir: str | os.PathLike[str], known: tuple[str, ...] = SCALES
) -> tuple[torch.device, Path]:
    """Check a notebook's parameters, seed torch, make the folder: (device, run_dir/SCALE-SEED).

    Raises ValueError for a scale that the notebook does not know, or an invalid seed.
    """
    if scale not in known:
        raise ValueError(f"scale={scale!r} is not known; known: {', '.join(known)}")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r} must be an integer in 0..2**63 - 1")
    torch.manual_seed(seed)
    folder = Path(run_dir) / f"{scale}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    return pick_device(), folder


def text_panel(
    model: LatentDiffusion,
    prompt: str = "a red apple",
    *,
    style: str | None = None,
    guidance_scale: float = 3.0,
    steps: int = 25,
    seed: int = 0,
) -> None:
    """Show a sample of a model of text, and controls that sample it again.

    style: one of the emoji's, whose name follows the prompt. Without ipywidgets the image alone.
    """
    from IPython.display import display

    def sample(
        prompt=prompt, style=style, guidance_scale=guidance_scale, steps=steps, seed=seed
    ) -> plots.NotebookFigure:
        caption = style_caption(prompt, style) if style else prompt
        x = model.sample([caption], guidance_scale=guidance_scale, steps=steps, seed=seed)
        return plots.image_grid(x, [caption], scale=2.2)

    shown = display(sample(), display_id=True)
    try:
        from ipywidgets import BoundedIntText, interact_manual
    except ImportError:
        return
    update = wraps(sample)(lambda **chosen: shown.update(sample(**chosen)))
    controls = {"style": [("none", None), *zip(STYLES, STYLES, strict=True)], "steps": (1, 100)}
    controls |= {"guidance_scale": (1.0, 10.0, 0.5), "seed": BoundedIntText(seed, max=2**31 - 1)}
    interact_manual(update, **controls)


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
    folder/votes.csv (pair, left, right, chosen); a study that was begun there goes on.
    choose(pair, left, right) -> "left" or "right" votes for all remaining pairs; without it,
    buttons ask. Raises ValueError for sets of different shapes and votes of another study.
    """
    if first.shape != second.shape:
        raise ValueError(f"first {tuple(first.shape)} and second {tuple(second.shape)} must pair")
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(first), generator=draw).tolist()
    swapped = torch.randint(2, (len(first),), generator=draw).tolist()
    sides = [names[::-1] if swap else names for swap in swapped]  # left and right of each pair
    path, votes = Path(folder) / "votes.csv", {}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for pair, left, right, chosen in csv.reader(text.splitlines()):
        votes[int(pair)] = chosen
        if not int(pair) < len(first) or sides[int(pair)] != (left, right):
            raise ValueError(f"{path} holds votes of another study")
    remaining = [pair for pair in order if pair not in votes]

    def images(pair: int) -> tuple[Tensor, ...]:
        return (first[pair], second[pair])[:: -1 if swapped[pair] else 1]

    def vote(pair: int, side: str) -> None:
        votes[pair] = sides[pair][SIDES.index(side)]
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([pair, *sides[pair], votes[pair]])

    if choose:
        for pair in remaining:
            vote(pair, choose(pair, *images(pair)))
    elif remaining:
        _ask(remaining, images, vote, question)
    chosen = list(votes.values())
    return proportion_interval(chosen.count(names[0]), len(chosen)) if chosen else None


def _ask(
    remaining: list[int],
    images: Callable[[int], tuple[Tensor, ...]],
    vote: Callable[[int, str], None],
    question: str,
) -> None:
    """Show the remaining pairs one by one, with a button for each side."""
    import ipywidgets as widgets
    from IPython.display import display

    def pair() -> plots.NotebookFigure:
        return plots.image_grid(torch.stack(images(remaining[0])), SIDES, scale=2, title=question)

    def clicked(button: widgets.Button) -> None:
        if remaining:
            vote(remaining.pop(0), button.description)
        if remaining:
            shown.update(pair())
        else:
            row.close()

    shown = display(pair(), display_id=True)
    row = widgets.HBox([widgets.Button(description=side) for side in SIDES])
    for button in row.children:
        button.on_click(clicked)
    display(row)


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
    if not path.is_file():
        raise FileNotFoundError(f"no notebook at {path}")
    known = list(papermill.inspect_notebook(str(path)))
    unknown = ", ".join(sorted(set(parameters) - set(known)))
    if unknown:
        raise ValueError(f"parameters={unknown}: {path.name} has {', '.join(known) or 'none'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    options = {"kernel_name": KERNEL, "progress_bar": False, "cwd": str(Path.cwd())}
    options |= {"extra_arguments": ["--log-level=CRITICAL"]}  # what fails is raised here
    papermill.execute_notebook(str(path), str(out), parameters, **options)
    return out


def publish_notebook(path: str | os.PathLike[str], scale: str = "cpu") -> Path:
    """Execute a notebook in place, for committing: every cell, in order, from a fresh kernel.

    Widgets (progress bars, controls), execution times and the Python version are left out, and
    figures become PNGs of 256 colours. Files written under a relative run_dir are removed, but at
    cpu scale the results go into data/results/lessons.json. A cell
    that fails raises nbclient's CellExecutionError and leaves the file as it was.
    """
    import nbformat
    from nbclient import NotebookClient

    path = Path(path)
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        options = {"kernel_name": KERNEL, "timeout": None, "record_timing": False}
        client = NotebookClient(notebook, resources={"metadata": {"path": folder}}, **options)
        client.execute(env=os.environ | {"MINILDM_SCALE": scale})
        for results in Path(folder).glob(f"runs/{path.stem}/cpu-*/results.json"):
            _keep_lesson(path.stem, json.loads(results.read_text()))
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
        for data in (output.get("data", {}) for output in cell.get("outputs", ())):
            if "image/png" in data:
                data["image/png"] = _fewer_colours(data["image/png"])
    with atomic_write(path) as file:
        file.write((nbformat.writes(notebook) + "\n").encode())
    return path


def _keep_lesson(name: str, results: dict[str, Any]) -> None:
    """Replace a notebook's entry in lessons.json: what runs at smoke scale assert claims on."""
    path = data_dir() / "results/lessons.json"
    lessons = json.loads(path.read_text())
    if name in lessons:
        write_json(path, lessons | {name: results})


def _fewer_colours(png: str) -> str:
    """A PNG in base64 with the 256 colours that suit it best, if that makes it smaller."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    palette = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE)
    palette.save(file := io.BytesIO(), format="png", optimize=True)
    return min(png, base64.b64encode(file.getvalue()).decode(), key=len)
