"""minildm: Latent Diffusion Models (Rombach et al., CVPR 2022), to read and to learn from.

Names are imported at their first use, so that `import minildm` costs little more than torch.
"""

from importlib import import_module
from typing import Any

_NAMES = {  # by the module that defines them, or that they are
    "compression.autoencoder": "Autoencoder AutoencoderConfig",
    "compression.perceptual": "perceptual_distance",
    "conditioning": (
        "ClassConfig ConditionerConfig Conditioning FrozenTextConfig HybridConfig IdsConfig "
        "InpaintConfig LayoutConfig LowResConfig SemanticConfig TextConfig "
    ),
    "data.dataset": "ImageDataset as_float",
    "data.emoji": "EmojiDataset",
    "data.folder": "ImageFolder wrap_dataset",
    "data.photos": "PhotoDataset",
    "data.scenes": "ScenesDataset",
    "diffusion.guidance": "guided image_guided keep_known",
    "diffusion.latent_diffusion": "LatentDiffusion SamplingConfig seeded_noise",
    "diffusion.objective": "ObjectiveConfig draw_t ldm_loss time_weights",
    "diffusion.samplers": "SAMPLERS ddim ddpm dpm_solver_pp euler heun plms",
    "diffusion.schedule": "NoiseSchedule Prediction ScheduleConfig",
    "diffusion.unet": "UNet UNetConfig",
    "evaluation.metrics": (
        "evaluate_first_stage evaluate_images kid proxy_fid psnr reconstruct ssim "
    ),
    "evaluation.intervals": "Measured mean_interval proportion_interval",
    "files": "data_dir write_json",
    "interop": "interop",
    "sweeps": "run_sweep",
    "sweeps.report": "read_table",
    "sweeps.sweep": "Run Sweep read_sweep",
    "teaching.notebook": "setup",
    "teaching.plots": "plots",
    "training.checkpoint": "load_model pretrained save_model",
    "training.configs": (
        "AutoencoderExperiment ClassifierExperiment DataConfig LatentDiffusionExperiment "
        "TrainConfig override with_steps "
    ),
    "training.loop": "EMA Record describe pick_device read_log",
    "training.presets": "PRESETS PUBLISHED",
    "training.stages": "finish train_autoencoder train_classifier train_ldm",
}
_HOME_OF = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'minildm' has no attribute {name!r}")
    module = import_module(f"minildm.{_HOME_OF[name]}")
    return module if module.__name__.endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
