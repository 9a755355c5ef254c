"""Exercises of notebooks 06 to 09: diffusion, the UNet, two stages, samplers."""

import torch
from einops import rearrange
from torch import Tensor

from minildm.diffusion.schedule import NoiseSchedule
from minildm.layers import attention, timestep_embedding
from minildm.teaching.exercises.exercise import EXERCISES, Exercise, draw, rows
from minildm.teaching.exercises.part1 import noised


def _q_sample(z0: Tensor, t: Tensor, eps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    return noised(z0, eps, rows(alphas_cumprod[t]))


_latents = draw((4, 3, 4, 4), (4, 3, 4, 4))
_abars = NoiseSchedule.scaled_linear(50, 0.01, 0.2).alphas_cumprod
EXERCISES["q_sample"] = Exercise(
    _q_sample,
    [(_latents[0], torch.tensor([5, 14, 23, 32]), _latents[1], _abars)],
    {
        "alphas_cumprod is ᾱ already: no second cumprod.": lambda z0, t, eps, a: _q_sample(
            z0, t, eps, a.cumprod(0)
        ),
        "The time is off by one.": lambda z0, t, eps, a: _q_sample(z0, t - 1, eps, a),
        "Each sample has its own time.": lambda z0, t, eps, a: _q_sample(z0, t[0], eps, a),
    },
)


def _ddim(z_t: Tensor, eps: Tensor, abar: Tensor, abar_prev: Tensor, sigma: float = 0.0) -> Tensor:
    """The deterministic part of a step of DDIM."""
    z0_hat = (z_t - (1 - abar).sqrt() * eps) / abar.sqrt()
    return abar_prev.sqrt() * z0_hat + (1 - abar_prev - sigma**2).sqrt() * eps


EXERCISES["ddim_step"] = Exercise(
    lambda z_t, eps_hat, abar, abar_prev: _ddim(z_t, eps_hat, abar, abar_prev),
    [(*_latents, *torch.tensor(levels)) for levels in ((0.3, 0.45), (0.5, 1.0))],
    {
        "That is the clean latent; noise it to abar_prev.": lambda z, eps, a, b: _ddim(
            z, eps, a, torch.ones(())
        ),
        "z0_hat is not clamped in latent space.": lambda z, eps, a, b: (
            b.sqrt() * _ddim(z, eps, a, torch.ones(())).clamp(-1, 1) + (1 - b).sqrt() * eps
        ),
    },
)

EXERCISES["timestep_embedding"] = Exercise(
    lambda t, width: timestep_embedding(t, width),
    [(torch.tensor(t), width) for width, t in ((4, [0, 1, 3]), (32, [3, 500, 999]))],
    {
        "The cosines come first.": lambda t, width: timestep_embedding(t, width).roll(
            width // 2, dims=1
        ),
        "All cosines, then all sines: they do not alternate.": lambda t, width: rearrange(
            timestep_embedding(t, width), "b (part half) -> b (half part)", part=2
        ),
    },
)


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, split: str = "(head d)") -> Tensor:
    q, k, v = (rearrange(x, f"b n {split} -> b head n d", head=heads) for x in (q, k, v))
    return rearrange(attention(q, k, v), f"b head n d -> b n {split}")


EXERCISES["attention"] = Exercise(
    lambda q, k, v, heads: _attend(q, k, v, heads),
    [(*draw((2, 5, 8), (2, 3, 8), (2, 3, 8)), 2), (*draw(*3 * ((1, 4, 12),)), 4)],
    {
        "Divide by √d, d = C / heads, not by √C.": lambda q, k, v, heads: _attend(
            q * heads**-0.5, k, v, heads
        ),
        "A head's channels lie side by side: split as (head d).": lambda q, k, v, heads: _attend(
            q, k, v, heads, "(d head)"
        ),
    },
)

EXERCISES["ema"] = Exercise(
    lambda shadow, weights, n, decay: shadow.lerp(weights, 1 - min(decay, (1 + n) / (10 + n))),
    [(*draw((8,), (8,)), n, decay) for n, decay in ((700, 0.9), (5, 0.9), (40, 0.999))],
    {
        "The warm-up is missing: d = min(decay, (1 + n) / (10 + n)).": (
            lambda shadow, weights, n, decay: shadow.lerp(weights, 1 - decay)
        ),
    },
)
_unit = (lambda z: (z - z.mean()) / z.std())(draw((32, 3, 16, 16))[0])
EXERCISES["snr"] = Exercise(
    lambda abar, z, scale: z.square().mean() / scale**2 * abar / (1 - abar),
    [(torch.linspace(0.99, 0.01, 12), 2.5 * _unit, 0.5)],
    {
        "A power is a variance: square spread and scale.": lambda abar, z, scale: (
            z.std() / scale * abar / (1 - abar)
        ),
    },
)

EXERCISES["ddim"] = Exercise(
    lambda z, eps_hat, abar, abar_prev, sigma, noise: (
        _ddim(z, eps_hat, abar, abar_prev, sigma) + sigma * noise
    ),
    [
        (*_latents, *torch.tensor([a, b]), sigma, *draw((4, 3, 4, 4), seed=1))
        for a, b, sigma in ((0.2, 0.5, 0.3), (0.2, 0.5, 0.0), (0.7, 1.0, 0.0))
    ],
    {
        "eps_hat must give up σ²: its weight is √(1−ᾱ'−σ²).": lambda z, eps, a, b, sigma, noise: (
            _ddim(z, eps, a, b) + sigma * noise
        ),
        "The noise that is given is not used.": lambda z, eps, a, b, sigma, noise: _ddim(
            z, eps, a, b, sigma
        ),
    },
)


def _slope(x: Tensor, sigma: float) -> Tensor:
    """eps of Gaussian data, as a function of x and sigma."""
    return sigma * (x - 1.0) / (0.49 + sigma**2)


def _heun(x: Tensor, sigma: float, end: float, slope: object) -> Tensor:
    first = slope(x, sigma)
    return x + (end - sigma) * (first + slope(x + (end - sigma) * first, end)) / 2


EXERCISES["heun"] = Exercise(
    _heun,
    [(2 * draw((7,))[0], sigma, end, _slope) for sigma, end in ((3.0, 1.0), (0.5, 0.2))],
    {
        "That is Euler's step; average the slopes at both ends.": lambda x, sigma, end, slope: (
            x + (end - sigma) * slope(x, sigma)
        ),
        "The second slope is at the end of Euler's step, not at x.": lambda x, sigma, end, slope: (
            x + (end - sigma) * (slope(x, sigma) + slope(x, end)) / 2
        ),
    },
)
