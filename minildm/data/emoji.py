"""The embedded emoji: five open styles, split by emoji, not by picture.

`EmojiDataset` gives DESIGN's Batch; `load_rgba` one drawing with its transparency.
"""

import difflib
import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from minildm.files import atomic_write, cache_dir, data_dir

STYLES = ("noto", "twemoji", "fluent", "fluent3d", "blob")
SPLITS, SIZES = ("train", "val", "all", "unpaired"), (32, 64, 128)
VAL_SHARE, SALT = 0.11, 28  # of forty salts, the one with the most even shares
CACHE_VERSION = 1  # raise it when the pixels of the cache would change


class EmojiFile(NamedTuple):
    """What emoji.npz holds: N pictures of some 1,600 emoji."""

    blob: bytes  # every WebP file, one after the other
    offsets: np.ndarray  # (N + 1,) where they begin
    emoji: np.ndarray  # (N,) into `rows`
    style: np.ndarray  # (N,) into STYLES
    rows: list[dict[str, Any]]  # hexcode, name, group, subgroup, tags, caption, family
    groups: dict[str, list[str]]  # each group's subgroups, in the file's order
    sha256: str  # of the file

    def rgba(self, index: int) -> Image.Image:
        """Picture `index`, 128 x 128, RGBA."""
        start, stop = self.offsets[index : index + 2]
        return Image.open(io.BytesIO(self.blob[start:stop])).convert("RGBA")


def read_emoji(path: str | os.PathLike[str] | None = None) -> EmojiFile:
    """The file's content, by default data/emoji/emoji.npz; read once while it does not change."""
    path = Path(path) if path is not None else data_dir() / "emoji/emoji.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `python data/emoji/build.py` makes it")
    stat = path.stat()
    return _read(path.resolve(), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=2)
def _read(path: Path, _mtime: int, _size: int) -> EmojiFile:
    content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            meta = json.loads(arrays["meta"].tobytes())
            file = EmojiFile(
                blob=arrays["blob"].tobytes(),
                offsets=arrays["offsets"],
                emoji=arrays["emoji"].astype(np.int64),
                style=arrays["style"].astype(np.int64),
                rows=meta["emoji"],
                groups=meta["groups"],
                sha256=hashlib.sha256(content).hexdigest(),
            )
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged, or not the emoji file: {error}") from error
    if tuple(meta["styles"]) != STYLES:
        raise ValueError(f"{path}: styles {meta['styles']}, this version knows {STYLES}")
    return file


def load_rgba(
    hexcode: str, style: str = "noto", path: str | os.PathLike[str] | None = None
) -> Image.Image:
    """The drawing of "1F34E" in a style, 128 x 128, RGBA; FE0F and case do not matter."""
    _known("style", style, STYLES)
    file, wanted = read_emoji(path), _plain(hexcode)
    number = next((i for i, row in enumerate(file.rows) if _plain(row["hexcode"]) == wanted), -1)
    there = {STYLES[file.style[i]]: int(i) for i in np.flatnonzero(file.emoji == number)}
    if style not in there:
        others = f"there is one in {', '.join(there)}" if there else "nor in any other"
        raise ValueError(f"hexcode={hexcode!r} has no picture in style {style!r}, {others}")
    return file.rgba(there[style])


def _plain(hexcode: str) -> str:
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def validation_families(file: EmojiFile) -> frozenset[str]:
    """The families held out: of each subgroup VAL_SHARE, at least one, the first by their hash.

    A family is a code point without gender, skin tone and hair: a role's man, woman and person,
    in every style, fall on the same side.
    """
    subgroup_of = {row["family"]: row["subgroup"] for row in reversed(file.rows)}
    families: dict[str, list[str]] = {}
    for family in sorted(
        subgroup_of, key=lambda f: hashlib.sha256(f"{SALT} {f}".encode()).digest()
    ):
        families.setdefault(subgroup_of[family], []).append(family)
    counts = {name: max(1, round(VAL_SHARE * len(found))) for name, found in families.items()}
    return frozenset(key for name, found in families.items() for key in found[: counts[name]])


