"""What every notebook begins with; running one with other parameters; publishing one."""

import base64
import io
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from minildm.files import atomic_write
from minildm.loop import pick_device

SCALES = ("smoke", "cpu", "gpu")
KERNEL = "python3"  # of the environment that this runs in
WIDGET = "application/vnd.jupyter.widget-view+json"  # such as a progress bar


def setup(
    scale: str,
    seed: int,
    run_dir: str | os.PathLike[str],
    known: tuple[str, ...] = SCALES,
) -> tuple[torch.device, Path]:
    """Check a notebook's parameters, seed torch, make the run's folder: (device, run_dir).

    Raises ValueError for a scale that the notebook does not know, or a seed that is none.
    """
    if scale not in known:
        raise ValueError(f"scale={scale!r} is not known; known: {', '.join(known)}")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed={seed!r} must be an integer of at least 0")
    torch.manual_seed(seed)
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return pick_device(), folder


def run_notebook(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    parameters: Mapping[str, Any] | None = None,
) -> Path:
    """Execute a notebook with papermill, from a fresh kernel; the executed copy goes to `out`.

    parameters: values for names in the cell tagged `parameters`. Papermill only warns of a name
    that is not there; here it is a ValueError, before anything runs. The kernel works in the
    caller's folder, so relative paths mean what they mean there. A cell that fails raises
    papermill's PapermillExecutionError, and `out` shows where.
    """
    import papermill  # a second to import: not for notebooks that only want `setup`

    path, out, parameters = Path(path).resolve(), Path(out).resolve(), dict(parameters or {})
    if not path.is_file():
        raise FileNotFoundError(f"no notebook at {path}")
    known = list(papermill.inspect_notebook(str(path)))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ValueError(
            f"parameters={', '.join(unknown)}: {path.name} has none of that name; "
            f"it has {', '.join(known) or 'none at all'}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        str(path),
        str(out),
        parameters,
        kernel_name=KERNEL,
        progress_bar=False,
        cwd=str(Path.cwd()),
    )
    return out


def publish_notebook(path: str | os.PathLike[str], scale: str = "cpu") -> Path:
    """Execute a notebook in place, for committing: every cell, in order, from a fresh kernel.

    Widgets, such as progress bars, times of execution and the Python version are left out (of a
    widget that has a picture, too, that stays), and figures become PNGs of 256 colours, a quarter
    of the size. What it writes under a relative run_dir goes
    away. A cell that fails raises nbclient's CellExecutionError and leaves the file as it was.
    """
    import nbformat
    from nbclient import NotebookClient

    path = Path(path)
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            kernel_name=KERNEL,
            timeout=None,
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=os.environ | {"MINILDM_SCALE": scale})
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [_lighter(o) for o in cell.outputs if not _only_widget(o)]
    with atomic_write(path) as file:
        file.write((nbformat.writes(notebook) + "\n").encode())
    return path


def _only_widget(output: dict[str, Any]) -> bool:
    """Whether an output is a widget and no picture beside; if a picture, the widget goes."""
    data = output.get("data", {})
    return data.pop(WIDGET, None) is not None and "image/png" not in data


def _lighter(output: dict[str, Any]) -> dict[str, Any]:
    """An output of a cell, its picture with fewer colours."""
    data = output.get("data", {})
    if "image/png" in data:
        data["image/png"] = _fewer_colours(data["image/png"])
    return output


def _fewer_colours(png: str) -> str:
    """A PNG in base64 with the 256 colours that suit it best, if that makes it smaller."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    palette = picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE)
    file = io.BytesIO()
    palette.save(file, format="png", optimize=True)
    small = base64.b64encode(file.getvalue()).decode()
    return min(png, small, key=len)
