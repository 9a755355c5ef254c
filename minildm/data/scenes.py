"""Scenes composed from the emoji, with the truth about every pixel, and crops of their objects.

A sky above a ground, two to four objects with perspective and contact shadows, all from a seed.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minildm.conditioning import look_up
from minildm.data.dataset import ImageDataset, as_float
from minildm.data.emoji import STYLES
from minildm.data.scene_rendering import (
    BACKGROUNDS,
    GREY,
    GROUNDS,
    KINDS,
    OBJECTS,
    SKIES,
    Kind,
    Layout,
    Placed,
    render,
    sprites,
)
from minildm.files import progress
from minildm.layers import check_fields

SPLITS = ("train", "val")
MAX_OBJECTS = 4
ABSENT = Placed(near=0.0, kind=-1, x=0.0, y=0.0, w=0.0, h=0.0, flip=False)  # pads boxes, classes
MIN_HEIGHT = 0.19  # of the image: 12 of 64 pixels
MAX_HIDDEN = 0.20  # of a box, by the boxes in front of it
TRIES = 12  # at placing an object; then it is left out
FAR_SCALE = 0.55  # an object's size at the horizon, as a share of its size nearest
CROP_CLASSES = (*OBJECTS, "nothing")


class ScenesDataset(ImageDataset):
    """`n` scenes; item i depends on seed, split, styles, i and size alone, its layout not on size.

    "train" and "val" are different compositions of the same drawings; hold out styles for drawings
    that training has never seen. `label` is 5 sky + ground, `group` the ground. Further entries:
    `boxes` (4, 4) float32 xyxy in [0, 1], from far to near, then zeros: the full extent of each
    drawing, hidden parts included, clipped to the image; `classes` (4,) int64 into OBJECTS, then
    -1; `semantic` (S, S) int64 into `semantic_classes`: BACKGROUNDS, then 8 + class. At least a
    quarter of every object is visible.

    styles: names of STYLES; default, or empty: all. background: "scene", or "plain": grey around
    the objects, nothing else differs. Raises ValueError for a bad argument.
    """

    objects, semantic_classes = OBJECTS, (*BACKGROUNDS, *OBJECTS)

    def __init__(
        self,
        split: str = "train",
        size: int = 64,
        *,
        n: int = 10_000,
        seed: int = 0,
        styles: Sequence[str] | None = None,
        background: str = "scene",
    ) -> None:
        self.split, self.size, self.n, self.seed, self.background = split, size, n, seed, background
        look_up(split, SPLITS, "split")
        look_up(background, ("scene", "plain"), "background")
        check_fields(self, 16, 4096, "size")
        check_fields(self, 1, 10**6, "n")
        self._style_ids = sorted({look_up(style, STYLES, "styles") for style in styles or STYLES})
        layouts = [draw_layout(self._rng(i), self._style_ids) for i in range(n)]
        rows = [(layout.objects + MAX_OBJECTS * (ABSENT,))[:MAX_OBJECTS] for layout in layouts]
        sky, ground, style = torch.tensor([layout[:3] for layout in layouts]).unbind(1)
        super().__init__(
            None,
            name=f"scenes-{split}" + ("-plain" if background == "plain" else ""),
            labels=len(GROUNDS) * sky + ground,
            classes=[f"{ground}, {sky}" for sky in SKIES for ground in GROUNDS],
            groups=GROUNDS,
            styles=STYLES,
            columns={
                "group": ground,
                "style": style,
                "caption": [caption_of(layout) for layout in layouts],
                "boxes": torch.tensor([[placed.box for placed in row] for row in rows]),
                "classes": torch.tensor([[placed.kind for placed in row] for row in rows]),
            },
        )

    def __getitem__(self, i: int) -> dict[str, Any]:
        image, semantic = self._paint(i)
        columns = {key: column[i] for key, column in self.columns.items()}
        return {"image": as_float(image), "semantic": semantic.long(), **columns}

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the arguments, the drawings and the first scenes' pixels."""
        arguments = (self.name, self.size, self.n, self.seed, tuple(self._style_ids))
        drawings = [sprite for style in self._style_ids for sprite in sprites(STYLES[style])]
        images = [self._paint(i)[0].numpy() for i in range(min(self.n, 8))]
        content = b"".join(part.tobytes() for part in (*drawings, *images))
        return hashlib.sha256(repr(arguments).encode() + content).hexdigest()

    def _rng(self, *parts: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, SPLITS.index(self.split), *parts])

    def _paint(self, i: int) -> tuple[Tensor, Tensor]:
        rng = self._rng(range(self.n)[i])
        image, semantic = render(draw_layout(rng, self._style_ids), rng, self.size)
        if self.background == "plain":
            image[:, semantic < len(BACKGROUNDS)] = GREY
        return image, semantic

    @cached_property
    def _painted(self) -> list[Tensor]:
        pairs = [self._paint(i) for i in progress(range(self.n), f"painting {self.name}", delay=2)]
        return [torch.stack(parts) for parts in zip(*pairs, strict=True)]

    images = property(lambda self: self._painted[0])  # (N, 3, S, S) uint8, at the first use
    maps = property(lambda self: self._painted[1])  # (N, S, S) uint8


