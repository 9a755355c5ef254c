"""What training makes of a batch: mirrored images, named styles, the input of a task."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minildm.data.dataset import as_float
from minildm.data.degradations import degraded, draw_masks, shrink
from minildm.layers import Batch, BatchRandom


def random_flips(x: Tensor, rng: BatchRandom) -> Tensor:
    """Mirror each image (B, 3, H, W) with probability one half."""
    chosen = rng.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    return torch.where(chosen, x.flip(-1), x)


def mirrored(batch: Batch, chosen: Tensor) -> Batch:
    """Mirror the boxes and images of the chosen (B,) bool samples.

    boxes (B, K, 4), image (B, 3, H, W) and semantic (B, H, W), where they are present.
    """
    batch = mirrored_boxes(batch, chosen)
    for key in {"image", "semantic"} & set(batch):
        x = batch[key]
        batch = {**batch, key: torch.where(chosen.view(-1, *[1] * (x.ndim - 1)), x.flip(-1), x)}
    return batch


def mirrored_boxes(batch: Batch, chosen: Tensor) -> Batch:
    """Mirror the boxes (B, K, 4) of the chosen (B,) bool samples; padding stays zero."""
    if "boxes" not in batch:
        return batch
    boxes, there = batch["boxes"], batch["classes"] >= 0
    left, top, right, bottom = boxes.unbind(-1)
    turned = torch.stack([1 - right, top, 1 - left, bottom], dim=-1)
    return {**batch, "boxes": torch.where((chosen[:, None] & there)[..., None], turned, boxes)}


def degrade_for_task(
    batch: Batch, kind: str, f: int, degradation: str, masks: Sequence[str], rng: BatchRandom
) -> Batch:
    """Add what a task's conditioner reads, made from `image` or `semantic` (uint8 or as in items).

    kind, of a spatial conditioner: "low_res": `low_res` (B, 3, H/f, W/f) in place of `image`;
    "inpaint": `image` in [-1, 1] and `mask` (B, 1, H, W); "semantic": `semantic` as int64. Other
    kinds need nothing.
    """
    if kind == "semantic":
        return {**batch, "semantic": batch["semantic"].long()}
    if kind not in ("low_res", "inpaint"):
        return batch
    x = as_float(batch["image"])
    if kind == "low_res":
        small = degraded(x, f, rng) if degradation == "degraded" else shrink(x, f)
        return {**{key: v for key, v in batch.items() if key != "image"}, "low_res": small}
    return {**batch, "image": x, "mask": draw_masks(masks, len(x), x.shape[2:], rng).to(x)}


def style_caption(caption: str, style: str) -> str:
    """Append the style to a caption, as prompts do: "a red apple, blob style"."""
    return f"{caption}, {style} style"


def with_styles(batch: Batch, styles: Sequence[str], share: float, rng: BatchRandom) -> Batch:
    """Name the style in a random share of the captions."""
    if not share or "caption" not in batch:
        return batch
    named = (rng.rand(len(batch["caption"])) < share).tolist()
    captions = [
        style_caption(caption, styles[style]) if name else caption
        for caption, style, name in zip(
            batch["caption"], batch["style"].tolist(), named, strict=True
        )
    ]
    return {**batch, "caption": captions}
