"""tau_theta: what turns a condition y into what the UNet takes, LDM Sec. 3.3."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from minildm.frozen_text import ClipTokenizer, FrozenText, frozen_text
from minildm.spatial import build_spatial
from minildm.tau_theta import KINDS, ConditionerConfig, Encode, TokenConditioner, look_up
from minildm.tokenizer import CaptionTokenizer
from minildm.transformer import place_waves
from minildm.types import Batch, Conditioning

NO_NULL = "this model knows no 'no condition', so that guidance_scale must be 1"


class Unconditional(nn.Module):
    """No condition: the UNet sees z_t and t alone."""

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, batch: Batch, encode: Encode | None = None) -> Conditioning:
        """Whatever the batch holds, nothing of it is used."""
        return Conditioning()

    def null(self, n: int) -> Conditioning:
        """The same nothing."""
        return Conditioning()

    def batch_from(self, y: object, n: int) -> Batch:
        """y must be None: ValueError otherwise."""
        if y is not None:
            raise ValueError(f"y={y!r}: this model is unconditional, it takes none")
        return {}


class ClassConditioner(TokenConditioner):
    """One learnable token a class: labels (B,) -> (B, 1, d_cond).

    With `null_class` there is one more, for "no class".
    """

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__(config)
        if not config.classes:
            raise ValueError("kind='class' needs classes, at least one name")
        self.embedding = nn.Embedding(len(config.classes) + config.null_class, config.d_cond)

    @property
    def network(self) -> nn.Module:
        """The table of tokens."""
        return self.embedding

    @property
    def null_label(self) -> int:
        """The extra label that stands for no class."""
        return len(self.config.classes)

    def ids(self, batch: Batch) -> Tensor:
        """batch["label"] (B,) int64 -> (B, 1); ValueError if out of range."""
        label = batch["label"]
        if label.numel() and not (int(label.min()) >= 0 and int(label.max()) < self.null_label):
            raise ValueError(
                f"label must lie in 0..{self.null_label - 1}, got {label.min()}..{label.max()}"
            )
        return rearrange(label, "b -> b 1")

    def null_ids(self, n: int) -> Tensor:
        """The label of "no class": (n, 1); ValueError where null_class=False."""
        if not self.config.null_class:
            raise ValueError(f"null_class=False: {NO_NULL}")
        return torch.full((n, 1), self.null_label)

    def batch_from(self, y: object, n: int) -> Batch:
        """Class names or labels -> a batch with `label` (B,).

        Raises ValueError for None, and for an unknown name, with the nearest known ones.
        """
        if y is None:
            raise ValueError(f"y is None: name {n} of the classes {self.config.classes}")
        if isinstance(y, Tensor):
            return {"label": y.long()}
        names = [y] if isinstance(y, str | int) else list(y)
        return {"label": torch.tensor([self.label_of(name) for name in names])}

    def label_of(self, name: str | int) -> int:
        """The label of a class name; an int is one already."""
        if isinstance(name, int):
            return name
        return look_up(name, self.config.classes, "class")


class CaptionConditioner(TokenConditioner):
    """What all that reads captions shares; "no condition" is the empty caption."""

    tokenizer: CaptionTokenizer | ClipTokenizer | None

    def ids(self, batch: Batch) -> Tensor:
        """batch["caption"], B texts -> (B, length); ValueError for one that is too long."""
        return self._tokenizer(batch["caption"], self.config.length)

    def null_ids(self, n: int) -> Tensor:
        """The empty caption: (n, length)."""
        return self._tokenizer([""] * n, self.config.length)

    @property
    def _tokenizer(self) -> CaptionTokenizer | ClipTokenizer:
        if self.tokenizer is None:
            raise ValueError("this model of text has no tokenizer: call set_tokenizer first")
        return self.tokenizer

    def batch_from(self, y: object, n: int) -> Batch:
        """One caption or several -> a batch with `caption`; a warning names unknown words.

        Raises ValueError for what is no text, and for a caption that is too long.
        """
        captions = [y] * n if isinstance(y, str) else y
        good = isinstance(captions, Sequence) and all(isinstance(c, str) for c in captions)
        if not good:
            raise ValueError(f"y={y!r:.60} must be a caption or a list of captions")
        unknown = dict.fromkeys(word for c in captions for word in self._tokenizer.unknown(c))
        if unknown:
            warnings.warn(
                f"this model does not know {', '.join(map(repr, unknown))}: read as [UNK]",
                stacklevel=2,
            )
        self._tokenizer(captions, self.config.length)
        return {"caption": list(captions)}


class TextConditioner(CaptionConditioner):
    """Captions through a transformer that is trained with the UNet: (B, length, d_cond).

    `tokenizer` belongs to the model: it is set by the training, and by `load_model` from the
    folder's tokenizer.json.
    """

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__(config)
        if config.vocab_size < 1:
            raise ValueError(f"kind='text' needs a vocabulary, got vocab_size={config.vocab_size}")
        self.network = config.transformer(config.vocab_size, config.length)
        self.tokenizer: CaptionTokenizer | None = None

    def set_tokenizer(self, tokenizer: CaptionTokenizer) -> None:
        """ValueError for one with another number of words than the embedding has."""
        if len(tokenizer) != self.config.vocab_size:
            raise ValueError(
                f"tokenizer has {len(tokenizer)} tokens, the model {self.config.vocab_size}"
            )
        self.tokenizer = tokenizer


class FrozenTextConditioner(CaptionConditioner):
    """Captions through an encoder that others trained: (B, length, d_cond); nothing to train here.

    The encoder stays outside the model, its weights in no checkpoint. Raises ImportError or
    ValueError where it is missing, ValueError where d_cond or length are not what it has.
    """

    def __init__(self, config: ConditionerConfig, network: FrozenText | None = None) -> None:
        """network: the encoder, where its weights come from elsewhere than the config says."""
        super().__init__(config)
        self.network = network or frozen_text(config.encoder, config.encoder_path)
        self.tokenizer = self.network.tokenizer
        if config.d_cond != self.network.d:
            raise ValueError(
                f"d_cond={config.d_cond} must be {self.network.d}, the width of "
                f"encoder={config.encoder!r}"
            )
        if config.length > self.network.longest:
            raise ValueError(f"length={config.length} must be at most {self.network.longest}")
        # Where the tokens go, and in which precision: it moves with the model, and is not saved.
        self.register_buffer("like", torch.empty(0), persistent=False)

    def forward(self, batch: Batch, encode: Encode | None = None) -> Conditioning:
        return Conditioning(tokens=super().forward(batch, encode).tokens.to(self.like))

    def null(self, n: int) -> Conditioning:
        """The empty caption's tokens: (n, length, d_cond)."""
        return Conditioning(tokens=super().null(n).tokens.to(self.like))

    @property
    def _device(self) -> torch.device:
        return self.like.device


