"""Images of your own: a folder of image files, or any data set of torch or torchvision."""

import hashlib
import json
import operator
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from minildm.conditioning import look_up
from minildm.data.dataset import ImageDataset, decode_all, square
from minildm.files import progress

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VAL_SHARE = 0.1  # of the files
SPLIT = re.compile("(train|val|test)(ing|id|idation)?/", re.IGNORECASE)
nfc = partial(unicodedata.normalize, "NFC")  # names are the same on every system: é is one letter


class ImageFolder(ImageDataset):
    """A folder of images, decoded into memory; its subfolders are the classes, if it has any.

    `split` is "train", "val" or "all". Folders of such names above the classes are the splits
    (`test` serves as a missing `val`); else a hash of its name puts about a tenth of the files
    into "val", so adding files moves no other; a class has at least one in "train". Subfolders are
    searched to any depth; names starting with a dot or two underscores are skipped. Items have the
    relative name as `file`. Captions are in `metadata.jsonl` (`file_name`, `text`) or in .txt files
    with the images' names.
    Raises ValueError for a missing or empty folder, files next to class folders, an empty split, a
    file that cannot be read and a bad argument. Warns of files of other formats.
    """

    def __init__(self, root: str | Path, size: int, *, split: str = "train") -> None:
        look_up(split, ("train", "val", "all"), "split")
        root = Path(root).expanduser().resolve()
        files = find_images(root)
        classes, splits = classes_and_splits(list(files))
        rows = zip(files, classes, splits, strict=True)
        class_of = {name: kind for name, kind, part in rows if split in ("all", part)}
        if not class_of:
            raise ValueError(f"split={split!r} of {root} is empty: it requires more images")
        columns, known = {"file": list(class_of)}, sorted(set(classes))
        if captions := read_captions(root, files):
            columns["caption"] = [captions[name] for name in class_of]
        super().__init__(
            decode_all(read_image, [files[name] for name in class_of], size),
            name=f"{root.name}-{split}",
            labels=torch.tensor([known.index(kind) for kind in class_of.values()]),
            classes=known,
            columns=columns,
        )


def find_images(root: Path) -> dict[str, Path]:
    """Every image by its name below `root`, sorted. Warns of files of other formats."""
    paths = {nfc(p.relative_to(root).as_posix()): p for p in root.rglob("*") if p.is_file()}
    names = sorted(paths, key=lambda name: name.split("/"))
    names = [name for name in names if not re.search(r"(^|/)(\.|__)", name)]  # the system's files
    suffixes = {name: paths[name].suffix.lower() for name in names}
    images = {name: paths[name] for name, suffix in suffixes.items() if suffix in SUFFIXES}
    if others := [s for s in suffixes.values() if s not in (*SUFFIXES, ".txt", ".jsonl")]:
        total, listed = len(images) + len(others), ", ".join(sorted(set(others)))
        warnings.warn(f"{root}: skipped {len(others)} of {total} files: {listed}", stacklevel=3)
    if not images:
        raise ValueError(f"no image ({', '.join(SUFFIXES)}) in {root} or its subfolders")
    return images


