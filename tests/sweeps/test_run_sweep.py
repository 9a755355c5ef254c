"""Sweeps in real processes: the real notebooks, a run that fails, a worker that is killed."""

import gc
import json
import os
import signal
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from nbclient.exceptions import DeadKernelError
from sweeps.tiny import SHARED, tiny_sweep
from typer.testing import CliRunner

from minildm import cli, pretrained, read_sweep, read_table, run_sweep, save_model, sweeps
from minildm.files import write_json
from minildm.sweeps.run import RESULTS
from minildm.sweeps.sweep import DEFINITION
from minildm.training.loop import LOG, Record, read_log


def test_a_sweep_on_the_command_line_of_which_one_run_fails(tmp_path: Path) -> None:
    """Its reason is reported; the other run is in the table and figures, and is not repeated."""
    settings = "".join(f"{json.dumps(k)} = {json.dumps(v)}\n" for k, v in SHARED.items())
    head = 'seeds = [0]\nsamples = 20\nmeasure_at = [2]\n[grid]\n"train.lr" = [1e-3, 1e12]\n'
    (tmp_path / "rate.toml").write_text(f"{head}[shared]\n{settings}")
    folder = tmp_path / "out"
    words = ["sweep", f"{tmp_path}/rate.toml", "--out", str(folder), "--jobs", "2"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # event loops of jupyter's, in threads
        ended = CliRunner().invoke(cli.app, words)
        gc.collect()
    assert ended.exit_code == 1 and "train.lr-0.001-seed0: done" in ended.output
    notebook = folder / "runs/train.lr-1000000000000.0-seed0/notebook.ipynb"
    assert "FloatingPointError" in notebook.read_text()
    [line] = [line for line in ended.output.splitlines() if "failed: FloatingPointError" in line]
    assert f"see {notebook}" in line
    page = (folder / "index.html").read_text()
    assert "failed: FloatingPointError" in page and "(N=1)</td>" in page
    for name in ("proxy_fid_curves", "accuracy_at_the_end", "samples"):
        assert f'src="{name}.png"' in page and (folder / f"{name}.png").stat().st_size > 1000
    table = read_table(folder / "table.csv")
    assert set(table["train.lr"]) == {"0.001"} and set(table.step) == {2, 4}
    assert set(table.n) == {20} and table.real.min() > 100
    again = CliRunner().invoke(cli.app, ["sweep", str(folder), "--level", "0.001"])
    assert again.exit_code == 0 and "done" not in again.output


def test_first_stages_come_first_and_runs_without_one_are_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[str, str]] = []

    def run_notebook(path: Path, out: Path, parameters: dict[str, Any]) -> None:
        run = parameters["run"]
        begun.append((path.stem, parameters["device"]))
        if path.stem == "first_stage" and run["level"] == "16":
            raise MemoryError("too large\nby far")
        if path.stem == "first_stage":
            save_model(pretrained("mixed-kl-f4"), out.parent)
            write_json(out.parent / LOG, [Record(7, 70, 1.0, 0.1, {})._asdict()])
            time.sleep(0.5)
        else:
            write_json(out.parent / RESULTS, {"run": run, "device": "cpu", "rows": []})

    monkeypatch.setattr(sweeps, "run_notebook", run_notebook)
    monkeypatch.setattr(sweeps, "PAUSE", 0.1)
    sweep, said = replace(read_sweep("f"), seeds=(0, 1)), []
    places = {"devices": ("cuda:0", "cuda:1"), "say": said.append}
    found = run_sweep(sweep, tmp_path, levels=("1", "8", "16"), **places)
    assert [notebook for notebook, _ in begun] == ["first_stage"] * 2 + ["one_run"] * 4
    assert sorted(device for _, device in begun[2:]) == ["cuda:0"] * 2 + ["cuda:1"] * 2
    [(failed, reason)] = found.items()
    assert failed == "first stage of f = 16" and "failed: MemoryError: too large;" in reason
    assert said[0] == "0 runs are finished; now 2 first stages, then 6 runs"
    assert "first stage of f = 8: step 7" in said
    page = (tmp_path / "index.html").read_text()
    assert page.count("</a>: finished") == 4 and page.count("</a>: not finished") == 8
    assert said[-1].endswith("done (4 of 4)")


def test_a_killed_process_and_a_worker_without_the_disk_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps, "run_notebook", Mock(side_effect=DeadKernelError))
    task = "one_run", tmp_path / "run", {"shared": str(tmp_path)}
    assert sweeps.perform(*task).endswith(f" does not see {tmp_path}")
    (tmp_path / DEFINITION).touch()
    notebook = tmp_path / "run/notebook.ipynb"
    assert sweeps.perform(*task) == f"killed (signal 9, out of memory?); see {notebook}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_run_of_a_killed_dask_worker_is_finished_by_another(tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    def busy() -> int:
        """On a worker: its process id, if a notebook's kernel runs below it, else 0."""
        import psutil

        kernels = [p for p in psutil.Process().children() if "ipykernel_launcher" in p.cmdline()]
        return os.getpid() if kernels else 0

    sweep = tiny_sweep(levels={"low": {"train.lr": 1e-3}})
    sweep = sweep.changed({"train.steps": 20, "train.save_every": 2})
    place, found = tmp_path / "runs" / sweep.runs()[0].name, {}
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(processes=True, **options) as cluster, Client(cluster) as client:
        where = {"scheduler": cluster.scheduler_address, "say": lambda _: None}
        sweeping = threading.Thread(
            target=lambda: found.update(failed=run_sweep(sweep, tmp_path, **where))
        )
        sweeping.start()
        end = time.monotonic() + 300
        while not (place / "model/training/state.pt").is_file():
            assert time.monotonic() < end, "the training has not begun"
            time.sleep(0.05)
        began = read_log(place / "model")[0]  # with its seconds
        [victim] = filter(None, client.run(busy).values())
        os.kill(victim, signal.SIGKILL)
        sweeping.join(timeout=300)
    assert found["failed"] == {}
    log = read_log(place / "model")
    assert log[0] == began and len(log) == 20  # continued, not started again
    assert (place / RESULTS).is_file()
