"""What a scene consists of, and its pixels: sky, ground, contact shadows and objects."""

import csv
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from minildm.data.emoji import STYLES, read_emoji
from minildm.files import data_dir

SKY_LOOKS = {  # RGB at the top and at the horizon; how it tints what is below
    "day": ((92, 166, 242), (204, 235, 255), (1.0, 1.0, 1.0)),
    "night": ((10, 13, 43), (41, 51, 102), (0.54, 0.56, 0.70)),
    "dusk": ((77, 56, 128), (255, 163, 107), (0.95, 0.80, 0.78)),
}
GROUND_LOOKS = {  # RGB at the horizon and nearest; noise: strength, its rows and columns in use
    "grass": ((133, 184, 102), (71, 143, 56), (0.20, 64, 48)),
    "sand": ((242, 222, 173), (219, 186, 122), (0.07, 64, 8)),
    "snow": ((188, 208, 232), (247, 250, 255), (0.04, 32, 6)),
    "road": ((140, 140, 148), (97, 97, 105), (0.05, 64, 64)),
    "water": ((128, 184, 219), (36, 107, 173), (0.22, 64, 6)),
}
SKIES, GROUNDS = tuple(SKY_LOOKS), tuple(GROUND_LOOKS)
BACKGROUNDS = (*(f"{sky} sky" for sky in SKIES), *GROUNDS)  # semantic 0..7; objects follow
GREY = 192  # of 255, around the objects on a plain background


class Kind(NamedTuple):
    """A row of objects.csv."""

    name: str
    hexcode: str
    height: float  # where it is nearest, as a share of the image's side
    places: frozenset[str]  # the SKIES or GROUNDS where it may be
    one: str  # in captions: "a dog"
    many: str  # "dogs"; empty: a scene has at most one, which is not tinted by the sky

    @property
    def in_sky(self) -> bool:
        """Whether it hangs in the sky and does not stand on the ground."""
        return not self.places.isdisjoint(SKIES)


_ROWS = Path(__file__).with_name("objects.csv").read_text(encoding="utf-8").splitlines()[1:]
KINDS = tuple(
    Kind(name, hexcode, float(height), frozenset(places.split()), one, many)
    for name, hexcode, height, places, one, many in csv.reader(_ROWS)
)
OBJECTS = tuple(kind.name for kind in KINDS)


@lru_cache
def sprites(style: str) -> tuple[Image.Image, ...]:
    """Every object's drawing, cropped to what is not almost transparent.

    In mode RGBa, colours multiplied by alpha, so that resizing mixes them correctly.
    """
    drawings = [read_emoji(data_dir())[kind.hexcode, style].rgba() for kind in KINDS]
    seen = [image.getchannel("A").point([0] * 64 + [255] * 192).getbbox() for image in drawings]
    return tuple(i.crop(box).convert("RGBa") for i, box in zip(drawings, seen, strict=True))


class Placed(NamedTuple):
    """An object in a scene, in shares of the image's side."""

    near: float  # the order of painting: far objects first
    kind: int  # index into KINDS
    x: float
    y: float
    w: float
    h: float
    flip: bool

    @property
    def box(self) -> tuple[float, float, float, float]:
        """xyxy: the full extent of the drawing, clipped to the image."""
        return max(self.x, 0), max(self.y, 0), min(self.x + self.w, 1), min(self.y + self.h, 1)


class Layout(NamedTuple):
    """All that a scene shows."""

    sky: int
    ground: int
    style: int
    horizon: float  # share of the height that is sky
    objects: tuple[Placed, ...] = ()  # from far to near


