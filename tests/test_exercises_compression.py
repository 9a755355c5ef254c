"""The checks of notebooks 01 and 05: right answers pass, typical mistakes are named."""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import pytest
import torch
from test_exercises import ODD
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from minildm import AutoencoderConfig
from minildm.exercises import choosing_f, perceptual_compression
from minildm.intervals import mean_interval

Fn = Callable[..., Any]
BITS, WEIGHT = perceptual_compression.check_bits_per_dim, perceptual_compression.check_weight
CHOOSE, INTERVAL = choosing_f.check_choose, choosing_f.check_interval
CHECKS = (BITS, WEIGHT, CHOOSE, INTERVAL)
LN2, ALL = math.log(2), (1, 2, 3)


def torchs_own(mean_q: Tensor, logvar_q: Tensor, mean_p: Tensor, logvar_p: Tensor) -> Tensor:
    q, p = Normal(mean_q, (0.5 * logvar_q).exp()), Normal(mean_p, (0.5 * logvar_p).exp())
    return kl_divergence(q, p).mean(ALL) / LN2


def one_by_one(f: Tensor, c: Tensor, codes: Tensor) -> Tensor:
    rows = zip(f.tolist(), c.tolist(), codes.tolist(), strict=True)
    found = []
    for side, channels, k in rows:
        latent = channels * (64 / side) ** 2
        found.append([3 * 64 * 64 / latent, math.log2(k) * (64 / side) ** 2 / 64**2])
    return torch.tensor(found)


def first_allowed(f: Tensor, numbers: Tensor, psnr: Tensor, budget: float, least: float) -> Tensor:
    for i in f.argsort(descending=True):
        if numbers[i] <= budget and psnr[i] >= least:
            return f[i]
    return torch.tensor(0.0)


def exact_quantile(values: Tensor) -> Tensor:
    half = NormalDist().inv_cdf(0.975) * values.var().sqrt() / math.sqrt(len(values))
    return values.mean() + half * torch.tensor([0.0, -1.0, 1.0])


RIGHT: list[tuple[Fn, Fn]] = [
    (BITS, torchs_own),
    (WEIGHT, one_by_one),
    (CHOOSE, first_allowed),
    (CHOOSE, lambda f, n, p, b, m: (f * ((n <= b) & (p >= m))).max()),
    (INTERVAL, exact_quantile),
]


@pytest.mark.parametrize(("check", "fn"), RIGHT)
def test_a_right_answer_passes_however_it_is_written(check: Fn, fn: Fn) -> None:
    verdict = check(fn)
    assert verdict.ok and "Right" in repr(verdict), verdict


def test_the_interval_is_the_packages_for_many_pictures() -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)) + 25
    found = torch.tensor(mean_interval(values)[:3])
    assert torch.allclose(exact_quantile(values), found, atol=1e-4)


def test_the_weight_counts_as_the_package_does() -> None:
    config = AutoencoderConfig(regularizer="vq", codebook_size=256, z_channels=4)
    numbers, bits = one_by_one(*(torch.tensor([v]) for v in (config.f, 4, 256)))[0].tolist()
    assert (config.f, numbers, bits) == (8, 48.0, 0.125)


def kl(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return 0.5 * ((b - d).exp() - 1 - (b - d) + (a - c) ** 2 * (-d).exp())


def both(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second], dim=1)


def around(values: Tensor, half: Tensor) -> Tensor:
    return torch.stack([values.mean(), values.mean() - half, values.mean() + half])


def se(values: Tensor) -> Tensor:
    return values.std() / len(values) ** 0.5


def largest(f: Tensor, allowed: Tensor) -> Tensor:
    return (f * allowed).max()


