"""minildm: Latent Diffusion Models (Rombach et al., CVPR 2022), to read and to learn from."""

from minildm import interop
from minildm.autoencoder import Autoencoder, AutoencoderConfig
from minildm.checkpoints import load_model, pretrained, save_model
from minildm.conditioning import ConditionerConfig
from minildm.data.emoji import EmojiDataset
from minildm.data.folders import ImageFolder, torchvision_set
from minildm.data.photos import PhotoDataset, load_photo
from minildm.data.scenes import ScenesDataset
from minildm.diffusion import LatentDiffusion, LatentDiffusionConfig
from minildm.ema import EMA
from minildm.features import perceptual_distance
from minildm.guidance import guided
from minildm.losses import ldm_loss
from minildm.metrics import evaluate_first_stage, evaluate_pictures
from minildm.presets import PRESETS
from minildm.samplers import ddim, ddpm
from minildm.schedule import NoiseSchedule
from minildm.training import train_autoencoder, train_judge, train_ldm
from minildm.types import Batch, Conditioning, Prediction, Record, Step
from minildm.unet import UNet, UNetConfig

__all__ = [
    "EMA",
    "PRESETS",
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
    "PhotoDataset",
    "Prediction",
    "Record",
    "ScenesDataset",
    "Step",
    "UNet",
    "UNetConfig",
    "ddim",
    "ddpm",
    "evaluate_first_stage",
    "evaluate_pictures",
    "guided",
    "interop",
    "ldm_loss",
    "load_model",
    "load_photo",
    "perceptual_distance",
    "pretrained",
    "save_model",
    "torchvision_set",
    "train_autoencoder",
    "train_judge",
    "train_ldm",
]
