"""A small network that says of each pixel what it shows: the judge of pictures made from maps."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minildm import draws
from minildm.judge import JudgeBlock
from minildm.types import Batch


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """The judge's blocks going down, and as many going up again, with skips."""

    labels: tuple[str, ...]
    width: int = 16
    width_mult: tuple[int, ...] = (2, 3, 4)  # of the levels below full resolution

    def __post_init__(self) -> None:
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width={self.width} must be a multiple of 8, at least 8")
        if not self.labels or not self.width_mult:
            raise ValueError("labels must name at least one class, width_mult one level")


class UpBlock(nn.Module):
    """Twice the size, beside what the way down had there: -> (B, c_out, 2h, 2w)."""

    def __init__(self, c_in: int, c_skip: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in + c_skip, c_out, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, c_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = torch.cat([F.interpolate(x, size=skip.shape[-2:]), skip], dim=1)
        return F.silu(self.norm(self.conv(x)))


class Segmenter(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> logits (B, labels, H, W); sides that 2^levels divides."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.width, *(config.width * m for m in config.width_mult)]
        self.conv_in = nn.Conv2d(3, config.width, 3, padding=1)
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(JudgeBlock(a, b) for a, b in pairs)
        self.up = nn.ModuleList(UpBlock(b, a, a) for a, b in reversed(pairs))
        self.out = nn.Conv2d(config.width, len(config.labels), 1)

    def forward(self, x: Tensor) -> Tensor:
        least = 2 ** len(self.down)
        if x.shape[-2] % least or x.shape[-1] % least:
            raise ValueError(f"pictures {tuple(x.shape)} must have sides that {least} divides")
        hid, skips = F.silu(self.conv_in(x)), []
        for block in self.down:
            skips.append(hid)
            hid = block(hid)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            hid = block(hid, skip)
        return self.out(hid)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy over all pixels, on pictures that are dimmed and blurred at random."""
        logits = self(roughened(batch["image"]))
        return {"loss": F.cross_entropy(logits, batch["semantic"])}


def roughened(x: Tensor) -> Tensor:
    """As soft and noisy as generated pictures may be: (B, 3, H, W) -> the same shape."""
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur, noise = draws.rand(2, len(x), 1, 1, 1, dim=1, device=x.device)
    return x + blur * (soft - x) + 0.1 * noise * draws.randn_like(x)


@torch.no_grad()
def segmented(segmenter: Segmenter, x: Tensor) -> Tensor:
    """The likeliest label of each pixel, in batches: (N, 3, H, W) -> (N, H, W) int64, CPU."""
    place = next(segmenter.parameters()).device
    return torch.cat([segmenter(part.to(place)).argmax(dim=1).cpu() for part in x.split(64)])


def agreement(found: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Of two sets of maps (N, H, W) int64: the share of equal pixels, and the mean IoU, (N,) each.

    The mean over the labels that `maps` asks for in that picture: small objects count as much as
    the sky does. Raises ValueError for other shapes.
    """
    if found.shape != maps.shape or maps.ndim != 3:
        raise ValueError(
            f"maps must both be (N, H, W), got {tuple(found.shape)}, {tuple(maps.shape)}"
        )
    ious = []
    for a, b in zip(found, maps, strict=True):
        asked = b.unique()
        ours, theirs = a == asked[:, None, None], b == asked[:, None, None]
        both, either = (ours & theirs).sum((1, 2)), (ours | theirs).sum((1, 2))
        ious.append((both / either).mean())
    return (found == maps).float().mean((1, 2)), torch.stack(ious)
