"""Exercises of notebooks 10 to 15: conditioning."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minildm.evaluation.following import overlaps
from minildm.evaluation.image_metrics import psnr
from minildm.layers import attention
from minildm.teaching.exercises.exercise import EXERCISES, Exercise, Fn, draw, rows
from minildm.teaching.exercises.part1 import noised


def _steer(null: Tensor, c: Tensor, away: Tensor, s: float, n: float) -> Tensor:
    return null + s * (c - null) - n * (away - null)


EXERCISES["steer"] = Exercise(
    lambda eps_null, eps_c, eps_away, s, n: _steer(eps_null, eps_c, eps_away, s, n),
    [(*draw(*3 * ((2, 3, 4, 5),)), s, n) for s, n in ((3.0, 1.5), (2.0, 0.0), (0.0, 1.0))],
    {
        "The step towards eps_away is subtracted.": lambda null, c, away, s, n: _steer(
            null, c, away, s, -n
        ),
    },
)
EXERCISES["drop"] = Exercise(
    lambda c, c_null, u, p: torch.where((u < p).view(-1, 1, 1), c_null, c),
    [(*draw((4, 1, 4), (1, 1, 4)), torch.tensor([0.9, 0.1, 0.5, 0.2]), p) for p in (0.4, 0.0)],
    {
        "u (B,) met the width instead of the batch: make it (B, 1, 1).": lambda c, c_null, u, p: (
            torch.where(u < p, c_null, c)
        ),
        "One decision for the whole batch: each sample has its own u.": lambda c, c_null, u, p: (
            torch.where(u[0] < p, c_null, c)
        ),
    },
)

EXERCISES["look"] = Exercise(
    lambda x, c, w_q, w_k, w_v: attention(x @ w_q, c @ w_k, c @ w_v),
    [draw((2, 4, 6), (2, 4, 6), (6, 9), (6, 9), (6, 9))],
    {
        "The scores are not divided by √d.": lambda x, c, w_q, w_k, w_v: attention(
            x @ w_q * w_q.shape[1] ** 0.5, c @ w_k, c @ w_v
        ),
    },
)
_words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "apple", "on", "snow")


def _numbers(words: list[str], vocabulary: dict[str, int], length: int) -> Tensor:
    ids = [vocabulary.get(word, vocabulary["[UNK]"]) for word in words]
    ids = [vocabulary["[CLS]"], *ids, vocabulary["[SEP]"]]
    return torch.tensor(ids + [vocabulary["[PAD]"]] * (length - len(ids)))


EXERCISES["numbers"] = Exercise(
    _numbers,
    [
        (text.split(), {word: i for i, word in enumerate(_words)}, 8)
        for text in ("a red apple", "a puppy on snow", "")
    ],
    {
        "An unknown word keeps its place, as [UNK].": lambda words, vocabulary, length: _numbers(
            [word for word in words if word in vocabulary], vocabulary, length
        ),
    },
)


def _tokens(boxes: Tensor, classes: Tensor, grid: int, n_classes: int) -> Tensor:
    places = (boxes * (grid - 1)).round().long()
    corners = grid * places[:, 1::2] + places[:, 0::2]
    tokens = torch.cat([corners, grid**2 + classes[:, None]], dim=1)
    return torch.where(classes[:, None] < 0, grid**2 + n_classes, tokens)


_boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.12, 0.31, 0.58, 0.77], [0.0, 0.0, 0.0, 0.0]])
EXERCISES["tokens"] = Exercise(
    _tokens,
    [(_boxes, torch.tensor([n - 1, 3, -1]), grid, n) for grid, n in ((32, 52), (8, 11))],
    {
        "x and y are swapped: the row counts grid times.": lambda boxes, classes, grid, n: _tokens(
            boxes[:, [1, 0, 3, 2]], classes, grid, n
        ),
    },
)
_first = torch.tensor([[0.1, 0.2, 0.5, 0.8], [0.2, 0.2, 0.4, 0.5], [0.0, 0.0, 0.2, 0.2]])
_second = torch.tensor([[0.3, 0.1, 0.9, 0.6], [0.2, 0.2, 0.4, 0.5], [0.6, 0.7, 0.9, 0.9]])
EXERCISES["iou"] = Exercise(
    lambda a, b: overlaps(a, b),
    [(_first, _second)],
    {
        "The union counts the shared part twice.": lambda a, b: (
            overlaps(a, b) / (1 + overlaps(a, b))
        ),
    },
)

EXERCISES["kept"] = Exercise(
    lambda x, low_res: psnr(F.avg_pool2d(x, 4), low_res),
    [tuple(0.5 * y.clamp(-2, 2) for y in draw((3, 3, 16, 20), (3, 3, 4, 5)))],
    {
        "Take the mean of each 4 x 4 block, not every fourth pixel.": lambda x, low_res: psnr(
            x[..., ::4, ::4], low_res
        ),
    },
)


def _steered(eps_theta: Fn, z: Tensor, y: Tensor, abar: Tensor, scale: float) -> Tensor:
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        eps = eps_theta(z)
        z0_hat = (z - (1 - rows(abar)).sqrt() * eps) / rows(abar).sqrt()
        slope = torch.autograd.grad(0.5 * (y - z0_hat).square().sum(), z)[0]
    return (eps + scale * (1 - rows(abar)).sqrt() * slope).detach()


EXERCISES["steered"] = Exercise(
    _steered,
    [(lambda z: 0.7 * z.tanh(), *draw(*2 * ((3, 2, 3, 3),)), torch.linspace(0.3, 0.8, 3), 2.0)],
    {
        "The sign is wrong: the step goes up the distance.": lambda e, z, y, abar, scale: _steered(
            e, z, y, abar, -scale
        ),
    },
)


def _beside(z_t: Tensor, z_masked: Tensor, mask: Tensor, f: int) -> Tensor:
    return torch.cat([z_t, z_masked, 1 - 2 * mask[:, :, ::f, ::f]], dim=1)


def _mask(*shape: int) -> Tensor:
    return (draw(shape, seed=1)[0] < 0.3).float()


EXERCISES["beside"] = Exercise(
    _beside,
    [(*draw((2, 3, 4, 6), (2, 3, 4, 6)), _mask(2, 1, 16, 24), 4)],
    {
        "1 is the hole, -1 what is known.": lambda z_t, z, mask, f: _beside(z_t, z, 1 - mask, f),
    },
)


def _blend(z_t: Tensor, z_known: Tensor, mask: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    return mask * noised(z_known, eps, abar) + (1 - mask) * z_t


_z_t, _z_known, _eps = draw(*3 * ((2, 3, 4, 6),))
EXERCISES["blend"] = Exercise(
    _blend,
    [(_z_t, _z_known, _mask(2, 1, 4, 6), _eps, rows(torch.tensor([0.3, 0.7])))],
    {
        "1 is what is known; the hole stays z_t.": lambda z_t, z_known, mask, eps, abar: _blend(
            z_t, z_known, 1 - mask, eps, abar
        ),
        "What is known must be as noisy as z_t.": lambda z_t, z_known, mask, eps, abar: _blend(
            z_t, z_known, mask, eps, torch.ones_like(abar)
        ),
    },
)


def _shares(maps: Tensor, labels: int, f: int) -> Tensor:
    return F.avg_pool2d(rearrange(F.one_hot(maps, labels), "b h w l -> b l h w").float(), f)


EXERCISES["shares"] = Exercise(
    _shares,
    [((torch.arange(64) ** 2 % 5).view(2, 4, 8), 6, 2)],
    {
        "That takes one pixel of each cell.": lambda maps, labels, f: _shares(
            maps[:, ::f, ::f], labels, 1
        ),
    },
)


def _reach(kernels: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    seen, step = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        seen, step = seen + (kernel - 1) * step, step * stride
    return torch.tensor(seen)


EXERCISES["reach"] = Exercise(
    _reach,
    [((3, 3, 3), (1, 1, 1)), ((3, 3, 3), (1, 2, 1)), ((5, 3, 1, 3), (2, 2, 1, 2))],
    {
        "After a stride of 2 a pixel is two pixels wide.": lambda kernels, strides: _reach(
            kernels, (1,) * len(kernels)
        ),
    },
)
