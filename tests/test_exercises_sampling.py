"""The checks of notebooks 08 and 09: right answers pass, typical mistakes are named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exercise_rules import (  # noqa: F401
    test_a_check_leaves_the_random_state_alone,
    test_a_mistake_is_named,
    test_no_answer_makes_a_check_raise,
)
from torch import Tensor, nn

from minildm import NoiseSchedule
from minildm.ema import EMA
from minildm.exercises import sampling_steps, two_stages
from minildm.samplers import ddim, heun

Fn = Callable[..., Any]
CHECKS = EMAS, SNR, DDIM, HEUN = (
    two_stages.check_ema,
    two_stages.check_snr,
    sampling_steps.check_ddim,
    sampling_steps.check_heun,
)


def packages_ema(shadow: Tensor, weights: Tensor, n: int, decay: float) -> Tensor:
    """What the package's average is after its n-th update."""
    module = nn.Linear(len(weights), 1, bias=False)
    module.weight.data = shadow[None].clone()
    average = EMA(module, decay)
    average.updates = n - 1
    module.weight.data = weights[None].clone()
    average.update(module)
    return average.shadow["weight"][0]


def packages_ddim(
    z: Tensor, eps: Tensor, abar: Tensor, prev: Tensor, sigma: float, noise: Tensor
) -> Tensor:
    """The package's sampler on a schedule of two levels, ending at the lower, or at the data."""
    if prev == 1:
        table, last = abar[None], -1
    else:
        table, last = torch.stack([prev, abar]), 0
    schedule = NoiseSchedule(torch.linspace(0.1, 0.2, len(table)))
    schedule.alphas_cumprod = table
    largest = ((1 - prev) / (1 - abar) * (1 - abar / prev)).sqrt() if prev < 1 else 1.0
    steps = ddim(
        lambda *_: eps,
        schedule,
        z,
        len(table),
        eta=float(sigma / largest),
        spacing="trailing",
        noise=lambda _: noise,
    )
    return [step.z for step in steps][last]


def packages_heun(x: Tensor, sigma: float, end: float, slope: Fn) -> Tensor:
    """The package's sampler; z = sqrt(abar) x, and x's sigma is sqrt(1 - abar) / sqrt(abar)."""
    table = torch.tensor([1 / (1 + s**2) for s in (end, sigma)], dtype=torch.float64)
    schedule = NoiseSchedule(torch.tensor([0.1, 0.2], dtype=torch.float64))
    schedule.alphas_cumprod = table

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        return slope(z / table[t].sqrt()[:, None, None, None], (end, sigma)[int(t[0])])

    z = (x.double() * table[1].sqrt()).view(1, 1, 1, -1)
    first = next(heun(denoise, schedule, z, 2, spacing="trailing"))
    return (first.z / table[0].sqrt()).flatten()


