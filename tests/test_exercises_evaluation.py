"""The checks of notebook 17: right answers pass, typical mistakes are named."""

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

from minildm.distances import frechet_distance
from minildm.exercises import evaluation_of_samples

Fn = Callable[..., Any]
CHECKS = FRECHET, LIMIT = (
    evaluation_of_samples.check_frechet,
    evaluation_of_samples.check_limit,
)


def rows_with(mean: Tensor, cov: Tensor) -> Tensor:
    """2 D rows that have exactly that mean and covariance."""
    d = len(mean)
    signs = torch.cat([torch.eye(d), -torch.eye(d)]).double() * ((2 * d - 1) / 2) ** 0.5
    return mean + signs @ torch.linalg.cholesky(cov).T


def by_rows(mean_a: Tensor, a: Tensor, mean_b: Tensor, b: Tensor) -> Tensor:
    """The package's distance, on rows that have these moments."""
    return frechet_distance(rows_with(mean_a, a), rows_with(mean_b, b))


def parts(mean_a: Tensor, a: Tensor, mean_b: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three parts of (1)."""
    cross = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    return (mean_a - mean_b).square().sum(), (a + b).trace(), cross


def mix(combine: Fn) -> Fn:
    return lambda *args: combine(*parts(*args))


def crossed(cross: Fn) -> Fn:
    """(1) with another last term."""

    def answer(mean_a: Tensor, a: Tensor, mean_b: Tensor, b: Tensor) -> Tensor:
        gap, both, _ = parts(mean_a, a, mean_b, b)
        return gap + both - 2 * cross(a, b)

    return answer


def root(a: Tensor) -> Tensor:
    u, s, _ = torch.linalg.svd(a)
    return u @ torch.diag(s.sqrt()) @ u.T


def line(x: Fn = lambda N: 1 / N, part: int = 1) -> Fn:
    return lambda N, far: torch.tensor(np.polyfit(x(N).numpy(), far.numpy(), 1)[part])


def ends(N: Tensor) -> Tensor:
    return torch.stack([N.argmin(), N.argmax()])


def by_numpy(N: Tensor, far: Tensor) -> float:
    """A number, as numpy returns it."""
    return float(np.polyfit(1 / N.numpy(), far, 1)[1])


def solved(N: Tensor, far: Tensor) -> Tensor:
    columns = torch.stack([torch.ones_like(N), 1 / N], dim=1)
    return torch.linalg.lstsq(columns, far[:, None]).solution[0, 0]


RIGHT: list[tuple[Fn, Fn]] = [
    (FRECHET, by_rows),
    (FRECHET, mix(lambda gap, both, cross: gap + both - 2 * cross)),
    (FRECHET, crossed(lambda a, b: torch.linalg.svdvals(root(a) @ root(b)).sum())),
    (FRECHET, mix(lambda gap, both, cross: float(gap + both - 2 * cross))),
    (LIMIT, line()),
    (LIMIT, by_numpy),
    (LIMIT, solved),
]


@pytest.mark.parametrize(("check", "fn"), RIGHT)
def test_a_right_answer_passes_however_it_is_written(check: Fn, fn: Fn) -> None:
    verdict = check(fn)
    assert verdict.ok, verdict


WRONG: dict[str, tuple[Fn, Fn, str]] = {
    "frechet: unsquared": (FRECHET, mix(lambda g, b, c: g.sqrt() + b - 2 * c), "distance is sq"),
    "frechet: no means": (FRECHET, mix(lambda g, b, c: b - 2 * c), "means are not compared"),
    "frechet: means alone": (FRECHET, mix(lambda g, b, c: g), "covariances are not"),
    "frechet: once": (FRECHET, mix(lambda g, b, c: g + b - c), "counts twice"),
    "frechet: no cross": (FRECHET, mix(lambda g, b, c: g + b), "in common is missing"),
    "frechet: numbers' root": (
        FRECHET,
        crossed(lambda a, b: (a @ b).clamp(min=0).sqrt().trace()),
        "root is of each number",
    ),
    "frechet: elementwise": (
        FRECHET,
        crossed(lambda a, b: (a * b).clamp(min=0).sqrt().trace()),
        "multiplied one by one",
    ),
    "frechet: no root": (FRECHET, crossed(lambda a, b: (a @ b).trace()), "root is missing"),
    "frechet: root of trace": (
        FRECHET,
        crossed(lambda a, b: (a @ b).trace().sqrt()),
        "trace of the root",
    ),
    "frechet: roots multiplied": (
        FRECHET,
        crossed(lambda a, b: (root(a) @ root(b)).trace()),
        "share their axes",
    ),
    "frechet: rooted": (FRECHET, mix(lambda g, b, c: (g + b - 2 * c).sqrt()), "stays squared"),
    "frechet: complex": (
        FRECHET,
        crossed(lambda a, b: torch.linalg.eigvals(a @ b).sqrt().sum()),
        "take .real",
    ),
    "frechet: other": (FRECHET, mix(lambda g, b, c: 7 * g), "where A and B are diagonal"),
    "limit: slope": (LIMIT, line(part=0), "that is c"),
    "limit: in N": (LIMIT, line(lambda N: N), "in N; it is"),
    "limit: in the root": (LIMIT, line(lambda N: N**-0.5), "in 1/√N"),
    "limit: largest N": (LIMIT, lambda N, far: far[N.argmax()], "value at the largest N"),
    "limit: last": (LIMIT, lambda N, far: far[-1], "last value"),
    "limit: mean": (LIMIT, lambda N, far: far.mean(), "that is the mean"),
    "limit: ends": (
        LIMIT,
        lambda N, far: line()(N[ends(N)], far[ends(N)]),
        "two ends alone",
    ),
    "limit: zero": (LIMIT, lambda N, far: far.mean() * 0, "need not be 0"),
    "limit: sign": (
        LIMIT,
        lambda N, far: far.mean() + line(part=0)(N, far) * (1 / N).mean(),
        "other way round",
    ),
    "limit: mean N": (
        LIMIT,
        lambda N, far: far.mean() - line(part=0)(N, far) / N.mean(),
        "mean of 1/N",
    ),
    "limit: other": (LIMIT, lambda N, far: 3 * far.mean(), "on an exact line"),
}
