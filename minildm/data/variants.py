"""What training makes of a batch of latents: mirrored, a style named, a picture spoiled."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minildm import draws
from minildm.data.corruptions import draw_masks, shrink, spoiled
from minildm.types import Batch


def mirrored(batch: Batch, chosen: Tensor) -> Batch:
    """The batch with the boxes and pictures of its chosen (B,) bool samples mirrored.

    boxes (B, K, 4), image (B, 3, H, W), semantic (B, H, W), where they are there.
    """
    batch = mirrored_boxes(batch, chosen)
    for key in {"image", "semantic"} & set(batch):
        x = batch[key]
        there = chosen.view(-1, *[1] * (x.ndim - 1)).to(x.device)
        batch = {**batch, key: torch.where(there, x.flip(-1), x)}
    return batch


def mirrored_boxes(batch: Batch, mirrored: Tensor) -> Batch:
    """The batch with the boxes (B, K, 4) of its mirrored (B,) bool samples mirrored, too."""
    if "boxes" not in batch:
        return batch
    boxes, there = batch["boxes"], batch["classes"] >= 0
    left, top, right, bottom = boxes.unbind(-1)
    turned = torch.stack([1 - right, top, 1 - left, bottom], dim=-1)
    chosen = mirrored[:, None, None] & there[..., None]
    return {**batch, "boxes": torch.where(chosen, turned, boxes)}


def corrupted(batch: Batch, concat: str, f: int, degradation: str, masks: Sequence[str]) -> Batch:
    """The batch with what a task is given of its `image` or `semantic` (bytes), drawn anew.

    concat names the task: "low_res": `low_res` (B, 3, H/f, W/f); "inpaint": `image` in [-1, 1] and
    `mask` (B, 1, H, W); "semantic": `semantic` as int64. See corruptions.
    """
    if concat == "semantic":
        return {**batch, "semantic": batch["semantic"].long()}
    if concat == "none":
        return batch
    x = batch["image"].float() / 127.5 - 1
    if concat == "low_res":
        small = spoiled(x, f) if degradation == "spoiled" else shrink(x, f)
        return {**{k: v for k, v in batch.items() if k != "image"}, "low_res": small}
    return {**batch, "image": x, "mask": draw_masks(masks, len(x), x.shape[2:]).to(x)}


def style_caption(caption: str, style: str) -> str:
    """A caption that names its style, as a prompt does: "a red apple, blob style"."""
    return f"{caption}, {style} style"


def with_styles(batch: Batch, styles: Sequence[str], share: float) -> Batch:
    """The batch with the style named in that share of its captions, drawn anew each time."""
    if not share or "caption" not in batch:
        return batch
    named = draws.rand(len(batch["caption"])) < share
    captions = [
        style_caption(caption, styles[style]) if name else caption
        for caption, style, name in zip(
            batch["caption"], batch["style"].tolist(), named.tolist(), strict=True
        )
    ]
    return {**batch, "caption": captions}
