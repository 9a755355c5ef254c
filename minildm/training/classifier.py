"""Small networks that recognise what an image shows: Classifier; per pixel: Segmenter."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from minildm.layers import Batch, BatchRandom, check_fields

QUESTIONS = ("label", "group", "style")


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """Blocks going down, and as many going up again, with skips."""

    labels: tuple[str, ...]
    channels: int = 16  # a multiple of 8, the groups of its normalisation
    channel_mult: tuple[int, ...] = (2, 3, 4)  # of the levels below full resolution

    def __post_init__(self) -> None:
        check_fields(self, 8, 4096, "channels")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(SegmenterConfig):
    """A residual network with one linear head per question: label, group, style."""

    groups: tuple[str, ...]
    styles: tuple[str, ...]
    channels: int = 32
    channel_mult: tuple[int, ...] = (1, 2, 4, 8)
    dropout: float = 0.2


class DownBlock(nn.Module):
    """Two 3x3 convolutions and a skip: (B, c_in, h, w) -> (B, c_out, h/2, w/2)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(8, c_out), nn.GroupNorm(8, c_out)

    def forward(self, x: Tensor) -> Tensor:
        hid = self.norm2(self.conv2(F.silu(self.norm1(self.conv1(x)))))
        return F.silu(self.skip(F.avg_pool2d(x, 2)) + hid)


class UpBlock(nn.Module):
    """(B, c_in, h, w), the skip (B, c_skip, 2h, 2w) -> (B, c_out, 2h, 2w)."""

    def __init__(self, c_in: int, c_skip: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in + c_skip, c_out, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, c_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = torch.cat([F.interpolate(x, size=skip.shape[-2:]), skip], dim=1)
        return F.silu(self.norm(self.conv(x)))


class Classifier(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> logits for "label", "group" and "style", (B, answers) each."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels, *(config.channels * m for m in config.channel_mult)]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.blocks = nn.Sequential(*(DownBlock(a, b) for a, b in pairwise(widths)))
        self.dropout = nn.Dropout(config.dropout)
        answers = zip(QUESTIONS, (config.labels, config.groups, config.styles), strict=True)
        self.heads = nn.ModuleDict({q: nn.Linear(widths[-1], len(names)) for q, names in answers})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hid = self.dropout(self.blocks(F.silu(self.conv_in(x))).mean((2, 3)))  # (B, C)
        return {question: head(hid) for question, head in self.heads.items()}

    def loss(self, batch: Batch, rng: BatchRandom) -> dict[str, Tensor]:
        """Cross-entropy with 0.1 label smoothing of each question, and their sum, `loss`."""
        logits = self(soften(moved(batch["image"], rng), rng))
        terms = {q: F.cross_entropy(logits[q], batch[q], label_smoothing=0.1) for q in QUESTIONS}
        return {"loss": sum(terms.values()), **terms}


class Segmenter(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> logits (B, labels, H, W); 2^levels must divide H and W."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.channels, *(config.channels * m for m in config.channel_mult)]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(DownBlock(a, b) for a, b in pairs)
        self.up = nn.ModuleList(UpBlock(b, a, a) for a, b in reversed(pairs))
        self.out = nn.Conv2d(config.channels, len(config.labels), 1)

    def forward(self, x: Tensor) -> Tensor:
        hid, skips = F.silu(self.conv_in(x)), []
        for block in self.down:
            skips.append(hid)
            hid = block(hid)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            hid = block(hid, skip)
        return self.out(hid)

    def loss(self, batch: Batch, rng: BatchRandom) -> dict[str, Tensor]:
        """Cross-entropy over all pixels."""
        logits = self(soften(batch["image"], rng))
        return {"loss": F.cross_entropy(logits, batch["semantic"].long())}


def moved(x: Tensor, rng: BatchRandom) -> Tensor:
    """Shift and zoom images at random; what enters is white. (B, 3, H, W) -> the same shape.

    Generated objects are never quite centred.
    """
    theta = x.new_zeros(len(x), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 0.85 + 0.35 * rng.rand(len(x), device=x.device)
    theta[:, :, 2] = 0.3 * rng.rand(len(x), 2, device=x.device) - 0.15
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    # Outside the image grid_sample reads 0, which is white after this shift.
    return F.grid_sample(x - 1.0, grid, align_corners=False) + 1.0


def soften(x: Tensor, rng: BatchRandom) -> Tensor:
    """Blur images and add noise, by a random amount each: (B, 3, H, W) -> the same shape.

    Generated images are a little soft; a network trained on sharp ones would react to that.
    """
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    blur, noise = rng.rand(len(x), 2, 1, 1, 1, device=x.device).unbind(1)
    return x + blur * (blurred - x) + 0.1 * noise * rng.randn_like(x)


@torch.no_grad()
def logits_of(network: Classifier | Segmenter, x: Tensor) -> Any:
    """What the network returns, on the CPU, for images (N, 3, H, W) in batches."""
    device = next(network.parameters(), x).device
    parts = [network(part.to(device)) for part in x.split(256)]
    return tree_map(lambda *same: torch.cat(same).cpu(), *parts)


def agreement(found: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Share of equal pixels, and mean IoU over the labels in `maps`: (N, H, W) int64 -> (N,) each.

    The mean counts each label of an image equally, small objects as much as the sky.
    """
    ious = []
    for a, b in zip(found, maps, strict=True):
        labels = b.unique()[:, None, None]
        both, either = ((a == labels) & (b == labels)), ((a == labels) | (b == labels))
        ious.append((both.sum((1, 2)) / either.sum((1, 2))).mean())
    return (found == maps).float().mean((1, 2)), torch.stack(ious)
