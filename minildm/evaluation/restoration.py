"""Tasks with an image as the condition: super-resolution and inpainting, and their baselines."""

from typing import Any

import torch
from torch import Tensor

from minildm.data.transforms import degrade_for_task, enlarge, mean_fill, shrink
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.evaluation.image_metrics import psnr
from minildm.layers import Batch, BatchRandom


def given_of(
    x: Tensor,
    task: str,
    f: int = 4,
    *,
    degradation: str = "bicubic",
    masks: tuple[str, ...] = ("lama", "halves"),
    seed: int = 0,
) -> Batch:
    """The input of a restoration of x (N, 3, H, W) in [-1, 1]: `low_res`, or `image` and `mask`.

    task: "low_res" or "inpaint". Determined by the seed alone, so the same for every model and
    baseline.
    """
    rng = BatchRandom(torch.Generator().manual_seed(seed))
    return degrade_for_task({"image": x}, task, f, degradation, masks, rng)


def pasted(x: Tensor, given: Batch) -> Tensor:
    """Inpainting: the known pixels as given, x in the hole; other tasks: x itself."""
    if "mask" not in given:
        return x
    return torch.where(given["mask"].to(x.device) > 0.5, given["image"].to(x), x)


def restored(model: LatentDiffusion, given: Batch, **sampling: Any) -> Tensor:
    """A sample for each input, with the known pixels pasted in: (N, 3, H, W) in [-1, 1], CPU."""
    return pasted(model.sample(given, **sampling).cpu(), given)


def baseline(given: Batch, f: int = 4) -> Tensor:
    """The restoration without learning: bicubic enlargement, or the mean colour in the hole."""
    if "mask" in given:
        return mean_fill(given["image"], given["mask"])
    return enlarge(given["low_res"], f)


def kept(x: Tensor, given: Batch, f: int = 4) -> Tensor:
    """Consistency of x (N, 3, H, W) with its input: PSNR in dB, (N,).

    Super-resolution: of x shrunk again against `low_res`. Inpainting: of the known pixels, before
    they are pasted.
    """
    if "mask" in given:
        known = given["mask"] > 0.5
        return psnr(torch.where(known, given["image"], 0.0), torch.where(known, x, 0.0))
    return psnr(given["low_res"], shrink(x, f))
