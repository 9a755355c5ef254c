"""Boxes drawn into pictures: what a layout asks for, on what came of it."""

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange, repeat
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minildm.plots.style import PALETTE
from minildm.types import Batch

LETTERS = 9  # a name's height in pixels


def boxed(x: Tensor, layouts: Batch, names: Sequence[str] = (), *, zoom: int = 2) -> Tensor:
    """Pictures with their boxes, and the names of the objects where `names` lists the classes.

    x (N, 3, H, W), uint8 or in [-1, 1]; layouts: `boxes` (N, K, 4) xyxy in [0, 1], `classes`
    (N, K), -1 pads. -> (N, 3, zoom H, zoom W) uint8, for the sheets. The k-th box has the k-th
    colour. Raises ValueError where the numbers or shapes differ.
    """
    boxes, classes = layouts["boxes"], layouts["classes"]
    if x.ndim != 4 or boxes.shape != (len(x), *classes.shape[1:], 4) or len(classes) != len(x):
        raise ValueError(
            f"x (N, 3, H, W) {tuple(x.shape)} needs boxes (N, K, 4) and classes (N, K), got "
            f"{tuple(boxes.shape)} and {tuple(classes.shape)}"
        )
    if zoom < 1:
        raise ValueError(f"zoom={zoom} must be at least 1")
    x = x.detach().cpu()
    if x.dtype != torch.uint8:
        x = ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    large = repeat(x, "n c h w -> n (h i) (w j) c", i=zoom, j=zoom).numpy()
    rows = zip(large, boxes.tolist(), classes.tolist(), strict=True)
    drawn = np.stack([_draw(*row, names) for row in rows])
    return torch.from_numpy(rearrange(drawn, "n h w c -> n c h w"))


def _draw(
    pixels: np.ndarray, boxes: list[list[float]], classes: list[int], names: Sequence[str]
) -> np.ndarray:
    """One picture (H, W, 3) uint8 with its boxes; all names stand above all lines."""
    picture = Image.fromarray(pixels)
    pen, (w, h) = ImageDraw.Draw(picture), picture.size
    there = [(k, box) for k, box in enumerate(boxes) if classes[k] >= 0]
    for k, (left, top, right, bottom) in there:
        corners = (left * w, top * h, max(right * w - 1, left * w), max(bottom * h - 1, top * h))
        pen.rectangle(corners, outline=_color(k), width=2)
    font = ImageFont.load_default(LETTERS)
    for k, (left, top, *_) in there if names else ():
        text = names[classes[k]]
        wide = pen.textlength(text, font) + 3
        x, y = max(min(left * w, w - wide), 0), max(top * h - LETTERS - 2, 0)
        pen.rectangle((x, y, x + wide, y + LETTERS + 2), fill=_color(k))
        pen.text((x + 2, y), text, fill="black" if _light(k) else "white", font=font)
    return np.asarray(picture)


def _color(k: int) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in to_rgb(PALETTE[k % len(PALETTE)]))


def _light(k: int) -> bool:
    """Whether black can be read on that colour better than white."""
    red, green, blue = _color(k)
    return 0.3 * red + 0.59 * green + 0.11 * blue > 140
