"""Exercises of notebooks 00 to 05: quick start, and perceptual compression."""

import math

import torch
from einops import rearrange
from torch import Tensor

from minildm.compression.loss import discriminator_loss
from minildm.compression.quantizer import DiagonalGaussian, code_usage
from minildm.teaching.exercises.exercise import EXERCISES, Exercise, Fn, draw, rows


def noised(z0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """z_t, with abar of a shape that broadcasts."""
    return abar.sqrt() * z0 + (1 - abar).sqrt() * eps


EXERCISES["noised"] = Exercise(
    lambda z0, eps, abar: noised(z0, eps, rows(abar)),
    [(*draw((b, 3, 4, 4), (b, 3, 4, 4)), torch.linspace(0.1, 0.8, b)) for b in (1, 4)],
    {
        "The roots are missing.": lambda z0, eps, a: rows(a) * z0 + (1 - rows(a)) * eps,
        "abar (B,) met the width instead of the batch: use abar.view(-1, 1, 1, 1).": noised,
        "Each sample has its own abar.": lambda z0, eps, a: noised(z0, eps, a.mean()),
    },
)
EXERCISES["guidance"] = Exercise(
    lambda eps_null, eps_c, s: eps_null + s * (eps_c - eps_null),
    [(*draw((2, 3, 4, 5), (2, 3, 4, 5)), s) for s in (3.0, 1.0, 0.0)],
    {
        "It starts at eps_c: s = 0 must be unconditional.": lambda n, c, s: c + s * (c - n),
        "Written out, the weight of eps_null is 1 − s.": lambda n, c, s: s * c - n,
    },
)


def _bits(mean_q: Tensor, logvar_q: Tensor, mean_p: Tensor, logvar_p: Tensor) -> Tensor:
    """KL(q || p), a mean over each image's numbers, in bits."""
    ratio = logvar_q - logvar_p
    nats = 0.5 * (ratio.exp() - 1 - ratio + (mean_q - mean_p) ** 2 * (-logvar_p).exp())
    return nats.mean((1, 2, 3)) / math.log(2)


EXERCISES["bits_per_dim"] = Exercise(
    _bits,
    [draw(*4 * ((2, 3, 4, 5),))],
    {
        "Those are nats; divide by ln 2.": lambda *q_p: _bits(*q_p) * math.log(2),
        "q and p are swapped.": lambda mq, lq, mp, lp: _bits(mp, lp, mq, lq),
    },
)
EXERCISES["weight"] = Exercise(
    lambda f, c, codes: torch.stack([3 * f**2 / c, codes.log2() / f**2], dim=1),
    [tuple(torch.tensor([[4.0, 3, 8192], [8, 4, 256], [16, 8, 16384]]).T)],
    {
        "f shrinks both sides: f² times fewer positions.": lambda f, c, codes: torch.stack(
            [3 * f / c, codes.log2() / f], dim=1
        ),
    },
)

EXERCISES["kl"] = Exercise(
    lambda mean, logvar: DiagonalGaussian(mean, logvar).kl(),
    [draw((2, 3, 4, 5), (2, 3, 4, 5)), (torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2))],
    {
        "exp(0.5 logvar) is the standard deviation; (2) has the variance.": lambda m, v: (
            0.5 * (m**2 + (0.5 * v).exp() - 1 - v).sum((1, 2, 3))
        ),
    },
)
_levels = torch.linspace(-1.5, 1.5, 4).view(-1, 1, 1, 1, 1)  # batches that differ
EXERCISES["scale"] = Exercise(
    lambda mean, logvar: (mean.var() + logvar.exp().mean()).sqrt(),
    [tuple(x + _levels for x in draw((4, 8, 3, 8, 8), (4, 8, 3, 8, 8)))],
    {
        "That is the spread of the means; each draw adds its variance.": lambda m, v: m.std(),
        "Variances add up, not deviations.": lambda m, v: m.std() + v.exp().mean().sqrt(),
    },
)


def _codes(z: Tensor, codebook: Tensor) -> Tensor:
    nearest = torch.cdist(rearrange(z, "b c h w -> (b h w) c"), codebook).argmin(1)
    return rearrange(codebook[nearest], "(b h w) c -> b c h w", b=len(z), h=z.shape[2])


