"""Square crops of the embedded photographs; `data/photos/pictures` holds the files."""

import csv
import hashlib

import numpy as np
import torch
from PIL import Image

from minildm.conditioning import look_up
from minildm.data.dataset import ImageDataset, to_tensor
from minildm.files import data_dir, progress
from minildm.layers import check_fields

CROPS = {"train": 24, "val": 8, "all": 8}  # of each photograph, by default
EDGE, MIN_DETAIL = 14, 0.05  # grey values; share of edges: below, a bare sky, a blurred background
TRIES = 12  # at a crop with detail; then the best of them is taken


def cut(photo: Image.Image, key: str, size: int) -> tuple[tuple[int, ...], Image.Image]:
    """The square crop that belongs to `key`: its box in whole pixels, and its size x size pixels.

    Its side is log-uniform from `size` to the photograph's shorter side. Of TRIES crops the first
    with enough detail: the share of neighbouring pixels, across and down, whose grey values differ
    by EDGE. A hash of the key is the only randomness, so the crop is the same everywhere.
    """
    found, short = [], min(photo.size)
    for attempt in range(TRIES):
        digest = hashlib.sha256(f"{key} {size} {attempt}".encode()).digest()
        u = [int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in (0, 8, 16)]
        side = min(short, round(size * (short / size) ** u[0]))
        left, top = int(u[1] * (photo.width - side + 1)), int(u[2] * (photo.height - side + 1))
        box = left, top, left + side, top + side
        image = photo.resize((size, size), Image.Resampling.LANCZOS, box=box)
        grey = np.asarray(image.convert("L"), np.int16)
        edges = np.concatenate([np.diff(grey, axis=axis).ravel() for axis in (0, 1)])
        found.append((np.mean(np.abs(edges) >= EDGE), box, image))
        if found[-1][0] >= MIN_DETAIL:
            break
    return max(found, key=lambda one: one[:2])[1:]


class PhotoDataset(ImageDataset):
    """Square crops of the photographs of one split, `crops` of each, photograph after photograph.

    Crop k of a photograph is fixed by its file's name, k and the size. A crop is reduced to
    `size` or kept, never enlarged; photographs with a side below `size` are left out. The caption
    is the title. `photographs`: their rows of photos.csv; `photo_ids` (N,) int64: each crop's row.

    split: "train", "val" or "all", by photograph. size: at least 8. crops: default: 24 in
    training, else 8. Raises ValueError for another split or size.
    """

    def __init__(self, split: str = "train", size: int = 64, *, crops: int | None = None) -> None:
        look_up(split, list(CROPS), "split")
        with (data_dir() / "photos/photos.csv").open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if split in ("all", row["split"])]
        sides = [min(int(row["width"]), int(row["height"])) for row in rows]
        self.size, self.crops = size, CROPS[split] if crops is None else crops
        check_fields(self, 8, max(sides), "size")
        self.photographs = [row for row, side in zip(rows, sides, strict=True) if side >= size]
        self.photo_ids = torch.arange(len(self.photographs)).repeat_interleave(self.crops)
        images = []
        for row in progress(self.photographs, desc="cutting photographs", delay=2):
            photo = Image.open(data_dir() / "photos/pictures" / row["file"]).convert("RGB")
            keys = [f"{row['file']} {k}" for k in range(self.crops)]
            images += [to_tensor(cut(photo, key, size)[1]) for key in keys]
        super().__init__(
            torch.stack(images),
            name=f"photos-{split}",
            classes=("photograph",),
            styles=("photograph",),
            columns={"caption": [self.photographs[i]["title"] for i in self.photo_ids]},
        )