def caption_of(layout: Layout) -> str:
    """'two dogs and a house on grass under a night sky with the moon'."""
    kinds = [KINDS[placed.kind] for placed in layout.objects]
    ground = GROUNDS[layout.ground].replace("road", "a road")
    words = f"{listed([kind for kind in kinds if not kind.in_sky])} on {ground}"
    hanging = listed([kind for kind in kinds if kind.in_sky])
    return f"{words} under a {SKIES[layout.sky]} sky" + (f" with {hanging}" if hanging else "")


def listed(kinds: Sequence[Kind]) -> str:
    """'two dogs and a house' for a dog, a house and a dog."""
    counts = ("", "", "two", "three", "four")
    parts = [k.one if n == 1 else f"{counts[n]} {k.many}" for k, n in Counter(kinds).items()]
    return " and ".join(part for part in (", ".join(parts[:-1]), *parts[-1:]) if part)


def draw_layout(rng: np.random.Generator, styles: Sequence[int]) -> Layout:
    """A scene of two to four objects; one without room after TRIES is left out, down to two."""
    sky, ground = int(rng.integers(len(SKIES))), int(rng.integers(len(GROUNDS)))
    empty = Layout(sky, ground, styles[rng.integers(len(styles))], rng.uniform(0.45, 0.58))
    layout = empty
    while len(layout.objects) < 2:
        layout = empty
        for kind in draw_kinds(rng, layout):
            layout = with_object(layout, (place(rng, kind, layout) for _ in range(TRIES)))
    return layout


def draw_kinds(rng: np.random.Generator, layout: Layout) -> list[int]:
    """Two to four kinds, the first on the ground; a kind may come twice."""
    standing = [i for i, kind in enumerate(KINDS) if GROUNDS[layout.ground] in kind.places]
    hanging = [i for i, kind in enumerate(KINDS) if SKIES[layout.sky] in kind.places]
    drawn, wanted = [standing[rng.integers(len(standing))]], rng.integers(2, MAX_OBJECTS + 1)
    while len(drawn) < wanted:
        chance = rng.random()
        among = drawn if chance < 0.2 else hanging if chance < 0.5 else standing
        kind = among[rng.integers(len(among))]
        if kind not in drawn or KINDS[kind].many:
            drawn.append(kind)
    return drawn


def with_object(layout: Layout, candidates: Iterable[Placed]) -> Layout:
    """The layout with the first candidate for which there is room; unchanged if there is none.

    There is room where no object is hidden by more than MAX_HIDDEN of its box.
    """
    for candidate in candidates:
        objects = tuple(sorted((*layout.objects, candidate)))
        boxes = [placed.box for placed in objects]
        if all(
            sum(overlap(box, nearer) for nearer in boxes[i + 1 :]) <= MAX_HIDDEN * overlap(box, box)
            for i, box in enumerate(boxes)
        ):
            return layout._replace(objects=objects)
    return layout


