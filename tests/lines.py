"""A line to fit in float64: the smallest thing that a training loop can train on."""

from typing import Any

import torch
from torch.utils.data import Dataset

from minildm.experiments import TrainConfig

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    steps=6, batch_size=4, lr=0.1, warmup_steps=2, ema_decay=0.5, precision="fp32", save_every=2
)


class Line(Dataset):
    """y = 3 x - 1 with a little noise, in float64."""

    def __init__(self, n: int = 16) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(n, 2, generator=draw, dtype=torch.float64)
        self.y = 3 * self.x[:, :1] - 1 + 0.1 * self.x[:, 1:]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"x": self.x[i], "y": self.y[i], "index": i}
