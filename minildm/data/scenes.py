"""Scenes composed from the emoji: what is where is known of every pixel.

A sky above a ground, two to four objects with perspective and contact shadows, all from a seed.

index -> {image (3, S, S) float32 in [-1, 1], boxes (4, 4), classes (4,), semantic (S, S),
label, group, style int64, caption str}
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageColor
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from minildm.data.emoji import STYLES, load_rgba

SPLITS = ("train", "val")
SKIES = ("day", "night", "dusk")
GROUNDS = ("grass", "sand", "snow", "road", "water")
BACKGROUNDS = (*(f"{sky} sky" for sky in SKIES), *GROUNDS)  # semantic 0..7; objects follow

MAX_OBJECTS = 4
MIN_HEIGHT = 0.19  # of the picture: 12 of 64 pixels
MAX_HIDDEN = 0.20  # of a box, by the boxes in front of it
TRIES = 12  # at placing an object; then it is left out
FAR_SCALE = 0.55  # an object's size at the horizon, as a share of its size nearest

# Where an object may stand or hang: its name, code point and height when it is nearest
TABLE = {
    "grass sand snow road": "person 1F6B6 .38, dog 1F415 .27, house 1F3E0 .48",
    "grass sand snow": "tiger 1F405 .28, castle 1F3F0 .52, tent 26FA .32",
    "grass sand road": "cat 1F408 .24, horse 1F40E .37, ball 26BD .20",
    "grass snow road": "sheep 1F411 .27, church 26EA .52, fir tree 1F332 .52",
    "sand snow road": "car 1F697 .26, truck 1F69A .35",
    "grass road": "cow 1F404 .35, pig 1F416 .26, rooster 1F413 .23, snail 1F40C .21, "
    "tree 1F333 .52, pumpkin 1F383 .21, bicycle 1F6B2 .27, tractor 1F69C .35",
    "grass sand": "elephant 1F418 .44, turtle 1F422 .21, parasol 26F1 .38",
    "grass snow": "rabbit 1F407 .23",
    "grass water": "duck 1F986 .22",
    "sand road": "camel 1F42A .38, palm tree 1F334 .52, motorcycle 1F3CD .27",
    "grass": "tulip 1F337 .23, mushroom 1F344 .21",
    "sand": "crab 1F980 .21, cactus 1F335 .32",
    "snow": "penguin 1F427 .28, snowman 26C4 .34",
    "road": "bus 1F68C .36",
    "water": "sailboat 26F5 .44, ship 1F6A2 .44, speedboat 1F6A4 .24, whale 1F433 .32, "
    "dolphin 1F42C .30",
    "day dusk": "sun 2600 .23, dove 1F54A .20",
    "night dusk": "moon 1F319 .22, bat 1F987 .20",
    "day": "butterfly 1F98B .20",
    "day night dusk": "cloud 2601 .20, balloon 1F388 .24, airplane 2708 .23, "
    "helicopter 1F681 .22, rocket 1F680 .24",
}
PLURALS = {"person": "people", "sheep": "sheep", "bus": "buses", "church": "churches"}
PLURALS |= {"cactus": "cacti", "snowman": "snowmen", "butterfly": "butterflies"}
ONLY_ONE = {"sun", "moon"}  # these shine by themselves, too: no tint by night

# A sky's colours at the top and at the horizon, a ground's at the horizon and nearest
SKY_COLORS = (("#5ca6f2", "#ccebff"), ("#0a0d2b", "#293366"), ("#4d3880", "#ffa36b"))
GROUND_COLORS = (
    *(("#85b866", "#478f38"), ("#f2dead", "#dbba7a"), ("#bcd0e8", "#f7faff")),
    *(("#8c8c94", "#616169"), ("#80b8db", "#246bad")),
)
TINTS = np.array([[1, 1, 1], [0.54, 0.56, 0.70], [0.95, 0.80, 0.78]])  # what a sky does below it
TEXTURES = ((0.20, 64, 48), (0.07, 64, 8), (0.04, 32, 6), (0.05, 64, 64), (0.22, 64, 6))


class Kind(NamedTuple):
    """A row of TABLE."""

    name: str
    hexcode: str
    height: float
    where: str


KINDS = tuple(
    Kind(name, hexcode, float(height), where)
    for where, rows in TABLE.items()
    for name, hexcode, height in (row.rsplit(" ", 2) for row in rows.split(", "))
)
OBJECTS = tuple(kind.name for kind in KINDS)
IN_SKY = {kind.name for kind in KINDS if set(kind.where.split()) & set(SKIES)}


@lru_cache
def sprites(style: str) -> tuple[Image.Image, ...]:
    """Every kind's drawing, cut to what is not almost transparent.

    In mode RGBa: colours multiplied by alpha, so that resizing mixes them rightly.
    """
    drawings = [load_rgba(kind.hexcode, style) for kind in KINDS]
    seen = [image.getchannel("A").point([0] * 64 + [255] * 192).getbbox() for image in drawings]
    return tuple(i.crop(box).convert("RGBa") for i, box in zip(drawings, seen, strict=True))


class Placed(NamedTuple):
    """An object in a scene, in shares of the picture's side."""

    near: float  # orders: the far is painted first
    kind: int
    x: float
    y: float
    w: float
    h: float
    flip: bool

    @property
    def box(self) -> tuple[float, float, float, float]:
        """xyxy: the full extent of the drawing, clipped to the picture."""
        return max(self.x, 0), max(self.y, 0), min(self.x + self.w, 1), min(self.y + self.h, 1)


