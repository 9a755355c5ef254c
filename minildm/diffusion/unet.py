"""eps_theta(z_t, t, tau_theta(y)): the time-conditional UNet of LDM Sec. 3.2 and 3.3."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minildm.layers import (
    Downsample,
    GroupNorm,
    ResBlock,
    SelfAttention2d,
    SpatialTransformer,
    Upsample,
    check_fields,
    fast_layout,
    timestep_embedding,
    zero_init,
)


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of eps_theta. Level i: size h / 2**i, channels * channel_mult[i] wide."""

    in_channels: int = 4  # of z_t, and of a condition that is concatenated to it
    out_channels: int = 4
    channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2  # per level on the way down; one more on the way up
    attn_levels: tuple[int, ...] = (1, 2)  # indices into channel_mult
    heads: int | None = None  # attention heads: their number, or
    d_head: int | None = 32  # their width; exactly one of the two
    d_cond: int | None = None  # width of tau_theta(y); None: self-attention alone
    depth: int = 1  # transformer blocks per spatial transformer
    groups: int = 32  # of each norm; must divide the channels of each level
    dropout: float = 0.0
    scale_shift: bool = False  # the time embedding also scales
    resblock_updown: bool = False  # residual blocks change the size, not convolutions
    checkpoint: bool = False  # recompute activations in the backward pass: less memory, slower

    def __post_init__(self) -> None:
        check_fields(self, 1, 10_000, "in_channels", "out_channels", "channels", "groups")
        check_fields(self, 1, 10_000, "heads", "d_head", "d_cond")
        check_fields(self, 1, 100, "num_res_blocks", "depth", "channel_mult")
        check_fields(self, 0, 0.999, "dropout")
        if not 1 <= len(self.channel_mult) <= 10:
            raise ValueError(f"channel_mult={self.channel_mult} must hold 1 to 10 factors")
        check_fields(self, 0, len(self.channel_mult) - 1, "attn_levels")
        attending = [self.channels * self.channel_mult[i] for i in (*self.attn_levels, -1)]
        bad = [c for c in attending if c % (self.heads or self.d_head or 1)]
        if (self.heads is None) == (self.d_head is None) or bad:
            raise ValueError(
                f"heads={self.heads}, d_head={self.d_head}: one of them must be given, and divide "
                f"the channels of each level with attention and of the last one"
            )


class Stage(nn.Sequential):
    """Blocks in order, each with its own inputs."""

    def forward(self, x: Tensor, emb: Tensor, tokens: Tensor | None) -> Tensor:
        inputs = {ResBlock: (emb,), SpatialTransformer: (tokens,)}
        for block in self:
            x = block(x, *inputs.get(type(block), ()))
        return x


def _attention(config: UNetConfig, channels: int) -> SelfAttention2d | SpatialTransformer:
    """Attention among the pixels, and with d_cond also to the tokens."""
    shape = {"heads": config.heads or channels // config.d_head, "groups": config.groups}
    if config.d_cond is None:
        return SelfAttention2d(channels, eps=1e-5, zero_out=True, **shape)
    return SpatialTransformer(channels, d_cond=config.d_cond, depth=config.depth, **shape)


class UNet(nn.Module):
    """(B, c_in, h, w), (B,) int64, (B, M, d_cond) or None -> (B, c_out, h, w).

    The way down keeps every stage's output; the way up takes them back in reverse order. h and w
    must be multiples of 2**(levels - 1).
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, d_emb = config.channels, 4 * config.channels
        widths = [channels * m for m in config.channel_mult]
        self.time_mlp = nn.Sequential(
            nn.Linear(channels, d_emb), nn.SiLU(), nn.Linear(d_emb, d_emb)
        )
        options = {name: getattr(config, name) for name in ("groups", "dropout", "scale_shift")}
        res, attend = partial(ResBlock, d_emb=d_emb, **options), partial(_attention, config)
        down, up = partial(Downsample, pad_all_sides=True), Upsample
        if config.resblock_updown:
            sizes = nn.AvgPool2d(2), nn.Upsample(scale_factor=2)
            down, up = (lambda c, how=how: res(c, c, resize=how) for how in sizes)

        def stage(c_in: int, c_out: int, level: int) -> Stage:
            block = res(c_in, c_out)
            return Stage(block, attend(c_out)) if level in config.attn_levels else Stage(block)

        self.down = nn.ModuleList([Stage(nn.Conv2d(config.in_channels, channels, 3, padding=1))])
        skips = [channels]
        for i, c_out in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.down.append(stage(channels, c_out, i))
                channels = c_out
                skips.append(channels)
            if i < len(widths) - 1:
                self.down.append(Stage(down(channels)))
                skips.append(channels)

        self.middle = Stage(res(channels, channels), attend(channels), res(channels, channels))

        self.up = nn.ModuleList()
        for i, c_out in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                self.up.append(stage(channels + skips.pop(), c_out, i))
                channels = c_out
            if i > 0:
                self.up[-1].append(up(channels))

        self.norm_out = GroupNorm(config.groups, channels, eps=1e-5)
        self.conv_out = zero_init(nn.Conv2d(channels, config.out_channels, 3, padding=1))

    def forward(self, z_t: Tensor, t: Tensor, tokens: Tensor | None = None) -> Tensor:
        emb = timestep_embedding(t, self.config.channels).to(self.time_mlp[0].weight.dtype)
        emb = self.time_mlp(emb)  # (B, 4 channels)
        hid, skips = fast_layout(z_t), []
        for stage in self.down:
            hid = self._run(stage, hid, emb, tokens)
            skips.append(hid)
        hid = self._run(self.middle, hid, emb, tokens)
        for stage in self.up:
            hid = self._run(stage, torch.cat([hid, skips.pop()], dim=1), emb, tokens)
        return self.conv_out(F.silu(self.norm_out(hid)))

    def _run(self, stage: Stage, *inputs: Any) -> Tensor:
        if self.config.checkpoint and self.training:
            return checkpoint(stage, *inputs, use_reentrant=False)
        return stage(*inputs)
