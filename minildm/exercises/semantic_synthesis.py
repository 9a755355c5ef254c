"""Checks of notebook 15: a map as shares of labels, and pictures put together from tiles."""

import torch
import torch.nn.functional as F

from minildm.exercises.result import Result, Trial, check_function


def check_shares(fn: object) -> Result:
    """Check `shares(maps, labels, f)`: (B, H, W) int64, int, int -> (B, labels, H/f, W/f).

    Each cell of f x f pixels as the share of each label in it, (1) and (2) of the notebook.
    """
    praise = "a pixel of the latent knows which labels are in its cell, and how much of each."
    trials = [_shares_trial(2, 4, 8, 3, 2), _shares_trial(1, 8, 8, 5, 4)]
    return check_function(fn, trials, praise)


def _shares_trial(b: int, h: int, w: int, labels: int, f: int) -> Trial:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(labels - 1, (b, h, w), generator=generator)  # the last is in none
    onehot = F.one_hot(maps, labels).permute(0, 3, 1, 2).float()
    right = F.avg_pool2d(onehot, f)
    corner = onehot[:, :, ::f, ::f]
    mistakes = {
        "that takes one pixel of each cell and forgets the others.": corner,
        "that takes the last pixel of each cell and forgets the others.": (
            onehot[:, :, f - 1 :: f, f - 1 :: f]
        ),
        "these are counts; divide by the f² pixels of a cell.": right * f**2,
        "it divides by f; a cell has f² pixels.": right * f,
        "that is the most frequent label alone; keep the shares of all.": (
            F.one_hot(right.argmax(1), labels).permute(0, 3, 1, 2).float()
        ),
        "that says whether a label is there, not how much of it.": (right > 0).float(),
        "it averages the labels' numbers; they are names: one-hot first.": (
            F.avg_pool2d(maps[:, None].float(), f).expand_as(right)
        ),
    }
    if h == w:  # else the shapes already say so
        mistakes["height and width are swapped in each picture."] = right.transpose(2, 3)
    said = f"its values are not the shares of the labels in cells of {f} x {f}."
    return Trial((maps, labels, f), right, mistakes, said)


def check_reach(fn: object) -> Result:
    """Check `reach(kernels, strides)`: two tuples of ints -> a tensor () with the receptive field.

    Of convolutions one after the other, with these kernel sizes and strides: how many pixels
    across the input one pixel of the output sees.
    """
    praise = "each layer adds its kernel less one, counted in the steps of the layers before it."
    trials = [
        _reach_trial((3,), (1,)),
        _reach_trial((3, 3, 3), (1, 1, 1)),
        _reach_trial((3, 3, 3), (1, 2, 1)),
        _reach_trial((5, 3, 1, 3), (2, 2, 1, 2)),
    ]
    return check_function(fn, trials, praise)


def _reach_trial(kernels: tuple[int, ...], strides: tuple[int, ...]) -> Trial:
    def walked(ks: tuple[int, ...], ss: tuple[int, ...], first: bool = False) -> int:
        seen, step = 1, 1
        for k, s in zip(ks, ss, strict=True):
            step *= s if first else 1
            seen += (k - 1) * step
            step *= 1 if first else s
        return seen

    right, product = walked(kernels, strides), 1
    for k in kernels:
        product *= k
    mistakes = {
        "the strides are forgotten: after a stride of 2 a pixel is two pixels wide.": (
            walked(kernels, (1,) * len(kernels))
        ),
        "a layer's own stride widens the next layer's kernel, not its own.": (
            walked(kernels, strides, first=True)
        ),
        "the kernels are added up; a kernel of 1 sees one pixel and adds none.": sum(kernels),
        "the kernels are multiplied; they overlap: each adds its size less one.": product,
        "one is missing: with no layer a pixel sees itself.": right - 1,
        "the layers are walked from the last to the first; the strides before a layer count.": (
            walked(kernels[::-1], strides[::-1])
        ),
    }
    named = {why: torch.tensor(wrong) for why, wrong in mistakes.items() if wrong != right}
    said = f"for kernels {kernels} and strides {strides} one pixel sees {right} across."
    return Trial((kernels, strides), torch.tensor(right), named, said)
