"""What training makes of an item while it looks at its latent: mirrored, or with a style named."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minildm.types import Batch


def mirrored_boxes(batch: Batch, mirrored: Tensor) -> Batch:
    """The batch with the boxes (B, K, 4) of its mirrored (B,) bool samples mirrored, too."""
    if "boxes" not in batch:
        return batch
    boxes, there = batch["boxes"], batch["classes"] >= 0
    left, top, right, bottom = boxes.unbind(-1)
    turned = torch.stack([1 - right, top, 1 - left, bottom], dim=-1)
    chosen = mirrored[:, None, None] & there[..., None]
    return {**batch, "boxes": torch.where(chosen, turned, boxes)}


def style_caption(caption: str, style: str) -> str:
    """A caption that names its style, as a prompt does: "a red apple, blob style"."""
    return f"{caption}, {style} style"


def with_styles(batch: Batch, styles: Sequence[str], share: float) -> Batch:
    """The batch with the style named in that share of its captions, drawn anew each time."""
    if not share or "caption" not in batch:
        return batch
    named = torch.rand(len(batch["caption"])) < share
    captions = [
        style_caption(caption, styles[style]) if name else caption
        for caption, style, name in zip(
            batch["caption"], batch["style"].tolist(), named.tolist(), strict=True
        )
    ]
    return {**batch, "caption": captions}
