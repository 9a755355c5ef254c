"""Official latent diffusion models, whole: what their configs say, and what a checkpoint holds.

A checkpoint holds the UNet twice where its weights were averaged: as trained, and the averages,
whose names have lost their dots. Both stages and the encoder of conditions are parts of it.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minildm.autoencoder import Autoencoder, AutoencoderConfig
from minildm.checkpoints import CheckpointError, reader_of
from minildm.conditioning import Conditioner, FrozenTextConditioner, build_conditioner
from minildm.diffusion import LatentDiffusion, LatentDiffusionConfig, ScheduleConfig
from minildm.frozen_text import FrozenText, clip_to_fill, frozen_text, minilm_files
from minildm.interop import compvis_autoencoder, compvis_conditioner, compvis_unet
from minildm.interop.compvis_autoencoder import FIRST_STAGE, autoencoder_config, own_buffers
from minildm.interop.compvis_conditioner import conditioner_config
from minildm.interop.compvis_unet import unet_config
from minildm.interop.places import Place, below, empty, fill
from minildm.interop.reading import PathLike, Section, Tensors
from minildm.losses import ObjectiveConfig
from minildm.tau_theta import ConditionerConfig
from minildm.tokenizer import CaptionTokenizer
from minildm.unet import UNet, UNetConfig

TARGET = "ldm.models.diffusion.ddpm.LatentDiffusion"
CLIP = "ldm.modules.encoders.modules.FrozenCLIPEmbedder"
UNET, AVERAGES = compvis_unet.IN_WHOLE_MODEL, "model_ema."
CONDITIONS = compvis_conditioner.IN_WHOLE_MODEL
CLIP_TEXT = f"{CONDITIONS}transformer.text_model."

# What inference does not need. First the table of betas: it is compared with the config's.
_ALPHAS = "alphas_cumprod"
_UNUSED = (
    rf"(sqrt_|log_|one_minus_|recip_|recipm1_)*{_ALPHAS}(_prev)?",
    r"betas|lvlb_weights|posterior_(variance|log_variance_clipped|mean_coef[12])",
    r"logvar",  # a loss that learns how much each time counts
    rf"{AVERAGES}(decay|num_updates)",
    rf"{FIRST_STAGE}(loss\..*|{AVERAGES}.*|colorize)",
    rf"{CONDITIONS}transformer\.to_logits\..*",  # the scores of next words
    rf"{CLIP_TEXT}embeddings\.position_ids",  # 0, 1, 2, ...
)
UNUSED = re.compile(f"({'|'.join(_UNUSED)})$")

KINDS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "cosine"}
PREDICTS = {"eps": "eps", "x0": "z0"}
_ONLY = {  # what the official code could also do, and no published model does
    "given_betas": None,
    "v_posterior": 0.0,
    "cosine_s": 8e-3,
    "num_timesteps_cond": 1,
    "cond_stage_forward": None,
    "use_positional_encodings": False,
}
_TRAINING = (  # and logging, and which weights that code starts from or prefers
    *("ckpt_path", "ignore_keys", "load_only_unet", "monitor", "use_ema", "log_every_t"),
    *("clip_denoised", "original_elbo_weight", "l_simple_weight", "scheduler_config"),
    *("learn_logvar", "logvar_init", "first_stage_key", "cond_stage_key", "cond_stage_trainable"),
)


def load_diffusion(
    params: Section, tensors: Tensors, *, ema: bool, clip: PathLike | None
) -> LatentDiffusion:
    """A whole model with its official weights; see `load_compvis`."""
    config, scale_factor = diffusion_config(params, clip=clip)
    by_std = scale_factor is None
    if by_std:
        scale_factor = _measured_scale_factor(tensors)
    names = {str(name) for name in tensors.named}
    ema = ema and any(name.startswith(f"{AVERAGES}diffusion_model") for name in names)
    has_clip = any(name.startswith(CLIP_TEXT) for name in names)
    model = _empty(config, clip_from_folder=not has_clip)
    whole = torch.nn.ModuleDict({"model": model})
    if network := clip_of(model) if has_clip else None:
        whole["clip"] = network
    own = {f"model.autoencoder.{k}": v for k, v in own_buffers(model.autoencoder).items()}
    own["model.autoencoder.scale"] = (1 / scale_factor.double()).float()
    places = tuple(diffusion_places(config, ema=ema, clip=network))
    spare = _spare(config, params, ema=ema) | ({"scale_factor": ""} if by_std else {})
    fill(whole, places, tensors, own=own, unused=UNUSED, spare=spare)
    _check_table(model, tensors)
    _check_copies(spare, tensors)
    if (reader := reader_of(model)) is not None:
        reader.set_tokenizer(CaptionTokenizer.word_pieces(minilm_files() / "vocab.txt"))
    return model.eval()


def clip_of(model: LatentDiffusion) -> torch.nn.Module | None:
    """The network of a frozen CLIP, which is among no model's tensors; None where there is none."""
    conditioner = getattr(model.conditioner, "tokens", model.conditioner)
    if not isinstance(conditioner, FrozenTextConditioner) or conditioner.config.encoder != "clip":
        return None
    return conditioner.network.network


