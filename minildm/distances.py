"""Distances between two sets of features (N, D), (M, D), and what is near to what; in float64.

Each has a form that gives `(1 + G,)` values: on all rows, then without each of G groups of rows,
for `intervals.jackknife_interval`. `lots` says which row is in which group: `(N,)` and `(M,)`
int64, 0..G-1; None: the first value alone.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

Lots = tuple[Tensor, Tensor]
ROWS = 1024  # of a table of pairs that is held at a time
SAME = 1e-12  # squared distances below this share of the squared lengths are rounding: 0


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]; each a scalar, or (1 + G,)."""

    precision: Tensor
    recall: Tensor


class Neighbours(NamedTuple):
    """The nearest rows of another set, the nearest first."""

    distances: Tensor  # (N, k)
    indices: Tensor  # (N, k) int64


# Frechet.


def frechet_distance(a: Tensor, b: Tensor) -> Tensor:
    """|mu_a - mu_b|^2 + Tr(A + B - 2 (A B)^(1/2)) of Gaussians with the means and covariances.

    Features (N, D), (M, D) -> scalar, in float64 (Heusel et al. 2017). With A = Ra^T Ra and
    B = Rb^T Rb the last trace is the sum of the singular values of Ra Rb^T: no root of a matrix,
    nothing complex.
    """
    a, b = _features(a, b)
    root_a, root_b = _root(a), _root(b)
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    trace = root_a.square().sum() + root_b.square().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + trace - 2 * cross).clamp(min=0)


def frechet_distances(a: Tensor, b: Tensor, lots: Lots | None) -> Tensor:
    """`frechet_distance` on all rows, then without each group: (1 + G,)."""
    found = [frechet_distance(a, b)]
    for i in tqdm(range(_count(lots)), "Frechet distance", unit="group", delay=2, leave=False):
        found.append(frechet_distance(a[lots[0] != i], b[lots[1] != i]))
    return torch.stack(found)


def distance_without_bias(counts: Sequence[int], values: Sequence[float]) -> float:
    """The limit of a Frechet distance for N -> infinity, from its values at several N.

    The height at 1/N = 0 of the least-squares line in 1/N (Chong and Forsyth 2020). To be trusted
    where every N is well above the number of features. Raises ValueError for fewer than two N.
    """
    if len(counts) != len(values) or len(set(counts)) < 2 or min(counts) < 1:
        raise ValueError(f"counts={counts} must be two positive N or more, one a value")
    x, y = 1 / torch.tensor(counts).double(), torch.tensor(values).double()
    gap = x - x.mean()
    return float(y.mean() - x.mean() * (gap @ y) / gap.square().sum())


def _root(a: Tensor) -> Tensor:
    """R with R^T R = cov(a): (N, D) -> (min(N, D), D)."""
    root = (a - a.mean(0)) / math.sqrt(len(a) - 1)
    return torch.linalg.qr(root, mode="r").R if len(a) > a.shape[1] else root


# Kernel.


def kernel_distance(a: Tensor, b: Tensor, *, paired: bool = False) -> Tensor:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3: (N, D), (M, D) -> scalar, float64.

    Binkowski et al. 2018; all pairs, but those of a row with itself. paired: b[i] was made from
    a[i]; their pairs are left out too, which keeps it unbiased (Gretton et al. 2012, Eq. 4).
    """
    return kernel_distances(a, b, None, paired=paired)[0]


def kernel_distances(a: Tensor, b: Tensor, lots: Lots | None, *, paired: bool = False) -> Tensor:
    """`kernel_distance` on all rows, then without each group: (1 + G,). One pass over pairs."""
    a, b = _features(a, b)
    if paired and len(a) != len(b):
        raise ValueError(f"paired sets must have equal sizes, got {len(a)} and {len(b)}")
    groups = max(1, _count(lots))
    in_a, in_b = (F.one_hot(lot, groups).double() for lot in _whole(lots, a, b))

    def mean(u: Tensor, v: Tensor, in_u: Tensor, in_v: Tensor, leave_out: bool) -> Tensor:
        rows = zip(u.split(ROWS), in_u.split(ROWS), strict=True)
        tables = (in_part.T @ _kernel(part @ v.T, u.shape[1]) @ in_v for part, in_part in rows)
        total = _without_pairs(sum(tables))
        n, m = _without(in_u.sum(0)), _without(in_v.sum(0))
        if not leave_out:
            return total / (n * m)
        itself = _without(_kernel((u * v).sum(1), u.shape[1]) @ in_u)
        return (total - itself) / (n * (n - 1))

    among = mean(a, a, in_a, in_a, True) + mean(b, b, in_b, in_b, True)
    found = among - 2 * mean(a, b, in_a, in_b, paired)
    return found if lots else found[:1]


def _kernel(products: Tensor, d: int) -> Tensor:
    return (products / d + 1) ** 3


def _without(sums: Tensor) -> Tensor:
    """Sums over each group (G,) -> over all rows, then over all but a group: (1 + G,)."""
    return torch.cat([sums.sum()[None], sums.sum() - sums])


def _without_pairs(sums: Tensor) -> Tensor:
    """Sums over pairs of groups (G, G) -> over all, then over all but a group's: (1 + G,)."""
    left = sums.sum() - sums.sum(0) - sums.sum(1) + sums.diagonal()
    return torch.cat([sums.sum()[None], left])


