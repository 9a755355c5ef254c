"""The guide for instructors: its code runs, its commands exist, its table is the measured one."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from scripts import command_of
from typer.testing import CliRunner

import minildm
from minildm import cli

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "notebooks/INSTRUCTORS.md").read_text(encoding="utf-8")


def blocks(language: str) -> Iterator[str]:
    """What stands between ```LANGUAGE and ```, indentation taken away."""
    for indent, tongue, text in re.findall(r"^( *)```(\w*)\n(.*?)^ *```", GUIDE, re.M | re.S):
        if tongue == language:  # all are matched: an end would else be taken for a beginning
            yield "\n".join(line.removeprefix(indent) for line in text.splitlines())


def test_its_tomls_are_sweeps(tmp_path: Path) -> None:
    whole, folder = blocks("toml")
    (tmp_path / "width.toml").write_text(whole)
    sweep = minildm.read_sweep(tmp_path / "width.toml")
    assert len(sweep.levels) == 4
    assert (sweep.name, sweep.samples, sweep.measure_at) == ("width", 300, (500, 1000))
    shared = tomllib.loads(folder)["shared"]
    assert minildm.SWEEPS["objective"].changed(**shared).settings("v")["data.kind"] == "folder"


def test_its_python_does_what_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(minildm, "run_sweep", lambda *args, **options: asked.append(args))
    check, sweep = blocks("python")
    exec(compile(check, "guide", "exec"), {})
    assert "the noise is not weighed" in capsys.readouterr().out
    exec(compile(sweep, "guide", "exec"), {})
    [(found, folder)] = asked
    assert folder == "runs/drop"
    assert [run.plan().experiment.conditioner.p_uncond for run in found.runs(seeds=[0])] == [
        0.0, 0.1, 0.5
    ]  # fmt: skip


def commands() -> list[str]:
    inside = [line.strip() for block in blocks("") for line in block.splitlines()]
    inline = re.findall(r"`(minildm [^`]+)`", GUIDE)
    return [line for line in (*inside, *inline) if line.startswith("minildm ")]


@pytest.mark.parametrize("line", commands())
def test_its_commands_are_whole(line: str) -> None:
    """Read as the command line reads them: options that do not exist, or that lack, are errors."""
    _, name, *words = shlex.split(line)
    command = typer.main.get_command(cli.app).get_command(None, name)
    assert command.make_context(name, words).params


@pytest.mark.parametrize("option", re.findall(r"`(--[a-z-]+)", GUIDE))
def test_its_options_are_those_of_a_command(option: str) -> None:
    said = "".join(
        CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "200"}).output
        for name in ("sweep", "train")
    )
    assert option in said


def test_its_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", GUIDE)
    assert len(links) > 15
    missing = [link for link in links if not (ROOT / "notebooks" / link).resolve().exists()]
    assert not missing


def test_its_table_is_the_measured_one() -> None:
    costs = command_of("notebook_costs")
    rows = costs.read(ROOT / "data/results/notebook_costs.csv")
    assert costs.with_table(GUIDE, rows) == GUIDE
    measured = {row["notebook"] for row in rows if row["scale"] == "smoke"}
    assert measured == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_a_row_replaces_its_elder_and_stands_in_order(tmp_path: Path) -> None:
    costs = command_of("notebook_costs")
    fixed = {"seconds": "9", "threads": "1", "device": "cpu, 1 threads", "date": "2026-01-01"}
    for name, scale, spent in (
        ("01_b", "cpu", "130"), ("00_a", "cpu", "95"), ("01_b", "smoke", "3"), ("00_a", "cpu", "96")
    ):  # fmt: skip
        row = {"notebook": name, "scale": scale, "cpu_seconds": spent, "peak_mib": "1536", **fixed}
        rows = costs.keep(tmp_path / "t.csv", row)
    assert [(r["notebook"], r["scale"], r["cpu_seconds"]) for r in rows] == [
        ("00_a", "cpu", "96"), ("01_b", "smoke", "3"), ("01_b", "cpu", "130")
    ]  # fmt: skip
    told = costs.table(rows)
    assert "| [01_b](01_b.ipynb) | 3 s, 1.5 GiB | 2.2 min, 1.5 GiB | not measured |" in told


def test_costs_are_measured_of_the_kernel_and_failures_say_why(tmp_path: Path) -> None:
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    costs = command_of("notebook_costs")
    first = new_code_cell('scale = "smoke"\nrun_dir = "runs"', metadata={"tags": ["parameters"]})
    for name, source in (("works", "held = b'x' * (1200 * 2**20)"), ("fails", "1 / 0")):
        kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "x"}}
        notebook = new_notebook(cells=[first, new_code_cell(source)], metadata=kernel)
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    row = costs.measure(tmp_path / "works.ipynb", "smoke")
    assert 1200 < int(row["peak_mib"]) < 1600
    assert int(row["cpu_seconds"]) <= 20
    with pytest.raises(RuntimeError, match=r"fails\.ipynb failed at smoke: (.|\n)*ZeroDivision"):
        costs.measure(tmp_path / "fails.ipynb", "smoke")