def render(layout: Layout, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
    """The image (3, S, S) and its semantic map (S, S), both uint8."""
    canvas = paint_background(layout, rng, size)
    in_ground = (np.arange(size) + 0.5) / size >= layout.horizon  # (S,) rows
    rows = np.where(in_ground, len(SKIES) + layout.ground, layout.sky).astype(np.uint8)
    semantic = np.repeat(rows[:, None], size, axis=1)
    in_light = 0.6 + 0.4 * np.array(SKY_LOOKS[SKIES[layout.sky]][2])
    for placed in layout.objects:
        kind, sprite = KINDS[placed.kind], sprites(STYLES[layout.style])[placed.kind]
        if not kind.in_sky:
            paint_shadow(canvas, placed)
        paint_object(canvas, semantic, placed, sprite, in_light if kind.many else np.ones(3))
    image = np.rint(255 * canvas.clip(0, 1)).astype(np.uint8).transpose(2, 0, 1).copy()
    return torch.from_numpy(image), torch.from_numpy(semantic)


def paint_object(
    canvas: np.ndarray, semantic: np.ndarray, placed: Placed, sprite: Image.Image, tint: np.ndarray
) -> None:
    """Lay the drawing over `canvas`, and its class over `semantic` where alpha is above half."""
    size = len(canvas)
    x0, y0 = round(placed.x * size), round(placed.y * size)
    x1, y1 = round((placed.x + placed.w) * size), round((placed.y + placed.h) * size)
    small = sprite.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS)
    layer = Image.new("RGBa", (size, size))  # colours multiplied by alpha, here zero
    layer.paste(ImageOps.mirror(small) if placed.flip else small, (x0, y0))
    pixels = np.asarray(layer, np.float32) / 255
    color, alpha = pixels[..., :3] * tint, pixels[..., 3:]
    canvas[:] = color + (1 - alpha) * canvas
    semantic[alpha[..., 0] > 0.5] = len(BACKGROUNDS) + placed.kind


def paint_shadow(canvas: np.ndarray, placed: Placed) -> None:
    """Darken a flat ellipse under the object's foot."""
    size = len(canvas)
    half_w, half_h = 0.55 * placed.w * size, (0.06 * placed.w + 0.01) * size
    x = (np.arange(size) + 0.5 - (placed.x + placed.w / 2) * size) / half_w
    y = (np.arange(size) + 0.5 - (placed.y + placed.h) * size + 0.4 * half_h) / half_h
    inside = (1 - y[:, None] ** 2 - x**2).clip(0)  # 1 in the centre, 0 at the edge and outside
    canvas *= 1 - 0.4 * inside[..., None]


def paint_background(layout: Layout, rng: np.random.Generator, size: int) -> np.ndarray:
    """(S, S, 3) float32 in [0, 1]; the numbers drawn from `rng` do not depend on `size`."""
    noise = rng.random((64, 64), dtype=np.float32) - 0.5
    stars, shift = rng.random((14, 2)), rng.uniform(-0.03, 0.03, (4, 3))
    middle = rng.uniform(0.35, 0.65)
    rows = (np.arange(size) + 0.5) / size  # (S,) the pixels' centres
    *colors, tint = SKY_LOOKS[SKIES[layout.sky]]
    top, bottom = np.array(colors) / 255 + shift[:2]
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = top + (bottom - top) * np.minimum(rows / layout.horizon, 1)[:, None, None]
    if SKIES[layout.sky] == "night":
        dot = max(size // 64, 1)
        for u, v in stars * (1, layout.horizon) * size:
            canvas[int(v) : int(v) + dot, int(u) : int(u) + dot] += 0.5
    first = int(np.searchsorted(rows, layout.horizon))
    depth = (rows[first:, None] - layout.horizon) / (1 - layout.horizon)  # (rows, 1), 1 nearest
    far, near = np.array(GROUND_LOOKS[GROUNDS[layout.ground]][:2]) / 255 + shift[2:]
    grain = texture(GROUNDS[layout.ground], noise, depth, rows - middle)  # (rows, S)
    ground = far + (near - far) * depth[..., None] + grain[..., None]
    canvas[first:] = ground * tint
    return canvas


def texture(ground: str, noise: np.ndarray, depth: np.ndarray, across: np.ndarray) -> np.ndarray:
    """(rows, 1), (S,) -> (rows, S) to be added: noise in perspective, and a road's lines."""
    strength, rows, columns = GROUND_LOOKS[ground][2]
    away = 1 / (depth + 0.15)  # 0.87 nearest, 6.7 at the horizon
    plane = Image.fromarray(noise[:rows, :columns])
    plane = plane.resize((len(across), 256), Image.Resampling.BICUBIC)
    added = strength * np.minimum(3 * depth, 1) * np.asarray(plane)[(38 * away[:, 0]).astype(int)]
    if ground == "road":
        middle = stripe(across, 0.025 * depth) * (3 * away % 1 < 0.55)
        edges = stripe(np.abs(across) - 0.75 * depth, 0.02 * depth)
        added += 0.4 * np.maximum(middle, edges)
    return added


def stripe(off: np.ndarray, half: np.ndarray) -> np.ndarray:
    """1 where |off| < half, 0 outside, between them where the edge crosses a pixel; (rows, S)."""
    return ((half - np.abs(off)) * off.shape[-1] + 0.5).clip(0, 1)
