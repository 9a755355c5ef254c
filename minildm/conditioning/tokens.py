"""Conditions as tokens for the cross-attention: classes, ids, layouts; LDM Sec. 3.3."""

import math
import operator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minildm.conditioning.base import Conditioner, ConditionerConfig, look_up
from minildm.layers import Batch, CrossAttention


class ClassConditioner(Conditioner):
    """A row of a learned table for each class: `label` (B,) int64 -> (B, 1, d_cond)."""

    def __init__(self, config: "ClassConfig") -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(len(config.classes) + config.null_class, config.d_cond)

    def tokens_of(self, batch: Batch) -> Tensor:
        return self.embedding(self.here(batch["label"]))[:, None]

    def read(self, y: Any) -> Batch:
        names = self.config.classes
        y = y.tolist() if hasattr(y, "tolist") else y  # of torch or NumPy
        y = [y] if isinstance(y, str | int) else y
        y = [v if isinstance(v, str) else operator.index(v) for v in y]  # TypeError for floats
        labels = [v if v in range(len(names)) else look_up(v, names, "class") for v in y]
        return {"label": torch.tensor(labels, dtype=torch.int64)}


@dataclass(frozen=True, kw_only=True)
class ClassConfig(ConditionerConfig):
    """One learnable token per class."""

    conditioner = ClassConditioner
    allowed = "class names or labels; known: {0.classes}"
    names: ClassVar = {"classes": "classes"}
    kind: Literal["class"] = "class"
    classes: tuple[str, ...] = ()  # names in the order of the labels; presets leave it to the data
    d_cond: int = 512
    p_uncond: float = 0.1
    null_class: bool = True  # one more token after the last class, for "no class"

    @property
    def null_batch(self) -> Batch:
        """The label of "no class", if there is one."""
        return {"label": torch.tensor([len(self.classes)])} if self.null_class else {}


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


class TokenTransformer(nn.Module):
    """Discrete tokens to vectors: (B, M) int64 -> (B, M, d_cond), LDM appendix E.2.1.

    Every token attends to every other one, padding included, as in the official code.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        d, size = config.d_cond, {"heads": config.heads, "d_head": config.d_head}
        self.embedding = nn.Embedding(config.vocab_size, d)
        self.position = nn.Embedding(config.length, d)
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(EncoderBlock(d, **size) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(d)

    def forward(self, ids: Tensor) -> Tensor:
        hid = self.embedding(ids) + self.position.weight[: ids.shape[1]]  # (B, M, d)
        return self.norm(self.blocks(hid))


class IdsConditioner(Conditioner):
    """`ids` (B, M) int64 -> transformer -> (B, M, d_cond): the official TransformerEmbedder."""

    def __init__(self, config: "IdsConfig") -> None:
        super().__init__(config)
        self.network = TokenTransformer(config)

    def ids(self, batch: Batch) -> Tensor:
        """The ids of a batch's conditions (B, M) int64; subclasses turn others into ids."""
        return batch["ids"]

    def tokens_of(self, batch: Batch) -> Tensor:
        return self.network(self.here(self.ids(batch)))

    def read(self, y: Any) -> Batch | None:
        ids = torch.as_tensor(y)
        ids = ids[None] if ids.ndim == 1 else ids
        known = (ids >= 0) & (ids < self.config.vocab_size)
        return {"ids": ids} if ids.shape[1:] == (self.config.length,) and known.all() else None


@dataclass(frozen=True, kw_only=True)
class IdsConfig(ConditionerConfig):
    """Sequences of token ids."""

    conditioner = IdsConditioner
    allowed = "ids (B, {0.length}), integers from 0, below {0.vocab_size}"
    kind: Literal["ids"] = "ids"
    vocab_size: int = 0
    length: int = 24
    d_cond: int = 512
    p_uncond: float = 0.0
    depth: int = 2
    heads: int = 8  # the official code has 8 heads of 64, whatever d_cond is
    d_head: int = 64


