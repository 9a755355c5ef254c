"""Scenes composed from the emoji, with the truth about every pixel.

A sky above a ground, two to four objects with perspective and contact shadows, all from a seed.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate
from tqdm.auto import tqdm

from minildm.data.dataset import ImageDataset, as_float, check_choice, check_choices, check_range
from minildm.data.emoji import STYLES
from minildm.data.scene_rendering import (
    BACKGROUNDS,
    GREY,
    GROUNDS,
    KINDS,
    OBJECTS,
    SKIES,
    Layout,
    Placed,
    render,
    sprites,
)

SPLITS = ("train", "val")
MAX_OBJECTS = 4
MIN_HEIGHT = 0.19  # of the image: 12 of 64 pixels
MAX_HIDDEN = 0.20  # of a box, by the boxes in front of it
TRIES = 12  # at placing an object; then it is left out
FAR_SCALE = 0.55  # an object's size at the horizon, as a share of its size nearest


def caption_of(layout: Layout) -> str:
    """'two dogs and a house on grass under a night sky with the moon'."""
    kinds = [KINDS[placed.kind] for placed in layout.objects]
    ground = GROUNDS[layout.ground].replace("road", "a road")
    words = f"{listed([k.name for k in kinds if not k.in_sky])} on {ground}"
    hanging = listed([k.name for k in kinds if k.in_sky])
    return f"{words} under a {SKIES[layout.sky]} sky" + (f" with {hanging}" if hanging else "")


def listed(names: Sequence[str]) -> str:
    """['dog', 'house', 'dog'] -> 'two dogs and a house'."""
    parts = []
    for name, number in Counter(names).items():
        kind = KINDS[OBJECTS.index(name)]
        parts.append(
            kind.one if number == 1 else f"{('two', 'three', 'four')[number - 2]} {kind.many}"
        )
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)


def draw_layout(rng: np.random.Generator, styles: Sequence[int]) -> Layout:
    """A scene of two to four objects; those that find no room are left out, down to two."""
    sky, ground = int(rng.integers(len(SKIES))), int(rng.integers(len(GROUNDS)))
    style, horizon = styles[rng.integers(len(styles))], rng.uniform(0.45, 0.58)
    objects: list[Placed] = []
    while len(objects) < 2:
        objects = []
        for kind in draw_kinds(rng, SKIES[sky], GROUNDS[ground]):
            tries = (place(rng, kind, style, horizon) for _ in range(TRIES))
            found = next((placed for placed in tries if fits(placed, objects)), None)
            objects += [found] if found else []
    return Layout(sky, ground, style, horizon, tuple(sorted(objects)))


def draw_kinds(rng: np.random.Generator, sky: str, ground: str) -> list[int]:
    """Two to four kinds, the first on the ground; a kind may come twice."""
    standing = [i for i, kind in enumerate(KINDS) if ground in kind.places]
    hanging = [i for i, kind in enumerate(KINDS) if sky in kind.places]
    drawn, wanted = [standing[rng.integers(len(standing))]], rng.integers(2, MAX_OBJECTS + 1)
    while len(drawn) < wanted:
        chance = rng.random()
        among = drawn if chance < 0.2 else hanging if chance < 0.5 else standing
        kind = among[rng.integers(len(among))]
        if kind not in drawn or KINDS[kind].many:
            drawn.append(kind)
    return drawn


def place(rng: np.random.Generator, kind: int, style: int, horizon: float) -> Placed:
    """A random position; on the ground: the lower its foot, the nearer and the larger."""
    name, drawing = OBJECTS[kind], sprites(STYLES[style])[kind]
    h, flip = KINDS[kind].height * rng.uniform(1.0, 1.12), bool(rng.random() < 0.5)
    if KINDS[kind].in_sky:
        y = rng.uniform(0.02, horizon - h - 0.02)
        near = {"sun": 0.0, "moon": 0.0, "cloud": 0.1}.get(name, 0.2) + 0.1 * y
    else:
        least = (MIN_HEIGHT / h - FAR_SCALE) / (1 - FAR_SCALE)  # here its height is MIN_HEIGHT
        depth = rng.uniform(max(least, 0.08), 1.0)  # 0 at the horizon, 1 nearest
        h *= FAR_SCALE + (1 - FAR_SCALE) * depth
        near = horizon + depth * (0.97 - horizon)  # its foot
        y = near - h
    w = h * (drawing.width / drawing.height)
    return Placed(near, kind, rng.uniform(-0.1 * w, 1 - 0.9 * w), y, w, h, flip)


def fits(new: Placed, objects: Sequence[Placed]) -> bool:
    """Whether no object would be hidden by more than MAX_HIDDEN of its box."""
    boxes = [placed.box for placed in sorted((*objects, new))]
    return all(
        sum(overlap(box, nearer) for nearer in boxes[i + 1 :]) <= MAX_HIDDEN * overlap(box, box)
        for i, box in enumerate(boxes)
    )


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """The area that two xyxy boxes share."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(w, 0.0) * max(h, 0.0)


