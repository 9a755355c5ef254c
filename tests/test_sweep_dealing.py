"""Who does which run of a sweep, when, and what is left when one ends: with processes that only
play a run, so that what happens between them happens in a second."""

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_sweep_running import LONG, SWEEP, start, timed, until

from minildm import pretrained, run_sweep, save_model
from minildm.files import write_json
from minildm.sweeps import collect, execution, one_run, running
from minildm.sweeps.execution import ENDED, ERROR, RESULTS, Outcome, Place, Stop, perform
from minildm.sweeps.one_run import PRECISION, first_stage_of, settled
from minildm.sweeps.running import Local, folder_of
from minildm.sweeps.settings import plan_of
from minildm.sweeps.timing import time_levels, timing_path

THREE = replace(LONG, seeds=(0, 1, 2))
PLAY = """
import json, os, pathlib, sys, threading, time
folder, who = pathlib.Path(sys.argv[1]), {who!r}
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
with open(folder / "begun", "a") as file:
    file.write(who)
while not (folder / ("go " + who)).exists():
    time.sleep(0.02)
if (folder / ("go " + who)).read_text():
    sys.exit("it failed")
run = json.loads((folder / "run.json").read_text())
(folder / "ended.json").write_text(json.dumps(dict(run=run, rows=[], device=who)))
"""


def play(who: str, patience: float = 0.3) -> None:
    """From now on a run's process waits for the file "go WHO" in its folder, and fails or ends."""

    def command(_module: str, words: Sequence[str]) -> list[str]:
        return [sys.executable, "-S", "-c", PLAY.format(who=who), *words]

    execution.command, execution.PATIENCE = command, patience


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("command", "PATIENCE"):  # to be put back
        monkeypatch.setattr(execution, name, getattr(execution, name))
    play("B")


def test_two_processes_share_a_sweep_and_ctrl_c_ends_one_at_once(
    played: None, tmp_path: Path
) -> None:
    timed(THREE, tmp_path)
    first, second, third = places = [folder_of(tmp_path, run) for run in THREE.runs()]
    done: dict[str, Any] = {}

    def ours() -> None:
        done["result"] = run_sweep(THREE, tmp_path, jobs=2, say=lambda _: None)

    thread = threading.Thread(target=ours)
    thread.start()
    until(lambda: all((place / "begun").is_file() for place in (first, second)))
    before = "import test_sweep_dealing as d; d.play('A')"
    other = start(tmp_path, "THREE", f"{before}; t.THREE = d.THREE")
    until(lambda: (third / "begun").is_file())
    (third / "go A").touch()
    until(lambda: (third / RESULTS).is_file())
    (second / "go B").write_text("failing")  # then the other, which waits for it, takes it over
    until(lambda: (second / "begun").read_text() == "BA")
    other.send_signal(signal.SIGINT)  # while it carries out one and waits for another
    assert other.wait(timeout=20) in (-signal.SIGINT, 1, 130)
    (first / "go B").touch()
    thread.join(timeout=60)
    assert [(place / "begun").read_text() for place in places] == ["B", "BA", "A"]
    assert {o.name: o.state for o in done["result"].outcomes} == {
        first.name: "done", second.name: "failed", third.name: "was done"
    }  # fmt: skip
    assert not (second / ERROR).exists()  # nor does the interrupted one say that it failed
    assert f"{second.name}: begun" in done["result"].report.read_text()


def test_runs_are_dealt_over_the_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    together, seen = threading.Barrier(3), []  # breaks unless three are at work at once

    def fake(_folder: Path, content: dict, place: Place, *_: Any) -> Outcome:
        together.wait(timeout=20)
        seen.append(place)
        return Outcome(str(content["seed"]), "done")

    monkeypatch.setattr(running, "perform", fake)
    runs = replace(LONG, seeds=tuple(range(6))).runs()
    places = [Place("cuda:0", 2), Place("cuda:1", 2)]
    with Local(places, 3) as engine:
        found = [outcome.name for outcome in engine.outcomes(runs, tmp_path, None)]
    assert sorted(found) == list("012345")
    assert sorted(seen) == [places[0]] * 4 + [places[1]] * 2


