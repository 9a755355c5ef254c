"""The published latent diffusion models, whole: configs as the official YAML, tensors by name.

And each narrowed to a small one that runs: the same blocks, weights drawn.
"""

from collections.abc import Mapping
from typing import Any

import torch
from published import CONFIGS, drawn, listed_shapes, narrowed, official_config, official_shapes
from test_interop_conditioner import of_size
from test_interop_unet import narrow
from torch import Tensor

from minildm import NoiseSchedule

Shapes = dict[str, tuple[int, ...]]

WHOLE = {c["path"]: c for c in CONFIGS if "unet_config" in c}
RETRIEVAL = "configs/retrieval-augmented-diffusion/768x768.yaml"  # needs a database of pictures
TABLES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


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
    shapes: Shapes = dict.fromkeys(TABLES, (model["diffusion"]["timesteps"],))
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
    return {"model_ema." + n[6:].replace(".", ""): shape for n, shape in names.items()} | {
        "model_ema.decay": (),
        "model_ema.num_updates": (),
    }


# --- narrowed ---


def narrow_stage(stage: Mapping[str, Any], d_cond: int) -> tuple[Any, dict[str, Tensor]]:
    """`cond_stage_config` and its tensors; tokens have the width d_cond."""
    kind, params = stage["target"].rpartition(".")[2], dict(stage.get("hparams", {}))
    if kind == "ClassEmbedder":
        params["embed_dim"] = d_cond
        shapes = {"embedding.weight": (params.get("n_classes", 1000), d_cond)}
    elif kind == "BERTEmbedder":
        size = {"vocab_size": 30522, "max_seq_len": 77} | params
        params |= {"n_embed": d_cond, "n_layer": 1}
        shapes = of_size(**(size | params))
    elif kind == "SpatialRescaler":
        shapes = {"channel_mapper.weight": (3, 182, 1, 1)}
    else:
        return cond_stage({"cond_stage": stage | {"hparams": {}}}), {}
    return {"target": stage["target"], "params": params}, drawn(shapes, seed=2)


def narrow_whole(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and drawn tensors of a small model of the same blocks, with its averages."""
    config = whole_config(model)
    params, stage = config["model"]["params"], model["first_stage"]
    unet_params, unet = narrow(model)
    params["unet_config"]["params"] = unet_params
    params["first_stage_config"] = official_config(stage | {"base_learning_rate": 0.0}, narrowed)[
        "model"
    ]
    first_stage = drawn(official_shapes(stage, narrowed), seed=1)
    params["cond_stage_config"], conditions = narrow_stage(
        model["cond_stage"], unet_params.get("context_dim", 0)
    )
    if params["cond_stage_config"] == "__is_first_stage__":
        conditions = first_stage
    diffusion = model["diffusion"]
    ends = diffusion["timesteps"], diffusion["linear_start"], diffusion["linear_end"]
    tensors = {"alphas_cumprod": NoiseSchedule.scaled_linear(*ends).alphas_cumprod}
    tensors |= {f"model.diffusion_model.{name}": t for name, t in unet.items()}
    tensors |= {f"first_stage_model.{name}": t for name, t in first_stage.items()}
    tensors |= {f"cond_stage_model.{name}": t for name, t in conditions.items()}
    if diffusion["scale_by_std"]:
        tensors["scale_factor"] = drawn({"": (3,)})[""].abs().sum()
    return config, tensors


def with_averages(tensors: Mapping[str, Tensor], seed: int = 5) -> dict[str, Tensor]:
    """A checkpoint with averages, of other values than what they average."""
    shapes = averages({name: tuple(t.shape) for name, t in tensors.items()})
    drawn_ones = drawn({name: shape for name, shape in shapes.items() if shape}, seed)
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return {**tensors, **drawn_ones, **counters}
