"""Checks of notebook 02: the KL penalty on a posterior, and the scale of the latents."""

import torch
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function


def _moments(*shape: int) -> tuple[Tensor, Tensor]:
    """A mean and a log-variance, with a spread and a level that differ along the first axis."""
    draw = torch.Generator().manual_seed(0)
    first = torch.linspace(-1.5, 1.5, shape[0]).view(-1, *[1] * (len(shape) - 1))
    mean = (1.5 + first) * torch.randn(shape, generator=draw) + 2 * first + 0.7
    return mean, torch.rand(shape, generator=draw) + first - 0.4


def check_kl(fn: object) -> Result:
    """Check `kl(mean, logvar)`: twice (B, c, h, w) -> nats of each latent (B,)."""
    praise = "nothing is paid where mean = 0 and logvar = 0, and the log grows as the std shrinks."
    nothing = torch.zeros(2, 3, 2, 2)
    otherwise = "it is right for some latents, but KL(N(0, I) || N(0, I)) must be 0."
    at_rest = Trial((nothing, nothing), torch.zeros(2), {}, otherwise)
    return check_function(fn, [_kl_trial(2, 3, 4, 5), _kl_trial(1, 4, 2, 2), at_rest], praise)


def _kl_trial(*shape: int) -> Trial:
    mean, logvar = _moments(*shape)
    var, size = logvar.exp(), (1, 2, 3)

    def total(terms: Tensor) -> Tensor:
        return 0.5 * terms.sum(size)

    right = mean**2 + var - 1 - logvar
    mistakes = {
        "the minus one is missing: a standard Gaussian would pay for each of its values.": (
            total(right + 1)
        ),
        "that is the mean over a latent's values; (2) sums them.": 0.5 * right.mean(size),
        "the one half in front is missing.": 2 * total(right),
        "logvar stands where the variance belongs: take its exp there.": (
            total(mean**2 + logvar - 1 - logvar)
        ),
        "exp(0.5 logvar) is the standard deviation; (2) has the variance, exp(logvar).": (
            total(mean**2 + (0.5 * logvar).exp() - 1 - logvar)
        ),
        "that takes logvar for the log of the standard deviation: no factor 2 is needed.": (
            total(mean**2 + (2 * logvar).exp() - 1 - 2 * logvar)
        ),
        "the variance enters squared; exp(logvar) is the variance already.": (
            total(mean**2 + var**2 - 1 - logvar)
        ),
        "the log has the wrong sign: a small variance must cost, so subtract logvar.": (
            total(mean**2 + var - 1 + logvar)
        ),
        "the mean is not squared.": total(mean + var - 1 - logvar),
        "the mean is missing: a posterior far from 0 must cost too.": total(var - 1 - logvar),
        "the whole sign is turned round; a KL divergence is never negative.": -total(right),
    }
    return Trial((mean, logvar), total(right), mistakes)


def check_scale(fn: object) -> Result:
    """Check `scale(mean, logvar)`: a set's moments, n batches (n, B, c, h, w), -> a scalar."""
    praise = "the variance of a draw is that of the means plus the mean of the variances."
    return check_function(fn, [_scale_trial(6, 4, 3, 16, 16), _scale_trial(3, 8, 4, 16, 8)], praise)


def _scale_trial(*shape: int) -> Trial:
    mean, logvar = _moments(*shape)
    var, axes = logvar.exp(), (1, 2, 3, 4)
    of_means, within = mean.var(), var.mean()
    right = (of_means + within).sqrt()
    mistakes = {
        "that is the spread of the means alone; each draw adds its own variance.": of_means.sqrt(),
        "that is the posteriors' own spread; the means differ, too.": within.sqrt(),
        "that averages over batches, so what sets one batch apart from the next is lost; take the "
        "variance over the whole set.": (mean.var(axes) + var.mean(axes)).sqrt().mean(),
        "that is the first batch's; the set has more.": (mean[0].var() + var[0].mean()).sqrt(),
        "variances add up, standard deviations do not: add first, then take the root.": (
            of_means.sqrt() + within.sqrt()
        ),
        "the root is missing: that is the variance.": right**2,
        "that adds the square of the mean standard deviation; (5) has the mean variance.": (
            (of_means + (0.5 * logvar).exp().mean() ** 2).sqrt()
        ),
        "logvar stands where the variance belongs: take its exp first, then the mean.": (
            (of_means + logvar.mean()).clamp(min=0).sqrt()
        ),
        "the exp comes before the mean: exp(mean of logvar) is not the mean variance.": (
            (of_means + logvar.mean().exp()).sqrt()
        ),
        "that is the root of the mean square; a spread is about the mean, so subtract it.": (
            (mean.square().mean() + within).sqrt()
        ),
        "it is inverted: that is the paper's factor, which latents are multiplied by.": 1 / right,
    }
    return Trial((mean, logvar), right, mistakes)