def test_what_goes_wrong_around_a_run_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(_module: str, words: Sequence[str], *_: Any) -> tuple[int, str]:
        if words[0].endswith("seed0"):
            raise PermissionError(13, "Permission denied", words[0])
        return 1, "Traceback\nOSError: disk\n\n"

    monkeypatch.setattr(execution, "in_process", fails)
    with Local([Place()], 1) as engine:
        found = {o.name[-5:]: o for o in engine.outcomes(THREE.runs()[:2], tmp_path, None)}
    assert {o.state for o in found.values()} == {"failed"}
    assert found["seed0"].message.startswith("PermissionError: [Errno 13]")
    assert found["seed1"].message == "OSError: disk"


def test_a_run_is_finished_when_its_notebook_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    [run] = LONG.runs()
    ends = iter(["killed", "killed", ""])

    def plays(*_: Any) -> tuple[int, str]:
        write_json(tmp_path / ENDED, {"run": run.as_dict(), "rows": []})
        said = next(ends)
        return (1 if said else 0), said

    monkeypatch.setattr(execution, "in_process", plays)
    states = [perform(tmp_path, run.as_dict()).state for _ in range(4)]
    assert states == ["failed", "failed", "done", "was done"]


def test_of_an_error_of_several_lines_the_first_is_said() -> None:
    error = SimpleNamespace(ename="RuntimeError", evalue="CUDA error: no memory\nCompile with ...")
    assert execution._first_line(error) == "RuntimeError: CUDA error: no memory"
    error.evalue = ""
    assert execution._first_line(error) == "RuntimeError:"


def test_after_the_end_nothing_is_begun(tmp_path: Path) -> None:
    stop, [run] = Stop(), LONG.runs()
    stop.set()
    assert perform(tmp_path, run.as_dict(), stop=stop).state == "interrupted"
    with pytest.raises(execution.Interrupted):
        stop.begin(["never"], {})
    assert not (tmp_path / ERROR).exists()


def test_a_level_is_timed_where_its_runs_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shows = "import os, sys; e = os.environ; sys.stderr.write('|'.join([*sys.argv[1:3], *map("
    shows += "e.get, ('CUDA_VISIBLE_DEVICES', 'OMP_NUM_THREADS', 'MINILDM_CACHE'))]))"

    def command(module: str, words: Sequence[str]) -> list[str]:
        assert module == "minildm.sweeps.timing"
        return [sys.executable, "-S", "-c", shows, *words]

    monkeypatch.setattr(execution, "command", command)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = dict(os.environ)
    with Local([Place("cuda:1", 3), Place("cuda:0", 3)], 2) as engine:
        said = engine.time(LONG.runs(), tmp_path).split("|")
    assert said[:4] == [str(tmp_path), "cuda", "1", "3"]
    assert not Path(said[4]).parent.exists()  # latents of a random first stage are not kept
    assert before == dict(os.environ)


def test_timings_of_a_folder_never_overlap(tmp_path: Path) -> None:
    at_work, most = [], []

    def measure(runs: Sequence[Any], folder: Path) -> str:
        at_work.append(runs)
        most.append(len(at_work))
        threading.Event().wait(0.2)
        for run in runs:
            write_json(timing_path(folder, run), {})
        at_work.remove(runs)
        return ""

    threads = [
        threading.Thread(target=time_levels, args=(tmp_path, runs, measure, lambda _: None))
        for runs in (SWEEP.runs(["low"]), SWEEP.runs(["wild"]), SWEEP.runs())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1]
    said: list[str] = []
    (tmp_path / "other").mkdir()
    (tmp_path / "other/timing").touch()  # what cannot be written is said, and no more
    time_levels(tmp_path / "other", SWEEP.runs(["low"]), measure, said.append)
    assert said[0].startswith("rate=low: has no time, FileExistsError")


