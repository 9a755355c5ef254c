"""The small types that modules hand to each other."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

Batch = dict[str, Any]  # image (B, 3, H, W) in [-1, 1], label (B,), caption [str] * B, ...
Noise = Callable[[Tensor], Tensor]  # like torch.randn_like: a tensor -> N(0, I) of its shape
EditFn = Callable[[Tensor, Tensor], Tensor]  # (z_t, t) -> z_t, between sampling steps


class Conditioning(NamedTuple):
    """tau_theta(y), as the UNet takes it; LDM Sec. 3.3. None where a kind is not used."""

    tokens: Tensor | None = None  # (B, M, d_cond), through cross-attention
    concat: Tensor | None = None  # (B, c', h, w), beside z_t


class Prediction(NamedTuple):
    """A denoiser's view of z_t, both ways; needed where eps alone does not determine z0."""

    eps: Tensor  # (B, c, h, w)
    z0: Tensor  # (B, c, h, w)


EpsTheta = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (z_t, t, c) -> eps_hat (z0, v)
Denoise = Callable[[Tensor, Tensor], Tensor | Prediction]  # (z_t, t) -> eps_hat, y bound


class Step(NamedTuple):
    """One step of a sampler."""

    t: int  # where this step started
    z: Tensor  # (B, c, h, w) after the step
    z0_hat: Tensor  # (B, c, h, w) clean latent predicted at t


class Record(NamedTuple):
    """One optimiser step of a training."""

    step: int  # counted from 1
    images: int  # training images seen so far
    seconds: float  # of training so far, earlier parts of a resumed run included
    lr: float
    terms: dict[str, float]  # the loss and its parts, each named
