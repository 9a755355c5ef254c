"""The checks of notebook 20: right answers pass, typical mistakes are named."""

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

from minildm import NoiseSchedule
from minildm.exercises import beyond_the_paper
from minildm.flow import flow_loss

Fn = Callable[..., Any]
CHECKS = RESCALE, FLOW = (beyond_the_paper.check_rescale, beyond_the_paper.check_flow_loss)


def packages_rescale(abar: Tensor) -> Tensor:
    schedule = NoiseSchedule(torch.full((len(abar),), 0.1))
    schedule.alphas_cumprod = abar
    return schedule.zero_terminal_snr().alphas_cumprod


def stretch(x: Tensor) -> Tensor:
    return (x - x[-1]) * x[0] / (x[0] - x[-1])


def cut(abar: Tensor) -> Tensor:
    return torch.cat([abar[:-1], abar.new_zeros(1)])


def line(z0: Tensor, tau: Tensor, eps: Tensor) -> Tensor:
    return torch.lerp(z0, eps, tau.view(-1, 1, 1, 1))


def loss(
    z: Fn = line,
    target: Fn = lambda z0, eps: eps - z0,
    at: Fn = lambda tau: tau,
    size: Fn = lambda error: (error**2).mean((1, 2, 3)),
) -> Fn:
    """The loss, put together from parts."""
    return lambda f, z0, tau, eps: size(f(z(z0, tau, eps), at(tau)) - target(z0, eps))


def keeping(z0: Tensor, tau: Tensor, eps: Tensor) -> Tensor:
    tau = tau.view(-1, 1, 1, 1)
    return (1 - tau**2).sqrt() * z0 + tau * eps


RIGHT: list[tuple[Fn, Fn]] = [
    (RESCALE, packages_rescale),
    (RESCALE, lambda abar: stretch(abar.sqrt()) ** 2),
    (FLOW, flow_loss),
    (FLOW, loss()),
]


@pytest.mark.parametrize(("check", "fn"), RIGHT)
def test_a_right_answer_passes_however_it_is_written(check: Fn, fn: Fn) -> None:
    verdict = check(fn)
    assert verdict.ok, verdict


WRONG: dict[str, tuple[Fn, Fn, str]] = {
    "rescale: no root": (RESCALE, stretch, "ᾱ itself"),
    "rescale: roots": (RESCALE, lambda a: stretch(a.sqrt()), "square them"),
    "rescale: shift": (
        RESCALE,
        lambda a: (a.sqrt() - a[-1].sqrt()) ** 2,
        "no longer begins",
    ),
    "rescale: from 1": (
        RESCALE,
        lambda a: ((a.sqrt() - a[-1].sqrt()) / (a[0].sqrt() - a[-1].sqrt())) ** 2,
        "begins at 1",
    ),
    "rescale: cut": (RESCALE, cut, "only the last"),
    "rescale: minus": (RESCALE, lambda a: a - a[-1], "without a root"),
    "rescale: upside down": (
        RESCALE,
        lambda a: ((a.sqrt() - a[-1].sqrt()) * (1 - (a[-1] / a[0]).sqrt())) ** 2,
        "the wrong way round",
    ),
    "rescale: by abar": (
        RESCALE,
        lambda a: ((a.sqrt() - a[-1]) * a[0].sqrt() / (a[0].sqrt() - a[-1])) ** 2,
        "in place of its root",
    ),
    "rescale: nothing": (RESCALE, lambda a: a, "unchanged"),
    "rescale: in place": (RESCALE, lambda a: a.copy_(packages_rescale(a)), "in place"),
    "rescale: other": (RESCALE, lambda a: 3 * a, "not those of (5)"),
    "flow: sign": (FLOW, loss(target=lambda z0, eps: z0 - eps), "wrong sign"),
    "flow: eps": (FLOW, loss(target=lambda z0, eps: eps), "target is eps"),
    "flow: z0": (FLOW, loss(target=lambda z0, eps: z0), "target is z0"),
    "flow: backwards": (
        FLOW,
        loss(z=lambda z0, tau, eps: line(eps, tau, z0)),
        "the line runs the wrong way",
    ),
    "flow: the papers' way": (
        FLOW,
        loss(lambda z0, tau, eps: line(eps, tau, z0), lambda z0, eps: z0 - eps),
        "both run the wrong way",
    ),
    "flow: variance": (FLOW, loss(z=keeping), "keep the variance"),
    "flow: other time": (FLOW, loss(at=lambda tau: 1 - tau), "told 1 − tau"),
    "flow: shape of tau": (FLOW, loss(at=lambda tau: tau.view(-1, 1, 1, 1)), "tau of shape (5, 1"),
    "flow: one tau": (FLOW, loss(at=lambda tau: tau.mean()), "tau of shape ()"),
    "flow: at z0": (FLOW, loss(z=lambda z0, *_: z0), "asked at z0"),
    "flow: at eps": (FLOW, loss(z=lambda _z0, _tau, eps: eps), "asked at eps"),
    "flow: absolute": (FLOW, loss(size=lambda e: e.abs().mean((1, 2, 3))), "not squared"),
    "flow: sum": (FLOW, loss(size=lambda e: (e**2).sum((1, 2, 3))), "take the mean"),
    "flow: weighed": (
        FLOW,
        lambda f, z0, tau, eps: tau * loss()(f, z0, tau, eps),
        "weighed by tau",
    ),
    "flow: scalar": (FLOW, lambda f, z0, tau, eps: loss()(f, z0, tau, eps).mean(), "shape"),
    "flow: other": (FLOW, lambda f, z0, tau, eps: 3 * z0.mean((1, 2, 3)), "not those of (7)"),
}
