"""A picture against its original: PSNR, SSIM; and pictures through a network, batch by batch."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from einops import reduce
from torch import Tensor, nn
from tqdm.auto import tqdm

from minildm.autoencoder import check_pictures
from minildm.intervals import Measured, exactly, mean_interval

SSIM_SIDE = 11  # of the Gaussian window
PART = 64  # pictures that go through a network at a time


def psnr(x: Tensor, x_rec: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB: two (B, 3, H, W) in [-1, 1] -> (B,).

    On [0, 1], after clamping: -10 log10 of the mean squared error of each picture; infinite for
    equal pictures. Average over pictures, not over their errors: `mean_interval(psnr(...))`.
    """
    a, b = _unit_range(x, x_rec)
    return -10 * reduce((a - b) ** 2, "b c h w -> b", "mean").log10()


def ssim(x: Tensor, x_rec: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), at most 1: two (B, 3, H, W) in [-1, 1] -> (B,).

    torchmetrics', on [0, 1] after clamping, window of 11 with sigma 1.5; sides of 11 at least.
    """
    from torchmetrics.functional.image import (  # here: it takes seconds to import
        structural_similarity_index_measure,
    )

    a, b = _unit_range(x, x_rec)
    if min(x.shape[-2:]) < SSIM_SIDE:
        raise ValueError(f"SSIM needs sides of {SSIM_SIDE} pixels at least, got {tuple(x.shape)}")
    found = structural_similarity_index_measure(b, a, data_range=1.0, reduction="none")
    return found.reshape(len(x))


def _unit_range(x: Tensor, x_rec: Tensor) -> tuple[Tensor, Tensor]:
    """[-1, 1] -> [0, 1], clamped, float32; both checked."""
    if x.shape != x_rec.shape or x.ndim != 4 or not x.numel():
        shapes = f"{tuple(x.shape)} and {tuple(x_rec.shape)}"
        raise ValueError(f"x and x_rec must both be (B, C, H, W), B >= 1, got {shapes}")
    for name, part in (("x", x), ("x_rec", x_rec)):
        if not part.is_floating_point() or not part.isfinite().all():
            raise ValueError(f"{name} must be finite floats in [-1, 1], got {part.dtype}")
    return ((x.float() + 1) / 2).clamp(0, 1), ((x_rec.float() + 1) / 2).clamp(0, 1)


@torch.no_grad()
def compare_pairs(
    real: Tensor, fake: Tensor, perceptual: nn.Module, clusters: Tensor | None = None
) -> dict[str, Measured]:
    """Means of `psnr`, `ssim` and `perceptual` over pairs: two (N, 3, H, W), float or uint8.

    A mean that is infinite, PSNR's where a picture is reproduced exactly, has no interval.
    """
    found: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "perceptual": []}
    place = device_of(perceptual, real.device)
    both = list(zip(real.split(PART), fake.split(PART), strict=True))
    with evaluating(perceptual):
        for a, b in tqdm(both, "pairs", unit="batch", delay=2, leave=False):
            a, b = as_floats(a).to(place), as_floats(b).to(place)
            for name, compare in (("psnr", psnr), ("ssim", ssim), ("perceptual", perceptual)):
                found[name].append(compare(a, b).cpu())
    values = {name: torch.cat(parts) for name, parts in found.items()}
    means = {
        name: mean_interval(v, clusters=clusters)
        for name, v in values.items()
        if v.isfinite().all()
    }
    exact = exactly(math.inf, len(real))  # only PSNR can be infinite
    return {name: means.get(name, exact) for name in values}


@torch.no_grad()
def extract(x: Tensor, features: nn.Module, batch_size: int = 128) -> Tensor:
    """Features of pictures, in batches: (N, 3, S, S), float in [-1, 1] or uint8 -> (N, D), CPU."""
    if x.ndim != 4 or not len(x):
        raise ValueError(f"pictures must be (N, 3, S, S), N >= 1, got {tuple(x.shape)}")
    device = device_of(features, x.device)
    parts = tqdm(x.split(batch_size), desc="features", unit="batch", delay=2, leave=False)
    return torch.cat([features(as_floats(part).to(device)).float().cpu() for part in parts])


def as_floats(x: Tensor) -> Tensor:
    """uint8 or floats in [-1, 1] -> float32 in [-1, 1], checked."""
    if not x.isfinite().all():
        raise ValueError("pictures must be finite: there are NaN or infinite values")
    return x / 127.5 - 1 if x.dtype == torch.uint8 else x.float()


def name_of(module: nn.Module) -> str:
    """What a network calls itself in tables."""
    return getattr(module, "name", type(module).__name__)


def check_set(x: Tensor, name: str, shape: torch.Size | None = None) -> None:
    """ValueError unless x is (N, 3, H, W), of that (3, H, W), uint8 or float in [-1, 1]."""
    if x.ndim != 4 or x.shape[1] != 3 or (shape is not None and x.shape[1:] != shape):
        want = "(N, 3, H, W)" if shape is None else f"(N, {', '.join(map(str, shape))})"
        raise ValueError(f"{name} must be pictures {want}, got {tuple(x.shape)}")
    if x.dtype != torch.uint8:
        if not x.is_floating_point():
            raise ValueError(f"{name} must be uint8 or float in [-1, 1], got {x.dtype}")
        if len(x):
            check_pictures(x, name)


def device_of(module: nn.Module, otherwise: torch.device) -> torch.device:
    """The device of a module's weights."""
    return next(
        chain(module.parameters(), module.buffers()), torch.empty(0, device=otherwise)
    ).device


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within the block the module evaluates; after it, it does as before."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
