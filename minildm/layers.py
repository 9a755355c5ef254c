"""Building blocks of the autoencoder and the UNet, as in the official code.

Shapes: B batch, C channels, H W image, c h w latent, N = h * w pixels as tokens, M condition
tokens, d_* widths, head x d = heads times their width.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minildm import draws


def timestep_embedding(t: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines, then sines, of t at width // 2 frequencies from 1 down to 1 / max_period.

    (B,) -> (B, width); an odd width gets one column of zeros.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponent)  # (B, half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


def zero_init(module: nn.Module) -> nn.Module:
    """Zero all parameters: a residual branch that ends so is its skip path until trained."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm(nn.GroupNorm):
    """torch's; its bfloat16 kernel for channels_last on a CPU takes three times float32's time."""

    def forward(self, x: Tensor) -> Tensor:
        last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and last:
            weight, bias = self.weight.float(), self.bias.float()
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).bfloat16()
        return super().forward(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, fused, so never holding all N x N weights.

    (B, head, N, d), (B, head, M, d), (B, head, M, d) -> (B, head, N, d)
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        # Backward, torch's kernel is up to ten times slower in bfloat16 than in float32 there.
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        return out.bfloat16()
    return F.scaled_dot_product_attention(q, k, v)


class ResBlock(nn.Module):
    """Two 3x3 convolutions beside a skip; a time embedding shifts (and scales) the second norm.

    `resample` "up" or "down" doubles or halves both paths, without a convolution; `size` is what
    "up" gives, if not the double.
    (B, c_in, h, w), (B, d_emb) or None -> (B, c_out, h, w)
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        *,
        d_emb: int | None = None,
        groups: int = 32,
        eps: float = 1e-5,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: str = "none",
        zero_out: bool = True,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = GroupNorm(groups, c_in, eps=eps)
        self.resample = {"up": Upsample, "down": AvgDown}.get(resample, nn.Identity)()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.to_emb = nn.Linear(d_emb, c_out * (2 if scale_shift else 1)) if d_emb else None
        self.norm2 = GroupNorm(groups, c_out, eps=eps)
        self.dropout = draws.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        if zero_out:
            zero_init(self.conv2)

    def forward(
        self, x: Tensor, emb: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        hid = self.conv1(self._resampled(F.silu(self.norm1(x)), size))  # (B, c_out, h, w)
        scale = None
        if self.to_emb is not None:
            emb = rearrange(self.to_emb(F.silu(emb)), "b c -> b c 1 1")
            if self.scale_shift:
                scale, shift = emb.chunk(2, dim=1)  # each (B, c_out, 1, 1)
            else:
                hid = hid + emb
        hid = self.norm2(hid)
        if scale is not None:
            hid = hid * (1 + scale) + shift
        hid = self.conv2(self.dropout(F.silu(hid)))
        return self.skip(self._resampled(x, size)) + hid

    def _resampled(self, x: Tensor, size: tuple[int, int] | None) -> Tensor:
        return self.resample(x, size) if isinstance(self.resample, Upsample) else self.resample(x)


class Downsample(nn.Module):
    """Stride-2 convolution: (B, C, h, w) -> (B, C, h/2, w/2).

    The official autoencoder pads right and bottom only, its UNet on all sides.
    """

    def __init__(self, channels: int, *, pad_all_sides: bool) -> None:
        super().__init__()
        self.pad = (1, 1, 1, 1) if pad_all_sides else (0, 1, 0, 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, self.pad))


class AvgDown(nn.Module):
    """2x2 mean: (B, C, h, w) -> (B, C, h/2, w/2)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Nearest neighbour, then a 3x3 convolution if `channels` is given: h, w -> 2h, 2w, or size."""

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if channels else nn.Identity()

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        size = size or (2 * x.shape[-2], 2 * x.shape[-1])
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class SelfAttention2d(nn.Module):
    """Every pixel attends to every other one: (B, C, h, w) -> (B, C, h, w).

    q, k and v lie beside each other for each head, the official "legacy" order.
    """

    def __init__(
        self, channels: int, *, heads: int, groups: int, eps: float, zero_out: bool
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(groups, channels, eps=eps)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)
        if zero_out:
            zero_init(self.to_out)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        # Fused attention, which never holds all N x N weights, wants d to be the fastest axis.
        qkv = rearrange(self.to_qkv(self.norm(x)), "b c h w -> b (h w) c").contiguous()
        q, k, v = rearrange(qkv, "b n (head qkv d) -> qkv b head n d", qkv=3, head=self.heads)
        out = attention(q, k, v)
        return x + self.to_out(rearrange(out, "b head (h w) d -> b (head d) h w", h=h, w=w))


class CrossAttention(nn.Module):
    """Q from the tokens, K and V from the condition (LDM Sec. 3.3), or from the tokens again.

    (B, N, d_in), (B, M, d_cond) or None -> (B, N, d_in)
    """

    def __init__(self, d_in: int, *, d_cond: int | None = None, heads: int, d_head: int) -> None:
        super().__init__()
        self.heads, d_all = heads, heads * d_head
        self.to_q = nn.Linear(d_in, d_all, bias=False)
        self.to_k = nn.Linear(d_cond or d_in, d_all, bias=False)
        self.to_v = nn.Linear(d_cond or d_in, d_all, bias=False)
        self.to_out = nn.Linear(d_all, d_in)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        cond = x if cond is None else cond
        q, k, v = (
            rearrange(y, "b n (head d) -> b head n d", head=self.heads)
            for y in (self.to_q(x), self.to_k(cond), self.to_v(cond))
        )
        out = attention(q, k, v)  # (B, head, N, d)
        return self.to_out(rearrange(out, "b head n d -> b n (head d)"))


class GEGLU(nn.Module):
    """x * gelu(gate), both linear in the input (Shazeer 2020): (..., d_in) -> (..., d_out)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_in, 2 * d_out)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each after its own norm, beside a skip.

    (B, N, d), (B, M, d_cond) or None -> (B, N, d); without a condition both attend to the tokens.
    """

    def __init__(
        self, d: int, *, d_cond: int | None, heads: int, d_head: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d) for _ in range(3))
        self.self_attn = CrossAttention(d, heads=heads, d_head=d_head)
        self.cross_attn = CrossAttention(d, d_cond=d_cond, heads=heads, d_head=d_head)
        self.ff = nn.Sequential(GEGLU(d, 4 * d), draws.Dropout(dropout), nn.Linear(4 * d, d))

    def forward(self, x: Tensor, cond: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), cond)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the pixels of a feature map, LDM appendix E.2.1.

    (B, C, h, w), (B, M, d_cond) -> (B, C, h, w)
    """

    def __init__(
        self,
        channels: int,
        *,
        d_cond: int | None,
        heads: int,
        d_head: int,
        depth: int = 1,
        groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        d = heads * d_head
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, d, 1)
        self.blocks = nn.ModuleList(
            TransformerBlock(d, d_cond=d_cond, heads=heads, d_head=d_head, dropout=dropout)
            for _ in range(depth)
        )
        self.proj_out = zero_init(nn.Conv2d(d, channels, 1))

    def forward(self, x: Tensor, cond: Tensor | None) -> Tensor:
        h, w = x.shape[-2:]
        tokens = rearrange(self.proj_in(self.norm(x)), "b d h w -> b (h w) d")  # (B, N, d)
        for block in self.blocks:
            tokens = block(tokens, cond)
        return x + self.proj_out(rearrange(tokens, "b (h w) d -> b d h w", h=h, w=w))
