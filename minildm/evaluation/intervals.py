"""A number with its 95 % interval and its N: Student's t, Wilson, and one jackknife."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from scipy.special import ndtri, stdtrit  # scipy.stats would take a second to import
from torch import Tensor

HIGHER = {"psnr", "ssim", "precision", "recall", "compression"}  # is better
LOWER = {"perceptual", "fid", "proxy_fid", "r_fid", "proxy_r_fid", "kid", "bits_per_pixel"}


class Measured(NamedTuple):
    """A number, its 95 % interval (NaN: none), and N, the number of values it rests on."""

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 1

    def __str__(self) -> str:
        """As "27.1 [26.9, 27.3] (N=812)", with as many digits as the interval justifies."""
        width = self.high - self.low
        if not 0 < width < math.inf:
            return f"{self.value:.4g} (N={self.n:,})"
        digits = max(0, -math.floor(math.log10(width / 2)))
        value, low, high = (f"{number:z.{digits}f}" for number in self[:3])
        return f"{value} [{low}, {high}] (N={self.n:,})"


class Evaluation(dict[str, Measured]):
    """Measured values by name; `settings` says how they were measured."""

    def __init__(self, measured: Mapping[str, Measured], **settings: Any) -> None:
        super().__init__(measured)
        self.settings = settings

    def __str__(self) -> str:
        """A Markdown table; an arrow says which direction is better."""
        lines = ["| | value, 95 % interval, N |", "|---|---|"]
        for name, found in self.items():
            arrow = " ↑" if name in HIGHER else " ↓" if name in LOWER else ""
            lines.append(f"| {name}{arrow} | {found} |")
        return "\n".join(lines)

    _repr_markdown_ = __str__  # in notebooks

    def as_dict(self) -> dict[str, Any]:
        """For JSON: `measured`, (value, low, high, n) by name, and `settings`; "nan" and "inf"."""
        plain = {
            name: {k: v if math.isfinite(v) else str(v) for k, v in found._asdict().items()}
            for name, found in self.items()
        }
        return {"measured": plain, "settings": self.settings}


def mean_interval(values: Tensor | Sequence[float], clusters: Tensor | None = None) -> Measured:
    """The mean of values (N,) with Student's t interval.

    clusters: (N,) int; values of one cluster (crops of one photograph) are not independent, so
    the interval is cluster-robust, with C - 1 degrees of freedom. An infinite mean has none.
    Raises ValueError for fewer than two values or clusters.
    """
    numbers = torch.as_tensor(values).cpu().double()
    n, mean = len(numbers), float(numbers.mean())
    member = torch.arange(n) if clusters is None else clusters.unique(return_inverse=True)[1]
    sums = torch.bincount(member, numbers - mean)
    if len(sums) < 2:
        raise ValueError(f"an interval requires two values or clusters, got {n} in {len(sums)}")
    error = math.sqrt(float(sums.square().sum()) * len(sums) / (len(sums) - 1)) / n
    half = float(stdtrit(len(sums) - 1, 0.975)) * error
    return Measured(mean, mean - half, mean + half, n)


def proportion_interval(successes: int, n: int) -> Measured:
    """successes / n with Wilson's interval (1927), which stays in [0, 1] and is never empty."""
    z, p = float(ndtri(0.975)), float(successes / n)
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((centre + end) / (1 + z**2 / n) for end in (-half, half))
    return Measured(p, max(low, 0.0), min(high, 1.0), n)


def jackknife(
    statistic: Callable[..., Any],
    *sets: Tensor,
    groups: int | Sequence[Tensor] = 10,
    n: int | None = None,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Measured:
    """statistic(*sets), a scalar, with the interval of the delete-a-group jackknife.

    groups: how many, drawn at random, or for each set the group 0..G-1 of each row. The statistic
    is computed again without each group; (G - 1) / G times the sum of the squared deviations of
    these G values is the squared standard error (Student's t, G - 1 degrees). A bootstrap would
    not do for nearest neighbours: it makes an image the neighbour of its copy. The interval is
    about the expectation at this N, and clipped to bounds. n: default, the smallest set's size.
    """
    if isinstance(groups, int):
        draw = torch.Generator().manual_seed(0)
        groups = [random_groups(len(x), groups, draw) for x in sets]
    value, without = float(statistic(*sets)), []
    for i in range(1 + max(int(group.max()) for group in groups)):
        kept = (x[group != i] for x, group in zip(sets, groups, strict=True))
        without.append(float(statistic(*kept)))
    spread = torch.tensor(without, dtype=torch.float64).var(correction=0)
    half = float(stdtrit(len(without) - 1, 0.975) * ((len(without) - 1) * spread) ** 0.5)
    low, high = max(value - half, bounds[0]), min(value + half, bounds[1])
    return Measured(value, low, high, n or min(map(len, sets)))


def random_groups(
    n: int, groups: int, generator: torch.Generator, clusters: Tensor | None = None
) -> Tensor:
    """A random group 0..groups-1 for each of n rows, all of one size: (n,) int64.

    clusters: (n,) int; the rows of one cluster stay together.
    """
    if clusters is None:
        return torch.randperm(n, generator=generator) % groups
    member = clusters.unique(return_inverse=True)[1]
    return random_groups(int(member.max()) + 1, groups, generator)[member]
