"""The notebooks: their form, and an execution with injected parameters whose results are held.

`pytest --nbval-lax` executes them once more, as they are: see the Makefile.
"""

import base64
import copy
import json
import os
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_results import RESULTS

from minildm.notebook import WIDGET, run_notebook

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MAX_BYTES, MAX_MEDIAN, MAX_CELL = 800_000, 6, 15  # of a file; lines of a code cell, without blanks
ABSOLUTE = re.compile(
    r"(?<![\w./:])(/(home|root|Users|tmp|var|opt|mnt|work|private|content)/|[A-Z]:\\)"
)

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


# Form. Each rule yields what is wrong with a notebook called `name`.


def code_cells(nb: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def outputs(nb: NotebookNode) -> Iterator[tuple[NotebookNode, NotebookNode]]:
    for cell in code_cells(nb):
        yield from ((cell, output) for output in cell.outputs)


def has_figure(cell: NotebookNode) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", ()))


def opening(nb: NotebookNode, name: str) -> Iterator[str]:
    first = nb.cells[0].source if nb.cells[0].cell_type == "markdown" else ""
    if not first.startswith(f"# {name[:2]} · ") or "?" not in first.splitlines()[0]:
        yield "the first cell must be a title with the notebook's number and its question"
    for word in ("Needed before", "Takes", "CPU", "GPU", "In the paper"):
        if word not in first:
            yield f"the first cell does not say: {word}"
    if (
        f"https://colab.research.google.com/github/minildm/minildm/blob/main/notebooks/{name}.ipynb"
        not in first
    ):
        yield "the first cell must open this notebook in Colab"


def parameters(nb: NotebookNode, name: str) -> Iterator[str]:
    cells = [cell.source for cell in code_cells(nb) if "parameters" in tags(cell)]
    if len(cells) != 1:
        yield f"{len(cells)} cells are tagged `parameters`, it must be one"
    found = re.findall(r"^(\w+) = ", "\n".join(cells), re.MULTILINE)
    if sorted(found) != ["run_dir", "scale", "seed"]:
        yield f"the parameters are {found}, they must be scale, seed, run_dir"
    if f'run_dir = "runs/{name}"' not in "".join(cells):
        yield f"run_dir must be runs/{name}"


def cell_lengths(nb: NotebookNode, name: str) -> Iterator[str]:
    lines = [sum(bool(line.strip()) for line in c.source.splitlines()) for c in code_cells(nb)]
    if lines and statistics.median(lines) > MAX_MEDIAN:
        yield f"half of the code cells have over {statistics.median(lines)} lines"
    for cell, n in zip(code_cells(nb), lines, strict=True):
        if n > MAX_CELL:
            yield f"cell {cell.id} has {n} lines"


def execution(nb: NotebookNode, name: str) -> Iterator[str]:
    counts = [cell.execution_count for cell in code_cells(nb)]
    if counts != list(range(1, len(counts) + 1)):
        yield f"executed as {counts}: not all, in order, from a fresh kernel"
    for cell, output in outputs(nb):
        if output.output_type == "error":
            yield f"cell {cell.id} failed: {output.ename}"
        if output.get("name") == "stderr":
            yield f"cell {cell.id} left warnings: {output.text[:80]}"
        if WIDGET in output.get("data", {}):
            yield f"cell {cell.id} left a widget that nobody sees"


def figures(nb: NotebookNode, name: str) -> Iterator[str]:
    shown = [i for i, cell in enumerate(nb.cells) if has_figure(cell)]
    if 4 * len(shown) < len(code_cells(nb)):
        yield f"{len(shown)} figures for {len(code_cells(nb))} code cells"
    for previous, i in zip([0, *shown], shown, strict=False):
        cell, kinds = nb.cells[i], [c.cell_type for c in nb.cells]
        if "markdown" not in kinds[previous:i]:
            yield f"cell {cell.id}: no prose leads to its figure"
        if kinds[i + 1 : i + 2] != ["markdown"]:
            yield f"cell {cell.id}: no sentence after its figure"
    for cell, output in outputs(nb):
        if "image/png" in output.get("data", {}):
            if len(output.metadata.get("image/png", {}).get("alt", "")) < 20:
                yield f"cell {cell.id}: its figure has no alt text"
            if not base64.b64decode(output.data["image/png"]).startswith(b"\x89PNG"):
                yield f"cell {cell.id}: its figure is no PNG"


def exercises(nb: NotebookNode, name: str) -> Iterator[str]:
    cells = code_cells(nb)
    stubs = [i for i, cell in enumerate(cells) if "exercise" in tags(cell)]
    if len(stubs) < 2:
        yield f"{len(stubs)} exercises, it must be two"
    if sum("solution" in tags(cell) for cell in cells) != len(stubs):
        yield "not as many solutions as exercises"
    for i in stubs:
        following = cells[i + 1] if i + 1 < len(cells) else new_code_cell()
        if "solution" not in tags(following):
            yield f"exercise {cells[i].id} has no solution behind it"
        elif not following.metadata.get("jupyter", {}).get("source_hidden"):
            yield f"solution {following.id} is not folded away"
        if ".check_" not in cells[i].source or ".ok" not in following.source:
            yield f"exercise {cells[i].id} is not checked, or its solution not asserted"


def equations(nb: NotebookNode, name: str) -> Iterator[str]:
    prose = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    code = "\n".join(cell.source for cell in code_cells(nb))
    numbers = [int(n) for n in re.findall(r"\\tag\{(\d+)\}", prose)]
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"equations are numbered {numbers}"
    for n in numbers:
        if not re.search(rf"#.*\({n}\)", code):
            yield f"no comment in the code cites equation ({n})"


def promises(nb: NotebookNode, name: str) -> Iterator[str]:
    code = "\n".join(cell.source for cell in code_cells(nb))
    if not re.search(r"^ *assert ", code, re.MULTILINE):
        yield "no claim is asserted"
    if "results.json" not in code_cells(nb)[-1].source:
        yield "the last cell does not write results.json"
    for cell in nb.cells:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", cell.source):
            if cell.cell_type == "markdown" and not (FOLDER / target).exists():
                yield f"cell {cell.id} links to {target}, which is not there"


def traces(nb: NotebookNode, name: str) -> Iterator[str]:
    """What tells where and by whom the notebook was executed."""
    for cell, output in outputs(nb):
        said = [output.get("text", ""), json.dumps(output.get("metadata", {}))]
        said += [str(v) for kind, v in output.get("data", {}).items() if kind != "image/png"]
        text = "\n".join(said)
        if ABSOLUTE.search(text) or str(Path.home()) + os.sep in text:
            yield f"cell {cell.id} shows an absolute path"
    if "papermill" in nb.metadata or any("papermill" in c.metadata for c in nb.cells):
        yield "papermill left its metadata, which hold paths"


RULES = (
    opening,
    parameters,
    cell_lengths,
    execution,
    figures,
    exercises,
    equations,
    promises,
    traces,
)


@every_notebook
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_notebook_keeps_the_rule(rule: Callable[..., Iterator[str]], path: Path) -> None:
    found = list(rule(nbformat.read(path, as_version=4), path.stem))
    assert not found, "\n".join(found)


@every_notebook
def test_the_notebook_is_small_and_valid(path: Path) -> None:
    assert path.stat().st_size <= MAX_BYTES
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem)
    nbformat.validate(nbformat.read(path, as_version=nbformat.NO_CONVERT))


