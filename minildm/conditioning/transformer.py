"""The unmasked transformer that reads captions, layouts and ids: tau_theta of LDM Sec. 3.3."""

import math

import torch
from torch import Tensor, nn

from minildm.layers import CrossAttention


def grid_waves(side: int, d: int) -> Tensor:
    """A vector for each position of a grid, row by row, similar for neighbours: (side^2, d).

    Cosines and sines along x, then along y, of d / 4 frequencies from half a wave over the grid
    to one wave over two positions; mean square 1.
    """
    waves = torch.logspace(0, math.log2(max(side - 1, 1)), (d + 3) // 4, base=2, device="cpu")
    position = torch.arange(side, device="cpu")[:, None] / max(side - 1, 1)  # in [0, 1]
    angles = math.pi * position * waves  # (side, ceil(d / 4))
    along = math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], dim=1)
    x, y = along.expand(side, side, -1), along[:, None].expand(side, side, -1)
    return torch.cat([x, y], dim=-1).flatten(0, 1)[:, :d]


class TokenTransformer(nn.Module):
    """Discrete tokens to vectors: (B, M) int64 -> (B, M, d), LDM appendix E.2.1.

    Token and position embeddings, `depth` pre-norm blocks and a last norm. Every token attends to
    every other one, padding included, as in the official code. heads * d_head may differ from d.
    """

    def __init__(
        self, vocab_size: int, length: int, d: int, *, depth: int, heads: int = 8, d_head: int = 64
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d)
        self.position = nn.Embedding(length, d)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(
            EncoderBlock(d, heads=heads, d_head=d_head) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(d)

    def forward(self, ids: Tensor) -> Tensor:
        hid = self.embedding(ids) + self.position.weight[: ids.shape[1]]  # (B, M, d)
        for block in self.blocks:
            hid = block(hid)
        return self.norm(hid)


class EncoderBlock(nn.Module):
    """Self-attention and a feed-forward of width 4 d with a GELU: (B, M, d) -> (B, M, d)."""

    def __init__(self, d: int, *, heads: int, d_head: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = CrossAttention(d, heads=heads, d_head=d_head)
        self.ff = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ff(self.norm2(x))
