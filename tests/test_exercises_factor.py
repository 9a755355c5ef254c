"""The checks of notebook 16: right answers pass, typical mistakes are named."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from exercise_rules import (  # noqa: F401
    test_a_check_leaves_the_random_state_alone,
    test_a_mistake_is_named,
    test_no_answer_makes_a_check_raise,
)
from torch import Tensor

from minildm.exercises import downsampling_factor
from minildm.intervals import mean_interval

CHECKS = TIME, DIFFERENCE = (
    downsampling_factor.check_at_time,
    downsampling_factor.check_difference,
)


def by_numpy(seconds: Tensor, values: Tensor, budget: float) -> Tensor:
    rows = zip(seconds, values, strict=True)
    return torch.tensor([np.interp(budget, x, y) for x, y in rows], dtype=torch.float32)


def by_package(a: Tensor, b: Tensor, _t: float) -> Tensor:
    found = mean_interval(a - b)
    return torch.tensor([found.value, found.low, found.high])


def interval(half: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    def answer(a: Tensor, b: Tensor, t: float) -> Tensor:
        mean, width = (a - b).mean(), half(a, b, t)
        return torch.stack([mean, mean - width, mean + width])

    return answer


@pytest.mark.parametrize(("check", "fn"), [(TIME, by_numpy), (DIFFERENCE, by_package)])
def test_a_right_answer_passes(check: Any, fn: Any) -> None:
    assert check(fn).ok, check(fn)


WRONG = {
    "step": (TIME, lambda s, v, b: v.gather(1, ((s < b).sum(1).clamp(1, 3) - 1)[:, None])[:, 0],
             "last moment before the budget"),
    "nearest": (TIME, lambda s, v, b: v.gather(1, (s - b).abs().argmin(1, keepdim=True))[:, 0],
                "nearest moment"),
    "equal steps": (TIME, lambda s, v, _b: v[:, -1], "equal steps"),
    "one axis": (TIME, lambda s, v, b: by_numpy(s[:1].expand_as(s), v, b), "of its own"),
    "strangers": (DIFFERENCE, interval(lambda a, b, t: t * ((a.var() + b.var()) / len(a)).sqrt()),
                  "treated as strangers"),
    "normal": (DIFFERENCE, interval(lambda a, b, t: 1.96 * (a - b).std() / len(a) ** 0.5),
               "1.96 is for many"),
    "no root": (DIFFERENCE, interval(lambda a, b, t: t * (a - b).std()), "root of the number"),
    "biased": (DIFFERENCE, interval(
        lambda a, b, t: t * (a - b).std(correction=0) / len(a) ** 0.5), "divides by S"),
    "sign": (DIFFERENCE, lambda a, b, t: by_package(b, a, t), "turned around"),
}  # fmt: skip
