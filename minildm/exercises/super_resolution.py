"""Checks of notebook 13: how true a large picture is to the small one, and guiding by a picture."""

import math

import torch
from einops import reduce, repeat
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function

MEANS = "b c (h i) (w j) -> b c h w"


def check_kept(fn: object) -> Result:
    """Check `kept(x, low_res)`: PSNR in dB of x, shrunk by the means of 4 x 4 blocks, to low_res.

    x (B, 3, 4h, 4w), low_res (B, 3, h, w), both in [-1, 1] -> (B,); the peak is that of [0, 1].
    """
    praise = "it says how true a picture is to what was given, whatever else it shows."
    return check_function(fn, [_kept_trial(3, 4, 5), _kept_trial(1, 2, 2)], praise)


def _kept_trial(b: int, h: int, w: int) -> Trial:
    generator = torch.Generator().manual_seed(b)
    x = 2 * torch.rand(b, 3, 4 * h, 4 * w, generator=generator) - 1
    low_res = 2 * torch.rand(b, 3, h, w, generator=generator) - 1
    small = reduce(x, MEANS, "mean", i=4, j=4)

    def error(small: Tensor = small, low_res: Tensor = low_res) -> Tensor:
        return reduce((small - low_res) ** 2 / 4, "b c h w -> b", "mean")

    right = -10 * error().log10()
    enlarged = repeat(low_res, "b c h w -> b c (h i) (w j)", i=4, j=4)
    sums = reduce((small - low_res) ** 2 / 4, "b c h w -> b", "sum")
    mistakes = {
        "the sign is wrong: a smaller error is more decibels.": -right,
        "values of [-1, 1] span 2, not 1: the error is four times too large.": (
            right - 20 * math.log10(2)
        ),
        "the logarithm is that of e; decibels take that of 10.": -10 * error().log(),
        "20 goes with the root of the error, 10 with its square.": 2 * right,
        "the squares are summed; PSNR takes their mean.": -10 * sums.log10(),
        "that is the error, not yet its decibels.": error(),
        "it picks every fourth pixel; the small picture holds the means of 4 × 4 blocks.": (
            -10 * error(x[..., ::4, ::4]).log10()
        ),
        "it enlarges low_res and compares there; shrink x instead.": -10
        * error(x, enlarged).log10(),
    }
    if b > 1:  # else they are the same
        mistakes["each picture has a PSNR of its own; yours is that of all together."] = (
            -10 * error().mean().log10().expand(b)
        )
    otherwise = "its values are not the PSNR of x, shrunk, to low_res."
    return Trial((x, low_res), right, mistakes, otherwise)


def check_steered(fn: object) -> Result:
    """Check `steered(eps_theta, z, y, abar, scale)`: one guided eps, appendix C, Eqs. 14-17.

    eps_theta: z -> eps_hat. z, y (B, c, h, w): noised latent, and the clean one that is wanted;
    abar (B,); the distance is 1/2 |y - z0_hat|^2, summed over each sample -> (B, c, h, w).
    """
    praise = "the gradient goes through the network, and the noise takes a step against it."
    trials = [_steered_trial(3, 2.0, 0.7), _steered_trial(2, 0.5, 1.0), _steered_trial(1, 0.0, 0.3)]
    return check_function(fn, trials, praise)


def _steered_trial(b: int, scale: float, bend: float) -> Trial:
    """eps_theta(z) = bend tanh(z), whose slope is known."""
    generator = torch.Generator().manual_seed(b)
    z, y = (torch.randn(b, 2, 3, 3, generator=generator) for _ in range(2))
    abar = torch.linspace(0.3, 0.8, b)
    a, s = (part.view(-1, 1, 1, 1).sqrt() for part in (abar, 1 - abar))

    def eps_theta(z: Tensor) -> Tensor:
        return bend * torch.tanh(z)

    eps = eps_theta(z)
    missed = (z - s * eps) / a - y  # z0_hat - y
    slope = missed * (1 - s * bend * (1 - torch.tanh(z) ** 2)) / a
    right = eps + scale * s * slope
    mistakes: dict[str, Tensor] = {}
    if scale:
        mistakes = {
            "the sign is wrong: against the gradient the noise grows, and z0_hat comes nearer.": (
                eps - scale * s * slope
            ),
            "√(1 − ᾱ) is missing before the gradient.": eps + scale * slope,
            "the gradient has the factor 1 − ᾱ; it is the root.": eps + scale * s**2 * slope,
            "√ᾱ stands before the gradient; it is √(1 − ᾱ).": eps + scale * a * slope,
            "the gradient does not go through eps_theta; is it detached?": (
                eps + scale * s * missed / a
            ),
            "the gradient is that by z0_hat; it is taken by z.": eps + scale * s * missed,
            "the factor 1/2 of the distance is missing.": eps + 2 * scale * s * slope,
            "the distance is a mean; it is a sum.": eps + scale * s * slope / y[0].numel(),
            "eps_theta is not guided at all.": eps,
            "that is the step alone, without eps_theta's own answer.": scale * s * slope,
        }
        if scale != 1:
            mistakes["the scale is missing."] = eps + s * slope
    otherwise = "its values are not those of (3)."
    return Trial((eps_theta, z, y, abar, scale), right, mistakes, otherwise)
