"""The checks of notebook 10: right answers pass, typical mistakes are named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exercise_rules import (  # noqa: F401
    test_a_check_leaves_the_random_state_alone,
    test_a_mistake_is_named,
    test_no_answer_makes_a_check_raise,
)
from torch import Tensor

from minildm import ConditionerConfig, Conditioning, guided
from minildm.conditioning import ClassConditioner
from minildm.exercises import class_guidance

Fn = Callable[..., Any]
CHECKS = STEER, DROP = class_guidance.check_steer, class_guidance.check_drop


def packages_steer(null: Tensor, c: Tensor, away: Tensor, s: float, n: float) -> Tensor:
    """Two of the package's guidances: towards c, and what leads towards the class to avoid."""

    def towards(eps_c: Tensor, scale: float) -> Tensor:
        def eps_theta(z: Tensor, _t: Tensor, c: Conditioning) -> Tensor:
            return (
                torch.where(c.tokens[..., None] > 0, eps_c, null)
                if len(z) == 2
                else (torch.cat([null, eps_c]))
            )

        ones = torch.ones(2, 1, 1)
        t = torch.zeros(2, dtype=torch.long)
        return guided(eps_theta, Conditioning(ones), Conditioning(0 * ones), scale)(null, t)

    return towards(c, s) - (towards(away, n) - null)


def rows(u: Tensor, p: float) -> Tensor:
    return (u < p).view(-1, 1, 1)


RIGHT: list[tuple[Fn, Fn]] = [
    (STEER, packages_steer),
    (STEER, lambda null, c, a, s, n: (1 - s + n) * null + s * c - n * a),
    (DROP, lambda c, null, u, p: torch.where(rows(u, p), null, c)),
    (DROP, lambda c, null, u, p: c + rows(u, p) * (null - c)),
    (
        DROP,  # one sample after the other
        lambda c, null, u, p: torch.stack(
            [null[0] if u[i] < p else c[i] for i in range(len(c))],
        ),
    ),
]


@pytest.mark.parametrize(("check", "fn"), RIGHT)
def test_a_right_answer_passes_however_it_is_written(check: Fn, fn: Fn) -> None:
    verdict = check(fn)
    assert verdict.ok, verdict


def test_the_negative_class_of_the_lesson_is_the_case_n_equal_s_minus_1() -> None:
    null, c, away = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    in_its_place = away + 3.0 * (c - away)
    torch.testing.assert_close(packages_steer(null, c, away, 3.0, 2.0), in_its_place)


def test_the_dropout_of_the_lesson_is_the_conditioners() -> None:
    config = ConditionerConfig(kind="class", classes=("a", "b", "c"), d_cond=4, p_uncond=0.4)
    conditioner, batch = ClassConditioner(config), {"label": torch.arange(3).repeat(20)}
    c, null = conditioner.eval()(batch).tokens, conditioner.null(1).tokens
    torch.manual_seed(0)
    dropped = conditioner.train()(batch).tokens
    torch.manual_seed(0)
    u = torch.rand(60, 1)[:, 0]
    assert torch.equal(torch.where(rows(u, 0.4), null, c), dropped)


WRONG: dict[str, tuple[Fn, Fn, str]] = {
    "steer: plus": (STEER, lambda o, c, a, s, n: o + s * (c - o) + n * (a - o), "subtracted"),
    "steer: swapped": (STEER, lambda o, c, a, s, n: o + n * (c - o) - s * (a - o), "swapped"),
    "steer: plain": (STEER, lambda o, c, a, s, n: o + s * (c - o), "never used"),
    "steer: no n": (STEER, lambda o, c, a, s, n: o + s * (c - o) - (a - o), "n is not used"),
    "steer: one s": (STEER, lambda o, c, a, s, n: o + s * (c - a), "its own number"),
    "steer: in its place": (STEER, lambda o, c, a, s, n: a + s * (c - a), "n = s − 1"),
    "steer: bare away": (
        STEER,
        lambda o, c, a, s, n: o + s * (c - o) - n * a,
        "step away is a difference",
    ),
    "steer: bare c": (
        STEER,
        lambda o, c, a, s, n: o + s * c - n * (a - o),
        "towards the class is a difference",
    ),
    "steer: away from c": (
        STEER,
        lambda o, c, a, s, n: o + s * (c - o) - n * (a - c),
        "begins at eps_c; both",
    ),
    "steer: no start": (STEER, lambda o, c, a, s, n: s * (c - o) - n * (a - o), "is missing"),
    "steer: from c": (
        STEER,
        lambda o, c, a, s, n: c + s * (c - o) - n * (a - o),
        "not without a class",
    ),
    "steer: product": (
        STEER,
        lambda o, c, a, s, n: o + s * (c - o) * n * (a - o),
        "multiplied",
    ),
    "steer: only with n": (
        STEER,
        lambda o, c, a, s, n: o + s * (c - o) - n * (a - o) if n else c,
        "at s = 2, n = 0",
    ),
    "steer: in place": (STEER, lambda o, c, a, s, n: o.add_(s * (c - o)), "in place"),
    "drop: wrong way": (DROP, lambda c, o, u, p: torch.where(rows(u, p), c, o), "wrong way round"),
    "drop: zeros": (DROP, lambda c, o, u, p: c * ~rows(u, p), "become zeros"),
    "drop: added": (DROP, lambda c, o, u, p: c + o * rows(u, p), "is added"),
    "drop: mixed": (DROP, lambda c, o, u, p: (1 - p) * c + p * o, "mixes"),
    "drop: nothing": (DROP, lambda c, o, u, p: c, "no sample lost"),
    "drop: all": (DROP, lambda c, o, u, p: o.expand_as(c), "every sample lost"),
    "drop: one lot for all": (
        DROP,
        lambda c, o, u, p: o.expand_as(c) if bool((u < p).any()) else c,
        "every sample lost",
    ),
    "drop: shape": (DROP, lambda c, o, u, p: c[u >= p], "shape is"),
    "drop: over and over": (DROP, lambda c, o, u, p: 2 * c, "not those of (2)"),
}


@pytest.mark.parametrize(
    ("fits", "mask", "said"),
    [
        (lambda c: c.shape[2] == len(c), lambda u: u, "met the width d"),
        (lambda c: c.shape[1] == len(c), lambda u: u[:, None], "met the tokens M"),
    ],
)
def test_a_mask_that_broadcasts_along_another_axis_is_found(fits: Fn, mask: Fn, said: str) -> None:
    """With other sizes it would stop with an error, which says less."""

    def drop(c: Tensor, null: Tensor, u: Tensor, p: float) -> Tensor:
        return torch.where(mask(u < p) if fits(c) else rows(u, p), null, c)

    verdict = DROP(drop)
    assert not verdict.ok and said in verdict.message, verdict
