"""Steering a sampler by changing what its denoiser returns."""

import torch
from torch import Tensor

from minildm.types import Conditioning, Denoise, EpsTheta


def cat_conditions(first: Conditioning, second: Conditioning) -> Conditioning:
    """Two conditions as one batch, first before second."""
    return Conditioning(
        *(None if a is None else torch.cat([a, b]) for a, b in zip(first, second, strict=True))
    )


def conditioned(eps_theta: EpsTheta, c: Conditioning) -> Denoise:
    """Bind a condition: eps_theta(z, t, c) -> denoise(z, t)."""
    return lambda z, t: eps_theta(z, t, c)


def guided(
    eps_theta: EpsTheta, c: Conditioning, c_null: Conditioning, guidance_scale: float
) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022), in one doubled call, null first.

    eps_hat = eps_null + s (eps_c - eps_null): s = 0 unconditional, 1 the plain conditional,
    larger follows the condition more closely than the data do.
    """
    if guidance_scale == 1.0:
        return conditioned(eps_theta, c)
    both = cat_conditions(c_null, c)

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        eps_null, eps_c = eps_theta(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        return eps_null + guidance_scale * (eps_c - eps_null)

    return denoise
