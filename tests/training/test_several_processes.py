"""Two processes, started by torchrun and by `accelerate launch`, train what one process trains."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from training import trainings as tiny
from training.trainings import SHARED, difference, make_stage

from minildm.training.checkpoint import read_log, saved_step

TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--standalone")
ACCELERATE = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
ACCELERATE += " --mixed_precision no --dynamo_backend no --main_process_port 0"
PATIENCE = 240  # seconds; fifteen are usual


def launch(folder: Path, launcher: tuple[str, ...], what: str) -> subprocess.Popen[bytes]:
    """Two processes of tests/training/trainings.py, with a cache of their own."""
    tests = Path(tiny.__file__).parents[1]
    own = {"MINILDM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    own["PYTHONPATH"] = f"{tests}{os.pathsep}{tests.parent}"
    command = [sys.executable, "-m", *launcher, tiny.__file__, what, str(folder)]
    with (folder / "err.txt").open("wb") as err:
        return subprocess.Popen(command, stdout=err, stderr=err, env={**os.environ, **own})


def kill(process: subprocess.Popen[bytes]) -> None:
    """With SIGKILL, and with all that it started."""
    if process.poll() is None:
        tree = psutil.Process(process.pid)
        for each in [*tree.children(recursive=True), tree]:
            each.kill()
        process.wait(60)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of one process."""
    folder = tmp_path_factory.mktemp("alone")
    make_stage(folder / "stage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILDM_CACHE", str(folder / "cache"))
        tiny.shared(folder)
    return folder


@pytest.fixture(scope="module")
def together(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The results of two, which are killed while the last training is at step 5."""
    folder = tmp_path_factory.mktemp("together")
    shutil.copytree(alone / "stage", folder / "stage")
    process, deadline = launch(folder, TORCHRUN, "shared"), time.monotonic() + PATIENCE
    try:
        while not all((folder / f"holds-{rank}").exists() for rank in (0, 1)):
            assert process.poll() is None, (folder / "err.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        kill(process)
    yield folder


@pytest.mark.parametrize("name", ["kl", "ldm"])
def test_two_processes_train_what_one_trains(name: str, alone: Path, together: Path) -> None:
    """Weights, averages, optimisers and logged terms, in float64 and without dropout."""
    assert difference(alone / name, together / name, atol=1e-8) == []
    records = read_log(together / name)
    assert [r.step for r in records] == ([2, 4, 6] if name == "ldm" else [1, 2, 3, 4, 5, 6])


def test_one_process_continues_where_two_were_killed(alone: Path, together: Path) -> None:
    assert saved_step(together / "held") == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILDM_CACHE", str(together / "cache"))
        tiny.shared(together)  # the finished trainings change nothing
    assert set(SHARED) == {"kl", "ldm", "held"}
    for name in SHARED:
        assert difference(alone / name, together / name, atol=1e-8) == []


def test_what_two_cannot_do_ends_alike_in_both(tmp_path: Path) -> None:
    """A batch that cannot be shared, moving codes; a NaN in one process stops both."""
    make_stage(tmp_path / "stage")
    process = launch(tmp_path, tuple(ACCELERATE.split()), "refused")
    try:
        assert process.wait(PATIENCE) == 0, (tmp_path / "err.txt").read_text()
    finally:
        kill(process)
    one, other = (json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    assert "batch_size=3, of all processes together, must be a multiple of their number" in one[0]
    assert "restart_dead=2 must be 0 with several processes" in one[1]
    assert one[2].startswith("steps 4 to 4: not finite (loss=nan")
    assert saved_step(tmp_path / "line") == 2
