"""A number, its interval and its N: Student's t, Wilson's, and the jackknife over groups.

`Evaluation` is a table of them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

NETWORKS = ("features", "perceptual")
HIGHER = {"psnr", "ssim", "precision", "recall", "compression"}  # is better
LOWER = {"perceptual", "fid", "proxy_fid", "r_fid", "proxy_r_fid", "kid", "bits_per_pixel"}


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
        value, interval = self.digits()
        return " ".join(part for part in (value, interval, f"(N={self.n:,})") if part)

    def digits(self) -> tuple[str, str]:
        """The value and the interval as text; the latter is empty where there is none."""
        width = self.high - self.low
        if not (0 < width < math.inf):
            return f"{self.value:.4g}", ""
        digits = max(0, -math.floor(math.log10(width / 2)))
        value, low, high = (f"{number:z.{digits}f}" for number in self[:3])
        return value, f"[{low}, {high}]"


@dataclass(frozen=True, eq=False)
class Evaluation(Mapping[str, Measured]):
    """What one call measured, by name and in order; `settings` says how. A notebook shows a table.

    settings: `features` and `perceptual`, the networks behind the distances, and whatever else
    another run would need to give the same numbers.
    """

    measured: dict[str, Measured]
    settings: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Measured:
        return self.measured[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.measured)

    def __len__(self) -> int:
        return len(self.measured)

    def __str__(self) -> str:
        """One line a number."""
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:{width}}  {found}" for name, found in self.items())

    def as_dict(self) -> dict[str, Any]:
        """For JSON: `measured`, a row (value, low, high, n) each, and `settings`.

        A bound that is not there is None; infinity, which JSON has not, is the text "inf".
        """
        rows = {
            name: {key: _as_json(number) for key, number in found._asdict().items()}
            for name, found in self.items()
        }
        return {"measured": rows, "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Evaluation":
        """The inverse of `as_dict`."""

        def number(found: float | str | None) -> float:
            return math.nan if found is None else float(found)

        measured = {
            name: Measured(*(number(row[key]) for key in ("value", "low", "high")), row["n"])
            for name, row in saved["measured"].items()
        }
        return cls(measured, dict(saved["settings"]))

    def table(self) -> str:
        """Markdown; an arrow says which way is better."""
        percent = f"{100 * self.settings.get('confidence', 0.95):g} %"
        lines = [f"| | value | {percent} interval | N |", "|---|--:|:-:|--:|"]
        for name, found in self.items():
            value, interval = found.digits()
            arrow = " ↑" if name in HIGHER else " ↓" if name in LOWER else ""
            lines.append(f"| {name}{arrow} | {value} | {interval or '-'} | {found.n:,} |")
        used = [f"{key}: {self.settings[key]}" for key in NETWORKS if self.settings.get(key)]
        return "\n".join([*lines, "", "; ".join(used)]).strip()

    def _repr_markdown_(self) -> str:
        return self.table()


def _as_json(number: float) -> float | str | None:
    if math.isnan(number):
        return None
    return str(number) if math.isinf(number) else number


def exactly(value: float, n: int) -> Measured:
    """A number that no resampling would change, or none can tell: without an interval."""
    return Measured(float(value), math.nan, math.nan, int(n))


def mean_interval(
    values: Tensor | Sequence[float], confidence: float = 0.95, clusters: Tensor | None = None
) -> Measured:
    """The mean of independent values (N,), N >= 2, with Student's t interval.

    clusters: (N,) int, which values belong together, such as the crops of one photograph: only
    whole clusters are independent then, and the interval is the wider one that they leave
    (cluster-robust, with C - 1 degrees of freedom). Raises ValueError for fewer than two values
    or clusters, and for NaN or infinite values.
    """
    numbers = torch.as_tensor(values).detach().cpu().double()
    n = numbers.numel()
    if numbers.ndim != 1 or n < 2:
        raise ValueError(f"values must be (N,) with N >= 2, got {tuple(numbers.shape)}")
    if not numbers.isfinite().all():
        raise ValueError(f"values: {int((~numbers.isfinite()).sum())} of {n} are not finite")
    sums, mean = numbers - numbers.mean(), float(numbers.mean())
    if clusters is not None:
        _, member = check_clusters(clusters, n).unique(return_inverse=True)
        sums = torch.zeros(int(member.max()) + 1, dtype=sums.dtype).index_add_(0, member, sums)
    freedom = len(sums) - 1
    half = math.sqrt(float(sums.square().sum()) * (freedom + 1) / freedom) / n
    half *= _student(confidence, freedom)
    return Measured(mean, mean - half, mean + half, n)


def check_clusters(clusters: Tensor, n: int, least: int = 2) -> Tensor:
    """The cluster of each of n values, on the CPU; ValueError for too few clusters."""
    clusters = torch.as_tensor(clusters).cpu()
    if clusters.shape != (n,) or len(clusters.unique()) < least:
        raise ValueError(
            f"clusters must be ({n},) with {least} different ones at least, got "
            f"{tuple(clusters.shape)} with {len(clusters.unique())}"
        )
    return clusters


def proportion_interval(successes: int, n: int, confidence: float = 0.95) -> Measured:
    """successes / n with Wilson's interval (1927), which stays inside [0, 1] and is never empty."""
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need n >= 1 and 0 <= successes <= n, got {successes} of {n}")
    z, p = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2), successes / n
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return Measured(p, min(p, max(0.0, center - half)), max(p, min(1.0, center + half)), int(n))


