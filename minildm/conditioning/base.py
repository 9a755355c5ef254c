"""What all conditioners share: config, null condition, conversion of user input; LDM Sec. 3.3."""

import difflib
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from minildm.layers import Batch, check_fields, check_words

Encode = Callable[..., Tensor]  # Autoencoder.encode, for conditions that are images
LIMITS = {"vocab_size": 10**6, "grid": 1000}  # of counts in configs; of others 10,000


class Conditioning(NamedTuple):
    """What the UNet receives of a condition."""

    tokens: Tensor | None = None  # (B, M, d_cond), for the cross-attention
    concat: Tensor | None = None  # (B, c', h, w), concatenated with z_t


class Conditioner(nn.Module):
    """tau_theta. The base class is the unconditional one: the UNet receives z_t and t alone."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        # Follows the model's device and precision; on the CPU even if built on the meta device.
        self.register_buffer("like", torch.empty(0, device="cpu"), persistent=False)

    def forward(
        self, batch: Batch, encode: Encode | None = None, drop: Tensor | None = None
    ) -> Conditioning:
        """The condition of each sample; drop (B,) bool replaces its tokens by the null tokens.

        Dropping teaches both halves of classifier-free guidance (Ho & Salimans 2022). encode: the
        first stage's, for conditions that are images. Values in the batch are not checked.
        """
        tokens = self.tokens_of(batch)
        if drop is not None and tokens is not None:
            tokens = torch.where(self.here(drop)[:, None, None], self.null(1).tokens, tokens)
        return Conditioning(tokens, self.concat_of(batch, encode))

    def null(self, n: int) -> Conditioning:
        """The null tokens (n, M, d_cond). Raises ValueError without a null condition."""
        if not self.config.null_batch:
            raise ValueError(f"kind={self.config.kind!r} has no null condition: do not guide")
        return Conditioning(self.tokens_of(self.config.null_batch).expand(n, -1, -1))

    def tokens_of(self, batch: Batch) -> Tensor | None:
        """The tokens of a batch's conditions (B, M, d_cond); None without tokens."""
        return None

    def concat_of(self, batch: Batch, encode: Encode | None) -> Tensor | None:
        """What is concatenated with z_t (B, c', h, w); None if nothing is."""
        return None

    def batch_from(self, y: Any, n: int) -> Batch:
        """User input -> a batch; one condition is repeated n times. ValueError: what is allowed."""
        with suppress(AttributeError, LookupError, RuntimeError, TypeError):
            if (batch := self.read(y)) is not None:
                for key, rows in batch.items():
                    if len(rows) == 1:
                        batch[key] = rows * n if isinstance(rows, list) else torch.cat([rows] * n)
                return batch
        raise ValueError(f"y={y!r:.80} must be {self.config.allowed.format(self.config)}")

    def read(self, y: Any) -> Batch | None:
        """The conditions in y as a batch; None, or nearly any error, for a y not allowed."""
        return {} if y is None else None

    def here(self, x: Tensor) -> Tensor:
        """x on the model's device; the copy does not wait for work in progress there."""
        return x.to(self.like.device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class ConditionerConfig:
    """No condition; subclasses by `kind`. Raises ValueError for a field out of its range."""

    conditioner: ClassVar[type[Conditioner]] = Conditioner  # the class to build
    allowed: ClassVar[str] = "None: this model is unconditional"  # y, in words; {0}: the config
    p_uncond: ClassVar[float] = 0.0  # share of conditions that training drops, for guidance
    d_cond: ClassVar[int | None] = None  # width of the tokens, if there are any
    channels: ClassVar[int] = 0  # that are concatenated with z_t
    null_batch: ClassVar[Batch] = {}  # of one null condition; empty: there is none, for guidance
    names: ClassVar[dict[str, str]] = {}  # fields that training fills with names of the data set
    kind: Literal["none"] = "none"

    def __post_init__(self) -> None:
        check_words(self)
        if not 0.0 <= self.p_uncond < 1.0 or (self.p_uncond and not self.null_batch):
            wanted = "must lie in [0, 1), and be 0 without a null condition"
            raise ValueError(f"p_uncond={self.p_uncond} {wanted}")
        for name, value in vars(self).items():
            if isinstance(value, int):  # checked before memory is taken
                check_fields(self, 0, LIMITS.get(name, 10_000), name)

    def concat_channels(self, z_channels: int) -> int:
        """Number of channels that are concatenated with z_t."""
        return self.channels

    def build(self) -> Conditioner:
        """The conditioner, untrained."""
        return self.conditioner(self)


def look_up(name: str, known: Sequence[str], what: str) -> int:
    """Index of `name` among the known names. Raises ValueError with the nearest ones."""
    name = unicodedata.normalize("NFC", name) if isinstance(name, str) else name  # é is one letter
    if name in known:
        return known.index(name)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    raise ValueError(f"{what}={name!r} is not known{hint} Known: {', '.join(known)}")
