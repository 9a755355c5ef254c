"""Experiments as frozen dataclasses: which model, which data, how to train it.

An ablation is a `dataclasses.replace`, or an `override` by dotted names.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch

from minildm.compression.autoencoder import AutoencoderConfig
from minildm.compression.loss import AdversarialConfig
from minildm.conditioning import ConditionerConfig, look_up
from minildm.data.dataset import ImageDataset
from minildm.data.emoji import EmojiDataset
from minildm.data.folder import ImageFolder
from minildm.data.photos import PhotoDataset
from minildm.data.scenes import CropsDataset, ScenesDataset
from minildm.diffusion.latent_diffusion import DiffusionConfig, LatentDiffusionConfig
from minildm.layers import check_fields, check_words

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; the same fields for every model."""

    steps: int
    batch_size: int = 64  # of all processes together
    lr: float = 1e-3
    warmup_steps: int = 100  # linear, from 0
    decay: Literal["cosine", "constant"] = "cosine"  # cosine ends at zero
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    grad_clip: float = 1.0  # largest norm of the gradient
    ema_decay: float = 0.999
    flip: bool = True  # mirror half of the images
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 where the hardware has it
    seed: int = 0
    log_every: int = 1  # steps per Record; a GPU computes without a pause between two of them
    save_every: int = 100  # steps; a save also ends a Record
    workers: int = 0  # processes that load data

    def __post_init__(self) -> None:
        check_words(self)
        check_fields(self, 1, 10**9, "steps", "log_every", "save_every")
        check_fields(self, 1, 10**5, "batch_size")
        check_fields(self, 0, 10**9, "warmup_steps", "workers")
        check_fields(self, 1e-12, 1e12, "lr", "grad_clip")
        check_fields(self, 0, 0.999999, "ema_decay")
        check_fields(self, -(2**63), 2**63 - 1, "seed")  # what torch takes


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images: "emoji", "scenes", objects cut out of them ("crops"), "photos", a "folder".

    "mixed": emoji, scenes and photographs, about as many of each in training; images alone, for
    a first stage.
    """

    kind: Literal["emoji", "scenes", "crops", "photos", "mixed", "folder"] = "emoji"
    size: int = 64
    styles: tuple[str, ...] = ()  # empty: all
    subgroups: tuple[str, ...] = ()  # emoji; empty: all with at least ten emoji
    unpaired: int = 0  # emoji: see EmojiDataset
    style_words: float = 0.0  # share of the captions in which training names the style
    path: str = ""  # of the folder
    background: Literal["scene", "plain"] = "scene"  # scenes; plain: objects on grey

    def __post_init__(self) -> None:
        check_words(self)
        check_fields(self, 1, 10_000, "size")
        check_fields(self, 0, 1, "style_words")
        if (self.kind == "folder") != bool(self.path):
            raise ValueError(f"path={self.path!r} must be given for kind='folder', and only then")

    def dataset(self, split: str) -> ImageDataset:
        """Load the images of one split, "train" or "val"; some kinds have "all", too."""
        if self.kind == "folder":
            data = ImageFolder(self.path, self.size, split=split)
        elif self.kind == "photos":
            data = PhotoDataset(split, self.size)
        elif self.kind == "emoji":
            names = {"styles": self.styles, "subgroups": self.subgroups}
            data = EmojiDataset(split, self.size, **names, unpaired=self.unpaired)
        elif self.kind == "mixed":
            parts = [part.images for part in self.parts(split)]
            data = ImageDataset(torch.cat(parts), name=f"mixed-{split}")
        else:
            data = ScenesDataset(split, self.size, styles=self.styles, background=self.background)
            data = CropsDataset(data) if self.kind == "crops" else data
        data.config = self
        return data

    def parts(self, split: str) -> list[ImageDataset]:
        """What "mixed" is made of; of other kinds the one data set."""
        if self.kind != "mixed":
            return [self.dataset(split)]
        n, crops = (5000, 96) if split == "train" else (500, 8)
        emoji, scenes = EmojiDataset(split, self.size), ScenesDataset(split, self.size, n=n)
        return [emoji, scenes, PhotoDataset(split, self.size, crops=crops)]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all trainings have in common."""

    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True, kw_only=True)
