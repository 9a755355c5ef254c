"""Conditions as tokens for the cross-attention: classes, captions, layouts, ids; LDM Sec. 3.3."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minildm.conditioning.base import Conditioner, ConditionerConfig, look_up
from minildm.conditioning.tokenizer import CaptionTokenizer
from minildm.conditioning.transformer import TokenTransformer, grid_waves
from minildm.layers import Batch


class ClassConditioner(Conditioner):
    """A row of a learned table for each class: `label` (B,) int64 -> (B, 1, d_cond)."""

    def __init__(self, config: "ClassConfig") -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(len(config.classes) + config.null_class, config.d_cond)

    def tokens_of(self, batch: Batch) -> Tensor:
        return self.embedding(self.here(batch["label"]))[:, None]

    def null_batch(self) -> Batch:
        """The label after the last class."""
        return {"label": torch.tensor([len(self.config.classes)])}

    def batch_from(self, y: Any, n: int) -> Batch:
        """Class names or labels -> `label` (B,). Raises ValueError with the nearest names."""
        names, y = self.config.classes, y.tolist() if isinstance(y, Tensor) else y
        y = [y] * n if isinstance(y, str | int) else y
        if not isinstance(y, Sequence):
            raise ValueError(f"y={y!r:.60} must be class names or labels; known: {names}")
        labels = [v if v in range(len(names)) else look_up(v, names, "class") for v in y]
        return {"label": torch.tensor(labels, dtype=torch.int64)}


@dataclass(frozen=True, kw_only=True)
class ClassConfig(ConditionerConfig):
    """One learnable token per class."""

    conditioner: ClassVar[type[Conditioner]] = ClassConditioner
    kind: Literal["class"] = "class"
    classes: tuple[str, ...] = ()  # names in the order of the labels; presets leave it to the data
    d_cond: int = 512
    p_uncond: float = 0.1
    null_class: bool = True  # one more token, for "no class"

    @property
    def has_null(self) -> bool:
        """Whether there is a token for "no class"."""
        return self.null_class


class TransformerConditioner(Conditioner):
    """Base: ids of discrete tokens (B, M) -> transformer -> (B, M, d_cond)."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        sizes = {"depth": config.depth, "heads": config.heads, "d_head": config.d_head}
        self.network = TokenTransformer(config.vocab_size, config.length, config.d_cond, **sizes)

    def ids(self, batch: Batch) -> Tensor:
        """The ids of a batch's conditions: (B, M) int64."""
        raise NotImplementedError

    def tokens_of(self, batch: Batch) -> Tensor:
        return self.network(self.here(self.ids(batch)))


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(ConditionerConfig):
    """Base of the kinds that a transformer reads; they have a vocab_size and a length, too."""

    d_cond: int = 512
    p_uncond: float = 0.1
    depth: int = 2
    heads: int = 8  # the official code has 8 heads of 64, whatever d_cond is
    d_head: int = 64


class CaptionConditioner(Conditioner):
    """Base of all that reads captions; the null condition is the empty caption."""

    tokenizer: CaptionTokenizer | None = None

    def ids(self, batch: Batch) -> Tensor:
        """`caption`, B strings -> (B, length) int64. Raises ValueError for one that is too long."""
        if self.tokenizer is None:
            raise ValueError("this text model has no tokenizer: call set_tokenizer first")
        return self.tokenizer(batch["caption"], self.config.length)

    def null_batch(self) -> Batch:
        """The empty caption."""
        return {"caption": [""]}

    def batch_from(self, y: Any, n: int) -> Batch:
        """One caption or several -> `caption`. Warns of unknown words.

        Raises ValueError for anything but text and for captions that are too long.
        """
        captions = [y] * n if isinstance(y, str) else y
        if not isinstance(captions, Sequence) or not all(isinstance(c, str) for c in captions):
            raise ValueError(f"y={y!r:.60} must be a caption or a list of captions")
        self.ids({"caption": captions})
        unknown = dict.fromkeys(word for c in captions for word in self.tokenizer.unknown(c))
        if unknown:
            words = ", ".join(map(repr, unknown))
            warnings.warn(f"unknown words are read as [UNK]: {words}", stacklevel=2)
        return {"caption": list(captions)}


class TextConditioner(CaptionConditioner, TransformerConditioner):
    """Captions -> a transformer that is trained with the UNet -> (B, length, d_cond).

    `tokenizer` belongs to the model: training sets it, load_model reads it from the folder.
    """

    def set_tokenizer(self, tokenizer: CaptionTokenizer) -> None:
        """Raises ValueError unless it has vocab_size tokens."""
        if len(tokenizer) != (size := self.config.vocab_size):
            raise ValueError(f"tokenizer has {len(tokenizer)} tokens, must have vocab_size={size}")
        self.tokenizer = tokenizer


@dataclass(frozen=True, kw_only=True)
class TextConfig(TransformerConfig):
    """Captions."""

    conditioner: ClassVar[type[Conditioner]] = TextConditioner
    kind: Literal["text"] = "text"
    vocab_size: int = 0  # of the tokenizer; presets leave it to the data
    length: int = 24  # tokens, start and end included