WRONG: dict[str, tuple[Fn, Fn, str]] = {
    "nats": (BITS, lambda *m: kl(*m).mean(ALL), "those are nats"),
    "times ln 2": (BITS, lambda *m: kl(*m).mean(ALL) * LN2, "multiplied by ln 2"),
    "sum": (BITS, lambda *m: kl(*m).sum(ALL) / LN2, "bits of a whole picture"),
    "sum of nats": (BITS, lambda *m: kl(*m).sum(ALL), "whole picture's, in nats"),
    "per position": (BITS, lambda *m: kl(*m).sum(1).mean((1, 2)) / LN2, "channels count"),
    "swapped": (BITS, lambda a, b, c, d: kl(c, d, a, b).mean(ALL) / LN2, "q and p are swapped"),
    "no half": (BITS, lambda *m: 2 * kl(*m).mean(ALL) / LN2, "one half"),
    "no one": (BITS, lambda *m: (kl(*m) + 0.5).mean(ALL) / LN2, "minus one is missing"),
    "gap alone": (
        BITS,
        lambda a, b, c, d: 0.5 * ((a - c) ** 2 / d.exp()).mean(ALL) / LN2,
        "only the gap",
    ),
    "no gap": (BITS, lambda a, b, c, d: kl(a, b, a, d).mean(ALL) / LN2, "gap of the means is mi"),
    "of the batch": (BITS, lambda *m: kl(*m).mean() / LN2, "shape is ()"),
    "f": (WEIGHT, lambda f, c, k: both(3 * f / c, k.log2() / f), "not f times"),
    "f once": (WEIGHT, lambda f, c, k: both(3 * f / c, k.log2() / f**2), "the bits are right"),
    "f in bits": (WEIGHT, lambda f, c, k: both(3 * f**2 / c, k.log2() / f), "share a code, not f"),
    "no 3": (WEIGHT, lambda f, c, k: both(f**2 / c, k.log2() / f**2), "picture's three channels"),
    "no c": (WEIGHT, lambda f, c, k: both(3 * f**2, k.log2() / f**2), "latent's channels"),
    "neither": (WEIGHT, lambda f, c, k: both(f**2, k.log2() / f**2), "all channels"),
    "inverse": (WEIGHT, lambda f, c, k: both(c / 3 / f**2, k.log2() / f**2), "upside down"),
    "ln": (WEIGHT, lambda f, c, k: both(3 * f**2 / c, k.log() / f**2), "log2"),
    "c bits": (WEIGHT, lambda f, c, k: both(3 * f**2 / c, c * k.log2() / f**2), "one index"),
    "per number": (WEIGHT, lambda f, c, k: both(3 * f**2 / c, k.log2() / f**2 / 3), "has three"),
    "no log": (WEIGHT, lambda f, c, k: both(3 * f**2 / c, k / f**2), "counts codes"),
    "columns": (WEIGHT, lambda f, c, k: both(k.log2() / f**2, 3 * f**2 / c), "columns are swapped"),
    "best": (CHOOSE, lambda f, n, p, b, m: f[(p * ((n <= b) & (p >= m))).argmax()], "best PSNR"),
    "smallest": (CHOOSE, lambda f, n, p, b, m: f[(n <= b) & (p >= m)].min(), "smallest f"),
    "any numbers": (CHOOSE, lambda f, n, p, b, m: largest(f, p >= m), "budget is not kept"),
    "any PSNR": (CHOOSE, lambda f, n, p, b, m: largest(f, n <= b), "PSNR is not kept"),
    "strict": (CHOOSE, lambda f, n, p, b, m: largest(f, (n < b) & (p > m)), "allowed too"),
    "place": (
        CHOOSE,
        lambda f, n, p, b, m: (f * ((n <= b) & (p >= m))).argmax().float(),
        "place in the table",
    ),
    "none": (CHOOSE, lambda f, n, p, b, m: f[(n <= b) & (p >= m)].max(), "RuntimeError"),
    "none is -1": (
        CHOOSE,
        lambda f, n, p, b, m: torch.where((n <= b) & (p >= m), f, -1.0).max(),
        "it must be 0",
    ),
    "spread": (INTERVAL, lambda v: around(v, 1.96 * v.std()), "spread of single pictures"),
    "std / N": (INTERVAL, lambda v: around(v, 1.96 * v.std() / len(v)), "too narrow"),
    "68 %": (INTERVAL, lambda v: around(v, se(v)), "68 %"),
    "std": (INTERVAL, lambda v: around(v, v.std()), "1.96 is missing, and"),
    "variance": (INTERVAL, lambda v: around(v, 1.96 * v.var() / len(v) ** 0.5), "variance stands"),
    "biased": (
        INTERVAL,
        lambda v: around(v, 1.96 * v.std(correction=0) / len(v) ** 0.5),
        "N − 1 is right",
    ),
    "twice": (INTERVAL, lambda v: around(v, 3.92 * se(v)), "full width"),
    "turned": (INTERVAL, lambda v: around(v, -1.96 * se(v)), "swapped"),
    "half-widths": (
        INTERVAL,
        lambda v: torch.stack([v.mean(), 1.96 * se(v), 1.96 * se(v)]),
        "half-widths",
    ),
    "pictures": (
        INTERVAL,
        lambda v: torch.stack([v.mean(), v.quantile(0.025), v.quantile(0.975)]),
        "95 % of the pictures",
    ),
    "median": (INTERVAL, lambda v: around(v, 1.96 * se(v)) - v.mean() + v.median(), "median"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_named(mistake: str) -> None:
    check, fn, said = WRONG[mistake]
    verdict = check(fn)
    assert not verdict.ok and said in verdict.message, verdict


@pytest.mark.parametrize("check", CHECKS)
def test_the_mistakes_that_a_check_knows_differ_from_each_other(check: Fn) -> None:
    """Two mistakes with one result would be told the wrong sentence."""
    module = perceptual_compression if check in (BITS, WEIGHT) else choosing_f
    trial = {
        BITS: lambda: module._bits_trial(2, 3, 4, 5),
        WEIGHT: lambda: module._weight_trial([(4.0, 3.0, 8192.0), (8.0, 4.0, 256.0)]),
        CHOOSE: lambda: module._choice(module.SEEDS[0]),
        INTERVAL: lambda: module._interval_trial(24),
    }[check]()
    answers = [trial.expected, *trial.mistakes.values()]
    for i, one in enumerate(answers):
        for other in answers[:i]:
            assert one.shape != other.shape or not torch.allclose(one, other, rtol=1e-3), i


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", ODD)
def test_no_answer_makes_a_check_raise(check: Fn, case: str) -> None:
    fn, _ = ODD[case]
    verdict = check(fn)
    assert not verdict.ok and "\n" not in verdict.message and len(verdict.message) < 200, verdict
