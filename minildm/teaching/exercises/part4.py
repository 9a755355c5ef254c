"""Exercises of notebooks 16 to 20: ablations, evaluation, interoperability, scale, beyond."""

import torch
from torch import Tensor

from minildm.diffusion.flow import flow_loss
from minildm.diffusion.schedule import NoiseSchedule
from minildm.evaluation.distribution import distance_without_bias
from minildm.teaching.exercises.exercise import EXERCISES, Exercise, draw, rows
from minildm.teaching.exercises.part1 import around


def _at_time(seconds: Tensor, values: Tensor, budget: float, most: float = 1.0) -> Tensor:
    after = (seconds < budget).sum(1, keepdim=True).clamp(1, seconds.shape[1] - 1)
    s0, s1 = seconds.gather(1, after - 1), seconds.gather(1, after)
    share = ((budget - s0) / (s1 - s0)).clamp(1 - most, most)
    return values.gather(1, after - 1).lerp(values.gather(1, after), share)[:, 0]


_seconds = torch.tensor([0.4, 0.2, 0.05])[:, None] * torch.tensor([50.0, 100, 200, 1000])
EXERCISES["at_time"] = Exercise(
    lambda seconds, values, budget: _at_time(seconds, values, budget),
    [(_seconds, 1000 + 300 * draw((3, 4))[0], budget) for budget in (36.0, 2.0, 4000.0)],
    {
        "Beyond the first and the last moment the value stays.": lambda seconds, values, budget: (
            _at_time(seconds, values, budget, most=1e9)
        ),
        "Those are the values after equal steps.": lambda seconds, values, budget: values[:, -1],
    },
)
EXERCISES["difference"] = Exercise(
    lambda a, b, t: around((a - b).mean(), t * (a - b).std() / len(a) ** 0.5),
    [(2400 + 300 * s + 40 * x, 2100 + 300 * s, 2.7764) for s, x in [draw((5,), (5,))]],
    {
        "Seeds are pairs: subtract first, then take the spread.": lambda a, b, t: around(
            a.mean() - b.mean(), t * ((a.var() + b.var()) / len(a)).sqrt()
        ),
    },
)


def _frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    cross = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross


def _gaussian(seed: int) -> tuple[Tensor, Tensor]:
    mean, root = draw((3,), (6, 3), seed=seed)
    return mean.double(), (root.T @ root / 3).double()


EXERCISES["frechet"] = Exercise(
    _frechet,
    [(*_gaussian(0), *_gaussian(1)), (*_gaussian(2), *_gaussian(2))],
    {
        "The root is of the matrix A B, not of each number.": lambda mean_a, a, mean_b, b: (
            _frechet(mean_a, 0 * a, mean_b, b) + (a - 2 * (a @ b).clamp(min=0).sqrt()).trace()
        ),
    },
)
_N = torch.tensor([400.0, 100, 1600, 200, 800]).double()


def _limit(N: Tensor, far: Tensor) -> Tensor:
    return torch.tensor(distance_without_bias(N.tolist(), far.tolist()))


EXERCISES["limit"] = Exercise(
    _limit,
    [(_N, 3 + 500 / _N), (_N, 3 + 500 / _N + draw((5,))[0].double())],
    {"The line is straight in 1/N, not in N.": lambda N, far: _limit(1 / N, far)},
)


def _folded(weight: Tensor, bias: Tensor, scale: float, shift: Tensor) -> Tensor:
    return torch.cat([scale * weight, (bias + weight @ shift)[:, None]], dim=1)


EXERCISES["folded"] = Exercise(
    _folded,
    [(*draw((4, 3), (4,)), 2.5, *draw((3,), seed=1))],
    {
        "The shift comes after the scale: do not scale it.": lambda weight, bias, scale, shift: (
            _folded(weight, bias, scale, scale * shift)
        ),
    },
)
EXERCISES["times"] = Exercise(
    lambda T, S: torch.arange(0, T, T // S).flip(0) + 1,
    [(1000, 50), (1000, 30)],
    {"Sampling starts at the largest time.": lambda T, S: torch.arange(0, T, T // S) + 1},
)

EXERCISES["whole_gradient"] = Exercise(
    lambda gradients, counts: (gradients * counts[:, None]).sum(0) / counts.sum(),
    [(draw((n, 5))[0], 3 * torch.arange(n) + 2) for n in (2, 3)],
    {"A process with more samples counts more.": lambda gradients, counts: gradients.mean(0)},
)


def _idle(seconds: Tensor, workers: int, in_turn: bool = False) -> Tensor:
    free = torch.zeros(workers)
    for i, run in enumerate(seconds):
        free[i % workers if in_turn else free.argmin()] += run
    return 1 - seconds.sum() / (workers * free.max())


EXERCISES["idle_share"] = Exercise(
    lambda seconds, workers: _idle(seconds, workers),
    [(torch.tensor([2.0, 8, 1, 7, 7, 1, 8, 5, 4]), 3), (torch.tensor([1.0, 1, 1, 9, 2]), 2)],
    {
        "A free worker takes the next run; they do not take turns.": lambda seconds, workers: _idle(
            seconds, workers, in_turn=True
        ),
    },
)

EXERCISES["rescale"] = Exercise(
    lambda abar: ((abar.sqrt() - abar[-1].sqrt()) / (1 - (abar[-1] / abar[0]).sqrt())) ** 2,
    [(NoiseSchedule.scaled_linear(50, 0.01, 0.1).alphas_cumprod,)],
    {"(5) stretches √ᾱ, not ᾱ.": lambda abar: (abar - abar[-1]) / (1 - abar[-1] / abar[0])},
)
EXERCISES["flow_loss"] = Exercise(
    lambda velocity, z0, tau, eps: flow_loss(velocity, z0, tau, eps),
    [
        (
            lambda z, tau: z.sin() + (1 + rows(tau)) ** 2,
            *draw((4, 3, 4, 2)),
            torch.linspace(0.1, 0.9, 4),
            *draw((4, 3, 4, 2), seed=1),
        )
    ],
    {
        "The target is eps − z0.": lambda velocity, z0, tau, eps: flow_loss(
            lambda z, t: -velocity(z, t), z0, tau, eps
        ),
    },
)