def z0_of(z: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    return (z - (1 - abar).sqrt() * eps) / abar.sqrt()


def step(way: Fn, z0: Fn = z0_of, random: Fn = lambda s, e: s * e) -> Fn:
    """DDIM's step with another weight of eps_hat, another z0_hat, other noise."""
    return lambda z, eps, a, b, s, e: b.sqrt() * z0(z, eps, a) + way(b, s) * eps + random(s, e)


def weight(b: Tensor, s: float) -> Tensor:
    return (1 - b - s**2).sqrt()


def power(z: Tensor, scale: float) -> Tensor:
    return z.var(correction=0) / scale**2


def ratio(abar: Tensor) -> Tensor:
    return abar / (1 - abar)


def warm(n: int) -> float:
    return (1 + n) / (10 + n)


RIGHT: list[tuple[Fn, Fn]] = [
    (EMAS, packages_ema),
    (EMAS, lambda s, w, n, d: torch.lerp(w, s, min(d, warm(n)))),
    (SNR, lambda a, z, k: NoiseSchedule.snr(on_table(a), torch.arange(len(a))) * (z / k).var()),
    (SNR, lambda a, z, k: power(z, k) * a / (1 - a)),
    (DDIM, packages_ddim),
    (DDIM, step(weight)),
    (HEUN, packages_heun),
    (
        HEUN,
        lambda x, a, b, f: x + (b - a) / 2 * f(x, a) + (b - a) / 2 * f(x + (b - a) * f(x, a), b),
    ),
]


def on_table(abar: Tensor) -> NoiseSchedule:
    schedule = NoiseSchedule(torch.full((len(abar),), 0.1))
    schedule.alphas_cumprod = abar
    return schedule


@pytest.mark.parametrize(("check", "fn"), RIGHT)
def test_a_right_answer_passes_however_it_is_written(check: Fn, fn: Fn) -> None:
    verdict = check(fn)
    assert verdict.ok, verdict


def heuns(x: Tensor, a: float, b: float, f: Fn, *, at: Fn, level: Fn, mix: Fn) -> Tensor:
    """Heun's step, put together from parts."""
    first = f(x, a)
    return x + (b - a) * mix(first, f(at(x, b - a, first), level(a, b)))


def heun_with(
    at: Fn = lambda x, way, first: x + way * first,
    level: Fn = lambda a, b: b,
    mix: Fn = lambda one, other: (one + other) / 2,
) -> Fn:
    return lambda x, a, b, f: heuns(x, a, b, f, at=at, level=level, mix=mix)


WRONG: dict[str, tuple[Fn, Fn, str]] = {
    "ema: swapped": (EMAS, lambda s, w, n, d: packages_ema(w, s, n, d), "swapped"),
    "ema: no warm-up": (EMAS, lambda s, w, n, d: d * s + (1 - d) * w, "warm-up is missing"),
    "ema: warm-up alone": (
        EMAS,
        lambda s, w, n, d: warm(n) * s + (1 - warm(n)) * w,
        "smaller of the two",
    ),
    "ema: larger": (
        EMAS,
        lambda s, w, n, d: torch.lerp(w, s, max(d, warm(n))),
        "smaller of the two",
    ),
    "ema: from 0": (
        EMAS,
        lambda s, w, n, d: torch.lerp(w, s, min(d, warm(n - 1))),
        "counted from 1",
    ),
    "ema: shares": (EMAS, lambda s, w, n, d: min(d, warm(n)) * s + w, "add up to 1"),
    "ema: weights": (EMAS, lambda s, w, n, d: w, "nothing is averaged"),
    "ema: old": (EMAS, lambda s, w, n, d: s, "never enter"),
    "ema: mean": (EMAS, lambda s, w, n, d: (s + w) / 2, "plain mean"),
    "ema: in place": (EMAS, lambda s, w, n, d: s.lerp_(w, 1 - min(d, warm(n))), "in place"),
    "snr: no latents": (SNR, lambda a, z, k: ratio(a), "do not enter"),
    "snr: no scale": (SNR, lambda a, z, k: power(z, 1) * ratio(a), "not divided by"),
    "snr: times scale": (SNR, lambda a, z, k: power(z, 1 / k) * ratio(a), "multiplied"),
    "snr: scale once": (SNR, lambda a, z, k: power(z, k**0.5) * ratio(a), "scale is not squared"),
    "snr: std": (SNR, lambda a, z, k: power(z, k).sqrt() * ratio(a), "spread is not squared"),
    "snr: root": (SNR, lambda a, z, k: (power(z, k) * ratio(a)).sqrt(), "ratio of the spreads"),
    "snr: inverse": (SNR, lambda a, z, k: 1 / (power(z, k) * ratio(a)), "upside down"),
    "snr: no noise": (SNR, lambda a, z, k: power(z, k) * a, "noise is missing"),
    "snr: share": (
        SNR,
        lambda a, z, k: power(z, k) * a / (power(z, k) * a + 1 - a),
        "share of the whole",
    ),
    "snr: weights": (SNR, lambda a, z, k: power(z, k) * ratio(a).sqrt(), "are weights"),
    "snr: log": (SNR, lambda a, z, k: (power(z, k) * ratio(a)).log(), "logarithm"),
    "ddim: on top": (DDIM, step(lambda b, s: (1 - b).sqrt()), "yield as much"),
    "ddim: no root": (DDIM, step(lambda b, s: 1 - b - s**2), "weight is a root"),
    "ddim: sigma": (DDIM, step(lambda b, s: (1 - b - s).clamp(min=0).sqrt()), "not σ."),
    "ddim: no noise": (DDIM, step(weight, random=lambda s, e: 0), "noise is missing"),
    "ddim: bare noise": (DDIM, step(weight, random=lambda s, e: e), "not weighed by σ"),
    "ddim: variance": (DDIM, step(weight, random=lambda s, e: s**2 * e), "not σ²"),
    "ddim: same level": (
        DDIM,
        lambda z, eps, a, b, s, e: step(weight)(z, eps, a, a, s, e),
        "go to ᾱ'",
    ),
    "ddim: undivided": (
        DDIM,
        step(weight, lambda z, eps, a: z - (1 - a).sqrt() * eps),
        "not divided by √ᾱ",
    ),
    "ddim: by abar": (DDIM, step(weight, lambda z, eps, a: z0_of(z, eps, a) / a.sqrt()), "by ᾱ;"),
    "ddim: 1 - abar": (
        DDIM,
        step(weight, lambda z, eps, a: (z - (1 - a) * eps) / a.sqrt()),
        "weight 1 − ᾱ",
    ),
    "ddim: at the end": (
        DDIM,
        lambda z, eps, a, b, s, e: step(weight, lambda z, eps, _: z0_of(z, eps, b))(
            z, eps, a, b, s, e
        ),
        "ᾱ' in place of ᾱ",
    ),
    "ddim: bare z0": (
        DDIM,
        lambda z, eps, a, b, s, e: z0_of(z, eps, a) + weight(b, s) * eps + s * e,
        "not weighed by √ᾱ'",
    ),
    "ddim: z": (DDIM, step(weight, lambda z, eps, a: z), "z stands where"),
    "ddim: all the way": (DDIM, lambda z, eps, a, *_: z0_of(z, eps, a), "z0_hat alone"),
    "ddim: nothing": (DDIM, lambda z, *_: z, "z unchanged"),
    "ddim: only without noise": (
        DDIM,
        lambda z, eps, a, b, s, e: step(weight)(z, eps, a, b, s, e) * (1 if s else 2),
        "with σ = 0",
    ),
    "heun: euler": (HEUN, heun_with(mix=lambda one, other: one), "Euler's step; now"),
    "heun: end": (HEUN, heun_with(mix=lambda one, other: other), "slope at the end alone"),
    "heun: sum": (HEUN, heun_with(mix=lambda one, other: one + other), "added up"),
    "heun: old x": (HEUN, heun_with(at=lambda x, way, first: x), "at the old x"),
    "heun: old sigma": (HEUN, heun_with(level=lambda a, b: a), "at the old sigma"),
    "heun: goes on": (
        HEUN,
        lambda x, a, b, f: heun_with()(x, a, b, f) + (b - a) * f(x, a),
        "begins at x again",
    ),
    "heun: midpoint": (
        HEUN,
        heun_with(
            lambda x, way, first: x + way / 2 * first,
            lambda a, b: (a + b) / 2,
            lambda one, other: other,
        ),
        "midpoint rule",
    ),
    "heun: backwards": (
        HEUN,
        lambda x, a, b, f: x + (a - b) / 2 * (f(x, a) + f(x + (a - b) * f(x, a), b)),
        "the wrong way: the step",
    ),
    "heun: trial backwards": (
        HEUN,
        heun_with(at=lambda x, way, first: x - way * first),
        "tried step goes the wrong way",
    ),
    "heun: last backwards": (
        HEUN,
        heun_with(mix=lambda one, other: -(one + other) / 2),
        "last step goes the wrong way",
    ),
    "heun: slope": (
        HEUN,
        lambda x, a, b, f: (f(x, a) + f(x + (b - a) * f(x, a), b)) / 2,
        "mean slope",
    ),
    "heun: unscaled": (HEUN, heun_with(at=lambda x, way, first: x + first), "not scaled"),
    "heun: nothing": (HEUN, lambda x, *_: x, "x unchanged"),
    "heun: other": (HEUN, lambda x, a, b, f: 3 * x, "not those of the equation"),
}
