"""The embedded photographs: whole, or as crops that are drawn from them by their number.

`PhotoDataset` gives DESIGN's Batch; `load_photo` one whole picture, `photo_table` what is known
of each: author, source, licence and split. `data/photos` holds the files.

index -> {image (3, S, S) float32 in [-1, 1], label, group, style int64, caption str}
"""

import csv
import difflib
import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from minildm.data.folders import PictureSet
from minildm.files import data_dir

SPLITS = ("train", "val", "all")
CROPS = {"train": 24, "val": 8, "all": 8}  # of each photograph, unless the caller says
EDGE, MIN_DETAIL = 14, 0.05  # of 255; share of such: below is a bare sky, a blurred background
TRIES = 12  # at a crop with detail; then the best of them is taken
VERSION = 1  # raise it when the same arguments would give other crops

Folder = str | os.PathLike[str]


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
    url: str  # where the package says it is from, "" where it does not

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.file.rpartition(".")[0]


def photo_table(split: str = "all", folder: Folder | None = None) -> tuple[Photo, ...]:
    """The photographs of a split, "train", "val" or "all", by name; no picture is opened.

    folder: another folder with photos.csv and pictures/. Raises FileNotFoundError where there is
    no table, ValueError for a damaged one.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    path = _folder(folder) / "photos.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `python data/photos/build.py` makes it")
    stat = path.stat()
    rows = _rows(path, stat.st_mtime_ns, stat.st_size)
    return tuple(row for row in rows if split in ("all", row.split))


def _folder(folder: Folder | None) -> Path:
    return data_dir() / "photos" if folder is None else Path(folder)


@lru_cache(maxsize=4)
def _rows(path: Path, _mtime: int, _size: int) -> tuple[Photo, ...]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = tuple(Photo(**row) for row in csv.DictReader(file))
        return tuple(row._replace(width=int(row.width), height=int(row.height)) for row in rows)
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: damaged, or not the table of photographs: {error}") from error


def load_photo(name: str, folder: Folder | None = None) -> Tensor:
    """A whole photograph, "koala" or "koala.webp": (3, H, W) uint8, both sides multiples of 32.

    Raises ValueError for a name that the table does not have and for a damaged file;
    FileNotFoundError where the file is missing.
    """
    rows = {row.name: row for row in photo_table(folder=folder)}
    row = rows.get(name.removesuffix(".webp"))
    if row is None:
        close = difflib.get_close_matches(name, rows) or rows
        raise ValueError(f"name={name!r} is no photograph. Close, or there: {', '.join(close)}")
    return torch.from_numpy(rearrange(np.array(_open(row, folder)), "h w c -> c h w").copy())


def _open(row: Photo, folder: Folder | None) -> Image.Image:
    """The decoded picture, kept in memory."""
    path = _folder(folder) / "pictures" / row.file
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `python data/photos/build.py` makes it")
    stat = path.stat()
    picture = _decoded(path, stat.st_mtime_ns, stat.st_size)
    if picture.size != (row.width, row.height):
        raise ValueError(
            f"{path}: {picture.width} x {picture.height}, its table says {row.width} x {row.height}"
        )
    return picture


@lru_cache(maxsize=256)
def _decoded(path: Path, _mtime: int, _size: int) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: damaged, or not a picture: {error}") from error


def crop_box(key: str, width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the square crop that belongs to `key`, in whole pixels.

    Its side is log-uniform from `size`, where pixels stay what they are, to the shorter side,
    which shows most of the picture: as many octaves as the picture has above `size`. The key's
    hash is the only randomness, so the crop is the same everywhere, in any order.
    """
    digest = hashlib.sha256(key.encode()).digest()
    u = [int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in (0, 8, 16)]
    short = min(width, height)
    side = min(short, round(size * (short / size) ** u[0]))
    left, top = int(u[1] * (width - side + 1)), int(u[2] * (height - side + 1))
    return left, top, left + side, top + side


def detail(picture: Image.Image) -> float:
    """The share of neighbouring pixels, across and down, whose grey values differ by EDGE."""
    grey = np.asarray(picture.convert("L"), np.int16)
    pairs = [np.abs(np.diff(grey, axis=axis)) >= EDGE for axis in (0, 1)]
    return sum(int(pair.sum()) for pair in pairs) / sum(pair.size for pair in pairs)


class PhotoDataset(PictureSet):
    """Square crops of the photographs of one split, `crops` of each, photograph after photograph.

    Crop k of a photograph is fixed by its file's name, k and the size: order, workers, a resume
    and a larger `crops` change none. A crop is scaled down to `size` or kept, never enlarged;
    photographs with a side below `size` are left out. A crop with next to no detail is drawn
    again. There is nothing to classify: one class, group and style; the caption is the title.
    Items and attributes are PictureSet's; `photographs` holds the rows used, `photo_ids` (N,)
    int64 which of them each crop is from.

    split: "train", "val" or "all"; the split is by photograph. size: S, at least 8.
    crops: of each photograph; by default 24 in training, else 8.
    folder: another folder with photos.csv and pictures/.
    """

    styles = ("photograph",)

    def __init__(
        self,
        split: str = "train",
        size: int = 64,
        *,
        crops: int | None = None,
        folder: Folder | None = None,
    ) -> None:
        rows = photo_table(split, folder)
        crops = CROPS[split] if crops is None else crops
        if crops < 1:
            raise ValueError(f"crops={crops} must be at least 1")
        largest = max((min(row.width, row.height) for row in rows), default=0)
        if not 8 <= size <= largest:
            raise ValueError(
                f"size={size} must lie between 8 and {largest}, the shorter side of the largest "
                f"photograph of split={split!r}: crops are never enlarged"
            )
        self.crops, self.folder = crops, folder
        self.photographs = tuple(row for row in rows if min(row.width, row.height) >= size)
        seen = [(row, _hash(_folder(folder) / "pictures" / row.file)) for row in self.photographs]
        labels = [0] * (len(self.photographs) * crops)
        super().__init__(
            f"photos-{split}",
            self.photographs,
            labels,
            ("photograph",),
            size,
            flip=False,
            seen=(VERSION, EDGE, MIN_DETAIL, TRIES, crops, seen),
        )
        self.photo_ids = torch.arange(len(self.photographs)).repeat_interleave(crops)
        self.captions = [row.title for row in self.photographs for _ in range(crops)]

    def box(self, i: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of item i in its photograph, in pixels."""
        row, k = self.photographs[i // self.crops], i % self.crops
        picture, best = _open(row, self.folder), (-1.0, (0, 0, 0, 0))
        for attempt in range(TRIES):
            key = f"{row.file} {k} {self.size} {attempt}"
            box = crop_box(key, row.width, row.height, self.size)
            best = max(best, (detail(_resized(picture, box, self.size)), box))
            if best[0] >= MIN_DETAIL:
                break
        return best[1]

    def _square(self, i: int) -> Image.Image:
        row = self.photographs[i // self.crops]
        return _resized(_open(row, self.folder), self.box(i), self.size)


def _resized(picture: Image.Image, box: tuple[int, int, int, int], size: int) -> Image.Image:
    """The box at size x size; LANCZOS, which Pillow widens with the scale: no aliasing.

    The filter sees beyond the box: the result is cut from the whole picture, reduced.
    """
    return picture.resize((size, size), Image.Resampling.LANCZOS, box=box)


def _hash(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `python data/photos/build.py` makes it")
    return hashlib.sha256(path.read_bytes()).hexdigest()
