"""eps_theta(z_t, t, tau_theta(y)): the time-conditional UNet of LDM Sec. 3.2 and 3.3."""

from dataclasses import dataclass

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
    timestep_embedding,
    zero_init,
)

WIDTHS = ("in_channels", "out_channels", "channels", "groups", "d_cond", "heads", "d_head")


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
    groups: int = 32
    dropout: float = 0.0
    scale_shift: bool = False  # the time embedding also scales
    resblock_updown: bool = False  # residual blocks change the size, not convolutions
    checkpoint: bool = False  # recompute activations in the backward pass: less memory, slower

    def __post_init__(self) -> None:
        for name in (*WIDTHS, "num_res_blocks", "depth"):
            value, most = getattr(self, name), 10_000 if name in WIDTHS else 100
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name}={value} must lie in 1..{most}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        levels = len(self.channel_mult)
        widths = [self.channels * m for m in (*self.channel_mult, 1)]
        if not 1 <= levels <= 10 or any(c % self.groups or not 1 <= c <= 10_000 for c in widths):
            raise ValueError(
                f"channels={self.channels}, and times each of channel_mult={self.channel_mult} (1 "
                f"to 10 levels), must be multiples of groups={self.groups}, at most 10000"
            )
        if not set(self.attn_levels) <= set(range(levels)):
            raise ValueError(f"attn_levels={self.attn_levels} must lie in 0..{levels - 1}")
        bad = [i for i in (*self.attn_levels, -2) if widths[i] % (self.heads or self.d_head or 1)]
        if (self.heads is None) == (self.d_head is None) or bad:
            raise ValueError(
                f"heads={self.heads}, d_head={self.d_head}: one of them must be given, and divide "
                f"the channels of each level with attention and of the last one"
            )

    def heads_of(self, channels: int) -> int:
        """Attention heads for that many channels."""
        return self.heads or channels // self.d_head


Size = tuple[int, int] | None  # (h, w) after a stage that enlarges, if not the double


class Stage(nn.Sequential):
    """Blocks in order; each is given its own inputs: the embedding, the tokens, the size."""

    def forward(self, x: Tensor, emb: Tensor, tokens: Tensor | None, size: Size = None) -> Tensor:
        for block in self:
            if isinstance(block, ResBlock):
                x = block(x, emb, size)
            elif isinstance(block, SpatialTransformer):
                x = block(x, tokens)
            elif isinstance(block, Upsample):
                x = block(x, size)
            else:
                x = block(x)
        return x


class UNet(nn.Module):
    """(B, c_in, h, w), (B,) int64, (B, M, d_cond) or None -> (B, c_out, h, w).

    The way down keeps every stage's output; the way up takes them back in reverse order. Any h
    and w: where halving rounds, the way up returns to the size that the way down had.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels, d_emb = config.channels, 4 * config.channels
        widths = [channels * m for m in config.channel_mult]
        self.time_mlp = nn.Sequential(
            nn.Linear(channels, d_emb), nn.SiLU(), nn.Linear(d_emb, d_emb)
        )

        self.down = nn.ModuleList([Stage(nn.Conv2d(config.in_channels, channels, 3, padding=1))])
        skips = [channels]
        for i, c_out in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.down.append(self._stage(channels, c_out, i in config.attn_levels))
                channels = c_out
                skips.append(channels)
            if i < len(widths) - 1:
                self.down.append(Stage(self._resample(channels, "down")))
                skips.append(channels)

        self.middle = Stage(
            self._res(channels, channels), self._attention(channels), self._res(channels, channels)
        )

        self.up = nn.ModuleList()
        for i, c_out in reversed(list(enumerate(widths))):
            for j in range(config.num_res_blocks + 1):
                stage = self._stage(channels + skips.pop(), c_out, i in config.attn_levels)
                channels = c_out
                if i > 0 and j == config.num_res_blocks:
                    stage.append(self._resample(channels, "up"))
                self.up.append(stage)

        self.norm_out = GroupNorm(config.groups, channels, eps=1e-5)
        self.conv_out = zero_init(nn.Conv2d(channels, config.out_channels, 3, padding=1))

    def _res(self, c_in: int, c_out: int, resample: str = "none") -> ResBlock:
        config = self.config
        return ResBlock(
            c_in,
            c_out,
            d_emb=4 * config.channels,
            groups=config.groups,
            dropout=config.dropout,
            scale_shift=config.scale_shift,
            resample=resample,
        )

    def _attention(self, channels: int) -> nn.Module:
        config, heads = self.config, self.config.heads_of(channels)
        shared = {"heads": heads, "groups": config.groups}
        if config.d_cond is None:
            return SelfAttention2d(channels, eps=1e-5, zero_out=True, **shared)
        d_head, d_cond = channels // heads, config.d_cond
        return SpatialTransformer(
            channels, d_cond=d_cond, d_head=d_head, depth=config.depth, **shared
        )

    def _stage(self, c_in: int, c_out: int, attend: bool) -> Stage:
        res = self._res(c_in, c_out)
        return Stage(res, self._attention(c_out)) if attend else Stage(res)

    def _resample(self, channels: int, direction: str) -> nn.Module:
        if self.config.resblock_updown:
            return self._res(channels, channels, direction)
        return Upsample(channels) if direction == "up" else Downsample(channels, pad_all_sides=True)

    def forward(self, z_t: Tensor, t: Tensor, tokens: Tensor | None = None) -> Tensor:
        """See the class. Raises ValueError for tokens without d_cond, or d_cond without tokens."""
        if (tokens is None) != (self.config.d_cond is None):
            got = None if tokens is None else tuple(tokens.shape)
            raise ValueError(f"tokens={got} does not fit the UNet's d_cond={self.config.d_cond}")
        emb = timestep_embedding(t, self.config.channels).to(self.time_mlp[0].weight.dtype)
        emb = self.time_mlp(emb)  # (B, 4 channels)
        hid, skips = z_t, []
        for stage in self.down:
            hid = self._run(stage, hid, emb, tokens)
            skips.append(hid)
        hid = self._run(self.middle, hid, emb, tokens)
        for stage in self.up:
            hid = torch.cat([hid, skips.pop()], dim=1)
            hid = self._run(stage, hid, emb, tokens, tuple(skips[-1].shape[2:]) if skips else None)
        return self.conv_out(F.silu(self.norm_out(hid)))

    def _run(
        self, stage: Stage, hid: Tensor, emb: Tensor, tokens: Tensor | None, size: Size = None
    ) -> Tensor:
        if self.config.checkpoint and self.training:
            return checkpoint(stage, hid, emb, tokens, size, use_reentrant=False)
        return stage(hid, emb, tokens, size)
