"""Scenes larger than training's, whose objects are as large as training saw them.

For convolutional sampling (LDM Sec. 4.3.2): a picture of four times the side has sixteen times
the objects of an ordinary scene, under one sky and on one ground.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange

from minildm.data.scenes import (
    GROUNDS,
    IN_SKY,
    OBJECTS,
    ONLY_ONE,
    SKIES,
    STYLES,
    TRIES,
    Layout,
    Placed,
    draw_kinds,
    draw_layout,
    fits,
    place,
    render,
    sprites,
)

EACH = 3  # objects on the area of one ordinary scene: the mean of two to four


def wide_scene(i: int, size: int = 256, ratio: int = 4, *, seed: int = 0) -> dict[str, Any]:
    """`image` (3, S, S) float32 in [-1, 1] and `semantic` (S, S) int64 of wide scene number i.

    An object has 1/ratio of its share of an ordinary scene's side: at size 256 and ratio 4 as
    many pixels as at 64. Textures and gradients of sky and ground stretch over the whole picture.
    Raises ValueError for a negative i or seed, and for a size that ratio does not divide.
    """
    if i < 0 or seed < 0:
        raise ValueError(f"i={i} and seed={seed} must not be negative")
    if ratio < 1 or size < ratio or size % ratio:
        raise ValueError(f"size={size} must be a multiple of ratio={ratio}, at least 1")
    rng = np.random.default_rng([seed, 2, i])  # 0 and 1 are the splits of ScenesDataset
    pixels, semantic = render(wide_layout(rng, ratio, range(len(STYLES))), rng, size)
    image = torch.from_numpy(rearrange(pixels, "h w c -> c h w")).float() / 127.5 - 1
    return {"image": image, "semantic": torch.from_numpy(semantic)}


def wide_layout(rng: np.random.Generator, ratio: int, styles: Sequence[int]) -> Layout:
    """At most EACH ratio^2 objects, by the rules of ordinary scenes; what finds no room is left."""
    frame, objects = draw_layout(rng, styles), []
    drawings, wanted = sprites(STYLES[frame.style]), EACH * ratio**2
    for _ in range(2 * wanted):
        there = {OBJECTS[placed.kind] for placed in objects}
        drawn = draw_kinds(rng, SKIES[frame.sky], GROUNDS[frame.ground])
        kind = drawn[rng.integers(len(drawn))]
        if OBJECTS[kind] in ONLY_ONE & there:
            continue
        aspect = drawings[kind].width / drawings[kind].height
        tries = (place(rng, kind, aspect, frame.horizon) for _ in range(TRIES))
        smaller = (shrunk(rng, placed, ratio, frame.horizon) for placed in tries)
        found = next((placed for placed in smaller if fits(placed, objects)), None)
        objects += [found] if found else []
        if len(objects) == wanted:
            break
    return frame._replace(objects=tuple(sorted(objects)))


def shrunk(rng: np.random.Generator, placed: Placed, ratio: int, horizon: float) -> Placed:
    """The same, ratio times smaller, anywhere across; a foot keeps its height, or all the sky."""
    w, h = placed.w / ratio, placed.h / ratio
    x, y = rng.uniform(-0.1 * w, 1 - 0.9 * w), placed.y + placed.h - h
    if OBJECTS[placed.kind] in IN_SKY:
        y = rng.uniform(0.02, horizon - h - 0.02)
    return placed._replace(x=x, y=y, w=w, h=h)
