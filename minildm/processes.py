"""Several processes that train one model: which one this is, and what they tell each other.

`accelerate launch` starts them, or torchrun. In a lone process all of this does nothing.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed, nn

T = TypeVar("T")

PATIENCE = timedelta(days=1)  # the others wait while the first encodes a large data set


def join(device: torch.device) -> None:
    """Meet the processes that were started beside this one, if there are any.

    Raises ValueError where they cannot work together on that device.
    """
    # accelerate keeps its state for the life of a process; a notebook trains several models.
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    if world() == 1 and asked_for_cpu() and "MASTER_ADDR" in os.environ:
        raise ValueError(
            "accelerate launch --cpu starts one process, however many are asked for; with "
            "--multi_gpu in its place there are several, on a CPU, too"
        )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != world():
        raise ValueError(
            f"device={str(device)!r} takes one process, {started} were started; several train on "
            "NVIDIA GPUs, or with device='cpu'"
        )
    if world() > 1:
        _stay_uncompiled()


def asked_for_cpu() -> bool:
    """Whether `accelerate launch --cpu` started this process."""
    return parse_flag_from_env("ACCELERATE_USE_CPU")


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _several() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if _several() else 0


def is_main() -> bool:
    """Whether this is the process that writes files and talks."""
    return rank() == 0


def _several() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"process {rank()} of {world()} lost another one, whose own message says why"
        ) from error


def from_main(do: Callable[[], T]) -> T:
    """What the main process got by doing it; the others wait. What it raises all raise.

    Raises ConnectionError, as all below do, where another process has ended.
    """
    if world() == 1:
        return do()
    said: list[Any] = [None, None]
    if is_main():
        try:
            said = [do(), None]
        except Exception as error:
            said = [None, error]
    with _together():
        distributed.broadcast_object_list(said, src=0)
    value, error = said
    if error is not None:
        raise error
    return value


def main_first(do: Callable[[], T]) -> T:
    """What this process got by doing it, after the main one: that one fills the caches."""
    mine: list[T] = []
    from_main(lambda: mine.append(do()))
    return mine[0] if mine else do()


def mean(x: Tensor) -> Tensor:
    """The mean of all processes' tensors of that shape, the same everywhere to the last bit."""
    return x if world() == 1 else _summed(x) / world()


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad)  # each process's loss hangs on each process's x


def total(x: Tensor) -> Tensor:
    """The sum of all processes' tensors of that shape; gradients flow back to each of them."""
    return x if world() == 1 else _total(x)


def _total(x: Tensor) -> Tensor:
    return _Sum.apply(x)


def _summed(x: Tensor) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    with _together():
        distributed.all_reduce(x)
    return x


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes' tensors (B, ...), in the order of their ranks."""
    return x if world() == 1 else _gathered(x)


def _gathered(x: Tensor) -> Tensor:
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    with _together():
        distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@cache
def _stay_uncompiled() -> None:
    """A message to other processes has no place in a compiled network.

    As a decorator this would import the compiler, two seconds, wherever minildm is imported.
    """
    global _total, _gathered
    _total, _gathered = torch.compiler.disable(_total), torch.compiler.disable(_gathered)


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Make each gradient the mean of all processes' ones, in place and in one message.

    What has no gradient in any process keeps none; where only some have one, the others' is 0.
    """
    if world() == 1 or not parameters:
        return
    there = torch.tensor([float(p.grad is not None) for p in parameters])
    there = mean(there.to(parameters[0].device)).tolist()
    used = [p for p, share in zip(parameters, there, strict=True) if share]
    for p in used:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if used:
        whole = mean(torch.cat([p.grad.flatten() for p in used]))
        for p, part in zip(used, whole.split([p.numel() for p in used]), strict=True):
            p.grad.copy_(part.view_as(p))


def average_numbers(numbers: dict[str, float], device: torch.device) -> dict[str, float]:
    """The means over all processes, which must give the same names."""
    if world() == 1:
        return numbers
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    return dict(zip(numbers, mean(values).tolist(), strict=True))
