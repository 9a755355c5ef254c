"""Random numbers for a batch that several processes share: each gets the rows that are its own.

Within `share(rank, world)` every function draws for the whole batch, which has `world` times as
many rows, and returns those of this process; anywhere else it is torch's own, bit for bit. So
what sample i of a step gets depends on the seed and on i, not on how many processes there are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_shared = {"rank": 0, "world": 1}


@contextmanager
def share(rank: int, world: int) -> Iterator[None]:
    """Within the block a batch is one of `world` equal parts of a whole one, the rank-th from 0.

    Raises ValueError for a rank outside 0..world - 1.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank={rank} must lie in 0..{world - 1}, world={world}")
    before = dict(_shared)
    _shared.update(rank=rank, world=world)
    try:
        yield
    finally:
        _shared.update(before)


def total(n: int) -> int:
    """How many rows the whole batch has, if this process has n."""
    return n * _shared["world"]


def mine(whole: Tensor, dim: int = 0) -> Tensor:
    """This process's rows of what was drawn for the whole batch, along `dim`."""
    if _shared["world"] == 1:
        return whole
    return whole.chunk(_shared["world"], dim)[_shared["rank"]]


def rand(*shape: int, dim: int = 0, **options: Any) -> Tensor:
    """As torch.rand; the batch is the axis `dim`."""
    return _own_rows(lambda whole: torch.rand(whole, **options), shape, dim)


def randn(*shape: int, dim: int = 0, **options: Any) -> Tensor:
    """As torch.randn; the batch is the axis `dim`."""
    return _own_rows(lambda whole: torch.randn(whole, **options), shape, dim)


def randint(high: int, *shape: int, dim: int = 0, **options: Any) -> Tensor:
    """As torch.randint from 0; the batch is the axis `dim`."""
    return _own_rows(lambda whole: torch.randint(high, whole, **options), shape, dim)


def uniform(low: float, high: float, *shape: int, dim: int = 0, **options: Any) -> Tensor:
    """As torch.empty(shape).uniform_(low, high); the batch is the axis `dim`."""
    return _own_rows(lambda whole: torch.empty(whole, **options).uniform_(low, high), shape, dim)


def randn_like(like: Tensor) -> Tensor:
    """As torch.randn_like: (B, ...) -> the same shape and layout in memory."""
    return mine(torch.randn_like(_whole_like(like)))


class Dropout(nn.Dropout):
    """As torch's; which values go depends on the sample's place in the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        if _shared["world"] == 1:
            return super().forward(x)
        return x * mine(F.dropout(torch.ones_like(_whole_like(x)), self.p, self.training))


def _own_rows(draw: Callable[[list[int]], Tensor], shape: tuple[int, ...], dim: int) -> Tensor:
    whole = list(shape)
    whole[dim] = total(whole[dim])
    return mine(draw(whole), dim)


def _whole_like(like: Tensor) -> Tensor:
    """A tensor (of no values) for the whole batch, laid out in memory as `like` is.

    The layout has a say: torch fills a dense tensor in the order of its memory.
    """
    if _shared["world"] == 1:
        return like
    row, strides = like[0].numel(), torch.empty_like(like, device="meta").stride()
    return like.new_empty_strided((total(len(like)), *like.shape[1:]), (row, *strides[1:]))