def _with_gradients(fn: Fn) -> Fn:
    """The values, then the gradients of a weighted sum in z and in the codebook, flat."""

    def probe(z: Tensor, codebook: Tensor, weight: Tensor) -> Tensor:
        leaves = z.clone().requires_grad_(), codebook.clone().requires_grad_()
        with torch.enable_grad():
            out = fn(*leaves)
            loss = (out * weight).sum() + 0 * sum(leaf.sum() for leaf in leaves)
        grads = torch.autograd.grad(loss, leaves)
        return torch.cat([x.detach().flatten() for x in (out, *grads)])

    return probe


EXERCISES["quantise"] = Exercise(
    lambda z, codebook: z + (_codes(z, codebook) - z).detach(),
    [draw((2, 3, 4, 5), (7, 3), (2, 3, 4, 5)), draw((1, 4, 4, 4), (4, 4), (1, 4, 4, 4))],
    {
        "No gradient reaches z: return z + (codes − z).detach().": _codes,
        "Everything is detached.": lambda z, codebook: _codes(z, codebook).detach(),
    },
    _with_gradients,
)


def _statistics(indices: Tensor, size: int) -> Tensor:
    return torch.stack(code_usage(indices.flatten().bincount(minlength=size)))


EXERCISES["code_statistics"] = Exercise(
    _statistics,
    [(torch.arange(144).view(6, 2, 3, 4) // torch.tensor([1, 2, 3, 9]), 200)],
    {
        "A mean over batches is too low: count all batches first.": lambda indices, size: (
            torch.stack([_statistics(batch, size) for batch in indices]).mean(0)
        ),
        "bincount needs minlength=K: the usage counts unused codes too.": lambda indices, size: (
            _statistics(indices, int(indices.max()) + 1)
        ),
    },
)

EXERCISES["critic_loss"] = Exercise(
    lambda real, fake: discriminator_loss(real, fake),
    [draw((4, 1, 3, 5), (4, 1, 3, 5))],
    {
        "Each patch has a hinge of its own: relu before mean.": lambda real, fake: (
            discriminator_loss(real.mean(), fake.mean())
        ),
    },
)


def _ratio(grad_rec: Tensor, grad_adv: Tensor) -> Tensor:
    return (grad_rec.norm() / (grad_adv.norm() + 1e-4)).clamp(max=1e4)


def _value_and_gradient(fn: Fn) -> Fn:
    """The answer, and 1 where a gradient flows through it: (2,)."""

    def probe(rec: Tensor, adv: Tensor) -> Tensor:
        with torch.enable_grad():
            found = torch.as_tensor(fn(rec.clone().requires_grad_(), adv.clone().requires_grad_()))
        return torch.stack([found.detach(), torch.tensor(float(found.requires_grad))])

    return probe


EXERCISES["adaptive_weight"] = Exercise(
    lambda grad_rec, grad_adv: _ratio(grad_rec, grad_adv).detach(),
    [draw((3, 8), (3, 8)), (torch.ones(3, 8), torch.zeros(3, 8))],
    {
        "The weight must be detached.": _ratio,
        "It must be clamped to 1e4.": lambda rec, adv: (rec.norm() / (adv.norm() + 1e-4)).detach(),
    },
    _value_and_gradient,
)

_rungs = torch.tensor([[2.0, 16, 4, 32, 8], [8192, 400, 3072, 64, 1024], [31, 20, 27, 15, 24]])
EXERCISES["choose"] = Exercise(
    lambda f, numbers, psnr, budget, least: (f * ((numbers <= budget) & (psnr >= least))).max(),
    [(*_rungs, 3072.0, 24.0), (*_rungs, 5000.0, 20.0), (*_rungs, 1.0, 20.0)],
    {
        "The budget is not kept.": lambda f, n, p, budget, least: (f * (p >= least)).max(),
        "The PSNR is not kept.": lambda f, n, p, budget, least: (f * (n <= budget)).max(),
    },
)


def around(mean: Tensor, half: Tensor) -> Tensor:
    """(mean, low, high)."""
    return torch.stack([mean, mean - half, mean + half])


EXERCISES["interval"] = Exercise(
    lambda values: around(values.mean(), 1.96 * values.std() / len(values) ** 0.5),
    [(25 + 4 * draw((n,))[0].double(),) for n in (24, 7)],
    {
        "That is the spread of single images; divide by √N.": lambda values: around(
            values.mean(), 1.96 * values.std()
        ),
    },
)