def test_levels_of_collected_runs_are_timed_where_the_table_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    low, _ = SWEEP.runs()
    rows = [{"step": 4, "images": 16, "sampling": "plain", "metric": "kid", "value": 1.0, "n": 20}]
    results = {"run": low.as_dict(), "rows": rows, "device": "cpu", "first_stage": "a"}
    write_json(folder_of(tmp_path, low) / RESULTS, results)
    asked: list[Any] = []

    def cannot(_folder: Path, contents: Sequence[dict], *_: Any) -> str:
        asked.append([content["level"] for content in contents])
        return "Traceback\nMemoryError: too large"

    def can(folder: Path, contents: Sequence[dict], *_: Any) -> str:
        timed(replace(SWEEP, levels={"low": SWEEP.levels["low"]}), folder)
        return ""

    said: list[str] = []
    monkeypatch.setattr(running, "time_here", cannot)
    table, report = collect(SWEEP, tmp_path, say=said.append)
    assert asked == [["low"]]  # the other has no run yet
    assert "rate=low: has no time, MemoryError: too large" in said
    assert any("no time was measured of low" in line for line in said)
    assert "no time was measured of low" in report.read_text()
    monkeypatch.setattr(running, "time_here", can)
    collect(SWEEP, tmp_path, say=said.append)
    assert "4,4,16" in table.read_text()  # step, seconds, images


def test_a_trained_first_stage_that_was_trained_on_is_another(tmp_path: Path) -> None:
    autoencoder, folder = pretrained("emoji-kl-f4"), tmp_path / "mine"
    save_model(autoencoder, folder)
    settings = {"trained_first_stage": str(folder)}
    before = first_stage_of(plan_of(settings), tmp_path)
    with torch.no_grad():
        autoencoder.scale.mul_(2)
    save_model(autoencoder, folder)
    assert first_stage_of(plan_of(settings), tmp_path) != before


def test_results_of_a_model_that_has_changed_are_not_taken(tmp_path: Path) -> None:
    sweep = replace(SWEEP, levels={"a": {"model": "emoji-class"}}, shared={}, measure_at=())
    [run] = sweep.runs()
    place = folder_of(tmp_path, run)
    results = {"run": run.as_dict(), "rows": [], "device": "cpu", "given": "0123456789abcdef"}
    write_json(place / RESULTS, results)
    outcome = perform(place, run.as_dict())
    assert outcome.state == "failed"
    assert "other weights than emoji-class" in outcome.message
    timed(sweep, tmp_path)
    said: list[str] = []
    collect(sweep, tmp_path, say=said.append)
    assert any(f"{run.name} is left out" in line for line in said)
    write_json(place / RESULTS, results | {"given": one_run.given(run.plan())})
    assert perform(place, run.as_dict()).state == "was done"


def test_auto_is_chosen_once_for_a_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = plan_of({"preset": "emoji-class-f4"})
    chosen = iter(["bf16", "fp32"])
    monkeypatch.setattr(one_run, "pick_precision", lambda *_: next(chosen))
    for _ in range(2):
        found = settled(plan, tmp_path, "cpu")
        assert found.experiment.train.precision == found.first_stage.train.precision == "bf16"
    asked = plan_of({"preset": "emoji-class-f4", "train.precision": "fp32"})
    assert settled(asked, tmp_path, "cpu").experiment.train.precision == "fp32"
    assert json.loads((tmp_path / PRECISION).read_text())["auto"] == "bf16"


def test_a_step_to_measure_at_costs_no_other_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}

    def train_ldm(experiment: Any, **where: Any) -> Any:
        asked.update(where, save_every=experiment.train.save_every)
        return iter(())

    monkeypatch.setattr(one_run, "train_ldm", train_ldm)
    settings = {"train.steps": 1000, "train.save_every": 200, "first_stage": "pixels"}
    sweep = replace(SWEEP, levels={"a": settings}, shared={}, measure_at=(333,))
    assert not list(one_run.train(sweep.runs()[0], tmp_path / "run", tmp_path, "cpu"))
    assert (asked["save_every"], asked["save_at"]) == (200, (333, 1000))
