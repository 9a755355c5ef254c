"""What tests/official says of the published models: configs as the official YAML, tensors by name.

`narrow` makes small ones that run: the same blocks, weights redrawn.
"""

import ast
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minildm.diffusion.schedule import NoiseSchedule

OFFICIAL = Path(__file__).parents[1] / "official"
CONFIGS = {c["path"]: c for c in json.loads((OFFICIAL / "params.json").read_text())["configs"]}
TENSORS = json.loads((OFFICIAL / "tensors.json").read_text())  # hash -> ["name (shape)", ...]
FIRST_STAGES = {path: c for path, c in CONFIGS.items() if c["kind"].endswith(" first stage")}
RELEASED = {p.split("/")[2]: c for p, c in FIRST_STAGES.items() if p.startswith("models")}
WHOLE = {path: c for path, c in CONFIGS.items() if "unet_config" in c}
DIFFERENT_UNETS = {c["unet_state_dict"]["keys_sha256"]: path for path, c in WHOLE.items()}
RETRIEVAL = "configs/retrieval-augmented-diffusion/768x768.yaml"  # needs a database of images
BY_NAME = {path.split("/")[2].removesuffix(".yaml"): c for path, c in WHOLE.items()}
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
ENCODERS = "ldm.modules.encoders.modules"
TABLES = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
    *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod"),
    *("sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
)

Shapes = dict[str, tuple[int, ...]]
Size = Callable[[int], int]


def shapes_of(part: Mapping[str, Any]) -> Shapes:
    """The names and shapes that a state_dict entry of params.json stands for."""
    named = (line.split(" ", 1) for line in TENSORS[part["keys_sha256"]])
    return {name: ast.literal_eval(shape) for name, shape in named}


