"""minildm: Latent Diffusion Models (Rombach et al., CVPR 2022), to read and to learn from."""

from minildm import interop
from minildm.autoencoder import Autoencoder, AutoencoderConfig
from minildm.checkpoints import load_model, pretrained, save_model
from minildm.conditioning import ConditionerConfig
from minildm.data.emoji import EmojiDataset
from minildm.data.folders import ImageFolder, torchvision_set
from minildm.data.photos import PhotoDataset, load_photo
from minildm.data.scenes import ScenesDataset
from minildm.diffusion import LatentDiffusion, LatentDiffusionConfig, ScheduleConfig
from minildm.ema import EMA
from minildm.features import perceptual_distance
from minildm.guidance import guided, image_guided, keep_known
from minildm.losses import ObjectiveConfig, ldm_loss, time_weights
from minildm.metrics import evaluate_first_stage, evaluate_pictures
from minildm.presets import PRESETS
from minildm.published import PUBLISHED
from minildm.samplers import (
    SAMPLERS,
    ddim,
    ddim_inversion,
    ddpm,
    dpm_solver_pp,
    euler,
    heun,
    plms,
    slerp,
)
from minildm.schedule import NoiseSchedule
from minildm.sweeps import SWEEPS, Run, Sweep, read_sweep, run_sweep
from minildm.training import train_autoencoder, train_judge, train_ldm
from minildm.types import Batch, Conditioning, Prediction, Record, Step
from minildm.unet import UNet, UNetConfig

__all__ = [
    "EMA",
    "PRESETS",
    "PUBLISHED",
    "SAMPLERS",
    "SWEEPS",
    "Autoencoder",
    "AutoencoderConfig",
    "Batch",
    "ConditionerConfig",
    "Conditioning",
    "EmojiDataset",
    "ImageFolder",
    "LatentDiffusion",
    "LatentDiffusionConfig",
    "NoiseSchedule",
    "ObjectiveConfig",
    "PhotoDataset",
    "Prediction",
    "Record",
    "Run",
    "ScenesDataset",
    "ScheduleConfig",
    "Step",
    "Sweep",
    "UNet",
    "UNetConfig",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "dpm_solver_pp",
    "euler",
    "evaluate_first_stage",
    "evaluate_pictures",
    "guided",
    "heun",
    "image_guided",
    "interop",
    "keep_known",
    "ldm_loss",
    "load_model",
    "load_photo",
    "perceptual_distance",
    "plms",
    "pretrained",
    "read_sweep",
    "run_sweep",
    "save_model",
    "slerp",
    "time_weights",
    "torchvision_set",
    "train_autoencoder",
    "train_judge",
    "train_ldm",
]