class LayoutConditioner(TokenConditioner):
    """Boxes as tokens (top-left, bottom-right, class), LDM Sec. 4.3.1: (B, 3 max_boxes, d_cond).

    Corners are rounded to a grid, so that each has a number, as words have; a box that is not
    there is three tokens "nothing", and "no condition" nothing but these.
    """

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__(config)
        if not config.classes:
            raise ValueError("kind='layout' needs classes, at least one name")
        self.nothing = config.grid**2 + len(config.classes)
        self.network = config.transformer(self.nothing + 1, 3 * config.max_boxes)
        self._begin()

    def _begin(self) -> None:
        """Initial embeddings from which a model learns what stands where.

        Neighbouring corners begin alike: one alone is seen too seldom. And all begin with a
        standard deviation of 1: at the transformer's own .02 three tokens of a box can hardly be
        told from their mean, which training leaves late or never.
        """
        tokens, position = self.network.embedding.weight, self.network.position.weight
        with torch.no_grad():
            nn.init.normal_(tokens)
            nn.init.normal_(position)
            tokens[: self.config.grid**2] = place_waves(self.config.grid, self.config.d_cond)

    def ids(self, batch: Batch) -> Tensor:
        """`boxes` (B, K, 4) xyxy in [0, 1] and `classes` (B, K), -1 pads -> (B, 3 max_boxes).

        Raises ValueError for more boxes than max_boxes, boxes outside the picture or upside
        down, and unknown classes.
        """
        boxes, classes = batch["boxes"], batch["classes"]
        self._check(boxes, classes)
        steps = self.config.grid - 1
        corners = (boxes.clamp(0, 1) * steps).round().long()  # (B, K, 4)
        numbers = corners[..., 1::2] * self.config.grid + corners[..., 0::2]  # (B, K, 2)
        ids = torch.cat([numbers, self.config.grid**2 + classes[..., None]], dim=-1)
        ids = torch.where(classes[..., None] < 0, self.nothing, ids)
        missing = self.config.max_boxes - classes.shape[1]
        ids = nn.functional.pad(ids, (0, 0, 0, missing), value=self.nothing)
        return rearrange(ids, "b k three -> b (k three)")

    def _check(self, boxes: Tensor, classes: Tensor) -> None:
        most, names = self.config.max_boxes, self.config.classes
        if boxes.shape != (*classes.shape, 4) or classes.ndim != 2 or classes.shape[1] > most:
            raise ValueError(
                f"boxes must be (B, K <= {most}, 4) and classes (B, K), got {tuple(boxes.shape)} "
                f"and {tuple(classes.shape)}"
            )
        if classes.numel() and not (int(classes.min()) >= -1 and int(classes.max()) < len(names)):
            raise ValueError(f"classes must lie in -1..{len(names) - 1}, got {classes.tolist()}")
        there = boxes[classes >= 0]
        inside = ((there >= 0) & (there <= 1)).all(dim=1)
        upright = (there[:, :2] < there[:, 2:]).all(dim=1)
        if not (inside & upright).all():
            wrong = there[~(inside & upright)][0].tolist()
            raise ValueError(f"box {wrong} must be (left, top, right, bottom), rising, in [0, 1]")

    def null_ids(self, n: int) -> Tensor:
        """Nothing but "nothing": (n, 3 max_boxes)."""
        return torch.full((n, 3 * self.config.max_boxes), self.nothing)

    def batch_from(self, y: object, n: int) -> Batch:
        """Layouts, each a list of (class name, (left, top, right, bottom)) -> boxes, classes.

        One layout alone is drawn n times; a dict is taken as a batch already.
        """
        if isinstance(y, dict):
            self._check(y["boxes"], y["classes"])
            return {"boxes": y["boxes"], "classes": y["classes"]}
        layouts: Any = y
        try:
            if layouts and isinstance(layouts[0][0], str):
                layouts = [layouts] * n
            rows = [[(str(name), [float(v) for v in box]) for name, box in row] for row in layouts]
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise ValueError(
                f"y={y!r:.80} must be layouts: lists of (class, (left, top, right, bottom))"
            ) from error
        most = max([self.config.max_boxes, *map(len, rows)])
        boxes, classes = torch.zeros(len(rows), most, 4), torch.full((len(rows), most), -1)
        for i, row in enumerate(rows):
            for k, (name, box) in enumerate(row):
                if len(box) != 4:
                    raise ValueError(f"box {box} of {name!r} must have four numbers")
                boxes[i, k] = torch.tensor(box)
                classes[i, k] = look_up(name, self.config.classes, "class")
        self._check(boxes, classes)
        return {"boxes": boxes, "classes": classes}


