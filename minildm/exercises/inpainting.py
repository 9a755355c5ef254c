"""Checks of notebook 14: what stands beside z_t, and one step of mask blending."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function


def check_beside(fn: object) -> Result:
    """Check `beside(z_t, z_masked, mask, f)`: the UNet's input (B, 2c + 1, h, w).

    z_t and z_masked (B, c, h, w), mask (B, 1, f h, f w) with 1 = known, f int. The mask is 1 in
    the hole and -1 elsewhere, nearest in the latent's grid, as in minildm.spatial.MaskedPicture.
    """
    praise = "what is noisy, what is known, and where: 1 in the hole, -1 elsewhere."
    return check_function(fn, [_beside_trial(2, 3, 4), _beside_trial(1, 4, 2)], praise)


def _beside_trial(b: int, c: int, f: int) -> Trial:
    draw = torch.Generator().manual_seed(f)
    z_t, z_masked = (torch.randn(b, c, 4, 6, generator=draw) for _ in range(2))
    mask = (torch.rand(b, 1, 4 * f, 6 * f, generator=draw) < 0.6).float()
    corner = mask[..., ::f, ::f]  # nearest: the first pixel of each f x f

    def joined(*parts: Tensor) -> Tensor:
        return torch.cat(parts, dim=1)

    hole = 1 - 2 * corner
    softened = 1 - 2 * F.avg_pool2d(mask, f)
    other = 1 - 2 * F.interpolate(mask, scale_factor=1 / f, mode="bilinear")
    mistakes = {
        "the polarity is turned round: 1 is the hole, -1 what is known.": joined(
            z_t, z_masked, -hole
        ),
        "the mask goes in as it came, 1 = known: the network reads 1 as the hole.": joined(
            z_t, z_masked, corner
        ),
        "the hole is 1, but what is known is 0; it must be -1.": joined(z_t, z_masked, 1 - corner),
        "z_t and the masked picture's latent are swapped: z_t comes first.": joined(
            z_masked, z_t, hole
        ),
        "the mask comes before the masked picture's latent; it comes last.": joined(
            z_t, hole, z_masked
        ),
        "the mask comes first; z_t does, and the mask last.": joined(hole, z_t, z_masked),
        "the mask is averaged: it is nearest, so that it stays 1 or -1.": joined(
            z_t, z_masked, softened
        ),
        "the mask is interpolated: it is nearest, so that it stays 1 or -1.": joined(
            z_t, z_masked, other
        ),
        "z_t stands there twice; the masked picture's latent follows it.": joined(z_t, z_t, hole),
    }
    right = joined(z_t, z_masked, hole)
    otherwise = "its values are not z_t, z_masked and 1 - 2 mask, in this order."
    return Trial((z_t, z_masked, mask, f), right, mistakes, otherwise)


def check_blend(fn: object) -> Result:
    """Check `blend(z_t, z_known, mask, eps, abar)`: z_t (B, c, h, w) with what is known set.

    z_known, clean, and eps (B, c, h, w), mask (B, 1, h, w) with 1 = known, abar (B, 1, 1, 1).
    """
    praise = "what is known is as noisy as z_t, and the hole is the sampler's."
    return check_function(fn, [_blend_trial(2, 3), _blend_trial(1, 4)], praise)


def _blend_trial(b: int, c: int) -> Trial:
    draw = torch.Generator().manual_seed(c)
    z_t, z_known, eps = (torch.randn(b, c, 4, 6, generator=draw) for _ in range(3))
    mask = (torch.rand(b, 1, 4, 6, generator=draw) < 0.5).float()
    abar = 0.2 + 0.6 * torch.rand(b, 1, 1, 1, generator=draw)
    noised = abar.sqrt() * z_known + (1 - abar).sqrt() * eps

    def blended(known: Tensor, rest: Tensor = z_t) -> Tensor:
        return mask * known + (1 - mask) * rest

    mistakes = {
        "the mask is turned round: 1 is what is known, and the hole stays z_t.": (
            mask * z_t + (1 - mask) * noised
        ),
        "what is known goes in clean; it must be as noisy as z_t.": blended(z_known),
        "the roots are missing: √ᾱ weighs the latent, √(1 − ᾱ) the noise.": blended(
            abar * z_known + (1 - abar) * eps
        ),
        "√ᾱ and √(1 − ᾱ) are swapped.": blended((1 - abar).sqrt() * z_known + abar.sqrt() * eps),
        "the noise of what is known is not weighed by √(1 − ᾱ).": blended(
            abar.sqrt() * z_known + eps
        ),
        "the known latent is not weighed by √ᾱ.": blended(z_known + (1 - abar).sqrt() * eps),
        "the noise is missing in what is known.": blended(abar.sqrt() * z_known),
        "z_t is noised again; it is noisy already.": blended(
            noised, abar.sqrt() * z_t + (1 - abar).sqrt() * eps
        ),
        "the two are added where they must be chosen by the mask.": noised + z_t,
        "the hole is left empty: there it stays z_t.": mask * noised,
        "the hole is filled with what is known: there it stays z_t.": noised,
        "that is z_t as it came; what is known is not set.": z_t,
    }
    otherwise = "its values are not those of (3)."
    return Trial((z_t, z_known, mask, eps, abar), blended(noised), mistakes, otherwise)
