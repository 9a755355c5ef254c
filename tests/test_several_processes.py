"""Two processes, started by `accelerate launch`, train what one process trains."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import several
import torch
from conftest import shaken
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from trainings import outcome

import minildm
from minildm import Autoencoder, cli, processes, save_model, training

ROOT = Path(minildm.__file__).parent.parent
LAUNCH = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
SCRIPT = several.__file__
PATIENCE = 480  # seconds; ten are usual


def launch(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`accelerate launch` of two processes, with a cache of their own."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH.split()]
    command += ["--main_process_port", "0", *arguments]
    own = {"MINILDM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    own["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    out, err = (folder.joinpath(name).open("w") for name in ("out.txt", "err.txt"))
    with out, err:
        return subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **own})


def ended(process: subprocess.Popen[str], folder: Path) -> str:
    """Wait for it; what it printed as errors."""
    try:
        process.wait(PATIENCE)
    finally:
        kill(process)
    return (folder / "err.txt").read_text()


def kill(process: subprocess.Popen[str]) -> None:
    """With SIGKILL, and with all that it started."""
    if process.poll() is None:
        tree = psutil.Process(process.pid)
        for each in [*tree.children(recursive=True), tree]:
            each.kill()
        process.wait(60)


def said(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in (0, 1)]


def close(one: Path, other: Path) -> bool:
    """All that two trainings leave: weights, EMA, optimisers within 1e-8, the log as printed."""
    first, second = outcome(one), outcome(other)
    assert first.keys() == second.keys()
    assert {"state/step", "log/6/0"} <= first.keys()
    apart = [key for key in first if not _same(first[key], second[key])]
    assert not apart, apart[:10]
    return True


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        assert one.dtype in (torch.float64, torch.int64) or one.ndim == 0, one.dtype
        return torch.allclose(one.double(), other.double(), rtol=0, atol=1e-8)
    return one == other


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Other tests leave latents of the same pictures and autoencoder, of float32, in theirs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the same trainings."""
    folder = tmp_path_factory.mktemp("alone")
    autoencoder = shaken(Autoencoder(several.AUTOENCODER)).eval()
    autoencoder.scale.fill_(2.0)
    save_model(autoencoder, folder / "stage")
    with several.in_float64():
        for name, experiment in {**several.EXPERIMENTS, "held": several.HELD}.items():
            list(several.start(experiment, folder / name, folder / "stage"))
    return folder


