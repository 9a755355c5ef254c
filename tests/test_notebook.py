"""What notebooks begin with, running one as a program, publishing one; on tiny ones made here."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from minildm.notebook import SCALES, WIDGET, publish_notebook, run_notebook, setup


def outputs(nb: NotebookNode) -> Iterator[NotebookNode]:
    for cell in nb.cells:
        yield from cell.outputs


def write(path: Path, *sources: str, **metadata: Any) -> Path:
    """A notebook of these code cells, the first tagged `parameters`."""
    cells = [new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel, **metadata}), path)
    return path


def test_relative_paths_are_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    source = write(tmp_path / "a.ipynb", 'name = "x"', "open(name, 'w').close()")
    monkeypatch.chdir(tmp_path / "here")
    assert run_notebook(source, "deep/out.ipynb", {"name": "y"}) == Path("deep/out.ipynb").resolve()
    assert Path("y").exists() and Path("deep/out.ipynb").exists() and not Path("x").exists()


def test_a_missing_notebook_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.ipynb"):
        run_notebook(tmp_path / "none.ipynb", tmp_path / "out.ipynb")


def test_a_notebook_without_parameters_takes_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ipynb", "1 + 1")
    with pytest.raises(ValueError, match="none at all"):
        run_notebook(path, tmp_path / "out.ipynb", {"seed": 1})


PICTURE = """
import io, PIL.Image, torch
from IPython.display import Image, display
from tqdm.auto import tqdm
for _ in tqdm(range(3)): pass
noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8)
PIL.Image.fromarray(noise.numpy()).save(file := io.BytesIO(), "png")
display(Image(file.getvalue(), metadata={"alt": "Sixty-four by sixty-four of noise"}))
"""


def test_a_published_notebook_is_executed_in_place_and_light(tmp_path: Path) -> None:
    where = "import os; print(os.environ['MINILDM_SCALE'], len(os.listdir()))"
    path = write(tmp_path / "a.ipynb", where, PICTURE, widgets={"state": {}})
    publish_notebook(path, "smoke")
    nb = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in nb.cells] == [1, 2]
    assert not any(WIDGET in o.get("data", {}) for o in outputs(nb))
    assert nb.cells[0].outputs[0].text == "smoke 0\n"  # in an empty folder, not beside the file
    (picture,) = (o for o in outputs(nb) if "image/png" in o.get("data", {}))
    assert len(base64.b64decode(picture.data["image/png"])) < 64 * 64 * 3 * 0.6
    assert nb.metadata.language_info == {"name": "python"} and "widgets" not in nb.metadata
    assert not any("execution" in cell.metadata for cell in nb.cells)
    assert [p.name for p in tmp_path.iterdir()] == ["a.ipynb"]


PANEL = """
import ipywidgets
class Panel:
    slider = ipywidgets.IntSlider()
    def _repr_mimebundle_(self, **_):
        picture = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
        picture += "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
        return self.slider._repr_mimebundle_() | {"image/png": picture}
Panel()
"""


def test_of_a_widget_with_a_picture_the_picture_is_published(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ipynb", PANEL, "ipywidgets.IntSlider()")
    live = nbformat.read(run_notebook(path, tmp_path / "live.ipynb"), as_version=4)
    assert [WIDGET in output.data for output in outputs(live)] == [True, True]
    nb = nbformat.read(publish_notebook(path, "smoke"), as_version=4)
    (panel,) = outputs(nb)
    assert set(panel.data) == {"image/png", "text/plain"}


def test_a_notebook_that_fails_is_not_published(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ipynb", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        publish_notebook(path)
    assert path.read_bytes() == before


# Parameters.


@pytest.mark.parametrize("scale", ["large", "", "CPU", None, 1])
def test_an_unknown_scale_is_refused(scale: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="known: smoke, cpu, gpu"):
        setup(scale, 0, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [-1, 1.0, "1", None, True])
def test_a_seed_that_is_none_is_refused(seed: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed="):
        setup("smoke", seed, tmp_path / "run")


def test_setup_seeds_torch_and_makes_the_folder(tmp_path: Path) -> None:
    with torch.random.fork_rng([]):
        device, folder = setup("smoke", 3, str(tmp_path / "a" / "run"))
        first = torch.rand(3)
        setup("cpu", 3, folder)
        assert torch.equal(first, torch.rand(3))
    assert folder.is_dir() and isinstance(device, torch.device)
    assert SCALES == ("smoke", "cpu", "gpu")
    with pytest.raises(ValueError, match=r"known: smoke$"):
        setup("cpu", 0, folder, known=("smoke",))