def on_meta(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def drawn(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of moderate gain; the codes of a codebook lie apart."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=draw)
        if len(shape) < 2:
            values = 0.5 + 0.3 * values
        elif "embedding" not in name:
            values /= values[0].numel() ** 0.5
        tensors[name] = values
    return tensors


def names_hash(tensors: Mapping[str, Tensor]) -> str:
    """The hash under which tensors.json lists names and shapes."""
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def quarter(n: int) -> int:
    """Narrows a first stage: the same network, small enough to run."""
    return n // 4 if n >= 64 else n


def whole(n: int) -> int:
    return n


def first_stage(stage: Mapping[str, Any], size: Size = whole) -> tuple[dict[str, Any], Shapes]:
    """The config and the shapes of a first stage."""
    shape = stage["ddconfig"] | {key: size(stage["ddconfig"][key]) for key in ("ch", "z_channels")}
    params = {"embed_dim": size(stage["embed_dim"]), "ddconfig": shape, "monitor": "val/rec_loss"}
    params["lossconfig"] = stage["lossconfig"]
    if stage["n_embed"] is not None:
        params["n_embed"] = size(stage["n_embed"])
    shapes = shapes_of(stage["state_dict"])
    narrowed = {name: tuple(map(size, s)) for name, s in shapes.items()}
    return {"target": stage["target"], "params": params}, narrowed


def unet(model: Mapping[str, Any], narrow: bool = False) -> tuple[dict[str, Any], Shapes]:
    """The config and the shapes of a UNet; narrow: 32 channels in the first level."""
    params, shapes = dict(model["unet_config"]), shapes_of(model["unet_state_dict"])
    if narrow:
        channels, d_cond = params["model_channels"], params.get("context_dim")

        def size(n: int) -> int:
            return n // channels * 32 if n % channels == 0 else 24 if n == d_cond else n

        for key in {"model_channels", "context_dim"} & params.keys():
            params[key] = size(params[key])
        params |= {"num_head_channels": 8} if "num_head_channels" in params else {}
        shapes = {name: tuple(map(size, shape)) for name, shape in shapes.items()}
    return {"target": UNET, "params": params}, shapes


def transformer_shapes(p: Mapping[str, int]) -> Shapes:
    """The shapes of an official transformer of these sizes, from the published layout model's."""
    listed = BY_NAME["layout2img-openimages256"]["cond_stage"]["state_dict"]
    d = p["n_embed"]
    size = {512: d, 2048: 4 * d, 8192: p["vocab_size"], 92: p["max_seq_len"]}
    shapes = {}
    for name, shape in shapes_of(listed).items():
        found = re.match(r".*\.layers\.(\d+)\.", name)
        if found and int(found[1]) >= 2 * p["n_layer"]:
            continue
        new = [size[n] for n in shape]
        if re.fullmatch(r".*\.to_[qkv]\.weight", name):  # 8 heads of 64, which is 512 as well
            new[0] = 512
        if name.endswith("to_out.weight"):
            new[1] = 512
        shapes[name] = tuple(new)
    return shapes


def condition(model: Mapping[str, Any], d_cond: int | None = None) -> tuple[Any, Shapes]:
    """`cond_stage_config` and shapes; d_cond: narrow, one layer deep."""
    stage = model["cond_stage"]
    if stage["target"].startswith("__"):
        return stage["target"], {}
    params = dict(stage.get("hparams", {}))
    shapes = shapes_of(stage["state_dict"]) if "state_dict" in stage else {}
    if d_cond and stage["target"].endswith("ClassEmbedder"):
        params["embed_dim"] = d_cond
        shapes = {"embedding.weight": (params.get("n_classes", 1000), d_cond)}
    elif d_cond and stage["target"].endswith("BERTEmbedder"):
        params |= {"n_embed": d_cond, "n_layer": 1}
        shapes = transformer_shapes({"vocab_size": 30522, "max_seq_len": 77} | params)
    return {"target": stage["target"], "params": params}, shapes


def whole_model(model: Mapping[str, Any], narrow: bool = False) -> tuple[dict[str, Any], Shapes]:
    """The parsed official YAML of a whole model, and the shapes of its checkpoint."""
    parts = {
        "model.diffusion_model.": unet(model, narrow),
        "first_stage_model.": first_stage(model["first_stage"], quarter if narrow else whole),
    }
    unet_part, stage = parts.values()
    d_cond = unet_part[0]["params"].get("context_dim", 1) if narrow else None
    parts["cond_stage_model."] = condition(model, d_cond)
    if model["cond_stage"]["target"] == "__is_first_stage__":  # one module under two names
        parts["cond_stage_model."] = ("__is_first_stage__", stage[1])
    params = {
        "image_size": unet_part[0]["params"]["image_size"],
        "channels": model["latent_shape"][0],
        "conditioning_key": model["conditioning_key_in_yaml"],
        "concat_mode": model["conditioning_key_effective"] == "concat",
        "cond_stage_key": model["cond_stage_key"],
        "cond_stage_trainable": model["cond_stage_trainable"],
        "first_stage_key": "image",
        "monitor": "val/loss_simple_ema",
        "scheduler_config": model["scheduler_config"],
        "unet_config": unet_part[0],
        "first_stage_config": stage[0],
        "cond_stage_config": parts["cond_stage_model."][0],
        **model["diffusion"],
    }
    shapes = {p + name: s for p, (_, found) in parts.items() for name, s in found.items()}
    shapes |= {"scale_factor": ()} if params["scale_by_std"] else {}
    config = {"base_learning_rate": 1e-6, "target": model["target"], "params": params}
    return {"model": config}, shapes


def averages(shapes: Shapes) -> Shapes:
    """What the averaging of a checkpoint's UNet adds; names without dots."""
    names = {n: s for n, s in shapes.items() if n.startswith("model.diffusion_model.")}
    short = {"model_ema." + n[len("model.") :].replace(".", ""): s for n, s in names.items()}
    return short | {"model_ema.decay": (), "model_ema.num_updates": ()}


def narrow(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and a checkpoint of a small model of the same blocks, without averages."""
    model = BY_NAME[name]
    config, shapes = whole_model(model, narrow=True)
    tensors = drawn(shapes)
    if model["cond_stage"]["target"] == "__is_first_stage__":
        stage = {n: t for n, t in tensors.items() if n.startswith("first_stage_model.")}
        tensors |= {n.replace("first_stage", "cond_stage"): t for n, t in stage.items()}
    if "scale_factor" in tensors:
        tensors["scale_factor"] = torch.tensor(0.7)
    diffusion = model["diffusion"]
    ends = diffusion["timesteps"], diffusion["linear_start"], diffusion["linear_end"]
    tensors["alphas_cumprod"] = NoiseSchedule.scaled_linear(*ends).alphas_cumprod
    return config, tensors
