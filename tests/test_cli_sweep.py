"""`minildm sweep`: what it hands on, what it says, how it ends."""

import sys
from pathlib import Path
from typing import Any

import pytest
from test_sweep_running import SWEEP
from typer.testing import CliRunner, Result

from minildm import SWEEPS, cli
from minildm.sweeps import SweepResult
from minildm.sweeps.execution import Outcome


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What `run_sweep` is called with; it says that one of two runs failed if a level is named."""
    calls: list[Any] = []

    def run_sweep(sweep: Any, folder: Path, **options: Any) -> SweepResult:
        calls.append((sweep, {"folder": folder, **options}))
        failed = {"f-8-seed0": folder / "notebook.ipynb"} if options["levels"] else {}
        outcomes = [Outcome("f-4-seed0", "done"), Outcome("f-8-seed0", "failed", "why")]
        return SweepResult(folder / "table.csv", folder / "index.html", outcomes, failed)

    monkeypatch.setattr(cli, "run_sweep", run_sweep)
    return calls


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["sweep", *words])


def test_a_standard_sweep_is_run_in_a_folder_of_its_name(asked: Any) -> None:
    ended = invoke("f")
    [(sweep, options)] = asked
    assert ended.exit_code == 0
    assert sweep == SWEEPS["f"]
    assert options["folder"] == Path("runs/sweep-f")
    assert (options["jobs"], options["devices"], options["threads"]) == (None, (), 1)
    assert "index.html" in ended.output


def test_options_are_handed_on(asked: Any, tmp_path: Path) -> None:
    ended = invoke(
        *("objective", "--out", str(tmp_path), "--jobs", "3", "--device", "cpu"),
        *("--device", "mps", "--threads", "2", "--seeds", "5", "--samples", "50", "--seed", "4"),
        *("--level", "v", "--scheduler", "tcp://here:1", "--set", "train.steps=2500"),
        *("--set", 'data.styles=["noto"]', "--set", "sampling.sampler=heun"),
    )
    [(sweep, options)] = asked
    assert ended.exit_code == 1  # one failed
    assert "1 of 2 runs failed" in ended.output
    assert (sweep.seeds, sweep.samples) == ((0, 1, 2, 3, 4), 50)
    settings = sweep.settings("v")
    assert settings["train.steps"] == 2500
    assert settings["data.styles"] == ["noto"]
    assert settings["sampling.sampler"] == "heun"
    assert options == {
        "folder": tmp_path, "jobs": 3, "devices": ["cpu", "mps"], "threads": 2, "levels": ["v"],
        "seeds": [4], "scheduler": "tcp://here:1", "say": options["say"],
    }  # fmt: skip


def test_a_toml_file_is_a_sweep(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[grid]\n"unet.width" = [16, 32]\n')
    assert invoke(str(tmp_path / "mine.toml")).exit_code == 0
    assert list(asked[0][0].levels) == ["16", "32"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("g",), "sweep='g' is no TOML file, nor one of f, regularizer"),
        (("f", "--set", "train.stps=3"), "did you mean 'train.steps'"),
        (("f", "--set", "train.steps"), "must be NAME=VALUE"),
        (("f", "--samples", "5"), "samples=5 are too few"),
        (("f", "--seeds", "0"), "seeds=()"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    asked: Any, words: tuple[str, ...], said: str
) -> None:
    ended = invoke(*words)
    assert isinstance(ended.exception, ValueError)  # `main` says it in one line
    assert said in str(ended.exception)
    assert not asked


def test_a_report_alone_runs_nothing(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "SWEEPS", {"rate": SWEEP})
    ended = invoke("rate", "--out", str(tmp_path), "--report")
    assert ended.exit_code == 0
    assert not asked
    assert "No run is finished yet" in (tmp_path / "index.html").read_text()


def test_a_missing_extra_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    words = ["sampler", "--out", str(tmp_path), "--scheduler", "tcp://here:1"]
    monkeypatch.setattr(sys, "argv", ["minildm", "sweep", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "a scheduler needs Dask: pip install" in capsys.readouterr().err
