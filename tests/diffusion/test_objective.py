"""Stage 2's loss and weights against diffusers and against the variational bound itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_snr
from diffusion.references import F64, SCHEDULE, ZERO_SNR
from helpers import randn
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from minildm.conditioning import Conditioning
from minildm.diffusion.objective import ObjectiveConfig, draw_t, ldm_loss, time_weights
from minildm.diffusion.schedule import NoiseSchedule

EACH_OBJECTIVE = pytest.mark.parametrize("objective", ["eps", "z0", "v"])


def outputs(z0: Tensor, eps: Tensor, abar: Tensor) -> dict[str, Tensor]:
    """What a perfect network returns, by objective."""
    return {"eps": eps, "z0": z0, "v": abar.sqrt() * eps - (1 - abar).sqrt() * z0}


@EACH_OBJECTIVE
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_ldm_loss_measures_the_error_of_what_is_predicted(loss: Any, objective: Any) -> None:
    t = torch.tensor([0, 500, 999])
    z0, eps, wrong = (randn(3, 2, 4, 5, seed=s, dtype=F64) for s in (0, 1, 2))
    config = ObjectiveConfig(predict=objective, loss=loss, loss_weighting="min_snr")
    abar = SCHEDULE.alphas_cumprod[t].view(3, 1, 1, 1)

    def network(z_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        assert torch.allclose(z_t, abar.sqrt() * z0 + (1 - abar).sqrt() * eps)
        return outputs(z0, eps, abar)[objective] + wrong

    losses = ldm_loss(network, SCHEDULE, z0, Conditioning(), t, eps, config)
    expected = wrong.abs() if loss == "l1" else wrong.square()
    assert torch.allclose(losses, expected.mean(dim=(1, 2, 3)), rtol=1e-9)


def test_half_precision_stays_out_of_the_error() -> None:
    schedule, z0, eps = NoiseSchedule.scaled_linear(), randn(2, 1, 4, 4), randn(2, 1, 4, 4, seed=1)
    half, t = eps.bfloat16(), torch.tensor([5, 9])
    losses = ldm_loss(lambda *_: half, schedule, z0, Conditioning(), t, eps)
    assert torch.equal(losses, (eps - half.float()).square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("t_bias", [0.5, 1.0, 3.0])
def test_times_follow_the_law_of_their_bias(t_bias: float) -> None:
    t = draw_t(torch.arange(100_000, dtype=F64) / 100_000, 10, t_bias)
    shares = torch.bincount(t, minlength=10) / 100_000
    edges = (torch.arange(11, dtype=F64) / 10) ** t_bias  # P(t < k) = (k / T)^t_bias
    assert torch.allclose(shares.double(), edges.diff(), atol=2e-5)
    assert draw_t(torch.tensor([1 - 2**-24]), 1000).item() == 999  # in float32, too


@EACH_OBJECTIVE
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_formula_of_diffusers(gamma: float, objective: Any) -> None:
    table = SimpleNamespace(alphas_cumprod=SCHEDULE.alphas_cumprod.float())
    snr = compute_snr(table, torch.arange(1000)).double()
    cut = snr.clamp(max=gamma)
    expected = {"eps": cut / snr, "v": cut / (snr + 1), "z0": cut}[objective]
    config = ObjectiveConfig(predict=objective, loss_weighting="min_snr", snr_gamma=gamma)
    assert torch.allclose(time_weights(SCHEDULE, config), expected, rtol=1e-3)
    assert (time_weights(SCHEDULE, ObjectiveConfig(predict=objective)) == 1).all()


@EACH_OBJECTIVE
def test_vlb_weights_are_those_of_the_kl(objective: Any) -> None:
    """q(z_{t-1} | z_t, z_0) against p with a network's z_0, DDPM Eqs. 5-7, for all t > 1."""
    t = torch.arange(1, 1000)
    z0, eps, wrong = (randn(999, 6, seed=s, dtype=F64) for s in (0, 1, 2))
    abar, prev = (SCHEDULE.alphas_cumprod[i].view(-1, 1) for i in (t, t - 1))
    z_t, beta = abar.sqrt() * z0 + (1 - abar).sqrt() * eps, 1 - abar / prev
    out = outputs(z0, eps, abar)[objective] + 0.1 * wrong
    z0_hat = {
        "eps": (z_t - (1 - abar).sqrt() * out) / abar.sqrt(),
        "z0": out,
        "v": abar.sqrt() * z_t - (1 - abar).sqrt() * out,
    }[objective]

    def posterior(z0: Tensor) -> Normal:
        mean = prev.sqrt() * beta * z0 + (1 - beta).sqrt() * (1 - prev) * z_t
        return Normal(mean / (1 - abar), ((1 - prev) / (1 - abar) * beta).sqrt())

    bound = kl_divergence(posterior(z0), posterior(z0_hat)).sum(dim=1)
    weights = time_weights(SCHEDULE, ObjectiveConfig(predict=objective, loss_weighting="vlb"))
    assert torch.allclose(weights[1:] * (0.1 * wrong).square().sum(dim=1), bound, rtol=1e-6)
    assert weights[0] == weights[1]  # no KL there; as the official code has it


@pytest.mark.parametrize("loss_weighting", ["min_snr", "vlb"])
@pytest.mark.parametrize("objective", ["z0", "v"])
def test_weights_are_finite_at_zero_terminal_snr(objective: Any, loss_weighting: Any) -> None:
    config = ObjectiveConfig(predict=objective, loss_weighting=loss_weighting)
    weights = time_weights(ZERO_SNR, config)
    assert (weights.isfinite() & (weights >= 0)).all()
    # z_T says nothing of z_0: min-SNR does not count it, the bound still does.
    assert (weights[-1] == 0) == (loss_weighting == "min_snr")
