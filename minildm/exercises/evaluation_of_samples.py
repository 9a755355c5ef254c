"""Checks of notebook 17: the Frechet distance of two Gaussians, and its limit for infinite N."""

import torch
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function


def check_frechet(fn: object) -> Result:
    """Check `frechet(mean_a, cov_a, mean_b, cov_b)`: (D,), (D, D) twice, float64 -> scalar.

    |mean_a - mean_b|^2 + Tr(A + B - 2 (A B)^(1/2)), with the root of a matrix.
    """
    praise = "the means' distance, and what is left of the covariances where they differ."
    mean, shift = torch.tensor([0.5, -1.0, 2.0]).double(), torch.tensor([2.0, 0.5, -1.0]).double()
    wide, tilted = torch.diag(torch.tensor([9.0, 4.0, 1.0]).double()), _covariance(1)
    trials = [
        _trial(mean, wide, mean + shift, 0.25 * wide, "where A and B are diagonal"),
        _trial(mean, _covariance(4), mean + shift, tilted, "where A and B have different axes"),
        _trial(mean, tilted, mean, tilted, "for two equal Gaussians"),
        _trial(mean, tilted, mean + shift, tilted, "where only the means differ"),
        _trial(mean[:2], _covariance(2, 2), mean[1:], _covariance(3, 2), "in two dimensions"),
    ]
    return check_function(fn, trials, praise)


def _covariance(seed: int, d: int = 3) -> Tensor:
    root = torch.randn(2 * d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root.T @ root / d


def _root(a: Tensor) -> Tensor:
    """The symmetric root of a covariance (D, D)."""
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _trial(mean_a: Tensor, a: Tensor, mean_b: Tensor, b: Tensor, where: str) -> Trial:
    gap, both = (mean_a - mean_b).square().sum(), a.trace() + b.trace()
    cross = _root(_root(a) @ b @ _root(a)).trace()  # of (A B)^(1/2), by similar matrices
    right = gap + both - 2 * cross
    mistakes = {
        "the means' distance is squared in (1).": gap.sqrt() + both - 2 * cross,
        "the means are not compared.": both - 2 * cross,
        "the covariances are not compared.": gap,
        "the root's trace counts twice.": gap + both - cross,
        "what A and B have in common is missing: −2 Tr (A B)^(1/2).": gap + both,
        "the root is of each number; (1) means the matrix whose product with itself is A B.": (
            gap + both - 2 * (a @ b).clamp(min=0).sqrt().trace()
        ),
        "A B is a product of matrices, @; here numbers are multiplied one by one.": (
            gap + both - 2 * (a * b).clamp(min=0).sqrt().trace()
        ),
        "the root is missing: that is Tr (A B).": gap + both - 2 * (a @ b).trace(),
        "that is the root of the trace; (1) has the trace of the root.": (
            gap + both - 2 * (a @ b).trace().clamp(min=0).sqrt()
        ),
        "the roots of A and of B, multiplied: right only where A and B share their axes.": (
            gap + both - 2 * (_root(a) @ _root(b)).trace()
        ),
        "that is its root; by custom it stays squared.": right.clamp(min=0).sqrt(),
    }
    mistakes = {why: wrong for why, wrong in mistakes.items() if not torch.allclose(wrong, right)}
    return Trial((mean_a, a, mean_b, b), right, mistakes, f"its value is not that of (1) {where}.")


def check_limit(fn: object) -> Result:
    """Check `limit(N, far)`: (K,), (K,) float64 -> scalar, where far = limit + c / N fits best.

    Best by least squares; N in any order.
    """
    praise = "a straight line in 1/N, read off where it meets the axis."
    N = torch.tensor([400.0, 100.0, 1600.0, 200.0, 800.0]).double()
    wobble = torch.tensor([0.4, -0.9, -0.2, 1.1, 0.3]).double()
    trials = [
        _line(N, 3.0 + 500 / N, "on an exact line"),
        _line(N, 3.0 + 500 / N + wobble, "on points beside a line"),
        _line(N[:3] * 2, -0.5 + 90 / N[:3] + wobble[:3] / 4, "on three points"),
    ]
    return check_function(fn, trials, praise)


def _fit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and intercept of the least-squares line."""
    gap = x - x.mean()
    slope = (gap * (y - y.mean())).sum() / gap.square().sum()
    return slope, y.mean() - slope * x.mean()


def _line(N: Tensor, far: Tensor, where: str) -> Trial:
    slope, right = _fit(1 / N, far)
    least, most = N.argmin(), N.argmax()
    ends = (N[most] * far[most] - N[least] * far[least]) / (N[most] - N[least])
    mistakes = {
        "that is c, the slope; the limit is the line's height at 1/N = 0.": slope,
        "that line is in N; it is straight in 1/N.": _fit(N, far)[1],
        "that line is in 1/√N; the bias falls with 1/N.": _fit(N.rsqrt(), far)[1],
        "that is the value at the largest N; the line goes on to 1/N = 0.": far[most],
        "that is the smallest value; the line goes on to 1/N = 0.": far.min(),
        "that is the last value of the list; N comes in any order.": far[-1],
        "that is the mean; every value is too large.": far.mean(),
        "the line through the two ends alone; use all points, by least squares.": ends,
        "that line must pass through 0; the limit need not be 0.": torch.zeros_like(right),
        "the limit is the other way round: subtract c times the mean of 1/N.": (
            far.mean() + slope * (1 / N).mean()
        ),
        "that takes the inverse of the mean N; take the mean of 1/N.": (
            far.mean() - slope / N.mean()
        ),
    }
    mistakes = {why: wrong for why, wrong in mistakes.items() if not torch.allclose(wrong, right)}
    return Trial((N, far), right, mistakes, f"it is not the limit of the best line {where}.")
