"""A sweep on a real local cluster of two workers, one of which is killed in the middle."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_sweep_running import LONG, until

from minildm import run_sweep
from minildm.sweeps.execution import NOTEBOOK
from minildm.sweeps.one_run import RESULTS
from minildm.sweeps.running import folder_of
from minildm.sweeps.timing import timing_path

SWEEP = replace(LONG, seeds=(0, 1, 2), name="cluster").changed(**{"train.steps": 150})


@pytest.fixture
def cluster() -> Iterator[Any]:
    from distributed import LocalCluster

    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
    ) as found:
        yield found


def work_of(cluster: Any) -> dict[str, int]:
    """The process of each worker that is at work, by the run that it works on."""
    from distributed import Client

    with Client(cluster) as client:
        at_work = client.run(busy_with)
    return {name: pid for pid, name in at_work.values() if name}


def busy_with() -> tuple[int, str]:
    """On a worker: its process, and the folder that a process below it works in."""
    import psutil

    for child in psutil.Process().children():
        words = child.cmdline()
        if any("minildm.sweeps.execution" in word for word in words):
            return os.getpid(), Path(words[-2] if words[-1] == "" else words[-1]).name
    return os.getpid(), ""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_killed_worker_loses_nothing_and_nothing_is_done_twice(
    cluster: Any, tmp_path: Path
) -> None:
    import threading

    ended: dict[str, Any] = {}

    def sweep() -> None:
        ended["result"] = run_sweep(
            SWEEP, tmp_path, scheduler=cluster.scheduler_address, say=lambda _: None
        )

    thread = threading.Thread(target=sweep)
    thread.start()
    *others, victim = (folder_of(tmp_path, run) for run in SWEEP.runs())
    until(lambda: (victim / "model/training/state.pt").is_file())
    stamps = {f: (f / RESULTS).stat().st_mtime_ns for f in others if (f / RESULTS).is_file()}
    began = (victim / "model/log.csv").read_text().splitlines()[1]  # with its seconds
    os.kill(work_of(cluster)[victim.name], signal.SIGKILL)
    thread.join(timeout=300)
    assert {o.name: o.state for o in ended["result"].outcomes} == dict.fromkeys(
        (run.name for run in SWEEP.runs()), "done"
    )
    assert stamps  # a worker had two runs, so it finished one
    assert stamps == {f: (f / RESULTS).stat().st_mtime_ns for f in stamps}
    assert (victim / "model/log.csv").read_text().splitlines()[1] == began  # not begun anew
    for run in SWEEP.runs():
        folder = folder_of(tmp_path, run)
        assert json.loads((folder / RESULTS).read_text())["run"] == run.as_dict()
        assert (folder / NOTEBOOK).is_file()
    assert json.loads(timing_path(tmp_path, run).read_text())["step_seconds"] > 0
    again = run_sweep(SWEEP, tmp_path, scheduler=cluster.scheduler_address, say=lambda _: None)
    assert {o.state for o in again.outcomes} == {"was done"}


def test_a_scheduler_that_does_not_answer_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minildm.sweeps import running

    monkeypatch.setattr(running, "ANSWERS_IN", 0.5)
    with pytest.raises(ValueError, match=r"scheduler=.tcp://127\.0\.0\.1:9. does not answer"):
        run_sweep(SWEEP, tmp_path, scheduler="tcp://127.0.0.1:9", say=lambda _: None)


def test_without_dask_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[cluster\]'"):
        run_sweep(SWEEP, tmp_path, scheduler="tcp://127.0.0.1:9", say=lambda _: None)