def painted(layout: Layout, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
    """The image (3, S, S) uint8 and the semantic map (S, S) int64."""
    pixels, semantic = render(layout, rng, size)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), torch.from_numpy(semantic)


class ScenesDataset(ImageDataset):
    """`n` scenes (default 10,000); item i depends on seed, split, styles, i and size alone.

    The layout does not depend on the size. "train" and "val" are different compositions of the
    same drawings; hold out styles for drawings that training has never seen. Further entries:
    `boxes` (4, 4) float32 xyxy in [0, 1], from far to near, then zeros: the full extent of each
    drawing, hidden parts included, clipped to the image; `classes` (4,) int64 into OBJECTS, then
    -1; `semantic` (S, S) int64 into `semantic_classes`: BACKGROUNDS, then 8 + class. `label` is
    5 sky + ground, `group` the ground. At least a quarter of every object is visible.

    styles: names of STYLES; default: all. background: "scene", or "plain": grey around the
    objects, nothing else differs. Raises ValueError for a bad argument.
    """

    classes = tuple(f"{ground}, {sky}" for sky in SKIES for ground in GROUNDS)
    groups, styles = GROUNDS, STYLES
    objects, semantic_classes = OBJECTS, (*BACKGROUNDS, *OBJECTS)

    def __init__(
        self,
        split: str = "train",
        size: int = 64,
        *,
        n: int | None = None,
        seed: int = 0,
        styles: Sequence[str] | None = None,
        background: str = "scene",
    ) -> None:
        n = 10_000 if n is None else n
        check_choice("split", split, SPLITS)
        check_choice("background", background, ("scene", "plain"))
        chosen = STYLES if styles is None else check_choices("styles", styles, STYLES)
        for argument, value, low in (("size", size, 1), ("n", n, 1), ("seed", seed, 0)):
            check_range(argument, value, low, 4096 if argument == "size" else 2**62)
        self.split, self.size, self.n, self.seed, self.background = split, size, n, seed, background
        self.name = f"scenes-{split}" + ("-plain" if background == "plain" else "")
        self._drawn_in = tuple(sorted(STYLES.index(style) for style in chosen))
        self._known: dict[int, dict[str, Any]] = {}  # items without what must be painted

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        image, semantic = self._paint(i)
        return {"image": as_float(image), "semantic": semantic, **self.without_image(i)}

    def without_image(self, i: int) -> dict[str, Any]:
        """Item i without `image` and `semantic`; drawn once, then kept."""
        i = range(self.n)[i]
        if i not in self._known:
            layout = draw_layout(self._rng(i), self._drawn_in)
            boxes, kinds = torch.zeros(MAX_OBJECTS, 4), torch.full((MAX_OBJECTS,), -1)
            for k, placed in enumerate(layout.objects):
                boxes[k], kinds[k] = torch.tensor(placed.box), placed.kind
            self._known[i] = {
                "boxes": boxes,
                "classes": kinds,
                "label": torch.tensor(len(GROUNDS) * layout.sky + layout.ground),
                "group": torch.tensor(layout.ground),
                "style": torch.tensor(layout.style),
                "caption": caption_of(layout),
            }
        return dict(self._known[i])

    def column(self, key: str) -> Tensor:
        """One tensor entry of all items; "image" and "semantic" (N, S, S) as uint8."""
        if key == "semantic":
            return self._all_painted[1]
        return super().column(key)

    @cached_property
    def columns(self) -> dict[str, Any]:
        """Every entry of all items except `image` and `semantic`."""
        return default_collate([self.without_image(i) for i in range(self.n)])

    @property
    def images(self) -> Tensor:
        """(N, 3, S, S) uint8: every scene, painted at the first use and kept."""
        return self._all_painted[0]

    @cached_property
    def _all_painted(self) -> tuple[Tensor, Tensor]:
        indices = tqdm(range(self.n), desc=f"painting {self.name}", delay=2)
        pairs = [(image, semantic.byte()) for image, semantic in map(self._paint, indices)]
        images, maps = zip(*pairs, strict=True)
        return torch.stack(images), torch.stack(maps)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the arguments, the drawings and the first scenes' pixels."""
        data = (self.name, self.size, self.n, self.seed, self._drawn_in)
        digest = hashlib.sha256(repr(data).encode())
        for style in self._drawn_in:
            digest.update(b"".join(sprite.tobytes() for sprite in sprites(STYLES[style])))
        for i in range(min(self.n, 8)):
            digest.update(self._paint(i)[0].numpy())
        return digest.hexdigest()

    def _rng(self, i: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), i])

    def _paint(self, i: int) -> tuple[Tensor, Tensor]:
        rng = self._rng(range(self.n)[i])
        image, semantic = painted(draw_layout(rng, self._drawn_in), rng, self.size)
        if self.background == "plain":
            image[:, semantic < len(BACKGROUNDS)] = GREY
        return image, semantic


