"""Every training, abandoned or killed, ends bit for bit where an uninterrupted one ends."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training.trainings import STEPS, TRAIN, Training, difference

from minildm.data.dataset import ImageDataset
from minildm.training import stages
from minildm.training.checkpoint import (
    CheckpointError,
    load_model,
    read_log,
    save_model,
    saved_step,
)


@pytest.mark.parametrize("stop", [1, 4])
def test_abandoned_it_ends_like_the_whole(stop: int, training: Training, tmp_path: Path) -> None:
    records = list(stages.progress(training(tmp_path / "whole"), STEPS, "train"))
    assert [r.step for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r.images for r in records] == [4, 8, 12, 16, 20, 24]
    assert all(a.seconds < b.seconds for a, b in pairwise(records))
    broken = training(tmp_path / "broken")
    list(islice(broken, stop))
    broken.close()
    torch.manual_seed(99)  # another process, another random state
    late = [r.step for r in training(tmp_path / "broken")]
    assert late == list(range(stop // 2 * 2 + 1, STEPS + 1))
    assert difference(tmp_path / "whole", tmp_path / "broken") == []
    assert list(training(tmp_path / "broken")) == []  # nothing is left to do
    assert difference(tmp_path / "whole", tmp_path / "broken") == []


def test_a_copy_of_the_folder_resumes(training: Training, tmp_path: Path) -> None:
    for record in training(tmp_path / "whole"):
        if record.step == 5:  # as a backup finds it, while the run continues
            shutil.copytree(tmp_path / "whole", tmp_path / "copy")
            assert saved_step(tmp_path / "copy") == 4
    assert [record.step for record in training(tmp_path / "copy")] == [5, 6]
    assert difference(tmp_path / "whole", tmp_path / "copy") == []


SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from training.trainings import EXPERIMENTS, TRAIN, Training
experiment = EXPERIMENTS[sys.argv[1]]
experiment = replace(experiment, train=replace(TRAIN, steps=300, save_every=1))
for record in Training(experiment, Path(sys.argv[3]))(Path(sys.argv[2])):
    print(record.step, flush=True)
"""


@pytest.mark.parametrize("name", ["vq-gan", "ldm"])
def test_killed_at_any_moment_it_ends_like_the_whole(
    name: str, trainings: dict[str, Training], tmp_path: Path
) -> None:
    """SIGKILL while every step is saved; then both runs are shortened to the same length."""
    training, run = trainings[name], tmp_path / "run"
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, name, str(run), str(training.stage)]
    reached = 0
    for wait in (0.05, 0.23):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        reached = saved_step(run) or 0
    experiment = replace(training.experiment, train=replace(TRAIN, steps=300, save_every=1))
    whole = training(tmp_path / "whole", experiment)
    list(islice(whole, reached + 2))
    whole.close()
    again = training(run, experiment)
    assert next(again).step == reached + 1
    next(again)
    again.close()
    assert difference(tmp_path / "whole", run) == []


def test_a_model_can_be_loaded_while_it_trains(training: Training, tmp_path: Path) -> None:
    run = training(tmp_path / "run")
    list(islice(run, 2))
    model = load_model(tmp_path / "run")
    averages = torch.load(tmp_path / "run/training/state.pt", weights_only=True)["ema"]
    assert int(averages.pop("updates")) == 2
    own = dict(model.named_parameters())
    assert averages
    assert all(torch.equal(own[name], averages[name]) for name in averages)
    run.close()


def test_the_callers_random_state_is_untouched(training: Training, tmp_path: Path) -> None:
    before = torch.get_rng_state(), random.getstate()
    matmul = torch.get_float32_matmul_precision()
    list(training(tmp_path / "run"))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert torch.get_float32_matmul_precision() == matmul


def test_another_run_in_the_folder_is_refused(
    trainings: dict[str, Training], tmp_path: Path, stage: Path
) -> None:
    """The config, the data, the first stage, the initial model; the folder stays as it is."""
    training, run = trainings["ldm"], tmp_path / "run"
    list(training(run))
    shutil.copytree(run, tmp_path / "kept")
    other = load_model(stage)
    with torch.no_grad():
        other.decoder.conv_out.bias += 1e-3
    save_model(other, tmp_path / "other")
    blue = ImageDataset(torch.zeros(12, 3, 16, 16, dtype=torch.uint8), name="blue")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"experiment": replace(training.experiment, train=replace(TRAIN, lr=0.5))}, "train.lr"),
        ({"data": blue}, "data"),
        ({"first_stage": tmp_path / "other"}, "first_stage"),
        ({"init": run}, "init"),
    ]
    for options, named in cases:
        with pytest.raises(ValueError, match=rf"holds another run \(.*{named}: .* there, .*--init"):
            next(training(run, **options))
    with pytest.raises(ValueError, match="holds another run"):
        next(trainings["classifier"](run))
    assert difference(run, tmp_path / "kept") == []


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_damaged_state_is_named_and_nothing_is_deleted(
    part: float, trainings: dict[str, Training], tmp_path: Path
) -> None:
    run = trainings["kl"](tmp_path / "run")
    list(islice(run, 2))
    run.close()
    file = tmp_path / "run/training/state.pt"
    file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"state\.pt is damaged .*--init") as caught:
        next(trainings["kl"](tmp_path / "run"))
    assert "delete" not in str(caught.value)
    assert file.read_bytes() == before


def test_log_every_means_over_its_steps_and_changes_no_weight(
    training: Training, tmp_path: Path
) -> None:
    """Records at every third step, at each save, and at the end; their terms are means."""
    few = replace(TRAIN, log_every=3, save_every=4)
    rare = list(training(tmp_path / "rare", replace(training.experiment, train=few)))
    often = list(training(tmp_path / "often"))
    assert [r.step for r in rare] == [3, 4, 6]
    for record, first in zip(rare, (1, 4, 5), strict=True):
        steps = often[first - 1 : record.step]
        for name, mean in record.terms.items():
            expected = sum(r.terms[name] for r in steps) / len(steps)
            assert mean == pytest.approx(expected, rel=1e-6, abs=1e-9)
    one, other = (load_file(tmp_path / run / "model.safetensors") for run in ("rare", "often"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [r.step for r in read_log(tmp_path / "rare")] == [3, 4, 6]


def test_save_at_saves_besides_save_every(trainings: dict[str, Training], tmp_path: Path) -> None:
    experiment = replace(trainings["ldm"].experiment, train=replace(TRAIN, save_every=4))
    saved = []
    for record in trainings["ldm"](tmp_path / "run", experiment, save_at=(1, 3)):
        saved.append((record.step, saved_step(tmp_path / "run")))
    assert saved == [(1, 1), (2, 1), (3, 3), (4, 4), (5, 4), (6, 6)]