class AutoencoderExperiment(Experiment):
    """Stage 1. The paper's loss is L1 + perceptual + adversarial + regulariser."""

    model: AutoencoderConfig
    kl_weight: float = 1e-6  # of a KL latent
    mse_weight: float = 0.0  # of a squared error added to L1; not the paper's
    codebook_weight: float = 1.0  # of a VQ latent
    restart_dead: int = 0  # VQ, not the paper's: steps until an unused code moves; 0: never
    perceptual_weight: float = 0.0  # 0: no perceptual term
    perceptual: str = "auto"  # which distance: see perceptual_distance
    adversarial: AdversarialConfig | None = None  # None: no discriminator

    def __post_init__(self) -> None:
        weights = ("kl_weight", "mse_weight", "codebook_weight", "perceptual_weight")
        check_fields(self, 0, 1e12, *weights, "restart_dead")
        if self.restart_dead and self.model.regularizer != "vq":
            raise ValueError(f"restart_dead={self.restart_dead} requires regularizer='vq'")
        if self.model.regularizer == "identity":
            raise ValueError("regularizer='identity': nothing to train")


@dataclass(frozen=True, kw_only=True)
class LatentDiffusionExperiment(Experiment, DiffusionConfig):
    """Stage 2, on a trained first stage. Names of classes and the vocabulary come from the data."""

    held_out: int = 0  # held-out images whose loss by time is logged at each save

    def model_config(
        self, autoencoder: AutoencoderConfig, conditioner: ConditionerConfig | None = None
    ) -> LatentDiffusionConfig:
        """The model for a first stage; conditioner: this experiment's, completed from the data.

        Raises ValueError if the parts do not fit together.
        """
        parts = {f.name: getattr(self, f.name) for f in fields(DiffusionConfig)}
        parts |= {"autoencoder": autoencoder, "conditioner": conditioner or self.conditioner}
        return LatentDiffusionConfig(image_size=self.data.size, **parts)


@dataclass(frozen=True, kw_only=True)
class ClassifierExperiment(Experiment):
    """A classifier of images, or, of scenes, a Segmenter, which labels each pixel."""

    channels: int = 32


def with_steps(experiment: T, steps: int, **train: Any) -> T:
    """The same experiment with another number of steps, and other fields of its TrainConfig."""
    return replace(experiment, train=replace(experiment.train, steps=steps, **train))


def override(config: T, changes: Mapping[str, Any]) -> T:
    """Replace fields by dotted names, as {"train.steps": 5, "unet.channels": 16}, all at once.

    Raises ValueError for an unknown name, with near ones, and for a value of another type.
    """
    content = to_dict(config)
    for name, value in changes.items():
        *path, last = name.split(".")
        table = content
        for part in path:
            if not isinstance(table.get(part), dict):
                table[part] = {}
            table = table[part]
        table[last] = value
    return from_dict(type(config), content)


def to_dict(config: Any) -> dict[str, Any]:
    """A frozen dataclass, nested ones included, as JSON can hold it."""
    return json.loads(json.dumps(asdict(config)))


def from_dict(cls: type[T], content: Mapping[str, Any]) -> T:
    """The inverse of `to_dict`; of a class with subclasses (conditioners) `kind` decides which.

    Raises ValueError for unknown or missing fields, and for values of another type.
    """
    kinds = {vars(c)["kind"]: c for c in _family(cls) if "kind" in vars(c)}
    if len(kinds) > 1:
        kind = str(content.get("kind", cls.kind))
        look_up(kind, list(kinds), "kind")
        cls = kinds[kind]
    hints = get_type_hints(cls)
    for name in content:
        look_up(name, [f.name for f in fields(cls)], f"field of {cls.__name__}")
    try:
        return cls(**{name: _revive(hints[name], value, name) for name, value in content.items()})
    except TypeError as error:  # a field without a default
        raise ValueError(f"{cls.__name__}: {error}") from error


def _family(cls: type) -> list[type]:
    return [cls, *(c for sub in cls.__subclasses__() for c in _family(sub))]


def _revive(hint: Any, value: Any, name: str) -> Any:
    """The value as JSON, TOML or a command line holds it, as the annotated type."""
    origin, args = get_origin(hint), get_args(hint)
    if type(None) in args:
        return None if value is None else _revive(args[0], value, name)
    if is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(hint, value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_revive(args[0], item, name) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if origin is Literal or hint is type(value):  # check_words reads the words
        return value
    raise ValueError(f"{name}={value!r:.60} must be {getattr(hint, '__name__', hint)}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The fields of two tables that differ, as "train.steps: 2000 there, 4000 here"; "" if none."""
    old, new = flat(old), flat(new)
    differ = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    differ = [k for k in differ if not k.endswith("data.path")]  # its content has a fingerprint
    said = [f"{k}: {old.get(k)!s:.60} there, {new.get(k)!s:.60} here" for k in differ[:5]]
    return ", ".join(said + [f"{len(differ) - 5} more"] * (len(differ) > 5))


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names: {"unet": {"channels": 32}} -> {"unet.channels": 32}."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        nested = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found
