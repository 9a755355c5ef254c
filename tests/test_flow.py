"""Rectified flow against closed forms, autograd-free quadrature and diffusers' scheduler."""

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minildm import NoiseSchedule
from minildm.flow import (
    bend,
    between,
    flow_euler,
    flow_loss,
    gaussian_velocity,
    timed,
    z0_by_flow,
)
from minildm.toy import gaussian_eps

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from diffusers import FlowMatchEulerDiscreteScheduler

F64 = torch.float64
MU = 2.0


def end(velocity: Any, z_1: Tensor, steps: int) -> Tensor:
    *_, last = flow_euler(velocity, z_1, steps)
    return last.z


@pytest.mark.parametrize("s", [0.5, 1.0, 3.0])
def test_euler_follows_the_exact_flow_of_a_gaussian(s: float, randn: Any) -> None:
    z_1 = randn(256, 1, 1, 2, dtype=F64)
    exact = MU + s * z_1  # each point keeps its place, in standard deviations

    def error(steps: int) -> float:
        return float((end(gaussian_velocity(MU, s), z_1, steps) - exact).abs().max())

    assert 1.8 < error(50) / error(100) < 2.2  # first order
    assert error(2000) < 0.01 * max(1.0, s)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_straight_paths_need_one_step(steps: int, randn: Any) -> None:
    z_1 = randn(16, 1, 2, 2, dtype=F64)
    point = end(gaussian_velocity(MU, 0.0), z_1, steps)
    assert torch.allclose(point, torch.full_like(point, MU))
    again = end(gaussian_velocity(MU, 0.5, reflowed=True), z_1, steps)
    assert torch.allclose(again, MU + 0.5 * z_1)


@pytest.mark.parametrize("reflowed", [False, True])
@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_the_velocity_is_the_best_guess_of_the_lines_slope(
    tau: float, reflowed: bool, randn: Any
) -> None:
    """Least squares of eps - z0 on z_tau and 1: for Gaussians the conditional mean is linear."""
    s, eps = 0.6, randn(200_000, 1, 1, 1, dtype=F64)
    z0 = MU + s * (eps if reflowed else randn(200_000, 1, 1, 1, seed=1, dtype=F64))
    t = torch.full((1,), tau, dtype=F64)
    z = between(z0, t, eps).flatten()
    table = torch.stack([z, torch.ones_like(z)], dim=1)
    slope, offset = torch.linalg.lstsq(table, (eps - z0).flatten()[:, None]).solution.flatten()
    at = torch.tensor([-1.0, 0.0, 2.0], dtype=F64)
    found = gaussian_velocity(MU, s, reflowed=reflowed)(at.view(3, 1, 1, 1), t.expand(3))
    assert torch.allclose(found.flatten(), slope * at + offset, atol=0.02)


def test_the_loss_is_the_squared_error_of_the_velocity(randn: Any) -> None:
    z0, eps, tau = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1), torch.tensor([0.0, 0.3, 1.0])
    assert torch.equal(flow_loss(lambda z, t: eps - z0, z0, tau, eps), torch.zeros(3))
    off = flow_loss(lambda z, t: eps - z0 + t.view(-1, 1, 1, 1), z0, tau, eps)
    assert torch.allclose(off, tau**2)
    seen = []
    flow_loss(lambda z, t: seen.append(z) or z, z0, tau, eps)
    assert torch.equal(seen[0][0], z0[0]) and torch.equal(seen[0][2], eps[2])
    assert torch.allclose(seen[0][1], 0.7 * z0[1] + 0.3 * eps[1])


