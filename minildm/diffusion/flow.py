"""Rectified flow: straight lines between data and noise, and Euler's steps along them.

    z_tau = (1 - tau) z0 + tau eps,    velocity = d z_tau / d tau = eps - z0

Liu et al. 2023, Lipman et al. 2023; tau = 0 is the data (both papers count the other way). Divided
by sqrt((1 - tau)^2 + tau^2), z_tau is a variance-preserving z_t. The network stays the same; the
schedule, the target and the sampler differ.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from einops import reduce
from torch import Tensor

from minildm.diffusion.samplers import Denoise, Step
from minildm.diffusion.schedule import NoiseSchedule
from minildm.layers import at_least_float32

Velocity = Callable[[Tensor, Tensor], Tensor]  # (z (B, c, h, w), tau (B,)) -> (B, c, h, w)
T = 1000  # a network is given T tau, so that its embedding of t serves a flow, too


def timed(network: Denoise) -> Velocity:
    """A network, with its condition bound, as a velocity: it is called at T tau."""
    return lambda z, tau: network(z, T * tau)


def flow_loss(velocity: Velocity, z0: Tensor, tau: Tensor, eps: Tensor) -> Tensor:
    """|| velocity(z_tau, tau) - (eps - z0) ||^2, Liu et al. 2023, Eq. 1: a mean a sample, (B,).

    The caller draws tau (B,) in [0, 1] and eps. Independent eps make the first flow; both ends of
    a trained flow's paths make the next, straighter one ("reflow").
    """
    part = tau.view(-1, 1, 1, 1)
    z_tau = (1 - part) * z0 + part * eps
    error = at_least_float32(velocity(z_tau, tau)) - (eps - z0)
    return reduce(error**2, "b c h w -> b", "mean")


@torch.no_grad()
def flow_euler(velocity: Velocity, z_1: Tensor, steps: int = 20) -> Iterator[Step]:
    """From noise z_1 to data z_0 in equal steps of tau, one call each; a Step's t is in 1 / T.

    Exact for any number of steps where paths are straight.
    """
    z, taus = z_1, torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for tau, following in pairwise(taus):
        v = velocity(z, torch.full((len(z),), tau, dtype=z.dtype, device=z.device))
        z0_hat = z - tau * v
        z = z + (following - tau) * v
        yield Step(round(T * tau), z, z0_hat)


def bend(velocity: Velocity, z_1: Tensor, steps: int = 50) -> Tensor:
    """How far paths are from straight, Liu et al. 2023, Eq. 2, as a share: (B,), 0 if straight.

    The mean of || (z_1 - z_0) - v ||^2 along a sample's path, divided by || z_1 - z_0 ||^2.
    """
    states = [z_1, *(step.z for step in flow_euler(velocity, z_1, steps))]
    v = torch.stack([a - b for a, b in pairwise(states)]) * steps  # (steps, B, c, h, w)
    way = z_1 - states[-1]
    off = reduce((v - way) ** 2, "s b c h w -> b", "sum") / steps
    return off / reduce(way**2, "b c h w -> b", "sum")


def z0_by_flow(velocity: Velocity, schedule: NoiseSchedule, z_t: Tensor, t: Tensor) -> Tensor:
    """A flow's z0 at a schedule's z_t (B, c, h, w), t (B,): at the tau of equal noise.

    sqrt(abar) z0 + sqrt(1 - abar) eps, divided by the sum of its weights, is z_tau.
    """
    signal_scale, noise_scale = schedule.scales(t)
    tau = noise_scale / (signal_scale + noise_scale)
    z = z_t / (signal_scale + noise_scale)
    return z - tau * velocity(z, tau.flatten())
