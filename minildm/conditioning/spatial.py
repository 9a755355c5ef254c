"""Conditions concatenated with z_t: low resolution, inpainting, semantic maps; LDM Sec. 3.3."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minildm.conditioning.base import Conditioner, ConditionerConfig, Encode
from minildm.layers import Batch, warn_of_range


class SpatialConditioner(Conditioner):
    """Base: tensors in a batch -> (B, c', h, w), of the latent's size."""

    wanted: dict[str, tuple[tuple[int, ...], int, int]]  # key: channels, lowest, highest value
    multiple = 1  # which divides both sides

    def read(self, y: Any) -> Batch | None:
        """A dict of tensors, or the tensor if there is one key -> a checked batch."""
        batch = {next(iter(self.wanted)): y} if isinstance(y, Tensor) else {**y}
        fits = [set(batch) == set(self.wanted)]
        for key, (channels, lowest, highest) in self.wanted.items():
            x = batch[key]
            batch[key] = x = x[None] if x.ndim == len(channels) + 2 else x
            if lowest < 0:
                warn_of_range(x)
            fits += [x.shape[1:-2] == channels, lowest < 0 or (x == x.long()).all()]
            fits += [((x >= lowest - 1e-3) & (x <= highest + 1e-3)).all()]  # NaN is refused
        fits += [len({(len(x), *x.shape[-2:]) for x in batch.values()}) == 1]
        fits += [side % self.multiple == 0 for side in x.shape[-2:]]
        return batch if all(fits) else None


class LowResConditioner(SpatialConditioner):
    """`low_res` (B, 3, h, w) in [-1, 1], an image f times smaller, as it is; LDM Sec. 4.4."""

    wanted: ClassVar = {"low_res": ((3,), -1, 1)}

    def concat_of(self, batch: Batch, encode: Encode | None) -> Tensor:
        return self.here(batch["low_res"])


@dataclass(frozen=True, kw_only=True)
class LowResConfig(ConditionerConfig):
    """A smaller image."""

    conditioner = LowResConditioner
    allowed = "a dict of low_res (B, 3, h, w) in -1..1"
    channels = 3
    kind: Literal["low_res"] = "low_res"


class InpaintConditioner(SpatialConditioner):
    """`image` (B, 3, H, W), `mask` (B, 1, H, W), 1 = known -> (B, c + 1, h, w); LDM Sec. 4.5.

    As in the official code the hole is black in the encoded image, and the UNet's mask is 1 there
    and -1 elsewhere; `stable`: as in Stable Diffusion it is grey, and the mask, 1 and 0, is first.
    """

    wanted: ClassVar = {"image": ((3,), -1, 1), "mask": ((1,), 0, 1)}

    def concat_of(self, batch: Batch, encode: Encode | None) -> Tensor:
        mask, colour = self.here(batch["mask"]), 0.0 if self.config.stable else -1.0
        z = encode(torch.where(mask > 0.5, self.here(batch["image"]), colour), sample=False)
        mask = F.interpolate(mask.to(z), size=z.shape[-2:])  # nearest
        return torch.cat([1 - mask, z] if self.config.stable else [z, 1 - 2 * mask], dim=1)


@dataclass(frozen=True, kw_only=True)
class InpaintConfig(ConditionerConfig):
    """An image with a hole."""

    conditioner = InpaintConditioner
    allowed = "a dict of image (B, 3, H, W) in -1..1 and mask (B, 1, H, W) of 0 and 1, of one size"
    kind: Literal["inpaint"] = "inpaint"
    stable: bool = False  # as Stable Diffusion has it

    def concat_channels(self, z_channels: int) -> int:
        return z_channels + 1


class SemanticConditioner(SpatialConditioner):
    """`semantic` (B, H, W) int64 -> (B, channels, H/f, W/f): the official SpatialRescaler.

    One-hot, halved `stages` times (f = 2^stages), mixed by a 1x1 convolution; LDM Sec. 4.3.2.
    """

    def __init__(self, config: "SemanticConfig") -> None:
        super().__init__(config)
        self.wanted = {"semantic": ((), 0, len(config.labels) - 1)}
        self.multiple = 2**config.stages
        self.mapper = nn.Conv2d(len(config.labels), config.channels, 1, bias=False)

    def concat_of(self, batch: Batch, encode: Encode | None) -> Tensor:
        shares = F.one_hot(self.here(batch["semantic"]).long(), len(self.config.labels))
        shares = shares.movedim(-1, 1).to(self.mapper.weight.dtype)  # (B, label, H, W)
        return self.mapper(F.avg_pool2d(shares, self.multiple))  # equals bilinear halvings


@dataclass(frozen=True, kw_only=True)
class SemanticConfig(ConditionerConfig):
    """A label for each pixel."""

    conditioner = SemanticConditioner
    allowed = "a dict of semantic (B, H, W), sides multiples of 2^{0.stages}, numbers of {0.labels}"
    names: ClassVar = {"labels": "semantic_classes"}
    kind: Literal["semantic"] = "semantic"
    labels: tuple[str, ...] = ()  # names in order; presets leave it to the data
    stages: int = 2  # halvings of the map, log2 of the first stage's f
    channels: int = 3  # that are concatenated with z_t


class HybridConditioner(Conditioner):
    """LDM's "hybrid": tokens and an image; only the tokens are dropped and guided."""

    def __init__(self, config: "HybridConfig", tokens: Conditioner | None = None) -> None:
        super().__init__(config)
        self.tokens, self.concat = tokens or config.tokens.build(), config.concat.build()

    def tokens_of(self, batch: Batch) -> Tensor:
        return self.tokens.tokens_of(batch)

    def concat_of(self, batch: Batch, encode: Encode | None) -> Tensor:
        return self.concat.concat_of(batch, encode)

    def read(self, y: Any) -> Batch:
        """A dict of the image's tensors, and of the tokens' condition under "y"."""
        batch = self.concat.batch_from({key: x for key, x in y.items() if key != "y"}, 1)
        return batch | self.tokens.batch_from(y["y"], len(next(iter(batch.values()))))


@dataclass(frozen=True, kw_only=True)
class HybridConfig(ConditionerConfig):
    """A condition with tokens, and one that is concatenated."""

    conditioner = HybridConditioner
    allowed = "a dict with what {0.concat.kind!r} reads, and what {0.tokens.kind!r} reads as 'y'"
    d_cond = property(attrgetter("tokens.d_cond"), doc="Width of the tokens.")
    p_uncond = property(attrgetter("tokens.p_uncond"), doc="Share of tokens that training drops.")
    null_batch = property(attrgetter("tokens.null_batch"), doc="Of one null condition's tokens.")
    kind: Literal["hybrid"] = "hybrid"
    tokens: ConditionerConfig
    concat: ConditionerConfig

    def concat_channels(self, z_channels: int) -> int:
        return self.concat.concat_channels(z_channels)
