"""Experiments as data: which model, which pictures, how to train; an ablation is a `replace`."""

from dataclasses import dataclass, field, replace

from torch.utils.data import Dataset

from minildm.autoencoder import AutoencoderConfig
from minildm.conditioning import ConditionerConfig
from minildm.data.corruptions import DEGRADATIONS, MASKS
from minildm.data.crops import CropsDataset
from minildm.data.emoji import EmojiDataset
from minildm.data.folders import ImageFolder
from minildm.data.photos import PhotoDataset
from minildm.data.scenes import ScenesDataset
from minildm.diffusion import LatentDiffusionConfig, ScheduleConfig
from minildm.losses import AdversarialConfig, ObjectiveConfig
from minildm.unet import UNetConfig

DECAYS = ("cosine", "linear", "constant")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: the same fields for every model."""

    steps: int
    batch_size: int = 64  # of all processes together: see loop.optimise
    lr: float = 1e-3
    warmup_steps: int = 100  # linear, from 0
    decay: str = "cosine"  # or "linear", to zero after the last step; or "constant"
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
    # What these three cost and gain here, `make bench` shows.
    channels_last: bool = True  # the memory layout in which convolutions run fastest
    compile: bool = False  # torch.compile of the networks: minutes once, then faster on a GPU
    tf32: bool = True  # on a GPU: float32 products with 10 bits of mantissa

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.decay not in DECAYS:
            raise ValueError(f"decay={self.decay!r} is not known; known: {', '.join(DECAYS)}")
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ValueError(f"precision={self.precision!r} must be auto, fp32, bf16 or fp16")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures: "emoji", "scenes", "photos", or "folder" with the path of one."""

    kind: str = "emoji"
    size: int = 64
    styles: tuple[str, ...] = ()  # none named: all
    subgroups: tuple[str, ...] = ()  # none named: all with at least ten emoji
    unpaired: int = 0  # emoji: see EmojiDataset
    style_words: float = 0.0  # in what share of the captions training names the style
    degradation: str = "bicubic"  # what super-resolution is given; "spoiled": see corruptions
    masks: tuple[str, ...] = ("lama", "halves")  # what inpainting is given: see corruptions
    path: str = ""

    def __post_init__(self) -> None:
        known = ("emoji", "scenes", "photos", "folder")
        if self.kind not in known:
            raise ValueError(f"kind={self.kind!r} is not known; known: {', '.join(known)}")
        if self.degradation not in DEGRADATIONS:
            listed = ", ".join(DEGRADATIONS)
            raise ValueError(f"degradation={self.degradation!r} is not known; known: {listed}")
        if not self.masks or not set(self.masks) <= set(MASKS):
            raise ValueError(f"masks={self.masks} must be some of {', '.join(MASKS)}")
        if not 0 <= self.style_words <= 1:
            raise ValueError(f"style_words={self.style_words} must lie in [0, 1]")
        if (self.kind == "folder") != bool(self.path):
            raise ValueError(f"kind={self.kind!r} with path={self.path!r}: a folder needs a path")

    def dataset(self, split: str) -> EmojiDataset | ScenesDataset | PhotoDataset | ImageFolder:
        """The pictures of one split, "train" or "val"."""
        styles = self.styles or None
        if self.kind == "folder":
            return ImageFolder(self.path, self.size, split=split).checked()
        if self.kind == "photos":
            return PhotoDataset(split, self.size)
        if self.kind == "scenes":
            return ScenesDataset(split, self.size, styles=styles)
        return EmojiDataset(
            split,
            self.size,
            styles=styles,
            subgroups=self.subgroups or None,
            unpaired=self.unpaired,
        )


