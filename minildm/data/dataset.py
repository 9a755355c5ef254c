"""The base of every data set: images as bytes, and a column for each other entry of an item."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset

from minildm.files import atomic_write, cache_dir, progress


def as_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [-1, 1]; float input passes through."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


class ImageDataset(Dataset[dict[str, Any]]):
    """Images with a label, a group, a style and a caption each.

    Item i: `image` (3, S, S) float32 in [-1, 1]; `label`, `group`, `style` int64, indices into
    `classes`, `groups`, `styles`; `caption` str; further entries.

    images: (N, 3, S, S) uint8, or None in a subclass that makes them at their first use; labels
    are then required. columns: all other entries, tensors (N, ...) or N strings; by default the
    group is the label, the style 0 and the caption the name of the class.
    Raises ValueError for images of another shape or type, and for columns of another length.
    """

    config: Any = None  # the DataConfig that loaded it, which a trained model's card keeps

    def __init__(
        self,
        images: Tensor | None,
        *,
        name: str,
        labels: Tensor | None = None,
        classes: Sequence[str] = ("image",),
        groups: Sequence[str] | None = None,
        styles: Sequence[str] = ("image",),
        columns: Mapping[str, Tensor | Sequence[str]] | None = None,
    ) -> None:
        labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        self.name, self.classes, self.styles = name, tuple(classes), tuple(styles)
        self.groups = tuple(groups or classes)
        self.columns = {
            "label": labels,
            "group": labels,
            "style": torch.zeros_like(labels),
            "caption": [self.classes[label].replace("_", " ") for label in labels.tolist()],
            **(columns or {}),
        }
        lengths = {key: len(column) for key, column in self.columns.items()}
        if images is not None:
            self.images, lengths["image"] = images, len(images)
            if images.dtype != torch.uint8 or images.shape[1:2] != (3,):
                found = f"{tuple(images.shape)} {images.dtype}"
                raise ValueError(f"images must be (N, 3, S, S) uint8, got {found}")
        if len(set(lengths.values())) > 1 or not len(labels):
            raise ValueError(f"columns must have one length, at least 1, got {lengths}")

    labels = property(lambda self: self.columns["label"])
    group_ids = property(lambda self: self.columns["group"])
    style_ids = property(lambda self: self.columns["style"])
    captions = property(lambda self: self.columns["caption"])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = range(len(self))[i]  # negative: from the end; IndexError outside
        columns = {key: column[i] for key, column in self.columns.items()}
        return {"image": as_float(self.images[i]), **columns}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of names, columns and images; independent of the paths and times of files."""
        digest = hashlib.sha256(repr((self.classes, self.groups, self.styles)).encode())
        for key, column in {**self.columns, "image": self.images}.items():
            if isinstance(column, Tensor):
                digest.update(f"{key} {tuple(column.shape)} {column.dtype}\n".encode())
                digest.update(column.contiguous().numpy())
            else:
                digest.update(f"{key} {list(column)}\n".encode())
        return digest.hexdigest()


def to_tensor(image: Image.Image) -> Tensor:
    """RGB -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def square(image: Image.Image, size: int) -> Tensor:
    """Any image -> (3, size, size) uint8: upright as EXIF says, over white, the central square.

    Raises ValueError for grey of a depth other than 8 and 16 bits: its white is not known.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip at 255
        grey = np.asarray(image)
        if 0 < grey.max() < 4096:
            raise ValueError(f"grey of at most {grey.max()} in 16 bits: scale it to 65535")
        image = Image.fromarray((grey >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("grey of 32 bits: store it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return to_tensor(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS))


def decode_all(read: Callable[[Any, int], Tensor], sources: Sequence[Any], size: int) -> Tensor:
    """`read` an image of the size from each source, in threads: (N, 3, size, size) uint8."""
    images = torch.empty(len(sources), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as threads:
        decoded = threads.map(lambda source: read(source, size), sources)
        for i, image in enumerate(progress(decoded, "decoding", len(sources), delay=2)):
            images[i] = image
    return images


def cached(name: str, compute: Callable[[], Tensor]) -> Tensor:
    """The tensor `name` of the cache; computed and stored if it is missing or damaged."""
    path = cache_dir() / f"{name}.safetensors"
    try:
        return load_file(path)["content"]
    except (OSError, SafetensorError, KeyError):
        content = compute().contiguous()
    with atomic_write(path) as file:
        file.write(save({"content": content}))
    return content