@pytest.fixture(scope="module")
def together(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two made of them; they were killed while one training was at step 5."""
    folder = tmp_path_factory.mktemp("together")
    shutil.copytree(alone / "stage", folder / "stage")
    process = launch(folder, SCRIPT, "whole", str(folder))
    try:
        deadline = time.monotonic() + PATIENCE
        while not all('"held": true' in text for text in _texts(folder)):
            assert process.poll() is None, (folder / "err.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        kill(process)
    shutil.copytree(folder / "held", folder / "copy")
    return folder


def _texts(folder: Path) -> Iterator[str]:
    for rank in (0, 1):
        path = folder / f"said-{rank}.json"
        yield path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def resumed(together: Path) -> tuple[int, str, float]:
    """The killed training goes on in two processes, until one of them fails in another.

    Exit status, errors, and how many seconds after the failure it ended.
    """
    process = launch(together, SCRIPT, "rest", str(together))
    errors = ended(process, together)
    return process.returncode, errors, time.time() - said(together)[1]["failed"]


@pytest.mark.parametrize("name", several.EXPERIMENTS)
def test_two_processes_train_what_one_trains(name: str, alone: Path, together: Path) -> None:
    assert close(alone / name, together / name)


@pytest.mark.parametrize("name", several.EXPERIMENTS)
def test_both_see_the_terms_of_the_whole_batch(name: str, together: Path) -> None:
    main, other = said(together)
    assert main["processes"] == other["processes"] == 2
    assert main[name] == other[name]
    logged = [record.terms for record in minildm.runs.read_log(together / name)]
    assert len(logged) == len(main[name]) == 6
    for one, printed in zip(main[name], logged, strict=True):
        assert one == pytest.approx(printed, rel=1e-5)


def test_only_the_main_process_encodes(together: Path) -> None:
    """The latents of KL's own scale, and of stage 2; the other reads what is in the cache."""
    assert [each["encoded"] for each in said(together)] == [2, 0]


def test_a_batch_that_cannot_be_shared_is_refused(together: Path) -> None:
    for each in said(together):
        assert each["odd"].startswith("0: ValueError: batch_size=3 is that of all processes")
        assert each["odd"].endswith("a multiple of their number, 2")
    assert not (together / "odd").exists()


def test_a_loss_that_is_not_finite_in_one_process_stops_both(together: Path) -> None:
    for each in said(together):
        assert each["poisoned"].startswith("3: NonFiniteLossError: step 4: a term")
        assert "the checkpoint of step 2 stays" in each["poisoned"]
    state = torch.load(together / "line/training/state.pt", weights_only=True)
    assert state["step"] == 2


def test_killed_two_processes_go_on(alone: Path, together: Path, resumed: Any) -> None:
    assert [each["late"] for each in said(together)] == [[5, 6]] * 2
    state = torch.load(together / "copy/training/state.pt", weights_only=True)
    assert state["step"] == 4
    assert close(alone / "held", together / "held")


def test_one_process_goes_on_where_two_were_killed(alone: Path, together: Path) -> None:
    with several.in_float64():
        late = list(several.start(several.HELD, together / "copy", together / "stage"))
    assert [record.step for record in late] == [5, 6]
    assert close(alone / "held", together / "copy")


def test_what_fails_in_one_process_ends_both(
    together: Path, resumed: tuple[int, str, float]
) -> None:
    status, errors, seconds = resumed
    assert status != 0
    assert seconds < 60
    assert "ValueError: step 2: a picture that only one process sees" in errors
    assert not [p.pid for p in psutil.process_iter(["cmdline"]) if _is_of(p, together)]


def _is_of(process: psutil.Process, folder: Path) -> bool:
    return str(folder) in (process.info["cmdline"] or [])


# --- the command line ---


@pytest.fixture
def command(tmp_path: Path) -> Callable[[str], list[str]]:
    """`command(run_dir)`: a preset's training on two classes of pictures."""
    for name, value in (("dark", 40), ("light", 220)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(6):
            noise = torch.randint(-20, 20, (32, 32, 3), generator=torch.Generator().manual_seed(i))
            path = tmp_path / "pictures" / name / f"{i}.png"
            Image.fromarray((noise + value).to(torch.uint8).numpy()).save(path)
    options = ["--folder", str(tmp_path / "pictures"), "--size", "32", "--device", "cpu"]
    options += ["--steps", "4", "--batch-size", "8", "--lr", "0.01"]
    options += ["--first-stage", str(ROOT / "data/weights/emoji-kl-f4")]
    return lambda run_dir: ["train", "emoji-class", "--run-dir", str(tmp_path / run_dir), *options]


def test_the_command_line_trains_in_two_processes(
    command: Callable[[str], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where the order of sums has a say: the ways differ by 1e-4 of their length."""
    monkeypatch.setattr(training, "pick_precision", lambda wanted, device: "fp32")
    monkeypatch.setattr(sys, "argv", ["minildm", *command("one")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    (tmp_path / "two/training").mkdir(parents=True)  # the precision is chosen already
    shutil.copy(tmp_path / "one/training/run.json", tmp_path / "two/training")
    process = launch(tmp_path, "-m", "minildm", *command("two"))
    errors = ended(process, tmp_path)
    assert process.returncode == 0, errors
    assert (tmp_path / "out.txt").read_text().count("trained on") == 1  # by the main process
    assert errors.count("emoji-class:   0%") <= 1
    files = [
        sorted(str(path.relative_to(tmp_path / run)) for path in (tmp_path / run).rglob("*"))
        for run in ("one", "two")
    ]
    assert files[0] == files[1]
    for name in ("training/run.json", "config.json"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    one, two = (minildm.runs.read_log(tmp_path / run) for run in ("one", "two"))
    assert [r.step for r in two] == [1, 2, 3, 4]
    for ours, theirs in zip(one, two, strict=True):
        assert (ours.images, ours.lr) == (theirs.images, theirs.lr)
        assert ours.terms == pytest.approx(theirs.terms, rel=1e-5)
    begun = training.new_model(
        minildm.LatentDiffusion, minildm.load_model(tmp_path / "one").config, 0
    )
    first = begun.state_dict()
    one, two = (load_file(tmp_path / run / "model.safetensors") for run in ("one", "two"))
    moved = sum((one[name] - first[name]).square().sum() for name in one)
    apart = sum((one[name] - two[name]).square().sum() for name in one)
    assert apart < 1e-8 * moved


def test_a_launch_that_would_start_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --cpu --num_processes 2` does, without a word."""
    for name, value in (("ACCELERATE_USE_CPU", "True"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--multi_gpu in its place"):
        processes.join(torch.device("cpu"))
    monkeypatch.delenv("MASTER_ADDR")
    processes.join(torch.device("cpu"))
    assert (processes.rank(), processes.world()) == (0, 1)


def test_messages_stay_out_of_compiled_networks_and_the_compiler_out_of_imports() -> None:
    code = """
import sys, torch, minildm
assert "torch._dynamo" not in sys.modules
from minildm import processes
processes.world, processes._summed = lambda: 2, lambda x: 2 * x
processes._stay_uncompiled()
seen, keep = [], lambda graph, _: seen.append(graph) or graph.forward
net = torch.compile(lambda x: processes.total(x.cos()).sin(), backend=keep)
x = torch.ones(3)
assert torch.allclose(net(x), (2 * x.cos()).sin()) and len(seen) == 2  # before, and behind
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=PATIENCE)