class Layout(NamedTuple):
    """All that a scene shows, before there is any pixel."""

    sky: int
    ground: int
    style: int
    horizon: float  # share of the height that is sky
    objects: tuple[Placed, ...]  # from far to near

    def caption(self) -> str:
        """'two dogs and a house on grass under a night sky with the moon'."""
        names = [OBJECTS[placed.kind] for placed in self.objects]
        hanging = [name for name in names if name in IN_SKY]
        standing = [name for name in names if name not in IN_SKY]
        ground = GROUNDS[self.ground].replace("road", "a road")
        words = f"{listed(standing)} on {ground} under a {SKIES[self.sky]} sky"
        return f"{words} with {listed(hanging)}" if hanging else words


def listed(names: Sequence[str]) -> str:
    """['dog', 'house', 'dog'] -> 'two dogs and a house'."""
    parts = [counted(name, number) for name, number in Counter(names).items()]
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def counted(name: str, number: int) -> str:
    """'a dog', 'an elephant', 'the sun', 'three people'."""
    if name in ONLY_ONE:
        return f"the {name}"
    if number == 1:
        return f"{'an' if name[0] in 'aeio' else 'a'} {name}"
    return f"{(None, None, 'two', 'three', 'four')[number]} {PLURALS.get(name, name + 's')}"


def draw_layout(rng: np.random.Generator, styles: Sequence[int]) -> Layout:
    """A scene of two to four objects; what finds no room is left out, down to two."""
    sky, ground = int(rng.integers(len(SKIES))), int(rng.integers(len(GROUNDS)))
    style, horizon = styles[rng.integers(len(styles))], rng.uniform(0.45, 0.58)
    drawings, objects = sprites(STYLES[style]), []
    while len(objects) < 2:
        objects = []
        for kind in draw_kinds(rng, SKIES[sky], GROUNDS[ground]):
            aspect = drawings[kind].width / drawings[kind].height
            tries = (place(rng, kind, aspect, horizon) for _ in range(TRIES))
            found = next((placed for placed in tries if fits(placed, objects)), None)
            objects += [found] if found else []
    return Layout(sky, ground, style, horizon, tuple(sorted(objects)))


