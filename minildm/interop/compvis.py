"""Official models, as github.com/CompVis/latent-diffusion publishes them: loading and saving."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from minildm import conditioning as tau
from minildm.compression.autoencoder import Autoencoder, AutoencoderConfig
from minildm.conditioning.text_encoders import text_folders
from minildm.diffusion.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from minildm.diffusion.unet import UNet, UNetConfig
from minildm.files import atomic_write
from minildm.interop import configs, weights
from minildm.interop.weights import NAMES, TABLES, fill
from minildm.training.checkpoint import on_meta, reader_of, reading
from minildm.training.configs import from_dict, to_dict

DIFFUSION = "ldm.models.diffusion.ddpm.LatentDiffusion"
INPAINT = "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"  # of Stable Diffusion
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
FIRST_STAGES, CONDITIONS = TABLES["first_stages"], TABLES["conditions"]
TARGETS = {kind: target for target, kind in (FIRST_STAGES | CONDITIONS).items()}
CLASSES = {AutoencoderConfig: ("autoencoder", Autoencoder), UNetConfig: ("unet", UNet)}
PREFIXES: dict[str, str] = TABLES["prefixes"]  # of the three parts
CLIP = "cond_stage_model.transformer.text_model."


def load_compvis(
    config: str | Path | Mapping[str, Any],
    checkpoint: str | Path | Mapping[str, Tensor],
    *,
    clip: str | Path | None = None,
) -> LatentDiffusion | Autoencoder | UNet | tau.Conditioner:
    """Load an official model, or a part of one: a first stage, a UNet, an encoder of conditions.

    config: the official YAML, or the parsed mapping, whole or from a `target` on, which says what
    is loaded. checkpoint: a `.ckpt`, a `.safetensors`, or tensors by their official names, of the
    part or of a whole model; averages of the UNet are preferred. clip: for Stable Diffusion, a
    folder with CLIP's config.json and tokenizer, unless the config's `version` is one.

    The result is on the CPU, in float32 and in evaluation mode. Raises CheckpointError (a
    ValueError) for a config that cannot be expressed, tensors that do not fit or have another
    schedule, and files that are damaged or would run code.
    """
    content, tensors = weights.read_mapping(config), weights.read_tensors(checkpoint)
    part = content.get("model", content)
    with reading("config" if isinstance(config, Mapping) else config):
        ours = read_part(part, clip)
        ours = from_dict(type(ours), to_dict(ours) | content.get("minildm", {}))  # with names
    with reading("checkpoint" if isinstance(checkpoint, Mapping) else checkpoint):
        parts = {name: _built(own, tensors) for name, own in _parts(ours).items()}
        first, *_ = known = tuple(PREFIXES[name] for name in parts)
        if not any(name.startswith(known) for name in tensors):  # the file of one part
            tensors = {first + name: tensor for name, tensor in tensors.items()}
        used = tuple(PREFIXES[name] for name, own in parts.items() if list(own.parameters()))
        inside = {name: tensor for name, tensor in tensors.items() if name.startswith(used)}
        for name in _views(parts):
            average = "model_ema." + name.removeprefix("model.").replace(".", "")
            if average in tensors:
                inside[name] = tensors[average]
        params = part.get("params") or {}
        by_std = params.get("scale_by_std")
        factor = float(tensors["scale_factor"] if by_std else params.get("scale_factor", 1.0))
        fill(nn.ModuleDict(parts), _views, inside, factor)
        model = LatentDiffusion(ours, **parts) if len(parts) > 1 else parts.popitem()[1]
        table = tensors.get("alphas_cumprod") if isinstance(model, LatentDiffusion) else None
        if table is not None and not table.allclose(model.schedule.alphas_cumprod, 1e-3, 0):
            raise ValueError(f"alphas_cumprod are not of the config's schedule, {ours.schedule}")
    if reader := reader_of(model):
        word_pieces = text_folders("minilm")[1] / "vocab.txt"  # BERT's
        reader.set_tokenizer(tau.CaptionTokenizer.load(word_pieces))
    return model.eval()


def _parts(whole: Any) -> dict[str, Any]:
    """The parts of a model, or of a config, by name; of a part alone, itself."""
    if hasattr(whole, "unet"):
        return {name: getattr(whole, name) for name in PREFIXES}
    name, _ = CLASSES.get(type(getattr(whole, "config", whole)), ("conditioner", None))
    return {name: whole}


def _built(config: Any, tensors: Mapping[str, Any]) -> Any:
    """A part to fill; a frozen CLIP has its weights, of the checkpoint or else of its folder."""
    if type(config) in CLASSES:
        return on_meta(CLASSES[type(config)][1], config)
    if config.kind == "hybrid":
        return on_meta(config.conditioner, config, _built(config.tokens, tensors))
    if config.kind != "frozen_text":
        return on_meta(config.build)
    own = {k.partition("transformer.")[2]: v for k, v in tensors.items() if k.startswith(CLIP)}
    return tau.FrozenTextConditioner(config, own or None)


def _views(
    parts: Mapping[str, nn.Module], prefixes: Mapping[str, str] = PREFIXES
) -> dict[str, Tensor]:
    """The official tensors of a model's parts, as `weights.views`."""
    found = {}
    for name, part in parts.items():
        names = NAMES[f"official_{name}"]
        if name == "autoencoder":
            names = weights.numbered(part, reverse="decoder.levels") | names
        elif name == "conditioner":
            names = {r"network\.blocks\.(\d+)\.(norm\d|attn|ff\.\d)": _layer} | names
        flat = int(name == "unet")  # its attention consists of convolutions over flattened pixels
        found |= weights.views(part, {**names, "^": prefixes[name]}, flat)
    return found


