"""A denoiser, and diffusers' schedulers on our table."""

import warnings
from typing import Any

import torch
from torch import Tensor

from minildm.diffusion.schedule import NoiseSchedule

with warnings.catch_warnings():  # deprecations inside diffusers and what it imports
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    import diffusers  # noqa: F401

F64 = torch.float64
SCHEDULE = NoiseSchedule.scaled_linear(dtype=F64)
ZERO_SNR = SCHEDULE.zero_terminal_snr()
COSINE = NoiseSchedule.cosine().to(F64)  # sigma = 20,000 at the last time


def wavy(z: Tensor, t: Tensor) -> Tensor:
    """A denoiser that is neither linear nor the same at all times."""
    return torch.sin(2 * z) + 0.1 * torch.cos(t.to(z.dtype) / 100).view(-1, 1, 1, 1)


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def scheduler(kind: type, schedule: NoiseSchedule = SCHEDULE, **options: Any) -> Any:
    """A scheduler of diffusers on our float64 table; its own is the same in float32."""
    theirs = kind(schedule.T, 0.0015, 0.0195, beta_schedule="scaled_linear", **options)
    assert error(theirs.alphas_cumprod.double(), schedule.alphas_cumprod) < 1e-5
    theirs.alphas_cumprod = schedule.alphas_cumprod
    if not options.get("set_alpha_to_one", True):
        theirs.final_alpha_cumprod = schedule.alphas_cumprod[0]
    return theirs