def median_interval(values: Tensor, confidence: float = 0.95) -> Measured:
    """The median of independent values (N,), between two of them in their order.

    The number of values below the true median is Binomial(N, 1/2), whatever their distribution;
    for so few values that their range is too narrow (N < 6 at 95 %) there is no interval.
    """
    numbers = torch.as_tensor(values).detach().cpu().double().sort().values
    n = numbers.numel()
    if numbers.ndim != 1 or not n or not numbers.isfinite().all():
        raise ValueError(f"values must be (N,), N >= 1, and finite, got {tuple(numbers.shape)}")
    count = torch.arange(n + 1, dtype=torch.float64)
    logs = math.lgamma(n + 1) - torch.lgamma(count + 1) - torch.lgamma(n - count + 1)
    tail = (logs - n * math.log(2)).exp().cumsum(0)  # P(at most `count` values below)
    rank = int((tail <= (1 - _checked(confidence)) / 2).sum())  # the bounds' distance from the ends
    value = float((numbers[(n - 1) // 2] + numbers[n // 2]) / 2)
    if not rank:
        return exactly(value, n)
    return Measured(value, float(numbers[rank - 1]), float(numbers[n - rank]), n)


def jackknife_interval(
    values: Tensor,
    n: int,
    confidence: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Measured:
    """A statistic of all the data, then without each of G groups in turn: (1 + G,), G >= 2.

    The delete-a-group jackknife: the squared standard error is (G - 1) / G times the sum of the
    squared deviations of the G values; Student's t with G - 1 degrees of freedom. It serves
    statistics that are no means, and those of nearest neighbours, where a bootstrap would make
    neighbours of a picture's own copies. Of (1,), the statistic alone: no interval. bounds:
    what the interval is cut to.
    """
    value, without = float(values[0]), values[1:].double()
    if not len(without):
        return exactly(value, n)
    half = math.sqrt((len(without) - 1) * float(without.var(correction=0)))
    half *= _student(confidence, len(without) - 1)
    return Measured(value, max(value - half, bounds[0]), min(value + half, bounds[1]), int(n))


def weighted_sum(parts: Sequence[Measured], weights: Sequence[float]) -> Measured:
    """The sum of independent numbers, each times a positive weight; N adds up.

    Its bounds are those of the parts, combined as variances are (MOVER, Zou & Donner 2008):
    right for intervals that lean to a side, too.
    """
    if len(parts) != len(weights) or min(weights, default=0) <= 0:
        raise ValueError(f"weights={list(weights)} must be positive, one for each part")
    value = sum(w * part.value for part, w in zip(parts, weights, strict=True))
    below, above = (
        math.hypot(
            *(w * (part[bound] - part.value) for part, w in zip(parts, weights, strict=True))
        )
        for bound in (1, 2)
    )
    return Measured(value, value - below, value + above, sum(part.n for part in parts))


def ratio_interval(a: Measured, b: Measured) -> Measured:
    """a / b of independent numbers, not negative, with N of a (MOVER, Donner & Zou 2012).

    For symmetric bounds that is Fieller's interval. Without bounds where b's reach zero, or as
    far above it as b lies: such a b might be nothing.
    """
    if not (a.value >= 0 and b.value > 0):
        raise ValueError(f"need a >= 0 and b > 0, got {a.value:.3g} and {b.value:.3g}")
    if not (b.low > 0 and b.high < 2 * b.value):
        return exactly(a.value / b.value, a.n)
    product = a.value * b.value
    lower, upper = (b.high * (2 * b.value - b.high), b.low * (2 * b.value - b.low))
    low = product - math.sqrt(product**2 - a.low * (2 * a.value - a.low) * lower)
    high = product + math.sqrt(product**2 - a.high * (2 * a.value - a.high) * upper)
    return Measured(a.value / b.value, low / lower, high / upper, a.n)


def lots(n: int, groups: int, generator: torch.Generator, clusters: Tensor | None = None) -> Tensor:
    """Each of n pictures to one of the groups, by lot, since data may lie in some order: (n,).

    clusters: (n,) int; those of one cluster stay together.
    """
    if clusters is None:
        return torch.randperm(n, generator=generator) % groups
    clusters = check_clusters(clusters, n, least=groups)
    _, member = clusters.unique(return_inverse=True)
    return lots(int(member.max()) + 1, groups, generator)[member]


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
