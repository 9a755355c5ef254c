"""The embedded photographs, whole or as square crops; `data/photos` holds the files."""

import csv
import hashlib
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minildm.data.dataset import ImageDataset, check_choice, check_range, to_tensor
from minildm.files import data_dir

SPLITS = ("train", "val", "all")
CROPS = {"train": 24, "val": 8, "all": 8}  # of each photograph, by default
EDGE, MIN_DETAIL = 14, 0.05  # grey values; share of edges: below, a bare sky, a blurred background
TRIES = 12  # at a crop with detail; then the best of them is taken

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class Photo(NamedTuple):
    """A row of photos.csv."""

    file: str
    title: str  # the caption of its crops
    author: str
    source: str  # the package it comes from, and its version
    licence: str
    split: str  # "train" or "val"
    width: int
    height: int
    url: str  # of the original, where the package names it

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return Path(self.file).stem


def photo_table(split: str = "all") -> tuple[Photo, ...]:
    """The photographs of a split, "train", "val" or "all", by name; no image is opened.

    Raises FileNotFoundError if the table is missing, ValueError if it is damaged.
    """
    check_choice("split", split, SPLITS)
    path = data_dir() / "photos/photos.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [Photo(**row) for row in csv.DictReader(file)]
        rows = [row._replace(width=int(row.width), height=int(row.height)) for row in rows]
    except (ValueError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: damaged, or not the table of photographs: {error}") from error
    return tuple(row for row in rows if split in ("all", row.split))


def load_photo(name: str) -> Tensor:
    """A whole photograph, "koala" or "koala.webp": (3, H, W) uint8, both sides multiples of 32.

    Raises ValueError for an unknown name and for a damaged file.
    """
    name = name.removesuffix(".webp")
    check_choice("name", name, [row.name for row in photo_table()])
    return to_tensor(_decoded(data_dir() / f"photos/pictures/{name}.webp"))


@lru_cache(maxsize=256)
def _decoded(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: missing, damaged, or not an image: {error}") from error


def crop_box(key: str, width: int, height: int, size: int) -> Box:
    """The square crop that belongs to `key`, in whole pixels.

    Its side is log-uniform from `size` to the image's shorter side. The key's hash is the only
    randomness, so the crop is the same everywhere, in any order.
    """
    digest = hashlib.sha256(key.encode()).digest()
    u = [int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in (0, 8, 16)]
    short = min(width, height)
    side = min(short, round(size * (short / size) ** u[0]))
    left, top = int(u[1] * (width - side + 1)), int(u[2] * (height - side + 1))
    return left, top, left + side, top + side


def detail(image: Image.Image) -> float:
    """The share of neighbouring pixels, across and down, whose grey values differ by EDGE."""
    grey = np.asarray(image.convert("L"), np.int16)
    pairs = [np.abs(np.diff(grey, axis=axis)) >= EDGE for axis in (0, 1)]
    return sum(int(pair.sum()) for pair in pairs) / sum(pair.size for pair in pairs)


def cut(row: Photo, k: int, size: int) -> tuple[Box, Image.Image]:
    """Crop k of a photograph, the first with enough detail: its box, and its size x size pixels.

    Lanczos sees beyond the box: the crop is cut from the whole photograph, reduced.
    """
    photo = _decoded(data_dir() / "photos/pictures" / row.file)
    found = []
    for attempt in range(TRIES):
        box = crop_box(f"{row.file} {k} {size} {attempt}", row.width, row.height, size)
        image = photo.resize((size, size), Image.Resampling.LANCZOS, box=box)
        found.append((detail(image), box, image))
        if found[-1][0] >= MIN_DETAIL:
            break
    return max(found, key=lambda one: one[:2])[1:]


def _images(rows: tuple[Photo, ...], crops: int, size: int) -> Tensor:
    return torch.stack([to_tensor(cut(row, k, size)[1]) for row in rows for k in range(crops)])


class PhotoDataset(ImageDataset):
    """Square crops of the photographs of one split, `crops` of each, photograph after photograph.

    Crop k of a photograph is fixed by its file's name, k and the size. A crop is reduced to
    `size` or kept, never enlarged; photographs with a side below `size` are left out. There is
    one class, group and style; the caption is the title. `photographs` holds the rows used,
    `photo_ids` (N,) int64 the photograph of each crop.

    split: "train", "val" or "all", by photograph. size: at least 8. crops: default: 24 in
    training, else 8. Raises ValueError for other values.
    """

    def __init__(self, split: str = "train", size: int = 64, *, crops: int | None = None) -> None:
        rows = photo_table(split)
        crops = CROPS[split] if crops is None else crops
        largest = max((min(row.width, row.height) for row in rows), default=0)
        check_range("size", size, 8, largest)  # crops are never enlarged
        check_range("crops", crops, 1, 10_000)
        self.size, self.crops = size, crops
        self.photographs = tuple(row for row in rows if min(row.width, row.height) >= size)
        self.photo_ids = torch.arange(len(self.photographs)).repeat_interleave(crops)
        super().__init__(
            partial(_images, self.photographs, crops, size),
            name=f"photos-{split}",
            labels=torch.zeros_like(self.photo_ids),
            classes=("photograph",),
            styles=("photograph",),
            captions=[row.title for row in self.photographs for _ in range(crops)],
        )
