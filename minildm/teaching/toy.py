"""Data whose best denoiser has a closed form: what a perfectly trained UNet would return."""

import torch
from torch import Tensor

from minildm.diffusion.samplers import Denoise
from minildm.diffusion.schedule import NoiseSchedule


def mixture_eps(schedule: NoiseSchedule, points: Tensor, s: float = 0.0) -> Denoise:
    """E[eps | z_t] for z_0 = one of `points` (K, c, h, w), each equally likely, plus s N(0, I).

    The posterior over the points is a softmax of their squared distances to z_t; given a point,
    z_0 is Gaussian; the mean of both is the z_0 that leaves eps. With s = 0 this is what a
    network of unlimited capacity learns from a finite set: it returns only what it has seen. With
    one point mu, of any shape that broadcasts, z_0 is N(mu, s^2 I).
    """

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        signal_scale, noise_scale = schedule.scales(t)
        spread = (signal_scale * s) ** 2 + noise_scale**2  # variance of z_t around one point
        gaps = z[:, None] - signal_scale[:, None] * points.to(z)  # (B, K, c, h, w)
        logits = -0.5 * (gaps**2).sum(dim=(2, 3, 4)) / spread.view(-1, 1)
        gap = torch.einsum("bk,bkchw->bchw", logits.softmax(dim=1), gaps)
        return noise_scale * gap / spread

    return denoise
