"""Whether a model keeps to the picture it is given: super-resolution, inpainting, maps.

Each set of numbers stands beside rivals that learn nothing, and beside the same samples with the
conditions dealt anew, which is chance: a model that ignores its condition gets it.
"""

from typing import Any

import torch
from torch import Tensor

from minildm.data.corruptions import draw_masks, enlarge, mean_fill, shrink, spoiled
from minildm.data.scenes import ScenesDataset
from minildm.diffusion import LatentDiffusion
from minildm.fidelity import psnr
from minildm.following import dealt_anew, sample_conditions
from minildm.intervals import Evaluation, mean_interval
from minildm.metrics import evaluate_pictures
from minildm.segmenter import Segmenter, agreement, segmented
from minildm.types import Batch

TASKS = ("low_res", "inpaint")
LABELS = ScenesDataset.semantic_classes


def task_of(model: LatentDiffusion) -> str:
    """What stands beside z_t, of TASKS; ValueError for a model of another task."""
    concat = model.config.conditioner.concat
    if concat not in TASKS:
        raise ValueError(f"a model with concat={concat!r} restores no picture: {', '.join(TASKS)}")
    return concat


def given_of(
    x: Tensor,
    task: str,
    f: int = 4,
    *,
    degradation: str = "bicubic",
    masks: tuple[str, ...] = ("lama", "halves"),
    seed: int = 0,
) -> Batch:
    """What a model is given of x (N, 3, H, W) in [-1, 1]: `low_res`, or `image` and `mask`.

    The same for every model and rival: drawn by the seed alone.
    """
    draw = torch.Generator().manual_seed(seed)
    if task == "low_res":
        return {"low_res": spoiled(x, f, draw) if degradation == "spoiled" else shrink(x, f)}
    return {"image": x, "mask": draw_masks(masks, len(x), x.shape[2:], draw).to(x)}


def restored(model: LatentDiffusion, given: Batch, *, seed: int = 0, **sampling: Any) -> Tensor:
    """A picture for each condition: (N, 3, H, W) in [-1, 1]; what is known is pasted in."""
    x = sample_conditions(model, given, seed=seed, **sampling)
    return pasted(x, given)


def pasted(x: Tensor, given: Batch) -> Tensor:
    """Inpainting: the known pixels as they were given, x in the hole; other tasks: x itself."""
    if "mask" not in given:
        return x
    return torch.where(given["mask"].to(x.device) > 0.5, given["image"].to(x), x)


def plain(given: Batch, f: int = 4) -> Tensor:
    """The rival that learns nothing: bicubic enlargement, or the mean colour in the hole."""
    if "mask" in given:
        return mean_fill(given["image"], given["mask"])
    return enlarge(given["low_res"], f)


def kept(x: Tensor, given: Batch, f: int = 4) -> Tensor:
    """How true x (N, 3, H, W) is to what was given: PSNR in dB, (N,).

    Super-resolution: of x shrunk again, to `low_res`. Inpainting: of the known pixels, which a
    model must be asked for before they are pasted.
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
    rivals: dict[str, Tensor] | None = None,
    **sampling: Any,
) -> dict[str, Evaluation]:
    """A model of super-resolution or inpainting on pictures x (N, 3, H, W), and its rivals.

    Keys "model", "bicubic" or "mean fill", and those of `rivals`, pictures that others made.
    Each as of `evaluate_pictures(paired=True)`: psnr, ssim, perceptual, the Frechet distance (a
    proxy without Inception), kid, precision, recall. The model also has `kept`, how true it is
    to what it was given, and `kept_shuffled`, the same with the conditions dealt anew:
    `settings["follows"]` says whether these intervals are apart. given: as of `given_of`, which
    makes it by default. clusters: see `evaluate_pictures`.
    """
    task, f = task_of(model), model.autoencoder.f
    given = given_of(x, task, f, seed=seed) if given is None else given
    raw = sample_conditions(model, given, seed=seed, **sampling)
    order = dealt_anew(len(x), seed)
    others = {name: value[order] for name, value in given.items()}
    true = {
        "kept": mean_interval(kept(raw, given, f), clusters=clusters),
        "kept_shuffled": mean_interval(kept(raw, others, f), clusters=clusters),
    }
    follows = true["kept"].low > true["kept_shuffled"].high
    sets = {"model": pasted(raw, given)}
    sets["mean fill" if task == "inpaint" else "bicubic"] = plain(given, f)
    found = {}
    for name, pictures in (sets | (rivals or {})).items():
        options = {"paired": True, "clusters": clusters, "groups": groups, "seed": seed}
        found[name] = evaluate_pictures(x, pictures, **options)
    judged = found["model"]
    settings = judged.settings | {"follows": follows, "task": task, **sampling}
    found["model"] = Evaluation(judged.measured | true, settings)
    return found


def evaluate_semantic(
    model: LatentDiffusion, segmenter: Segmenter, n: int, *, seed: int = 0, **sampling: Any
) -> Evaluation:
    """Whether pictures made from the maps of n validation scenes show what the maps ask for.

    By the segmenter: `pixels`, the share of pixels with the asked label, and `iou`, the mean over
    the asked labels, per picture; `..._real`, of the scenes themselves, and `..._shuffled`, with
    the maps dealt anew, chance. ValueError for a model or a segmenter of other labels.
    """
    if not model.config.conditioner.labels == segmenter.config.labels == LABELS:
        raise ValueError("model and segmenter must know the labels of the scenes' maps")
    real, maps = _scenes(model.config.image_size, n)
    x = sample_conditions(model, {"semantic": maps}, seed=seed, **sampling)
    order, measured = dealt_anew(n, seed), {}
    for name, pictures, asked in (
        ("", x, maps),
        ("_real", real, maps),
        ("_shuffled", x, maps[order]),
    ):
        pixels, iou = agreement(segmented(segmenter, pictures), asked)
        measured |= {f"pixels{name}": mean_interval(pixels), f"iou{name}": mean_interval(iou)}
    follows = {
        key: measured[key].low > measured[f"{key}_shuffled"].high for key in ("pixels", "iou")
    }
    return Evaluation(measured, {"follows": follows, "seed": seed, **sampling})


def evaluate_segmenter(segmenter: Segmenter, n: int, size: int = 64) -> Evaluation:
    """How right the judge of maps is itself, on n validation scenes: `pixels` and `iou`.

    ValueError for a segmenter of other labels than the scenes'.
    """
    if segmenter.config.labels != LABELS:
        raise ValueError("the segmenter must know the labels of the scenes' maps")
    real, maps = _scenes(size, n)
    pixels, iou = agreement(segmented(segmenter, real), maps)
    return Evaluation({"pixels": mean_interval(pixels), "iou": mean_interval(iou)}, {})


def _scenes(size: int, n: int) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, S, S) and maps (n, S, S) of validation scenes."""
    scenes = ScenesDataset("val", size, n=n)
    items = [scenes[i] for i in range(n)]
    real, maps = (torch.stack([item[key] for item in items]) for key in ("image", "semantic"))
    return real, maps
