"""The unmasked transformer that reads a caption or a layout: tau_theta of LDM Sec. 3.3."""

import math

import torch
from torch import Tensor, nn

from minildm.layers import CrossAttention


def place_waves(side: int, d: int) -> Tensor:
    """A vector for each place of a grid, row by row: (side^2, d), alike where places are near.

    Cosines and sines along x, then along y, of d / 4 frequencies from half a wave over the grid
    up to one over two places, so that also the nearest differ; of mean square 1.
    """
    waves = torch.logspace(0, math.log2(max(side - 1, 1)), (d + 3) // 4, base=2)
    angles = math.pi * torch.linspace(0, 1, side)[:, None] * waves  # (side, ceil(d / 4))
    along = math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], dim=1)
    x, y = along.expand(side, side, -1), along[:, None].expand(side, side, -1)
    return torch.cat([x, y], dim=-1).flatten(0, 1)[:, :d]


class TokenTransformer(nn.Module):
    """Discrete tokens to vectors: (B, M) int64 -> (B, M, d), LDM appendix E.2.1.

    Token and position embeddings, `depth` blocks of self-attention and a feed-forward, each
    after its own norm, and a last norm. Every token sees every other one, padding included, as
    in the official code. heads and d_head need not multiply to d.
    """

    def __init__(
        self, vocab_size: int, length: int, d: int, *, depth: int, heads: int = 8, d_head: int = 64
    ) -> None:
        super().__init__()
        self.length = length
        self.embedding = nn.Embedding(vocab_size, d)
        self.position = nn.Embedding(length, d)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(
            EncoderBlock(d, heads=heads, d_head=d_head) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(d)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.ndim != 2 or not 0 < ids.shape[1] <= self.length:
            raise ValueError(f"ids must be (B, M <= {self.length}), got {tuple(ids.shape)}")
        places = torch.arange(ids.shape[1], device=ids.device)
        hid = self.embedding(ids) + self.position(places)  # (B, M, d)
        for block in self.blocks:
            hid = block(hid)
        return self.norm(hid)


class EncoderBlock(nn.Module):
    """Self-attention and a feed-forward of width 4 d with a plain GELU: (B, M, d) -> the same."""

    def __init__(self, d: int, *, heads: int, d_head: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = CrossAttention(d, heads=heads, d_head=d_head)
        self.ff = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ff(self.norm2(x))
