"""Checks of notebook 20: a schedule that ends in pure noise, and the loss of a rectified flow."""

from collections.abc import Callable

import torch
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function
from minildm.schedule import NoiseSchedule


def check_rescale(fn: object) -> Result:
    """Check `rescale(abar)`: (T,) falling -> (T,) with the same first value, and 0 at the end."""
    praise = "the roots are shifted to end at 0, and stretched to begin where they began."
    tables = (
        NoiseSchedule.scaled_linear(50, 0.01, 0.1).alphas_cumprod,
        NoiseSchedule.linear(7, 0.1, 0.4).alphas_cumprod,
    )
    return check_function(fn, [_rescale_trial(table) for table in tables], praise)


def _stretched(x: Tensor) -> Tensor:
    return (x - x[-1]) * x[0] / (x[0] - x[-1])


def _rescale_trial(abar: Tensor) -> Trial:
    root = abar.sqrt()
    right = _stretched(root) ** 2
    cut = abar.clone()
    cut[-1] = 0
    mistakes = {
        "it stretches ᾱ itself; (5) stretches its root, the weight of the signal.": (
            _stretched(abar)
        ),
        "those are the roots √ᾱ; square them at the end.": _stretched(root),
        "it ends at 0, but no longer begins at ᾱ₀: scale by √ᾱ₀ / (√ᾱ₀ − √ᾱ_T).": (
            (root - root[-1]) ** 2
        ),
        "it begins at 1: multiply by √ᾱ₀, so that the first step stays what it was.": (
            ((root - root[-1]) / (root[0] - root[-1])) ** 2
        ),
        "only the last value is changed; all of them have to move a little.": cut,
        "ᾱ_T is taken away without a root, and nothing is stretched.": abar - abar[-1],
        "it divides by √ᾱ₀ twice, or multiplies the wrong way round.": (
            ((root - root[-1]) * (root[0] - root[-1]) / root[0]) ** 2
        ),
        "the roots are shifted by ᾱ_T in place of its root.": (
            ((root - abar[-1]) * root[0] / (root[0] - abar[-1])) ** 2
        ),
        "it returns ᾱ unchanged.": abar,
    }
    return Trial((abar,), right, mistakes, "its values are not those of (5).")


def check_flow_loss(fn: object) -> Result:
    """Check `flow_loss(velocity, z0, tau, eps)` -> (B,); velocity(z, tau) (B, c, h, w)."""
    praise = "the network is asked on the line between z0 and eps, for the line's slope."
    return check_function(fn, [_flow_trial(_curved)], praise)


def _curved(z: Tensor, tau: Tensor) -> Tensor:
    """Some velocity that depends on all that it is given; a network takes a time a sample."""
    if tau.shape != (len(z),):
        raise ValueError(f"tau of shape {tuple(tau.shape)}, a network wants ({len(z)},)")
    return torch.sin(z) + (1 + tau.view(-1, 1, 1, 1)) ** 2


def _flow_trial(velocity: Callable[[Tensor, Tensor], Tensor]) -> Trial:
    generator = torch.Generator().manual_seed(0)
    z0, eps = torch.randn(2, 5, 3, 4, 2, generator=generator)
    tau = torch.tensor([0.1, 0.3, 0.5, 0.8, 1.0])
    w = tau.view(-1, 1, 1, 1)
    line, back, slope = (1 - w) * z0 + w * eps, w * z0 + (1 - w) * eps, eps - z0
    kept = (1 - w**2).sqrt() * z0 + w * eps

    def loss(z: Tensor, target: Tensor, at: Tensor = tau, dims: tuple = (1, 2, 3)) -> Tensor:
        return ((velocity(z, at) - target) ** 2).mean(dims)

    right = loss(line, slope)
    mistakes = {
        "the target has the wrong sign: tau grows towards the noise, so it is eps − z0.": (
            loss(line, -slope)
        ),
        "the target is eps; a velocity is the difference of the line's two ends.": loss(line, eps),
        "the target is z0; a velocity is the difference of the line's two ends.": loss(line, z0),
        "the line runs the wrong way: at tau = 0 it must be z0.": loss(back, slope),
        "line and target both run the wrong way: here tau = 0 is the data.": loss(back, -slope),
        "its weights keep the variance, as √ᾱ and √(1−ᾱ) do; a line's are 1 − tau and tau.": (
            loss(kept, slope)
        ),
        "the network is told 1 − tau; tell it tau.": loss(line, slope, 1 - tau),
        "the network is asked at z0; ask at (6), on the line.": loss(z0, slope),
        "the network is asked at eps; ask at (6), on the line.": loss(eps, slope),
        "the errors are not squared.": (velocity(line, tau) - slope).abs().mean((1, 2, 3)),
        "it sums over channels and pixels; take the mean.": right * z0[0].numel(),
        "it is weighed by tau; every tau counts alike.": right * tau,
    }
    return Trial((velocity, z0, tau, eps), right, mistakes, "its values are not those of (7).")
