"""Experiments as data: which model, which pictures, how to train; an ablation is a `replace`."""

from dataclasses import dataclass, field, replace

from minildm.autoencoder import AutoencoderConfig
from minildm.conditioning import ConditionerConfig
from minildm.data.emoji import EmojiDataset
from minildm.data.folders import ImageFolder
from minildm.data.scenes import ScenesDataset
from minildm.diffusion import LatentDiffusionConfig
from minildm.unet import UNetConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: the same fields for every model."""

    steps: int
    batch_size: int = 64
    lr: float = 1e-3
    warmup_steps: int = 100  # linear, from 0
    decay: str = "cosine"  # to zero at the last step; or "constant"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    grad_clip: float = 1.0  # of the gradient's norm
    accumulate: int = 1  # micro-batches of batch_size per optimiser step
    ema_decay: float = 0.999
    flip: bool = True  # mirror half of the pictures
    precision: str = "auto"  # "fp32", "bf16", "fp16"; auto: bf16 where it is faster
    seed: int = 0
    save_every: int = 100  # steps
    workers: int = 0  # processes that load data

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.decay not in ("cosine", "constant"):
            raise ValueError(f"decay={self.decay!r} is not known; known: 'cosine', 'constant'")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ValueError(f"precision={self.precision!r} must be auto, fp32, bf16 or fp16")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures: "emoji", "scenes", or "folder" with the path of one."""

    kind: str = "emoji"
    size: int = 64
    styles: tuple[str, ...] = ()  # none named: all
    subgroups: tuple[str, ...] = ()  # none named: all with at least ten emoji
    path: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("emoji", "scenes", "folder"):
            raise ValueError(f"kind={self.kind!r} is not known; known: emoji, scenes, folder")
        if (self.kind == "folder") != bool(self.path):
            raise ValueError(f"kind={self.kind!r} with path={self.path!r}: a folder needs a path")

    def dataset(self, split: str) -> EmojiDataset | ScenesDataset | ImageFolder:
        """The pictures of one split, "train" or "val"."""
        styles = self.styles or None
        if self.kind == "folder":
            return ImageFolder(self.path, self.size, split=split).checked()
        if self.kind == "scenes":
            return ScenesDataset(split, self.size, styles=styles)
        return EmojiDataset(split, self.size, styles=styles, subgroups=self.subgroups or None)


@dataclass(frozen=True, kw_only=True)
class AutoencoderExperiment:
    """Stage 1."""

    model: AutoencoderConfig
    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)
    kl_weight: float = 1e-6
    mse_weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LatentDiffusionExperiment:
    """Stage 2, on a trained first stage. The classes come from the data if none are named."""

    unet: UNetConfig
    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    t_bias: float = 1.0  # see losses.draw_t

    def model_config(
        self, autoencoder: AutoencoderConfig, classes: tuple[str, ...]
    ) -> LatentDiffusionConfig:
        """The model for that first stage; ValueError where the parts do not fit."""
        conditioner = self.conditioner
        if conditioner.kind == "class":
            conditioner = replace(conditioner, classes=tuple(classes))
        return LatentDiffusionConfig(
            autoencoder=autoencoder,
            unet=self.unet,
            conditioner=conditioner,
            image_size=self.data.size,
            t_bias=self.t_bias,
        )


@dataclass(frozen=True, kw_only=True)
class JudgeExperiment:
    """The classifier that says what is in a picture; trained on the data alone."""

    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)
    width: int = 32


# Subgroups with a clear look of their own, from six groups: what a few minutes can learn.
CLEAR_SUBGROUPS = (
    "face-smiling",
    "face-concerned",
    "heart",
    "person",
    "person-role",
    "animal-mammal",
    "plant-flower",
    "food-fruit",
    "transport-ground",
    "place-building",
    "clothing",
    "book-paper",
)

PRESETS: dict[str, AutoencoderExperiment | LatentDiffusionExperiment | JudgeExperiment] = {
    "emoji-kl-f4": AutoencoderExperiment(
        model=AutoencoderConfig(
            z_channels=3,
            width=32,
            width_mult=(1, 2),
            res_blocks=1,
            mid_attn=False,
            groups=8,
            patch=2,
            zero_init=True,
        ),
        train=TrainConfig(steps=2500, batch_size=8, lr=3e-3, ema_decay=0.995, save_every=200),
        mse_weight=10.0,
    ),
    "emoji-class": LatentDiffusionExperiment(
        unet=UNetConfig(
            in_channels=3,
            out_channels=3,
            width=32,
            width_mult=(1, 2, 3),
            res_blocks=1,
            attn_levels=(2,),
            heads=4,
            d_head=None,
            d_cond=128,
            groups=8,
        ),
        conditioner=ConditionerConfig(kind="class", d_cond=128),
        data=DataConfig(subgroups=CLEAR_SUBGROUPS),
        train=TrainConfig(steps=1150, lr=1.2e-3, ema_decay=0.997, save_every=50),
        t_bias=2.0,
    ),
    "emoji-kl-f4-gpu": AutoencoderExperiment(
        model=AutoencoderConfig(z_channels=3, width=64, width_mult=(1, 2, 4)),
        train=TrainConfig(steps=12_000, batch_size=64, lr=4e-4, ema_decay=0.999, save_every=500),
        mse_weight=10.0,
    ),
    "emoji-class-gpu": LatentDiffusionExperiment(
        unet=UNetConfig(
            in_channels=3,
            out_channels=3,
            width=128,
            width_mult=(1, 2, 3),
            attn_levels=(1, 2),
            d_cond=256,
            dropout=0.1,
        ),
        conditioner=ConditionerConfig(kind="class", d_cond=256),
        data=DataConfig(subgroups=CLEAR_SUBGROUPS),
        train=TrainConfig(steps=20_000, batch_size=256, lr=3e-4, save_every=500),
        t_bias=2.0,
    ),
    "emoji-judge": JudgeExperiment(
        train=TrainConfig(steps=2500, lr=2e-3, weight_decay=0.05, ema_decay=0.998),
    ),
}
