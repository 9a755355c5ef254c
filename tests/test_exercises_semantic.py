"""The checks of notebook 15: right answers pass, and each typical mistake is named."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import reduce
from exercise_rules import (  # noqa: F401
    test_a_check_leaves_the_random_state_alone,
    test_a_mistake_is_named,
    test_no_answer_makes_a_check_raise,
)
from torch import Tensor, nn

from minildm.exercises import semantic_synthesis
from minildm.spatial import SemanticMap
from minildm.tau_theta import ConditionerConfig

Fn = Callable[..., Any]
CHECKS = SHARES, REACH = (semantic_synthesis.check_shares, semantic_synthesis.check_reach)


def packages_shares(maps: Tensor, labels: int, f: int) -> Tensor:
    """The package's module, its last layer the identity."""
    names = tuple(str(i) for i in range(labels))
    stages = int(math.log2(f))
    config = ConditionerConfig(concat="semantic", labels=names, channels=labels, stages=stages)
    module = SemanticMap(config)
    module.mapper.weight.data = torch.eye(labels)[..., None, None]
    return module({"semantic": maps}).detach()


def shares(
    of: Fn = lambda onehot: onehot, cell: Fn = F.avg_pool2d, then: Fn = lambda x, f: x
) -> Fn:
    """Shares put together from parts."""

    def fn(maps: Tensor, labels: int, f: int) -> Tensor:
        onehot = F.one_hot(maps, labels).permute(0, 3, 1, 2).float()
        return then(cell(of(onehot), f), f)

    return fn


def seen_by_gradient(kernels: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """The truth: which pixels of a row move one pixel of the output."""
    x = torch.zeros(1, 1, 400, requires_grad=True)
    y = x
    for k, s in zip(kernels, strides, strict=True):
        layer = nn.Conv1d(1, 1, k, stride=s, bias=False)
        nn.init.ones_(layer.weight)
        y = layer(y)
    y[0, 0, y.shape[-1] // 2].backward()
    return (x.grad != 0).sum()


def reach(add: Fn = lambda k, step, s: (k - 1) * step, start: int = 1, turned: bool = False) -> Fn:
    """A receptive field put together from parts."""

    def fn(kernels: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        seen, step = start, 1
        for k, s in list(zip(kernels, strides, strict=True))[:: -1 if turned else 1]:
            seen += add(k, step, s)
            step *= s
        return torch.tensor(seen)

    return fn


RIGHT: list[tuple[Fn, Fn]] = [
    (SHARES, packages_shares),
    (SHARES, shares()),
    (SHARES, lambda m, n, f: reduce(
        F.one_hot(m, n).float(), "b (h i) (w j) n -> b n h w", "mean", i=f, j=f
    )),
    (REACH, seen_by_gradient),
    (REACH, reach()),
]  # fmt: skip


@pytest.mark.parametrize(("check", "fn"), RIGHT)
def test_a_right_answer_passes_however_it_is_written(check: Fn, fn: Fn) -> None:
    verdict = check(fn)
    assert verdict.ok, verdict


def most_frequent(x: Tensor, _f: int) -> Tensor:
    return F.one_hot(x.argmax(1), x.shape[1]).permute(0, 3, 1, 2).float()


WRONG: dict[str, tuple[Fn, Fn, str]] = {
    "shares: corner": (SHARES, shares(cell=lambda x, f: x[:, :, ::f, ::f]), "one pixel of each"),
    "shares: last": (SHARES, shares(cell=lambda x, f: x[:, :, f - 1 :: f, f - 1 :: f]), "last"),
    "shares: counts": (SHARES, shares(then=lambda x, f: x * f * f), "counts; divide by"),
    "shares: f": (SHARES, shares(then=lambda x, f: x * f), "divides by f;"),
    "shares: mode": (SHARES, shares(then=most_frequent), "most frequent label"),
    "shares: there": (SHARES, shares(cell=F.max_pool2d), "whether a label is there"),
    "shares: turned": (SHARES, lambda m, n, f: shares()(m.mT, n, f), "shape is"),
    "shares: numbers": (
        SHARES,
        lambda m, n, f: F.avg_pool2d(m[:, None].float(), f).repeat(1, n, 1, 1),
        "averages the labels' numbers",
    ),
    "shares: one-hot last": (
        SHARES,
        lambda m, n, f: shares()(m, n, f).permute(0, 2, 3, 1),
        "shape is",
    ),
    "shares: other": (SHARES, shares(then=lambda x, f: 1 - x), "not the shares of the labels"),
    "reach: strides": (REACH, reach(lambda k, step, s: k - 1), "strides are forgotten"),
    "reach: own stride": (REACH, reach(lambda k, step, s: (k - 1) * step * s), "own stride"),
    "reach: sum": (REACH, lambda k, s: torch.tensor(sum(k)), "added up"),
    "reach: product": (REACH, lambda k, s: torch.tensor(math.prod(k)), "multiplied"),
    "reach: one less": (REACH, reach(start=0), "one is missing"),
    "reach: turned": (REACH, reach(turned=True), "from the last to the first"),
    "reach: a number": (REACH, lambda k, s: 3, "one pixel sees 7"),
    "reach: other": (REACH, reach(start=4), "one pixel sees"),
}


def test_halving_the_square_map_the_other_way_is_named() -> None:
    """Where the shapes do not tell: the second trial is a square."""
    fn = lambda m, n, f: shares()(m, n, f) if m.shape[1] != m.shape[2] else shares()(m.mT, n, f)  # noqa: E731
    assert "height and width are swapped" in semantic_synthesis.check_shares(fn).message