def draw_kinds(rng: np.random.Generator, sky: str, ground: str) -> list[int]:
    """Two to four classes, the first on the ground; often one is there twice."""
    standing = [i for i, kind in enumerate(KINDS) if ground in kind.where.split()]
    hanging = [i for i, kind in enumerate(KINDS) if sky in kind.where.split()]
    drawn, wanted = [standing[rng.integers(len(standing))]], rng.integers(2, MAX_OBJECTS + 1)
    while len(drawn) < wanted:
        chance = rng.random()
        among = drawn if chance < 0.2 else hanging if chance < 0.5 else standing
        kind = among[rng.integers(len(among))]
        if not (kind in drawn and OBJECTS[kind] in ONLY_ONE):
            drawn.append(kind)
    return drawn


def place(rng: np.random.Generator, kind: int, aspect: float, horizon: float) -> Placed:
    """Somewhere; on the ground: the lower its foot, the nearer and the larger."""
    h, flip = KINDS[kind].height * rng.uniform(1.0, 1.12), bool(rng.random() < 0.5)
    if OBJECTS[kind] in IN_SKY:
        y = rng.uniform(0.02, horizon - h - 0.02)
        near = {"sun": 0.0, "moon": 0.0, "cloud": 0.1}.get(OBJECTS[kind], 0.2) + 0.1 * y
    else:
        least = (MIN_HEIGHT / h - FAR_SCALE) / (1 - FAR_SCALE)  # here it is MIN_HEIGHT high
        depth = rng.uniform(max(least, 0.08), 1.0)  # 0 at the horizon, 1 nearest
        h *= FAR_SCALE + (1 - FAR_SCALE) * depth
        near = horizon + depth * (0.97 - horizon)  # its foot
        y = near - h
    w = h * aspect
    return Placed(near, kind, rng.uniform(-0.1 * w, 1 - 0.9 * w), y, w, h, flip)


def fits(new: Placed, objects: Sequence[Placed]) -> bool:
    """Whether no object of all would be hidden by more than MAX_HIDDEN of its box."""
    boxes = [placed.box for placed in sorted((*objects, new))]
    return all(
        sum(overlap(box, nearer) for nearer in boxes[i + 1 :]) <= MAX_HIDDEN * overlap(box, box)
        for i, box in enumerate(boxes)
    )


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """The area that two xyxy boxes share."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(w, 0.0) * max(h, 0.0)


def render(layout: Layout, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The picture (S, S, 3) uint8 and its semantic map (S, S) int64."""
    canvas = paint_background(layout, rng, size)
    in_ground = (np.arange(size) + 0.5) / size >= layout.horizon  # (S,) rows
    background = np.where(in_ground, len(SKIES) + layout.ground, layout.sky)
    semantic = np.repeat(background[:, None], size, axis=1)
    for placed in layout.objects:
        name, sprite = OBJECTS[placed.kind], sprites(STYLES[layout.style])[placed.kind]
        tint = 1.0 if name in ONLY_ONE else 0.6 + 0.4 * TINTS[layout.sky]
        if name not in IN_SKY:
            paint_shadow(canvas, placed)
        paint_object(canvas, semantic, placed, sprite, tint)
    return np.rint(255 * canvas.clip(0, 1)).astype(np.uint8), semantic


def paint_object(
    canvas: np.ndarray, semantic: np.ndarray, placed: Placed, sprite: Image.Image, tint: np.ndarray
) -> None:
    """Lay the drawing over `canvas`, and its class over `semantic` where alpha is above half."""
    size = len(canvas)
    x0, y0 = round(placed.x * size), round(placed.y * size)
    x1 = max(round((placed.x + placed.w) * size), x0 + 1)
    y1 = max(round((placed.y + placed.h) * size), y0 + 1)
    small = sprite.resize((x1 - x0, y1 - y0), Image.Resampling.LANCZOS)
    pixels = np.asarray(small, np.float32)[:, :: -1 if placed.flip else 1] / 255
    pixels = pixels[max(-y0, 0) : size - y0, max(-x0, 0) : size - x0]  # what lies in the picture
    window = slice(max(y0, 0), y1), slice(max(x0, 0), x1)
    color, alpha = pixels[..., :3] * tint, pixels[..., 3:]  # color has been multiplied by alpha
    canvas[window] = color + (1 - alpha) * canvas[window]
    semantic[window][alpha[..., 0] > 0.5] = len(BACKGROUNDS) + placed.kind


