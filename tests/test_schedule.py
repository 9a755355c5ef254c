"""The noise schedule: its table, the forward process, and eps <-> z0 <-> v."""

import math
from typing import Any

import pytest
import torch

from minildm import NoiseSchedule

EVERY_T = torch.arange(1000)


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear(dtype=torch.float64)


def test_the_square_roots_of_the_betas_are_evenly_spaced(schedule: NoiseSchedule) -> None:
    abar = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod])
    betas = 1 - abar[1:] / abar[:-1]
    assert betas[0].item() == pytest.approx(0.0015, rel=1e-9)
    assert betas[-1].item() == pytest.approx(0.0195, rel=1e-9)
    strides = betas.sqrt().diff()
    assert (strides - strides.mean()).abs().max() < 1e-12


def test_the_float32_table_is_the_exact_product_rounded_once() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000)
    table = NoiseSchedule(betas).alphas_cumprod
    assert table.dtype == torch.float32
    for t in (0, 1, 499, 999):
        exact = math.prod(1 - beta for beta in betas[: t + 1].tolist())
        assert table[t].item() == pytest.approx(exact, rel=2**-24)


def test_signal_only_falls_and_variance_is_kept(schedule: NoiseSchedule) -> None:
    signal_scale, noise_scale = schedule.scales(EVERY_T)
    assert signal_scale.shape == noise_scale.shape == (1000, 1, 1, 1)
    assert (signal_scale.flatten().diff() < 0).all()
    assert ((signal_scale > 0) & (signal_scale < 1)).all()
    assert (signal_scale**2 + noise_scale**2 - 1).abs().max() < 1e-12


def test_snr_is_the_squared_ratio_of_the_scales(schedule: NoiseSchedule) -> None:
    signal_scale, noise_scale = (scale.flatten() for scale in schedule.scales(EVERY_T))
    snr = schedule.snr(EVERY_T)
    assert torch.allclose(snr, (signal_scale / noise_scale) ** 2, rtol=1e-10)
    assert (snr.diff() < 0).all()


def test_q_sample_mixes_each_sample_at_its_own_time(schedule: NoiseSchedule, randn: Any) -> None:
    z0, eps = (randn(3, 2, 4, 5, seed=s, dtype=torch.float64) for s in (0, 1))
    t = torch.tensor([999, 0, 500])
    z_t = schedule.q_sample(z0, t, eps)
    for i, abar in enumerate(schedule.alphas_cumprod[t].tolist()):
        expected = math.sqrt(abar) * z0[i] + math.sqrt(1 - abar) * eps[i]
        assert torch.allclose(z_t[i], expected, rtol=0, atol=1e-12)


def test_eps_and_z0_come_back_from_z_t_at_every_time(schedule: NoiseSchedule, randn: Any) -> None:
    z0, eps = (randn(1000, 1, 2, 3, seed=s, dtype=torch.float64) for s in (0, 1))
    z_t = schedule.q_sample(z0, EVERY_T, eps)
    assert (schedule.z0_from_eps(z_t, EVERY_T, eps) - z0).abs().max() < 1e-10
    assert (schedule.eps_from_z0(z_t, EVERY_T, z0) - eps).abs().max() < 1e-10


def test_v_turns_back_into_eps_and_z0_at_every_time(schedule: NoiseSchedule, randn: Any) -> None:
    z0, eps = (randn(1000, 1, 2, 3, seed=s, dtype=torch.float64) for s in (0, 1))
    z_t, v = schedule.q_sample(z0, EVERY_T, eps), schedule.v_from(z0, EVERY_T, eps)
    eps_back, z0_back = schedule.from_v(z_t, EVERY_T, v)
    assert (eps_back - eps).abs().max() < 1e-12
    assert (z0_back - z0).abs().max() < 1e-12
    # (z_t, v) is (z0, eps) turned: the length stays.
    assert (z_t**2 + v**2 - z0**2 - eps**2).abs().max() < 1e-11


def test_v_is_the_derivative_of_z_t_by_its_angle(schedule: NoiseSchedule, randn: Any) -> None:
    z0, eps = (randn(1, 1, 1, 4, seed=s, dtype=torch.float64) for s in (0, 1))
    t, step = torch.tensor([300]), 1e-6
    angle = math.acos(schedule.alphas_cumprod[300].sqrt().item())
    ahead, behind = (math.cos(a) * z0 + math.sin(a) * eps for a in (angle + step, angle - step))
    assert torch.allclose(schedule.v_from(z0, t, eps), (ahead - behind) / (2 * step), atol=1e-8)


def test_the_table_is_rebuilt_not_saved(schedule: NoiseSchedule) -> None:
    assert not schedule.state_dict()
    assert [name for name, _ in schedule.named_buffers()] == ["alphas_cumprod"]


def test_one_step_is_a_schedule() -> None:
    schedule = NoiseSchedule(torch.tensor([0.5]))
    assert schedule.T == 1
    assert schedule.snr(torch.tensor([0])).item() == 1.0


@pytest.mark.parametrize(
    "betas",
    [
        torch.tensor([0.1, 0.0]),
        torch.tensor([0.1, 1.0]),
        torch.tensor([-0.1]),
        torch.tensor([float("nan")]),
        torch.tensor([]),
        torch.full((2, 2), 0.1),
    ],
    ids=["zero", "one", "negative", "nan", "empty", "matrix"],
)
def test_impossible_betas_are_refused(betas: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="betas must"):
        NoiseSchedule(betas)


@pytest.mark.parametrize("options", [{"T": 0}, {"b0": 0.0}, {"b0": 0.5, "b1": 0.1}, {"b1": 1.0}])
def test_impossible_ends_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="0 < b0 <= b1 < 1"):
        NoiseSchedule.scaled_linear(**options)
