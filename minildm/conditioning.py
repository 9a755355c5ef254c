"""tau_theta: what turns a condition y into what the UNet takes, LDM Sec. 3.3."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from minildm.types import Batch, Conditioning


@dataclass(frozen=True, kw_only=True)
class ConditionerConfig:
    """Which tau_theta: "none" (unconditional) or "class" (one learnable token a class)."""

    kind: Literal["none", "class"] = "none"
    classes: tuple[str, ...] = ()  # their names, in the labels' order; presets leave it to the data
    d_cond: int = 512
    p_uncond: float = 0.1  # how often training drops the condition, for guidance

    def __post_init__(self) -> None:
        if self.kind not in ("none", "class"):
            raise ValueError(f"kind={self.kind!r} is not known; known: 'none', 'class'")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must be different names")
        if not 0.0 <= self.p_uncond < 1.0:
            raise ValueError(f"p_uncond={self.p_uncond} must lie in [0, 1)")


class Unconditional(nn.Module):
    """No condition: the UNet sees z_t and t alone."""

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, batch: Batch, encode: Callable[[Tensor], Tensor] | None = None
    ) -> Conditioning:
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


class ClassConditioner(nn.Module):
    """One learnable token a class, and one more for "no class": labels (B,) -> (B, 1, d_cond).

    In training each label becomes "no class" with probability p_uncond, so that one network
    learns both halves of classifier-free guidance (Ho & Salimans 2022).
    """

    def __init__(self, config: ConditionerConfig) -> None:
        super().__init__()
        if not config.classes:
            raise ValueError("kind='class' needs classes, at least one name")
        self.config = config
        self.embedding = nn.Embedding(len(config.classes) + 1, config.d_cond)

    @property
    def null_label(self) -> int:
        """The extra label that stands for no class."""
        return len(self.config.classes)

    def forward(
        self, batch: Batch, encode: Callable[[Tensor], Tensor] | None = None
    ) -> Conditioning:
        """batch["label"] (B,) int64 -> tokens (B, 1, d_cond); ValueError if out of range."""
        label = batch["label"].to(self.embedding.weight.device)
        if label.numel() and not (int(label.min()) >= 0 and int(label.max()) < self.null_label):
            raise ValueError(
                f"label must lie in 0..{self.null_label - 1}, got {label.min()}..{label.max()}"
            )
        if self.training and self.config.p_uncond:
            dropped = torch.rand(label.shape, device=label.device) < self.config.p_uncond
            label = label.masked_fill(dropped, self.null_label)
        return Conditioning(tokens=rearrange(self.embedding(label), "b d -> b 1 d"))

    def null(self, n: int) -> Conditioning:
        """Tokens of "no class" for n samples: (n, 1, d_cond)."""
        label = torch.full((n,), self.null_label, device=self.embedding.weight.device)
        return Conditioning(tokens=rearrange(self.embedding(label), "b d -> b 1 d"))

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


def look_up(name: str, known: Sequence[str], what: str) -> int:
    """The index of `name` among the known names; else a ValueError that suggests some."""
    if name in known:
        return known.index(name)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    raise ValueError(f"{what}={name!r} is not known{hint} Known: {', '.join(known)}")


def build_conditioner(config: ConditionerConfig) -> Unconditional | ClassConditioner:
    """The tau_theta that the config's kind names."""
    return {"none": Unconditional, "class": ClassConditioner}[config.kind](config)
