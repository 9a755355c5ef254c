"""Images of your own: a folder of image files, or a set that torchvision knows."""

import hashlib
import os
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from minildm.data.dataset import ImageDataset, check_choice, check_range, square, to_tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TORCHVISION_SETS = ("CIFAR10", "CelebA", "Flowers102", "ImageNet")
IMAGENET_FETCH = "put ILSVRC2012_devkit_t12.tar.gz and ILSVRC2012_img_*.tar of image-net.org there"


class ImageFolder(ImageDataset):
    """A folder of images, decoded into memory. Its subfolders are the classes; without any it is
    one class itself.

    `split` is "train", "val" or "all"; a hash of a file's name below `root` puts about
    `val_fraction` of the files into "val", so adding files moves no other. Subfolders are
    searched to any depth; names starting with a dot or two underscores are skipped. Items have
    the relative name as `file`. Raises FileNotFoundError for a missing folder; ValueError for a
    folder without images, files next to class folders, an empty split, a file that cannot be
    decoded and a bad argument.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int,
        *,
        split: str = "train",
        val_fraction: float = 0.1,
    ) -> None:
        check_choice("split", split, ("train", "val", "all"))
        check_range("val_fraction", val_fraction, 0, 1)
        root = Path(root).expanduser().resolve()
        files = find_images(root)
        classes = sorted({name.partition("/")[0] if "/" in name else root.name for name in files})
        kept = [n for n in files if split in ("all", split_of(n, val_fraction))]
        if not kept:
            raise ValueError(
                f"split={split!r} of {root} is empty ({len(files)} images in all): "
                f"change val_fraction={val_fraction}, or take split='all'"
            )
        labels = [classes.index(name.partition("/")[0]) if "/" in name else 0 for name in kept]
        super().__init__(
            decode_all(lambda i: read_square(files[kept[i]], size), len(kept), size),
            name=f"{root.name}-{split}",
            labels=torch.tensor(labels),
            classes=classes,
            columns={"file": kept},
        )


def find_images(root: Path) -> dict[str, Path]:
    """Every image below `root` by its relative name: slashes, accents as one character."""
    if not root.is_dir():
        raise FileNotFoundError(f"root={str(root)!r} is not a folder")
    found = {}
    for path in sorted(root.rglob("*")):
        name = unicodedata.normalize("NFC", path.relative_to(root).as_posix())
        hidden = any(part.startswith((".", "__")) for part in name.split("/"))  # of the system
        if path.suffix.lower() in SUFFIXES and path.is_file() and not hidden:
            found[name] = path
    loose = [path for name, path in found.items() if "/" not in name]
    if not found:
        raise ValueError(f"no image ({', '.join(SUFFIXES)}) in {root} or its subfolders")
    if 0 < len(loose) < len(found):
        raise ValueError(f"{loose[0]} is next to the class folders: move it into one of them")
    return found


def split_of(name: str, val_fraction: float) -> str:
    """ "train" or "val", from a hash of the name alone."""
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "val" if draw < val_fraction else "train"


def decode_all(read: Callable[[int], Image.Image], n: int, size: int) -> Tensor:
    """Read n images in threads: (n, 3, size, size) uint8."""
    check_range("size", size, 1, 4096)
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)

    def fill(i: int) -> None:
        images[i] = to_tensor(read(i))

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for _ in tqdm(threads.map(fill, range(n)), desc="decoding", total=n, delay=2):
            pass
    return images


def read_square(file: Path, size: int) -> Image.Image:
    """Decode a file to RGB (size, size); ValueError names one that is damaged."""
    try:
        with Image.open(file) as image:
            image.draft("RGB", (2 * size, 2 * size))  # large JPEGs: decode less
            return square(image, size)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{file} is not a readable image ({error}): replace it or move it out of the folder"
        ) from error


def torchvision_set(
    name: str,
    root: str | os.PathLike[str],
    size: int,
    split: str = "train",
    *,
    download: bool = False,
) -> ImageDataset:
    """CIFAR10, CelebA, Flowers102 or ImageNet below `root`, in torchvision's layout.

    `split` is "train" or "val" (CIFAR10: its test images). `download=True` fetches what is
    missing, except ImageNet, which requires an account. CelebA is one class, "face". Raises
    FileNotFoundError, with what to do, if the set is missing; ValueError for a bad argument.
    """
    check_choice("name", name, TORCHVISION_SETS)
    check_choice("split", split, ("train", "val"))
    from torchvision import datasets  # slow to import

    root = Path(root).expanduser()
    options = {} if name == "ImageNet" else {"download": download}
    part = {"CIFAR10": split == "train", "CelebA": split.replace("val", "valid")}.get(name, split)
    try:
        source = getattr(datasets, name)(root, part, **options)
    except (RuntimeError, FileNotFoundError) as error:
        how = IMAGENET_FETCH if name == "ImageNet" else "pass download=True to fetch it"
        raise FileNotFoundError(f"no {name} in root={str(root)!r}: {how} ({error})") from error
    labels = source._labels if name == "Flowers102" else getattr(source, "targets", None)
    classes = ["face"] if name == "CelebA" else source.classes
    if name == "ImageNet":
        classes = [names[0] for names in classes]
    return ImageDataset(
        decode_all(lambda i: square(source[i][0], size), len(source), size),
        name=f"{name}-{split}",
        labels=None if name == "CelebA" else torch.tensor(labels),
        classes=classes,
    )