def paint_shadow(canvas: np.ndarray, placed: Placed) -> None:
    """Darken a flat ellipse under the object's foot."""
    size = len(canvas)
    half_w, half_h = 0.55 * placed.w * size, (0.06 * placed.w + 0.01) * size
    x = (np.arange(size) + 0.5 - (placed.x + placed.w / 2) * size) / half_w
    y = (np.arange(size) + 0.5 - (placed.y + placed.h) * size + 0.4 * half_h) / half_h
    rows, columns = np.abs(y) < 1, np.abs(x) < 1
    inside = 1 - y[rows, None] ** 2 - x[columns] ** 2
    canvas[np.ix_(rows, columns)] *= 1 - 0.4 * inside.clip(0)[..., None]


def paint_background(layout: Layout, rng: np.random.Generator, size: int) -> np.ndarray:
    """(S, S, 3) float32 in [0, 1]; what is drawn from `rng` does not depend on `size`."""
    noise = rng.random((64, 64), dtype=np.float32) - 0.5
    stars, shift = rng.random((14, 2)), rng.uniform(-0.03, 0.03, (4, 3))
    middle = rng.uniform(0.35, 0.65)
    rows = (np.arange(size) + 0.5) / size  # (S,) the pixels' centres
    top, bottom = rgb(SKY_COLORS[layout.sky]) + shift[:2]
    canvas = np.empty((size, size, 3), np.float32)
    down = np.minimum(rows / layout.horizon, 1)[:, None, None]
    canvas[:] = top + (bottom - top) * down
    if SKIES[layout.sky] == "night":
        dot = max(size // 64, 1)
        for u, v in stars * (1, layout.horizon) * size:
            canvas[int(v) : int(v) + dot, int(u) : int(u) + dot] += 0.5
    first = int(np.searchsorted(rows, layout.horizon))
    depth = (rows[first:, None] - layout.horizon) / (1 - layout.horizon)  # (rows, 1), 1 nearest
    far, near = rgb(GROUND_COLORS[layout.ground]) + shift[2:]
    grain = texture(layout.ground, noise, depth, rows - middle)  # (rows, S)
    ground = far + (near - far) * depth[..., None] + grain[..., None]
    canvas[first:] = ground * TINTS[layout.sky]
    return canvas


def texture(ground: int, noise: np.ndarray, depth: np.ndarray, across: np.ndarray) -> np.ndarray:
    """(rows, 1), (S,) -> (rows, S) to be added: noise in perspective, and a road's lines."""
    strength, rows, columns = TEXTURES[ground]
    away = 1 / (depth + 0.15)  # 0.87 nearest, 6.7 at the horizon
    plane = Image.fromarray(noise[:rows, :columns])
    plane = plane.resize((len(across), 256), Image.Resampling.BICUBIC)
    added = strength * np.minimum(3 * depth, 1) * np.asarray(plane)[(38 * away[:, 0]).astype(int)]
    if GROUNDS[ground] == "road":
        middle = stripe(across, 0.025 * depth) * (3 * away % 1 < 0.55)
        edges = stripe(np.abs(across) - 0.75 * depth, 0.02 * depth)
        added += 0.4 * np.maximum(middle, edges)
    return added


def stripe(off: np.ndarray, half: np.ndarray) -> np.ndarray:
    """1 where |off| < half, 0 outside, in between where the edge crosses a pixel; (rows, S)."""
    return ((half - np.abs(off)) * off.shape[-1] + 0.5).clip(0, 1)


def rgb(names: Sequence[str]) -> np.ndarray:
    """Colours by name -> (len, 3) in [0, 1]."""
    return np.array([ImageColor.getrgb(name) for name in names]) / 255


class ScenesDataset(Dataset[dict[str, Any]]):
    """`n` scenes of `size` x `size` pixels; item i depends on seed, split, styles, i and size only,
    its layout not even on the size.

    "train" and "val" are different draws of compositions from the same drawings; for drawings
    never seen in training, hold out styles: `styles`, names of STYLES. Items: `boxes` (4, 4)
    float32 xyxy in [0, 1], from far to near, then zeros: the full extent of each drawing, hidden
    parts included, clipped to the picture; `classes` (4,) int64 into `.objects`, then -1;
    `semantic` (S, S) int64 into `.semantic_classes`: BACKGROUNDS, then 8 + class; `label` =
    5 sky + ground, into `.classes`; `group` the ground; `style` into STYLES. At least a quarter
    of every object can be seen. Raises ValueError for a bad argument.
    """

    classes = tuple(f"{ground}, {sky}" for sky in SKIES for ground in GROUNDS)
    groups, styles = GROUNDS, STYLES
    objects, semantic_classes = OBJECTS, (*BACKGROUNDS, *OBJECTS)

    def __init__(
        self,
        split: str = "train",
        size: int = 64,
        *,
        n: int = 10_000,
        seed: int = 0,
        styles: Sequence[str] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} must be one of {SPLITS}")
        for argument, value, least in (("size", size, 1), ("n", n, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{argument}={value} must be at least {least}")
        styles = STYLES if styles is None else tuple(styles)
        if not styles or not set(styles) <= set(STYLES):
            raise ValueError(f"styles={styles} must be some of {STYLES}")
        self.split, self.size, self.n, self.seed = split, size, n, seed
        self._drawn_in = tuple(sorted({STYLES.index(style) for style in styles}))
        self._known: dict[int, dict[str, Any]] = {}  # of without_image
        self.name = f"scenes-{split}"

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the arguments, the drawings and this file."""
        data = (self.name, self.size, self.n, self.seed, self._drawn_in)
        digest = hashlib.sha256(repr(data).encode() + Path(__file__).read_bytes())
        for style in self._drawn_in:
            digest.update(b"".join(sprite.tobytes() for sprite in sprites(STYLES[style])))
        return digest.hexdigest()

    @cached_property
    def images(self) -> Tensor:
        """(n, 3, S, S) uint8: every picture, composed at the first call and kept."""
        indices = tqdm(range(self.n), desc=f"composing {self.name}", delay=2)
        return torch.stack([self._compose(i)[1] for i in indices])

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        layout, pixels, semantic = self._compose(range(self.n)[i])
        image = pixels.float() / 127.5 - 1
        return {"image": image, "semantic": semantic, **self._described(layout)}

    def without_image(self, i: int) -> dict[str, Any]:
        """Item i without `image` and `semantic`, which must be painted; drawn once, then kept."""
        i = range(self.n)[i]
        if i not in self._known:
            self._known[i] = self._described(draw_layout(self._draw(i), self._drawn_in))
        return dict(self._known[i])

    def _described(self, layout: Layout) -> dict[str, Any]:
        boxes, classes = torch.zeros(MAX_OBJECTS, 4), torch.full((MAX_OBJECTS,), -1)
        for k, placed in enumerate(layout.objects):
            boxes[k], classes[k] = torch.tensor(placed.box), placed.kind
        return {
            "boxes": boxes,
            "classes": classes,
            "label": torch.tensor(len(GROUNDS) * layout.sky + layout.ground),
            "group": torch.tensor(layout.ground),
            "style": torch.tensor(layout.style),
            "caption": layout.caption(),
        }

    def _draw(self, i: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), i])

    def _compose(self, i: int) -> tuple[Layout, Tensor, Tensor]:
        """Scene i's layout, picture (3, S, S) uint8 and semantic map (S, S) int64."""
        rng = self._draw(i)
        layout = draw_layout(rng, self._drawn_in)
        pixels, semantic = render(layout, rng, self.size)
        return (
            layout,
            torch.from_numpy(rearrange(pixels, "h w c -> c h w")),
            torch.from_numpy(semantic),
        )
