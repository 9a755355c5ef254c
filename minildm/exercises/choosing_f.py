"""Checks of notebook 05: choosing f under constraints, and the interval of a mean."""

import torch
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function

SEEDS = (3441, 0)  # of tables; in the first each mistake gives another f


def check_choose(fn: object) -> Result:
    """Check `choose(f, numbers, psnr, budget, least)`: three (R,), two floats -> a scalar.

    The largest f among the rungs whose latent has at most `budget` numbers and whose PSNR is at
    least `least`; 0 where there is none. The rungs come in any order.
    """
    praise = "what is good enough comes first, then what makes each step of the UNet cheapest."
    return check_function(fn, [_choice(seed) for seed in SEEDS] + [_none(SEEDS[0])], praise)


def _rungs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """f, numbers and PSNR of a dozen rungs, in any order; each f stands there once."""
    draw = torch.Generator().manual_seed(seed)
    f = torch.randperm(12, generator=draw) + 2.0
    numbers = (200 * (14 - f) * (0.5 + torch.rand(12, generator=draw))).round()
    psnr = 32 - f + 6 * torch.rand(12, generator=draw)
    return f, numbers, psnr


def _choice(seed: int) -> Trial:
    """The right rung has exactly the budget, and the least PSNR that is allowed."""
    f, numbers, psnr = _rungs(seed)
    chosen = f == 8
    budget, least = numbers[chosen].item(), psnr[chosen].item()
    small, good = numbers <= budget, psnr >= least

    def largest(kept: Tensor, by: Tensor = f) -> Tensor:
        """The f of the kept rung with the largest `by`."""
        return f[kept][by[kept].argmax()] if kept.any() else torch.tensor(0.0)

    both = small & good
    mistakes = {
        "that is the best PSNR among those that are allowed; the largest f is asked for.": (
            largest(both, psnr)
        ),
        "the smallest f makes the UNet's steps dearest: take the largest.": largest(both, -f),
        "that is the rung with the fewest numbers; the largest f is asked for.": (
            largest(both, -numbers)
        ),
        "the budget is not kept: that latent has too many numbers.": largest(good),
        "the PSNR is not kept: that rung is not good enough.": largest(small),
        "a rung with exactly the budget, or exactly the PSNR, is allowed too: <= and >=.": (
            largest((numbers < budget) & (psnr > least))
        ),
        "that is the place in the table, not f.": (f * both).argmax().float(),
    }
    return Trial((f, numbers, psnr, budget, least), largest(both), mistakes)


def _none(seed: int) -> Trial:
    f, numbers, psnr = _rungs(seed)
    otherwise = "where no rung meets both constraints it must be 0."
    return Trial((f, numbers, psnr, 1.0, 20.0), torch.tensor(0.0), {}, otherwise)


def check_interval(fn: object) -> Result:
    """Check `interval(values)`: one value a picture (N,) -> (mean, low, high), (3,)."""
    praise = (
        "the mean's own spread shrinks with the root of N: four times the pictures, half as wide."
    )
    return check_function(fn, [_interval_trial(n) for n in (24, 7, 600)], praise)


def _interval_trial(n: int) -> Trial:
    values = 25 + 4 * torch.randn(n, generator=torch.Generator().manual_seed(n)).double()
    mean, std = values.mean(), values.std()
    of_mean, biased = std / n**0.5, values.std(correction=0) / n**0.5

    def around(half: Tensor) -> Tensor:
        return torch.stack([mean, mean - half, mean + half])

    right = around(1.96 * of_mean)
    mistakes = {
        "that is the spread of single pictures; the mean's is √N times narrower.": (
            around(1.96 * std)
        ),
        "std / N is too narrow: variances add up, so it is std / √N.": around(1.96 * std / n),
        "one standard error holds 68 %; take 1.96 of them for 95 %.": around(of_mean),
        "1.96 is missing, and √N, too: that is one standard deviation of the pictures.": (
            around(std)
        ),
        "the variance stands where the standard deviation belongs.": (
            around(1.96 * values.var() / n**0.5)
        ),
        "the deviation divides by N; N − 1 is right where the mean is estimated too.": (
            around(1.96 * biased)
        ),
        "that is the full width on each side; 1.96 standard errors go each way.": (
            around(2 * 1.96 * of_mean)
        ),
        "that holds 95 % of the pictures, not the mean with 95 % confidence.": torch.stack(
            [mean, *values.quantile(values.new_tensor([0.025, 0.975]))]
        ),
        "low and high are swapped.": around(-1.96 * of_mean),
        "the mean comes first, then low, then high.": torch.stack([right[1], mean, right[2]]),
        "that is the median, not the mean.": right - mean + values.median(),
        "the second and third are half-widths; return the ends, mean − and mean +.": torch.stack(
            [mean, 1.96 * of_mean, 1.96 * of_mean]
        ),
    }
    return Trial((values,), right, mistakes)
