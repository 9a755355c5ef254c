"""The noise schedule: its tables, the forward process, and eps <-> z0 <-> v."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusion.references import F64, SCHEDULE, ZERO_SNR
from helpers import randn
from torch import Tensor

from minildm.diffusion.samplers import ddim, timesteps
from minildm.diffusion.schedule import NoiseSchedule, Prediction, ScheduleConfig

KINDS = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("T", [50, 1000])
def test_tables_equal_those_of_diffusers(kind: Any, T: int, zero_snr: bool) -> None:
    """Theirs are float32 products: good to T times 1e-7, in cosine's last factor to 1e-5."""
    betas = DDIMScheduler(T, 0.001, 0.02, beta_schedule=KINDS[kind]).betas
    betas = rescale_zero_terminal_snr(betas.double()) if zero_snr else betas.double()
    config = ScheduleConfig(T=T, beta_start=0.001, beta_end=0.02, kind=kind)
    before = config.build()
    ours = before.zero_terminal_snr() if zero_snr else before
    assert torch.allclose(ours.alphas_cumprod.double(), (1 - betas).cumprod(0), 2e-4, 1e-9)
    assert (ours.alphas_cumprod[-1] == 0) == zero_snr
    assert before.alphas_cumprod[-1] > 0  # a copy: the old one stays


def test_ddim_on_the_flow_schedule_is_euler_on_rectified_flow() -> None:
    """x = (1 - tau) z0 + tau eps moves along u = eps - z0; z is x scaled to variance 1."""
    schedule, z_T = ScheduleConfig(kind="flow").build().double(), randn(2, 3, 4, 4, dtype=F64)

    def tau_and_scale(t: Any) -> tuple[Any, Any]:
        tau = (t + 1) / 1001
        return tau, ((1 - tau) ** 2 + tau**2) ** 0.5

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        tau, scale = tau_and_scale(t.view(-1, 1, 1, 1).double())
        x, u = scale * z, (scale * z).sin() + tau
        return Prediction(x + (1 - tau) * u, x - tau * u)

    *_, last = ddim(denoise, schedule, z_T, 10, spacing="trailing")
    x = tau_and_scale(999)[1] * z_T
    for t, following in pairwise([*timesteps(1000, 10, "trailing"), -1]):
        x = x + (following - t) / 1001 * (x.sin() + tau_and_scale(t)[0])
    assert (last.z - x).abs().max() < 1e-5  # the table is in float32


def test_a_config_builds_its_schedule_even_on_the_meta_device() -> None:
    with torch.device("meta"):
        built = ScheduleConfig(zero_terminal_snr=True).build()
    expected = NoiseSchedule.scaled_linear().zero_terminal_snr()
    assert torch.equal(built.alphas_cumprod, expected.alphas_cumprod)
    assert not built.state_dict()  # the table is rebuilt, not saved


def test_q_sample_mixes_each_sample_at_its_own_time() -> None:
    z0, eps = (randn(3, 2, 4, 5, seed=s, dtype=F64) for s in (0, 1))
    t = torch.tensor([999, 0, 500])
    z_t = SCHEDULE.q_sample(z0, t, eps)
    for i, abar in enumerate(SCHEDULE.alphas_cumprod[t].tolist()):
        expected = math.sqrt(abar) * z0[i] + math.sqrt(1 - abar) * eps[i]
        assert torch.allclose(z_t[i], expected, rtol=0, atol=1e-12)
        assert SCHEDULE.snr(t)[i].item() == pytest.approx(abar / (1 - abar))


@pytest.mark.parametrize("objective", ["eps", "z0", "v"])
@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["paper", "zero SNR"])
def test_targets_convert_back_to_eps_and_z0(schedule: NoiseSchedule, objective: Any) -> None:
    t = torch.arange(1000)
    t = t[:-1] if schedule is ZERO_SNR and objective == "eps" else t  # eps says nothing there
    z0, eps = (randn(len(t), 1, 2, 3, seed=s, dtype=F64) for s in (0, 1))
    out = schedule.target(objective, z0, t, eps)
    back = schedule.prediction(objective, out, schedule.q_sample(z0, t, eps), t)
    assert (back.eps - eps).abs().max() < 1e-9
    assert (back.z0 - z0).abs().max() < 1e-9
