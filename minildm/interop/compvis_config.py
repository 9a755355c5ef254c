"""Official configs: what a `target` and its `params` build, and ours as such a part."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minildm import conditioning as tau
from minildm.compression.autoencoder import AutoencoderConfig
from minildm.diffusion.latent_diffusion import LatentDiffusionConfig
from minildm.diffusion.unet import UNetConfig
from minildm.interop import configs
from minildm.interop.engine import TABLES, PathLike, read_mapping
from minildm.training.configs import from_dict

DIFFUSION = "ldm.models.diffusion.ddpm.LatentDiffusion"
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
FIRST_STAGES, CONDITIONS = TABLES["first_stages"], TABLES["conditions"]
TARGETS = {kind: target for target, kind in (FIRST_STAGES | CONDITIONS).items()}
WORD_PIECES, IMAGENET = 30522, 1000  # BERT's uncased vocabulary; classes

Part = Mapping[str, Any]  # a target and its params


def read_part(part: Any, clip: PathLike | None = None) -> Any:
    """Our config of a whole model or of a part; ValueError names a key that cannot be expressed."""
    part = {"target": part} if isinstance(part, str) else part
    target, params = part.get("target"), part.get("params") or {}
    if target == DIFFUSION:
        return _read_diffusion(params, clip)
    if target == UNET:
        return configs.unet_of(configs.read_fields(UNET, params))
    if FIRST_STAGES.get(target) == "identity":
        return AutoencoderConfig(regularizer="identity", in_channels=3, z_channels=3)
    if target in FIRST_STAGES:
        return configs.autoencoder_of(configs.read_fields(target, params))
    if target in CONDITIONS:
        return _read_conditioner(target, params, clip)
    known = ", ".join((DIFFUSION, UNET, *FIRST_STAGES, *CONDITIONS))
    raise ValueError(f"target={target!r} is not known; known: {known}")


def write_part(config: Any, side: int = 256, factor: float | None = None) -> Any:
    """A target and its params, or a word; ValueError names a field that cannot be expressed.

    side: of the images. factor: a whole model's scale_factor; None if a tensor holds it.
    """
    with configs.reading("the official code"):
        if isinstance(config, LatentDiffusionConfig):
            return {"target": DIFFUSION, "params": _write_diffusion(config, factor)}
        if isinstance(config, UNetConfig):
            return {"target": UNET, "params": configs.write_part(UNET, config, side)}
        if not isinstance(config, AutoencoderConfig):
            return _write_conditioner(config)
        target, pixels = TARGETS[config.regularizer], config.regularizer == "identity"
        params = {} if pixels else configs.write_part(target, config, side)
        return {"target": target, "params": params}


def _read_conditioner(target: str, params: Part, clip: PathLike | None) -> tau.ConditionerConfig:
    kind, f = CONDITIONS[target], {}
    if not target.startswith("__"):
        f = configs.read_fields(target, params)
    if kind == "class":  # a table of 1001 has "no class" last, as in cin256-v2
        n = f.pop("rows")
        null = n == IMAGENET + 1
        f |= {"classes": [str(i) for i in range(n - null)], "null_class": null}
        f["p_uncond"] = 0.1 * null
    elif kind == "semantic":
        f["labels"] = [str(i) for i in range(f.pop("rows"))]
    elif kind == "frozen_text":
        path = Path(clip or params.get("version", ""), "config.json")
        if not path.is_file():
            raise ValueError(
                f"clip={clip!r} must be a folder with CLIP's config.json and tokenizer"
            )
        shape = read_mapping(path)  # of the text encoder, or with one for images
        d = shape.get("text_config", shape).get("hidden_size", 512)
        f |= {"encoder": "clip", "path": str(path.parent), "d_cond": d}
    elif kind == "text" and not f.pop("reads"):
        kind = "ids"
    return from_dict(tau.ConditionerConfig, {"kind": kind, **f})


def _write_conditioner(config: Any) -> Part | str:
    """Names of classes and own vocabularies become numbers."""
    kind, f = config.kind, vars(config) | {"reads": True}
    if kind == "hybrid" and config.concat.kind in ("low_res", "inpaint"):
        return _write_conditioner(config.tokens)
    if kind == "layout":
        kind, words = "ids", config.grid**2 + len(config.classes) + 1
        f |= {"vocab_size": words, "length": 3 * config.max_boxes}
    elif kind == "text" and config.vocab_size != WORD_PIECES:
        kind = "ids"
    elif kind == "class":
        f["rows"] = len(config.classes) + config.null_class
    elif kind == "semantic":
        f["rows"] = len(config.labels)
    odd = kind in ("text", "ids") and (config.heads, config.d_head) != (8, 64)
    if kind == "hybrid" or odd or getattr(config, "encoder", "clip") != "clip":
        only = "encoder='clip', heads=8 with d_head=64, low_res and inpaint in a hybrid"
        raise ValueError(f"cannot express {config}, only {only}")
    target = TARGETS[kind]
    if target.startswith("__"):
        return target
    return {"target": target, "params": configs.write_fields(target, f)}


def _read_diffusion(params: Part, clip: PathLike | None) -> LatentDiffusionConfig:
    f = configs.read_fields(DIFFUSION, params)
    parts = {name: read_part(f[name], clip) for name in ("autoencoder", "unet", "conditioner")}
    stage, unet, conditioner = parts.values()
    key = f.get("key") or ("concat" if f["concat_mode"] else "crossattn")
    concat = conditioner.concat_channels(1) > 0
    if conditioner.kind != "none" and concat != (key == "concat"):
        raise ValueError(f"conditioning_key={key!r} cannot be expressed with {f['conditioner']}")
    if key == "hybrid":  # an image, or a latent and a mask
        mask = unet.in_channels == 2 * stage.z_channels + 1
        image = tau.InpaintConfig() if mask else tau.LowResConfig()
        parts["conditioner"] = tau.HybridConfig(tokens=conditioner, concat=image)
    if f.get("c", 3) != stage.z_channels:
        raise ValueError(f"channels={f.get('c', 3)} must be {stage.z_channels}, the first stage's")
    schedule, objective = configs.timing_of(f)
    timing = {"schedule": schedule, "objective": objective}
    return LatentDiffusionConfig(**parts, **timing, image_size=f["side"] * stage.f)


def _write_diffusion(config: LatentDiffusionConfig, factor: float | None) -> dict[str, Any]:
    side, tokens = config.image_size // config.autoencoder.f, config.unet.d_cond is not None
    concat = config.unet.in_channels > config.unet.out_channels
    fields = configs.timing_fields(config) | {
        "side": side,
        "c": config.autoencoder.z_channels,
        "key": "hybrid" if tokens and concat else "crossattn" if tokens else None,
        "concat_mode": concat,
        "scale_by_std": factor is None,
        "scale_factor": factor or 1.0,
        "autoencoder": write_part(config.autoencoder, config.image_size),
        "unet": write_part(config.unet, side),
        "conditioner": write_part(config.conditioner),
    }
    params = configs.write_fields(DIFFUSION, fields)
    schedule, _ = configs.timing_of(configs.read_fields(DIFFUSION, params))
    configs.check_back(config.schedule, schedule)
    return params | {"use_ema": False}
