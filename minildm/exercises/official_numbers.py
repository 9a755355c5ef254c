"""Checks of notebook 18: a scale and a shift folded into a convolution, the official times."""

import torch
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_folded(fn: object) -> Result:
    """Check `folded(weight, bias, scale, shift)`: (o, i), (o,), float, (i,) -> (o, i + 1).

    A 1 x 1 convolution of z * scale + shift as one of z: its weights, and beside them its bias.
    """
    praise = "what is linear in z can move into the layer that follows, and nobody sees it."
    return check_function(fn, [_fold(0, 2.5), _fold(1, 0.4)], praise)


def _fold(seed: int, scale: float) -> Trial:
    weight, bias, shift = _draw(seed, 4, 3), _draw(seed + 10, 4), _draw(seed + 20, 3)

    def beside(w: Tensor, b: Tensor) -> Tensor:
        return torch.cat([w, b[:, None]], dim=1)

    moved = weight @ shift
    mistakes = {
        "the scale is missing: it multiplies the weights.": beside(weight, bias + moved),
        "the shift is missing: what the weights make of it goes to the bias.": (
            beside(scale * weight, bias)
        ),
        "the old bias is missing.": beside(scale * weight, moved),
        "the shift comes after the scale: it must not be scaled, too.": (
            beside(scale * weight, bias + scale * moved)
        ),
        "the weights are divided by the scale; z is multiplied by it.": (
            beside(weight / scale, bias + moved)
        ),
        "the bias is scaled; only what multiplies z is.": (
            beside(scale * weight, scale * bias + moved)
        ),
        "the shift has the wrong sign.": beside(scale * weight, bias - moved),
    }
    return Trial((weight, bias, scale, shift), beside(scale * weight, bias + moved), mistakes)


def check_times(fn: object) -> Result:
    """Check `times(T, S)`: two ints -> the official DDIM's times in the order of sampling."""
    praise = "and at S = 30 there are 31 of them: the official code does what its range says."
    return check_function(fn, [_times(1000, 50), _times(1000, 20), _times(1000, 30)], praise)


def _times(T: int, S: int) -> Trial:
    right = torch.arange(0, T, T // S).flip(0) + 1
    mistakes = {
        "that is the order of noising: sampling begins at the largest time.": right.flip(0),
        "each is one too small: the official code adds one.": right - 1,
        "each is one too large.": right + 1,
        "that is trailing spacing, which begins at the last time.": (
            torch.arange(T, 0, -(T // S)) - 1
        ),
    }
    cut = right[-S:]
    if len(cut) == len(right):
        return Trial((T, S), right, mistakes)
    return Trial((T, S), right, mistakes, "T // S rounds down, so that the last step is at S + 1.")
