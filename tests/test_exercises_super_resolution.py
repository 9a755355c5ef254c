"""The checks of notebook 13: right answers pass, and each typical mistake is named."""

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

from minildm.exercises import super_resolution
from minildm.fidelity import psnr
from minildm.guidance import image_guided
from minildm.schedule import NoiseSchedule

Fn = Callable[..., Any]
CHECKS = KEPT, STEERED = (super_resolution.check_kept, super_resolution.check_steered)


def kept(
    shrink: Fn = lambda x, y: (F.avg_pool2d(x, 4), y),
    mean: Fn = lambda e: e.mean((1, 2, 3)),
    log: Fn = torch.log10,
    peak: float = 2.0,
    factor: float = -10,
) -> Fn:
    def fn(x: Tensor, low_res: Tensor) -> Tensor:
        a, b = shrink(x, low_res)
        return factor * log(mean(((a - b) / peak) ** 2))

    return fn


def steered(
    sign: float = 1.0,
    half: float = 0.5,
    weight: Fn = lambda abar: (1 - abar).sqrt(),
    detach: bool = False,
    by_z0: bool = False,
    total: Fn = torch.sum,
    own: float = 1.0,
    step: Fn = lambda scale: scale,
) -> Fn:
    def fn(eps_theta: Fn, z: Tensor, y: Tensor, abar: Tensor, scale: float) -> Tensor:
        abar, z = abar.view(-1, 1, 1, 1), z.clone().requires_grad_()
        eps = eps_theta(z)
        used = eps.detach() if detach else eps
        z0_hat = (z - (1 - abar).sqrt() * used) / abar.sqrt()
        far = total(half * (y - z0_hat) ** 2, dim=(1, 2, 3)).sum()
        slope = torch.autograd.grad(far, z0_hat if by_z0 else z)[0]
        return (own * eps + sign * step(scale) * weight(abar) * slope).detach()

    return fn


def packages_steered(eps_theta: Fn, z: Tensor, y: Tensor, abar: Tensor, scale: float) -> Tensor:
    """The package's own guiding, on a schedule that has these abar."""
    schedule = NoiseSchedule.scaled_linear()
    schedule.alphas_cumprod[: len(abar)] = abar
    far = lambda z0: 0.5 * (y - z0).square().sum((1, 2, 3))  # noqa: E731
    denoise = image_guided(lambda z, t: eps_theta(z), schedule, far, scale)
    return denoise(z, torch.arange(len(abar))).eps


RIGHT: list[tuple[Fn, Fn]] = [
    (KEPT, kept()),
    (KEPT, lambda x, y: psnr(F.avg_pool2d(x, 4), y)),
    (KEPT, lambda x, y: psnr(F.interpolate(x, scale_factor=0.25, mode="area"), y)),
    (STEERED, steered()),
    (STEERED, packages_steered),
]


@pytest.mark.parametrize(("check", "fn"), RIGHT)
def test_a_right_answer_passes_however_it_is_written(check: Fn, fn: Fn) -> None:
    verdict = check(fn)
    assert verdict.ok, verdict


def up(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return x, F.interpolate(y, scale_factor=4, mode="nearest")


WRONG: dict[str, tuple[Fn, Fn, str]] = {
    "kept: plus": (KEPT, kept(factor=10), "sign is wrong"),
    "kept: peak": (KEPT, kept(peak=1.0), "span 2, not 1"),
    "kept: ln": (KEPT, kept(log=torch.log), "that of e"),
    "kept: 20": (KEPT, kept(factor=-20), "20 goes with the root"),
    "kept: sum": (KEPT, kept(mean=lambda e: e.sum((1, 2, 3))), "squares are summed"),
    "kept: error": (KEPT, kept(log=lambda e: e, factor=1), "not yet its decibels"),
    "kept: fourth": (KEPT, kept(lambda x, y: (x[..., ::4, ::4], y)), "every fourth pixel"),
    "kept: enlarged": (KEPT, kept(up), "enlarges low_res"),
    "kept: together": (
        KEPT,
        kept(mean=lambda e: e.mean().expand(len(e))),
        "a PSNR of its own",
    ),
    "kept: one number": (KEPT, kept(mean=torch.mean), "its shape is (), expected (3,)"),
    "kept: other": (KEPT, kept(factor=-11), "not the PSNR of x, shrunk"),
    "steered: minus": (STEERED, steered(sign=-1.0), "sign is wrong"),
    "steered: no root": (STEERED, steered(weight=lambda abar: 1.0), "is missing before"),
    "steered: square": (STEERED, steered(weight=lambda abar: 1 - abar), "it is the root"),
    "steered: signal": (STEERED, steered(weight=torch.sqrt), "√ᾱ stands before"),
    "steered: detached": (STEERED, steered(detach=True), "is it detached"),
    "steered: by z0": (STEERED, steered(by_z0=True), "it is taken by z"),
    "steered: half": (STEERED, steered(half=1.0), "factor 1/2"),
    "steered: mean": (STEERED, steered(total=torch.mean), "it is a sum"),
    "steered: plain": (STEERED, lambda e, z, y, abar, scale: e(z), "not guided at all"),
    "steered: alone": (STEERED, steered(own=0.0), "the step alone"),
    "steered: no scale": (STEERED, steered(step=lambda scale: 1.0), "scale is missing"),
    "steered: other": (STEERED, steered(half=0.7), "not those of (3)"),
}
