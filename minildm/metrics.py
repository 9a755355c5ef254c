"""How good are pictures? PSNR, SSIM, Frechet and kernel distances, the judge; with intervals.

Every result is a `Measured`: a value, an interval, and the N without which neither means much.
The features are EfficientNet's, not Inception's, hence *proxy*-FID: compare its values only with
each other, at one N, one picture size and one reference set. A Frechet distance falls as N grows
(Chong & Forsyth 2020), by an amount that depends on the model; `kid` does not: give both.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from einops import reduce
from torch import Tensor, nn
from tqdm.auto import tqdm

from minildm.features import OfflineFeatures
from minildm.judge import Judge, correct

Distance = Callable[[Tensor, Tensor], Tensor]  # (N, D), (M, D) -> a scalar
SSIM_SIDE = 11  # of the Gaussian window


class Measured(NamedTuple):
    """A number, the interval that holds the true one with the asked confidence, and the N.

    `low` and `high` are NaN where there is no interval.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """As "27.1 [26.9, 27.3] (N=812)", with as many digits as the interval deserves."""
        width = self.high - self.low
        if not (0 < width < math.inf):
            return f"{self.value:.4g} (N={self.n:,})"
        digits = max(0, -math.floor(math.log10(width)))
        value, low, high = (f"{number:z.{digits}f}" for number in self[:3])
        return f"{value} [{low}, {high}] (N={self.n:,})"


# Intervals.


def mean_interval(values: Tensor | Sequence[float], confidence: float = 0.95) -> Measured:
    """The mean of independent values (N,), N >= 2, with Student's t interval.

    Raises ValueError for fewer values, and for NaN or infinite ones.
    """
    numbers = torch.as_tensor(values).detach().cpu().double()
    n = numbers.numel()
    if numbers.ndim != 1 or n < 2:
        raise ValueError(f"values must be (N,) with N >= 2, got {tuple(numbers.shape)}")
    if not numbers.isfinite().all():
        raise ValueError(f"values: {int((~numbers.isfinite()).sum())} of {n} are not finite")
    mean, half = float(numbers.mean()), float(numbers.std()) / math.sqrt(n)
    half *= _student(confidence, n - 1)
    return Measured(mean, mean - half, mean + half, n)


def proportion_interval(successes: int, n: int, confidence: float = 0.95) -> Measured:
    """successes / n with Wilson's interval (1927), which stays inside [0, 1] and is never empty."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need n >= 1 and 0 <= successes <= n, got {successes} of {n}")
    z, p = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2), successes / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return Measured(p, min(p, max(0.0, center - half)), max(p, min(1.0, center + half)), int(n))


@lru_cache(maxsize=64)
def _student(confidence: float, freedom: int) -> float:
    """The t with P(|T| < t) = confidence: t = sqrt(freedom) tan(a), a's density cos^(freedom-1)."""
    angle = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angle) ** (freedom - 1)
    cdf = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(np.interp(_checked(confidence) * cdf[-1], cdf, angle))


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie in (0, 1)")
    return confidence


# A picture against its original.


def psnr(x: Tensor, x_rec: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB: two (B, 3, H, W) in [-1, 1] -> (B,).

    On [0, 1], after clamping: -10 log10 of the mean squared error of each picture; infinite for
    equal pictures. Average over pictures, not over their errors: `mean_interval(psnr(...))`.
    """
    a, b = _unit_range(x, x_rec)
    return -10 * reduce((a - b) ** 2, "b c h w -> b", "mean").log10()


def ssim(x: Tensor, x_rec: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), at most 1: two (B, 3, H, W) in [-1, 1] -> (B,).

    torchmetrics', on [0, 1] after clamping, window of 11 with sigma 1.5; sides of 11 at least.
    """
    from torchmetrics.functional.image import (  # here: it takes seconds to import
        structural_similarity_index_measure,
    )

    a, b = _unit_range(x, x_rec)
    if min(x.shape[-2:]) < SSIM_SIDE:
        raise ValueError(f"SSIM needs sides of {SSIM_SIDE} pixels at least, got {tuple(x.shape)}")
    found = structural_similarity_index_measure(b, a, data_range=1.0, reduction="none")
    return found.reshape(len(x))


def _unit_range(x: Tensor, x_rec: Tensor) -> tuple[Tensor, Tensor]:
    """[-1, 1] -> [0, 1], clamped, float32; both checked."""
    if x.shape != x_rec.shape or x.ndim != 4 or not x.numel():
        shapes = f"{tuple(x.shape)} and {tuple(x_rec.shape)}"
        raise ValueError(f"x and x_rec must both be (B, C, H, W), B >= 1, got {shapes}")
    for name, part in (("x", x), ("x_rec", x_rec)):
        if not part.is_floating_point() or not part.isfinite().all():
            raise ValueError(f"{name} must be finite floats in [-1, 1], got {part.dtype}")
    return ((x.float() + 1) / 2).clamp(0, 1), ((x_rec.float() + 1) / 2).clamp(0, 1)


# Many pictures against many others.


def proxy_fid(
    real: Tensor,
    fake: Tensor,
    features: nn.Module | None = None,
    *,
    groups: int = 10,
    confidence: float = 0.95,
) -> Measured:
    """Frechet distance of two sets on offline features (Heusel et al. 2017, other features).

    real, fake: pictures (N, 3, S, S), float in [-1, 1] or uint8, of one size; or their features
    (N, D) from `extract`, which spares the network's time. features: `OfflineFeatures()` by
    default; with block=10 a smaller N will do. groups: of the jackknife behind the interval,
    which is about this N (the bias of a finite N is in all its values alike); 0: no interval.
    n is the smaller set's size. ValueErrors name too small sets, other shapes, NaN.
    """
    return _compared(frechet_distance, real, fake, features, groups, confidence)


def kid(
    real: Tensor,
    fake: Tensor,
    features: nn.Module | None = None,
    *,
    groups: int = 10,
    confidence: float = 0.95,
) -> Measured:
    """Kernel distance of two sets (Binkowski et al. 2018), unbiased; arguments as `proxy_fid`.

    It may be slightly negative. The unbiased estimate uses all pairs, not subsets of 1,000.
    """
    return _compared(kernel_distance, real, fake, features, groups, confidence)


def frechet_distance(a: Tensor, b: Tensor) -> Tensor:
    """|mu_a - mu_b|^2 + Tr(A + B - 2 (A B)^(1/2)) of Gaussians with the means and covariances.

    Features (N, D), (M, D) -> scalar, in float64. With A = Ra^T Ra and B = Rb^T Rb the last
    trace is the sum of the singular values of Ra Rb^T: no root of a matrix, nothing complex.
    """
    a, b = _features(a, b)
    root_a, root_b = _root(a), _root(b)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    trace = root_a.square().sum() + root_b.square().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + trace - 2 * cross).clamp(min=0)


