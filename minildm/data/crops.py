"""Crops of scenes: what a classifier needs that says whether an object is in its box.

index -> {image (3, SIDE, SIDE) float32 in [-1, 1], label, group, style int64}
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from minildm.data.emoji import STYLES
from minildm.data.scenes import IN_SKY, OBJECTS, SPLITS, ScenesDataset, overlap

SIDE = 32  # of a crop, in pixels
MARGIN = 0.1  # of the box's sides, round it on each side
NOTHING = "nothing"
CROP_CLASSES = (*OBJECTS, NOTHING)
TRIES = 30  # at finding an empty place in a scene


def crop(x: Tensor, boxes: Tensor, side: int = SIDE, margin: float = MARGIN) -> Tensor:
    """What is in boxes, with some margin, all of one size: (K, 3, H, W), (K, 4) -> (K, 3, s, s).

    boxes: xyxy in shares of the picture, as in the scenes. Pictures in [-1, 1]; what lies beyond
    their edge repeats it. Raises ValueError for other shapes, and for boxes that are upside down.
    """
    if boxes.shape != (len(x), 4) or x.ndim != 4:
        raise ValueError(
            f"need pictures (K, 3, H, W) and boxes (K, 4), got {tuple(x.shape)}, "
            f"{tuple(boxes.shape)}"
        )
    low, high = boxes[:, :2], boxes[:, 2:]
    if not (low < high).all():
        raise ValueError("boxes must be (left, top, right, bottom), rising")
    theta = torch.zeros(len(x), 2, 3, dtype=x.dtype, device=x.device)
    half = ((high - low) * (1 + 2 * margin)).to(theta)  # half of it is as much of [-1, 1]
    theta[:, 0, 0], theta[:, 1, 1] = half.unbind(1)
    theta[:, :, 2] = (low + high).to(theta) - 1
    grid = F.affine_grid(theta, [len(x), x.shape[1], side, side], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def empty_box(rng: np.random.Generator, boxes: Tensor) -> tuple[float, ...] | None:
    """A place as large as an object and clear of all boxes (K, 4), xyxy; None where none is found.

    Its margin may touch one of them.
    """
    for _ in range(TRIES):
        w, h = rng.uniform(0.18, 0.42, 2)
        x, y = rng.uniform(0, 1 - w), rng.uniform(0, 1 - h)
        box = (x, y, x + w, y + h)
        if not any(overlap(box, other) for other in boxes.tolist()):
            return box
    return None


class CropsDataset(Dataset[dict[str, Any]]):
    """Every object of some scenes, cut out by its box, and one empty place of each.

    `label` into `classes`: the objects, then "nothing"; `group`: on the ground, in the sky, or
    nothing; `style`: the scene's, or "none" where there is nothing. As tensors of the whole set:
    `images` (N, 3, SIDE, SIDE) uint8, `labels`, `group_ids`, `style_ids`, `scene_ids` (N,) int64,
    `boxes` (N, 4).
    """

    classes = CROP_CLASSES
    groups = ("ground", "sky", NOTHING)
    styles = (*STYLES, "none")

    def __init__(self, scenes: ScenesDataset) -> None:
        self._scenes = scenes
        self.name = f"crops of {scenes.name}"
        found: dict[str, list[Any]] = {"boxes": [], "labels": [], "styles": [], "scenes": []}
        for i in tqdm(range(len(scenes)), f"boxes of {scenes.name}", delay=2, leave=False):
            for box, label, style in self._of_scene(i):
                for name, value in zip(found, (box, label, style, i), strict=True):
                    found[name].append(value)
        self.boxes = torch.tensor(found["boxes"])
        self.labels, self.style_ids, self.scene_ids = (
            torch.tensor(found[name]) for name in ("labels", "styles", "scenes")
        )
        group = [int(name in IN_SKY) for name in OBJECTS] + [self.groups.index(NOTHING)]
        self.group_ids = torch.tensor(group)[self.labels]

    def _of_scene(self, i: int) -> list[tuple[tuple[float, ...], int, int]]:
        """(box, label, style) of its objects and of an empty place, if there is one."""
        scene = self._scenes.without_image(i)
        there = scene["classes"] >= 0
        boxes, style = scene["boxes"][there], int(scene["style"])
        pairs = zip(boxes.tolist(), scene["classes"][there].tolist(), strict=True)
        rows = [(tuple(box), label, style) for box, label in pairs]
        split = SPLITS.index(self._scenes.split)
        rng = np.random.default_rng([self._scenes.seed, split, i, 1])  # not the scene's own draw
        empty = empty_box(rng, boxes)
        none = (self.classes.index(NOTHING), self.styles.index("none"))
        return [*rows, (empty, *none)] if empty else rows

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index].float() / 127.5 - 1
        ids = {"label": self.labels, "group": self.group_ids, "style": self.style_ids}
        return {"image": image, **{name: values[index] for name, values in ids.items()}}

    @cached_property
    def images(self) -> Tensor:
        """(N, 3, SIDE, SIDE) uint8: every crop, cut at the first call and kept."""
        parts = []
        for i in tqdm(range(len(self._scenes)), f"cutting {self.name}", delay=2, leave=False):
            boxes = self.boxes[self.scene_ids == i]
            x = self._scenes[i]["image"].expand(len(boxes), -1, -1, -1)
            parts.append(((crop(x, boxes) + 1) * 127.5).round().to(torch.uint8))
        return torch.cat(parts)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the scenes and with this file."""
        digest = hashlib.sha256(self._scenes.fingerprint.encode() + Path(__file__).read_bytes())
        return digest.hexdigest()
