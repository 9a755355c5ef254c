"""The exercises of the notebooks: `check("kl", my_kl)` says whether a function is right.

An answer is compared with the solution on a few inputs; where it equals what a typical mistake
gives, the hint for that mistake is the reply. A check never raises because of the answer.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from minildm.compression.loss import discriminator_loss
from minildm.compression.quantizer import DiagonalGaussian, code_usage
from minildm.conditioning import look_up
from minildm.evaluation.following import overlaps
from minildm.evaluation.metrics import psnr
from minildm.layers import attention, timestep_embedding
from minildm.teaching.checking import Exercise, Fn, Result, draw, problem_of


def check(name: str, fn: Any) -> Result:
    """Compare a student's function with the exercise's solution on its cases.

    Raises ValueError for a name that is not an exercise.
    """
    look_up(name, list(EXERCISES), "exercise")
    cases = EXERCISES[name].cases
    problems = (problem_of(fn, EXERCISES[name], case) for case in cases)
    problem = next(filter(None, problems), "")
    right = f"equal to the solution on {len(cases)} inputs."
    return Result(not problem, problem or right, name, fn)


def yours_or_solution(name: str, fn: Fn) -> Fn:
    """A student's function if it passes the check, else the solution; prints which of them."""
    right = check(name, fn).ok
    print(f"{name}: {'yours is' if right else 'the solution is'} used here")
    return fn if right else EXERCISES[name].solution


# --- solutions that typical mistakes share ---


def rows(x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return x.view(-1, 1, 1, 1)


def _flow_loss(velocity: Fn, z0: Tensor, tau: Tensor, eps: Tensor) -> Tensor:
    z_tau = (1 - rows(tau)) * z0 + rows(tau) * eps
    return (velocity(z_tau, tau) - (eps - z0)).square().mean((1, 2, 3))


def noised(z0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """z_t, with abar of a shape that broadcasts."""
    return abar.sqrt() * z0 + (1 - abar).sqrt() * eps


def _clean(z_t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    return (z_t - (1 - abar).sqrt() * eps) / abar.sqrt()


def _bits(mean_q: Tensor, logvar_q: Tensor, mean_p: Tensor, logvar_p: Tensor) -> Tensor:
    q, p = Normal(mean_q, (0.5 * logvar_q).exp()), Normal(mean_p, (0.5 * logvar_p).exp())
    return kl_divergence(q, p).mean((1, 2, 3)) / math.log(2)


def _codes(z: Tensor, codebook: Tensor) -> Tensor:
    nearest = torch.cdist(rearrange(z, "b c h w -> (b h w) c"), codebook).argmin(1)
    return rearrange(codebook[nearest], "(b h w) c -> b c h w", b=len(z), h=z.shape[2])


def _usage(indices: Tensor, size: int = 0) -> Tensor:
    return torch.stack(code_usage(indices.flatten().bincount(minlength=size)))


def _ratio(grad_rec: Tensor, grad_adv: Tensor) -> Tensor:
    return (grad_rec.norm() / (grad_adv.norm() + 1e-4)).clamp(max=1e4)


def _ddim(z_t: Tensor, eps: Tensor, abar: Tensor, abar_prev: Tensor, sigma: float = 0.0) -> Tensor:
    return abar_prev.sqrt() * _clean(z_t, eps, abar) + (1 - abar_prev - sigma**2).sqrt() * eps


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (rearrange(x, "b n (head d) -> b head n d", head=heads) for x in (q, k, v))
    return rearrange(attention(q, k, v), "b head n d -> b n (head d)")


def _heun(x: Tensor, sigma: float, end: float, slope: Fn) -> Tensor:
    first = slope(x, sigma)
    return x + (end - sigma) * (first + slope(x + (end - sigma) * first, end)) / 2


def _numbers(words: list[str], vocabulary: dict[str, int], length: int) -> Tensor:
    ids = [vocabulary.get(word, vocabulary["[UNK]"]) for word in words]
    ids = [vocabulary["[CLS]"], *ids, vocabulary["[SEP]"]]
    return torch.tensor(ids + [vocabulary["[PAD]"]] * (length - len(ids)))


def _tokens(boxes: Tensor, classes: Tensor, grid: int, n_classes: int) -> Tensor:
    places = (boxes * (grid - 1)).round().long()
    corners = grid * places[:, 1::2] + places[:, 0::2]
    tokens = torch.cat([corners, grid**2 + classes[:, None]], dim=1)
    return torch.where(classes[:, None] < 0, grid**2 + n_classes, tokens)


def _steered(eps_theta: Fn, z: Tensor, y: Tensor, abar: Tensor, scale: float) -> Tensor:
    z = z.detach().requires_grad_()
    eps = eps_theta(z)
    distance = 0.5 * (y - _clean(z, eps, rows(abar))).square().sum()
    slope = torch.autograd.grad(distance, z)[0]
    return (eps + scale * (1 - rows(abar)).sqrt() * slope).detach()


def _idle(seconds: Tensor, workers: int) -> Tensor:
    free = torch.zeros(workers)
    for run in seconds:
        free[free.argmin()] += run
    return 1 - seconds.sum() / (workers * free.max())


# --- inputs that several exercises share ---

LATENTS = draw(*4 * ((4, 3, 4, 4),))  # B = h = w: an axis too few broadcasts, and is found
WATCHED = [z.clone().requires_grad_() for z in LATENTS[:2]]  # their gradients are compared, too
ABAR = torch.linspace(0.1, 0.8, 4)  # one for each image
MASK = (draw((4, 1, 16, 16), seed=1)[0] < 0.3).float()
SIDES = torch.tensor([0, -1, 1])  # the mean, the lower and the upper end of an interval
VALUES = draw((24,))[0].double()
BOXES = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.12, 0.31, 0.58, 0.77], [0.0, 0.0, 0.2, 0.2]])
SECONDS = torch.tensor([0.4, 0.2, 0.05])[:, None] * torch.tensor([50.0, 100, 200, 1000])
STAGES = torch.tensor([[2.0, 16, 4, 32, 8], [8192, 400, 3072, 64, 1024], [31, 20, 27, 15, 24]])
WORDS = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "red": 5, "apple": 6}

