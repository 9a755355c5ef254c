"""Steering a sampler by changing what its denoiser returns, or z between its steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from minildm.conditioning import Conditioning
from minildm.diffusion.objective import EpsTheta
from minildm.diffusion.samplers import NO_SIGNAL, Denoise, EditFn
from minildm.diffusion.schedule import NoiseSchedule, Prediction
from minildm.layers import Noise


def guided(
    eps_theta: EpsTheta,
    c: Conditioning,
    c_null: Conditioning,
    guidance_scale: float,
    *,
    rescale: float = 0.0,
    interval: tuple[int, int] | None = None,
) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022), in one doubled call, null first.

    eps_hat = eps_null + s (eps_c - eps_null): s = 0 unconditional, 1 the plain conditional,
    larger follows the condition more closely than the data do; the same for z0 or v. rescale, 0
    to 1: how much of the added standard deviation is removed again (Lin et al. 2024, Eqs. 15-16).
    interval: the lowest and highest time to guide at, in any order; at others a single conditional
    call (Kynkaanniemi et al. 2024).
    """
    if guidance_scale == 1.0:
        return lambda z, t: eps_theta(z, t, c)
    pairs = zip(c_null, c, strict=True)  # tokens, concat
    both = Conditioning(*(None if a is None else torch.cat([a, b]) for a, b in pairs))

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        # On a GPU reading t waits for the device, so only an interval does.
        if interval is not None and not min(interval) <= int(t[0]) <= max(interval):
            return eps_theta(z, t, c)
        eps_null, eps_c = eps_theta(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        eps_hat = eps_null + guidance_scale * (eps_c - eps_null)
        if rescale:
            ratio = eps_c.std((1, 2, 3), keepdim=True) / eps_hat.std((1, 2, 3), keepdim=True)
            eps_hat = eps_hat * (rescale * ratio + 1 - rescale)
        return eps_hat

    return denoise


def image_guided(
    denoise: Denoise, schedule: NoiseSchedule, distance: Callable[[Tensor], Tensor], scale: float
) -> Denoise:
    """Post-hoc image guiding, LDM appendix C, Eqs. 14-17: an image y steers any trained model.

    eps_hat = eps + scale sqrt(1 - abar) grad_z distance(z0_hat(z)). denoise: (z, t) -> Prediction,
    as `guide` of `LatentDiffusion.sample` is given it. distance: (B, c, h, w) -> (B,), how far a
    clean latent is from the target, such as 1/2 |y - T(D(z0))|^2 with a differentiable T. Where z
    has hardly any signal it is not steered. Not for zero terminal SNR: eps says nothing of z0.
    """

    def steered(z: Tensor, t: Tensor) -> Prediction:
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            eps, z0 = denoise(z, t)
            slope = torch.autograd.grad(distance(z0).sum(), z)[0]
        signal, noise = schedule.scales(t)
        eps_hat = eps.detach() + scale * (signal**2 > NO_SIGNAL) * noise * slope
        return schedule.prediction("eps", eps_hat, z.detach(), t)

    return steered


def keep_known(
    schedule: NoiseSchedule, z_known: Tensor, mask: Tensor, noise: Noise = torch.randn_like
) -> EditFn:
    """Training-free inpainting by mask blending, as an `edit` of any sampler.

    Where mask (B, 1, h, w) or (B, c, h, w), in [0, 1], is 1, z_t is replaced by the known latent
    z_known (B, c, h, w), noised to t; where it is 0 the sampler goes on (the official code's
    convention, and RePaint's without resampling, Lugmayr et al. 2022). One mask or latent serves
    a batch. The last step's result is not blended: paste the known pixels where they must be exact.
    """

    def edit(z: Tensor, t: Tensor) -> Tensor:
        known = schedule.q_sample(z_known, t, noise(z_known))
        return mask * known + (1 - mask) * z

    return edit
