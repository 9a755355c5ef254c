"""Building blocks of the autoencoder and the UNet as in the official code, and shared types.

Shapes: B batch, C channels, H W image, c h w latent, N = h * w pixels as tokens, M condition
tokens, d_* widths, head x d = heads times their width.
"""

import math
import operator
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Batch = dict[str, Any]  # image (B, 3, H, W) in [-1, 1], label (B,), caption [str] * B, ...
Noise = Callable[[Tensor], Tensor]  # like torch.randn_like: a tensor -> N(0, I) of its shape


def seed_of(seed: int, *parts: int) -> int:
    """Mix several integers into one 63-bit seed, by splitmix64's finaliser."""
    mask = 0xFFFFFFFFFFFFFFFF
    mixed, *parts = map(operator.index, (seed, *parts))  # NumPy's integers would overflow
    for part in parts:
        mixed = (mixed + 0x9E3779B97F4A7C15 * (part + 1)) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        mixed ^= mixed >> 31
    return mixed >> 1


class BatchRandom(NamedTuple):
    """Random numbers for a batch that `world` processes share: this process has the rank-th part.

    Each method draws for the n * world rows of the whole batch and returns n of them, so what
    image i gets does not depend on the number of processes. Without a generator torch's global
    one draws.
    """

    generator: torch.Generator | None = None
    rank: int = 0
    world: int = 1

    def rand(self, n: int, *shape: int, device: torch.device | None = None) -> Tensor:
        """Uniform in [0, 1): (n, *shape)."""
        return self._rows(torch.rand, (n, *shape), device)

    def randint(self, high: int, n: int) -> Tensor:
        """Integers in 0..high - 1: (n,) int64."""
        return self._rows(partial(torch.randint, high), (n,))

    def randn_like(self, x: Tensor) -> Tensor:
        """Standard normal of the shape, dtype and device of x; a `Noise`."""
        return self._rows(partial(torch.randn, dtype=x.dtype), x.shape, x.device)

    def _rows(self, draw: Any, shape: tuple[int, ...], device: Any = None) -> Tensor:
        n, place = shape[0], self.generator.device if self.generator else device
        whole = draw((n * self.world, *shape[1:]), generator=self.generator, device=place)
        return whole[n * self.rank : n * (self.rank + 1)].to(device or whole.device)


def check_fields(config: Any, low: float, high: float, *names: str) -> None:
    """Raise ValueError unless each named field, or each of its items, is None or in [low, high]."""
    for name in names:
        value = getattr(config, name)
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None and not low <= item <= high:
                raise ValueError(f"{name}={value} must lie in {low}..{high}")


def check_words(config: Any) -> None:
    """Raise ValueError unless each `Literal` field of a config holds one of its words."""
    for name, hint in get_type_hints(type(config)).items():
        value, options = getattr(config, name, None), (hint, *get_args(hint))  # of a union
        words = [word for h in options if get_origin(h) is Literal for word in get_args(h)]
        if words and value not in words and type(value) not in options:
            raise ValueError(f"{name}={value!r:.60} must be one of {', '.join(map(repr, words))}")


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is fast there: on a GPU that has it, on a CPU with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    has = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return has and device.type == "cpu"


def fast_layout(x: Tensor) -> Tensor:
    """x (B, C, h, w), as channels_last where it saves time: bfloat16 on a CPU, no gradients."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if x.device.type == "cpu" and dtype == torch.bfloat16 and not torch.is_grad_enabled():
        return x.contiguous(memory_format=torch.channels_last)
    return x


def warn_of_range(x: Tensor) -> None:
    """Warn if images (B, 3, H, W), which must lie in [-1, 1], look like images in [0, 1]."""
    if x.device.type == "cpu":  # elsewhere to read x would wait for the device
        low, high = x.aminmax()
        if 0 <= low < 0.1 and high > 0.5:  # light images in [-1, 1] do not end just above 0
            said = "images in [0, 1] where [-1, 1] is meant: 2 * x - 1 converts them"
            warnings.warn(said, stacklevel=3)


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of t at width // 2 frequencies from 1 down to about 1 / 10,000.

    (B,) -> (B, width); an odd width gets one column of zeros.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10_000.0) * exponent)  # (B, half)
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, width % 2))


def zero_init(module: nn.Module) -> nn.Module:
    """Set all parameters to zero: a residual block that ends so begins as its skip."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class GroupNorm(nn.GroupNorm):
    """torch's; its bfloat16 kernel for channels_last on a CPU takes three times float32's time."""

    def forward(self, x: Tensor) -> Tensor:
        slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.ndim == 4
        if slow and x.is_contiguous(memory_format=torch.channels_last):
            weight, bias = self.weight.float(), self.bias.float()
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).bfloat16()
        return super().forward(x)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, fused: the N x N weights are never stored.

    (B, head, N, d), (B, head, M, d), (B, head, M, d) -> (B, head, N, d)
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        # The backward pass of torch's kernel is up to ten times slower in bfloat16 on a CPU.
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        return out.bfloat16()
    return F.scaled_dot_product_attention(q, k, v)