EXERCISES = {
    # --- notebooks 00 to 05: quick start, perceptual compression ---
    "noised": Exercise(
        lambda z0, eps, abar: noised(z0, eps, rows(abar)),
        [(*LATENTS[:2], ABAR)],
        {
            "One weight has no root.": lambda z, e, a: rows(a).sqrt() * z + (1 - rows(a)) * e,
            "Each image has its own abar: no abar.mean().": lambda z, e, a: noised(z, e, a.mean()),
            "abar (B,) met the width instead of the batch: use abar.view(-1, 1, 1, 1).": noised,
        },
    ),
    "guidance": Exercise(
        lambda eps_null, eps_c, s: eps_null + s * (eps_c - eps_null),
        [(*LATENTS[:2], s) for s in (3.0, 1.0, 0.0)],
        {
            "It starts at eps_c: s = 0 must be unconditional.": lambda n, c, s: c + s * (c - n),
            "It is eps_null + s (eps_c − eps_null).": lambda n, c, s: s * c - n,
        },
    ),
    "bits_per_dim": Exercise(_bits, [LATENTS]),
    "weight": Exercise(
        lambda f, c, codes: torch.stack([3 * f**2 / c, codes.log2() / f**2], dim=1),
        [tuple(torch.tensor([[4.0, 3, 8192], [8, 4, 256], [16, 8, 16384]]).T)],
        {"f shrinks both sides.": lambda f, c, k: torch.stack([3 * f / c, k.log2() / f], dim=1)},
    ),
    "kl": Exercise(
        lambda mean, logvar: DiagonalGaussian(mean, logvar).kl(),
        [LATENTS[:2]],
        {
            "exp(0.5 logvar) is the standard deviation; (2) has the variance.": lambda m, v: (
                0.5 * (m**2 + (0.5 * v).exp() - 1 - v).sum((1, 2, 3))
            ),
        },
    ),
    "scale": Exercise(
        lambda mean, logvar: (mean.var() + logvar.exp().mean()).sqrt(),
        [draw((3, 2, 4, 5, 5), (3, 2, 4, 5, 5))],  # batches, which count together
        {"That is the spread of the means; each draw adds its variance.": lambda m, v: m.std()},
    ),
    "quantise": Exercise(
        lambda z, codebook: z + (_codes(z, codebook) - z).detach(),
        [(WATCHED[0], draw((7, 3), seed=1)[0].requires_grad_())],
        {
            "No gradient reaches z: return z + (codes − z).detach().": _codes,
            "The codebook must get no gradient.": lambda z, e: z + _codes(z, e) - z.detach(),
        },
    ),
    "code_statistics": Exercise(
        _usage,
        [((torch.arange(144) // 2 % 50).view(4, 2, 3, 6), 200)],
        {"bincount needs minlength: count unused codes, too.": lambda i, _: _usage(i)},
    ),
    "critic_loss": Exercise(
        discriminator_loss,
        [draw((4, 1, 3, 5), (4, 1, 3, 5))],
        {"relu comes before the mean.": lambda r, f: discriminator_loss(r.mean(), f.mean())},
    ),
    "adaptive_weight": Exercise(
        lambda grad_rec, grad_adv: _ratio(grad_rec, grad_adv).detach(),
        [WATCHED, (WATCHED[0], 0 * WATCHED[1])],
        {"The weight must be detached.": _ratio},
    ),
    "choose": Exercise(
        lambda f, numbers, psnr, budget, least: (f * ((numbers <= budget) & (psnr >= least))).max(),
        [(*STAGES, budget, 20.0) for budget in (3072.0, 5000.0, 1.0)],
    ),
    "interval": Exercise(
        lambda values: values.mean() + SIDES * 1.96 * values.std() / len(values) ** 0.5,
        [(25 + 4 * VALUES,), (VALUES[:7],)],
        {"Divide by √N; that is the spread.": lambda v: v.mean() + SIDES * 1.96 * v.std()},
    ),
    # --- notebooks 06 to 09: diffusion, the UNet, two stages, samplers ---
    "q_sample": Exercise(
        lambda z0, t, eps, alphas_cumprod: noised(z0, eps, rows(alphas_cumprod[t])),
        [(LATENTS[0], torch.tensor([5, 14, 23, 32]), LATENTS[1], torch.linspace(0.99, 0.01, 50))],
        {
            "It is ᾱ: no second cumprod.": lambda z, t, e, a: noised(z, e, rows(a.cumprod(0)[t])),
            "Each image has its own time.": lambda z, t, e, a: noised(z, e, a[t[0]]),
            "Both weights are roots.": lambda z, t, e, a: rows(a[t]) * z + (1 - rows(a[t])) * e,
        },
    ),
    "ddim_step": Exercise(
        _ddim,
        [(*LATENTS[:2], *torch.tensor(levels)) for levels in ((0.3, 0.45), (0.5, 1.0))],
        {
            "That is z0_hat; noise it to abar_prev.": lambda z, e, a, b: _ddim(z, e, a, b / b),
            "Do not clamp z0_hat.": lambda z, e, a, b: noised(_clean(z, e, a).clamp(-1, 1), e, b),
            "Divide by √abar.": lambda z, e, a, b: noised(_clean(z, e, a) / a.sqrt(), e, b),
        },
    ),
    "timestep_embedding": Exercise(
        timestep_embedding,
        [(torch.tensor(t), width) for width, t in ((4, [0, 1, 3]), (32, [3, 500, 999]))],
        {"The cosines come first.": lambda t, d: timestep_embedding(t, d).roll(d // 2, 1)},
    ),
    "attention": Exercise(
        _attend,
        [(*draw((2, 5, 8), (2, 3, 8), (2, 3, 8)), 2), (*draw(*3 * ((1, 4, 12),)), 4)],
        {"Divide by √d, where d = C / heads.": lambda q, k, v, n: _attend(q / n**0.5, k, v, n)},
    ),
    "ema": Exercise(
        lambda shadow, weights, n, decay: shadow.lerp(weights, 1 - min(decay, (1 + n) / (10 + n))),
        [(*LATENTS[:2], n, decay) for n, decay in ((700, 0.9), (5, 0.9), (40, 0.999))],
        {"The warm-up, (1 + n) / (10 + n), is missing.": lambda s, w, n, d: s.lerp(w, 1 - d)},
    ),
    "snr": Exercise(
        lambda abar, z, scale: z.var() / scale**2 * abar / (1 - abar),
        [(ABAR, LATENTS[0], 0.5)],
        {"A power is a variance: square the ratio.": lambda a, z, s: z.std() / s * a / (1 - a)},
    ),
    "ddim": Exercise(
        lambda z, eps_hat, abar, abar_prev, sigma, noise: (
            _ddim(z, eps_hat, abar, abar_prev, sigma) + sigma * noise
        ),
        [(*LATENTS[:2], *torch.tensor([0.2, 0.5]), sigma, LATENTS[2]) for sigma in (0.3, 0.0)],
        {"eps_hat has the weight √(1−ᾱ'−σ²).": lambda z, e, a, b, s, n: _ddim(z, e, a, b) + s * n},
    ),
    "heun": Exercise(
        _heun,
        [(LATENTS[0], 3.0, 1.0, lambda x, sigma: sigma * (x - 1) / (0.5 + sigma**2))],
        {"That is Euler's step, of one slope.": lambda x, a, b, slope: x + (b - a) * slope(x, a)},
    ),
    # --- notebooks 10 to 15: conditioning ---
    "steer": Exercise(
        lambda null, c, away, s, n: null + s * (c - null) - n * (away - null),
        [(*LATENTS[:3], s, n) for s, n in ((3.0, 1.5), (2.0, 0.0), (0.0, 1.0))],
        {"Subtract the step to eps_away.": lambda u, c, a, s, n: u + s * (c - u) + n * (a - u)},
    ),
    "drop": Exercise(
        lambda c, c_null, u, p: torch.where((u < p).view(-1, 1, 1), c_null, c),
        [(*draw((4, 1, 4), (1, 1, 4)), torch.tensor([0.9, 0.1, 0.5, 0.2]), p) for p in (0.4, 0.0)],
        {
            "Make u (B, 1, 1): it met the width.": lambda c, n, u, p: torch.where(u < p, n, c),
            "Decide for each sample, not once.": lambda c, n, u, p: torch.where(u[0] < p, n, c),
        },
    ),
    "look": Exercise(
        lambda x, c, w_q, w_k, w_v: attention(x @ w_q, c @ w_k, c @ w_v),
        [draw((2, 4, 6), (2, 4, 6), *3 * ((6, 4),))],
        {"Divide the scores by √d.": lambda x, c, q, k, v: attention(2 * x @ q, c @ k, c @ v)},
    ),
    "numbers": Exercise(
        _numbers,
        [(text.split(), WORDS, 8) for text in ("a red apple", "a puppy on snow", "")],
        {"Unknown words keep a place.": lambda w, v, n: _numbers([x for x in w if x in v], v, n)},
    ),
    "tokens": Exercise(
        _tokens,
        [(BOXES, torch.tensor([n - 1, 3, -1]), grid, n) for grid, n in ((32, 52), (8, 11))],
        {"x and y are swapped.": lambda b, c, g, n: _tokens(b[:, [1, 0, 3, 2]], c, g, n)},
    ),
    "iou": Exercise(
        overlaps,
        [(BOXES, BOXES.roll(1, 0)), (BOXES, BOXES)],
        {"The shared part counts twice.": lambda a, b: overlaps(a, b) / (1 + overlaps(a, b))},
    ),
    "kept": Exercise(
        lambda x, low_res: psnr(F.avg_pool2d(x, 4), low_res),
        [tuple(0.5 * y.clamp(-2, 2) for y in draw((3, 3, 16, 20), (3, 3, 4, 5)))],
        {"Take the mean of each 4 x 4 block.": lambda x, y: psnr(x[..., ::4, ::4], y)},
    ),
    "steered": Exercise(
        _steered,
        [(lambda z: 0.7 * z.tanh(), *LATENTS[:2], ABAR, 2.0)],
        {"The step goes up the distance.": lambda e, z, y, a, s: _steered(e, z, y, a, -s)},
    ),
    "beside": Exercise(
        lambda z_t, z_masked, mask, f: torch.cat([z_t, z_masked, 1 - 2 * mask[..., ::f, ::f]], 1),
        [(*LATENTS[:2], MASK, 4)],
        {"1 is the hole.": lambda z_t, z, m, f: torch.cat([z_t, z, 2 * m[..., ::f, ::f] - 1], 1)},
    ),
    "blend": Exercise(
        lambda z_t, z_known, mask, eps, abar: z_t.lerp(noised(z_known, eps, abar), mask),
        [(*LATENTS[:2], MASK[..., ::4, ::4], LATENTS[2], rows(ABAR))],
        {"z_known must be as noisy as z_t.": lambda z, k, m, e, a: z.lerp(k, m)},
    ),
    "shares": Exercise(
        lambda maps, labels, f: F.avg_pool2d(F.one_hot(maps, labels).movedim(-1, 1).float(), f),
        [((torch.arange(64) ** 2 % 5).view(2, 4, 8), 6, 2)],
        {"Average each cell.": lambda m, n, f: F.one_hot(m[:, ::f, ::f], n).movedim(-1, 1)},
    ),
    "reach": Exercise(
        lambda kernels, strides: torch.tensor(
            1 + sum((k - 1) * math.prod(strides[:i]) for i, k in enumerate(kernels))
        ),
        [((3, 3, 3), (1, 1, 1)), ((3, 3, 3), (1, 2, 1)), ((5, 3, 1, 3), (2, 2, 1, 2))],
    ),
    # --- notebooks 16 to 22: ablations, evaluation, interoperability, scale, beyond ---
    "at_time": Exercise(
        lambda seconds, values, budget: torch.tensor(
            [np.interp(budget, s, v) for s, v in zip(seconds, values, strict=True)]
        ),
        [(SECONDS, 1000 + 300 * LATENTS[0][:3, 0, 0], budget) for budget in (36.0, 2.0, 4000.0)],
        {"Those are the values after equal steps.": lambda seconds, values, budget: values[:, -1]},
    ),
    "difference": Exercise(
        lambda a, b, t: (a - b).mean() + SIDES * t * (a - b).std() / len(a) ** 0.5,
        [(2400 + 300 * VALUES[:5] + 40 * VALUES[5:10], 2100 + 300 * VALUES[:5], 2.7764)],
        {
            "Seeds are pairs: subtract first, then take the spread.": lambda a, b, t: (
                a.mean() - b.mean() + SIDES * t * ((a.var() + b.var()) / len(a)).sqrt()
            ),
        },
    ),
    "frechet": Exercise(
        lambda mean_a, cov_a, mean_b, cov_b: (
            (mean_a - mean_b).square().sum()
            + (cov_a + cov_b).trace()
            - 2 * torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
        ),
        [tuple(x for f in draw((9, 3), (9, 3)) for x in (f.mean(0), f.T.cov()))],
        {
            "The root is of the matrix A B, not of each number.": lambda m, a, n, b: (
                (m - n).square().sum() + (a + b - 2 * (a @ b).clamp(min=0).sqrt()).trace()
            ),
        },
    ),
    "limit": Exercise(
        lambda N, far: torch.tensor(np.polyfit(1 / N, far, 1)[1]),
        [(50 + 100 * (VALUES[:5] ** 2), VALUES[5:10])],
    ),
    "folded": Exercise(
        lambda weight, bias, scale, shift: torch.cat(
            [scale * weight, (bias + weight @ shift)[:, None]], dim=1
        ),
        [(*draw((4, 3), (4,)), 2.5, *draw((3,), seed=1))],
        {"Do not scale shift.": lambda w, b, s, m: torch.hstack([s * w, (b + s * w @ m)[:, None]])},
    ),
    "times": Exercise(
        lambda T, S: torch.arange(0, T, T // S).flip(0) + 1,
        [(1000, 50), (1000, 30)],
        {"Sampling starts at the largest time.": lambda T, S: torch.arange(0, T, T // S) + 1},
    ),
    "whole_gradient": Exercise(
        lambda gradients, counts: (gradients * counts[:, None]).sum(0) / counts.sum(),
        [(draw((n, 5))[0], 3 * torch.arange(n) + 2) for n in (2, 3)],
        {"A process with more samples counts more.": lambda gradients, counts: gradients.mean(0)},
    ),
    "idle_share": Exercise(
        _idle,
        [(torch.tensor([2.0, 8, 1, 7, 7, 1, 8, 5, 4]), 3), (torch.tensor([1.0, 1, 1, 9, 2]), 2)],
    ),
    "rescale": Exercise(
        lambda abar: ((abar.sqrt() - abar[-1].sqrt()) / (1 - (abar[-1] / abar[0]).sqrt())) ** 2,
        [(ABAR.flip(0),)],
        {"(5) stretches √ᾱ, not ᾱ.": lambda abar: (abar - abar[-1]) / (1 - abar[-1] / abar[0])},
    ),
    "flow_loss": Exercise(
        _flow_loss,
        [(lambda z, tau: z.sin() + (1 + rows(tau)) ** 2, LATENTS[0], ABAR, LATENTS[1])],
        {"The target is eps − z0.": lambda v, z, t, e: _flow_loss(lambda x, s: -v(x, s), z, t, e)},
    ),
    "velocity": Exercise(lambda x, e, tau: (e - x) / (1 - rows(tau)), [(*LATENTS[:2], ABAR)]),
    "lora": Exercise(
        lambda x, weight, down, up, alpha: x @ (weight + alpha / len(down) * up @ down).T,
        [(*draw((5, 3), (4, 3), (2, 3), (4, 2)), 8.0)],
        {"Divide alpha by the rank.": lambda x, w, a, b, s: x @ (w + s * b @ a).T},
    ),
    "merge": Exercise(lambda w, a, b, s: w + s / 2 * b @ a, [(*draw((4, 3), (2, 3), (4, 2)), 8)]),
}
