"""The notebooks: their form, and one execution with other parameters than those as committed.

`pytest --nbval-lax notebooks` executes them once more, as they are: see the Makefile.
"""

import json
import os
import re
import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from minildm.teaching.notebook import run_notebook

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
HIDDEN = {"source_hidden": True}
ASSIGNMENTS = sorted(FOLDER.glob("assignments/*.ipynb"))
MAX_BYTES, MAX_MEDIAN, MAX_CELL = 800_000, 6, 15  # of a file; lines of a code cell, without blanks

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(nb: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def form(nb: NotebookNode, name: str) -> Iterator[str]:
    """What is wrong with the cells of a notebook."""
    first, code = nb.cells[0].source, code_cells(nb)
    if not first.startswith(f"# {name[:2]} · ") or "?" not in first.splitlines()[0]:
        yield "the first cell must be a title with the notebook's number and its question"
    for word in ("Needed before", "Takes", 'at `"smoke"`', "CPU", "GPU", "In the paper", "colab"):
        if word not in first:
            yield f"the first cell does not say: {word}"
    [parameters] = [cell.source for cell in code if "parameters" in tags(cell)]
    if re.findall(r"^(\w+) = ", parameters, re.MULTILINE) != ["scale", "seed", "run_dir"]:
        yield "the parameters must be scale, seed and run_dir"
    lines = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in code]
    if statistics.median(lines) > MAX_MEDIAN or max(lines) > MAX_CELL:
        yield f"code cells: {statistics.median(lines)} lines in the median, {max(lines)} at most"
    if "results.json" not in code[-1].source:
        yield "the last cell does not write results.json"
    if any(cell.metadata.get("jupyter") != HIDDEN for cell in code if "setup(scale" in cell.source):
        yield "the set-up is not collapsed"
    prose = "".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", prose):
        if not (FOLDER / target).exists():
            yield f"a link to {target}, which is missing"


def exercises(nb: NotebookNode, name: str) -> Iterator[str]:
    """What is wrong with the exercises and the equations."""
    code = code_cells(nb)
    stubs = [i for i, cell in enumerate(code) if "exercise" in tags(cell)]
    if len(stubs) < 2:
        yield f"{len(stubs)} exercises, required are two"
    for i in stubs:
        solution = code[i + 1]
        folded = solution.metadata.get("jupyter") == HIDDEN and "transient" in solution.metadata
        named = re.search(r"^def solution_(?s:.)*assert check\(", solution.source, re.MULTILINE)
        if "solution" not in tags(solution) or not folded or not named:
            yield f"exercise {code[i].id} has no folded solution_... that is asserted behind it"
    prose = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    numbers = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", prose)]
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"equations are numbered {numbers}"
    text = "\n".join(cell.source for cell in code)
    yield from (f"no code cites ({n})" for n in numbers if not re.search(rf"#.*\({n}\)", text))


def outputs(nb: NotebookNode, name: str) -> Iterator[str]:
    """What is wrong with the committed outputs."""
    counts = [cell.execution_count for cell in code_cells(nb)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"executed as {counts}: not all, in order, from a fresh kernel"
    for i, cell in enumerate(nb.cells):
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if output.output_type == "error" or output.get("name") == "stderr":
                yield f"cell {cell.id} failed or warned: {output}"
            if "image/png" not in data:
                continue
            if len(output.metadata.get("image/png", {}).get("alt", "")) < 20:
                yield f"cell {cell.id}: its figure has no alt text"
            if nb.cells[i + 1].cell_type != "markdown":
                yield f"cell {cell.id}: no sentence after its figure"
    text = json.dumps([cell.get("outputs", ()) for cell in nb.cells])
    if re.search(r"(?<![\w./:])/(home|root|Users|tmp|work)/", text) or "papermill" in nb.metadata:
        yield "an output shows where it was executed"


@every_notebook
@pytest.mark.parametrize("rule", [form, exercises, outputs], ids=lambda rule: rule.__name__)
def test_the_notebook_keeps_the_rule(rule: object, path: Path) -> None:
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    assert path.stat().st_size <= MAX_BYTES
    assert list(rule(nb, path.stem)) == []


@every_notebook
def test_the_notebook_runs_with_other_parameters(path: Path, tmp_path: Path) -> None:
    scale = os.environ["MINILDM_SCALE"]
    parameters = {"scale": scale, "seed": 1, "run_dir": str(tmp_path / "run")}
    run_notebook(path, tmp_path / "out.ipynb", parameters, request_save_on_cell_execute=False)
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert all(cell.execution_count for cell in code_cells(executed))
    results = json.loads((tmp_path / f"run/{scale}-1/results.json").read_text())
    assert (results["scale"], results["seed"]) == (scale, 1)


def test_each_setting_can_be_changed_in_a_running_notebook(tmp_path: Path) -> None:
    nb = nbformat.read(FOLDER / "18_official_checkpoints.ipynb", as_version=4)  # cheap at "cpu"
    cells, nb.cells = code_cells(nb), []
    for scale, seed, run_dir in [("smoke", 0, "a"), ("smoke", 1, "a"), ("cpu", 1, "b")]:
        values = f"\nscale, seed, run_dir = {scale!r}, {seed}, {str(tmp_path / run_dir)!r}"
        added = [values if "parameters" in tags(cell) else "" for cell in cells]
        nb.cells += [new_code_cell(c.source + more) for c, more in zip(cells, added, strict=True)]
    nbformat.write(nb, tmp_path / "again.ipynb")
    run_notebook(tmp_path / "again.ipynb", tmp_path / "out.ipynb", {})
    found = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("results.json")}
    assert found == {"a/smoke-0", "a/smoke-1", "b/cpu-1"}


@pytest.mark.parametrize("path", ASSIGNMENTS, ids=lambda path: path.stem)
def test_the_solutions_of_an_assignment_earn_all_points(path: Path, tmp_path: Path) -> None:
    nb = nbformat.read(path, as_version=4)
    assert list(outputs(nb, path.stem)) == []
    for stub, solution in pairwise(code_cells(nb)):
        if "exercise" in tags(stub):  # the solution in place of the dots
            written = re.sub(r"solution_|, solved|^%%.*\n|\n\n\nassert(?s:.*)", "", solution.source)
            kept = re.findall(r"^(?:import|from|found =|grade|points).*", stub.source, re.MULTILINE)
            stub.source = "\n".join([written, *kept])
    nbformat.write(nb, tmp_path / "solved.ipynb")
    parameters = {"scale": "smoke", "seed": 1, "run_dir": str(tmp_path)}
    run_notebook(tmp_path / "solved.ipynb", tmp_path / "out.ipynb", parameters)
    points = json.loads((tmp_path / "smoke-1/points.json").read_text())
    assert points["earned"] == points["of"]
