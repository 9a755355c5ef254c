"""The checks of notebooks 06 and 07: right answers pass, typical mistakes are named."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from exercise_rules import (  # noqa: F401
    test_a_check_leaves_the_random_state_alone,
    test_a_mistake_is_named,
    test_no_answer_makes_a_check_raise,
)
from torch import Tensor

from minildm import NoiseSchedule, ddim
from minildm.exercises import diffusion_steps, unet_parts
from minildm.layers import timestep_embedding

Fn = Callable[..., Any]
NOISE, STEP = diffusion_steps.check_q_sample, diffusion_steps.check_ddim_step
EMBED, ATTEND = unet_parts.check_timestep_embedding, unet_parts.check_attention
CHECKS = (NOISE, STEP, EMBED, ATTEND)


def at(table: Tensor, t: Tensor) -> Tensor:
    return table[t].view(-1, 1, 1, 1)


def noised(abar: Tensor, z0: Tensor, eps: Tensor) -> Tensor:
    return abar.sqrt() * z0 + (1 - abar).sqrt() * eps


def packages_own_step(z: Tensor, eps: Tensor, abar: Tensor, abar_prev: Tensor) -> Tensor:
    """The package's sampler on a schedule made of these two levels."""
    if abar_prev == 1:
        (step,) = ddim(lambda z, t: eps, NoiseSchedule(1 - abar[None]), z, 1, spacing="trailing")
        return step.z
    betas = torch.stack([1 - abar_prev, 1 - abar / abar_prev])
    return next(ddim(lambda z, t: eps, NoiseSchedule(betas), z, 2, spacing="trailing")).z


