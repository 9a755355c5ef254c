"""Crops of scenes: training data of the classifier that says whether an object is in its box."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from minildm.data.dataset import ImageDataset, as_float
from minildm.data.emoji import STYLES
from minildm.data.scene_rendering import KINDS, OBJECTS
from minildm.data.scenes import SPLITS, ScenesDataset, overlap

SIDE = 32  # of a crop, in pixels
MARGIN = 0.1  # of the box's sides, around it on each side
CROP_CLASSES = (*OBJECTS, "nothing")
TRIES = 30  # at finding an empty place in a scene


def crop(x: Tensor, boxes: Tensor, side: int = SIDE, margin: float = MARGIN) -> Tensor:
    """The content of the boxes with a margin, resized: (K, 3, H, W), (K, 4) -> (K, 3, s, s).

    boxes: xyxy in [0, 1], one for each image; beyond its edge an image repeats the edge.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    half = ((high - low) * (1 + 2 * margin)).to(x)  # half a side, where the image is [-1, 1]
    centre = (low + high).to(x) - 1
    theta = torch.cat([torch.diag_embed(half), centre[..., None]], dim=2)  # (K, 2, 3)
    grid = F.affine_grid(theta, [len(x), x.shape[1], side, side], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def empty_box(rng: np.random.Generator, boxes: Tensor) -> tuple[float, ...] | None:
    """A place as large as an object, clear of all boxes (K, 4), xyxy; None if none is found."""
    for _ in range(TRIES):
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
        rows: list[tuple[int, tuple[float, ...], int, int]] = []  # scene, box, label, style
        for i in tqdm(range(len(scenes)), f"boxes of {scenes.name}", delay=2, leave=False):
            scene = scenes.without_image(i)
            there, style = scene["classes"] >= 0, int(scene["style"])
            boxes, labels = scene["boxes"][there], scene["classes"][there].tolist()
            rows += [(i, tuple(b), k, style) for b, k in zip(boxes.tolist(), labels, strict=True)]
            seed = [scenes.seed, SPLITS.index(scenes.split), i, 1]  # not the scene's own
            if empty := empty_box(np.random.default_rng(seed), boxes):
                rows.append((i, empty, len(OBJECTS), len(STYLES)))
        scene_ids, boxes, labels, style_ids = (torch.tensor(x) for x in zip(*rows, strict=True))
        self.scene_ids, self.boxes = scene_ids, boxes
        groups = torch.tensor([*(int(kind.in_sky) for kind in KINDS), 2])
        super().__init__(
            partial(_cut, scenes, scene_ids, boxes),
            name=f"crops of {scenes.name}",
            labels=labels,
            classes=CROP_CLASSES,
            group_ids=groups[labels],
            groups=("ground", "sky", "nothing"),
            style_ids=style_ids,
            styles=(*STYLES, "none"),
        )


def _cut(scenes: ScenesDataset, scene_ids: Tensor, boxes: Tensor) -> Tensor:
    """All crops: (N, 3, SIDE, SIDE) uint8."""
    parts = []
    for i in tqdm(range(len(scenes)), f"cutting {scenes.name}", delay=2, leave=False):
        own = boxes[scene_ids == i]
        x = as_float(scenes[i]["image"]).expand(len(own), -1, -1, -1)
        parts.append(((crop(x, own) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)
