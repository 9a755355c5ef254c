"""How good a trained model is, on validation pictures that it never saw."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from minildm.autoencoder import Autoencoder
from minildm.data.crops import CROP_CLASSES, CropsDataset
from minildm.data.emoji import EmojiDataset
from minildm.data.scenes import ScenesDataset
from minildm.diffusion import LatentDiffusion, seeded_noise
from minildm.judge import Judge, correct
from minildm.metrics import Measured, mean_interval, proportion_interval, psnr, reconstruct


@contextmanager
def on_device(model: torch.nn.Module, device: torch.device) -> Iterator[torch.nn.Module]:
    """Within the block the model is there, evaluating; after it back on the CPU."""
    try:
        yield model.to(device).eval()
    finally:
        model.to("cpu")


def pictures(data: EmojiDataset) -> Tensor:
    """All pictures of a set: (N, 3, H, W) float32 in [-1, 1]."""
    return data.images.float() / 127.5 - 1.0


def reconstruction_psnr(autoencoder: Autoencoder, x: Tensor) -> Measured:
    """Mean PSNR over pictures (B, 3, H, W), on [0, 1], over white, with its 95 % interval."""
    return mean_interval(psnr(x, reconstruct(autoencoder, x)))


def bicubic_psnr(x: Tensor, f: int) -> Measured:
    """The same for pictures shrunk f times and enlarged again: what no learning gives."""
    small = torch.nn.functional.interpolate(
        x, scale_factor=1 / f, mode="bicubic", antialias=True, align_corners=False
    )
    back = torch.nn.functional.interpolate(
        small, size=x.shape[-2:], mode="bicubic", align_corners=False
    )
    return mean_interval(psnr(x, back.clamp(-1.0, 1.0)))


def sample_classes(
    model: LatentDiffusion,
    per_class: int,
    *,
    steps: int = 25,
    guidance_scale: float = 3.0,
    seed: int = 0,
    batch: int = 64,
) -> Tensor:
    """Pictures of every class of the model, class by class: (classes * per_class, 3, H, W).

    One seed for all: a longer list begins with the same noise.
    """
    names = [name for name in model.config.conditioner.classes for _ in range(per_class)]
    noise, parts = seeded_noise(seed), []
    for start in tqdm(range(0, len(names), batch), "sample", unit="batch", delay=2):
        y = names[start : start + batch]
        x = model.sample(y, steps=steps, guidance_scale=guidance_scale, noise=noise)
        parts.append(x.cpu())
    return torch.cat(parts)


def group_of_class(data: EmojiDataset) -> Tensor:
    """Each class's group: (classes,) int64."""
    groups = torch.zeros(len(data.classes), dtype=torch.long)
    groups[data.labels] = data.group_ids
    return groups


def judged(judge: Judge, x: Tensor, groups: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """How often the judge names the true group: for each group, and the mean over groups.

    x (N, 3, H, W), groups (N,) int64 into names. `accuracy` weighs each group alike, so that
    sets with other shares of the groups can be compared; `per_group` holds Measured values.
    """
    right = correct(judge, x, groups)
    per_group = {
        names[g]: proportion_interval(int(right[groups == g].sum()), int((groups == g).sum()))
        for g in groups.unique().tolist()
    }
    accuracy = sum(m.value for m in per_group.values()) / len(per_group)
    return {"accuracy": accuracy, "n": len(x), "per_group": per_group}


def class_accuracy(
    model: LatentDiffusion,
    judge: Judge,
    per_class: int,
    *,
    x: Tensor | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """Let the judge name the groups of samples, and of real validation pictures beside.

    x: samples already drawn by `sample_classes`; else they are drawn with `sampling`. Emoji
    models only: ValueError if the model's classes are no emoji subgroups.
    """
    classes = model.config.conditioner.classes
    real = EmojiDataset("val", model.config.image_size, subgroups=classes)
    x = sample_classes(model, per_class, **sampling) if x is None else x
    asked = group_of_class(real).repeat_interleave(per_class)
    of_samples = judged(judge, x, asked, real.groups)
    of_real = judged(judge, pictures(real), real.group_ids, real.groups)
    return {
        "accuracy_samples": round(of_samples["accuracy"], 3),
        "accuracy_real": round(of_real["accuracy"], 3),
        "ratio": round(of_samples["accuracy"] / of_real["accuracy"], 3),
        "n_samples": of_samples["n"],
        "n_real": of_real["n"],
        "per_group_samples": of_samples["per_group"],
        "per_group_real": of_real["per_group"],
    }


def judge_accuracy(judge: Judge, scenes: int = 1000) -> dict[str, str]:
    """How often the judge is right, for each of its questions, on validation pictures.

    A judge of crops: on the crops of that many validation scenes.
    """
    if judge.config.labels == CROP_CLASSES:
        val: Any = CropsDataset(ScenesDataset("val", 64, n=scenes))
    else:
        val = EmojiDataset("val", 64, subgroups=judge.config.labels)
    truths = {"label": val.labels, "group": val.group_ids, "style": val.style_ids}
    x = pictures(val)
    right = {question: correct(judge, x, truth, question) for question, truth in truths.items()}
    return {q: str(proportion_interval(int(r.sum()), len(r))) for q, r in right.items()}
