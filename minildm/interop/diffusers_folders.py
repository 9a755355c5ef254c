"""diffusers folders, in and out: single models, and whole pipelines of latent diffusion.

Pipelines read the latent's scale, or do not; none of these reads a shift:

    class                       first stage  scaling_factor is  condition
    LDMPipeline                 vqvae        divided by         none
    LDMSuperResolutionPipeline  vqvae        not read           the picture beside z_t
    LDMTextToImagePipeline      vqvae        divided by         LDMBert's tokens
    StableDiffusionPipeline     vae          divided by         CLIP's tokens
    DDIMPipeline                none: pixels                    none
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from minildm.autoencoder import Autoencoder, AutoencoderConfig
from minildm.checkpoints import CheckpointError
from minildm.conditioning import Conditioner, ConditionerConfig, build_conditioner
from minildm.diffusion import LatentDiffusion, LatentDiffusionConfig, ScheduleConfig
from minildm.files import new_folder, write_json
from minildm.interop import diffusers_autoencoder, diffusers_text, diffusers_unet
from minildm.interop.diffusers_files import (
    VERSION,
    read_config,
    read_mapping,
    read_weights,
    write_part,
)
from minildm.losses import ObjectiveConfig
from minildm.unet import UNet

PathLike = str | os.PathLike[str]


class Pipeline(NamedTuple):
    """What distinguishes the pipelines: see the module."""

    first_stage: str  # its folder; "" where pixels are the latent
    scaled: bool
    condition: str


PIPELINES = {
    "LDMPipeline": Pipeline("vqvae", True, "none"),
    "LDMSuperResolutionPipeline": Pipeline("vqvae", False, "low_res"),
    "LDMTextToImagePipeline": Pipeline("vqvae", True, "bert"),
    "StableDiffusionPipeline": Pipeline("vae", True, "clip"),
    "DDIMPipeline": Pipeline("", True, "none"),
}
_NONE = Pipeline("vae", True, "own")  # no pipeline: the folder of `save_diffusers`
_KINDS = (*diffusers_autoencoder.KINDS, *diffusers_unet.KINDS)

_SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "squaredcos_cap_v2": "cosine"}
_PREDICT = {"epsilon": "eps", "v_prediction": "v", "sample": "z0"}


def load_diffusers(folder: PathLike) -> Autoencoder | UNet | LatentDiffusion:
    """A model that diffusers saved with `save_pretrained`; diffusers itself is not needed.

    Models: AutoencoderKL, VQModel, UNet2DModel, UNet2DConditionModel. Pipelines, with a
    `model_index.json`: LDMPipeline, LDMSuperResolutionPipeline, LDMTextToImagePipeline,
    StableDiffusionPipeline (its CLIP comes with the extra `text` and stays in the folder), and for
    pixels DDIMPipeline; and the folders of `save_diffusers`. The result is on the CPU, in
    float32, in evaluation mode; a file in float32 stays mapped into memory: do not write over it
    while the model lives.

    A scheduler gives the noise schedule and what the UNet predicts. How to sample (spacing,
    offset, the last target) is the caller's choice here, the official code's if nothing is said:
    steps_offset=1, set_alpha_to_one=False in diffusers' words. Safety checkers are not read.

    Every tensor finds its place and every place its tensor. Raises ValueError for what cannot be
    expressed, with the config's key, what came and what is allowed; CheckpointError (a
    ValueError) for files that are missing, cut short or would run code, and for tensors that do
    not fit, the first ten listed.
    """
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        return _load_pipeline(folder, read_mapping(folder / "model_index.json"))
    if (folder / diffusers_text.OURS).is_dir():
        return _load_parts(folder, _NONE)
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is no diffusers folder: it has neither model_index.json nor config.json"
        )
    return _load_model(folder, _KINDS)


def _load_model(folder: Path, allowed: tuple[str, ...]) -> Autoencoder | UNet:
    kind, params = read_config(folder / "config.json")
    if kind not in allowed:
        known = ", ".join(allowed)
        raise ValueError(f"{params.where}: _class_name={kind!r} is not known; known: {known}")
    tensors = read_weights(folder)
    if kind in diffusers_autoencoder.KINDS:
        return diffusers_autoencoder.load_autoencoder(kind, params, tensors)
    return diffusers_unet.load_unet(kind, params, tensors)


def _load_pipeline(folder: Path, index: dict[str, Any]) -> LatentDiffusion:
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise ValueError(
            f"{folder / 'model_index.json'}: _class_name={kind!r} is not known; known: "
            f"{', '.join(PIPELINES)}"
        )
    return _load_parts(folder, PIPELINES[kind])


def _load_parts(folder: Path, pipeline: Pipeline) -> LatentDiffusion:
    unet = _load_model(folder / "unet", diffusers_unet.KINDS)
    autoencoder = _load_first_stage(folder, pipeline, unet.config.in_channels)
    schedule, objective = read_scheduler(
        folder / "scheduler" / "scheduler_config.json", clips=pipeline.condition == "clip"
    )
    conditioner = _load_conditioner(folder, pipeline.condition)
    try:
        config = LatentDiffusionConfig(
            autoencoder=autoencoder.config,
            unet=unet.config,
            conditioner=conditioner.config,
            schedule=schedule,
            objective=objective,
            image_size=_side(folder / "unet" / "config.json") * autoencoder.f,
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    parts = {"autoencoder": autoencoder, "unet": unet, "conditioner": conditioner}
    return LatentDiffusion(config, **parts).eval()


def _load_first_stage(folder: Path, pipeline: Pipeline, channels: int) -> Autoencoder:
    if not pipeline.first_stage:
        pixels = {"in_channels": channels, "z_channels": channels}
        return Autoencoder(AutoencoderConfig(regularizer="identity", **pixels))
    folder = folder / pipeline.first_stage
    autoencoder = _load_model(folder, tuple(diffusers_autoencoder.KINDS))
    if not pipeline.scaled:
        autoencoder.scale.fill_(1)
    if shift := float(autoencoder.shift):
        raise ValueError(
            f"{folder / 'config.json'}: shift_factor={shift:.6g} is not read by this pipeline; "
            "allowed: null or 0"
        )
    return autoencoder


def _load_conditioner(folder: Path, condition: str) -> Conditioner:
    loaders = {
        "bert": diffusers_text.load_bert,
        "clip": diffusers_text.load_clip,
        "own": diffusers_text.load_own,
    }
    if condition in loaders:
        return loaders[condition](folder)
    return build_conditioner(ConditionerConfig(concat=condition, p_uncond=0.0))


def _side(path: Path) -> int:
    """The latent's, for which a UNet was made; 64 where it does not say."""
    _, params = read_config(path)
    return params.integer("sample_size") if params.given("sample_size", None) else 64


