"""The embedded photographs, whole or as square crops; `data/photos` holds the files."""

import hashlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from minildm.conditioning import look_up
from minildm.data.dataset import ImageDataset, to_tensor
from minildm.files import data_dir
from minildm.layers import check_fields

CROPS = {"train": 24, "val": 8, "all": 8}  # of each photograph, by default
EDGE, MIN_DETAIL = 14, 0.05  # grey values; share of edges: below, a bare sky, a blurred background
TRIES = 12  # at a crop with detail; then the best of them is taken


def photo_table(split: str = "all") -> list[Any]:
    """The photographs of a split, "train", "val" or "all", in the order of their names.

    Rows of photos.csv: `name`, `title`, `author`, `source`, `licence`, `split`, `width`, `height`
    and `url`. Raises ValueError for another split.
    """
    import pandas as pd  # here: it takes long to import

    look_up(split, list(CROPS), "split")
    table = pd.read_csv(data_dir() / "photos/photos.csv", keep_default_na=False)
    table["name"] = table["file"].str.removesuffix(".webp")
    return [row for row in table.itertuples(index=False) if split in ("all", row.split)]


def load_photo(name: str) -> Tensor:
    """A whole photograph, "koala", both sides multiples of 32: (3, H, W) uint8.

    Raises ValueError for an unknown name.
    """
    look_up(name, [row.name for row in photo_table()], "name")
    return to_tensor(open_photo(f"{name}.webp"))


def open_photo(file: str) -> Image.Image:
    """A file of the folder in RGB."""
    return Image.open(data_dir() / "photos/pictures" / file).convert("RGB")


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
    is the title. `photographs`: the rows used; `photo_ids` (N,) int64: each crop's photograph.

    split: "train", "val" or "all", by photograph. size: at least 8. crops: default: 24 in
    training, else 8. Raises ValueError for other values.
    """

    def __init__(self, split: str = "train", size: int = 64, *, crops: int | None = None) -> None:
        rows = photo_table(split)
        self.size, self.crops = size, CROPS[split] if crops is None else crops
        check_fields(self, 8, max(min(row.width, row.height) for row in rows), "size")
        check_fields(self, 1, 10_000, "crops")
        self.photographs = [row for row in rows if min(row.width, row.height) >= size]
        self.photo_ids = torch.arange(len(self.photographs)).repeat_interleave(self.crops)
        images = []
        for row in tqdm(self.photographs, desc="cutting photographs", delay=2):
            photo, keys = open_photo(row.file), [f"{row.file} {k}" for k in range(self.crops)]
            images += [to_tensor(cut(photo, key, size)[1]) for key in keys]
        super().__init__(
            torch.stack(images),
            name=f"photos-{split}",
            classes=("photograph",),
            styles=("photograph",),
            columns={"caption": [self.photographs[i].title for i in self.photo_ids]},
        )
