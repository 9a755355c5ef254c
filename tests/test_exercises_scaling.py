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

CHECKS = GRADIENT, IDLE = (scaling_out.check_whole_gradient, scaling_out.check_idle_share)


def by_sample(gradients: Tensor, counts: Tensor) -> Tensor:
    """Every sample's share, one by one."""
    return torch.repeat_interleave(gradients, counts, dim=0).mean(0)


def ends(seconds: Tensor, workers: int) -> list[float]:
    """When each worker has done its last run."""
    free = [0.0] * workers
    for run in seconds.tolist():
        heapq.heapreplace(free, free[0] + run)
    return free


def end(seconds: Tensor, workers: int) -> float:
    return max(ends(seconds, workers))


def share(seconds: Tensor, workers: int, until: float | Tensor) -> Tensor:
    return 1 - seconds.sum() / (workers * until)


def by_events(seconds: Tensor, workers: int) -> Tensor:
    return share(seconds, workers, end(seconds, workers))


def by_gaps(seconds: Tensor, workers: int) -> Tensor:
    """Each worker's wait for the end, in a loop as the notebook's."""
    free = torch.zeros(workers)
    for run in seconds:
        free[free.argmin()] += run
    return (free.max() - free).mean() / free.max()


@pytest.mark.parametrize(
    ("check", "fn"), [(GRADIENT, by_sample), (IDLE, by_events), (IDLE, by_gaps)]
)
def test_a_right_answer_passes(check: Any, fn: Any) -> None:
    assert check(fn).ok, check(fn)


WRONG = {
    "alike": (GRADIENT, lambda g, _c: g.mean(0), "weighs each process alike"),
    "sum": (GRADIENT, lambda g, _c: g.sum(0), "sum over processes"),
    "weighted sum": (GRADIENT, lambda g, c: (g * c[:, None]).sum(0), "divide by the number"),
    "by processes": (GRADIENT, lambda g, c: (g * c[:, None]).mean(0), "not of processes"),
    "busy": (IDLE, lambda s, w: 1 - by_events(s, w), "in which they work"),
    "when": (IDLE, lambda s, w: torch.tensor(end(s, w)), "when the last run ends"),
    "seconds": (IDLE, lambda s, w: torch.tensor(w * end(s, w)) - s.sum(), "those are seconds"),
    "of one": (IDLE, lambda s, w: w * by_events(s, w), "not of one"),
    "their own": (IDLE, lambda s, w: s.sum() * 0, "not until their own"),
    "first": (IDLE, lambda s, w: 1 - torch.tensor(min(ends(s, w)) / end(s, w)), "ends first"),
    "dealt": (IDLE, lambda s, w: share(s, w, max(s[i::w].sum() for i in range(w))),
              "in turn beforehand"),
    "blocks": (IDLE, lambda s, w: share(s, w, max(p.sum() for p in s.tensor_split(w))),
               "in blocks"),
    "rounds": (IDLE, lambda s, w: share(s, w, sum(p.max() for p in s.split(w))), "nobody waits"),
    "serial": (IDLE, lambda s, w: share(s, w, s.sum()), "work at once"),
    "sorted": (IDLE, lambda s, w: by_events(s.sort(descending=True).values, w), "keep the order"),
}  # fmt: skip
