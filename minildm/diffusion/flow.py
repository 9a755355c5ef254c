"""Rectified flow: straight lines between data and noise, and Euler's steps along them.

    z_tau = (1 - tau) z0 + tau eps,    velocity = d z_tau / d tau = eps - z0

Liu et al. 2023, Lipman et al. 2023; tau = 0 is the data (both papers count the other way). Divided
by sqrt((1 - tau)^2 + tau^2), z_tau is a variance-preserving z_t. The network stays the same, called
at 1000 tau in place of t; the schedule, the target and the sampler differ.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from einops import reduce
from torch import Tensor

from minildm.diffusion.samplers import Step
from minildm.layers import at_least_float32

Velocity = Callable[[Tensor, Tensor], Tensor]  # (z (B, c, h, w), tau (B,)) -> (B, c, h, w)


def flow_loss(velocity: Velocity, z0: Tensor, tau: Tensor, eps: Tensor) -> Tensor:
    """|| velocity(z_tau, tau) - (eps - z0) ||^2, Liu et al. 2023, Eq. 1: a mean a sample, (B,).

    tau (B,) in [0, 1]. Independent eps make the first flow; both ends of a trained flow's paths
    make the next, straighter one ("reflow").
    """
    part = tau.view(-1, 1, 1, 1)
    z_tau = (1 - part) * z0 + part * eps
    error = at_least_float32(velocity(z_tau, tau)) - (eps - z0)
    return reduce(error**2, "b c h w -> b", "mean")


@torch.no_grad()
def flow_euler(velocity: Velocity, z_1: Tensor, steps: int = 20) -> Iterator[Step]:
    """From noise z_1 to data z_0 in equal steps of tau, one call each; a Step's t is 1000 tau.

    Exact for any number of steps where paths are straight.
    """
    z, taus = z_1, torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for tau, following in pairwise(taus):
        v = velocity(z, torch.full((len(z),), tau, dtype=z.dtype, device=z.device))
        z0_hat = z - tau * v
        z = z + (following - tau) * v
        yield Step(round(1000 * tau), z, z0_hat)


def bend(velocity: Velocity, z_1: Tensor, steps: int = 50) -> Tensor:
    """How far paths are from straight, Liu et al. 2023, Eq. 2, as a share: (B,), 0 if straight.

    The mean of || (z_1 - z_0) - v ||^2 along a sample's path, divided by || z_1 - z_0 ||^2.
    """
    states = [z_1, *(step.z for step in flow_euler(velocity, z_1, steps))]
    v = torch.stack([a - b for a, b in pairwise(states)]) * steps  # (steps, B, c, h, w)
    way = z_1 - states[-1]
    off = reduce((v - way) ** 2, "s b c h w -> b", "sum") / steps
    return off / reduce(way**2, "b c h w -> b", "sum")