def _empty(config: LatentDiffusionConfig, *, clip_from_folder: bool) -> LatentDiffusion:
    """On the meta device, but for the schedule, and a CLIP whose weights are in its folder."""
    return LatentDiffusion(
        config,
        autoencoder=empty(lambda: Autoencoder(config.autoencoder)),
        unet=empty(lambda: UNet(config.unet)),
        conditioner=_empty_conditioner(config.conditioner, clip_from_folder=clip_from_folder),
    )


def _empty_conditioner(config: ConditionerConfig, *, clip_from_folder: bool) -> Conditioner:
    if config.encoder != "clip":
        return empty(lambda: build_conditioner(config))
    read = _clip_in_folder if clip_from_folder else clip_to_fill
    return FrozenTextConditioner(config, read(config.encoder_path))


def _clip_in_folder(path: str) -> FrozenText:
    return frozen_text("clip", path)


# --- the config ---


def diffusion_config(
    params: Section, *, clip: PathLike | None = None
) -> tuple[LatentDiffusionConfig, Tensor | None]:
    """The official `params` of a whole model as our config, and scale_factor.

    That is None where it was measured on the first batch, so that the checkpoint holds it. Raises
    ValueError for what is missing, not known, or cannot be expressed, with key and value.
    """
    for key, value in _ONLY.items():
        params.choice(key, [value], value)
    first_stage = _first_stage(params.section("first_stage_config"))
    unet = _unet(params.section("unet_config"))
    conditioner = _conditioner(params, first_stage, unet, clip)
    schedule, objective = _schedule(params), _objective(params)
    side = params.integer("image_size", 256) * first_stage.f
    params.choice("channels", [first_stage.z_channels], 3)
    by_std = params.choice("scale_by_std", [False, True], False)
    scale_factor = params.number("scale_factor", 1.0)
    if not scale_factor > 0:
        raise ValueError(f"{params.where}: scale_factor={scale_factor} must be positive")
    if conditioner.concat == "inpaint" and (by_std or scale_factor != 1):
        raise ValueError(
            f"{params.where}: scale_factor={scale_factor}, scale_by_std={by_std} cannot be "
            "expressed where the first stage is the condition's, too: there, it is not scaled"
        )
    params.check_all_read(_TRAINING)
    try:
        config = LatentDiffusionConfig(
            autoencoder=first_stage,
            unet=unet,
            conditioner=conditioner,
            schedule=schedule,
            objective=objective,
            image_size=side,
        )
    except ValueError as error:
        raise ValueError(f"{params.where}: {error}") from error
    return config, None if by_std else torch.tensor(scale_factor, dtype=torch.float64)


def _first_stage(section: Section) -> AutoencoderConfig:
    target, params = section.split()
    _check_target(section, target, tuple(compvis_autoencoder.TARGETS))
    return autoencoder_config(target, params)


