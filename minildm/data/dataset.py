"""The base of every data set: images as bytes, and a column for each other entry of an item."""

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset

from minildm.files import atomic_write, cache_dir

Column = Tensor | Sequence[str]  # (N, ...), or N strings


def as_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [-1, 1]; float input passes through."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


class ImageDataset(Dataset[dict[str, Any]]):
    """Images with a label, a group, a style and a caption each.

    Item i: `image` (3, S, S) float32 in [-1, 1]; `label`, `group`, `style` int64, indices into
    `classes`, `groups`, `styles`; `caption` str; an entry for each further column. The whole set:
    `images` (N, 3, S, S) uint8; `labels`, `group_ids`, `style_ids` (N,) int64; `captions` list of
    str; `columns`, these and the further ones by their names in an item.

    images: the tensor, or a function that returns it at the first use (labels are then required).
    groups, group_ids: default: the classes and labels. captions: default: the class names.
    columns: further entries, tensors (N, ...) or N strings.
    fingerprint: default: sha256 of images, columns and names.
    Raises ValueError for images of another shape or type, and for columns of another length.
    """

    def __init__(
        self,
        images: Tensor | Callable[[], Tensor],
        *,
        name: str,
        labels: Tensor | None = None,
        classes: Sequence[str] = ("image",),
        group_ids: Tensor | None = None,
        groups: Sequence[str] | None = None,
        style_ids: Tensor | None = None,
        styles: Sequence[str] = ("image",),
        captions: Sequence[str] | None = None,
        columns: Mapping[str, Column] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        if isinstance(images, Tensor) and (
            images.dtype != torch.uint8 or images.shape[1:2] != (3,)
        ):
            raise ValueError(
                f"images must be (N, 3, S, S) uint8, got {images.shape} {images.dtype}"
            )
        labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        self.name, self._images, self._fingerprint = name, images, fingerprint
        self.classes, self.styles = tuple(classes), tuple(styles)
        self.groups = self.classes if groups is None else tuple(groups)
        if captions is None:
            captions = [self.classes[label].replace("_", " ") for label in labels.tolist()]
        self.columns: dict[str, Column] = {
            "label": labels,
            "group": labels if group_ids is None else group_ids,
            "style": torch.zeros_like(labels) if style_ids is None else style_ids,
            "caption": list(captions),
            **(columns or {}),
        }
        lengths = {key: len(column) for key, column in self.columns.items()}
        if isinstance(images, Tensor):
            lengths["image"] = len(images)
        if len(set(lengths.values())) > 1 or not len(labels):
            raise ValueError(f"columns must have one length, at least 1, got {lengths}")

    labels = property(lambda self: self.columns["label"])
    group_ids = property(lambda self: self.columns["group"])
    style_ids = property(lambda self: self.columns["style"])
    captions = property(lambda self: self.columns["caption"])

    @cached_property
    def images(self) -> Tensor:
        """(N, 3, S, S) uint8."""
        return self._images if isinstance(self._images, Tensor) else self._images()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        i = range(len(self))[i]  # negative: from the end; IndexError outside
        return {"image": as_float(self.images[i]), **self.without_image(i)}

    def without_image(self, i: int) -> dict[str, Any]:
        """Item i without what must be decoded or painted."""
        return {key: column[i] for key, column in self.columns.items()}

    def column(self, key: str) -> Tensor:
        """One tensor entry of all items, (N, ...), images as uint8; ValueError if not there."""
        if key == "image":
            return self.images
        if key not in self.columns:
            raise ValueError(f"the items of data set {self.name!r} have no {key!r}")
        return self.columns[key]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the content; where and when its files were written does not matter."""
        if self._fingerprint is not None:
            return self._fingerprint
        digest = hashlib.sha256(repr((self.classes, self.groups, self.styles)).encode())
        for key, column in {**self.columns, "image": self.images}.items():
            if isinstance(column, Tensor):
                digest.update(f"{key} {tuple(column.shape)} {column.dtype}\n".encode())
                digest.update(column.contiguous().numpy())
            else:
                digest.update(f"{key} {list(column)}\n".encode())
        return digest.hexdigest()


def square(image: Image.Image, size: int) -> Image.Image:
    """Any image -> RGB (size, size): upright as EXIF says, over white, the central square."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)  # cropped and resized in one step
    return image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS, box=box)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def check_choice(argument: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError, with the close names and all that are allowed, for another value."""
    if value not in allowed:
        close = difflib.get_close_matches(str(value), map(str, allowed))
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        known = ", ".join(map(str, allowed))
        raise ValueError(f"{argument}={value!r} is not known.{hint} Allowed: {known}")


def check_choices(argument: str, values: Sequence[str], allowed: Sequence[str]) -> tuple[str, ...]:
    """Return one name or several as a tuple; raise ValueError for none and for an unknown one."""
    names = (values,) if isinstance(values, str) else tuple(dict.fromkeys(values))
    for name in names or (names,):
        check_choice(argument, name, allowed)
    return names


def check_range(argument: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{argument}={value} must lie between {low} and {high}")


def cached(name: str, compute: Callable[[], Tensor]) -> Tensor:
    """Return the tensor stored under `name` in the cache; compute and store it if it is missing.

    A damaged file is made again.
    """
    path = cache_dir() / f"{name}.safetensors"
    try:
        return load_file(path)["content"]
    except (OSError, SafetensorError, KeyError):
        content = compute().contiguous()
    with atomic_write(path) as file:
        file.write(save({"content": content}))
    return content
