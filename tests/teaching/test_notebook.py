"""Set-up, running and publishing notebooks, on tiny ones made here."""

import base64
import runpy
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook

from minildm.files import write_json
from minildm.teaching.notebook import run_notebook

PUBLISH = Path(__file__).parents[2] / "notebooks/publish.py"


def write(path: Path, *sources: str, **metadata: Any) -> Path:
    """A notebook of these code cells, the first tagged `parameters`."""
    cells = [new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel, **metadata}), path)
    return path


def test_a_notebook_runs_with_parameters_in_the_caller_s_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    other = tmp_path / "kernels/python3/kernel.json"  # the user's, of another environment
    write_json(other, {"argv": ["false"], "display_name": "Python 3", "language": "python"})
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path))
    source = write(tmp_path / "a.ipynb", 'name = "x"', "open(name, 'w').close()")
    monkeypatch.chdir(tmp_path / "here")
    run_notebook(source, "deep/out.ipynb", {"name": "y"})
    assert Path("y").exists() and Path("deep/out.ipynb").exists() and not Path("x").exists()
    with pytest.raises(FileNotFoundError, match=r"none\.ipynb"):
        run_notebook("none.ipynb", "out.ipynb", {})
    killed = write(tmp_path / "b.ipynb", "x = 1", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(DeadKernelError):
        run_notebook(killed, "out.ipynb", {})


FIGURE = """
import io, ipywidgets, numpy, PIL.Image
from IPython.display import Image, display
display(ipywidgets.IntSlider())
noise = numpy.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype="uint8")
PIL.Image.fromarray(noise).save(file := io.BytesIO(), "png")
display(Image(file.getvalue(), metadata={"alt": "Sixty-four by sixty-four of noise"}))
"""


def test_a_published_notebook_is_executed_in_place_and_light(tmp_path: Path) -> None:
    publish = runpy.run_path(str(PUBLISH))["publish"]
    where = "import os; print(os.environ['MINILDM_SCALE'], len(os.listdir()))"
    where += "; from minildm.files import progress; _ = list(progress('abc'))"
    path = write(tmp_path / "a.ipynb", where, FIGURE, widgets={"state": {}})
    publish(path, "smoke")
    nb = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in nb.cells] == [1, 2]
    (stream,) = nb.cells[0].outputs  # in an empty folder, not next to the file
    assert stream.text.startswith("smoke 0\n100%") and "\r" not in stream.text  # the bar's end
    (figure,) = nb.cells[1].outputs  # without the widget
    assert figure.metadata["image/png"]["alt"].endswith("noise")
    assert len(base64.b64decode(figure.data["image/png"])) < 64 * 64 * 3 * 0.6
    assert nb.metadata.language_info == {"name": "python"} and "widgets" not in nb.metadata
    before = write(path, "1 / 0").read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        publish(path)
    assert path.read_bytes() == before
