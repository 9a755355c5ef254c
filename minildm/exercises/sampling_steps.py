"""Checks of notebook 09: one step of DDIM, and one of Heun's method."""

from collections.abc import Callable

import torch
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_ddim(fn: object) -> Result:
    """Check `step(z, eps_hat, abar, abar_prev, sigma, noise)` -> z at the lower noise level.

    z, eps_hat, noise (B, c, h, w); abar and abar_prev tensors (), sigma a float.
    """
    praise = "z0_hat and eps_hat are mixed anew; what sigma adds of noise, eps_hat has to yield."
    trials = [_ddim_trial(0.2, 0.5, 0.3), _ddim_trial(0.2, 0.5, 0.0), _ddim_trial(0.7, 1.0, 0.0)]
    return check_function(fn, trials, praise)


def _ddim_trial(a: float, b: float, sigma: float) -> Trial:
    shape = (2, 3, 4, 5)
    z, eps, noise = (_draw(seed, *shape) for seed in range(3))
    abar, prev = torch.tensor(a), torch.tensor(b)
    z0 = (z - (1 - abar).sqrt() * eps) / abar.sqrt()

    def mixed(z0: Tensor, way: Tensor, random: Tensor | float = sigma * noise) -> Tensor:
        return prev.sqrt() * z0 + way * eps + random

    kept = (1 - prev - sigma**2).sqrt()
    right = mixed(z0, kept)
    mistakes = {
        "sigma's noise comes on top: eps_hat must yield as much, √(1−ᾱ'−σ²).": (
            mixed(z0, (1 - prev).sqrt())
        ),
        "eps_hat's weight is a root: √(1−ᾱ'−σ²).": mixed(z0, 1 - prev - sigma**2),
        "under the root stands σ², not σ.": mixed(z0, (1 - prev - sigma).clamp(min=0).sqrt()),
        "the noise is missing: add σ times it.": mixed(z0, kept, 0.0),
        "the noise is not weighed by σ.": mixed(z0, kept, noise),
        "the noise's weight is σ, not σ²: σ is a standard deviation.": (
            mixed(z0, kept, sigma**2 * noise)
        ),
        "it mixes for the level where the step began; go to ᾱ'.": (
            abar.sqrt() * z0 + (1 - abar - sigma**2).clamp(min=0).sqrt() * eps + sigma * noise
        ),
        "z0_hat is not divided by √ᾱ.": mixed(z - (1 - abar).sqrt() * eps, kept),
        "z0_hat divides by ᾱ; it must be its root.": (
            mixed((z - (1 - abar).sqrt() * eps) / abar, kept)
        ),
        "z0_hat takes the noise away with the weight 1 − ᾱ; it must be its root.": (
            mixed((z - (1 - abar) * eps) / abar.sqrt(), kept)
        ),
        "z0_hat is made with ᾱ' in place of ᾱ; z is still at ᾱ.": (
            mixed((z - (1 - prev).sqrt() * eps) / prev.sqrt(), kept)
        ),
        "z0_hat is not weighed by √ᾱ'.": z0 + kept * eps + sigma * noise,
        "z stands where z0_hat belongs.": mixed(z, kept),
        "that is z0_hat alone: the whole way in one step.": z0,
        "it returns z unchanged.": z,
    }
    mistakes = {why: wrong for why, wrong in mistakes.items() if not torch.allclose(wrong, right)}
    otherwise = "its values are not those of (2)" + ("" if sigma else " with σ = 0") + "."
    return Trial((z, eps, abar, prev, sigma, noise), right, mistakes, otherwise)


def check_heun(fn: object) -> Result:
    """Check `heun(x, sigma, sigma_next, slope)`: slope(x, sigma) -> dx / dsigma; x (N,) -> (N,)."""
    praise = "Euler tries the step, and the mean of the slopes at its two ends takes it."
    return check_function(fn, [_heun_trial(3.0, 1.0), _heun_trial(0.5, 0.2)], praise)


def _slope(mu: float, spread: float) -> Callable[[Tensor, float], Tensor]:
    """eps of Gaussian data as a function of x and sigma."""
    return lambda x, sigma: sigma * (x - mu) / (spread**2 + sigma**2)


def _heun_trial(sigma: float, end: float) -> Trial:
    x, slope, way = 2 * _draw(3, 7), _slope(1.0, 0.7), end - sigma
    first = slope(x, sigma)
    trial = x + way * first
    there, half = slope(trial, end), (sigma + end) / 2
    mistakes = {
        "that is Euler's step; now ask for the slope at its end, and average the two.": trial,
        "that goes with the slope at the end alone; take the mean of both.": x + way * there,
        "the slopes are added up; their mean is half of that.": x + way * (first + there),
        "the second slope is asked for at the old x; ask at the end of Euler's step.": (
            x + way * (first + slope(x, end)) / 2
        ),
        "the second slope is asked for at the old sigma; Euler's step ends at sigma_next.": (
            x + way * (first + slope(trial, sigma)) / 2
        ),
        "it goes on from the end of Euler's step; the corrected step begins at x again.": (
            trial + way * (first + there) / 2
        ),
        "that is the midpoint rule: also of second order, and another method.": (
            x + way * slope(x + way / 2 * first, half)
        ),
        "it goes the wrong way: the step is sigma_next − sigma, and negative.": (
            x - way * (first + slope(x - way * first, end)) / 2
        ),
        "the tried step goes the wrong way: sigma_next − sigma is negative.": (
            x + way * (first + slope(x - way * first, end)) / 2
        ),
        "the last step goes the wrong way: sigma_next − sigma is negative.": (
            x - way * (first + there) / 2
        ),
        "that is the mean slope; take the step with it.": (first + there) / 2,
        "the tried step is not scaled by sigma_next − sigma.": (
            x + way * (first + slope(x + first, end)) / 2
        ),
        "it returns x unchanged.": x,
    }
    return Trial((x, sigma, end, slope), x + way * (first + there) / 2, mistakes)
