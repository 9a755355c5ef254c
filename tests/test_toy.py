"""The closed-form denoisers against the gradient of the log density of z_t, by autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from minildm import NoiseSchedule
from minildm.toy import gaussian_eps, mixture_eps

F64 = torch.float64
TIMES = [0, 10, 300, 999]


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear(dtype=F64)


def eps_of(log_density: Callable[[Tensor], Tensor], z: Tensor, noise_scale: Tensor) -> Tensor:
    """E[eps | z_t] = -sqrt(1 - abar) times the score (Tweedie)."""
    z = z.clone().requires_grad_(True)
    (score,) = torch.autograd.grad(log_density(z).sum(), z)
    return -noise_scale * score


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("s", [0.0, 0.5, 3.0])
def test_gaussian_eps_is_the_score(t: int, s: float, schedule: NoiseSchedule, randn: Any) -> None:
    z, times = randn(5, 2, 1, 3, dtype=F64), torch.full((5,), t)
    signal_scale, noise_scale = (scale[:1] for scale in schedule.scales(times))
    std = ((signal_scale * s) ** 2 + noise_scale**2).sqrt()
    density = Normal(2.0 * signal_scale, std)
    expected = eps_of(density.log_prob, z, noise_scale)
    assert torch.allclose(gaussian_eps(schedule, 2.0, s)(z, times), expected, rtol=1e-9)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("s", [0.0, 0.2, 2.0])
def test_mixture_eps_is_the_score(t: int, s: float, schedule: NoiseSchedule, randn: Any) -> None:
    points, times = randn(4, 2, 1, 3, seed=1, dtype=F64), torch.full((6,), t)
    signal_scale, noise_scale = schedule.scales(times[:1])
    std = ((signal_scale * s) ** 2 + noise_scale**2).sqrt()
    z = signal_scale * points[:1] + std * randn(6, 2, 1, 3, dtype=F64)
    density = MixtureSameFamily(
        Categorical(torch.ones(4, dtype=F64)),
        Independent(Normal(signal_scale * points, std.expand_as(points)), 3),
    )
    expected = eps_of(density.log_prob, z, noise_scale)
    eps_hat = mixture_eps(schedule, points, s)(z, times)
    assert torch.allclose(eps_hat, expected, rtol=1e-8, atol=1e-10)


def test_each_sample_has_its_own_time(schedule: NoiseSchedule, randn: Any) -> None:
    points, z = randn(4, 2, 1, 3, seed=1, dtype=F64), randn(4, 2, 1, 3, dtype=F64)
    for denoise in (gaussian_eps(schedule, 1.0, 0.5), mixture_eps(schedule, points, 0.3)):
        together = denoise(z, torch.tensor(TIMES))
        alone = [denoise(z[i : i + 1], torch.tensor([t])) for i, t in enumerate(TIMES)]
        assert torch.allclose(together, torch.cat(alone), rtol=1e-10)


def test_a_mixture_of_one_point_is_that_point(schedule: NoiseSchedule, randn: Any) -> None:
    z, t = randn(3, 1, 2, 2, dtype=F64), torch.tensor([0, 500, 999])
    for s in (0.0, 0.7):
        one = mixture_eps(schedule, torch.full((1, 1, 2, 2), 2.0, dtype=F64), s)
        assert torch.allclose(one(z, t), gaussian_eps(schedule, 2.0, s)(z, t), rtol=1e-10)


def test_at_little_noise_the_nearest_point_is_the_answer(
    schedule: NoiseSchedule, randn: Any
) -> None:
    points, t = 5 * randn(4, 2, 2, 2, seed=1, dtype=F64), torch.zeros(4, dtype=torch.long)
    z = schedule.q_sample(points, t, randn(4, 2, 2, 2, dtype=F64))
    z0_hat = schedule.z0_from_eps(z, t, mixture_eps(schedule, points)(z, t))
    assert torch.allclose(z0_hat, points, atol=1e-8)
