"""How fast each sampler's error falls, the way back by inversion, and slerp."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusion.closed_forms import F64, gaussian_eps
from helpers import randn
from torch import Tensor

from minildm.diffusion import NoiseSchedule, Prediction
from minildm.diffusion.samplers import (
    SAMPLERS,
    SPACINGS,
    ddim,
    ddim_inversion,
    slerp,
    timesteps,
)

MU, SPREAD = 2.0, 0.6
ORDERS = {"ddim": 1, "euler": 1, "plms": 2, "heun": 2, "dpm_solver_pp": 2}


# --- the order ---


def even_snr(T: int = 6400, top: float = 2.5) -> NoiseSchedule:
    """log SNR falls evenly from 2 top to -2 top: steps of every sampler are alike.

    On the paper's table, which starts near the data, the steps there are coarse however many
    there are, and an order is not seen in its pure form.
    """
    abar = torch.sigmoid(2 * torch.linspace(top, -top, T, dtype=F64))
    return NoiseSchedule(1 - abar / torch.cat([torch.ones(1, dtype=F64), abar[:-1]]))


def carried(z: Tensor, abar: Tensor, abar_end: Tensor) -> Tensor:
    """The exact flow of N(MU, SPREAD^2): each z_t keeps its quantile."""

    def std(a: Tensor) -> Tensor:
        return (a * SPREAD**2 + 1 - a).sqrt()

    return abar_end.sqrt() * MU + (z - abar.sqrt() * MU) * std(abar_end) / std(abar)


def flow_error(name: str, schedule: NoiseSchedule, steps: int) -> float:
    """The largest distance from the exact flow, from the first time visited to index 0."""
    table, z_T = schedule.alphas_cumprod, randn(256, 1, 2, 2, dtype=F64)
    exact = carried(z_T, table[timesteps(schedule.T, steps)[0]], table[0])
    denoise = gaussian_eps(schedule, MU, SPREAD)
    *_, last = SAMPLERS[name](denoise, schedule, z_T, steps, spacing="leading")
    return (last.z - exact).abs().max().item()


@pytest.mark.parametrize("name", ORDERS)
def test_the_error_falls_with_the_order_of_the_sampler(name: str) -> None:
    errors = [flow_error(name, even_snr(), steps) for steps in (20, 40, 80)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[name], abs=0.15)


# --- backwards ---


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_inversion_ends_where_ddim_starts(steps: int, spacing: Any) -> None:
    """With a constant eps both ways are exact, whatever the steps."""
    schedule, z_0 = NoiseSchedule.scaled_linear(dtype=F64), randn(4, 1, 2, 2, dtype=F64)
    eps, seen = randn(4, 1, 2, 2, seed=1, dtype=F64), []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return eps

    *_, up = ddim_inversion(denoise, schedule, z_0, steps, spacing=spacing)
    assert seen == [0, *timesteps(1000, steps, spacing)[:0:-1]]
    *_, down = ddim(denoise, schedule, up.z, steps, spacing=spacing)
    assert torch.allclose(down.z, z_0, atol=1e-10)
    last = schedule.alphas_cumprod[0] if spacing == "leading" else torch.ones((), dtype=F64)
    first = schedule.alphas_cumprod[timesteps(1000, steps, spacing)[0]]
    z0 = (z_0 - (1 - last).sqrt() * eps) / last.sqrt()
    assert torch.allclose(up.z, first.sqrt() * z0 + (1 - first).sqrt() * eps, atol=1e-10)


def test_there_is_no_inversion_at_zero_terminal_snr() -> None:
    schedule, z_0 = NoiseSchedule.scaled_linear().zero_terminal_snr(), randn(1, 1, 1, 1)
    with pytest.raises(ValueError, match="no inversion"):
        next(ddim_inversion(lambda z, t: Prediction(z, z), schedule, z_0, 5, spacing="trailing"))


# --- between two starts ---


def test_slerp_stays_on_the_sphere_and_turns_evenly() -> None:
    a, b = (randn(3, 2, 4, 4, seed=s, dtype=F64) for s in (1, 2))
    a, b = (x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * 7 for x in (a, b))
    points = [slerp(a, b, w / 8).flatten(1) for w in range(9)]
    assert torch.allclose(points[0], a.flatten(1))
    assert torch.allclose(points[-1], b.flatten(1))
    for point in points:
        assert torch.allclose(point.norm(dim=1), torch.full((3,), 7.0, dtype=F64))
    angles = [torch.acos((one * other).sum(dim=1) / 49) for one, other in pairwise(points)]
    assert torch.allclose(torch.stack(angles), angles[0].expand(8, 3), atol=1e-9)
    assert torch.allclose(slerp(a[1:2], b[1:2], 0.125).flatten(1), points[1][1:2])


def test_slerp_of_parallel_samples_is_straight() -> None:
    a = randn(2, 1, 3, 3)
    assert torch.allclose(slerp(a, 3 * a, 0.5), 2 * a)
    assert slerp(a, -a, 0.5).isfinite().all()
    assert slerp(torch.zeros_like(a), a, 0.5).isfinite().all()