class IdConditioner(TokenConditioner):
    """Tokens that somebody else numbered, through a transformer: (B, length, d_cond).

    So the official TransformerEmbedder works, and its BERTEmbedder without a tokenizer.
    """

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__(config)
        if config.vocab_size < 1:
            raise ValueError(f"kind='ids' needs a vocabulary, got vocab_size={config.vocab_size}")
        self.network = config.transformer(config.vocab_size, config.length)

    def ids(self, batch: Batch) -> Tensor:
        """batch["ids"] (B, length) int64; ValueError for another shape, or out of range."""
        ids, length, last = batch["ids"], self.config.length, self.config.vocab_size - 1
        if ids.dtype != torch.int64 or ids.ndim != 2 or ids.shape[1] != length:
            raise ValueError(f"ids must be (B, {length}) int64, got {tuple(ids.shape)} {ids.dtype}")
        if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) <= last):
            raise ValueError(f"ids must lie in 0..{last}, got {ids.min()}..{ids.max()}")
        return ids

    def null_ids(self, n: int) -> Tensor:
        """Nothing but `null_id`: (n, length); ValueError where there is none."""
        if self.config.null_id is None:
            raise ValueError(f"null_id=None: {NO_NULL}")
        return torch.full((n, self.config.length), self.config.null_id)

    def batch_from(self, y: object, n: int) -> Batch:
        """Ids (B, length), or (length,) to draw n times, as a tensor or lists -> `ids`."""
        try:
            ids = torch.as_tensor(y)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"y={y!r:.60} must be ids (B, {self.config.length})") from error
        batch = {"ids": ids.expand(n, -1) if ids.ndim == 1 else ids}
        self.ids(batch)
        return batch


