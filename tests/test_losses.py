"""What is minimised, against its formula."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minildm import Autoencoder, Conditioning, NoiseSchedule, ldm_loss
from minildm.losses import autoencoder_loss, draw_t

F64 = torch.float64


def test_ldm_loss_is_one_mean_square_a_sample(randn: Any) -> None:
    schedule, t = NoiseSchedule.scaled_linear(dtype=F64), torch.tensor([0, 500, 999])
    z0, eps, wrong = (randn(3, 2, 4, 5, seed=s, dtype=F64) for s in (0, 1, 2))
    c, seen = Conditioning(tokens=randn(3, 1, 4)), []

    def eps_theta(z_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        seen.append((z_t, t, c))
        return eps + wrong

    loss = ldm_loss(eps_theta, schedule, z0, c, t, eps)
    assert loss.shape == (3,)
    expected = (wrong.float() ** 2).mean(dim=(1, 2, 3))
    assert torch.allclose(loss.float(), expected, rtol=1e-4)
    ((z_t, times, given),) = seen
    assert torch.equal(z_t, schedule.q_sample(z0, t, eps))
    assert times is t
    assert given is c


def test_the_true_noise_costs_nothing(randn: Any) -> None:
    schedule, eps = NoiseSchedule.scaled_linear(), randn(2, 1, 3, 3)
    t = torch.tensor([3, 900])
    loss = ldm_loss(lambda z, t, c: eps, schedule, randn(2, 1, 3, 3), Conditioning(), t, eps)
    assert torch.equal(loss, torch.zeros(2))


@pytest.mark.parametrize("t_bias", [0.5, 1.0, 2.0])
def test_times_are_drawn_with_the_density_of_their_bias(t_bias: float) -> None:
    schedule, n = NoiseSchedule.scaled_linear(T=10), 20_000
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        t = draw_t(schedule, n, torch.device("cpu"), t_bias)
    assert t.dtype == torch.int64
    counts = torch.bincount(t, minlength=10).double()
    assert len(counts) == 10
    below = (torch.arange(11).double() / 10) ** t_bias  # P(t < k); even for t_bias = 1
    p = below.diff()
    assert ((counts - n * p).abs() < 4.5 * (n * p * (1 - p)).sqrt()).all()


def test_times_are_drawn_evenly_unless_told_otherwise() -> None:
    schedule, cpu = NoiseSchedule.scaled_linear(), torch.device("cpu")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        first = draw_t(schedule, 100, cpu)
        torch.manual_seed(0)
        assert torch.equal(draw_t(schedule, 100, cpu, 1.0), first)


@pytest.mark.parametrize(("kl_weight", "mse_weight"), [(1e-6, 0.0), (0.1, 3.0)])
def test_autoencoder_loss_is_its_terms(
    kl_weight: float, mse_weight: float, autoencoder: Autoencoder, randn: Any
) -> None:
    x, posterior = randn(3, 3, 8, 12).clamp(-1, 1), None
    with torch.random.fork_rng([]):
        torch.manual_seed(5)
        terms = autoencoder_loss(autoencoder, x, kl_weight=kl_weight, mse_weight=mse_weight)
        torch.manual_seed(5)
        posterior = autoencoder.posterior(x)
        x_rec = autoencoder.decode(autoencoder.normalize(posterior.sample()))
    assert set(terms) == {"loss", "rec_loss", "mse", "reg_loss"}
    assert torch.allclose(terms["rec_loss"], (x - x_rec).abs().mean())
    assert torch.allclose(terms["mse"], (x - x_rec).square().mean())
    # The official ratio: a sum over the image beside a KL sum over the latent.
    whole = (x - x_rec).abs().sum() / 3 + kl_weight * posterior.kl().sum() / 3
    whole = whole + mse_weight * (x - x_rec).square().sum() / 3
    assert torch.allclose(terms["loss"] * 3 * 8 * 12, whole, rtol=1e-4)


def test_both_halves_of_the_autoencoder_learn(autoencoder: Autoencoder, randn: Any) -> None:
    autoencoder_loss(autoencoder, randn(2, 3, 8, 8).clamp(-1, 1), kl_weight=1e-6)["loss"].backward()
    for name, parameter in autoencoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
