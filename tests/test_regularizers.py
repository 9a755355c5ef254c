"""The KL penalty's Gaussian against torch.distributions and its own definition."""

from typing import Any

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from minildm.regularizers import DiagonalGaussian

F64 = torch.float64


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_kl_is_the_distributions_own(spread: float, randn: Any) -> None:
    moments = spread * randn(3, 8, 2, 5, dtype=F64)
    ours = DiagonalGaussian.from_moments(moments)
    q = Independent(Normal(ours.mean, (0.5 * ours.logvar).exp()), 3)
    p = Independent(Normal(torch.zeros_like(ours.mean), torch.ones_like(ours.mean)), 3)
    assert ours.kl().shape == (3,)
    assert torch.allclose(ours.kl(), kl_divergence(q, p), rtol=1e-10)


def test_kl_is_zero_for_the_prior_and_only_there() -> None:
    prior = DiagonalGaussian(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3))
    assert prior.kl().item() == 0.0
    assert prior._replace(mean=prior.mean + 0.1).kl().item() > 0
    assert prior._replace(logvar=prior.logvar - 0.1).kl().item() > 0


def test_moments_are_mean_then_log_variance_within_bounds() -> None:
    moments = torch.tensor([-100.0, 100.0, -100.0, 100.0]).view(1, 4, 1, 1)
    posterior = DiagonalGaussian.from_moments(moments)
    assert posterior.mean.flatten().tolist() == [-100.0, 100.0]
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]


def test_kl_stays_finite_for_any_finite_moments() -> None:
    moments = torch.tensor([0.0, 1e4, 1e4, -1e4]).view(1, 4, 1, 1)
    assert DiagonalGaussian.from_moments(moments).kl().isfinite().all()


def test_a_draw_is_mean_plus_std_times_the_given_noise(randn: Any) -> None:
    posterior = DiagonalGaussian.from_moments(randn(2, 6, 4, 4))
    eps = randn(2, 3, 4, 4, seed=1)
    expected = posterior.mean + posterior.logvar.exp().sqrt() * eps
    assert torch.allclose(posterior.sample(lambda like: eps), expected)
    assert torch.equal(posterior.sample(torch.zeros_like), posterior.mean)
    assert torch.equal(posterior.mode(), posterior.mean)


def test_draws_have_the_mean_and_the_variance() -> None:
    n = 40_000
    posterior = DiagonalGaussian(torch.full((n, 1, 1, 1), 2.0), torch.full((n, 1, 1, 1), -1.0))
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        draws = posterior.sample().double()
    std = 0.6065306597  # exp(-1 / 2)
    assert draws.mean().item() == pytest.approx(2.0, abs=4 * std / n**0.5)
    assert draws.std().item() == pytest.approx(std, abs=4 * std / (2 * n) ** 0.5)