class SpatialConditioner(nn.Module):
    """A picture beside z_t, and tokens or none: LDM's "concat" and "hybrid", Sec. 3.3.

    `tokens` reads what goes through cross-attention, `spatial` what is concatenated. Training
    drops the tokens alone, and guidance is towards them: the picture is there in both halves.
    """

    def __init__(self, config: ConditionerConfig, tokens: nn.Module) -> None:
        super().__init__()
        self.config, self.tokens, self.spatial = config, tokens, build_spatial(config)
        self.register_buffer("like", torch.empty(0), persistent=False)  # where the pictures go

    def forward(self, batch: Batch, encode: Encode | None = None) -> Conditioning:
        """tokens (B, M, d_cond) or None, concat (B, c', h, w); ValueErrors of both parts."""
        pictures = {key: batch[key].to(self.like.device) for key in self.spatial.keys}
        return self.tokens(batch)._replace(concat=self.spatial(pictures, encode))

    def null(self, n: int) -> Conditioning:
        """No tokens' condition; what is beside z_t is added by whoever guides."""
        if self.config.kind == "none":
            raise ValueError("guidance_scale must be 1: a picture beside z_t has no 'no condition'")
        return self.tokens.null(n)

    def batch_from(self, y: object, n: int) -> Batch:
        """A dict of what `spatial` reads, and with tokens of `y`, what they are to say.

        Where one tensor is all, it may stand alone; pictures without a batch axis are drawn n
        times. Raises ValueError for missing or unknown entries, and those of both parts.
        """
        keys, hybrid = self.spatial.keys, self.config.kind != "none"
        named = {keys[0]: y} if isinstance(y, Tensor) and len(keys) == 1 and not hybrid else y
        wanted = {*keys, "y"} if hybrid else {*keys}
        if not isinstance(named, dict) or set(named) != wanted:
            got = sorted(map(str, named)) if isinstance(named, dict) else f"{y!r:.60}"
            raise ValueError(f"y must be a dict of {sorted(wanted)}, got {got}")
        if not all(isinstance(named[key], Tensor) for key in keys):
            raise ValueError(f"y must hold tensors under {sorted(keys)}")
        alone = 2 if keys == ("semantic",) else 3  # axes of one map, of one picture
        batch = {
            key: named[key].expand(n, *named[key].shape) if named[key].ndim == alone else named[key]
            for key in keys
        }
        if not hybrid:
            return batch
        return batch | self.tokens.batch_from(named["y"], len(batch[keys[0]]))


Conditioner = (
    Unconditional
    | ClassConditioner
    | TextConditioner
    | FrozenTextConditioner
    | LayoutConditioner
    | IdConditioner
    | SpatialConditioner
)


def build_conditioner(config: ConditionerConfig) -> Conditioner:
    """The tau_theta that the config's kind names, with a picture beside z_t where it says so."""
    if config.encoder != "trained":
        tokens: Any = FrozenTextConditioner(config)
    else:
        kinds = (Unconditional, ClassConditioner, TextConditioner, LayoutConditioner)
        tokens = dict(zip(KINDS, (*kinds, IdConditioner), strict=True))[config.kind](config)
    return tokens if config.concat == "none" else SpatialConditioner(config, tokens)