def guess(z: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    return (z - (1 - abar).sqrt() * eps) / abar.sqrt()


def embed(t: Tensor, width: int, *, sign: float = -1.0, of: float = 0.5, turn: float = 1) -> Tensor:
    i = torch.arange(width // 2)
    angle = turn * t[:, None] * 10_000.0 ** (sign * i / (of * width))
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def alternating(t: Tensor, width: int) -> Tensor:
    cos, sin = embed(t, width).chunk(2, dim=1)
    return torch.stack([cos, sin], dim=2).flatten(1)


def heads_by_loop(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Head after head, with no reshaping at all."""
    parts = zip(*(x.chunk(heads, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([(a @ b.mT / a.shape[2] ** 0.5).softmax(2) @ c for a, b, c in parts], dim=2)


def by_hand(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    *,
    scale: Callable[[int, int], float] = lambda c, d: d**-0.5,
    split: str = "(head d)",
    join: str = "(head d)",
    weigh: Callable[[Tensor], Tensor] = lambda scores: scores.softmax(-1),
) -> Tensor:
    c = q.shape[2]
    q, k, v = (rearrange(x, f"b n {split} -> b head n d", head=heads) for x in (q, k, v))
    weights = weigh(q @ k.mT * scale(c, c // heads))
    return rearrange(weights @ v, f"b head n d -> b n {join}")


RIGHT: list[tuple[Fn, Fn]] = [
    (NOISE, lambda z, t, e, a: noised(at(a, t), z, e)),
    (NOISE, lambda z, t, e, a: torch.stack([noised(a[t[i]], z[i], e[i]) for i in range(len(t))])),
    (STEP, lambda z, e, a, b: b.sqrt() * guess(z, e, a) + (1 - b).sqrt() * e),
    (STEP, packages_own_step),
    (EMBED, timestep_embedding),
    (EMBED, embed),
    (ATTEND, heads_by_loop),
    (ATTEND, by_hand),
    (
        ATTEND,
        lambda q, k, v, heads: rearrange(
            F.scaled_dot_product_attention(
                *(rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (q, k, v))
            ),
            "b h n d -> b n (h d)",
        ),
    ),
]


@pytest.mark.parametrize(("check", "fn"), RIGHT)
def test_a_right_answer_passes_however_it_is_written(check: Fn, fn: Fn) -> None:
    verdict = check(fn)
    assert verdict.ok, verdict


WRONG: dict[str, tuple[Fn, Fn, str]] = {
    "noise: roots": (NOISE, lambda z, t, e, a: at(a, t) * z + (1 - at(a, t)) * e, "roots"),
    "noise: swapped": (NOISE, lambda z, t, e, a: noised(at(a, t), e, z), "swapped"),
    "noise: 1 - root": (
        NOISE,
        lambda z, t, e, a: at(a, t).sqrt() * z + (1 - at(a, t).sqrt()) * e,
        "not 1 − √ᾱ",
    ),
    "noise: bare noise": (NOISE, lambda z, t, e, a: at(a, t).sqrt() * z + e, "noise is not"),
    "noise: bare latent": (NOISE, lambda z, t, e, a: z + (1 - at(a, t)).sqrt() * e, "latent is"),
    "noise: minus": (NOISE, lambda z, t, e, a: noised(at(a, t), z, -e), "subtracted"),
    "noise: first time": (NOISE, lambda z, t, e, a: noised(a[t[0]], z, e), "first one's time"),
    "noise: backwards": (NOISE, lambda z, t, e, a: noised(at(a.flip(0), t), z, e), "backwards"),
    "noise: one early": (NOISE, lambda z, t, e, a: noised(at(a, t - 1), z, e), "index 0"),
    "noise: one late": (NOISE, lambda z, t, e, a: noised(at(a, t + 1), z, e), "not [t + 1]"),
    "noise: other": (NOISE, lambda z, t, e, a: 2 * z, "not those of the equation"),
    "noise: width": (
        NOISE,
        lambda z, t, e, a: noised(a[t] if len(z) == z.shape[-1] else at(a, t), z, e),
        "met the width",
    ),
    "step: guess": (STEP, lambda z, e, a, b: guess(z, e, a), "noise it again"),
    "step: old noise": (
        STEP,
        lambda z, e, a, b: b.sqrt() * guess(z, e, a) + (1 - a).sqrt() * e,
        "where the step ends",
    ),
    "step: old signal": (
        STEP,
        lambda z, e, a, b: a.sqrt() * guess(z, e, a) + (1 - b).sqrt() * e,
        "old weight",
    ),
    "step: nowhere": (STEP, lambda z, e, a, b: noised(a, guess(z, e, a), e), "where it came from"),
    "step: forwards": (STEP, lambda z, e, a, b: noised(a, guess(z, e, b), e), "forwards"),
    "step: undivided": (
        STEP,
        lambda z, e, a, b: noised(b, z - (1 - a).sqrt() * e, e),
        "not divided",
    ),
    "step: added": (STEP, lambda z, e, a, b: noised(b, guess(z, -e, a), e), "taken away"),
    "step: no roots": (STEP, lambda z, e, a, b: b * guess(z, e, a) + (1 - b) * e, "roots"),
    "step: no noise": (STEP, lambda z, e, a, b: b.sqrt() * guess(z, e, a), "not put back"),
    "step: minus": (STEP, lambda z, e, a, b: noised(b, guess(z, e, a), -e), "wrong sign"),
    "step: no eps": (STEP, lambda z, e, a, b: (b / a).sqrt() * z, "does not use eps_hat"),
    "step: stops short": (
        STEP,
        lambda z, e, a, b: noised(b.clamp(max=0.99), guess(z, e, a), e),
        "must end at ẑ_0",
    ),
    "embed: sines first": (
        EMBED,
        lambda t, w: torch.cat(embed(t, w).chunk(2, dim=1)[::-1], dim=1),
        "sines come first",
    ),
    "embed: alternating": (EMBED, alternating, "alternate"),
    "embed: rising": (EMBED, lambda t, w: embed(t, w, sign=1.0), "frequencies rise"),
    "embed: width": (EMBED, lambda t, w: embed(t, w, of=1.0), "divided by width"),
    "embed: turns": (EMBED, lambda t, w: embed(t, w, turn=2 * math.pi), "2π"),
    "embed: t / T": (EMBED, lambda t, w: embed(t, w, turn=1e-3), "scaled to"),
    "embed: ten": (
        EMBED,
        lambda t, w: torch.cat(
            [
                f(t[:, None] * 10.0 ** (-2 * torch.arange(w // 2) / w))
                for f in (torch.cos, torch.sin)
            ],
            dim=1,
        ),
        "10 stands",
    ),
    "embed: no exp": (
        EMBED,
        lambda t, w: torch.cat(
            [
                f(t[:, None] * (-2 * math.log(10_000) * torch.arange(w // 2) / w))
                for f in (torch.cos, torch.sin)
            ],
            dim=1,
        ),
        "exp is missing",
    ),
    "embed: half - 1": (
        EMBED,
        lambda t, w: embed(t, w, of=(w // 2 - 1) / w) if w > 2 else embed(t, w),
        "half − 1",
    ),
    "embed: no sines": (EMBED, lambda t, w: embed(t, w)[:, : w // 2], "shape is"),
    "attend: no scale": (
        ATTEND,
        lambda *a: by_hand(*a, scale=lambda c, d: 1.0),
        "not divided by √d",
    ),
    "attend: by d": (ATTEND, lambda *a: by_hand(*a, scale=lambda c, d: 1 / d), "by its root"),
    "attend: by C": (ATTEND, lambda *a: by_hand(*a, scale=lambda c, d: c**-0.5), "by √C"),
    "attend: queries": (
        ATTEND,
        lambda *a: by_hand(*a, weigh=lambda s: s.softmax(-2)),
        "over the queries",
    ),
    "attend: no softmax": (ATTEND, lambda *a: by_hand(*a, weigh=lambda s: s), "must add up"),
    "attend: one head": (ATTEND, lambda q, k, v, _h: by_hand(q, k, v, 1), "one head"),
    "attend: split": (
        ATTEND,
        lambda *a: by_hand(*a, split="(d head)", join="(d head)"),
        "side by side",
    ),
    "attend: join": (ATTEND, lambda *a: by_hand(*a, join="(d head)"), "joined"),
    "attend: other": (ATTEND, lambda q, k, v, _h: q, "not those of the equation"),
}