def read_scheduler(path: Path, *, clips: bool = False) -> tuple[ScheduleConfig, ObjectiveConfig]:
    """A scheduler's noise schedule, and what the network predicts.

    clips: whether the pipeline turns `clip_sample` off, whatever the scheduler says. Raises
    ValueError for what cannot be expressed.
    """
    kind, params = read_config(path)
    params.choice("trained_betas", [None], None)
    if not clips:
        clipped = kind in ("DDIMScheduler", "DDPMScheduler")  # where a config says nothing
        if "clip_sample" in params.content or clipped:
            params.choice("clip_sample", [False], clipped)
    params.choice("thresholding", [False], False)
    schedule = _SCHEDULES[params.choice("beta_schedule", tuple(_SCHEDULES), "linear")]
    ends = {}
    if schedule != "cosine":
        ends = {"b0": params.number("beta_start", 1e-4), "b1": params.number("beta_end", 0.02)}
    stretched = params.choice("rescale_betas_zero_snr", [False, True], False)
    predict = _PREDICT[params.choice("prediction_type", tuple(_PREDICT), "epsilon")]
    try:
        T = params.integer("num_train_timesteps", 1000)
        config = ScheduleConfig(T=T, kind=schedule, zero_terminal_snr=stretched, **ends)
    except ValueError as error:
        raise ValueError(f"{params.where}: {error}") from error
    return config, ObjectiveConfig(predict=predict)


