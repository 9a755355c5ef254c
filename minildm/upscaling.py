"""A small picture steers a model that need not have been trained for it: LDM appendix C."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minildm.autoencoder import Autoencoder
from minildm.data.corruptions import enlarge, shrink
from minildm.diffusion import LatentDiffusion, seeded_noise
from minildm.guidance import image_guided
from minildm.spatial import checked_picture
from minildm.types import Denoise


def distance_to(
    low_res: Tensor, autoencoder: Autoencoder, perceptual: nn.Module | None = None, factor: int = 4
) -> Callable[[Tensor], Tensor]:
    """How far the pictures of latents are, shrunk, from low_res (B, 3, h, w): z0 -> (B,).

    1/2 |low_res - T(D(z0))|^2 with T = `shrink`, summed over channels and pixels (Eq. 16); or
    `perceptual`, a distance of two pictures, after T and a bicubic enlargement of both, as such
    a network wants larger sides. ValueError unless low_res is in [-1, 1].
    """
    wanted = enlarge(checked_picture(low_res, "low_res"), factor)

    def distance(z0: Tensor) -> Tensor:
        small = shrink(autoencoder.decode(z0), factor)
        if perceptual is None:
            return 0.5 * (small - low_res).square().sum(dim=(1, 2, 3))
        return perceptual(wanted, enlarge(small, factor))

    return distance


def sample_towards(
    model: LatentDiffusion,
    low_res: Tensor,
    scale: float,
    y: Any = None,
    *,
    perceptual: nn.Module | None = None,
    factor: int = 4,
    seed: int = 0,
    batch: int = 16,
    **sampling: Any,
) -> Tensor:
    """Pictures whose shrunk copies should be low_res (N, 3, h, w): (N, 3, factor h, factor w).

    On the CPU, in [-1, 1]. scale: of `image_guided`; 0 leaves the model alone. y: N conditions,
    as `model.sample` takes them: [""] * N for a model of text, {"low_res": low_res} for one of
    super-resolution; None for an unconditional model. perceptual: see `distance_to`. sampling:
    whatever else `model.sample` takes. One seed for all: a longer list begins with the same noise.
    """
    n, size = len(low_res), tuple(factor * side for side in low_res.shape[-2:])
    parts, noise = [], seeded_noise(seed)
    for start in range(0, n, batch):
        rows = slice(start, start + batch)
        some = {k: v[rows] for k, v in y.items()} if isinstance(y, dict) else y and y[rows]
        wanted = low_res[rows].to(model.device)
        distance = distance_to(wanted, model.autoencoder, perceptual, factor)

        def guide(denoise: Denoise, distance: Callable[[Tensor], Tensor] = distance) -> Denoise:
            return image_guided(denoise, model.schedule, distance, scale)

        options = {"noise": noise, "guide": guide, "size": size, "n": len(wanted), **sampling}
        parts.append(model.sample(some, **options).cpu())
    return torch.cat(parts)
