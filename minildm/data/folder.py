"""Images of your own: a folder of image files, or a set that torchvision knows."""

import hashlib
from pathlib import Path

import torch
from PIL import Image, ImageOps

from minildm.conditioning import look_up
from minildm.data.dataset import ImageDataset, decode_all
from minildm.layers import check_fields

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VAL_SHARE = 0.1  # of the files


class ImageFolder(ImageDataset):
    """A folder of images, decoded into memory; its subfolders are the classes, if it has any.

    `split` is "train", "val" or "all"; a hash of its name below `root` puts about a tenth of the
    files into "val", so adding files moves no other. Subfolders are searched to any depth; names
    starting with a dot or two underscores are skipped. Items have the relative name as `file`.
    Raises ValueError for a missing or empty folder, files next to class folders, an empty split, a
    file that cannot be decoded and a bad argument.
    """

    def __init__(self, root: str | Path, size: int, *, split: str = "train") -> None:
        look_up(split, ("train", "val", "all"), "split")
        self.size = size
        check_fields(self, 1, 4096, "size")
        root = Path(root).expanduser().resolve()
        names = find_images(root)
        class_of = {name: name.partition("/")[0] if "/" in name else root.name for name in names}
        classes = sorted(set(class_of.values()))
        kept = [name for name in names if split in ("all", split_of(name))]
        if not kept:
            raise ValueError(f"split={split!r} of {root} is empty: it requires more images")
        super().__init__(
            decode_all(lambda name: read_image(root / name, size), kept, size),
            name=f"{root.name}-{split}",
            labels=torch.tensor([classes.index(class_of[name]) for name in kept]),
            classes=classes,
            columns={"file": kept},
        )


def find_images(root: Path) -> list[str]:
    """The name of every image, relative to `root`, with slashes, sorted."""
    files = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in SUFFIXES]
    paths = [path.relative_to(root) for path in files if path.is_file()]
    hidden = (".", "__")  # the system's own files
    names = [p.as_posix() for p in paths if not any(part.startswith(hidden) for part in p.parts)]
    loose = [name for name in names if "/" not in name]
    if not names:
        raise ValueError(f"no image ({', '.join(SUFFIXES)}) in {root} or its subfolders")
    if 0 < len(loose) < len(names):
        raise ValueError(f"{loose[0]} is next to the class folders: move it into one of them")
    return names


def split_of(name: str) -> str:
    """ "train" or "val", from a hash of the name alone."""
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return "val" if draw < VAL_SHARE else "train"


def read_image(file: Path, size: int) -> Image.Image:
    """Decode a file for images of `size` pixels; ValueError names one that is damaged."""
    try:
        with Image.open(file) as image:
            image.draft("RGB", (2 * size, 2 * size))  # large JPEGs: decode less
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # may raise, as decoding may
            return image
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is damaged, or not an image: {error}") from error


def torchvision_set(
    name: str, root: str | Path, size: int, split: str = "train", *, download: bool = False
) -> ImageDataset:
    """CIFAR10, CelebA, Flowers102 or ImageNet below `root`, in torchvision's layout.

    `split` is "train" or "val" (CIFAR10: its test images). `download=True` fetches what is
    missing, except ImageNet, which requires an account. CelebA is one class, "face". Raises
    ValueError for a bad argument, and torchvision's RuntimeError if the set is missing.
    """
    look_up(name, ("CIFAR10", "CelebA", "Flowers102", "ImageNet"), "name")
    look_up(split, ("train", "val"), "split")
    from torchvision import datasets  # slow to import

    options = {} if name == "ImageNet" else {"download": download}
    part = {"CIFAR10": split == "train", "CelebA": split.replace("val", "valid")}.get(name, split)
    source = getattr(datasets, name)(Path(root).expanduser(), part, **options)
    labels = source._labels if name == "Flowers102" else getattr(source, "targets", None)
    classes = ["face"] if name == "CelebA" else source.classes
    return ImageDataset(
        decode_all(lambda i: source[i][0], range(len(source)), size),
        name=f"{name}-{split}",
        labels=None if labels is None else torch.tensor(labels),
        classes=[names[0] for names in classes] if name == "ImageNet" else classes,
    )