def _unet(section: Section) -> UNetConfig:
    target, params = section.split()
    _check_target(section, target, (compvis_unet.TARGET,))
    return unet_config(params)


def _check_target(section: Section, target: str, known: tuple[str, ...]) -> None:
    if target not in known:
        raise ValueError(f"{section.where}: {target!r} is not known; known: {', '.join(known)}")


def _schedule(params: Section) -> ScheduleConfig:
    kind = KINDS[params.choice("beta_schedule", list(KINDS), "linear")]
    T = params.integer("timesteps", 1000)
    b0, b1 = params.number("linear_start", 1e-4), params.number("linear_end", 2e-2)
    ends = {} if kind == "cosine" else {"b0": b0, "b1": b1}
    try:
        return ScheduleConfig(T=T, kind=kind, **ends)
    except ValueError as error:
        raise ValueError(f"{params.where}: linear_start, linear_end: {error}") from error


def _objective(params: Section) -> ObjectiveConfig:
    predict = PREDICTS[params.choice("parameterization", list(PREDICTS), "eps")]
    return ObjectiveConfig(predict=predict, loss=params.choice("loss_type", ["l2", "l1"], "l2"))


def _conditioner(
    params: Section, first_stage: AutoencoderConfig, unet: UNetConfig, clip: PathLike | None
) -> ConditionerConfig:
    """What goes beside z_t is told by its channels: a picture's, or a latent's and a mask's."""
    key = params.choice("conditioning_key", [None, "concat", "crossattn", "hybrid"], None)
    by_default = "concat" if params.choice("concat_mode", [True, False], True) else "crossattn"
    key, stage = key or by_default, params.content.get("cond_stage_config")
    if stage == "__is_unconditional__":
        params.mark("cond_stage_config")
        return ConditionerConfig()
    tokens = ConditionerConfig()
    if key != "concat":
        tokens = _tokens(params.section("cond_stage_config"), clip)
    if key == "crossattn":
        return tokens
    beside, c = unet.in_channels - unet.out_channels, first_stage.z_channels
    if key == "hybrid":
        kinds = {c + 1: "inpaint", 3: "low_res"}
        if beside not in kinds:
            raise _channels(params, beside, kinds)
        return replace(tokens, concat=kinds[beside])
    if stage == "__is_first_stage__":
        params.mark("cond_stage_config")
        if beside != c + 1:
            raise _channels(params, beside, {c + 1: "inpaint"})
        return ConditionerConfig(concat="inpaint", p_uncond=0.0)
    section = params.section("cond_stage_config")
    target, inner = section.split()
    _check_target(section, target, (compvis_conditioner.MAPS, "torch.nn.Identity"))
    if target == compvis_conditioner.MAPS:
        return replace(conditioner_config(target, inner), p_uncond=0.0)
    if beside != 3:
        raise _channels(params, beside, {3: "low_res"})
    return ConditionerConfig(concat="low_res", p_uncond=0.0)


def _channels(params: Section, beside: int, kinds: dict[int, str]) -> ValueError:
    listed = " or ".join(f"{n} ({kind})" for n, kind in kinds.items())
    return ValueError(
        f"{params.where}: the UNet takes {beside} channels beside z_t, can be expressed: {listed}"
    )


def _tokens(section: Section, clip: PathLike | None) -> ConditionerConfig:
    target, params = section.split()
    tokens = tuple(t for t in compvis_conditioner.TARGETS if t != compvis_conditioner.MAPS)
    _check_target(section, target, (*tokens, CLIP))
    return _clip(params, clip) if target == CLIP else conditioner_config(target, params)


