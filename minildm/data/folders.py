"""Pictures of your own: a folder of image files, or a set that torchvision knows.

index -> {image (3, S, S) float32 in [-1, 1], label, group, style int64, caption str}
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TORCHVISION_SETS = ("CIFAR10", "CelebA", "Flowers102", "ImageNet")
KEPT_BYTES = 8 * 2**30  # what is beyond is decoded at every use, unless `.images` is asked for
IMAGENET_FETCH = "put ILSVRC2012_devkit_t12.tar.gz and ILSVRC2012_img_*.tar of image-net.org there"


class PictureSet(Dataset[dict[str, Any]]):
    """`source[i][0]` is a picture, and squared to `size` it is item i.

    Every picture is decoded when it is first asked for, and kept: 3 S^2 bytes each.
    `flip=True` appends every picture's mirror image, in the same order.
    Attributes, as in the embedded sets: `classes`, `groups` (the same), `styles`, `captions` (N
    class names), `labels`, `group_ids`, `style_ids` (N,) int64, `images`, `name`, `fingerprint`
    (a hash over the arguments and over `seen`, by which a file's new content shows).
    """

    styles = ("picture",)

    def __init__(
        self,
        name: str,
        source: Any,
        labels: Sequence[int],
        classes: Sequence[str],
        size: int,
        flip: bool,
        seen: Any = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be at least 1, the picture's side in pixels")
        self.name, self.source, self.size, self.flip = name, source, size, flip
        self.classes = self.groups = tuple(classes)
        self.labels = self.group_ids = torch.tensor([*labels] * (1 + flip), dtype=torch.int64)
        self.style_ids = torch.zeros_like(self.labels)
        self.captions = [self.classes[label].replace("_", " ") for label in self.labels.tolist()]
        data = repr((name, size, flip, [*labels], self.classes, seen))
        self.fingerprint = hashlib.sha256(data.encode()).hexdigest()
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = range(len(self))[i]  # negative counts from the end; IndexError beyond it
        return {"image": self._picture(i).float() / 127.5 - 1, **self.without_image(i)}

    def without_image(self, i: int) -> dict[str, Any]:
        """An item without `image`, which would have to be decoded."""
        ids = {"label": self.labels[i], "group": self.group_ids[i], "style": self.style_ids[i]}
        return {"caption": self.captions[i], **ids}

    @cached_property
    def images(self) -> Tensor:
        """(N, 3, S, S) uint8: every picture, decoded at the first call."""
        images = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        for i in tqdm(range(len(self)), desc=f"decoding {self.name}", delay=2):
            images[i] = self._picture(i)
            self._kept[i] = images[i]  # a view: there is no second copy
        return images

    def checked(self) -> "PictureSet":
        """The same set, every picture decoded once: a broken one is found now, not in training."""
        for i in tqdm(range(len(self)), desc=f"reading {self.name}", delay=2):
            self._picture(i)
        return self

    def _picture(self, i: int) -> Tensor:
        """(3, S, S) uint8, decoded once, as long as there is room."""
        picture = self._kept[i] if i in self._kept else self._decode(i)
        if len(self._kept) * picture.numel() < KEPT_BYTES:
            self._kept[i] = picture
        return picture

    def _square(self, i: int) -> Image.Image:
        return square(self.source[i][0], self.size)

    def _decode(self, i: int) -> Tensor:
        mirrored, source = divmod(i, len(self) // (1 + self.flip))
        pixels = np.asarray(self._square(source))  # (S, S, 3)
        pixels = pixels[:, ::-1] if mirrored else pixels
        return torch.from_numpy(rearrange(pixels, "h w c -> c h w").copy())


class ImageFolder(PictureSet):
    """A folder of pictures. Its subfolders are the classes; without any it is one class itself.

    `split` is "train", "val" or "all"; a hash of a file's name below `root` puts about
    `val_fraction` of the files into "val", so that adding files moves no other. Subfolders are
    searched to any depth; names starting with a dot or two underscores are the system's: skipped.
    Raises FileNotFoundError for a missing folder; ValueError for a folder or class without
    pictures, an empty split, a bad argument, and a broken file when it is decoded.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int,
        *,
        split: str = "train",
        val_fraction: float = 0.1,
        flip: bool = False,
    ) -> None:
        if split not in ("train", "val", "all"):
            raise ValueError(f"split={split!r} must be 'train', 'val' or 'all'")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} must lie between 0 and 1")
        root = Path(root).expanduser().resolve()
        classes, found = find_classes(root)
        where = {file: split_of(below(file, root), val_fraction) for file, _ in found}
        kept = [(file, label) for file, label in found if split in ("all", where[file])]
        if not kept:
            raise ValueError(
                f"split={split!r} of {root} is empty ({len(found)} pictures in all): "
                f"change val_fraction={val_fraction}, or take split='all'"
            )
        labels = [label for _, label in kept]
        seen = [(below(f, root), f.stat().st_size, f.stat().st_mtime_ns) for f, _ in kept]
        super().__init__(f"{root.name}-{split}", kept, labels, classes, size, flip, seen)

    def _square(self, i: int) -> Image.Image:
        file, _ = self.source[i]
        try:
            with Image.open(file) as image:
                image.draft("RGB", (2 * self.size, 2 * self.size))  # large JPEGs: decode less
                return square(image, self.size)
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"{file} is not a readable picture ({error}): "
                "save it anew from its source, or move it out of the folder"
            ) from error


