"""Conditions that are pictures and go beside z_t: low resolution, holes, semantic maps.

LDM Sec. 3.3, "concat". Each makes (B, c', h, w) of what a batch holds, at the latent's size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minildm.tau_theta import ConditionerConfig, Encode
from minildm.types import Batch


class LowResolution(nn.Module):
    """A picture f times smaller, as it is: `low_res` (B, 3, h, w), LDM Sec. 4.4."""

    keys = ("low_res",)

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__()

    def forward(self, batch: Batch, encode: Encode | None = None) -> Tensor:
        """low_res (B, 3, h, w) in [-1, 1]; ValueError for another shape or range."""
        return checked_picture(batch["low_res"], "low_res")


class MaskedPicture(nn.Module):
    """What is known of a picture, and where: its latent and the mask, LDM Sec. 4.5.

    `image` (B, 3, H, W) and `mask` (B, 1, H, W), 1 = known -> (B, c + 1, h, w). As in the
    official code the hole is black in what is encoded, and 1 in the mask that the UNet sees, the
    known -1.
    """

    keys = ("image", "mask")

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__()

    def forward(self, batch: Batch, encode: Encode | None = None) -> Tensor:
        """ValueError for a mask that is not binary, or of another size than the picture."""
        x, mask = checked_picture(batch["image"], "image"), batch["mask"]
        check_mask(mask, x)
        if encode is None:
            raise ValueError("encode=None: a masked picture needs the first stage")
        z = encode(masked(x, mask))
        hole = 1 - 2 * F.interpolate(mask.to(z), size=z.shape[-2:])  # nearest
        return torch.cat([z, hole], dim=1)


class SemanticMap(nn.Module):
    """A label for each pixel: one-hot, halved `stages` times, mixed to a few channels.

    `semantic` (B, H, W) int64 -> (B, channels, H/f, W/f): the official SpatialRescaler; LDM
    Sec. 4.3.2.
    """

    keys = ("semantic",)

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__()
        if not config.labels:
            raise ValueError("concat='semantic' needs labels, at least one name")
        self.stages, self.labels = config.stages, config.labels
        self.mapper = nn.Conv2d(len(config.labels), config.channels, 1, bias=False)

    def forward(self, batch: Batch, encode: Encode | None = None) -> Tensor:
        """ValueError for another shape, for labels out of range, sides that 2^stages leaves."""
        self.check(batch["semantic"])
        maps = batch["semantic"].to(self.mapper.weight.device)
        shares = F.one_hot(maps, len(self.labels))
        shares = rearrange(shares, "b h w label -> b label h w").to(self.mapper.weight.dtype)
        for _ in range(self.stages):
            shares = F.interpolate(shares, scale_factor=0.5, mode="bilinear")
        return self.mapper(shares)

    def check(self, maps: Any) -> None:
        """The ValueErrors of `forward`."""
        if not isinstance(maps, Tensor) or maps.ndim != 3 or maps.dtype != torch.int64:
            raise ValueError(f"semantic must be a tensor (B, H, W) of int64, got {_said(maps)}")
        last, f = len(self.labels) - 1, 2**self.stages
        if not (int(maps.min()) >= 0 and int(maps.max()) <= last):
            raise ValueError(f"semantic must lie in 0..{last}, got {maps.min()}..{maps.max()}")
        if maps.shape[1] % f or maps.shape[2] % f:
            raise ValueError(f"semantic {tuple(maps.shape)} must have sides that {f} divides")


Spatial = LowResolution | MaskedPicture | SemanticMap


def build_spatial(config: ConditionerConfig) -> Spatial:
    """What `config.concat` names."""
    kinds = {"low_res": LowResolution, "inpaint": MaskedPicture, "semantic": SemanticMap}
    return kinds[config.concat](config)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """The picture with its holes black: (B, 3, H, W) in [-1, 1], (B, 1, H, W) with 1 = known."""
    return torch.where(mask > 0.5, x, -torch.ones_like(x))


def checked_picture(x: Any, name: str) -> Tensor:
    """x itself; ValueError unless it is (B, 3, H, W) and finite in [-1, 1]."""
    if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
        raise ValueError(f"{name} must be a tensor (B, 3, H, W) of floats, got {_said(x)}")
    low, high = x.aminmax()
    if not (low >= -1.001 and high <= 1.001):  # NaN is in no range
        raise ValueError(f"{name} must lie in [-1, 1], got {low:.3g}..{high:.3g}")
    return x


def check_mask(mask: Any, x: Tensor) -> None:
    """ValueError unless mask is (B, 1, H, W) as x (B, 3, H, W), with nothing but 0 and 1."""
    wanted = (len(x), 1, *x.shape[2:])
    if not isinstance(mask, Tensor) or mask.shape != wanted:
        raise ValueError(f"mask must be {wanted} as the picture, got {_said(mask)}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must be binary: 1 where the picture is known, 0 in the hole")


def _said(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"{value!r:.60}"
