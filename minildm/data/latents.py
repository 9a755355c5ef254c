"""Latents of a whole dataset, encoded once and kept on disk."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from minildm import processes
from minildm.files import atomic_write, cache_dir


def cached_moments(key: str, compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` gives, read from the cache if it is there; a damaged file is made anew."""
    path = cache_dir() / f"latents-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
    if path.exists():
        try:
            return load_file(path)["moments"]
        except (SafetensorError, KeyError, OSError):
            path.unlink(missing_ok=True)
    moments = compute().contiguous()
    with atomic_write(path) as file:
        file.write(save({"moments": moments}))
    return moments


class LatentDataset(Dataset):
    """The items of `data` with `moments` (2, c', h, w) in place of `image`.

    keep: entries of the items that a task needs although they must be painted, "image" or
    "semantic"; all are painted once, and kept as bytes: (3, S, S) and (S, S) uint8.
    """

    def __init__(self, data: Dataset, moments: Tensor, keep: Sequence[str] = ()) -> None:
        if len(data) != len(moments):
            raise ValueError(f"data has {len(data)} pictures, moments {len(moments)}")
        self.data, self.moments, self.kept = data, moments, painted(data, keep)

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Not self.data[index], which would draw or decode the picture at every step.
        if hasattr(self.data, "without_image"):
            item = self.data.without_image(index)
        else:
            item = {key: value for key, value in self.data[index].items() if key != "image"}
        kept = {key: pictures[index] for key, pictures in self.kept.items()}
        return {**item, **kept, "moments": self.moments[index]}


def painted(data: Dataset, keys: Sequence[str]) -> dict[str, Tensor]:
    """Those entries of all items, stacked, as bytes: pictures of [-1, 1] in 256 steps, labels.

    Raises ValueError where the items have no such entry.
    """
    if not keys:
        return {}
    missing = [key for key in keys if key not in data[0]]
    if missing:
        raise ValueError(f"data {data.name!r} has no {' and '.join(missing)} in its items")
    found: dict[str, list[Tensor]] = {key: [] for key in keys}
    for i in tqdm(range(len(data)), "paint", delay=2, disable=not processes.is_main()):
        item = data[i]
        for key in keys:
            value = (item[key] + 1) * 127.5 if item[key].is_floating_point() else item[key]
            found[key].append(value.round().to(torch.uint8))
    return {key: torch.stack(values) for key, values in found.items()}