def _root(a: Tensor) -> Tensor:
    """R with R^T R = cov(a): (N, D) -> (min(N, D), D)."""
    root = (a - a.mean(0)) / math.sqrt(len(a) - 1)
    return torch.linalg.qr(root, mode="r").R if len(a) > a.shape[1] else root


def kernel_distance(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3: (N, D), (M, D) -> scalar, float64."""
    a, b = _features(a, b)

    def total(u: Tensor, v: Tensor) -> Tensor:
        return sum(((part @ v.T / u.shape[1] + 1) ** 3).sum() for part in u.split(1024))

    def among(u: Tensor) -> Tensor:  # all pairs but those of a picture with itself
        itself = ((u.square().sum(1) / u.shape[1] + 1) ** 3).sum()
        return (total(u, u) - itself) / (len(u) * (len(u) - 1))

    return among(a) + among(b) - 2 * total(a, b) / (len(a) * len(b))


def _features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of features, checked, in float64 on the CPU."""
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be (N, D) and (M, D) with N, M >= 2, got {shapes}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features must be finite: are there NaN among the pictures?")
    return a.detach().cpu().double(), b.detach().cpu().double()


@torch.no_grad()
def extract(x: Tensor, features: nn.Module, batch_size: int = 128) -> Tensor:
    """Features of pictures, in batches: (N, 3, S, S), float in [-1, 1] or uint8 -> (N, D), CPU."""
    if x.ndim != 4 or not len(x):
        raise ValueError(f"pictures must be (N, 3, S, S), N >= 1, got {tuple(x.shape)}")
    device = next(features.parameters(), x).device
    parts = tqdm(x.split(batch_size), desc="features", unit="batch", delay=2, leave=False)
    return torch.cat([features(_floats(part).to(device)).float().cpu() for part in parts])


def _floats(x: Tensor) -> Tensor:
    """uint8 or floats in [-1, 1] -> float32 in [-1, 1], checked."""
    if not x.isfinite().all():
        raise ValueError("pictures must be finite: there are NaN or infinite values")
    return x / 127.5 - 1 if x.dtype == torch.uint8 else x.float()


def _compared(
    distance: Distance,
    real: Tensor,
    fake: Tensor,
    features: nn.Module | None,
    groups: int,
    confidence: float,
) -> Measured:
    if real.shape[1:] != fake.shape[1:]:
        shapes = f"{tuple(real.shape)} and {tuple(fake.shape)}"
        raise ValueError(f"real and fake must be alike but for their number, got {shapes}")
    n = min(len(real), len(fake))
    if groups < 0 or groups == 1 or n < max(2, 2 * groups):
        raise ValueError(
            f"groups={groups} must be 0 or 2 and more, with two pictures each at least: got "
            f"{len(real)} real and {len(fake)} fake"
        )
    if real.ndim == 4:
        features = features or OfflineFeatures()
        real, fake = extract(real, features), extract(fake, features)
    value, half = float(distance(real, fake)), math.nan
    if groups:
        half = _student(confidence, groups - 1) * _jackknife(distance, real, fake, groups)
    return Measured(value, value - half, value + half, n)


def _jackknife(distance: Distance, real: Tensor, fake: Tensor, groups: int) -> float:
    """The distance's standard error: its spread when a group of both sets is left out in turn."""
    generator = torch.Generator().manual_seed(0)  # groups by lot: the data may lie in some order
    sets = [(v, torch.randperm(len(v), generator=generator) % groups) for v in (real, fake)]
    without = torch.stack([distance(*(v[g != i] for v, g in sets)) for i in range(groups)])
    return math.sqrt((groups - 1) * float(without.var(correction=0)))


# The judge.


def accuracy(judge: Judge, x: Tensor, truth: Tensor, question: str = "group") -> Measured:
    """How often the judge sees what was asked for, with Wilson's interval.

    Pictures (N, 3, H, W), float in [-1, 1] or uint8; truth (N,) int64; question: "label" (the
    subgroup), "group" or "style". The judge errs too: give its accuracy on real pictures beside.
    """
    if len(x) != len(truth) or truth.ndim != 1 or not len(x):
        shapes = f"{tuple(x.shape)} and {tuple(truth.shape)}"
        raise ValueError(f"x must be (N, 3, H, W) and truth (N,), N >= 1, got {shapes}")
    device = next(judge.parameters()).device
    with _evaluating(judge):
        right = correct(judge, _floats(x).to(device), truth.to(device), question)
    return proportion_interval(int(right.sum()), len(x))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
