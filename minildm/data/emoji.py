"""The embedded emoji: five open styles, split by emoji, not by drawing."""

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from minildm.data.dataset import (
    ImageDataset,
    cached,
    check_choice,
    check_choices,
    check_range,
    square,
    to_tensor,
)
from minildm.files import data_dir

STYLES = ("noto", "twemoji", "fluent", "fluent3d", "blob")
SPLITS, SIZES = ("train", "val", "all", "unpaired"), (32, 64, 128)
VAL_SHARE, SALT = 0.11, 28  # of forty salts, the one with the most even shares
MIN_COUNT = 10  # emoji of a default class, over both splits and all styles


class EmojiFile(NamedTuple):
    """Content of emoji.npz: N drawings of some 1,600 emoji."""

    blob: bytes  # all WebP files, concatenated
    offsets: np.ndarray  # (N + 1,) where they begin
    emoji: np.ndarray  # (N,) index into `rows`
    style: np.ndarray  # (N,) index into STYLES
    rows: list[dict[str, Any]]  # hexcode, name, group, subgroup, tags, caption, family
    groups: dict[str, list[str]]  # each group's subgroups, in the file's order
    sha256: str  # of the file

    def rgba(self, index: int) -> Image.Image:
        """Drawing `index`, 128 x 128, RGBA."""
        start, stop = self.offsets[index : index + 2]
        return Image.open(io.BytesIO(self.blob[start:stop])).convert("RGBA")


def read_emoji() -> EmojiFile:
    """Read data/emoji/emoji.npz once.

    Raises FileNotFoundError if it is missing, ValueError if it is damaged.
    """
    return _read(data_dir() / "emoji/emoji.npz")


@lru_cache(maxsize=2)
def _read(path: Path) -> EmojiFile:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `python data/emoji/build.py` makes it")
    content = path.read_bytes()
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            meta = json.loads(arrays["meta"].tobytes())
            return EmojiFile(
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


def load_rgba(hexcode: str, style: str = "noto") -> Image.Image:
    """The drawing of "1F34E" in a style, 128 x 128, RGBA; FE0F and case are ignored.

    Raises ValueError for an unknown style, and where the style has no such drawing.
    """
    check_choice("style", style, STYLES)
    file, wanted = read_emoji(), _plain(hexcode)
    number = next((i for i, row in enumerate(file.rows) if _plain(row["hexcode"]) == wanted), -1)
    found = {STYLES[file.style[i]]: int(i) for i in np.flatnonzero(file.emoji == number)}
    if style not in found:
        others = ", ".join(found) or "none"
        raise ValueError(f"hexcode={hexcode!r} has no drawing in style {style!r}; it has: {others}")
    return file.rgba(found[style])


def _plain(hexcode: str) -> str:
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def validation_families(file: EmojiFile) -> frozenset[str]:
    """The held-out families: VAL_SHARE of each subgroup, at least one, the first by their hash.

    A family is a code point without gender, skin tone and hair: man, woman and person of a role
    are in the same split, in every style.
    """
    subgroup_of = {row["family"]: row["subgroup"] for row in reversed(file.rows)}
    families: dict[str, list[str]] = {}
    for family in sorted(
        subgroup_of, key=lambda f: hashlib.sha256(f"{SALT} {f}".encode()).digest()
    ):
        families.setdefault(subgroup_of[family], []).append(family)
    counts = {name: max(1, round(VAL_SHARE * len(found))) for name, found in families.items()}
    return frozenset(key for name, found in families.items() for key in found[: counts[name]])


def decode(file: EmojiFile, size: int, drawings: list[int]) -> Tensor:
    """Some drawings over white: (N, 3, size, size) uint8."""
    bar = tqdm(drawings, desc="decoding the emoji", delay=2)
    return torch.stack([to_tensor(square(file.rgba(i), size)) for i in bar])


class EmojiDataset(ImageDataset):
    """Emoji of one split over white: the class is the subgroup, the style the font.

    Items have a `hexcode` too; `hexcodes` lists those of the whole set.

    split: "train", "val", "all" or "unpaired". size: 32, 64 or 128.
    styles: names of STYLES to keep; default: all.
    subgroups: the classes, in this order; default: those with at least ten emoji, without signs,
        buttons and arrows (the group "symbols"), in the file's order.
    unpaired: one in so many emoji of "train" lacks one of its styles; the split "unpaired" has
        these drawings: pairs of object and style that training has never seen. 0: none.
    Raises ValueError for an unknown name, size or split, and for an empty selection.
    """

    def __init__(
        self,
        split: str = "train",
        size: int = 64,
        *,
        styles: Sequence[str] | None = None,
        subgroups: Sequence[str] | None = None,
        unpaired: int = 0,
    ) -> None:
        check_choice("split", split, SPLITS)
        check_choice("size", size, SIZES)
        check_range("unpaired", unpaired, int(split == "unpaired"), 10_000)
        file = read_emoji()
        kept = STYLES if styles is None else check_choices("styles", styles, STYLES)
        classes, groups = _classes(file, subgroups), tuple(file.groups)
        drawings = _select(file, split, kept, classes, unpaired)
        rows = [file.rows[i] for i in file.emoji[drawings]]
        what = f"{file.sha256} {size} {drawings.tolist()}"
        key = f"emoji-{hashlib.sha256(what.encode()).hexdigest()[:24]}"
        self.split, self.size = split, size
        self.hexcodes: list[str] = [row["hexcode"] for row in rows]
        super().__init__(
            partial(cached, key, partial(decode, file, size, drawings.tolist())),
            name=f"emoji-{split}",
            labels=torch.tensor([classes.index(row["subgroup"]) for row in rows]),
            classes=classes,
            group_ids=torch.tensor([groups.index(row["group"]) for row in rows]),
            groups=groups,
            style_ids=torch.from_numpy(file.style[drawings]),
            styles=STYLES,
            captions=[row["caption"] for row in rows],
            columns={"hexcode": self.hexcodes},
        )

    def label_of(self, subgroup: str) -> int:
        """The label of a class: `ds.label_of("food-fruit")`."""
        check_choice("subgroup", subgroup, self.classes)
        return self.classes.index(subgroup)


def _classes(file: EmojiFile, subgroups: Sequence[str] | None) -> tuple[str, ...]:
    """The given subgroups, else those outside "symbols" with at least MIN_COUNT emoji."""
    if subgroups is not None:
        every = [name for names in file.groups.values() for name in names]
        return check_choices("subgroups", subgroups, every)
    found = [row["subgroup"] for row in file.rows]
    default = [n for group, names in file.groups.items() if group != "symbols" for n in names]
    return tuple(name for name in default if found.count(name) >= MIN_COUNT)


def _select(
    file: EmojiFile, split: str, styles: Sequence[str], classes: Sequence[str], unpaired: int
) -> np.ndarray:
    """The drawings of a split, as indices into the file."""
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
    drawings = np.flatnonzero(np.array(wanted)[file.emoji] & kept)
    if not len(drawings):
        raise ValueError(f"no emoji of {', '.join(classes)} in {', '.join(styles)}, {split}")
    return drawings


def _left_out(hexcode: str, unpaired: int) -> int:
    """The style that an emoji lacks in training, from a hash of its code point; -1: none."""
    number = int.from_bytes(hashlib.sha256(f"unpaired {hexcode}".encode()).digest()[:8])
    return number // unpaired % len(STYLES) if number % unpaired == 0 else -1