def _clip(params: Section, clip: PathLike | None) -> ConditionerConfig:
    """Stable Diffusion's: its words are in no checkpoint, nor is what its network looks like."""
    version = params.content.get("version")
    folder = clip or (version if version and Path(str(version)).is_dir() else None)
    if folder is None:
        raise ValueError(
            f"{params.where}: FrozenCLIPEmbedder reads with CLIP's words: give clip=, a folder "
            "with config.json, vocab.json, merges.txt and tokenizer_config.json of "
            "openai/clip-vit-large-patch14; the weights are in the checkpoint"
        )
    params.choice("layer", ["last"], "last")
    length = params.integer("max_length", 77)
    params.check_all_read(("version", "device", "freeze", "layer_idx"))
    d_cond: Any = clip_to_fill(str(folder)).d
    return ConditionerConfig(
        kind="text", encoder="clip", encoder_path=str(folder), d_cond=d_cond, length=length
    )


# --- the tensors ---


def diffusion_places(
    config: LatentDiffusionConfig, *, ema: bool = False, clip: torch.nn.Module | None = None
) -> Iterator[Place]:
    """Our tensors, those of `model` and of `clip`, and the official names in a checkpoint."""
    first_stage = compvis_autoencoder.places(config.autoencoder)
    yield from below(first_stage, "model.autoencoder.", FIRST_STAGE)
    for place in below(compvis_unet.places(config.unet), "model.unet.", UNET):
        yield place._replace(theirs=tuple(map(averaged, place.theirs))) if ema else place
    yield from _conditioner_places(config.conditioner)
    if clip is not None:
        for name, _ in clip.named_parameters():
            bare = name.removeprefix("text_model.")  # as older transformers have it
            yield Place(f"clip.{name}", (f"{CLIP_TEXT}{bare}",))


def _conditioner_places(config: ConditionerConfig) -> Iterator[Place]:
    if config.encoder != "trained":
        return
    hybrid = config.concat in ("low_res", "inpaint")
    inner = replace(config, concat="none") if hybrid else config
    ours = "model.conditioner.tokens." if hybrid else "model.conditioner."
    yield from below(compvis_conditioner.places(inner), ours, CONDITIONS)


def averaged(name: str) -> str:
    """What the averages of a UNet's tensor are called."""
    return AVERAGES + name.removeprefix("model.").replace(".", "")


def _spare(config: LatentDiffusionConfig, params: Section, *, ema: bool) -> dict[str, str]:
    """What may stand beside the tensors that are taken; the name of that which it must repeat."""
    of_unet = (f"{UNET}{n}" for p in compvis_unet.places(config.unet) for n in p.theirs)
    spare = {name if ema else averaged(name): "" for name in of_unet}
    if params.content.get("cond_stage_config") == "__is_first_stage__":
        for place in compvis_autoencoder.places(config.autoencoder):
            spare |= {f"{CONDITIONS}{name}": f"{FIRST_STAGE}{name}" for name in place.theirs}
    return spare


def _measured_scale_factor(tensors: Tensors) -> Tensor:
    value: Any = tensors.named.get("scale_factor")
    good = isinstance(value, Tensor) and value.shape == () and value.is_floating_point()
    if not good or not (value.is_meta or (value > 0 and value.isfinite())):
        raise CheckpointError(
            f"{tensors.source}: scale_by_std=True needs scale_factor, a positive number () among "
            f"the tensors, got {value!r:.60}"
        )
    return value


def _check_table(model: LatentDiffusion, tensors: Tensors) -> None:
    """The checkpoint's table of alphas, if any, must be the config's: else that is another's."""
    theirs: Any = tensors.named.get(_ALPHAS)
    if not isinstance(theirs, Tensor) or theirs.is_meta:
        return
    ours = model.schedule.alphas_cumprod
    if theirs.shape != ours.shape or (theirs.float() - ours).abs().max() > 1e-3:
        raise CheckpointError(
            f"{tensors.source}: {_ALPHAS} are not those of the config's schedule "
            f"{model.config.schedule}: is it the config of this checkpoint?"
        )


def _check_copies(spare: dict[str, str], tensors: Tensors) -> None:
    for name, original in spare.items():
        copy: Any = tensors.named.get(name)
        if not original or copy is None or copy.is_meta:
            continue
        if not torch.equal(copy, tensors.named[original]):
            raise CheckpointError(f"{tensors.source}: {name} is not the same as {original}")