def _layer(found: re.Match[str]) -> str:
    """The name of a part of a transformer: attention and feed-forward alternate in one list."""
    second, part = NAMES["official_layers"][found[2]]
    return f"transformer.attn_layers.layers.{2 * int(found[1]) + second}.{part}"


def save_compvis(
    model: LatentDiffusion | Autoencoder | UNet | tau.Conditioner, path: str | Path
) -> None:
    """Write a model's tensors by their official names, and next to them its config, a `.yaml`.

    path: a `.safetensors`; any other, such as a `.ckpt`, is a pickle. Names of classes and layouts
    become numbers, which `load_compvis` turns back, as the YAML's `minildm` keeps them; own
    vocabularies become numbers for good, and of a frozen CLIP only the weights are saved. Raises
    ValueError naming what the official code cannot express, such as groups and patch.
    """
    path, parts = Path(path), _parts(model)
    stage, whole = parts.get("autoencoder"), len(parts) > 1
    shift, scale = (float(stage.shift), float(stage.scale)) if stage else (0.0, 1.0)
    if shift or (scale != 1 and not whole):
        raise ValueError(f"the official code cannot express {shift=}, nor {scale=} of a part alone")
    prefixes = PREFIXES if whole else dict.fromkeys(parts, "")
    tensors = weights.exported(_views(parts, prefixes))
    reader = parts.get("conditioner")
    if isinstance(reader := getattr(reader, "tokens", reader), tau.FrozenTextConditioner):
        tensors |= weights.exported(weights.views(reader.network, NAMES["clip"]))
    with reading("the official code"):
        part = write_part(model.config, factor=1 / scale)
        configs.check_same(model.config, read_part(part))
    content = {"model": part}
    if whole:
        tensors["alphas_cumprod"] = model.schedule.alphas_cumprod
        if reader.config.names:
            content["minildm"] = {"conditioner": to_dict(model.config.conditioner)}
    weights.write_tensors(path, tensors)
    with atomic_write(path.with_suffix(".yaml")) as file:
        file.write(yaml.safe_dump(content, sort_keys=False).encode())


# --- configs ---


