"""Sweeps carried out: real runs of the real notebook, killed, failed, shared, resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import psutil
import pytest
from safetensors.torch import load_file

from minildm import Sweep, load_model, run_sweep
from minildm.files import write_json
from minildm.sweeps.execution import ERROR, NOTEBOOK, Place, environment, perform
from minildm.sweeps.one_run import PRECISION, RESULTS, first_stage_of, measured
from minildm.sweeps.running import claim, folder_of
from minildm.sweeps.settings import plan_of
from minildm.sweeps.timing import timing_path

TINY = {
    "unet.width": 8,
    "unet.width_mult": [1],
    "unet.attn_levels": [0],
    "data.size": 32,
    "data.subgroups": ["heart", "food-fruit"],
    "train.steps": 4,
    "train.batch_size": 4,
    "first_stage.train.steps": 2,
    "first_stage.data.subgroups": ["heart"],
    "sampling.steps": 2,
}
SWEEP = Sweep(
    name="rate",
    levels={"low": {"train.lr": 1e-4}, "wild": {"train.lr": 1e30}},
    shared=TINY,
    seeds=(0,),
    measure_at=(2,),
    samples=20,
    samplings={"ddim 3": {"steps": 3}},
)
LONG = replace(
    SWEEP,
    levels={"low": {"train.lr": 1e-4}},
    samplings={},
    shared={
        **TINY,
        "train.steps": 200,
        "train.save_every": 10,
        "train.precision": "fp32",  # "auto" may choose otherwise in another folder
        "first_stage.train.precision": "fp32",
    },
    measure_at=(),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[str]]:
    """A sweep of two runs at once, of which one fails; another process chose its precision."""
    folder, said = tmp_path_factory.mktemp("sweep"), []
    write_json(folder / PRECISION, {"auto": "bf16", "device": "another"})
    return folder, run_sweep(SWEEP, folder, jobs=2, say=said.append), said


def test_a_failed_run_is_reported_with_its_notebook_and_the_others_go_on(finished: Any) -> None:
    _, result, said = finished
    assert {o.name: o.state for o in result.outcomes} == {
        "rate-low-seed0": "done", "rate-wild-seed0": "failed"
    }  # fmt: skip
    assert list(result.failed) == ["rate-wild-seed0"]
    notebook = result.failed["rate-wild-seed0"]
    assert "NonFiniteLossError" in notebook.read_text()
    assert "NonFiniteLossError" in (notebook.parent / ERROR).read_text().splitlines()[-1]
    assert any("rate-wild-seed0: failed" in line and str(notebook) in line for line in said)
    assert "failed: NonFiniteLossError" in result.report.read_text()
    assert not (notebook.parent / RESULTS).exists()


def test_a_finished_run_leaves_a_readable_notebook_and_numbers(finished: Any) -> None:
    folder, result, _ = finished
    run = SWEEP.runs()[0]
    place = folder_of(folder, run)
    notebook = json.loads((place / NOTEBOOK).read_text())
    assert any("image/png" in o.get("data", {}) for c in notebook["cells"] for o in
               c.get("outputs", ()))  # fmt: skip
    found = json.loads((place / RESULTS).read_text())
    assert found["run"] == run.as_dict()
    assert {(r["step"], r["sampling"]) for r in found["rows"]} == {
        (2, "plain"), (4, "plain"), (4, "ddim 3"), (4, "first stage")
    }  # fmt: skip
    names = {"proxy_fid", "kid", "precision", "recall", "accuracy"}
    assert {r["metric"] for r in found["rows"]} == names
    assert all(r["n"] == 20 for r in found["rows"])
    assert "rate,seed,step" in result.table.read_text()


def test_levels_are_timed_before_the_runs(finished: Any) -> None:
    folder, _, said = finished
    assert said[0] == "rate: measuring the time of low, wild, one after the other"
    assert said[1].startswith("rate=wild: has no time, NonFiniteLossError: step 2")
    timing = json.loads((folder / "timing/rate-low.json").read_text())
    first, third = timing["step_quartiles"]
    assert 0 < first <= timing["step_seconds"] <= third
    assert {*timing["pictures_per_second"]} == {"plain", "ddim 3"}
    epoch = timing["epoch_seconds"] / timing["step_seconds"]
    assert epoch == pytest.approx(len(SWEEP.runs()[0].plan().experiment.data.dataset("train")) / 4)


def test_all_of_a_sweep_has_the_precision_that_was_chosen_first(finished: Any) -> None:
    folder, result, _ = finished
    run = SWEEP.runs()[0]
    found = [
        json.loads((folder_of(folder, run) / RESULTS).read_text())["precision"],
        json.loads(timing_path(folder, run).read_text())["precision"],
        json.loads((first_stage_of(run.plan(), folder) / "training/run.json").read_text())[
            "precision"
        ],
    ]
    assert found == ["bf16"] * 3
    assert "Trained in bf16." in result.report.read_text()


def test_what_is_finished_is_not_done_again(finished: Any) -> None:
    folder, _, _ = finished
    before = {p: p.stat().st_mtime_ns for p in folder.glob("runs/rate-low-seed0/**/*")}
    result = run_sweep(SWEEP, folder, levels=["low"], say=lambda _: None)
    assert [o.state for o in result.outcomes] == ["was done"]
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_another_sweep_in_the_folder_is_refused(finished: Any) -> None:
    folder, _, _ = finished
    other = SWEEP.changed(**{"train.steps": 5})
    with pytest.raises(ValueError, match="holds another sweep") as caught:
        run_sweep(other, folder, say=lambda _: None)
    assert "shared.train.steps: 4 there, 5 asked" in str(caught.value)


def test_more_seeds_are_welcome(finished: Any, tmp_path: Path) -> None:
    claim(SWEEP, tmp_path)
    more = claim(replace(SWEEP, seeds=(0, 1, 2)), tmp_path)
    assert more.seeds == (0, 1, 2)
    assert claim(SWEEP, tmp_path).seeds == (0, 1, 2)  # those that were there stay


def timed(sweep: Sweep, folder: Path) -> None:
    """As if every level had been timed: a start of a process less."""
    for run in sweep.runs():
        found = {"level": run.level, "device": "cpu", "pictures_per_second": {"plain": 1.0}}
        write_json(timing_path(folder, run), found | {"step_seconds": 1.0})


def start(folder: Path, sweep: str = "LONG", before: str = "pass") -> subprocess.Popen:
    code = (  # a job in the background of a shell would not hear of Ctrl-C
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import sys; sys.path.insert(0, sys.argv[2]); import test_sweep_running as t;"
        f"from minildm import run_sweep; {before};"
        f"run_sweep(t.{sweep}, sys.argv[1], jobs=2, say=lambda line: print(line, flush=True))"
    )
    words = [sys.executable, "-c", code, str(folder), str(Path(__file__).parent)]
    return subprocess.Popen(words, stderr=subprocess.DEVNULL)


def until(happened: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """A sweep killed in the middle of its run; whether anything of it then lived on."""
    folder = tmp_path_factory.mktemp("killed")
    timed(LONG, folder)
    place = folder_of(folder, LONG.runs()[0])
    process = start(folder)
    until(lambda: (place / "model/training/state.pt").is_file())
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(children, timeout=20)
    return folder, any(child.is_running() and child.status() != "zombie" for child in children)


def test_a_killed_sweep_takes_its_runs_with_it(killed: Any) -> None:
    folder, alive = killed
    assert not alive
    assert not (folder_of(folder, LONG.runs()[0]) / RESULTS).exists()


def test_an_interrupted_run_resumes_to_the_same_weights(killed: Any, tmp_path: Path) -> None:
    folder, _ = killed
    [run] = LONG.runs()
    log = folder_of(folder, run) / "model/log.csv"
    began = log.read_text().splitlines()[1]  # with its seconds: it is not logged again
    timed(LONG, tmp_path)
    for place in (folder, tmp_path):
        outcome = run_sweep(LONG, place, say=lambda _: None).outcomes
        assert [o.state for o in outcome] == ["done"]
    assert log.read_text().splitlines()[1] == began
    for name in ("model", "ema"):
        resumed, unbroken = (
            load_file(folder_of(place, run) / f"model/{name}.safetensors")
            for place in (folder, tmp_path)
        )
        assert all((resumed[key] == unbroken[key]).all() for key in unbroken)
    numbers = [
        [row["value"] for row in measured(folder_of(place, run))] for place in (folder, tmp_path)
    ]
    assert numbers[0] == numbers[1]


def test_a_run_that_another_process_has_is_left_to_it(tmp_path: Path) -> None:
    [run] = LONG.runs()
    place = folder_of(tmp_path, run)
    place.mkdir(parents=True)
    with filelock.FileLock(place / ".lock"):
        outcome = perform(place, run.as_dict(), wait=0.1)
    assert outcome.state == "busy"
    assert "locked by another process" in outcome.message


def test_results_of_another_run_are_not_taken(finished: Any) -> None:
    folder, _, _ = finished
    low = SWEEP.runs()[0]
    outcome = perform(folder_of(folder, low), {**low.as_dict(), "samples": 21})
    assert outcome.state == "failed"
    assert "is of another run" in outcome.message


def test_a_first_stage_is_trained_once_for_all(finished: Any) -> None:
    folder, _, _ = finished
    plans = [run.plan() for run in SWEEP.runs()]
    [place] = {first_stage_of(plan, folder) for plan in plans}
    assert len((place / "log.csv").read_text().splitlines()) == 1 + 2
    stamp = (place / "model.safetensors").stat()
    first_stage_of(plans[0], folder)
    assert (place / "model.safetensors").stat() == stamp  # not even written


def test_the_latents_spread_is_what_the_level_asks_for(finished: Any) -> None:
    folder, _, _ = finished
    plain = plan_of(SWEEP.settings("low"))
    wide = plan_of({**SWEEP.settings("low"), "latent_std": 4.0})
    scales = [load_model(first_stage_of(plan, folder)).scale.item() for plan in (plain, wide)]
    assert scales[0] == pytest.approx(4 * scales[1])  # z = (posterior - shift) / scale


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"jobs": 0}, "jobs=0"),
        ({"threads": 0}, "threads=0"),
        ({"devices": ["tpu"]}, "device='tpu' is not here"),
        ({"devices": ["cpu:7"]}, "of cpu there are 1 here"),
        ({"levels": ["middle"]}, "'middle' is not known"),
        ({"seeds": [3]}, "'3' is not known"),
    ],
)
def test_options_that_cannot_be_are_refused(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError) as caught:
        run_sweep(SWEEP, tmp_path / "x", **options)
    assert said in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_a_run_sees_its_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment(Place("cuda:1", 3))["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment(Place("cuda:1", 3))["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert environment(Place("cuda:1"))["CUDA_VISIBLE_DEVICES"] == "6"
    assert environment(Place("cpu"))["CUDA_VISIBLE_DEVICES"] == os.environ["CUDA_VISIBLE_DEVICES"]
