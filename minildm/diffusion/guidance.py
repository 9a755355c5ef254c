"""Steering a sampler by changing what its denoiser returns, or z between its steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from minildm.conditioning import Conditioning
from minildm.diffusion.objective import EpsTheta
from minildm.diffusion.samplers import Denoise, EditFn
from minildm.diffusion.schedule import NoiseSchedule, Prediction
from minildm.layers import Noise


def cat_conditions(first: Conditioning, second: Conditioning) -> Conditioning:
    """Two conditions as one batch, first before second."""
    return Conditioning(
        *(None if a is None else torch.cat([a, b]) for a, b in zip(first, second, strict=True))
    )


def conditioned(eps_theta: EpsTheta, c: Conditioning) -> Denoise:
    """Bind a condition: eps_theta(z, t, c) -> denoise(z, t)."""
    return lambda z, t: eps_theta(z, t, c)


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
    to 1: how much of the added standard deviation is taken away again (Lin et al. 2024, Eqs.
    15-16). interval: the first and last time to guide at; at others a single conditional call
    (Kynkaanniemi et al. 2024). Raises ValueError for a rescale or an interval out of range.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale={rescale} must lie in [0, 1]")
    if interval is not None and not 0 <= interval[0] <= interval[1]:
        raise ValueError(f"interval={interval} must be two times (first, last), 0 <= first <= last")
    conditional = conditioned(eps_theta, c)
    if guidance_scale == 1.0:
        return conditional
    both = cat_conditions(c_null, c)

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        # On a GPU reading t waits for the device, so only an interval does.
        if interval is not None and not interval[0] <= int(t[0]) <= interval[1]:
            return conditional(z, t)
        eps_null, eps_c = eps_theta(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        eps_hat = eps_null + guidance_scale * (eps_c - eps_null)
        if rescale:
            dims = tuple(range(1, z.ndim))
            least = torch.finfo(z.dtype).tiny  # an untrained network returns 0: 0 / 0
            spread = eps_hat.std(dims, keepdim=True).clamp(min=least)
            ratio = eps_c.std(dims, keepdim=True) / spread
            eps_hat = eps_hat * (rescale * ratio + 1 - rescale)
        return eps_hat

    return denoise


def image_guided(
    denoise: Denoise,
    schedule: NoiseSchedule,
    distance: Callable[[Tensor], Tensor],
    scale: float = 1.0,
) -> Denoise:
    """Post-hoc image guiding, LDM appendix C, Eqs. 14-17: an image y steers any trained model.

    eps_hat = eps + scale sqrt(1 - abar) grad_z distance(z0_hat(z)). `distance` (B, c, h, w) ->
    (B,) says how far a clean latent is from what is wanted, such as 1/2 |y - T(D(z0))|^2 with
    the decoder D and a differentiable T, or a perceptual distance; ValueError for another shape.
    The gradient goes through the denoiser; gradients are enabled for it alone. Where abar = 0
    z_t says nothing of z0, and the denoiser's answer stays.
    """

    def steered(z: Tensor, t: Tensor) -> Prediction:
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            out = denoise(z, t)
            if not isinstance(out, Prediction):
                out = schedule.prediction("eps", out, z, t)
            far = distance(out.z0)
            if far.shape != z.shape[:1]:
                raise ValueError(
                    f"distance must return one number per sample, ({len(z)},), got "
                    f"{tuple(far.shape)}"
                )
            slope = torch.autograd.grad(far.sum(), z)[0]
        signal_scale, noise_scale = schedule.scales(t)
        eps_hat = out.eps.detach() + scale * noise_scale * slope
        z0_hat = schedule.z0_from_eps(z.detach(), t, eps_hat)
        some = signal_scale > 0
        return Prediction(
            torch.where(some, eps_hat, out.eps.detach()), torch.where(some, z0_hat, out.z0.detach())
        )

    return steered


def keep_known(
    schedule: NoiseSchedule, z_known: Tensor, mask: Tensor, noise: Noise = torch.randn_like
) -> EditFn:
    """Training-free inpainting by mask blending, as an `edit` of any sampler.

    Where mask (B, 1, h, w) or (B, c, h, w) is 1, z_t is replaced by the known latent z_known
    (B, c, h, w), noised to t; where it is 0 the sampler goes on (the official code's convention,
    and RePaint's without resampling, Lugmayr et al. 2022). One mask or latent serves a batch.
    The last step's result is not blended: paste the known pixels where they must be exact.
    Raises ValueError for a mask outside [0, 1].
    """
    if not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError(f"mask must lie in [0, 1], got {mask.min():.3g}..{mask.max():.3g}")

    def edit(z: Tensor, t: Tensor) -> Tensor:
        known = schedule.q_sample(z_known, t, noise(z_known))
        return mask * known + (1 - mask) * z

    return edit