@dataclass(frozen=True, kw_only=True)
class AutoencoderExperiment:
    """Stage 1. The paper's loss is L1 + perceptual + adversarial + regulariser."""

    model: AutoencoderConfig
    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)
    kl_weight: float = 1e-6  # of a KL latent
    mse_weight: float = 0.0  # not the paper's: squared error beside L1
    codebook_weight: float = 1.0  # of a VQ latent
    restart_dead: int = 0  # VQ, not the paper's: steps until an unused code moves; 0: never
    perceptual_weight: float = 0.0  # 0: no perceptual term
    perceptual: str = "auto"  # which distance: see features.perceptual_distance
    adversarial: AdversarialConfig | None = None  # None: no discriminator

    def __post_init__(self) -> None:
        weights = ("kl_weight", "mse_weight", "codebook_weight", "perceptual_weight")
        for name in (*weights, "restart_dead"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.restart_dead and self.model.regularizer != "vq":
            raise ValueError(f"restart_dead={self.restart_dead} needs regularizer='vq'")
        if self.adversarial and self.train.precision == "fp16":
            raise ValueError("precision='fp16' does not go with adversarial: take bf16 or fp32")


@dataclass(frozen=True, kw_only=True)
class LatentDiffusionExperiment:
    """Stage 2, on a trained first stage. The classes come from the data if none are named."""

    unet: UNetConfig
    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    t_bias: float = 1.0  # see losses.draw_t
    # Not the paper's; scenes: so many steps first, on their objects alone, see ObjectsAlone
    alone_steps: int = 0

    def __post_init__(self) -> None:
        if self.alone_steps < 0:
            raise ValueError(f"alone_steps={self.alone_steps} must not be negative")
        if self.alone_steps and self.data.kind != "scenes":
            raise ValueError(
                f"alone_steps={self.alone_steps} needs data.kind='scenes', got {self.data.kind!r}"
            )

    def on_objects_alone(self) -> "LatentDiffusionExperiment":
        """The training that goes before this one."""
        train = replace(self.train, steps=self.alone_steps)
        return replace(self, train=train, alone_steps=0)

    def model_config(
        self,
        autoencoder: AutoencoderConfig,
        classes: tuple[str, ...] = (),
        vocab_size: int = 0,
        labels: tuple[str, ...] = (),
    ) -> LatentDiffusionConfig:
        """The model for that first stage; ValueError where the parts do not fit.

        classes: of the pictures, or of the objects in a layout; vocab_size: of the captions;
        labels: of the semantic maps.
        """
        conditioner = self.conditioner
        if conditioner.kind in ("class", "layout"):
            conditioner = replace(conditioner, classes=tuple(classes))
        if conditioner.concat == "semantic":
            conditioner = replace(conditioner, labels=tuple(labels))
        if conditioner.kind == "text":
            conditioner = replace(conditioner, vocab_size=vocab_size)
        return LatentDiffusionConfig(
            autoencoder=autoencoder,
            unet=self.unet,
            conditioner=conditioner,
            schedule=self.schedule,
            objective=self.objective,
            image_size=self.data.size,
            t_bias=self.t_bias,
        )


def as_regression(experiment: LatentDiffusionExperiment) -> LatentDiffusionExperiment:
    """The same network and data, but the answer is asked for at once: LDM Tab. 5's regression.

    A diffusion model that is only ever trained where z_t is nothing but noise, and says z0, learns
    the mean of all latents that go with the condition. Sample it with steps=1.
    """
    return replace(
        experiment,
        schedule=ScheduleConfig(T=2, zero_terminal_snr=True),
        objective=ObjectiveConfig(predict="z0"),
        t_bias=1e9,  # t = T - 1 always
    )


@dataclass(frozen=True, kw_only=True)
class JudgeExperiment:
    """The classifier that says what is in a picture, or in a box; trained on the data alone."""

    train: TrainConfig
    data: DataConfig = field(default_factory=DataConfig)
    width: int = 32
    crops: bool = False  # of scenes: the objects by their boxes, and "nothing"
    maps: bool = False  # of scenes: a label for each pixel, by a Segmenter of that width

    def __post_init__(self) -> None:
        if self.crops and self.maps:
            raise ValueError("crops=True and maps=True are two judges: choose one")
        if (self.crops or self.maps) and self.data.kind != "scenes":
            asked = "crops" if self.crops else "maps"
            raise ValueError(f"{asked}=True needs data.kind='scenes', got {self.data.kind!r}")

    def dataset(self, split: str) -> Dataset:
        """The pictures of one split, or the crops of its scenes."""
        data = self.data.dataset(split)
        return CropsDataset(data) if self.crops else data
