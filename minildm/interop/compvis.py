"""Official models, as github.com/CompVis/latent-diffusion publishes them: loading and saving."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from minildm import conditioning as tau
from minildm.compression.autoencoder import Autoencoder, AutoencoderConfig
from minildm.conditioning.text_encoders import text_folders
from minildm.diffusion.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from minildm.diffusion.unet import UNet, UNetConfig
from minildm.files import atomic_write
from minildm.interop import engine, names
from minildm.interop.compvis_config import read_part, write_part
from minildm.interop.configs import reading
from minildm.interop.engine import PathLike, Place, Rules, Tensors, exported, fill, on_meta
from minildm.training.checkpoint import CheckpointError

FIRST_STAGE, UNET, CONDITION = "first_stage_model.", "model.diffusion_model.", "cond_stage_model."
CLIP, AVERAGES = f"{CONDITION}transformer.text_model.", "model_ema.diffusion_model"
# What inference does not need. The tables of the schedule follow from the config.
LOSS, NEXT_WORDS = r"loss\..*|model_ema\..*|colorize", r"transformer\.to_logits\..*"
UNUSED = (
    r"betas|lvlb_weights|logvar|(sqrt_|log_|one_minus_|recip_|recipm1_)*alphas_cumprod(_prev)?"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|model_ema\.(decay|num_updates)"
    rf"|{FIRST_STAGE}({LOSS})|{CONDITION}{NEXT_WORDS}|{CLIP}.*"
)


def load_compvis(
    config: PathLike | Mapping[str, Any],
    checkpoint: PathLike | Mapping[str, Tensor],
    *,
    ema: bool = True,
    clip: PathLike | None = None,
) -> LatentDiffusion | Autoencoder | UNet | tau.Conditioner:
    """Load an official model, or a part: a first stage, a UNet, an encoder of conditions.

    config: the official YAML, a path or the parsed mapping, whole or from its `target` on; the
    target says what is loaded (Stable Diffusion v1 is a whole model). checkpoint: a `.ckpt`, a
    `.safetensors`, or tensors by their official names; a first stage and an encoder are also
    found in a whole model's. ema: take the averaged weights of a whole model's UNet if there are
    any. clip: for Stable Diffusion, a folder with CLIP's config.json and tokenizer.

    The model is on the CPU, in float32 and in evaluation mode; a float32 file stays mapped into
    memory, so do not overwrite it meanwhile. A whole model's first stage has the scale
    1 / scale_factor. Raises ValueError for a config that cannot be expressed, CheckpointError (a
    ValueError) for tensors that do not fit, and for files that are damaged or would run code.
    """
    content, tensors = engine.read_mapping(config), engine.read_tensors(checkpoint)
    part = content.get("model", content)
    with reading("config" if isinstance(config, Mapping) else config):
        ours = read_part(part, clip)
    if isinstance(ours, LatentDiffusionConfig):
        model = _load_whole(ours, part["params"], tensors, ema)
    else:
        build, rules, prefix, unused = _part(ours)
        model = on_meta(build)
        inside = tensors.part(prefix) if prefix else None
        fill(model, rules.places(model), inside or tensors, unused, scale=1.0)
    text = getattr(model, "conditioner", model)
    text = getattr(text, "tokens", text)
    if isinstance(text, tau.TextConditioner):
        word_pieces = text_folders("minilm")[1] / "vocab.txt"  # BERT's
        text.set_tokenizer(tau.CaptionTokenizer.load(word_pieces))
    return model.eval()


def _part(config: Any) -> tuple[Callable[[], nn.Module], Rules, str, str]:
    """How to build a part, its names, its prefix in a whole model, and what it does not need."""
    if isinstance(config, AutoencoderConfig):
        rules = names.official_autoencoder(config)
        return lambda: Autoencoder(config), rules, FIRST_STAGE, LOSS
    if isinstance(config, UNetConfig):  # without a prefix: a whole model may also have averages
        return lambda: UNet(config), names.official_unet(), "", "$."
    return config.build, names.official_conditioner(), CONDITION, NEXT_WORDS


def _load_whole(
    config: LatentDiffusionConfig, params: Mapping[str, Any], tensors: Tensors, ema: bool
) -> LatentDiffusion:
    factor, by_std = params.get("scale_factor", 1.0), bool(params.get("scale_by_std"))
    factor = torch.as_tensor(tensors.get("scale_factor", 0.0) if by_std else factor).double()
    encoded = config.conditioner.kind == "inpaint"  # by the first stage, without a scale
    if factor.ndim or not (factor.is_meta or factor > 0) or (encoded and (by_std or factor != 1)):
        one = ", and 1 for inpainting" if encoded else ""
        raise CheckpointError(f"{tensors.source}: scale_factor={factor} must be positive{one}")
    parts = {name: on_meta(_part(getattr(config, name))[0]) for name in ("autoencoder", "unet")}
    conditioner = _conditioner(config.conditioner, tensors.part(CLIP))
    model = LatentDiffusion(config, **parts, conditioner=conditioner)
    averages = ema and any(name.startswith(AVERAGES) for name in tensors)
    unused = [UNUSED, rf"{UNET}.*" if averages else r"model_ema\..*"]
    unused += ["scale_factor"] * by_std + [rf"{CONDITION}.*"] * encoded  # a copy of the first stage
    fill(model, whole_places(model, averages), tensors, "|".join(unused), scale=1 / factor)
    table = tensors.get("alphas_cumprod", model.schedule.alphas_cumprod)
    if not table.is_meta and not torch.allclose(
        table.float(), model.schedule.alphas_cumprod, 0, 1e-3
    ):
        raise CheckpointError(f"{tensors.source}: alphas_cumprod are not of {config.schedule}")
    return model


def _conditioner(config: Any, clip: Tensors) -> tau.Conditioner:
    """On the meta device; a frozen encoder with its weights in the checkpoint, or its folder's."""
    if config.kind == "frozen_text" and clip:
        conditioner = tau.FrozenTextConditioner(config, empty=True)
        places = _clip_places(conditioner.network)
        fill(conditioner.network, places, clip, r".*position_ids")
        return conditioner
    frozen = getattr(config, "tokens", config).kind == "frozen_text"
    return config.build() if frozen else on_meta(config.build)


