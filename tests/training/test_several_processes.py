"""Two processes train what one process trains, and one continues where two were killed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import TinyImages, tiny_unet_config
from training.trainings import GAN, KL, LDM, difference, stage, state_of

from minildm.training import stages
from minildm.training.loop import read_log

UNET = tiny_unet_config()  # without dropout
SHARED = {
    "kl": (KL, KL.experiment),
    "ldm": (LDM, LDM.changed(unet=UNET, log_every=2)),
    "killed": (LDM, LDM.changed(unet=UNET, seed=1)),
}


class Doubles(TinyImages):
    """The tiny images, in float64."""

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = super().__getitem__(i)
        return {**item, "image": item["image"].double()}


def train_all(folder: Path) -> None:
    """All trainings, in float64; two processes are killed at step 5 of the last."""
    encode = stages.encode_dataset  # whose cache is float32
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(stages, "encode_dataset", lambda *args: encode(*args).double()):
            for name, (training, experiment) in SHARED.items():
                options = {} if training is KL else {"first_stage": folder.parent / "stage"}
                for record in training(folder / name, experiment, data=Doubles(), **options):
                    if name == "killed" and record.step == 5 and "RANK" in os.environ:
                        os.kill(os.getpid(), signal.SIGKILL)
    finally:
        torch.set_default_dtype(torch.float32)


def test_two_processes_train_what_one_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, averages, optimisers and logged terms, in float64 and without dropout."""
    alone, together, tests = tmp_path / "alone", tmp_path / "together", Path(__file__).parents[1]
    shutil.copytree(stage(), tmp_path / "stage")
    monkeypatch.setenv("MINILDM_CACHE", str(tmp_path / "cache"))  # of latents by float64 weights
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*launcher, __file__, str(together)]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, timeout=240)
    assert state_of(together / "killed")["step"] == 4, done.stderr.decode()
    train_all(alone)
    assert [r.step for r in read_log(together / "ldm")] == [2, 4, 6]
    for name in ("kl", "ldm"):
        assert difference(alone / name, together / name, atol=1e-8) == []
    train_all(together)  # the finished trainings change nothing
    for name in SHARED:
        assert difference(alone / name, together / name, atol=1e-8) == []


def test_what_two_processes_cannot_share_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    with pytest.raises(ValueError, match="batch_size=3 must be a multiple of 2, the number of"):
        next(LDM(tmp_path, LDM.changed(batch_size=3)))
    with pytest.raises(ValueError, match="restart_dead=2 must be 0 with several processes"):
        next(GAN(tmp_path, GAN.experiment))


if __name__ == "__main__":
    train_all(Path(sys.argv[1]))