def save_diffusers(model: Autoencoder | UNet | LatentDiffusion, folder: PathLike) -> None:
    """Write a model as a new folder, whole or not at all, that diffusers reads.

    An Autoencoder or a UNet: a folder for its class's `from_pretrained`. A LatentDiffusion: a
    pipeline's, where diffusers has one for the task (see the module): no condition, of latents or
    of pixels; super-resolution with three latent channels; captions by CLIP over a KL first
    stage; captions by a transformer of our own, of 77 tokens, at f = 8, which are what
    LDMTextToImagePipeline assumes.
    Else `vae`, `unet` and `scheduler`, to be read one by one, and `conditioner`, which is ours.
    Weights are float32. What says how to train (drop-out of conditions, weighting) is not kept.

    Raises ValueError for what diffusers cannot express, such as a first stage with patch > 1,
    FileExistsError where the folder is there already and not empty, TypeError for another model.
    """
    with new_folder(folder) as target:
        if isinstance(model, Autoencoder):
            write_part(target, *diffusers_autoencoder.export(model))
        elif isinstance(model, UNet):
            write_part(target, *diffusers_unet.export(model))
        elif isinstance(model, LatentDiffusion):
            _save_parts(model, target)
        else:
            raise TypeError(
                "model must be an Autoencoder, a UNet or a LatentDiffusion, got "
                f"{type(model).__name__}"
            )


def pipeline_for(config: LatentDiffusionConfig) -> str | None:
    """The pipeline that diffusers has for a model, or None."""
    tau, first_stage = config.conditioner, config.autoencoder
    if tau.kind == "none":
        if tau.concat == "none":
            pixels = first_stage.regularizer == "identity"
            return "DDIMPipeline" if pixels else "LDMPipeline"
        fits = tau.concat == "low_res" and first_stage.z_channels == 3  # half of the UNet's six
        return "LDMSuperResolutionPipeline" if fits else None
    if tau.kind != "text" or tau.concat != "none":
        return None
    if tau.encoder == "clip":
        return "StableDiffusionPipeline" if first_stage.regularizer == "kl" else None
    fits = tau.encoder == "trained" and (tau.length, first_stage.f) == (77, 8)
    return "LDMTextToImagePipeline" if fits else None


def _save_parts(model: LatentDiffusion, folder: Path) -> None:
    config, name = model.config, pipeline_for(model.config)
    pipeline = PIPELINES[name] if name else _NONE
    parts = {"unet": diffusers_unet.export(model.unet, config.image_size // config.autoencoder.f)}
    if pipeline.first_stage:
        first_stage, fold = model.autoencoder, not pipeline.scaled
        parts[pipeline.first_stage] = diffusers_autoencoder.export(first_stage, fold_scale=fold)
    else:
        diffusers_autoencoder.check_pixels(model.autoencoder)
    for part, content in parts.items():
        write_part(folder / part, *content)
    write_json(folder / "scheduler" / "scheduler_config.json", _scheduler(config))
    savers = {
        "bert": diffusers_text.save_bert,
        "clip": diffusers_text.save_clip,
        "own": diffusers_text.save_own,
    }
    if pipeline.condition in savers:
        savers[pipeline.condition](model.conditioner, folder)
    if name:
        kinds = {part: kind for part, (kind, *_) in parts.items()}
        write_json(folder / "model_index.json", _index(name, kinds))


def _scheduler(config: LatentDiffusionConfig) -> dict[str, Any]:
    """DDIM at the official code's times; from T - 1 on where z_T holds no signal."""
    schedule, stretched = config.schedule, config.schedule.zero_terminal_snr
    named = {ours: theirs for theirs, ours in _SCHEDULES.items()}
    predicts = {ours: theirs for theirs, ours in _PREDICT.items()}
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": VERSION,
        "num_train_timesteps": schedule.T,
        "beta_schedule": named[schedule.kind],
        "beta_start": schedule.b0,
        "beta_end": schedule.b1,
        "rescale_betas_zero_snr": stretched,
        "prediction_type": predicts[config.objective.predict],
        "clip_sample": False,
        "set_alpha_to_one": stretched,
        "steps_offset": 1,
        "timestep_spacing": "trailing" if stretched else "leading",
    }


def _index(name: str, kinds: dict[str, str]) -> dict[str, Any]:
    index: dict[str, Any] = {
        "_class_name": name,
        "_diffusers_version": VERSION,
        **{part: ["diffusers", kind] for part, kind in kinds.items()},
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    if name == "LDMTextToImagePipeline":
        index["bert"] = ["latent_diffusion", "LDMBertModel"]
        index["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    if name == "StableDiffusionPipeline":
        index["text_encoder"] = ["transformers", "CLIPTextModel"]
        index["tokenizer"] = ["transformers", "CLIPTokenizer"]
        nothing = ("safety_checker", "feature_extractor", "image_encoder")
        index |= {part: [None, None] for part in nothing}
        index["requires_safety_checker"] = False
    return index