# Wide scenes, for convolutional sampling (LDM Sec. 4.3.2): the objects have their usual size in
# pixels on a larger image, under one sky and on one ground.


def wide_scene(i: int, size: int = 256, ratio: int = 4, *, seed: int = 0) -> dict[str, Any]:
    """`image` (3, S, S) float32 in [-1, 1] and `semantic` (S, S) int64 of wide scene i.

    An object has 1/ratio of its share of an ordinary scene's side: at size 256 and ratio 4 as
    many pixels as at 64. Raises ValueError if ratio does not divide size, or i or seed is negative.
    """
    if ratio < 1 or size % ratio:
        raise ValueError(f"size={size} must be a multiple of ratio={ratio}")
    rng = np.random.default_rng([seed, len(SPLITS), i])
    image, semantic = painted(wide_layout(rng, ratio, range(len(STYLES))), rng, size)
    return {"image": as_float(image), "semantic": semantic}


def wide_layout(rng: np.random.Generator, ratio: int, styles: Sequence[int]) -> Layout:
    """Up to 3 ratio^2 objects, as dense as an ordinary scene; those without room are left out."""
    frame, objects, wanted = draw_layout(rng, styles), [], 3 * ratio**2
    for _ in range(2 * wanted):
        drawn = draw_kinds(rng, SKIES[frame.sky], GROUNDS[frame.ground])
        kind = drawn[rng.integers(len(drawn))]
        if not KINDS[kind].many and kind in {placed.kind for placed in objects}:
            continue
        tries = (place(rng, kind, frame.style, frame.horizon) for _ in range(TRIES))
        smaller = (shrunk(rng, placed, ratio, frame.horizon) for placed in tries)
        found = next((placed for placed in smaller if fits(placed, objects)), None)
        objects += [found] if found else []
        if len(objects) == wanted:
            break
    return frame._replace(objects=tuple(sorted(objects)))


def shrunk(rng: np.random.Generator, placed: Placed, ratio: int, horizon: float) -> Placed:
    """The object, ratio times smaller, at a random x; a foot keeps its height."""
    w, h = placed.w / ratio, placed.h / ratio
    x, y = rng.uniform(-0.1 * w, 1 - 0.9 * w), placed.y + placed.h - h
    if KINDS[placed.kind].in_sky:
        y = rng.uniform(0.02, horizon - h - 0.02)
    return placed._replace(x=x, y=y, w=w, h=h)