def read_part(part: Any, clip: str | Path | None = None) -> Any:
    """Our config of a target and its params, or of a word; ValueError names what does not fit."""
    part = {"target": part} if isinstance(part, str) else part
    target, params = part.get("target"), part.get("params") or {}
    tau.look_up(target, (DIFFUSION, INPAINT, UNET, *FIRST_STAGES, *CONDITIONS), "target")
    fields = configs.read_fields(target, params)
    if target in (DIFFUSION, INPAINT):
        parts = {name: read_part(fields[name], clip) for name in PREFIXES}
        if target == INPAINT:
            hybrid = {"tokens": parts["conditioner"], "concat": configs.STABLE_INPAINT}
            parts["conditioner"] = tau.HybridConfig(**hybrid)
        scales = params.get("scale_by_std") or fields.get("scale_factor", 1) != 1
        if parts["conditioner"].kind == "inpaint" and scales:
            raise ValueError("scale_factor must be 1 for inpainting: it does not scale conditions")
        return configs.whole(fields, parts)
    if FIRST_STAGES.get(target) == "identity":
        return AutoencoderConfig(regularizer="identity", in_channels=3, z_channels=3)
    if target == UNET or target in FIRST_STAGES:
        return configs.config_of(fields)
    kind = CONDITIONS[target]
    rows = [str(i) for i in range(min(fields.pop("rows", 0), 10_001))]  # tensors refuse more
    if kind == "class":  # a table of 1001 has "no class" last, as in cin256-v2
        null = len(rows) == 1001
        fields |= {"classes": rows[: len(rows) - null], "null_class": null, "p_uncond": 0.1 * null}
    elif kind == "semantic":
        fields["labels"] = rows
    elif kind == "frozen_text":
        path = clip or fields.get("path", "")
        card = text_folders("clip", path)[0] / "config.json"
        if not card.is_file():
            raise ValueError(f"clip={clip} must be a folder with CLIP's config.json and tokenizer")
        card = weights.read_mapping(card)
        d_cond = card.get("text_config", card).get("hidden_size", 512)
        fields |= {"encoder": "clip", "path": str(path), "d_cond": d_cond}
    elif kind == "text" and not fields.pop("reads", True):
        kind = "ids"
    return from_dict(tau.ConditionerConfig, {"kind": kind, **fields})


def write_part(config: Any, side: int = 64, factor: float = 1.0) -> Any:
    """A target and its params, or a word; names of classes and own vocabularies become numbers.

    side: of the latents. factor: a whole model's scale_factor.
    """
    if isinstance(config, LatentDiffusionConfig):
        unet, side = config.unet, config.image_size // config.autoencoder.f
        targets = {None: DIFFUSION, configs.STABLE_INPAINT: INPAINT}  # of a hybrid
        target = targets[getattr(config.conditioner, "concat", None)]
        fields = vars(config.schedule) | vars(config.objective)
        fields |= {"side": side, "channels": unet.out_channels}
        concat = "concat" if unet.in_channels > unet.out_channels else None
        fields |= {"key": "crossattn" if unet.d_cond else concat, "scale_factor": factor}
        fields |= {name: write_part(part, side) for name, part in _parts(config).items()}
    elif isinstance(config, UNetConfig):
        target, fields = UNET, configs.fields_of(config, side)
    elif isinstance(config, AutoencoderConfig):
        target, fields = TARGETS[config.regularizer], configs.fields_of(config, side=256)
    else:
        config = getattr(config, "tokens", config)  # of a hybrid
        kind, fields = config.kind, dict(vars(config))
        if kind == "class":
            fields["rows"] = len(config.classes) + config.null_class
        elif kind == "semantic":
            fields["rows"] = len(config.labels)
        elif kind in ("layout", "text", "ids"):
            fields |= {"vocab_size": config.vocab_size, "length": config.length}
            berts = (kind, config.vocab_size) == ("text", 30522)  # its uncased vocabulary
            kind = "text" if berts else "ids"
        target = TARGETS[kind]
    params = configs.write_fields(target, fields)
    if "double_z" in params:
        top = {k: params.pop(k) for k in ("embed_dim", "n_embed", "lossconfig") if k in params}
        params = top | {"ddconfig": params}
    return target if target.startswith("__") else {"target": target, "params": params}