def test_there_are_notebooks() -> None:
    assert "00_quickstart" in [path.stem for path in NOTEBOOKS]


PNG = (  # one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk"
    "+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def exemplary() -> NotebookNode:
    """A tiny notebook that keeps every rule."""
    title = (
        "# 99 · Why?\n[Colab](https://colab.research.google.com/github/minildm/minildm/blob/main/"
        "notebooks/99_tiny.ipynb)\nNeeded before, Takes: CPU, GPU. In the paper: Sec. 1"
    )
    figure = new_output(
        "display_data", {"image/png": PNG}, metadata={"image/png": {"alt": "One blue pixel alone."}}
    )
    check = "quickstart.check_noised(noised)"
    hidden = {"tags": ["solution"], "jupyter": {"source_hidden": True}}
    cells = [
        new_markdown_cell(title),
        new_code_cell(
            'scale = "cpu"\nseed = 0\nrun_dir = "runs/99_tiny"', metadata={"tags": ["parameters"]}
        ),
        new_markdown_cell(r"$$a = b \tag{1}$$"),
        new_code_cell("assert scale  # (1)", outputs=[figure]),
        new_markdown_cell("*A pixel.*"),
    ]
    for _ in range(2):
        cells += [
            new_code_cell(check, metadata={"tags": ["exercise"]}),
            new_code_cell(f"assert {check}.ok", metadata=copy.deepcopy(hidden)),
        ]
    cells[5]["outputs"] = [copy.deepcopy(figure)]
    cells.insert(6, new_markdown_cell("*The same.*"))
    cells.append(new_code_cell('print("results.json")'))
    nb = new_notebook(cells=cells)
    for count, cell in enumerate(code_cells(nb), 1):
        cell.execution_count = count
    return nb


def test_an_exemplary_notebook_is_not_reported() -> None:
    assert [found for rule in RULES for found in rule(exemplary(), "99_tiny")] == []


def edit(cell: int, **fields: Any) -> Callable[[NotebookNode], None]:
    return lambda nb: nb.cells[cell].update(fields)


def output(cell: int, kind: str, **fields: Any) -> Callable[[NotebookNode], None]:
    return lambda nb: nb.cells[cell].outputs.append(new_output(kind, **fields))


BROKEN: dict[str, tuple[Callable[..., Iterator[str]], str, Callable[[NotebookNode], Any]]] = {
    "no question": (opening, "its question", edit(0, source="# 99 · Statement.")),
    "no run time": (opening, "Takes", edit(0, source="# 99 · Why?")),
    "no Colab": (opening, "Colab", edit(0, source="# 99 · Why? Needed before Takes")),
    "two parameters cells": (
        parameters,
        "2 cells",
        lambda nb: nb.cells[3].metadata.update(tags=["parameters"]),
    ),
    "another parameter": (parameters, "must be scale", edit(1, source="width = 3")),
    "another run_dir": (parameters, "run_dir must be", edit(1, source='run_dir = "elsewhere"')),
    "long cell": (cell_lengths, "has 16 lines", edit(3, source="x = 1\n\n" * 16)),
    "long cells": (
        cell_lengths,
        "half of",
        lambda nb: [c.update(source="x = 1\n" * 7) for c in code_cells(nb)],
    ),
    "not executed": (execution, "not all", edit(3, execution_count=None)),
    "out of order": (execution, "in order", edit(3, execution_count=9)),
    "error": (execution, "failed: KeyError", output(3, "error", ename="KeyError", evalue="x")),
    "warning": (execution, "left warnings", output(3, "stream", name="stderr", text="Warning")),
    "widget": (execution, "a widget", output(3, "display_data", data={WIDGET: {}})),
    "few figures": (figures, "2 figures for", lambda nb: nb.cells.extend([new_code_cell()] * 3)),
    "no prose before": (figures, "no prose leads", lambda nb: nb.cells.pop(4)),
    "no prose after": (figures, "no sentence after", lambda nb: nb.cells.pop(6)),
    "no alt text": (
        figures,
        "no alt text",
        lambda nb: nb.cells[3].outputs[0].metadata.clear(),
    ),
    "not a PNG": (
        figures,
        "is no PNG",
        lambda nb: nb.cells[3].outputs[0].data.update({"image/png": "AAAA"}),
    ),
    "one exercise": (exercises, "1 exercises", lambda nb: nb.cells[5].metadata.pop("tags")),
    "no solution": (exercises, "no solution", lambda nb: nb.cells[7].metadata.pop("tags")),
    "open solution": (exercises, "not folded", lambda nb: nb.cells[7].metadata.pop("jupyter")),
    "unchecked": (exercises, "is not checked", edit(5, source="pass")),
    "number left out": (equations, "numbered [2]", edit(2, source=r"$$a \tag{2}$$")),
    "not cited": (equations, "cites equation (1)", edit(3, source="assert scale")),
    "no claim": (promises, "no claim", lambda nb: [c.update(source="") for c in code_cells(nb)]),
    "no results": (promises, "results.json", edit(-1, source="pass")),
    "dead link": (promises, "98_x.ipynb", edit(4, source="[on](98_x.ipynb)")),
    "path": (traces, "absolute path", output(3, "stream", text="in /home/ada/x")),
    "Windows path": (traces, "absolute path", output(3, "stream", text=r"in 'C:\Users\ada'")),
    "home": (traces, "absolute path", output(3, "stream", text=f"{Path.home()}/x")),
    "papermill": (traces, "papermill", lambda nb: nb.metadata.update(papermill={})),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_seeded_fault_is_found(case: str) -> None:
    rule, said, spoil = BROKEN[case]
    nb = exemplary()
    spoil(nb)
    found = list(rule(nb, "99_tiny"))
    assert any(said in line for line in found), found


# Execution.


@every_notebook
def test_the_notebook_runs_with_other_parameters(path: Path, tmp_path: Path) -> None:
    run_dir, scale = tmp_path / "run", os.environ["MINILDM_SCALE"]
    asked = {"scale": scale, "seed": 1, "run_dir": str(run_dir)}
    out = run_notebook(path, tmp_path / "out.ipynb", asked)
    results = json.loads((run_dir / "results.json").read_text())
    assert (results["scale"], results["seed"]) == (scale, 1)
    assert results["device"] and results["seconds"] > 0
    RESULTS[path.stem](results)
    executed = nbformat.read(out, as_version=4)
    assert all(cell.execution_count for cell in code_cells(executed))
    assert list(figures(executed, path.stem)) == []


@every_notebook
def test_an_unknown_parameter_is_refused_before_anything_runs(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sead, speed: .* has none .*scale, seed, run_dir"):
        run_notebook(path, tmp_path / "out.ipynb", {"speed": 1, "seed": 0, "sead": 2})
    assert not list(tmp_path.iterdir())
