"""The checks of notebook 19: right answers pass, typical mistakes are named."""

import heapq
from typing import Any

import pytest
import torch
from exercise_rules import (  # noqa: F401
    test_a_check_leaves_the_random_state_alone,
    test_a_mistake_is_named,
    test_no_answer_makes_a_check_raise,
)
from torch import Tensor

from minildm.exercises import scaling_out

CHECKS = GRADIENT, MAKESPAN = (scaling_out.check_whole_gradient, scaling_out.check_makespan)


def by_sample(gradients: Tensor, counts: Tensor) -> Tensor:
    """Every sample's share, one by one."""
    return torch.repeat_interleave(gradients, counts, dim=0).mean(0)


def by_events(seconds: Tensor, workers: int) -> Tensor:
    """The clock goes from end to end."""
    ends: list[float] = []
    now = 0.0
    for run in seconds.tolist():
        if len(ends) == workers:
            now = heapq.heappop(ends)
        heapq.heappush(ends, now + run)
    return torch.tensor(max(ends))


@pytest.mark.parametrize(("check", "fn"), [(GRADIENT, by_sample), (MAKESPAN, by_events)])
def test_a_right_answer_passes(check: Any, fn: Any) -> None:
    assert check(fn).ok, check(fn)


WRONG = {
    "alike": (GRADIENT, lambda g, _c: g.mean(0), "weighs each process alike"),
    "sum": (GRADIENT, lambda g, _c: g.sum(0), "sum over processes"),
    "weighted sum": (GRADIENT, lambda g, c: (g * c[:, None]).sum(0), "divide by the number"),
    "by processes": (GRADIENT, lambda g, c: (g * c[:, None]).mean(0), "not of processes"),
    "even": (MAKESPAN, lambda s, w: s.sum() / w, "cannot be split"),
    "longest": (MAKESPAN, lambda s, _w: s.max(), "longest run"),
    "serial": (MAKESPAN, lambda s, _w: s.sum(), "sum of all runs"),
    "dealt": (MAKESPAN, lambda s, w: torch.stack([s[i::w].sum() for i in range(w)]).max(),
              "in turn beforehand"),
    "rounds": (MAKESPAN, lambda s, w: torch.stack([p.max() for p in s.split(w)]).sum(),
               "nobody waits"),
    "sorted": (MAKESPAN, lambda s, w: by_events(s.sort(descending=True).values, w),
               "keep the order"),
}  # fmt: skip
