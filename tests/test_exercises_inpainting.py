"""The checks of notebook 14: right answers pass, and each typical mistake is named."""

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

from minildm import NoiseSchedule
from minildm.conditioning import ConditionerConfig
from minildm.exercises import inpainting
from minildm.guidance import keep_known
from minildm.spatial import MaskedPicture

Fn = Callable[..., Any]
CHECKS = BESIDE, BLEND = (inpainting.check_beside, inpainting.check_blend)


def packages_beside(z_t: Tensor, z_masked: Tensor, mask: Tensor, f: int) -> Tensor:
    """The package's condition of a picture whose encoder says z_masked, behind z_t."""
    picture = torch.zeros(len(mask), 3, *mask.shape[2:])
    condition = MaskedPicture(ConditionerConfig(concat="inpaint", p_uncond=0.0))
    given = condition({"image": picture, "mask": mask}, lambda x: z_masked)
    return torch.cat([z_t, given], dim=1)


def packages_blend(z_t: Tensor, z_known: Tensor, mask: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """The package's edit, one sample at a time, on a schedule with this abar at its second time."""
    rows = []
    for i in range(len(z_t)):
        schedule = NoiseSchedule(torch.tensor([1e-9, 1 - float(abar[i])]))
        row = slice(i, i + 1)
        edit = keep_known(schedule, z_known[row], mask[row], lambda _, row=row: eps[row])
        rows.append(edit(z_t[row], torch.tensor([1])))
    return torch.cat(rows)


def beside(order: Fn = lambda z, k, m: (z, k, m), hole: Fn = lambda m: 1 - 2 * m) -> Fn:
    """The input put together from parts."""

    def fn(z_t: Tensor, z_masked: Tensor, mask: Tensor, f: int) -> Tensor:
        small = hole(F.interpolate(mask, size=z_t.shape[2:]))
        return torch.cat(order(z_t, z_masked, small), dim=1)

    return fn


def blend(
    known: Fn = lambda z, e, a: a.sqrt() * z + (1 - a).sqrt() * e,
    rest: Fn = lambda z, e, a: z,
    join: Fn = lambda m, k, z: m * k + (1 - m) * z,
) -> Fn:
    """Blending put together from parts."""

    def fn(z_t: Tensor, z_known: Tensor, mask: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
        return join(mask, known(z_known, eps, abar), rest(z_t, eps, abar))

    return fn


def pooled(z_t: Tensor, z_masked: Tensor, mask: Tensor, f: int) -> Tensor:
    return torch.cat([z_t, z_masked, 1 - 2 * F.avg_pool2d(mask, f)], dim=1)


def bilinear(z_t: Tensor, z_masked: Tensor, mask: Tensor, f: int) -> Tensor:
    small = F.interpolate(mask, size=z_t.shape[2:], mode="bilinear")
    return torch.cat([z_t, z_masked, 1 - 2 * small], dim=1)


RIGHT: list[tuple[Fn, Fn]] = [
    (BESIDE, packages_beside),
    (BESIDE, beside()),
    (BESIDE, lambda z, k, m, f: torch.cat([z, k, 1 - 2 * m[:, :, ::f, ::f]], dim=1)),
    (BLEND, packages_blend),
    (BLEND, blend()),
    (BLEND, blend(join=lambda m, k, z: torch.where(m > 0.5, k, z))),
]


@pytest.mark.parametrize(("check", "fn"), RIGHT)
def test_a_right_answer_passes_however_it_is_written(check: Fn, fn: Fn) -> None:
    verdict = check(fn)
    assert verdict.ok, verdict


WRONG: dict[str, tuple[Fn, Fn, str]] = {
    "beside: polarity": (BESIDE, beside(hole=lambda m: 2 * m - 1), "polarity is turned round"),
    "beside: as it came": (BESIDE, beside(hole=lambda m: m), "as it came"),
    "beside: 0 and 1": (BESIDE, beside(hole=lambda m: 1 - m), "must be -1"),
    "beside: swapped": (BESIDE, beside(lambda z, k, m: (k, z, m)), "are swapped"),
    "beside: mask second": (BESIDE, beside(lambda z, k, m: (z, m, k)), "it comes last"),
    "beside: mask first": (BESIDE, beside(lambda z, k, m: (m, z, k)), "mask comes first"),
    "beside: pooled": (BESIDE, pooled, "is averaged"),
    "beside: bilinear": (BESIDE, bilinear, "is interpolated"),
    "beside: twice": (BESIDE, beside(lambda z, k, m: (z, z, m)), "stands there twice"),
    "beside: no mask": (BESIDE, beside(lambda z, k, m: (z, k)), "expected (2, 7, 4, 6)"),
    "beside: in pixels": (
        BESIDE,
        lambda z, k, m, f: torch.cat([z, k, 1 - 2 * m], dim=1),
        "RuntimeError",
    ),
    "beside: other": (BESIDE, beside(hole=lambda m: 3 * m), "in this order"),
    "blend: mask": (
        BLEND,
        blend(join=lambda m, k, z: m * z + (1 - m) * k),
        "mask is turned round",
    ),
    "blend: clean": (BLEND, blend(lambda z, e, a: z), "goes in clean"),
    "blend: no roots": (BLEND, blend(lambda z, e, a: a * z + (1 - a) * e), "roots are missing"),
    "blend: swapped": (
        BLEND,
        blend(lambda z, e, a: (1 - a).sqrt() * z + a.sqrt() * e),
        "are swapped",
    ),
    "blend: bare noise": (BLEND, blend(lambda z, e, a: a.sqrt() * z + e), "noise of what is known"),
    "blend: bare latent": (
        BLEND,
        blend(lambda z, e, a: z + (1 - a).sqrt() * e),
        "latent is not weighed",
    ),
    "blend: no noise": (BLEND, blend(lambda z, e, a: a.sqrt() * z), "noise is missing"),
    "blend: noised again": (
        BLEND,
        blend(rest=lambda z, e, a: a.sqrt() * z + (1 - a).sqrt() * e),
        "noised again",
    ),
    "blend: added": (BLEND, blend(join=lambda m, k, z: k + z), "two are added"),
    "blend: empty": (BLEND, blend(join=lambda m, k, z: m * k), "left empty"),
    "blend: everywhere": (BLEND, blend(join=lambda m, k, z: k), "filled with what is known"),
    "blend: nothing": (BLEND, blend(join=lambda m, k, z: z), "as it came"),
    "blend: in place": (BLEND, lambda z, *rest: blend()(z.mul_(2), *rest), "in place"),
    "blend: other": (BLEND, blend(join=lambda m, k, z: 2 * m * k), "not those of (3)"),
}