def test_the_network_is_asked_at_a_thousand_tau(randn: Any) -> None:
    asked = []
    velocity = timed(lambda z, t: asked.append(t) or 0 * z)
    steps = list(flow_euler(velocity, randn(2, 1, 1, 1), 4))
    assert [float(t[0]) for t in asked] == [1000.0, 750.0, 500.0, 250.0]
    assert [step.t for step in steps] == [1000, 750, 500, 250] and len(asked[0]) == 2


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_the_steps_are_those_of_diffusers(steps: int, randn: Any) -> None:
    velocity, z = gaussian_velocity(MU, 0.7), randn(4, 2, 3, 3)
    theirs, states = FlowMatchEulerDiscreteScheduler(), list(flow_euler(velocity, z, steps))
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    for t, ours in zip(theirs.timesteps, states, strict=True):
        assert float(t) == pytest.approx(ours.t, abs=0.51)
        z = theirs.step(velocity(z, (t / 1000).expand(len(z))), t, z).prev_sample
        assert torch.allclose(z, ours.z, atol=1e-5)


def test_a_step_says_the_data_that_its_velocity_leads_to(randn: Any) -> None:
    z_1, velocity = randn(2, 1, 2, 2, dtype=F64), gaussian_velocity(MU, 0.5)
    first, second = flow_euler(velocity, z_1, 2)
    assert torch.equal(first.z0_hat, end(velocity, z_1, 1)) and torch.equal(second.z, second.z0_hat)


def test_bend_is_the_integral_over_the_path(randn: Any) -> None:
    s, z_1 = 0.5, randn(8, 1, 1, 1, dtype=F64)
    tau = torch.linspace(0, 1, 20_001, dtype=F64)
    spread = (((1 - tau) * s) ** 2 + tau**2).sqrt()  # z_tau = (1 - tau) mu + spread z_1
    slope = (tau - (1 - tau) * s**2) / spread * z_1.view(-1, 1) - MU
    way = (1 - s) * z_1.view(-1, 1) - MU
    exact = torch.trapezoid((slope - way) ** 2, tau) / way.squeeze() ** 2
    assert torch.allclose(bend(gaussian_velocity(MU, s), z_1, 2000), exact, rtol=0.01)
    for straight in (gaussian_velocity(MU, 0.0), gaussian_velocity(MU, s, reflowed=True)):
        assert float(bend(straight, z_1, 7).max()) < 1e-20


@pytest.mark.parametrize("t", [0, 300, 999])
def test_the_same_guess_of_z0_as_by_eps(t: int, randn: Any) -> None:
    schedule, z = NoiseSchedule.scaled_linear(dtype=F64), randn(5, 1, 2, 2, dtype=F64)
    times = torch.full((5,), t)
    by_eps = schedule.z0_from_eps(z, times, gaussian_eps(schedule, MU, 0.7)(z, times))
    by_flow = z0_by_flow(gaussian_velocity(MU, 0.7), schedule, z, times)
    assert torch.allclose(by_flow, by_eps, rtol=1e-6, atol=1e-8)


def test_it_works_at_zero_terminal_snr(randn: Any) -> None:
    schedule = NoiseSchedule.scaled_linear(dtype=F64).zero_terminal_snr()
    z, t = randn(2, 1, 1, 1, dtype=F64), torch.full((2,), 999)
    found = z0_by_flow(gaussian_velocity(MU, 0.7), schedule, z, t)
    assert torch.allclose(found, torch.full_like(found, MU))  # nothing is known: the mean


@pytest.mark.parametrize("tau", [-0.1, 1.1, math.nan])
def test_a_time_outside_is_refused(tau: float, randn: Any) -> None:
    z = randn(1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"tau must lie in \[0, 1\]"):
        between(z, torch.tensor([tau]), z)
    with pytest.raises(ValueError, match="steps=0"):
        next(flow_euler(gaussian_velocity(0.0, 1.0), z, 0))


def test_gradients_are_the_callers(randn: Any) -> None:
    weight = torch.ones((), requires_grad=True)
    for step in flow_euler(lambda z, t: weight * z, randn(1, 1, 1, 1), 2):
        assert torch.is_grad_enabled() and not step.z.requires_grad
    flow_loss(lambda z, t: weight * z, randn(2, 1, 1, 1), torch.rand(2), randn(2, 1, 1, 1))[
        0
    ].backward()
    assert weight.grad is not None
