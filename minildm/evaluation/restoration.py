"""Whether a model keeps to the image it is given: super-resolution, inpainting, semantic maps."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minildm.compression.autoencoder import Autoencoder
from minildm.compression.perceptual import perceptual_distance
from minildm.data.dataset import as_float
from minildm.data.scenes import ScenesDataset
from minildm.data.transforms import degraded, draw_masks, enlarge, mean_fill, shrink
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.evaluation.distribution import evaluate_images
from minildm.evaluation.features import frechet_features
from minildm.evaluation.following import controlled
from minildm.evaluation.image_metrics import psnr, reconstruct
from minildm.evaluation.intervals import Evaluation, Measured, mean_interval
from minildm.layers import Batch, BatchRandom
from minildm.training.classifier import Segmenter, agreement, segmented


def reconstruction_psnr(autoencoder: Autoencoder, x: Tensor) -> Measured:
    """Mean PSNR of D(E(x)) over images (N, 3, H, W)."""
    return mean_interval(psnr(x, reconstruct(autoencoder, x)))


def bicubic_psnr(x: Tensor, f: int) -> Measured:
    """Mean PSNR of images shrunk f times and enlarged again: the baseline without learning."""
    return mean_interval(psnr(x, enlarge(shrink(x, f), f)))


def task_of(model: LatentDiffusion) -> str:
    """ "low_res" or "inpaint"; raises ValueError for a model of another task."""
    config = model.config.conditioner
    kind = getattr(config, "concat", config).kind
    if kind not in ("low_res", "inpaint"):
        raise ValueError(f"kind={kind!r} restores no image; 'low_res' and 'inpaint' do")
    return kind


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

    Determined by the seed alone, so the same for every model and baseline.
    """
    rng = BatchRandom(torch.Generator().manual_seed(seed))
    if task == "low_res":
        return {"low_res": degraded(x, f, rng) if degradation == "degraded" else shrink(x, f)}
    return {"image": x, "mask": draw_masks(masks, len(x), tuple(x.shape[2:]), rng).to(x)}


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


def evaluate_restoration(
    model: LatentDiffusion,
    x: Tensor,
    given: Batch | None = None,
    *,
    clusters: Tensor | None = None,
    groups: int = 10,
    seed: int = 0,
    baselines: dict[str, Tensor] | None = None,
    **sampling: Any,
) -> dict[str, Evaluation]:
    """A model of super-resolution or inpainting on images x (N, 3, H, W), and its baselines.

    Keys "model", "bicubic" or "mean fill", and those of `baselines`, restorations by others; each
    as `evaluate_images(paired=True)`. The model also has `kept`, its consistency with the input,
    and `kept_shuffled`, with the inputs randomly permuted; `settings["follows"]`: whether these
    intervals are apart. given: as from `given_of`, the default.
    """
    task, f = task_of(model), model.autoencoder.f
    given = given_of(x, task, f, seed=seed) if given is None else given
    raw = model.sample(given, seed=seed, **sampling).cpu()

    def consistency(images: Tensor, given: Batch) -> dict[str, Measured]:
        return {"kept": mean_interval(kept(images, given, f), clusters)}

    true = controlled(consistency, raw, given, seed=seed)
    sets = {"model": pasted(raw, given)}
    sets["mean fill" if task == "inpaint" else "bicubic"] = baseline(given, f)
    sets |= baselines or {}
    options = {"paired": True, "clusters": clusters, "groups": groups, "seed": seed}
    options["features"] = frechet_features().to(x.device)  # once for all sets
    options["perceptual"] = perceptual_distance().to(x.device)
    found = {name: evaluate_images(x, images, **options) for name, images in sets.items()}
    found["model"] |= true
    found["model"].settings |= {"follows": true.settings["follows"]["kept"], "task": task}
    found["model"].settings |= sampling
    return found


def evaluate_semantic(
    model: LatentDiffusion, segmenter: Segmenter, n: int, *, seed: int = 0, **sampling: Any
) -> Evaluation:
    """Whether samples for the maps of n held-out scenes show what the maps ask for.

    By the segmenter: `pixels`, the share of pixels with the requested label, and `iou`, the mean
    over an image's requested labels; `..._real`, of the scenes; `..._shuffled`, by other maps.
    """
    if model.config.conditioner.labels != segmenter.config.labels:
        raise ValueError("model and segmenter must know the same labels")
    scenes = ScenesDataset("val", model.config.image_size, n=n)
    maps, real = scenes.maps.long(), as_float(scenes.images)
    x = model.sample({"semantic": maps}, seed=seed, **sampling).cpu()
    found = controlled(lambda x, y: _agreement(segmenter, x, y), x, maps, real, seed)
    found.settings |= {"seed": seed, **sampling}
    return found


def evaluate_segmenter(segmenter: Segmenter, n: int, size: int = 64) -> Evaluation:
    """How accurate the segmenter itself is, on n held-out scenes: `pixels` and `iou`."""
    scenes = ScenesDataset("val", size, n=n)
    maps = scenes.maps.long()
    return Evaluation(_agreement(segmenter, as_float(scenes.images), maps), {})


def _agreement(segmenter: Segmenter, x: Tensor, maps: Tensor) -> dict[str, Measured]:
    pixels, iou = agreement(segmented(segmenter, x), maps)
    return {"pixels": mean_interval(pixels), "iou": mean_interval(iou)}


def distance_to(
    low_res: Tensor, autoencoder: Autoencoder, perceptual: nn.Module | None = None, factor: int = 4
) -> Callable[[Tensor], Tensor]:
    """Distance of decoded latents, shrunk, from low_res (B, 3, h, w): z0 -> (B,).

    1/2 |low_res - T(D(z0))|^2 with T = `shrink` (LDM Eq. 16), or `perceptual` of both, enlarged.
    Super-resolution by guidance alone: `model.sample(n=len(low_res), size=..., guide=lambda d:
    image_guided(d, model.schedule, distance_to(low_res, model.autoencoder), scale))`.
    """

    def distance(z0: Tensor) -> Tensor:
        small = shrink(autoencoder.decode(z0), factor)
        if perceptual is not None:
            return perceptual(enlarge(low_res, factor), enlarge(small, factor))
        return 0.5 * (small - low_res).square().sum(dim=(1, 2, 3))

    return distance
