"""Data whose best denoiser has a closed form: what a perfectly trained UNet would return."""

import torch
from torch import Tensor

from minildm.schedule import NoiseSchedule
from minildm.types import Denoise


def gaussian_eps(schedule: NoiseSchedule, mu: float, s: float) -> Denoise:
    """E[eps | z_t] for z_0 ~ N(mu, s^2 I); s = 0 is a single point."""

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        signal_scale, noise_scale = schedule.scales(t)
        return noise_scale * (z - signal_scale * mu) / ((signal_scale * s) ** 2 + noise_scale**2)

    return denoise


def mixture_eps(schedule: NoiseSchedule, points: Tensor) -> Denoise:
    """E[eps | z_t] for z_0 one of `points` (K, c, h, w), each equally likely.

    The posterior over the points is a softmax of their squared distances to z_t; its mean is
    the z_0 that leaves eps. Training on a finite set with no bound on the network ends here.
    """

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        signal_scale, noise_scale = schedule.scales(t)
        gaps = z[:, None] - signal_scale[:, None] * points[None]  # (B, K, c, h, w)
        logits = -0.5 * (gaps**2).sum(dim=(2, 3, 4)) / noise_scale.view(-1, 1) ** 2
        z0 = torch.einsum("bk,kchw->bchw", logits.softmax(dim=1), points)
        return schedule.eps_from_z0(z, t, z0)

    return denoise