def place(rng: np.random.Generator, kind: int, layout: Layout) -> Placed:
    """A random position; on the ground: the lower its foot, the nearer and the larger."""
    name, drawing, horizon = OBJECTS[kind], sprites(STYLES[layout.style])[kind], layout.horizon
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
    x = rng.uniform(-0.1 * w, 1 - 0.9 * w)
    return Placed(near, kind, x, y, w, h, flip)


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """The area that two xyxy boxes share."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(w, 0.0) * max(h, 0.0)


# Crops of scenes, for the classifier that says whether an object is in its box.


def crop(x: Tensor, boxes: Tensor, side: int = 32, margin: float = 0.1) -> Tensor:
    """The content of the boxes with a margin, resized: (K, 3, H, W), (K, 4) -> (K, 3, s, s).

    boxes: xyxy in [0, 1], one for each image. margin: of a box's sides, on each side of it;
    beyond its edge an image repeats the edge.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    half = ((high - low) * (1 + 2 * margin)).to(x)  # half a side, where the image is [-1, 1]
    centre = (low + high).to(x) - 1
    theta = torch.cat([torch.diag_embed(half), centre[..., None]], dim=2)  # (K, 2, 3)
    grid = F.affine_grid(theta, [len(x), x.shape[1], side, side], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def empty_box(rng: np.random.Generator, boxes: Tensor) -> tuple[float, ...] | None:
    """A place as large as an object, clear of all boxes (K, 4), xyxy; None if 30 tries fail."""
    for _ in range(30):
        w, h = rng.uniform(0.18, 0.42, 2)
        x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
        box = (x, y, x + w, y + h)
        if not any(overlap(box, other) for other in boxes.tolist()):
            return box
    return None


class CropsDataset(ImageDataset):
    """Every object of some scenes, cut out by its box, and an empty place of each scene.

    The classes are the objects and "nothing", the groups ground, sky and nothing, the style the
    scene's, or "none" for nothing. `scene_ids` (N,) and `boxes` (N, 4) say where each crop is from.
    """

    def __init__(self, scenes: ScenesDataset) -> None:
        boxes, labels = scenes.columns["boxes"].double(), scenes.columns["classes"]  # (N, 4, ...)
        empty, nothing = torch.zeros_like(boxes[:, :1]), torch.full_like(labels[:, :1], -1)
        for i in range(len(scenes)):
            if box := empty_box(scenes._rng(i, 1), boxes[i]):  # not the scene's own numbers
                empty[i], nothing[i] = boxes.new_tensor(box), len(OBJECTS)
        boxes, labels = torch.cat([boxes, empty], dim=1), torch.cat([labels, nothing], dim=1)
        self.scene_ids, slot = (labels >= 0).nonzero().unbind(1)
        self.boxes, labels = boxes[self.scene_ids, slot], labels[self.scene_ids, slot]
        images = []
        for ids, own in zip(self.scene_ids.split(128), self.boxes.split(128), strict=True):
            x = crop(as_float(scenes.images[ids]), own)
            images.append(((x + 1) * 127.5).round().to(torch.uint8))
        groups = torch.tensor([*(int(kind.in_sky) for kind in KINDS), 2])
        styles = scenes.style_ids[self.scene_ids]
        super().__init__(
            torch.cat(images),
            name=f"crops of {scenes.name}",
            labels=labels,
            classes=CROP_CLASSES,
            groups=("ground", "sky", "nothing"),
            styles=(*STYLES, "none"),
            columns={
                "group": groups[labels],
                "style": torch.where(labels < len(OBJECTS), styles, len(STYLES)),
            },
        )