def find_classes(root: Path) -> tuple[list[str], list[tuple[Path, int]]]:
    """The names of the classes, sorted, and every picture with the index of its class."""
    if not root.is_dir():
        raise FileNotFoundError(f"root={str(root)!r} is not a folder")
    folders = [f for f in sorted(root.iterdir()) if f.is_dir() and not hidden(f.name)]
    loose = pictures(root.iterdir(), root)
    found = [pictures(folder.rglob("*"), root) for folder in folders]
    if not loose and not any(found):
        raise ValueError(f"no picture ({', '.join(SUFFIXES)}) in {root} or its subfolders")
    if not any(found):
        return [root.name], [(file, 0) for file in loose]
    if loose:
        raise ValueError(f"{loose[0]} lies beside the class folders: move it into one, or away")
    for folder, files in zip(folders, found, strict=True):
        if not files:
            raise ValueError(f"class folder {folder} has no picture: fill it or remove it")
    return [f.name for f in folders], [(file, i) for i, files in enumerate(found) for file in files]


def pictures(paths: Iterable[Path], root: Path) -> list[Path]:
    """Those whose name says picture, sorted; not the system's own (._a.jpg, .cache/a.jpg)."""
    named = [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted(p for p in named if not any(map(hidden, p.relative_to(root).parts)))


def hidden(name: str) -> bool:
    """Whether a system or a tool put it there: .DS_Store, ._a.jpg, __MACOSX."""
    return name.startswith((".", "__"))


def below(file: Path, root: Path) -> str:
    """The file's name in `root`, the same on every system: slashes, an accent in one letter."""
    return unicodedata.normalize("NFC", file.relative_to(root).as_posix())


def split_of(name: str, val_fraction: float) -> str:
    """ "train" or "val", from a hash of the name alone."""
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "val" if draw < val_fraction else "train"


def square(image: Image.Image, size: int) -> Image.Image:
    """Any picture -> RGB (size, size): upright as EXIF says, over white, the central square."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)  # cut and resized in one step
    return image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS, box=box)


def torchvision_set(
    name: str,
    root: str | os.PathLike[str],
    size: int,
    split: str = "train",
    *,
    download: bool = False,
    flip: bool = False,
) -> PictureSet:
    """CIFAR10, CelebA, Flowers102 or ImageNet below `root`, laid out as torchvision does.

    `split` is "train" or "val" (CIFAR10: its test pictures). `download=True` fetches what is not
    there, except ImageNet, which needs an account. CelebA is one class, "face".
    Raises FileNotFoundError where the set is missing, saying how to get it; ValueError for a bad
    argument.
    """
    if name not in TORCHVISION_SETS:
        raise ValueError(f"name={name!r} must be one of {', '.join(TORCHVISION_SETS)}")
    if split not in ("train", "val"):
        raise ValueError(f"split={split!r} must be 'train' or 'val'")
    root = Path(root).expanduser()
    try:
        source, labels, classes = open_torchvision(name, root, split, download)
    except (RuntimeError, FileNotFoundError) as error:
        how = IMAGENET_FETCH if name == "ImageNet" else "pass download=True to fetch it"
        raise FileNotFoundError(f"no {name} in root={str(root)!r}: {how} ({error})") from error
    return PictureSet(f"{name}-{split}", source, labels, classes, size, flip)


def open_torchvision(
    name: str, root: Path, split: str, download: bool
) -> tuple[Any, Sequence[int], Sequence[str]]:
    """The torchvision data set, its labels and its class names."""
    from torchvision import datasets  # takes a while, and few need it

    if name == "CIFAR10":
        source = datasets.CIFAR10(root, split == "train", download=download)
        return source, source.targets, source.classes
    if name == "CelebA":
        source = datasets.CelebA(root, "valid" if split == "val" else split, download=download)
        return source, [0] * len(source), ["face"]
    if name == "Flowers102":
        source = datasets.Flowers102(root, split, download=download)
        return source, source._labels, source.classes
    source = datasets.ImageNet(root, split)
    return source, source.targets, [names[0] for names in source.classes]
