"""Latents of a whole dataset, encoded once and kept on disk."""

import hashlib
from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset

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


COLUMNS = {"label": "labels", "group": "group_ids", "style": "style_ids", "caption": "captions"}


class LatentDataset(Dataset):
    """The items of `data` with `moments` (2, c', h, w) in place of `image`."""

    def __init__(self, data: Dataset, moments: Tensor) -> None:
        if len(data) != len(moments):
            raise ValueError(f"data has {len(data)} pictures, moments {len(moments)}")
        self.data, self.moments = data, moments

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # Not self.data[index], which would draw or decode the picture at every step.
        columns = {key: getattr(self.data, name, None) for key, name in COLUMNS.items()}
        if any(column is None for column in columns.values()):
            item = dict(self.data[index])
            del item["image"]
        else:
            item = {key: column[index] for key, column in columns.items()}
        return {**item, "moments": self.moments[index]}
