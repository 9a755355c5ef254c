"""Rectified flow against closed forms, quadrature and diffusers' scheduler."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusion.references import F64
from helpers import randn

from minildm.diffusion.flow import bend, flow_euler, flow_loss
from minildm.teaching.toy import gaussian_velocity

MU = 2.0


def test_the_loss_is_the_squared_error_of_the_velocity() -> None:
    z0, eps, tau = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1), torch.tensor([0.0, 0.3, 1.0])
    z_tau = torch.stack([z0[0], 0.7 * z0[1] + 0.3 * eps[1], eps[2]])
    off = flow_loss(lambda z, t: z - z_tau + eps - z0 + t.view(-1, 1, 1, 1), z0, tau, eps)
    assert torch.allclose(off, tau**2, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_the_steps_equal_those_of_diffusers(steps: int) -> None:
    velocity, z = gaussian_velocity(MU, 0.7), randn(4, 2, 3, 3)
    theirs, states = FlowMatchEulerDiscreteScheduler(), list(flow_euler(velocity, z, steps))
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    for t, ours in zip(theirs.timesteps, states, strict=True):
        assert ours.t == pytest.approx(t.item())
        assert torch.allclose(ours.z0_hat, z - t / 1000 * velocity(z, (t / 1000).expand(4)))
        z = theirs.step(velocity(z, (t / 1000).expand(4)), t, z).prev_sample
        assert torch.allclose(z, ours.z, atol=1e-5)


def test_bend_is_the_integral_over_the_path() -> None:
    s, z_1 = 0.5, randn(8, 1, 1, 1, dtype=F64)
    tau = torch.linspace(0, 1, 20_001, dtype=F64)
    spread = (((1 - tau) * s) ** 2 + tau**2).sqrt()  # z_tau = (1 - tau) mu + spread z_1
    slope = (tau - (1 - tau) * s**2) / spread * z_1.view(-1, 1) - MU
    way = (1 - s) * z_1.view(-1, 1) - MU
    exact = torch.trapezoid((slope - way) ** 2, tau) / way.squeeze() ** 2
    assert torch.allclose(bend(gaussian_velocity(MU, s), z_1, 2000), exact, rtol=0.01)
    for straight in (gaussian_velocity(MU, 0.0), gaussian_velocity(MU, s, reflowed=True)):
        assert float(bend(straight, z_1, 7).max()) < 1e-20
