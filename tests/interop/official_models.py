"""What tests/official says of the published models: configs as YAML has them, tensors by name.

And small models of ours that the official code can express.
"""

import ast
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from helpers import shaken
from torch import Tensor, nn

from minildm import interop
from minildm.compression.autoencoder import AutoencoderConfig
from minildm.conditioning import ConditionerConfig
from minildm.diffusion.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from minildm.diffusion.unet import UNetConfig
from minildm.interop.weights import read_tensors

OFFICIAL = Path(__file__).parents[1] / "official"
CONFIGS = {c["path"]: c for c in json.loads((OFFICIAL / "params.json").read_text())["configs"]}
TENSORS = json.loads((OFFICIAL / "tensors.json").read_text())  # hash -> ["name (shape)", ...]
FIRST_STAGES = {path: c for path, c in CONFIGS.items() if c["kind"].endswith(" first stage")}
BY_NAME = {
    path.split("/")[2].removesuffix(".yaml"): c
    for path, c in CONFIGS.items()
    if "unet_config" in c and "768x768" not in path  # that one needs a database of images
}
UNET_TARGET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
KL = AutoencoderConfig(z_channels=3, channels=32, channel_mult=(1, 2), num_res_blocks=1)
UNET = UNetConfig(
    in_channels=3, out_channels=3, channels=32, channel_mult=(1, 2), attn_levels=(1,), d_head=8
)

Part = tuple[Any, dict[str, Tensor]]  # an official config, tensors on the meta device


def on_meta(part: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that a state_dict entry of params.json stands for."""
    named = (line.split(" ", 1) for line in TENSORS[part["keys_sha256"]])
    return {n: torch.empty(ast.literal_eval(shape), device="meta") for n, shape in named}


def names_hash(tensors: Mapping[str, Tensor]) -> str:
    """The hash under which tensors.json lists names and shapes."""
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def first_stage(stage: Mapping[str, Any]) -> Part:
    params = {key: stage[key] for key in ("embed_dim", "ddconfig", "lossconfig")}
    params |= {"monitor": "val/rec_loss"}
    params |= {"n_embed": stage["n_embed"]} if stage["n_embed"] is not None else {}
    return {"target": stage["target"], "params": params}, on_meta(stage["state_dict"])


def condition(model: Mapping[str, Any]) -> Part:
    stage = model["cond_stage"]
    if stage["target"] == "__is_first_stage__":  # one module under two names
        return stage["target"], on_meta(model["first_stage"]["state_dict"])
    if stage["target"].startswith("__"):
        return stage["target"], {}
    tensors = on_meta(stage["state_dict"]) if "state_dict" in stage else {}
    return {"target": stage["target"], "params": stage.get("hparams", {})}, tensors


def whole_model(model: Mapping[str, Any]) -> Part:
    """The parsed official YAML of a whole model, and its checkpoint with averages and tables."""
    unet = {"target": UNET_TARGET, "params": model["unet_config"]}
    parts = {
        "model.diffusion_model.": (unet, on_meta(model["unet_state_dict"])),
        "first_stage_model.": first_stage(model["first_stage"]),
        "cond_stage_model.": condition(model),
    }
    _, stage_config, cond_config = (config for config, _ in parts.values())
    params = {
        "image_size": model["unet_config"]["image_size"],
        "channels": model["latent_shape"][0],
        "conditioning_key": model["conditioning_key_in_yaml"],
        "concat_mode": model["conditioning_key_effective"] == "concat",
        "first_stage_key": "image",
        "monitor": "val/loss_simple_ema",
        "unet_config": unet,
        "first_stage_config": stage_config,
        "cond_stage_config": cond_config,
        **{k: model[k] for k in ("cond_stage_key", "cond_stage_trainable", "scheduler_config")},
        **model["diffusion"],
    }
    tensors = {prefix + n: t for prefix, (_, found) in parts.items() for n, t in found.items()}
    tensors["betas"] = torch.empty(1000, device="meta")
    tensors |= {"scale_factor": torch.tensor(0.7)} if params["scale_by_std"] else {}
    tensors |= averages(tensors) if params["use_ema"] else {}
    config = {"base_learning_rate": 1e-6, "target": model["target"], "params": params}
    return {"model": config}, tensors


def averages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the averaging of a checkpoint's UNet adds: twice the values, names without dots."""
    prefix = "model.diffusion_model."
    found = {n: 2 * t for n, t in tensors.items() if n.startswith(prefix)}
    found = {"model_ema." + n[len("model.") :].replace(".", ""): t for n, t in found.items()}
    return found | dict.fromkeys(("model_ema.decay", "model_ema.num_updates"), torch.ones(()))


def saved(model: nn.Module, folder: Path) -> Part:
    """The official config and tensors of a model of ours."""
    interop.save_compvis(model, folder / "saved.ckpt")
    config = yaml.safe_load((folder / "saved.yaml").read_text())["model"]
    return config, read_tensors(folder / "saved.ckpt")


def whole(conditioner: ConditionerConfig, **changes: Any) -> LatentDiffusion:
    """A small model of ours for 16 x 16 images, with random weights."""
    channels = 3 + conditioner.concat_channels(3)
    unet = replace(UNET, d_cond=conditioner.d_cond, in_channels=channels)
    parts = {"autoencoder": KL, "unet": unet, "conditioner": conditioner, "image_size": 16}
    return shaken(LatentDiffusion(LatentDiffusionConfig(**parts | changes))).eval()