class ResBlock(nn.Module):
    """Two 3x3 convolutions and a skip; a time embedding shifts (and scales) the second norm.

    `resize`, nn.Upsample or nn.AvgPool2d, doubles or halves both paths.
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
        resize: nn.Module | None = None,
        zero_out: bool = True,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resize = scale_shift, resize or nn.Identity()
        self.norm1 = GroupNorm(groups, c_in, eps=eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.to_emb = nn.Linear(d_emb, c_out * (2 if scale_shift else 1)) if d_emb else None
        self.norm2 = GroupNorm(groups, c_out, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        if zero_out:
            zero_init(self.conv2)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        hid = self.conv1(self.resize(F.silu(self.norm1(x))))  # (B, c_out, h, w)
        if self.to_emb is not None:
            emb = rearrange(self.to_emb(F.silu(emb)), "b c -> b c 1 1")
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)  # each (B, c_out, 1, 1)
            hid = self.norm2(hid) * (1 + scale) + shift
        else:
            hid = self.norm2(hid if emb is None else hid + emb)
        hid = self.conv2(self.dropout(F.silu(hid)))
        return self.skip(self.resize(x)) + hid


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


class Upsample(nn.Module):
    """Nearest neighbour, then a 3x3 convolution: (B, C, h, w) -> (B, C, 2h, 2w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class SelfAttention2d(nn.Module):
    """Every pixel attends to every pixel: (B, C, h, w) -> (B, C, h, w).

    q, k and v of a head are adjacent, the official "legacy" order.
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
        # The fused kernel, which never stores the N x N weights, requires d to be the fastest axis.
        qkv = rearrange(self.to_qkv(self.norm(x)), "b c h w -> b (h w) c").contiguous()
        q, k, v = rearrange(qkv, "b n (head qkv d) -> qkv b head n d", qkv=3, head=self.heads)
        out = attention(q, k, v)
        return x + self.to_out(rearrange(out, "b head (h w) d -> b (head d) h w", h=h, w=w))


class CrossAttention(nn.Module):
    """Q from the tokens, K and V from the condition (LDM Sec. 3.3), or from the tokens too.

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
    """Self-attention, cross-attention, feed-forward, each after its own norm and with a skip.

    (B, N, d), (B, M, d_cond) or None -> (B, N, d); without a condition both attend to the tokens.
    """

    def __init__(self, d: int, *, d_cond: int | None, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d) for _ in range(3))
        self.self_attn = CrossAttention(d, heads=heads, d_head=d // heads)
        self.cross_attn = CrossAttention(d, d_cond=d_cond, heads=heads, d_head=d // heads)
        # The identity stands for a dropout that is 0 in all official models.
        self.ff = nn.Sequential(GEGLU(d, 4 * d), nn.Identity(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor, cond: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), cond)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the pixels of a feature map, LDM appendix E.2.1.

    (B, C, h, w), (B, M, d_cond) -> (B, C, h, w)
    """

    def __init__(
        self, channels: int, *, d_cond: int | None, heads: int, depth: int, groups: int
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, d_cond=d_cond, heads=heads) for _ in range(depth)
        )
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, cond: Tensor | None) -> Tensor:
        h, w = x.shape[-2:]
        tokens = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")  # (B, N, C)
        for block in self.blocks:
            tokens = block(tokens, cond)
        return x + self.proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=h, w=w))