# Nearest neighbours.


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> PrecisionRecall:
    """How much of fake looks real, and how much of real is covered: (N, D), (M, D) -> scalars.

    Kynkaanniemi et al. 2019: a set's manifold is the union of balls around its members, each as
    wide as the distance to its k-th nearest other member. precision: the share of fake inside
    real's manifold; recall: the share of real inside fake's. Both depend on N and M.
    """
    found = precision_recalls(real, fake, None, k)
    return PrecisionRecall(found.precision[0], found.recall[0])


def precision_recalls(real: Tensor, fake: Tensor, lots: Lots | None, k: int = 3) -> PrecisionRecall:
    """`precision_recall` on all rows, then without each group: two of (1 + G,)."""
    real, fake = _features(real, fake)
    groups = _count(lots)
    variants = torch.arange(-1, groups)[:, None]  # -1: nothing is left out
    kept_real, kept_fake = (variants != lot for lot in _whole(lots, real, fake))  # (1 + G, N)
    fewest = int(min(kept_real.sum(1).min(), kept_fake.sum(1).min()))
    if not 1 <= k < fewest:
        raise ValueError(
            f"k={k} must be at least 1 and less than the {fewest} pictures that are left"
        )
    return PrecisionRecall(
        _inside(fake, real, kept_fake, kept_real, k), _inside(real, fake, kept_real, kept_fake, k)
    )


def _inside(a: Tensor, of: Tensor, kept_a: Tensor, kept_of: Tensor, k: int) -> Tensor:
    """The share of a's rows inside the manifold of the other set's rows: (1 + G,)."""
    radii = torch.cat([_radii(part, of, kept_of, k) for part in of.split(ROWS)], dim=1)
    radii = radii.masked_fill(~kept_of, -1.0)  # no ball around a row that is left out
    inside = []
    for part in a.split(ROWS):
        table = _squared_distances(part, of)
        inside.append(torch.stack([(table <= radius).any(1) for radius in radii]))
    inside = torch.cat(inside, dim=1) & kept_a  # (1 + G, N)
    return inside.sum(1).double() / kept_a.sum(1)


def _radii(part: Tensor, of: Tensor, kept: Tensor, k: int) -> Tensor:
    """Squared distances to the k-th nearest other kept row: (n, D), (M, D) -> (1 + G, n)."""
    table = _squared_distances(part, of)  # each row of part is in `of`, its own nearest: k + 1
    return torch.stack(
        [table.masked_fill(~keep, math.inf).kthvalue(k + 1, dim=1).values for keep in kept]
    )


def nearest(a: Tensor, b: Tensor, k: int = 1) -> Neighbours:
    """The k rows of b nearest to each row of a: (N, D), (M, D) -> (N, k) twice, Euclidean.

    Any dtype; taken to float64 in parts, so that whole pictures can be rows. ValueError unless
    1 <= k <= M.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a):
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ValueError(f"rows must be (N, D) and (M, D), N >= 1, got {shapes}")
    if not 1 <= k <= len(b):
        raise ValueError(f"k={k} must lie in 1..{len(b)}, the rows to choose from")
    squared, indices = [], []
    for part in tqdm(a.cpu().split(ROWS), "neighbours", unit="part", delay=2, leave=False):
        part = part.double()
        table = [_squared_distances(part, other.double()) for other in b.cpu().split(ROWS)]
        found = torch.cat(table, dim=1).topk(k, largest=False)
        squared.append(found.values)
        indices.append(found.indices)
    return Neighbours(torch.cat(squared).sqrt(), torch.cat(indices))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(n, D), (M, D) float64 -> (n, M); equal rows are exactly 0 apart.

    As |a|^2 + |b|^2 - 2 a.b, quick but inexact where a and b are close: float32 would not do.
    """
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    found = torch.addmm(lengths, a, b.T, alpha=-2)
    return found.masked_fill_(found < SAME * lengths, 0.0)


def _whole(lots: Lots | None, a: Tensor, b: Tensor) -> Lots:
    """The lots; all rows in group 0 where there are none."""
    return lots or (torch.zeros(len(a)).long(), torch.zeros(len(b)).long())


def _count(lots: Lots | None) -> int:
    return 0 if lots is None else int(max(lot.max() for lot in lots)) + 1


def _features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two sets of features, checked, in float64 on the CPU."""
    shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features must be (N, D) and (M, D) with N, M >= 2, got {shapes}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features must be finite: are there NaN among the pictures?")
    return a.detach().cpu().double(), b.detach().cpu().double()
