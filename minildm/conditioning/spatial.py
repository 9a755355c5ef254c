"""Conditions concatenated with z_t: low resolution, inpainting, semantic maps; LDM Sec. 3.3.

Each gives (B, c', h, w) at the latent's size; "hybrid" adds tokens.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minildm.conditioning.base import Conditioner, ConditionerConfig, Encode
from minildm.layers import Batch


class SpatialConditioner(Conditioner):
    """Base: tensors in a batch -> (B, c', h, w). There is no null condition."""

    keys: tuple[str, ...]  # of the batch

    def batch_from(self, y: Any, n: int) -> Batch:
        """A dict of tensors under `keys`, or the tensor if there is one key -> a checked batch."""
        y = {self.keys[0]: y} if isinstance(y, Tensor) and len(self.keys) == 1 else y
        good = isinstance(y, dict) and set(y) == set(self.keys)
        if not good or not all(isinstance(x, Tensor) for x in y.values()):
            raise ValueError(f"y must be a dict of tensors {self.keys}, got {y!r:.60}")
        alone = 2 if self.keys == ("semantic",) else 3  # axes of one map, of one image
        batch = {k: x.expand(n, *x.shape) if x.ndim == alone else x for k, x in y.items()}
        self.check(batch)
        return batch

    def check(self, batch: Batch) -> None:
        """Raises ValueError unless the first key holds images in [-1, 1]."""
        name, x = self.keys[0], batch[self.keys[0]]
        good = x.ndim == 4 and x.shape[1] == 3 and x.is_floating_point()
        if not good or not (x.abs() <= 1.001).all():  # NaN is refused, too
            raise ValueError(f"{name} must be (B, 3, H, W) of floats in [-1, 1]")


class LowResConditioner(SpatialConditioner):
    """`low_res` (B, 3, h, w) in [-1, 1], an image f times smaller, as it is; LDM Sec. 4.4."""

    keys = ("low_res",)

    def concat_of(self, batch: Batch, encode: Encode | None) -> Tensor:
        return self.here(batch["low_res"])


@dataclass(frozen=True, kw_only=True)
class LowResConfig(ConditionerConfig):
    """A smaller image."""

    conditioner: ClassVar[type[Conditioner]] = LowResConditioner
    channels: ClassVar[int] = 3
    kind: Literal["low_res"] = "low_res"


class InpaintConditioner(SpatialConditioner):
    """`image` (B, 3, H, W), `mask` (B, 1, H, W), 1 = known -> (B, c + 1, h, w); LDM Sec. 4.5.

    As in the official code the hole is black in the encoded image; the mask that the UNet sees is
    1 in the hole and -1 where the image is known.
    """

    keys = ("image", "mask")

    def concat_of(self, batch: Batch, encode: Encode | None) -> Tensor:
        mask = self.here(batch["mask"])
        z = encode(masked(self.here(batch["image"]), mask))
        hole = 1 - 2 * F.interpolate(mask.to(z), size=z.shape[-2:])  # nearest
        return torch.cat([z, hole], dim=1)

    def check(self, batch: Batch) -> None:
        """Raises ValueError unless `mask` is binary and of the image's size."""
        super().check(batch)
        mask, shape = batch["mask"], tuple(batch["image"][:, :1].shape)
        if mask.shape != shape or not ((mask == 0) | (mask == 1)).all():
            raise ValueError(f"mask must be {shape}, 1 where the image is known, 0 in the hole")


@dataclass(frozen=True, kw_only=True)
class InpaintConfig(ConditionerConfig):
    """An image with a hole."""

    conditioner: ClassVar[type[Conditioner]] = InpaintConditioner
    kind: Literal["inpaint"] = "inpaint"

    def concat_channels(self, z_channels: int) -> int:
        return z_channels + 1


class SemanticConditioner(SpatialConditioner):
    """`semantic` (B, H, W) int64 -> (B, channels, H/f, W/f): the official SpatialRescaler.

    One-hot, halved `stages` times (f = 2^stages), mixed by a 1x1 convolution; LDM Sec. 4.3.2.
    """

    keys = ("semantic",)

    def __init__(self, config: "SemanticConfig") -> None:
        super().__init__(config)
        self.mapper = nn.Conv2d(len(config.labels), config.channels, 1, bias=False)

    def concat_of(self, batch: Batch, encode: Encode | None) -> Tensor:
        shares = F.one_hot(self.here(batch["semantic"]), len(self.config.labels))
        shares = rearrange(shares, "b h w label -> b label h w").to(self.mapper.weight.dtype)
        for _ in range(self.config.stages):
            shares = F.interpolate(shares, scale_factor=0.5, mode="bilinear")
        return self.mapper(shares)

    def check(self, batch: Batch) -> None:
        """Raises ValueError for labels out of range and for sides that f does not divide."""
        maps, n, f = batch["semantic"], len(self.config.labels), 2**self.config.stages
        good = maps.ndim == 3 and maps.dtype == torch.int64
        good = good and not maps.shape[1] % f and not maps.shape[2] % f
        if not good or not ((maps >= 0) & (maps < n)).all():
            wanted = f"(B, H, W) int64 in 0..{n - 1} with sides divisible by {f}"
            raise ValueError(f"semantic must be {wanted}, got {tuple(maps.shape)} {maps.dtype}")


@dataclass(frozen=True, kw_only=True)
class SemanticConfig(ConditionerConfig):
    """A label for each pixel."""

    conditioner: ClassVar[type[Conditioner]] = SemanticConditioner
    kind: Literal["semantic"] = "semantic"
    labels: tuple[str, ...] = ()  # names in order; presets leave it to the data
    stages: int = 2  # halvings of the map, log2 of the first stage's f
    channels: int = 3  # that are concatenated with z_t


class HybridConditioner(Conditioner):
    """LDM's "hybrid": tokens and an image. Only the tokens are dropped and guided."""

    def __init__(self, config: "HybridConfig") -> None:
        super().__init__(config)
        self.tokens, self.concat = config.tokens.build(), config.concat.build()

    def tokens_of(self, batch: Batch) -> Tensor | None:
        return self.tokens.tokens_of(batch)

    def concat_of(self, batch: Batch, encode: Encode | None) -> Tensor | None:
        return self.concat.concat_of(batch, encode)

    def null_batch(self) -> Batch:
        return self.tokens.null_batch()

    def batch_from(self, y: Any, n: int) -> Batch:
        """A dict of the image's tensors, and of the tokens' condition under "y"."""
        keys = self.concat.keys
        if not isinstance(y, dict) or set(y) != {*keys, "y"}:
            raise ValueError(f"y must be a dict of {(*keys, 'y')}, got {y!r:.60}")
        batch = self.concat.batch_from({k: y[k] for k in keys}, n)
        return batch | self.tokens.batch_from(y["y"], len(batch[keys[0]]))


@dataclass(frozen=True, kw_only=True)
class HybridConfig(ConditionerConfig):
    """A condition with tokens, and one that is concatenated."""

    conditioner: ClassVar[type[Conditioner]] = HybridConditioner
    kind: Literal["hybrid"] = "hybrid"
    tokens: ConditionerConfig
    concat: ConditionerConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.d_cond or self.concat.d_cond or not self.concat_channels(1):
            kinds = f"tokens={self.tokens.kind!r}, concat={self.concat.kind!r}"
            raise ValueError(f"{kinds} must be a kind with tokens and one that is concatenated")

    @property
    def d_cond(self) -> int | None:
        """Width of the tokens."""
        return self.tokens.d_cond

    @property
    def p_uncond(self) -> float:
        """Share of the tokens that training drops."""
        return self.tokens.p_uncond

    @property
    def has_null(self) -> bool:
        """Whether the tokens have a null condition."""
        return self.tokens.has_null

    def concat_channels(self, z_channels: int) -> int:
        return self.concat.concat_channels(z_channels)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x (B, 3, H, W) in [-1, 1], black where mask (B, 1, H, W) is 0."""
    return torch.where(mask > 0.5, x, -torch.ones_like(x))
