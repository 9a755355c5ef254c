"""`minildm sweep`: what it hands on, what it says, how it ends."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from test_instructors import GUIDE, commands
from test_sweep_running import SWEEP
from typer.testing import CliRunner, Result

from minildm import SWEEPS, cli, run_sweep
from minildm.sweeps import SweepResult, command
from minildm.sweeps.execution import Outcome
from minildm.sweeps.running import claim


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
        *("--level", "v", "--set", "train.steps=2500", "--measure-at", "100,200"),
        *("--set", 'data.styles=["noto"]', "--set", "sampling.sampler=heun"),
        *("--measure-at", "2500"),
    )
    [(sweep, options)] = asked
    assert ended.exit_code == 1  # one failed
    assert "1 of 2 runs failed" in ended.output
    assert (sweep.seeds, sweep.samples) == ((0, 1, 2, 3, 4), 50)
    assert sweep.measure_at == (100, 200, 2500)
    settings = sweep.settings("v")
    assert settings["train.steps"] == 2500
    assert settings["data.styles"] == ["noto"]
    assert settings["sampling.sampler"] == "heun"
    assert options == {
        "folder": tmp_path, "jobs": 3, "devices": ["cpu", "mps"], "threads": 2, "levels": ["v"],
        "seeds": [4], "scheduler": None, "say": options["say"],
    }  # fmt: skip


def test_a_scheduler_is_handed_on_and_says_where_runs_go(asked: Any, tmp_path: Path) -> None:
    invoke("sampler", "--scheduler", "tcp://here:1", "--threads", "2")
    [(_, options)] = asked
    assert (options["scheduler"], options["threads"]) == ("tcp://here:1", 2)
    for other in ({"jobs": 2}, {"devices": ["cpu"]}):
        with pytest.raises(ValueError, match="scheduler='tcp://here:1' does not go with devices="):
            run_sweep(SWEEP, tmp_path / "sweep", scheduler="tcp://here:1", **other)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("address", ["", "foo"])
def test_an_address_that_is_none_is_said_before_a_folder_is_made(
    address: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"scheduler='{address}' does not answer"):
        run_sweep(SWEEP, tmp_path / "sweep", scheduler=address)
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("--set train.steps=500", (250, 500)),
        ("--set train.steps=100", ()),  # the last step is always measured
        ("--set train.steps=20000", (250, 500, 1000, 2000)),
        ("--set train.steps=20000 --measure-at 5000,10000", (5000, 10000)),
        ("--set train.steps=90 --measure-at 30 --measure-at 60", (30, 60)),
        ("--measure-at 2000", (2000,)),
    ],
)
def test_steps_to_measure_at_follow_the_steps_of_the_training(
    asked: Any, words: str, steps: tuple[int, ...]
) -> None:
    assert invoke("f", *words.split()).exit_code == 0
    assert asked[0][0].measure_at == steps


def guide_lines() -> list[str]:
    """The guide's commands, and its options alone, as of the sweep that it speaks of."""
    whole = [line.removeprefix("minildm sweep ") for line in commands() if " sweep " in line]
    options = re.findall(r"`(--[a-z-]+ [^`]+)`", GUIDE)
    return [*whole, *(f"f {line}" for line in options if not line.startswith("--folder"))]


def test_the_guide_shows_how_to_sweep() -> None:
    said = " ".join(guide_lines())
    for option in ("--report", "--level", "--set", "--measure-at", "--samples", "--scheduler"):
        assert option in said


@pytest.mark.parametrize("line", guide_lines())
def test_the_guide_s_commands_are_valid_sweeps(
    asked: Any, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "collect", lambda *two, **_: asked.append(two))
    monkeypatch.setattr(
        cli, "report_again", lambda *a, **k: (command.report_again(*a, **k), "page")
    )
    Path("runs/class/runs").mkdir(parents=True)
    Path("width.toml").write_text('[grid]\n"unet.width" = [16, 24]\n')
    ended = invoke(*shlex.split(line))
    assert not isinstance(ended.exception, ValueError), ended.exception
    [(sweep, _)] = asked
    for run in sweep.runs(seeds=[0]):
        steps = run.plan().experiment.train.steps
        assert all(step <= steps for step in run.measure_at)


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
        (("f", "--measure-at", "2001"), "measure_at=(2001,) must lie in 1..2000"),
        (("f", "--measure-at", "1e3"), "--measure-at '1e3' must be steps, as in 250,500"),
        (("f", "--set", "train.steps=many"), "train.steps='many' must be"),
        (("f", "--set", "train={steps = 3}"), "must give one value"),
        (("f", "--set", "sampling.guidance_interval=5"), "guidance_interval=5 must be two whole"),
        (("sampler", "--set", "sampling.sampler=heun"), "each level sets its own sampling.sampler"),
        (("sampler", "--measure-at", "5"), "measure_at=(5,) must be empty: nothing is trained"),
        (("f", "--report", "--out", "nowhere/typo"), "--out nowhere/typo holds no sweep"),
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
    monkeypatch.setattr(command, "SWEEPS", {"rate": SWEEP})
    words = ("rate", "--out", str(tmp_path), "--report")
    assert "holds no sweep" in str(invoke(*words).exception)
    assert not [*tmp_path.iterdir()]
    claim(SWEEP, tmp_path)
    assert invoke(*words).exit_code == 0
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
