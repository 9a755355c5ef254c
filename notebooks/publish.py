"""Execute notebooks in place, for committing: `python notebooks/publish.py 00 05 --scale cpu`.

Every cell runs, in order, from a fresh kernel. Widgets, execution times and the Python version are
left out, progress bars show their last state, figures become PNGs of 256 colours. At cpu scale the
results go into data/results/lessons.json. A cell that fails stops it; its file stays as it was.
"""

import argparse
import base64
import io
import json
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

from minildm.files import atomic_write, data_dir, write_json
from minildm.teaching.notebook import KERNEL, SCALES

WIDGET = "application/vnd.jupyter.widget-view+json"  # such as a panel of controls


def publish(path: Path, scale: str = "cpu") -> None:
    """Execute a notebook in an empty folder and replace the file by the result.

    Raises nbclient's CellExecutionError.
    """
    notebook = nbformat.read(path, as_version=4)
    lessons = data_dir() / "results/lessons.json"
    with tempfile.TemporaryDirectory() as folder:
        options = {"kernel_name": KERNEL, "timeout": None, "record_timing": False}
        options["coalesce_streams"] = True
        client = NotebookClient(notebook, resources={"metadata": {"path": folder}}, **options)
        client.execute(env=os.environ | {"MINILDM_SCALE": scale})
        for results in Path(folder).glob(f"runs/{path.stem}/cpu-*/results.json"):
            kept = json.loads(lessons.read_text())  # smoke runs assert their claims on these
            if path.stem in kept:
                write_json(lessons, kept | {path.stem: json.loads(results.read_text())})
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            found = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
            cell.outputs = [o for o in found if o.get("text", "-").strip()]  # a bar that vanished
        for data in (output.get("data", {}) for output in cell.get("outputs", ())):
            if "image/png" in data:
                data["image/png"] = fewer_colours(data["image/png"])
    with atomic_write(path) as file:
        file.write((nbformat.writes(notebook) + "\n").encode())


def fewer_colours(png: str) -> str:
    """A PNG in base64 with the 256 colours that suit it best, if that makes it smaller."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    palette = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE)
    palette.save(file := io.BytesIO(), format="png", optimize=True)
    return min(png, base64.b64encode(file.getvalue()).decode(), key=len)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="+", metavar="NN", help="numbers of notebooks")
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    args = parser.parse_args()
    for number in args.numbers:
        (path,) = Path(__file__).parent.glob(f"{number}_*.ipynb")
        print(path.name, flush=True)
        publish(path, args.scale)
