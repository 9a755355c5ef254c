"""Checks of notebook 01: bits per dimension of a step, and what a latent weighs."""

import math

import torch
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function


def check_bits_per_dim(fn: object) -> Result:
    """Check `bits_per_dim(mean_q, logvar_q, mean_p, logvar_p)`: four (B, c, h, w) -> (B,).

    KL(q || p) of two diagonal Gaussians, in bits, for each number of a picture.
    """
    praise = "nats become bits by 1 / ln 2, and a mean over a picture's numbers makes them per dim."
    mean, logvar = _gaussian(2, 3, 4, 4, seed=2)
    alike = Trial(
        (mean, logvar, mean, logvar),
        torch.zeros(2),
        {},
        "it is right for two different Gaussians, but KL(q || q) must be 0.",
    )
    return check_function(fn, [_bits_trial(2, 3, 4, 5), _bits_trial(1, 4, 2, 2), alike], praise)


def _gaussian(*shape: int, seed: int) -> tuple[Tensor, Tensor]:
    """A mean and a log-variance, wider in one sample than in the next."""
    draw = torch.Generator().manual_seed(seed)
    wider = torch.linspace(-0.5, 0.5, shape[0]).view(-1, 1, 1, 1)
    mean = torch.randn(shape, generator=draw) + wider
    return mean, torch.rand(shape, generator=draw) - 0.5 * seed + wider


def _bits_trial(*shape: int) -> Trial:
    (mean_q, logvar_q), (mean_p, logvar_p) = (_gaussian(*shape, seed=s) for s in (0, 1))
    gap, ratio, axes = mean_q - mean_p, logvar_q - logvar_p, (1, 2, 3)
    nats = 0.5 * (ratio.exp() - 1 - ratio + gap**2 * (-logvar_p).exp())
    turned = 0.5 * ((-ratio).exp() - 1 + ratio + gap**2 * (-logvar_q).exp())
    bits = math.log2(math.e)

    def per_dim(terms: Tensor) -> Tensor:
        return bits * terms.mean(axes)

    mistakes = {
        "those are nats; a bit is ln 2 of them, so divide by it.": nats.mean(axes),
        "it is multiplied by ln 2; a nat is more than a bit: divide.": nats.mean(axes) / bits,
        "those are the bits of a whole picture: take the mean over its numbers.": (
            bits * nats.sum(axes)
        ),
        "that is a whole picture's, in nats: take the mean, and divide by ln 2.": nats.sum(axes),
        "it is divided by h w alone: the channels count as dimensions, too.": (
            bits * nats.sum(axes) / (shape[2] * shape[3])
        ),
        "q and p are swapped: the bits pay for q, where p was expected.": per_dim(turned),
        "the one half in front is missing.": per_dim(2 * nats),
        "the minus one is missing: equal Gaussians would cost something.": per_dim(nats + 0.5),
        "the gap of the means is not weighed: divide its square by p's variance.": per_dim(
            0.5 * (ratio.exp() - 1 - ratio + gap**2)
        ),
        "the gap's square is divided by q's variance; p's belongs there.": per_dim(
            0.5 * (ratio.exp() - 1 - ratio + gap**2 * (-logvar_q).exp())
        ),
        "the gap's square is multiplied by p's variance: divide.": per_dim(
            0.5 * (ratio.exp() - 1 - ratio + gap**2 * logvar_p.exp())
        ),
        "logvar_p divides where the variance belongs: take its exp first.": per_dim(
            0.5 * (ratio.exp() - 1 - ratio + gap**2 / logvar_p)
        ),
        "only the gap of the means is paid for; the variances differ, too.": per_dim(
            0.5 * gap**2 * (-logvar_p).exp()
        ),
        "the gap of the means is missing.": per_dim(0.5 * (ratio.exp() - 1 - ratio)),
        "the log has the wrong sign.": per_dim(
            0.5 * (ratio.exp() - 1 + ratio + gap**2 * (-logvar_p).exp())
        ),
    }
    return Trial((mean_q, logvar_q, mean_p, logvar_p), per_dim(nats), mistakes)


def check_weight(fn: object) -> Result:
    """Check `weight(f, c, codes)`: three (N,) -> (N, 2), compression and bits per pixel.

    First how many times fewer numbers a latent (c, H/f, W/f) has than its picture (3, H, W),
    then how many bits a pixel costs where each latent pixel is one of `codes` codes.
    """
    praise = "positions shrink by f², and a code is one index, however many channels it stands for."
    rows = [(4.0, 3.0, 8192.0), (8.0, 4.0, 256.0), (16.0, 8.0, 16384.0), (2.0, 2.0, 2048.0)]
    one = [(32.0, 16.0, 1024.0)]
    return check_function(fn, [_weight_trial(rows), _weight_trial(one)], praise)


def _weight_trial(rows: list[tuple[float, float, float]]) -> Trial:
    f, c, codes = torch.tensor(rows).T
    numbers, bits = 3 * f**2 / c, codes.log2() / f**2

    def both(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([first, second], dim=1)

    mistakes = {
        "f shrinks both sides: a latent has f² times fewer positions, not f times.": (
            both(3 * f / c, codes.log2() / f)
        ),
        "the bits are right, but a latent has f² times fewer positions, not f times.": (
            both(3 * f / c, bits)
        ),
        "the compression is right, but f² pixels share a code, not f.": (
            both(numbers, codes.log2() / f)
        ),
        "the picture's three channels are forgotten in the compression.": both(f**2 / c, bits),
        "the latent's channels are forgotten in the compression.": both(3 * f**2, bits),
        "all channels are forgotten in the compression: it is 3 f² / c.": both(f**2, bits),
        "the compression is upside down: numbers of the picture over those of the latent.": (
            both(1 / numbers, bits)
        ),
        "the log of the codes is natural: bits want log2.": both(numbers, codes.log() / f**2),
        "a code is one index for all its channels: do not multiply the bits by c.": (
            both(numbers, c * bits)
        ),
        "those are bits per number of the picture: a pixel has three.": both(numbers, bits / 3),
        "that counts codes, not bits: an index among K takes log2 K.": both(numbers, codes / f**2),
        "those are bits of a latent pixel: f² pixels share them.": both(numbers, codes.log2()),
        "the columns are swapped: the compression comes first.": both(bits, numbers),
    }
    return Trial((f, c, codes), both(numbers, bits), mistakes)
