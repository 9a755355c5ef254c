"""Checks of notebook 08: the moving average of weights, and what the latents' scale does to SNR."""

import torch
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_ema(fn: object) -> Result:
    """Check `ema(shadow, weights, n, decay)`: two (P,), the update's number, a float -> (P,).

    With the warm-up: the decay is at most (1 + n) / (10 + n).
    """
    praise = "early on the average follows the weights fast, so that it forgets where they began."
    return check_function(
        fn, [_average(700, 0.9), _average(5, 0.9), _average(1, 0.999), _average(40, 0.999)], praise
    )


def _average(n: int, decay: float) -> Trial:
    shadow, weights, warm = _draw(0, 8), _draw(1, 8), (1 + n) / (10 + n)

    def mixed(keep: float) -> Tensor:
        return keep * shadow + (1 - keep) * weights

    d = min(decay, warm)
    mistakes = {
        "the two are swapped: the average keeps the share d of itself.": mixed(1 - d),
        "the warm-up is missing: n is small here, and (1+n)/(10+n) is the smaller decay.": (
            mixed(decay)
        ),
        "(1+n)/(10+n) exceeds decay here, as n is large: d is the smaller of the two.": mixed(warm),
        "the updates are counted from 1: (1 + n)/(10 + n), not n/(9 + n).": (
            mixed(min(decay, n / (9 + n)))
        ),
        "the shares do not add up to 1: the weights' is 1 − d.": d * shadow + weights,
        "it returns the weights: nothing is averaged.": weights,
        "it returns the old average; the new weights never enter.": shadow,
        "that is the plain mean of the two.": (shadow + weights) / 2,
    }
    right = mixed(d)
    # A mistake that happens to be right at this n is none.
    mistakes = {why: wrong for why, wrong in mistakes.items() if not torch.allclose(wrong, right)}
    return Trial((shadow, weights, n, decay), right, mistakes)


def check_snr(fn: object) -> Result:
    """Check `snr(abar, z, scale)`: (T,), unscaled latents (N, c, h, w) of mean 0, float -> (T,)."""
    praise = "SNR goes with the square of the spread: five times too large is 25 times too clear."
    return check_function(fn, [_ratio(2.5, 0.5), _ratio(0.3, 1.0), _ratio(2.0, 2.0)], praise)


def _ratio(std: float, scale: float) -> Trial:
    abar = torch.linspace(0.99, 0.01, 12)
    z = _draw(2, 32, 3, 16, 16)  # so many that N or N − 1 makes no difference
    z = std * (z - z.mean()) / z.std()
    power = z.square().mean() / scale**2
    ratio = abar / (1 - abar)
    right = power * ratio
    mistakes = {
        "the latents do not enter: that is the SNR of latents with a spread of 1.": ratio,
        "the latents are not divided by their scale.": ratio * z.square().mean(),
        "they are multiplied by the scale; encode divides by it.": ratio * power * scale**4,
        "the scale is not squared; the signal's power is the latents' variance over scale².": (
            right * scale
        ),
        "the spread is not squared: a power is a variance, not a standard deviation.": (
            power.sqrt() * ratio
        ),
        "that is the ratio of the spreads; SNR is that of the powers, its square.": right.sqrt(),
        "it is upside down: that is noise over signal.": 1 / right,
        "the noise is missing: divide by its power, 1 − ᾱ.": power * abar,
        "that is the signal's share of the whole, not its ratio to the noise.": (
            power * abar / (power * abar + 1 - abar)
        ),
        "the roots of ᾱ and 1 − ᾱ are weights; SNR is made of powers.": power * ratio.sqrt(),
        "that is its logarithm.": right.log(),
    }
    mistakes = {why: wrong for why, wrong in mistakes.items() if not torch.allclose(wrong, right)}
    return Trial((abar, z, scale), right, mistakes)
