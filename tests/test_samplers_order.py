"""How fast each sampler's error falls: against the exact flow of a Gaussian, and backwards."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from minildm import NoiseSchedule, Prediction, ddim
from minildm.samplers import SAMPLERS, SPACINGS, ddim_inversion, euler, slerp, timesteps
from minildm.toy import gaussian_eps, mixture_eps

F64 = torch.float64
MU, SPREAD = 2.0, 0.6
ORDERS = {"ddim": 1, "euler": 1, "plms": 2, "heun": 2, "dpm_solver_pp": 2}


def even_snr(T: int = 6400, top: float = 2.5) -> NoiseSchedule:
    """log SNR falls evenly from 2 top to -2 top: steps of every sampler are alike.

    On a table that starts near the data, as the paper's, the steps there are coarse however many
    there are, and an order is not seen in its pure form.
    """
    abar = torch.sigmoid(2 * torch.linspace(top, -top, T, dtype=F64))
    return NoiseSchedule(1 - abar / torch.cat([torch.ones(1, dtype=F64), abar[:-1]]))


def carried(z: Tensor, abar: Tensor, abar_end: Tensor) -> Tensor:
    """The exact flow of N(MU, SPREAD^2): each z_t keeps its quantile."""

    def std(a: Tensor) -> Tensor:
        return (a * SPREAD**2 + 1 - a).sqrt()

    return abar_end.sqrt() * MU + (z - abar.sqrt() * MU) * std(abar_end) / std(abar)


def error(name: str, schedule: NoiseSchedule, steps: int, z_T: Tensor) -> float:
    """The largest distance from the exact flow, from the first time visited to index 0."""
    table = schedule.alphas_cumprod
    exact = carried(z_T, table[timesteps(schedule.T, steps)[0]], table[0])
    denoise = gaussian_eps(schedule, MU, SPREAD)
    *_, last = SAMPLERS[name](denoise, schedule, z_T, steps, spacing="leading")
    return (last.z - exact).abs().max().item()


@pytest.mark.parametrize("name", ORDERS)
def test_the_error_falls_with_the_order_of_the_sampler(name: str, randn: Any) -> None:
    schedule, z_T = even_snr(), randn(256, 1, 2, 2, dtype=F64)
    errors = [error(name, schedule, steps, z_T) for steps in (20, 40, 80)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[name], abs=0.15)


def test_a_higher_order_is_nearer_at_equal_calls(randn: Any) -> None:
    schedule, z_T = even_snr(), randn(256, 1, 2, 2, dtype=F64)
    calls = {"ddim": 40, "plms": 39, "heun": 20, "dpm_solver_pp": 40}
    errors = {name: error(name, schedule, steps, z_T) for name, steps in calls.items()}
    for name in ("plms", "heun", "dpm_solver_pp"):
        assert errors[name] < errors["ddim"] / 3


def test_on_the_papers_table_ddim_has_first_order_and_heun_second(randn: Any) -> None:
    schedule, z_T = NoiseSchedule.scaled_linear(dtype=F64), randn(256, 1, 2, 2, dtype=F64)
    for name, order in (("ddim", 1), ("heun", 2)):
        errors = [error(name, schedule, steps, z_T) for steps in (25, 50, 100, 200)]
        measured = math.log2(errors[0] / errors[-1]) / 3
        assert measured == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_euler_is_ddim_in_other_words(spacing: str, steps: int, randn: Any) -> None:
    schedule, z_T = NoiseSchedule.scaled_linear(dtype=F64), randn(8, 1, 2, 2, dtype=F64)
    denoise = mixture_eps(schedule, randn(3, 1, 2, 2, seed=1, dtype=F64), 0.3)
    paths = (sampler(denoise, schedule, z_T, steps, spacing=spacing) for sampler in (ddim, euler))
    for one, other in zip(*paths, strict=True):
        assert (one.z - other.z).abs().max() < 1e-10


# --- backwards ---


@pytest.mark.parametrize("spacing", SPACINGS)
def test_inversion_ends_where_ddim_starts_from(spacing: str, randn: Any) -> None:
    """With one answer at all times both ways are exact, whatever the steps."""
    schedule, z_0 = NoiseSchedule.scaled_linear(dtype=F64), randn(4, 1, 2, 2, dtype=F64)
    eps = randn(4, 1, 2, 2, seed=1, dtype=F64)
    for steps in (1, 2, 9):
        *_, up = ddim_inversion(lambda z, t: eps, schedule, z_0, steps, spacing=spacing)
        *_, down = ddim(lambda z, t: eps, schedule, up.z, steps, spacing=spacing)
        assert torch.allclose(down.z, z_0, atol=1e-10)
        last = schedule.alphas_cumprod[0] if spacing == "leading" else torch.ones((), dtype=F64)
        first = schedule.alphas_cumprod[timesteps(1000, steps, spacing)[0]]
        z0 = (z_0 - (1 - last).sqrt() * eps) / last.sqrt()
        assert torch.allclose(up.z, first.sqrt() * z0 + (1 - first).sqrt() * eps, atol=1e-10)


def test_inversion_visits_the_times_in_rising_order(randn: Any) -> None:
    schedule, asked = NoiseSchedule.scaled_linear(dtype=F64), []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        asked.append(int(t[0]))
        return z

    path = list(ddim_inversion(denoise, schedule, randn(1, 1, 1, 1, dtype=F64), 5))
    assert asked == [step.t for step in path] == [0, *timesteps(1000, 5)[:0:-1]]


def test_inversion_and_the_round_trip_are_first_order(randn: Any) -> None:
    schedule, z_0 = even_snr(), MU + SPREAD * randn(256, 1, 2, 2, dtype=F64)
    denoise, table = gaussian_eps(schedule, MU, SPREAD), schedule.alphas_cumprod
    there, back = [], []
    for steps in (20, 40, 80):
        *_, up = ddim_inversion(denoise, schedule, z_0, steps)
        *_, down = ddim(denoise, schedule, up.z, steps)
        exact = carried(z_0, table[0], table[timesteps(schedule.T, steps)[0]])
        there.append((up.z - exact).abs().max().item())
        back.append((down.z - z_0).abs().max().item())
    for errors in (there, back):
        for coarse, fine in pairwise(errors):
            assert math.log2(coarse / fine) == pytest.approx(1, abs=0.2)


def test_inversion_takes_a_prediction(randn: Any) -> None:
    schedule, z_0 = NoiseSchedule.scaled_linear(dtype=F64), randn(4, 1, 2, 2, dtype=F64)
    denoise = gaussian_eps(schedule, MU, SPREAD)

    def both(z: Tensor, t: Tensor) -> Prediction:
        return schedule.prediction("eps", denoise(z, t), z, t)

    *_, one = ddim_inversion(denoise, schedule, z_0, 20)
    *_, other = ddim_inversion(both, schedule, z_0, 20)
    assert torch.allclose(one.z, other.z, atol=1e-10)


def test_there_is_no_way_back_from_zero_terminal_snr(randn: Any) -> None:
    schedule = NoiseSchedule.scaled_linear().zero_terminal_snr()
    z_0 = randn(1, 1, 1, 1)
    with pytest.raises(ValueError, match="no inversion"):
        next(ddim_inversion(lambda z, t: Prediction(z, z), schedule, z_0, 5, spacing="trailing"))


# --- between two starts ---


def test_slerp_starts_and_ends_where_it_should(randn: Any) -> None:
    a, b = randn(3, 2, 4, 4, seed=1), randn(3, 2, 4, 4, seed=2)
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-6)
    assert torch.allclose(slerp(a, b, 1.0), b, atol=1e-6)


def test_slerp_stays_on_the_sphere_and_turns_evenly(randn: Any) -> None:
    a, b = randn(3, 2, 4, 4, seed=1, dtype=F64), randn(3, 2, 4, 4, seed=2, dtype=F64)
    a, b = (x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * 7 for x in (a, b))
    points = [slerp(a, b, w / 8).flatten(1) for w in range(9)]
    for point in points:
        assert torch.allclose(point.norm(dim=1), torch.full((3,), 7.0, dtype=F64))
    angles = [torch.acos((one * other).sum(dim=1) / 49) for one, other in pairwise(points)]
    assert torch.allclose(torch.stack(angles), angles[0].expand(8, 3), atol=1e-9)
    whole = torch.acos((points[0] * points[-1]).sum(dim=1) / 49)
    assert torch.allclose(8 * angles[0], whole, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_slerp_of_parallel_draws_is_straight(dtype: torch.dtype, randn: Any) -> None:
    a = randn(2, 1, 3, 3, dtype=dtype)
    assert torch.allclose(slerp(a, a, 0.3), a)
    assert torch.allclose(slerp(a, 3 * a, 0.5), 2 * a)
    assert slerp(a, -a, 0.5).isfinite().all()
    assert slerp(torch.zeros_like(a), a, 0.5).isfinite().all()


def test_each_sample_has_its_own_angle(randn: Any) -> None:
    a, b = randn(2, 1, 3, 3, seed=1), randn(2, 1, 3, 3, seed=2)
    together = slerp(a, b, 0.3)
    assert torch.allclose(together[:1], slerp(a[:1], b[:1], 0.3))
    assert torch.allclose(together[1:], slerp(a[1:], b[1:], 0.3))