class LayoutConditioner(IdsConditioner):
    """A box is three tokens (top-left, bottom-right, class), Sec. 4.3.1: (B, 3 max_boxes, d_cond).

    Corners are rounded to a grid, so that each has a number, as words have. A missing box is
    three tokens "nothing"; the null condition consists of these alone.
    """

    def __init__(self, config: "LayoutConfig") -> None:
        super().__init__(config)
        self.nothing = config.vocab_size - 1
        # Neighbouring corners start alike, since a single one is rare in the data; all tokens have
        # standard deviation 1, since at 0.02 training takes long to tell a box's three apart.
        tokens = nn.init.normal_(self.network.embedding.weight)
        nn.init.normal_(self.network.position.weight)
        tokens.data[: config.grid**2] = grid_waves(config.grid, config.d_cond)

    def ids(self, batch: Batch) -> Tensor:
        """`boxes` (B, K, 4) xyxy in [0, 1], `classes` (B, K), -1 pads -> (B, 3 max_boxes)."""
        boxes, classes, grid = batch["boxes"], batch["classes"], self.config.grid
        corners = (boxes.clamp(0, 1) * (grid - 1)).round().long()  # (B, K, 4)
        numbers = corners[..., 1::2] * grid + corners[..., 0::2]  # (B, K, 2)
        ids = torch.cat([numbers, grid**2 + classes[..., None]], dim=-1)
        ids = torch.where(classes[..., None] < 0, self.nothing, ids)
        missing = max(self.config.max_boxes - classes.shape[1], 0)
        ids = nn.functional.pad(ids, (0, 0, 0, missing), value=self.nothing)
        return rearrange(ids, "b k three -> b (k three)")

    def read(self, y: Any) -> Batch | None:
        """Lists of (class name, (left, top, right, bottom)), or a batch -> `boxes`, `classes`."""
        if isinstance(y, dict):
            return {"boxes": y["boxes"], "classes": y["classes"]}
        tables = []
        for layout in [y] if y and y[0] and isinstance(y[0][0], str) else y:
            rows = [[*box[1], look_up(box[0], self.config.classes, "class")] for box in layout]
            tables.append(torch.tensor(rows, dtype=torch.float32).view(len(rows), 5))
        low, high, _ = torch.cat(tables).split([2, 2, 1], dim=1)  # of all boxes
        table = pad_sequence(tables, batch_first=True, padding_value=-1)  # (B, K, 5)
        fits = ((low >= 0) & (low < high) & (high <= 1)).all()
        fits = fits and table.shape[1] <= self.config.max_boxes
        return {"boxes": table[..., :4], "classes": table[..., 4].long()} if fits else None


@dataclass(frozen=True, kw_only=True)
class LayoutConfig(IdsConfig):
    """Boxes with classes."""

    conditioner = LayoutConditioner
    allowed = (
        "layouts of at most {0.max_boxes} (class, (left, top, right, bottom)) with left < right "
        "and top < bottom in [0, 1]; classes: {0.classes}"
    )
    null_batch: ClassVar = {"boxes": torch.zeros(1, 0, 4), "classes": torch.zeros(1, 0).long()}
    names: ClassVar = {"classes": "objects"}
    # Corners, classes and "nothing"; three tokens a box: of IdsConfig's fields these two are none
    vocab_size: ClassVar[int] = property(lambda c: c.grid**2 + len(c.classes) + 1)
    length: ClassVar[int] = property(lambda c: 3 * c.max_boxes)
    kind: Literal["layout"] = "layout"
    classes: tuple[str, ...] = ()  # names in order; presets leave it to the data
    max_boxes: int = 4
    grid: int = 32  # corners are rounded to grid x grid positions
    p_uncond: float = 0.1


def grid_waves(side: int, d: int) -> Tensor:
    """A vector for each position of a grid, row by row, similar for neighbours: (side^2, d).

    Cosines and sines along x, then along y, of d / 4 frequencies from half a wave over the grid
    to one wave over two positions; mean square 1.
    """
    waves = torch.logspace(0, math.log2(max(side - 1, 1)), (d + 3) // 4, base=2, device="cpu")
    position = torch.arange(side, device="cpu")[:, None] / max(side - 1, 1)  # in [0, 1]
    angles = math.pi * position * waves  # (side, ceil(d / 4))
    along = math.sqrt(2) * torch.cat([angles.cos(), angles.sin()], dim=1)
    return torch.cat([along.repeat(side, 1), along.repeat_interleave(side, 0)], dim=1)[:, :d]
