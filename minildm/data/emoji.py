"""The embedded emoji: five open styles, split by emoji, not by drawing."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minildm.conditioning import look_up
from minildm.data.dataset import ImageDataset, cached, decode_all, square
from minildm.files import data_dir

STYLES = ("noto", "twemoji", "fluent", "fluent3d", "blob")
MIN_COUNT = 10  # emoji of a default class, over both splits and all styles


class Drawing(NamedTuple):
    """One emoji in one style."""

    emoji: dict[str, Any]  # hexcode, name, group, subgroup, tags, caption, family, split
    style: int  # index into STYLES
    webp: bytes

    def rgba(self) -> Image.Image:
        """The drawing, 128 x 128, RGBA."""
        return Image.open(io.BytesIO(self.webp)).convert("RGBA")


@lru_cache(maxsize=2)
def read_emoji(folder: Path) -> dict[tuple[str, str], Drawing]:
    """Read emoji/emoji.npz of the data folder, once: {("1F34E", "noto"): drawing, ...}.

    Style after style. Raises FileNotFoundError if the file is missing.
    """
    with np.load(folder / "emoji/emoji.npz") as arrays:
        emoji, blob = json.loads(arrays["meta"].tobytes())["emoji"], arrays["blob"].tobytes()
        number, style, offsets = (arrays[key].tolist() for key in ("emoji", "style", "offsets"))
    webp = [blob[start:stop] for start, stop in pairwise(offsets)]
    drawings = map(Drawing, [emoji[i] for i in number], style, webp)
    return {(d.emoji["hexcode"], STYLES[d.style]): d for d in drawings}


def split_of(drawing: Drawing, unpaired: int) -> str:
    """The emoji's split, "train" or "val"; "unpaired" for a style that it lacks in training.

    A hash of its code point says which: one emoji in `unpaired` lacks one; 0: none does.
    """
    split, hexcode = drawing.emoji["split"], drawing.emoji["hexcode"]
    number = int.from_bytes(hashlib.sha256(f"unpaired {hexcode}".encode()).digest()[:8])
    if split == "val" or not unpaired or number % unpaired:
        return split
    return "unpaired" if drawing.style == number // unpaired % len(STYLES) else split


class EmojiDataset(ImageDataset):
    """Emoji of one split over white: the class is the subgroup, the style the font; `hexcode` too.

    split: "train", "val", "all" or "unpaired". size: 32, 64 or 128. styles: names of STYLES to
    keep; default, or empty: all. subgroups: the classes, in this order; default, or empty: those
    with at least ten emoji, without signs, buttons and arrows (the group "symbols").
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
        look_up(split, ("train", "val", "all", "unpaired"), "split")
        look_up(str(size), ("32", "64", "128"), "size")
        self.size = size
        drawings = read_emoji(data_dir()).values()
        emoji = {d.emoji["hexcode"]: d.emoji for d in drawings}.values()
        counts = Counter((e["group"], e["subgroup"]) for e in emoji)
        groups = list(dict.fromkeys(group for group, _ in counts))
        default = [s for (g, s), n in counts.items() if g != "symbols" and n >= MIN_COUNT]
        classes = list(dict.fromkeys(subgroups or default))
        for name in classes:
            look_up(name, [subgroup for _, subgroup in counts], "subgroups")
        style_ids = [look_up(style, STYLES, "styles") for style in styles or STYLES]
        chosen = [d for d in drawings if d.emoji["subgroup"] in classes and d.style in style_ids]
        self.drawings = [d for d in chosen if split in ("all", split_of(d, unpaired))]
        self.hexcodes = [d.emoji["hexcode"] for d in self.drawings]
        super().__init__(
            None,
            name=f"emoji-{split}",
            labels=torch.tensor([classes.index(d.emoji["subgroup"]) for d in self.drawings]),
            classes=classes,
            groups=groups,
            styles=STYLES,
            columns={
                "group": torch.tensor([groups.index(d.emoji["group"]) for d in self.drawings]),
                "style": torch.tensor([d.style for d in self.drawings]),
                "caption": [d.emoji["caption"] for d in self.drawings],
                "hexcode": self.hexcodes,
            },
        )

    @cached_property
    def images(self) -> Tensor:
        """(N, 3, S, S) uint8; decoded once, then read from the cache."""
        key = hashlib.sha256(b"".join(d.webp for d in self.drawings)).hexdigest()
        decode = partial(decode_all, lambda d, s: square(d.rgba(), s), self.drawings, self.size)
        return cached(f"emoji-{self.size}-{key[:24]}", decode)
