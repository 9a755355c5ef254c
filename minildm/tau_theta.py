"""What the conditioners share: their config, dropping, the look-up of names; LDM Sec. 3.3."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minildm import draws
from minildm.transformer import TokenTransformer
from minildm.types import Batch, Conditioning

KINDS = ("none", "class", "text", "layout", "ids")
ENCODERS = ("trained", "minilm", "clip")
CONCATS = ("none", "low_res", "inpaint", "semantic")
Encode = Callable[[Tensor], Tensor]  # pictures -> latents, for conditions that are pictures


@dataclass(frozen=True, kw_only=True)
class ConditionerConfig:
    """Which tau_theta: "none", "class" (one learnable token), or a transformer that reads "text",
    a "layout", or "ids" that somebody else made. With `concat` a picture goes beside z_t, alone or
    together with tokens ("hybrid").
    """

    kind: Literal["none", "class", "text", "layout", "ids"] = "none"
    classes: tuple[str, ...] = ()  # class, layout: names, in order; presets leave it to the data
    null_class: bool = True  # class: a token for "no class"; without it nothing can be dropped
    d_cond: int = 512
    p_uncond: float = 0.1  # how often training drops the condition, for guidance
    depth: int = 2  # of the transformer
    heads: int = 8  # the official 8 of 64, whatever d_cond is
    d_head: int = 64
    # text: who reads it; the others are frozen, and stay outside the model (see frozen_text)
    encoder: Literal["trained", "minilm", "clip"] = "trained"
    encoder_path: str = ""  # clip: the folder of its weights
    vocab_size: int = 0  # text, ids: of the tokenizer; presets leave it to the data
    length: int = 24  # text, ids: tokens, a text's start and end included
    null_id: int | None = None  # ids: the token that, alone, says "no condition"; None: none does
    max_boxes: int = 4  # layout
    grid: int = 32  # layout: corners are rounded to a grid of so many positions a side
    concat: Literal["none", "low_res", "inpaint", "semantic"] = "none"
    labels: tuple[str, ...] = ()  # semantic: names, in order; presets leave it to the data
    stages: int = 2  # semantic: halvings of the map, log2 of the first stage's f
    channels: int = 3  # semantic: of what is put beside z_t

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            listed = ", ".join(map(repr, KINDS))
            raise ValueError(f"kind={self.kind!r} is not known; known: {listed}")
        for name in ("classes", "labels"):
            if len(set(getattr(self, name))) != len(getattr(self, name)):
                raise ValueError(f"{name} must be different names")
        if not 0.0 <= self.p_uncond < 1.0:
            raise ValueError(f"p_uncond={self.p_uncond} must lie in [0, 1)")
        for name in ("d_cond", "depth", "heads", "d_head", "max_boxes", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.length < 3 or self.grid < 2:
            raise ValueError(f"length={self.length} must be at least 3, grid={self.grid} 2")
        self._check_null()
        self._check_encoder()
        self._check_concat()

    def _check_null(self) -> None:
        if self.p_uncond and not self.null_class:
            raise ValueError(f"p_uncond={self.p_uncond} must be 0 with null_class=False")
        if self.kind != "ids":
            return
        if self.p_uncond and self.null_id is None:
            raise ValueError(f"p_uncond={self.p_uncond} must be 0 without a null_id")
        if self.null_id is not None and not 0 <= self.null_id < self.vocab_size:
            raise ValueError(f"null_id={self.null_id} must lie in 0..{self.vocab_size - 1}")

    def _check_encoder(self) -> None:
        if self.encoder not in ENCODERS:
            listed = ", ".join(map(repr, ENCODERS))
            raise ValueError(f"encoder={self.encoder!r} is not known; known: {listed}")
        if self.encoder != "trained" and self.kind != "text":
            raise ValueError(f"encoder={self.encoder!r} reads text, not kind={self.kind!r}")
        if (self.encoder == "clip") != bool(self.encoder_path):
            raise ValueError(
                f"encoder={self.encoder!r} with encoder_path={self.encoder_path!r}: 'clip' needs "
                "the folder of its weights, the others none"
            )

    def _check_concat(self) -> None:
        if self.concat not in CONCATS:
            listed = ", ".join(map(repr, CONCATS))
            raise ValueError(f"concat={self.concat!r} is not known; known: {listed}")
        if self.stages < 0:
            raise ValueError(f"stages={self.stages} must not be negative")

    def concat_channels(self, z_channels: int) -> int:
        """How many channels the UNet gets beside z_t's own."""
        beside = {"none": 0, "low_res": 3, "inpaint": z_channels + 1, "semantic": self.channels}
        return beside[self.concat]

    def transformer(self, vocab_size: int, length: int) -> TokenTransformer:
        """The encoder of text and layouts."""
        return TokenTransformer(
            vocab_size, length, self.d_cond, depth=self.depth, heads=self.heads, d_head=self.d_head
        )


class TokenConditioner(nn.Module):
    """What the kinds with tokens share: ids of discrete tokens -> (B, M, d_cond).

    In training each sample's ids become those of "no condition" with probability p_uncond, so
    that one network learns both halves of classifier-free guidance (Ho & Salimans 2022).
    """

    network: nn.Module  # (B, M) int64 -> (B, M, d_cond)

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__()
        self.config = config

    def ids(self, batch: Batch) -> Tensor:
        """The condition in a batch, checked: (B, M) int64 on the CPU or the batch's device."""
        raise NotImplementedError

    def null_ids(self, n: int) -> Tensor:
        """ "No condition", n times: (n, M) int64. ValueError for a model that has none."""
        raise NotImplementedError

    def forward(self, batch: Batch, encode: Encode | None = None) -> Conditioning:
        """Tokens (B, M, d_cond) for the cross-attention; ValueErrors as of `ids`."""
        ids = self.ids(batch).to(self._device)
        if self.training and self.config.p_uncond:
            dropped = draws.rand(len(ids), 1, device=ids.device) < self.config.p_uncond
            ids = torch.where(dropped, self.null_ids(len(ids)).to(ids.device), ids)
        return Conditioning(tokens=self.network(ids))

    def null(self, n: int) -> Conditioning:
        """Tokens of "no condition" for n samples: (n, M, d_cond); ValueError as of `null_ids`."""
        return Conditioning(tokens=self.network(self.null_ids(n).to(self._device)))

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device


def look_up(name: str, known: Sequence[str], what: str) -> int:
    """The index of `name` among the known names; else a ValueError that suggests some."""
    if name in known:
        return known.index(name)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    raise ValueError(f"{what}={name!r} is not known{hint} Known: {', '.join(known)}")