def _clip_places(clip: nn.Module, prefix: str = "") -> list[Place]:
    return Rules(engine.TABLES["names"]["clip"]).places(clip, theirs=prefix)


def whole_places(model: LatentDiffusion, averages: bool = False) -> list[Place]:
    """The places of all parts; averages: of the UNet's averaged weights, named without dots."""
    places = []
    for name in ("autoencoder", "unet", "conditioner"):
        part = getattr(model, name)
        _, rules, prefix, _ = _part(part.config)
        if name == "unet" and averages:
            rules, prefix = rules._replace(names={**rules.names, r"\.": ""}), AVERAGES
        places += rules.places(part, f"{name}.", prefix or UNET)
    return places


def save_compvis(
    model: LatentDiffusion | Autoencoder | UNet | tau.Conditioner,
    path: PathLike,
    *,
    scale_by_std: bool = False,
) -> None:
    """Write a model's tensors by their official names, and its official config next to them.

    path: a `.ckpt` or a `.safetensors`; the config has the same name and `.yaml`. `load_compvis`
    of both gives the same tensors. scale_by_std: scale_factor is a tensor, as in official models
    that measured it. A frozen CLIP is in the checkpoint, its tokenizer is not. Class names, own
    vocabularies and layouts have no official place: they become numbers. Raises ValueError naming
    the field that the official code cannot express, such as groups, patch, shift or predict="v".
    """
    path, whole = Path(path), isinstance(model, LatentDiffusion)
    if path.suffix not in (".ckpt", ".safetensors"):
        raise ValueError(f"path={path} must end in .ckpt or .safetensors")
    autoencoder = getattr(model, "autoencoder", model)
    shift, scale = (float(getattr(autoencoder, name, 0)) for name in ("shift", "scale"))
    if shift or (scale not in (0, 1) and not whole):
        raise ValueError(f"the official code cannot express {shift=}, nor {scale=} of a part alone")
    places = whole_places(model) if whole else _part(model.config)[1].places(model)
    if not places:
        raise ValueError("this part has no tensors: save the whole model")
    tensors = exported(model, places) | (_more_tensors(model) if whole else {})
    tensors |= {"scale_factor": torch.tensor(1 / scale)} if scale_by_std else {}
    factor = 1 / scale if whole and not scale_by_std else None
    part = {"model": write_part(model.config, factor=factor)}
    engine.write_tensors(path, tensors)
    with atomic_write(path.with_suffix(".yaml")) as file:
        file.write(yaml.safe_dump(part, sort_keys=False).encode())


def _more_tensors(model: LatentDiffusion) -> dict[str, Tensor]:
    """The schedule, a frozen CLIP, and the first stage again where it encodes the condition."""
    tensors = {"alphas_cumprod": model.schedule.alphas_cumprod}
    if isinstance(model.conditioner, tau.FrozenTextConditioner):
        clip = model.conditioner.network
        tensors |= exported(clip, _clip_places(clip, CLIP))
    if model.config.conditioner.kind == "inpaint":
        rules = _part(model.config.autoencoder)[1]
        places = rules.places(model.autoencoder, theirs=CONDITION)
        tensors |= exported(model.autoencoder, places)
    return tensors
