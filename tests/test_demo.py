"""The main job, at the scale of seconds: what it leaves, and that it survives being killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from minildm.demo import demo
from minildm.report import FIGURES


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("demo")
    demo(run_dir, scale="smoke", device="cpu", seed=0)
    return run_dir


def test_the_demo_leaves_every_picture_and_both_checkpoints(finished: Path) -> None:
    for name, _ in FIGURES:
        with Image.open(finished / name) as picture:
            low, high = picture.convert("L").getextrema()
            assert high - low > 100, f"{name} is empty"
    for stage in ("first_stage", "diffusion"):
        assert (finished / stage / "model.safetensors").stat().st_size > 0
        assert (finished / stage / "config.json").exists()


def test_results_hold_what_the_report_claims(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["scale"] == "smoke"
    assert results["seed"] == 0
    assert results["device"].startswith("cpu")
    assert set(results["train_seconds"]) == {"first stage", "diffusion"}
    assert results["psnr_shipped"] > 26 > results["psnr_bicubic"]
    judge = results["judge"]
    assert judge["fresh"]["n_samples"] == judge["shipped"]["n_samples"] == 12
    assert 0 <= judge["fresh"]["accuracy_samples"] <= 1
    assert len(judge["shipped"]["per_group_real"]) >= 6
    page = (finished / "index.html").read_text()
    assert set(re.findall(r'src="([^"]+)"', page)) == {name for name, _ in FIGURES}
    assert page.count("alt=") == len(FIGURES)
    assert f"{judge['shipped']['accuracy_samples']:.2f}" in page


def test_a_finished_demo_trains_no_step_again(finished: Path) -> None:
    log = finished / "diffusion/log.csv"
    before = log.read_bytes()
    weights = (finished / "diffusion/ema.safetensors").stat().st_mtime_ns
    demo(finished, scale="smoke", device="cpu", seed=0)
    assert log.read_bytes() == before
    assert (finished / "diffusion/ema.safetensors").stat().st_mtime_ns == weights


def test_another_seed_in_the_same_folder_is_refused(finished: Path) -> None:
    with pytest.raises(ValueError, match=r"run_dir=.* holds another run .*seed: 0 there, 1 asked"):
        demo(finished, scale="smoke", device="cpu", seed=1)


def test_a_killed_demo_goes_on_and_ends_where_the_unbroken_one_ends(
    finished: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "minildm", "demo", "--scale", "smoke", "--device", "cpu"]
    command += ["--run-dir", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "diffusion/log.csv"
    deadline = time.monotonic() + 240
    while not log.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "results.json").exists()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
    for name in ("first_stage/model", "diffusion/model", "diffusion/ema"):
        ours, theirs = (load_file(d / f"{name}.safetensors") for d in (tmp_path, finished))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].equal(theirs[key]) for key in ours), name
