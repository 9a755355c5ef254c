"""The checks of notebook 18: right answers pass, and each typical mistake is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exercise_rules import (  # noqa: F401
    test_a_check_leaves_the_random_state_alone,
    test_a_mistake_is_named,
    test_no_answer_makes_a_check_raise,
)
from torch import Tensor

from minildm.exercises import official_numbers
from minildm.samplers import timesteps

Fn = Callable[..., Any]
CHECKS = FOLDED, TIMES = (official_numbers.check_folded, official_numbers.check_times)


def by_convolving(weight: Tensor, bias: Tensor, scale: float, shift: Tensor) -> Tensor:
    """What the convolution says of nothing, and of each unit vector."""
    z = torch.cat([torch.eye(3), torch.zeros(1, 3)])[..., None, None]
    out = F.conv2d(z * scale + shift[:, None, None], weight[..., None, None], bias)[:, :, 0, 0]
    return torch.cat([(out[:3] - out[3]).T, out[3:].T], dim=1)


def folded(
    w: Fn = lambda w, s: s * w,
    b: Fn = lambda w, b, s, m: b + w @ m,
) -> Fn:
    def fn(weight: Tensor, bias: Tensor, scale: float, shift: Tensor) -> Tensor:
        new = b(weight, bias, scale, shift)
        return torch.cat([w(weight, scale), new[:, None]], dim=1)

    return fn


def official(T: int, S: int) -> Tensor:
    return torch.tensor([t + 1 for t in range(0, T, T // S)][::-1])


@pytest.mark.parametrize(
    ("check", "fn"), [(FOLDED, folded()), (FOLDED, by_convolving), (TIMES, official)]
)
def test_a_right_answer_passes_however_it_is_written(check: Fn, fn: Fn) -> None:
    verdict = check(fn)
    assert verdict.ok, verdict


@pytest.mark.parametrize("S", [20, 50, 100])
def test_the_package_takes_the_official_times_where_they_are_s(S: int) -> None:
    assert timesteps(1000, S, "leading") == official(1000, S).tolist()


WRONG: dict[str, tuple[Fn, Fn, str]] = {
    "folded: no scale": (FOLDED, folded(w=lambda w, s: w), "the scale is missing"),
    "folded: no shift": (FOLDED, folded(b=lambda w, b, s, m: b), "the shift is missing"),
    "folded: no bias": (FOLDED, folded(b=lambda w, b, s, m: w @ m), "old bias is missing"),
    "folded: scaled shift": (
        FOLDED,
        folded(b=lambda w, b, s, m: b + s * w @ m),
        "must not be scaled, too",
    ),
    "folded: divided": (FOLDED, folded(w=lambda w, s: w / s), "multiplied by it"),
    "folded: scaled bias": (
        FOLDED,
        folded(b=lambda w, b, s, m: s * b + w @ m),
        "the bias is scaled",
    ),
    "folded: minus": (FOLDED, folded(b=lambda w, b, s, m: b - w @ m), "wrong sign"),
    "folded: weights alone": (FOLDED, lambda w, b, s, m: s * w, "shape is (4, 3)"),
    "times: rising": (TIMES, lambda T, S: official(T, S).flip(0), "order of noising"),
    "times: from zero": (TIMES, lambda T, S: official(T, S) - 1, "adds one"),
    "times: two more": (TIMES, lambda T, S: official(T, S) + 1, "one too large"),
    "times: trailing": (
        TIMES,
        lambda T, S: torch.arange(T, 0, -(T // S)) - 1,
        "trailing",
    ),
    "times: S of them": (TIMES, lambda T, S: official(T, S)[:S], "shape is (30,)"),
}