class LayoutConditioner(TransformerConditioner):
    """A box is three tokens (top-left, bottom-right, class), Sec. 4.3.1: (B, 3 max_boxes, d_cond).

    Corners are rounded to a grid, so that each has a number, as words have. A missing box is
    three tokens "nothing"; the null condition consists of these alone.
    """

    def __init__(self, config: "LayoutConfig") -> None:
        super().__init__(config)
        self.nothing = config.vocab_size - 1
        # Neighbouring corners start alike, since a single one is rare in the data; all tokens have
        # standard deviation 1, since at 0.02 training takes long to tell a box's three apart.
        tokens, position = self.network.embedding.weight, self.network.position.weight
        with torch.no_grad():
            nn.init.normal_(tokens)
            nn.init.normal_(position)
            tokens[: config.grid**2] = grid_waves(config.grid, config.d_cond)

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

    def null_batch(self) -> Batch:
        """A layout without boxes."""
        return {"boxes": torch.zeros(1, 0, 4), "classes": torch.zeros(1, 0, dtype=torch.int64)}

    def batch_from(self, y: Any, n: int) -> Batch:
        """Layouts, lists of (class name, (left, top, right, bottom)) -> `boxes`, `classes`.

        A dict of both is a batch already. Raises ValueError for unknown classes and wrong boxes.
        """
        names, most = self.config.classes, self.config.max_boxes
        try:
            batch = y if isinstance(y, dict) else self._batch(y, n)
            boxes, classes = batch["boxes"], batch["classes"]
            there = boxes[classes >= 0]  # (number of boxes, 4)
            assert boxes.shape == (len(classes), classes.shape[1], 4) and classes.shape[1] <= most
            assert ((classes >= -1) & (classes < len(names))).all()
            assert ((there >= 0) & (there <= 1)).all() and (there[:, :2] < there[:, 2:]).all()
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"y={y!r:.80} must be layouts of at most {most} (class, (left, top, right, "
                f"bottom)) with left < right and top < bottom in [0, 1]; classes: {names}"
            ) from error
        return {"boxes": boxes, "classes": classes}

    def _batch(self, y: Any, n: int) -> Batch:
        layouts = [y] * n if y and y[0] and isinstance(y[0][0], str) else y
        boxes, classes = [], []
        for layout in layouts:
            corners = [torch.tensor([1.0 * side for side in box[1]]).view(4) for box in layout]
            boxes.append(torch.stack(corners) if layout else torch.zeros(0, 4))
            labels = [look_up(box[0], self.config.classes, "class") for box in layout]
            classes.append(torch.tensor(labels, dtype=torch.int64))
        classes = pad_sequence(classes, batch_first=True, padding_value=-1)
        return {"boxes": pad_sequence(boxes, batch_first=True), "classes": classes}


@dataclass(frozen=True, kw_only=True)
class LayoutConfig(TransformerConfig):
    """Boxes with classes."""

    conditioner: ClassVar[type[Conditioner]] = LayoutConditioner
    kind: Literal["layout"] = "layout"
    classes: tuple[str, ...] = ()  # names in order; presets leave it to the data
    max_boxes: int = 4
    grid: int = 32  # corners are rounded to grid x grid positions

    @property
    def vocab_size(self) -> int:
        """Corners, classes, and "nothing"."""
        return self.grid**2 + len(self.classes) + 1

    @property
    def length(self) -> int:
        """Three tokens for each box."""
        return 3 * self.max_boxes


class IdsConditioner(TransformerConditioner):
    """Token ids -> transformer -> (B, length, d_cond): the official TransformerEmbedder."""

    def ids(self, batch: Batch) -> Tensor:
        return batch["ids"]

    def null_batch(self) -> Batch:
        """A sequence of `null_id`."""
        return {"ids": torch.full((1, self.config.length), self.config.null_id)}

    def batch_from(self, y: Any, n: int) -> Batch:
        """Ids (B, length), or (length,) to repeat n times, as a tensor or lists -> `ids`."""
        length, size = self.config.length, self.config.vocab_size
        try:
            ids = torch.as_tensor(y)
            ids = ids.expand(n, -1) if ids.ndim == 1 else ids
            assert ids.dtype == torch.int64 and ids.shape == (len(ids), length)
            assert ((ids >= 0) & (ids < size)).all()
        except (AssertionError, TypeError, ValueError, RuntimeError) as error:
            allowed = f"ids (B, {length}), integers in 0..{size - 1}"
            raise ValueError(f"y={y!r:.60} must be {allowed}") from error
        return {"ids": ids}


@dataclass(frozen=True, kw_only=True)
class IdsConfig(TextConfig):
    """Sequences of token ids."""

    conditioner: ClassVar[type[Conditioner]] = IdsConditioner
    kind: Literal["ids"] = "ids"
    p_uncond: float = 0.0
    null_id: int | None = None  # a sequence of this token alone is the null condition

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.null_id is not None and self.null_id not in range(self.vocab_size):
            raise ValueError(f"null_id={self.null_id} must lie in 0..{self.vocab_size - 1}")

    @property
    def has_null(self) -> bool:
        """Whether there is a token for "no condition"."""
        return self.null_id is not None
