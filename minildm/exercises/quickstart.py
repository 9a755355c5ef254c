"""Checks of notebook 00: the forward process, and classifier-free guidance."""

import torch
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function


def _draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def check_noised(fn: object) -> Result:
    """Check `noised(z0, eps, abar)`: (B, c, h, w), (B, c, h, w), (B,) -> z_t (B, c, h, w)."""
    praise = "z_t keeps a share √ᾱ of the latent and √(1−ᾱ) of noise, for each sample its own."
    # B = w: an abar that is not reshaped broadcasts along the width, without any error.
    return check_function(
        fn, [_noising(1, 3, 4, 4), _noising(4, 3, 4, 4), _noising(2, 3, 4, 5)], praise
    )


def _noising(*shape: int) -> Trial:
    z0, eps = _draw(shape, shape)
    abar = torch.linspace(0.1, 0.8, len(z0))
    a = abar.view(-1, 1, 1, 1)
    signal, noise = a.sqrt(), (1 - a).sqrt()
    mistakes = {
        "the roots are missing: (2) weighs by √ᾱ and √(1−ᾱ), so that the variances add up to 1.": (
            a * z0 + (1 - a) * eps
        ),
        "signal and noise are swapped: √ᾱ belongs to z_0, √(1−ᾱ) to ε.": noise * z0 + signal * eps,
        "the noise's weight is √(1−ᾱ), the root of the difference, not 1 − √ᾱ.": (
            signal * z0 + (1 - signal) * eps
        ),
        "√ᾱ weighs both terms; the noise's weight is √(1−ᾱ).": signal * (z0 + eps),
        "the noise is not weighed; multiply ε by √(1−ᾱ).": signal * z0 + eps,
        "the latent is not weighed; multiply z_0 by √ᾱ.": z0 + noise * eps,
        "the noise is subtracted; (2) adds it.": signal * z0 - noise * eps,
        "ε is missing: that is only the shrunken latent.": signal * z0,
        "every sample gets the first sample's abar; make abar (B, 1, 1, 1) instead.": (
            signal[0] * z0 + noise[0] * eps
        ),
    }
    if shape[0] == shape[-1]:
        wide = abar.sqrt() * z0 + (1 - abar).sqrt() * eps
        mistakes[
            "abar (B,) met the width instead of the batch, silently, as here B = w; "
            "make it (B, 1, 1, 1) with abar.view(-1, 1, 1, 1)."
        ] = wide
    return Trial((z0, eps, abar), signal * z0 + noise * eps, mistakes)


def check_guidance(fn: object) -> Result:
    """Check `guide(eps_null, eps_c, s)`: two predictions (B, c, h, w) and a float -> the same."""
    praise = "s = 0 ignores the condition, s = 1 is the plain conditional, more overshoots it."
    null, c = _draw((2, 3, 4, 5), (2, 3, 4, 5))
    s = 3.0
    mistakes = {
        "eps_null and eps_c are swapped: start at eps_null, go towards eps_c.": c + s * (null - c),
        "it starts at eps_c, so that s = 0 is the plain conditional; here that is s = 1: "
        "start at eps_null.": c + s * (c - null),
        "a sign is wrong: spelled out, the weight of eps_null is 1 − s, not s − 1.": (
            s * c + (s - 1) * null
        ),
        "eps_null is missing: that only makes the predicted noise larger.": s * c,
        "the difference is missing: the step from eps_null is s (eps_c − eps_null).": null + s * c,
        "it returns the step alone; add eps_null, where the step starts.": s * (c - null),
        "it does not use s: that is the plain conditional prediction.": c,
        "it does not use the condition: that is the unconditional prediction.": null,
        "the direction is turned round: that goes away from the condition.": null - s * (c - null),
    }
    otherwise = "its values at s = 3 are not those of (5)."
    trials = [Trial((null, c, s), null + s * (c - null), mistakes, otherwise)]
    for s, must in ((1.0, "eps_c"), (0.0, "eps_null"), (7.5, "far beyond eps_c")):
        otherwise = f"it is right at s = 3, but not at s = {s:g}, where it must be {must}."
        trials.append(Trial((null, c, s), null + s * (c - null), {}, otherwise))
    return check_function(fn, trials, praise)