def _known(argument: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise a ValueError that names the argument, what came, what is close, what is allowed."""
    if value in allowed:
        return
    close = difflib.get_close_matches(str(value), [str(name) for name in allowed], n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"{argument}={value!r} is not known.{hint} Allowed: {', '.join(map(str, allowed))}"
    )


def _chosen(argument: str, values: Sequence[str] | None, allowed: Sequence[str]) -> tuple[str, ...]:
    """The values given, checked; all that are allowed where none are given."""
    if values is None:
        return tuple(allowed)
    if isinstance(values, str):
        raise ValueError(f"{argument}={values!r} must be a sequence of names, as ({values!r},)")
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{argument}={tuple(values)} must name something, and nothing twice")
    for value in values:
        _known(argument, value, allowed)
    return tuple(values)


def decode(file: EmojiFile, size: int) -> np.ndarray:
    """Every picture over white: (N, 3, size, size) uint8, from the cache once it is there."""
    path = cache_dir() / f"emoji-{file.sha256[:16]}-{size}-v{CACHE_VERSION}.npy"
    shape = (len(file.emoji), 3, size, size)
    pixels = _from_cache(path, shape)
    if pixels is None:
        pixels = np.empty(shape, np.uint8)
        for i in tqdm(range(len(pixels)), desc="decoding the emoji", unit="picture", delay=2):
            pixels[i] = np.asarray(on_white(file.rgba(i), size)).transpose(2, 0, 1)
        _to_cache(path, pixels)
    return pixels


def on_white(picture: Image.Image, size: int) -> Image.Image:
    """RGBA -> RGB over white, then resized: transparent pixels lend no colour to the edges."""
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    return flat.resize((size, size), Image.Resampling.LANCZOS)  # a copy where the size is right


def _to_cache(path: Path, pixels: np.ndarray) -> None:
    """An .npy with a CRC-32 behind it. A folder that cannot be written costs time, no more."""
    try:
        with atomic_write(path) as file:
            np.save(file, pixels)
            file.write(zlib.crc32(pixels).to_bytes(4))
    except OSError as error:
        tqdm.write(f"no cache of the decoded emoji: {error}")


def _from_cache(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The cached pixels, or None if they are not there, or damaged."""
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        with path.open("rb") as file:
            file.seek(-4, os.SEEK_END)
            checksum = int.from_bytes(file.read(4))
    except (OSError, ValueError, EOFError):
        return None
    whole = pixels.shape == shape and pixels.dtype == np.uint8
    return pixels if whole and zlib.crc32(pixels) == checksum else None


class EmojiDataset(Dataset[dict[str, Any]]):
    """Emoji pictures of one split, with class, group, style and caption.

    `ds[i]`: `image` (3, S, S) float32 in [-1, 1] over white; `label` into `classes` (subgroups),
    `group` into `groups`, `style` into `styles`; `caption` and `hexcode` str. As tensors of the
    whole set: `images` (N, 3, S, S) uint8, `labels`, `group_ids`, `style_ids` (N,) int64.

    split: "train", "val", "all" or "unpaired". size: S, one of 32, 64, 128.
    styles, groups, subgroups: names to keep, all by default; the classes follow the order of
        `subgroups`, else the file's.
    symbols: whether the group of signs, buttons and arrows counts among "all"; naming it in
        `groups`, or one of its subgroups, keeps it too.
    min_count: without `subgroups`, those with fewer emoji are left out; counted over both splits
        and all styles, so that labels do not depend on these.
    unpaired: of every so many emoji of "train" one lacks one of its styles, which it has in the
        split "unpaired" instead: pairs of object and style that training has never seen. 0: none.
    path: another emoji.npz.
    """

    styles = STYLES

    def __init__(
        self,
        split: str = "train",
        size: int = 64,
        *,
        styles: Sequence[str] | None = None,
        subgroups: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
        symbols: bool = False,
        min_count: int = 10,
        unpaired: int = 0,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        _known("split", split, SPLITS)
        _known("size", size, SIZES)
        if min_count < 1:
            raise ValueError(f"min_count={min_count} must be at least 1")
        if unpaired < 0 or (split == "unpaired" and not unpaired):
            raise ValueError(f"unpaired={unpaired} must be at least {int(split == 'unpaired')}")
        self._file = file = read_emoji(path)
        self.split, self.size = split, size
        self.groups = tuple(file.groups)
        kept_styles = _chosen("styles", styles, STYLES)
        kept_groups = _chosen("groups", groups, self.groups)
        if groups is None and subgroups is None and not symbols:
            kept_groups = tuple(name for name in self.groups if name != "symbols")
        self.classes = _classes(file, kept_groups, subgroups, min_count)
        self._pictures = _select(file, split, kept_styles, self.classes, unpaired)
        rows = [file.rows[i] for i in file.emoji[self._pictures]]
        self.labels = _ids([row["subgroup"] for row in rows], self.classes)
        self.group_ids = _ids([row["group"] for row in rows], self.groups)
        self.style_ids = torch.from_numpy(file.style[self._pictures])
        self.captions: list[str] = [row["caption"] for row in rows]
        self.hexcodes: list[str] = [row["hexcode"] for row in rows]
        self.name = f"emoji-{split}"

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index].float() / 127.5 - 1  # (3, S, S)
        return {"image": image, **self.without_image(index)}

    def without_image(self, index: int) -> dict[str, Any]:
        """An item without `image`, which would have to be decoded."""
        return {
            "label": self.labels[index],
            "group": self.group_ids[index],
            "style": self.style_ids[index],
            "caption": self.captions[index],
            "hexcode": self.hexcodes[index],
        }

    @cached_property
    def images(self) -> Tensor:
        """(N, 3, S, S) uint8, over white; decoded at the first call, then kept."""
        return torch.from_numpy(np.array(decode(self._file, self.size)[self._pictures]))

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the file and with every argument that changes what is in here."""
        content = (self._file.sha256, self.split, self.size, self.classes, self._pictures.tolist())
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def label_of(self, subgroup: str) -> int:
        """The label of a class: `ds.label_of("food-fruit")`."""
        _known("subgroup", subgroup, self.classes)
        return self.classes.index(subgroup)


def _ids(values: Sequence[str], names: Sequence[str]) -> Tensor:
    """Each value's place among `names`: (N,) int64."""
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([number[value] for value in values], dtype=torch.int64)


def _classes(
    file: EmojiFile, groups: Sequence[str], subgroups: Sequence[str] | None, min_count: int
) -> tuple[str, ...]:
    """The subgroups asked for, else those of `groups` with at least `min_count` emoji."""
    allowed = [name for group in groups for name in file.groups[group]]
    if subgroups is not None:
        return _chosen("subgroups", subgroups, allowed)
    names = [row["subgroup"] for row in file.rows]
    classes = tuple(name for name in allowed if names.count(name) >= min_count)
    if not classes:
        raise ValueError(f"min_count={min_count} leaves no subgroup of {', '.join(groups)}")
    return classes


def _select(
    file: EmojiFile, split: str, styles: Sequence[str], classes: Sequence[str], unpaired: int = 0
) -> np.ndarray:
    """The pictures of a split, by their index in the file."""
    held_out = validation_families(file)
    wanted = [
        row["subgroup"] in classes
        and (split == "all" or (split == "val") == (row["family"] in held_out))
        for row in file.rows
    ]
    kept = np.isin(file.style, [STYLES.index(style) for style in styles])
    if unpaired and split in ("train", "unpaired"):
        lacks = np.array([_left_out(row["hexcode"], unpaired) for row in file.rows])
        kept &= (lacks[file.emoji] == file.style) == (split == "unpaired")
    pictures = np.flatnonzero(np.array(wanted)[file.emoji] & kept)
    if not len(pictures):
        raise ValueError(f"no picture of {', '.join(classes)} in {', '.join(styles)}, {split}")
    return pictures


def _left_out(hexcode: str, unpaired: int) -> int:
    """The style that an emoji lacks in training, by a hash of its code point; -1: none."""
    number = int.from_bytes(hashlib.sha256(f"unpaired {hexcode}".encode()).digest()[:8])
    return number // unpaired % len(STYLES) if number % unpaired == 0 else -1
