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


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of eps_theta. Level i works at latent size h / 2**i, width * width_mult[i] channels."""

    in_channels: int = 4  # of z_t, and of a condition that is concatenated to it
    out_channels: int = 4
    width: int = 64
    width_mult: tuple[int, ...] = (1, 2, 4)
    res_blocks: int = 2  # per level on the way down; one more on the way up
    attn_levels: tuple[int, ...] = (1, 2)  # indices into width_mult
    heads: int | None = None  # attention heads: their number, or
    d_head: int | None = 32  # their width; exactly one of the two
    d_cond: int | None = None  # width of tau_theta(y); None: self-attention alone
    depth: int = 1  # transformer blocks per spatial transformer
    groups: int = 32
    dropout: float = 0.0
    scale_shift: bool = False  # the time embedding scales, too
    resblock_updown: bool = False  # residual blocks change the size, not convolutions
    checkpoint: bool = False  # recompute activations in the backward pass: less memory, slower

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "width", "res_blocks", "depth", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must lie in [0, 1)")
        bad = [m for m in (1, *self.width_mult) if self.width * m % self.groups]
        if min(self.width_mult, default=0) < 1 or bad:
            raise ValueError(
                f"width={self.width} and that times width_mult={self.width_mult} must be "
                f"multiples of groups={self.groups}"
            )
        if not set(self.attn_levels) <= set(range(len(self.width_mult))):
            raise ValueError(f"attn_levels={self.attn_levels} outside width_mult={self.width_mult}")
        if (self.heads is None) == (self.d_head is None) or (self.heads or self.d_head or 0) < 1:
            raise ValueError(f"give heads or d_head, got heads={self.heads}, d_head={self.d_head}")
        for m in {self.width_mult[i] for i in self.attn_levels} | {self.width_mult[-1]}:
            if self.width * m % (self.heads or self.d_head):
                raise ValueError(
                    f"{self.width * m} channels do not split into heads={self.heads}, "
                    f"d_head={self.d_head}"
                )

    def heads_of(self, channels: int) -> int:
        """Attention heads for that many channels."""
        return self.heads or channels // self.d_head


Size = tuple[int, int] | None  # (h, w) after a stage that enlarges, if not the double


class Stage(nn.Sequential):
    """Blocks run in order, each given what it asks for: the embedding, the tokens, the size."""

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
        width, d_emb = config.width, 4 * config.width
        widths = [width * m for m in config.width_mult]
        self.time_mlp = nn.Sequential(nn.Linear(width, d_emb), nn.SiLU(), nn.Linear(d_emb, d_emb))

        self.down = nn.ModuleList([Stage(nn.Conv2d(config.in_channels, width, 3, padding=1))])
        skips, channels = [width], width
        for i, c_out in enumerate(widths):
            for _ in range(config.res_blocks):
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
            for j in range(config.res_blocks + 1):
                stage = self._stage(channels + skips.pop(), c_out, i in config.attn_levels)
                channels = c_out
                if i > 0 and j == config.res_blocks:
                    stage.append(self._resample(channels, "up"))
                self.up.append(stage)

        self.norm_out = GroupNorm(config.groups, channels, eps=1e-5)
        self.conv_out = zero_init(nn.Conv2d(channels, config.out_channels, 3, padding=1))

    def _res(self, c_in: int, c_out: int, resample: str = "none") -> ResBlock:
        config = self.config
        return ResBlock(
            c_in,
            c_out,
            d_emb=4 * config.width,
            groups=config.groups,
            dropout=config.dropout,
            scale_shift=config.scale_shift,
            resample=resample,
        )

    def _attention(self, channels: int) -> nn.Module:
        config, heads = self.config, self.config.heads_of(channels)
        if config.d_cond is None:
            return SelfAttention2d(
                channels, heads=heads, groups=config.groups, eps=1e-5, zero_out=True
            )
        return SpatialTransformer(
            channels,
            d_cond=config.d_cond,
            heads=heads,
            d_head=channels // heads,
            depth=config.depth,
            groups=config.groups,
        )

    def _stage(self, c_in: int, c_out: int, attend: bool) -> Stage:
        res = self._res(c_in, c_out)
        return Stage(res, self._attention(c_out)) if attend else Stage(res)

    def _resample(self, channels: int, direction: str) -> nn.Module:
        if self.config.resblock_updown:
            return self._res(channels, channels, direction)
        return Upsample(channels) if direction == "up" else Downsample(channels, pad_all_sides=True)

    def _check(self, z_t: Tensor, t: Tensor, tokens: Tensor | None) -> None:
        config, factor = self.config, 2 ** (len(self.config.width_mult) - 1)
        if z_t.ndim != 4 or z_t.shape[1] != config.in_channels:
            raise ValueError(f"z_t must be (B, {config.in_channels}, h, w), got {tuple(z_t.shape)}")
        least = factor if config.resblock_updown else 1  # a mean over 2 x 2 leaves nothing of 1
        if min(z_t.shape[2:]) < least:
            raise ValueError(
                f"z_t is {z_t.shape[2]} x {z_t.shape[3]}; {len(config.width_mult)} levels need "
                f"at least {least} x {least}"
            )
        if t.shape != z_t.shape[:1]:
            raise ValueError(f"t must be ({len(z_t)},), one time a sample, got {tuple(t.shape)}")
        if (tokens is None) != (config.d_cond is None):
            need = "none" if config.d_cond is None else f"(B, M, {config.d_cond})"
            got = None if tokens is None else tuple(tokens.shape)
            raise ValueError(f"this UNet takes tokens {need}, got {got}")
        if tokens is not None and (
            tokens.ndim != 3 or (len(tokens), tokens.shape[2]) != (len(z_t), config.d_cond)
        ):
            raise ValueError(
                f"tokens must be ({len(z_t)}, M, {config.d_cond}), got {tuple(tokens.shape)}"
            )

    def forward(self, z_t: Tensor, t: Tensor, tokens: Tensor | None = None) -> Tensor:
        """See the class. Raises ValueError for shapes that do not fit the config."""
        self._check(z_t, t, tokens)
        emb = timestep_embedding(t, self.config.width).to(self.time_mlp[0].weight.dtype)
        emb = self.time_mlp(emb)  # (B, 4 width)
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
