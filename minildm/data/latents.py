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
        if hasattr(self.data, "without_image"):
            item = self.data.without_image(index)
        else:
            item = {key: value for key, value in self.data[index].items() if key != "image"}
        return {**item, "moments": self.moments[index]}
