"""A training step reads nothing from its device, so that a GPU computes without a pause."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training.trainings import EXPERIMENTS, Training

from minildm import override
from minildm.training import loop

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal}


class NoReading(TorchDispatchMode):
    """Fails where a value leaves a tensor: `.item()`, `bool(x)`, `x[mask]`, `nonzero`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in READS, func
        if func.overloadpacket is aten.index:
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "x[mask]"
        return func(*args, **(kwargs or {}))


class SyncError:
    """Every wait for the GPU raises RuntimeError."""

    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=DEVICES)
def watched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device; a training is watched from its first gradients to the reading of the terms."""
    guards: list[Any] = []
    gradients, read = loop.Training.gradients, loop.Training.read

    def begin(*args: Any) -> None:
        if not guards:
            guards.append(NoReading() if request.param == "cpu" else SyncError())
            guards[0].__enter__()
        gradients(*args)

    def end(*args: Any) -> dict[str, float]:
        guards.pop().__exit__(None, None, None)
        return read(*args)

    monkeypatch.setattr(loop.Training, "gradients", begin)
    monkeypatch.setattr(loop.Training, "read", end)
    yield request.param
    while guards:
        guards.pop().__exit__(None, None, None)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_step_does_not_wait_for_the_device(
    name: str, watched: str, stage: Path, tmp_path: Path
) -> None:
    """Steps 1 to 3 of 4, all but the first batch's loading; step 4 until it is logged."""
    changes = {"train.steps": 4, "train.log_every": 4, "train.save_every": 4}
    experiment = override(EXPERIMENTS[name], changes)
    [record] = Training(experiment, stage)(tmp_path / "run", device=watched)
    assert record.step == 4 and record.terms["loss"] > 0
