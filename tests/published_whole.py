"""The published latent diffusion models, whole: configs as the official YAML, tensors by name."""

from collections.abc import Mapping
from typing import Any

from published import CONFIGS, listed_shapes, official_config

from minildm.interop.compvis_diffusion import averaged

Shapes = dict[str, tuple[int, ...]]

WHOLE = {c["path"]: c for c in CONFIGS if "unet_config" in c}
RETRIEVAL = "configs/retrieval-augmented-diffusion/768x768.yaml"  # needs a database of pictures
TABLES = (
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod "
    "posterior_variance posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2"
).split()


def cond_stage(model: Mapping[str, Any]) -> Any:
    stage = model["cond_stage"]
    if stage["target"].startswith("__"):
        return stage["target"]
    return {"target": stage["target"], "params": stage["hparams"]}


def whole_config(model: Mapping[str, Any]) -> dict[str, Any]:
    """The parsed official YAML of a whole model."""
    diffusion, rate = model["diffusion"], {"base_learning_rate": 0.0}
    params = {
        "image_size": model["unet_config"]["image_size"],
        "channels": model["latent_shape"][0],
        "conditioning_key": model["conditioning_key_in_yaml"],
        "concat_mode": model["conditioning_key_effective"] == "concat",
        "cond_stage_key": model["cond_stage_key"],
        "cond_stage_trainable": model["cond_stage_trainable"],
        "first_stage_key": "image",
        "monitor": "val/loss_simple_ema",
        "scheduler_config": model["scheduler_config"],
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": model["unet_config"],
        },
        "first_stage_config": official_config(model["first_stage"] | rate)["model"],
        "cond_stage_config": cond_stage(model),
        **diffusion,
    }
    target = {"base_learning_rate": model["base_learning_rate"], "target": model["target"]}
    return {"model": {**target, "params": params}}


def whole_shapes(model: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a whole checkpoint."""
    first_stage = listed_shapes(model["first_stage"]["state_dict"]["keys_sha256"])
    unet = listed_shapes(model["unet_state_dict"]["keys_sha256"])
    shapes: Shapes = {name: (model["diffusion"]["timesteps"],) for name in TABLES}
    shapes |= {f"model.diffusion_model.{name}": shape for name, shape in unet.items()}
    shapes |= {f"first_stage_model.{name}": shape for name, shape in first_stage.items()}
    conditions: Shapes = {}
    if model["cond_stage"]["target"] == "__is_first_stage__":  # one module under two names
        conditions = first_stage
    elif "state_dict" in model["cond_stage"]:
        conditions = listed_shapes(model["cond_stage"]["state_dict"]["keys_sha256"])
    shapes |= {f"cond_stage_model.{name}": shape for name, shape in conditions.items()}
    if model["diffusion"]["use_ema"]:
        shapes |= averages(shapes)
    if model["diffusion"]["scale_by_std"]:
        shapes["scale_factor"] = ()
    return shapes


def averages(shapes: Shapes) -> Shapes:
    """What the averaging of a checkpoint's UNet adds."""
    names = {n: s for n, s in shapes.items() if n.startswith("model.diffusion_model.")}
    return {averaged(name): shape for name, shape in names.items()} | {
        "model_ema.decay": (),
        "model_ema.num_updates": (),
    }
