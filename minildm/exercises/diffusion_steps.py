"""Checks of notebook 06: noise to a time of the schedule, and one DDIM step back."""

import torch
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function
from minildm.schedule import NoiseSchedule


def _draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def check_q_sample(fn: object) -> Result:
    """Check `q_sample(z0, t, eps, alphas_cumprod)`: latents, (B,) int64, latents, (T,) -> z_t."""
    praise = "each sample's own time is looked up, and signal and noise share the variance."
    trials = [_noising(1, 2, 1, 1), _noising(3, 2, 1, 1), _noising(4, 3, 4, 4)]
    return check_function(fn, trials, praise)


def _noising(*shape: int) -> Trial:
    table = NoiseSchedule.scaled_linear(50, 0.01, 0.2).alphas_cumprod
    z0, eps = _draw(shape, shape)
    t = torch.arange(len(z0)) * 9 + 5
    a = table[t].view(-1, 1, 1, 1)
    signal, noise = a.sqrt(), (1 - a).sqrt()
    back = table.flip(0)[t].view(-1, 1, 1, 1)
    before, after = (table[t + step].view(-1, 1, 1, 1) for step in (-1, 1))
    mistakes = {
        "the roots are missing: (1) weighs by √ᾱ and √(1−ᾱ).": a * z0 + (1 - a) * eps,
        "signal and noise are swapped: √ᾱ belongs to z_0.": noise * z0 + signal * eps,
        "the noise's weight is √(1−ᾱ), not 1 − √ᾱ.": signal * z0 + (1 - signal) * eps,
        "the noise is not weighed; multiply ε by √(1−ᾱ).": signal * z0 + eps,
        "the latent is not weighed; multiply z_0 by √ᾱ.": z0 + noise * eps,
        "the noise is subtracted; (1) adds it.": signal * z0 - noise * eps,
        "every sample gets the first one's time; look up alphas_cumprod[t], then make it "
        "(B, 1, 1, 1).": signal[0] * z0 + noise[0] * eps,
        "time runs backwards: alphas_cumprod[0] is nearly clean, the last nearly noise.": (
            back.sqrt() * z0 + (1 - back).sqrt() * eps
        ),
        "the time is off by one: index 0 is the first step, so look up alphas_cumprod[t].": (
            before.sqrt() * z0 + (1 - before).sqrt() * eps
        ),
        "the time is off by one: look up alphas_cumprod[t], not [t + 1].": (
            after.sqrt() * z0 + (1 - after).sqrt() * eps
        ),
    }
    if shape[0] == shape[-1] > 1:
        wide = table[t].sqrt() * z0 + (1 - table[t]).sqrt() * eps
        mistakes["ᾱ (B,) met the width instead of the batch; make it (B, 1, 1, 1)."] = wide
    return Trial((z0, t, eps, table), signal * z0 + noise * eps, mistakes)


def check_ddim_step(fn: object) -> Result:
    """Check `ddim_step(z_t, eps_hat, abar, abar_prev)`: two latents, two scalars -> a latent."""
    praise = "guess the clean latent, then noise it again with the same ε̂, to the level before."
    last = "it is right on the way, but the last step, to ᾱ = 1, must end at ẑ_0 itself."
    trials = [_ddim_step(0.3, 0.45), _ddim_step(0.9, 0.95), _ddim_step(0.5, 1.0, last)]
    return check_function(fn, trials, praise)


def _ddim_step(abar: float, abar_prev: float, otherwise: str = "") -> Trial:
    z, eps = _draw((2, 3, 4, 5), (2, 3, 4, 5))
    a, b = torch.tensor(abar), torch.tensor(abar_prev)
    z0_hat = (z - (1 - a).sqrt() * eps) / a.sqrt()
    right = b.sqrt() * z0_hat + (1 - b).sqrt() * eps
    mistakes = {
        "that is the guess of the clean latent; noise it again, to abar_prev.": z0_hat,
        "the noise's weight on the way back is √(1−ᾱ_prev), of the level where the step ends.": (
            b.sqrt() * z0_hat + (1 - a).sqrt() * eps
        ),
        "the guess keeps its old weight; it enters with √ᾱ_prev.": (
            a.sqrt() * z0_hat + (1 - b).sqrt() * eps
        ),
        "that noises back to where it came from: use abar_prev for both weights.": z,
        "abar and abar_prev are swapped: that goes a step forwards.": (
            a.sqrt() * (z - (1 - b).sqrt() * eps) / b.sqrt() + (1 - a).sqrt() * eps
        ),
        "ẑ_0 is not divided by √ᾱ: solve (1) for z_0.": (
            b.sqrt() * (z - (1 - a).sqrt() * eps) + (1 - b).sqrt() * eps
        ),
        "ẑ_0 has the wrong sign of ε̂: the noise must be taken away.": (
            b.sqrt() * (z + (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
        ),
        "the roots are missing in the second half: √ᾱ_prev and √(1−ᾱ_prev).": (
            b * z0_hat + (1 - b) * eps
        ),
        "the noise is not put back: that is only the shrunken guess.": b.sqrt() * z0_hat,
        "ε̂ is put back with the wrong sign.": b.sqrt() * z0_hat - (1 - b).sqrt() * eps,
        "it does not use eps_hat.": (b / a).sqrt() * z,
    }
    if abar_prev == 1.0:
        mistakes = {}  # several of them are right there
    return Trial((z, eps, a, b), right, mistakes, otherwise)
