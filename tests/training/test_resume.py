"""Every training, abandoned or killed, ends bit for bit where an uninterrupted one ends."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training.trainings import CLASSIFIER, GAN, KL, LDM, Training, difference, each, state_of

from minildm.data.dataset import ImageDataset
from minildm.training.loop import read_log
from minildm.training.stages import finish


@each
def test_abandoned_it_ends_like_the_whole(training: Training, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run, before = training(whole), (torch.get_rng_state(), random.getstate())
    records = finish(run, 6, "train")
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert [(r.step, r.images) for r in records] == [(n, 4 * n) for n in range(1, 7)]
    assert all(a.seconds < b.seconds for a, b in pairwise(records))
    list(islice(training(broken), 5))
    torch.manual_seed(99)  # another process, another random state
    again = list(training(broken))
    assert [r.step for r in again] == [r.step for r in records]
    assert list(training(broken)) == again  # nothing is left to do
    assert difference(whole, broken) == []


LONG = {"steps": 300, "save_every": 1}
SCRIPT = """
import sys
from pathlib import Path
from training.test_resume import LONG
from training.trainings import TRAININGS
training = TRAININGS[sys.argv[1]]
for record in training(Path(sys.argv[2]), training.changed(**LONG)):
    if record.step > int(sys.argv[3]):
        print(record.step, flush=True)
"""


@pytest.mark.parametrize(("name", "training"), [("vq-gan", GAN), ("ldm", LDM)])
def test_killed_at_any_moment_it_ends_like_the_whole(
    name: str, training: Training, tmp_path: Path
) -> None:
    """SIGKILL while every step is saved; then both runs are shortened to the same length."""
    run, tests, reached = tmp_path / "run", Path(__file__).parents[1], 0
    environment = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1"}
    for wait in (0.05, 0.23):
        command = [sys.executable, "-c", SCRIPT, name, str(run), str(reached)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert process.stdout.readline()
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        reached = state_of(run)["step"]
    list(islice(training(tmp_path / "whole", training.changed(**LONG)), reached + 2))
    again = islice(training(run, training.changed(**LONG)), reached + 2)
    assert [record.step for record in again] == list(range(1, reached + 3))
    assert difference(tmp_path / "whole", run) == []


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    """The config, the data, the first stage, the initial model; the folder stays as it is."""
    run, kept = tmp_path / "run", tmp_path / "kept"
    list(LDM(run))
    shutil.copytree(run, kept)
    list(KL(tmp_path / "other"))
    blue = ImageDataset(torch.zeros(12, 3, 16, 16, dtype=torch.uint8), name="blue")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"experiment": LDM.changed(lr=0.5)}, "train.lr"),
        ({"data": blue}, "data"),
        ({"first_stage": tmp_path / "other"}, "first_stage"),
        ({"init": run}, "init"),
    ]
    for options, named in cases:
        with pytest.raises(ValueError, match=rf"holds another run \(.*{named}: .* there, .*--init"):
            next(LDM(run, **options))
    with pytest.raises(ValueError, match="holds another run"):
        next(CLASSIFIER(run))
    assert difference(run, kept) == []


@each
def test_log_every_means_over_its_steps_and_changes_no_weight(
    training: Training, tmp_path: Path
) -> None:
    """Records at every third step, at each save, and at the end; their terms are means."""
    few = training.changed(log_every=3, save_every=4)
    rare, often = list(training(tmp_path / "rare", few)), list(training(tmp_path / "often"))
    assert [r.step for r in rare] == [3, 4, 6]
    for record, first in zip(rare, (1, 4, 5), strict=True):
        steps = often[first - 1 : record.step]
        for name, mean in record.terms.items():
            expected = sum(r.terms[name] for r in steps) / len(steps)
            assert mean == pytest.approx(expected, rel=1e-6, abs=1e-9)
    one, other = (load_file(tmp_path / run / "model.safetensors") for run in ("rare", "often"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert read_log(tmp_path / "rare") == rare