def classes_and_splits(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The class and the split, "train", "val" or "test", of each image; see ImageFolder."""
    found = [SPLIT.match(name) for name in names]
    below = [name[m.end() :] if all(found) else name for name, m in zip(names, found, strict=True)]
    several = len({m[1].lower() for m in found if m}) > 1  # splits; one may be a class
    rows = zip(names, below, found, strict=True)
    loose = [name for name, rest, m in rows if "/" not in rest or (several and not m)]
    if 0 < len(loose) < len(names):
        what = "splits" if several else "classes"
        raise ValueError(f"{loose[0]} is next to the folders of {what}: move it into one of them")
    classes = ["image" if loose else name.partition("/")[0] for name in below]
    splits = [m[1].lower() for m in found] if all(found) else ["train"]
    if set(splits) != {"train"}:
        return classes, [s if "val" in splits else s.replace("test", "val") for s in splits]
    drawn = list(zip(classes, map(split_of, names), strict=True))
    trained = {kind for kind, split in drawn if split == "train"}
    return classes, [split if kind in trained else "train" for kind, split in drawn]


def split_of(name: str) -> str:
    """ "train" or "val", from a hash of the name alone."""
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "val" if draw < VAL_SHARE else "train"


def read_captions(root: Path, images: Mapping[str, Path]) -> dict[str, str]:
    """The caption of every image, or none. ValueError counts and names those that lack one."""
    found, file = {}, root
    try:
        for name, path in images.items():
            if (file := path.with_suffix(".txt")).is_file():
                found[name] = file.read_text(encoding="utf-8-sig").strip()
        for file in root.rglob("metadata.jsonl"):
            for line in filter(str.strip, file.read_text(encoding="utf-8-sig").split("\n")):
                row = json.loads(line)
                name = (file.parent / row["file_name"]).relative_to(root).as_posix()
                found[nfc(name)] = row["text"].strip()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        wanted = 'a caption, or lines {"file_name": "a.png", "text": "a cat"}, in UTF-8'
        raise ValueError(f"{file} must hold {wanted}: {error!r}") from error
    if (lacking := [name for name in images if not found.get(name)]) and found:
        count, listed = f"{len(lacking)} of {len(images)}", ", ".join(lacking[:5])
        raise ValueError(f"{count} images in {root} have no caption: {listed}")
    return found


def read_image(file: Path, size: int) -> Tensor:
    """Decode a file: (3, size, size) uint8. ValueError names one that cannot be read."""
    try:
        with Image.open(file) as image:
            image.draft("RGB", (2 * size, 2 * size))  # large JPEGs: decode less
            return square(image, size)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def read_map(file: Path, size: int, labels: int) -> Tensor:
    """The central square of a grey or palette image of label numbers: (size, size) int64."""
    with Image.open(file) as image:
        values = np.array(ImageOps.fit(image, (size, size), Image.Resampling.NEAREST), np.int64)
    if values.ndim > 2 or values.max() >= labels:
        raise ValueError(f"{file} must be grey or have a palette, its values labels below {labels}")
    return torch.from_numpy(values)


def wrap_dataset(data: Dataset, size: int, classes: Sequence[str] | None = None) -> ImageDataset:
    """Any torch Dataset with a length, read once into memory and identified by its content.

    Items are (image, label), or dicts of `image` and `label`, `caption` or both; images are PIL's
    or tensors (C, H, W), uint8 or float in [0, 1]; labels are integers. classes: the labels'
    names; default: data.classes (of several names for one the first), else "0", "1", ... Raises
    ValueError for other items and labels.
    """
    from torchvision.transforms.functional import to_pil_image  # slow to import

    images = torch.empty(len(data), 3, size, size, dtype=torch.uint8)
    name, labels, captions = type(data).__name__, [], []
    for i in progress(range(len(data)), "decoding", delay=2):
        item = data[i]
        try:
            row = item if isinstance(item, Mapping) else {"image": item[0], "label": item[1]}
            image = row["image"]
            if isinstance(image, Tensor) and image.is_floating_point():
                if not 0 <= image.min() <= image.max() <= 1:
                    raise ValueError(f"an image from {image.min():.3g} to {image.max():.3g}")
                image = (image * 255).round().byte()
            image = image if isinstance(image, Image.Image) else to_pil_image(image)
            images[i] = square(image, size)
            labels.append(operator.index(row.get("label", 0) if "caption" in row else row["label"]))
            captions += [row["caption"].strip()] if "caption" in row else []
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"item {i} of {name} must be (image, integer label), or a dict of image and label, "
                "caption or both; the image PIL's or a tensor (C, H, W), uint8 or float in [0, 1]; "
                f"got {error!r} in {' '.join(repr(item).split()):.100}"
            ) from error
    known = classes or getattr(data, "classes", None) or range(max(labels, default=0) + 1)
    known = [nfc(each[0] if isinstance(each, tuple) else str(each)) for each in known]
    if not set(labels) <= set(range(len(known))):
        raise ValueError(f"{name}: classes has {len(known)} names, the labels end at {max(labels)}")
    columns, labels = {"caption": captions} if captions else {}, torch.tensor(labels)
    return ImageDataset(images, name=name, labels=labels, classes=known, columns=columns)
