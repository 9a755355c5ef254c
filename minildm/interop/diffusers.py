"""diffusers folders, in and out: single models, and whole pipelines of latent diffusion.

class                       first stage  scaling_factor  condition
LDMPipeline                 vqvae        read            none
LDMSuperResolutionPipeline  vqvae        not read        an image concatenated with z_t
LDMTextToImagePipeline      vqvae        read            LDMBert's tokens
StableDiffusionPipeline     vae          read            CLIP's tokens
DDIMPipeline                none: pixels                 none
"""

import json
from pathlib import Path
from typing import Any

import torch

from minildm import conditioning as tau
from minildm.compression.autoencoder import Autoencoder, AutoencoderConfig
from minildm.conditioning.text_encoders import END, PAD, START, UNKNOWN, text_folders
from minildm.diffusion.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from minildm.diffusion.unet import UNet, UNetConfig
from minildm.files import new_folder, write_json
from minildm.interop import configs, engine, names
from minildm.interop.engine import PathLike, Rules, Tensors, exported, fill, on_meta, read_mapping
from minildm.training.configs import from_dict

VERSION = "0.42.1"  # of diffusers, whose names and defaults these are
WEIGHTS = "diffusion_pytorch_model"
MODELS = ("AutoencoderKL", "VQModel", "UNet2DModel", "UNet2DConditionModel")
LDM, SUPER, TEXT, STABLE, PIXELS = PIPELINES = (
    *("LDMPipeline", "LDMSuperResolutionPipeline", "LDMTextToImagePipeline"),
    *("StableDiffusionPipeline", "DDIMPipeline"),
)
_BERT = Rules(engine.TABLES["names"]["diffusers_bert"])


def load_diffusers(folder: PathLike) -> Autoencoder | UNet | LatentDiffusion:
    """Load a model that diffusers saved with `save_pretrained`; diffusers is not required.

    Models: AutoencoderKL, VQModel, UNet2DModel, UNet2DConditionModel. Pipelines: see the module;
    CLIP requires the extra `text` and stays in the folder. The result is on the CPU, in float32
    and in evaluation mode; a float32 file stays mapped into memory. A scheduler gives the noise
    schedule and what the UNet predicts, not how to sample. Safety checkers are not read.

    Raises ValueError naming a key that cannot be expressed, CheckpointError (a ValueError) for
    files that are missing, damaged or would run code, and for tensors that do not fit.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        return _load_model(folder)
    kind = read_mapping(folder / "model_index.json").get("_class_name")
    if kind not in PIPELINES:
        raise ValueError(f"{folder}: {kind!r} is not known; known: {', '.join(PIPELINES)}")
    unet = _load_model(folder / "unet")
    autoencoder = _load_first_stage(folder, kind, unet.config.in_channels)
    path = folder / "scheduler/scheduler_config.json"
    given = dict(read_mapping(path))
    clips = given.get("_class_name") in ("DDIMScheduler", "DDPMScheduler")  # unless it says no
    given["clip_sample"] = kind != STABLE and given.get("clip_sample", clips)  # that turns it off
    with configs.reading(path):
        times = {key: value for key, value in given.items() if key not in _SAMPLING}
        timing = configs.timing_of(configs.read_fields("DDIMScheduler", times, strict=False))
    conditioner = _load_conditioner(folder, kind)
    side = read_mapping(folder / "unet/config.json").get("sample_size") or 64
    parts = {"autoencoder": autoencoder, "unet": unet, "conditioner": conditioner}
    with configs.reading(folder):
        config = LatentDiffusionConfig(
            **{name: part.config for name, part in parts.items()},
            **dict(zip(("schedule", "objective"), timing, strict=True)),
            image_size=side * autoencoder.f,
        )
    return LatentDiffusion(config, **parts).eval()


_SAMPLING = ("steps_offset", "set_alpha_to_one", "timestep_spacing")  # the caller's choice here


def _load_model(folder: Path) -> Any:
    path = folder / "config.json"
    params = read_mapping(path)
    kind = params.get("_class_name")
    with configs.reading(path):
        if kind not in MODELS:
            raise ValueError(f"_class_name={kind!r} is not known; known: {', '.join(MODELS)}")
        swish = {"act_fn": params.get("act_fn", "silu").replace("swish", "silu")}  # the same
        fields = configs.read_fields(kind, params | swish)
        is_unet = "UNet" in kind
        config = configs.unet_of(fields) if is_unet else configs.autoencoder_of(fields)
        factor = 1.0 if is_unet else fields["scaling_factor"]
        if not factor > 0:
            raise ValueError(f"scaling_factor={factor} must be positive")
    model, rules = _part(config, bool(params.get("use_linear_projection")))
    shift = float(fields.get("shift_factor", 0.0))
    fill(model, rules.places(model), _weights(folder), scale=1 / factor, shift=shift)
    return model.eval()


def _part(config: Any, linear: bool = False) -> tuple[Any, Rules]:
    if isinstance(config, UNetConfig):
        return on_meta(lambda: UNet(config)), names.diffusers_unet(config, linear=linear)
    return on_meta(lambda: Autoencoder(config)), names.diffusers_autoencoder(config)


def _weights(folder: Path, stem: str = WEIGHTS) -> Tensors:
    """A part's tensors by today's names; safetensors before pickles, float16 last."""
    ends = ("safetensors", "bin", "fp16.safetensors", "fp16.bin")
    stems = (stem, "pytorch_model") if stem == "model" else (stem,)
    paths = [folder / f"{name}.{end}" for end in ends for name in stems]
    found = engine.read_tensors(next((path for path in paths if path.is_file()), paths[0]))
    first_year = engine.TABLES["names"]["diffusers_first_year"]
    today = Tensors({engine.renamed(name, first_year): tensor for name, tensor in found.items()})
    today.source = found.source
    return today


def _load_first_stage(folder: Path, kind: str, channels: int) -> Autoencoder:
    if kind == PIXELS:
        shape = {"in_channels": channels, "z_channels": channels}
        return Autoencoder(AutoencoderConfig(regularizer="identity", **shape))
    autoencoder = _load_model(folder / ("vae" if kind == STABLE else "vqvae"))
    if shift := float(autoencoder.shift):
        raise ValueError(
            f"{folder}: shift_factor={shift} must be null or 0, as {kind} does not read it"
        )
    if kind == SUPER:
        autoencoder.scale.fill_(1)
    return autoencoder


def _load_conditioner(folder: Path, kind: str) -> tau.Conditioner:
    if kind == STABLE:
        clip = read_mapping(folder / "text_encoder/config.json")
        words = folder / "tokenizer/tokenizer_config.json"
        most = read_mapping(words).get("model_max_length", 77) if words.is_file() else 77
        length = min(int(most), clip.get("max_position_embeddings", 77))
        fields = {"d_cond": clip.get("hidden_size", 512), "length": length}
        return tau.FrozenTextConfig(encoder="clip", path=str(folder), **fields).build()
    if kind != TEXT:
        return (tau.LowResConfig() if kind == SUPER else tau.ConditionerConfig()).build()
    with configs.reading(folder / "bert/config.json"):
        params = read_mapping(folder / "bert/config.json")
        fields = configs.read_fields("LDMBertModel", params, strict=False)
        if fields.pop("hidden") != 4 * fields["d_cond"]:
            raise ValueError(f"encoder_ffn_dim must be {4 * fields['d_cond']}, 4 d_model")
        model = on_meta(from_dict(tau.TextConfig, fields).build)
    fill(model, _BERT.places(model), _weights(folder / "bert", "model"), r"to_logits\..*")
    words = folder / "tokenizer"
    with configs.reading(words):
        own = (words / "tokenizer.json").is_file()
        model.set_tokenizer(
            tau.CaptionTokenizer.load(words / ("tokenizer.json" if own else "vocab.txt"))
        )
    return model.eval()


def save_diffusers(model: Autoencoder | UNet | LatentDiffusion, folder: PathLike) -> None:
    """Write a model as a new folder, whole or not at all, that diffusers reads.

    An Autoencoder or a UNet: for its class's `from_pretrained`. A LatentDiffusion: for the
    pipeline of its task (see the module): no condition, of latents or of pixels; super-resolution
    with three latent channels and scale 1; captions by CLIP with a KL first stage; captions by an
    own transformer with 77 tokens at f = 8. Of others, save the parts. Weights are float32.

    Raises ValueError naming what diffusers cannot express, FileExistsError for a folder with
    content.
    """
    with new_folder(folder) as target:
        if not isinstance(model, LatentDiffusion):
            _save_model(model, target)
            return
        kind, config = pipeline_for(model), model.config
        stage = {STABLE: "vae", PIXELS: ""}.get(kind, "vqvae")
        side = config.image_size // config.autoencoder.f
        index: dict[str, Any] = {
            "unet": ["diffusers", _save_model(model.unet, target / "unet", side)]
        }
        if stage:
            index[stage] = ["diffusers", _save_model(model.autoencoder, target / stage)]
        index["scheduler"] = ["diffusers", "DDIMScheduler"]
        timing = configs.write_fields("DDIMScheduler", configs.timing_fields(config))
        _write_card(target / "scheduler/scheduler_config.json", "DDIMScheduler", timing)
        if kind == TEXT:
            index |= _save_bert(model.conditioner, target)
        if kind == STABLE:
            index |= _save_clip(model.conditioner, target)
        _write_card(target / "model_index.json", kind, index)


def _write_card(path: Path, kind: str, content: dict[str, Any]) -> None:
    write_json(path, {"_class_name": kind, "_diffusers_version": VERSION, **content})


def _save_model(model: Autoencoder | UNet, folder: Path, side: int = 64) -> str:
    config = model.config
    with configs.reading("diffusers"):
        if isinstance(model, UNet):
            kind = MODELS[2] if config.d_cond is None else MODELS[3]
            params = configs.write_part(kind, config, side)
        else:
            kind, shift = MODELS[config.regularizer == "vq"], float(model.shift)
            if shift and kind == "VQModel":
                raise ValueError(f"cannot express {shift=} of a VQModel, only 0")
            params = configs.write_part(kind, config, side)
            params |= {"scaling_factor": 1 / float(model.scale)}
            params |= {"shift_factor": shift} if shift else {}
    _write_card(folder / "config.json", kind, params)
    tensors = exported(model, _part(config)[1].places(model))
    engine.write_tensors(folder / f"{WEIGHTS}.safetensors", tensors)
    return kind


def pipeline_for(model: LatentDiffusion) -> str:
    """The pipeline that diffusers has for a model; ValueError if it has none."""
    text, stage = model.config.conditioner, model.config.autoencoder
    shift, scale = float(model.autoencoder.shift), float(model.autoencoder.scale)
    pixels = stage.regularizer == "identity"
    fits = {
        LDM: text.kind == "none" and not pixels,
        PIXELS: text.kind == "none" and pixels and scale == 1,
        SUPER: text.kind == "low_res" and stage.z_channels == 3 and scale == 1,
        STABLE: getattr(text, "encoder", "") == "clip" and stage.regularizer == "kl",
        TEXT: text.kind == "text" and (text.length, stage.f) == (77, 8),
    }
    if shift or not any(fits.values()):
        raise ValueError(
            f"diffusers has no pipeline for kind={text.kind!r} with regularizer="
            f"{stage.regularizer!r}, f={stage.f}, {shift=}, {scale=}: save the model's parts"
        )
    return next(kind for kind, fit in fits.items() if fit)


def _save_bert(model: Any, folder: Path) -> dict[str, list[str]]:
    config, words = model.config, model.tokenizer
    if words is None:
        raise ValueError("this text model has no tokenizer: call set_tokenizer first")
    tensors = exported(model, _BERT.places(model))
    # Scores of next words, which no pipeline reads; diffusers warns if they are missing.
    tensors["to_logits.weight"] = torch.zeros(config.vocab_size, config.d_cond)
    tensors["to_logits.bias"] = torch.zeros(config.vocab_size)
    fields = vars(config) | {"hidden": 4 * config.d_cond}
    card = {"architectures": ["LDMBertModel"], "pad_token_id": words.pad}
    write_json(folder / "bert/config.json", card | configs.write_fields("LDMBertModel", fields))
    engine.write_tensors(folder / "bert/model.safetensors", tensors)
    path = folder / "tokenizer/tokenizer.json"
    words.save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    ends = {"sep": [END, words.end], "cls": [START, words.start]}
    write_json(path, content | {"post_processor": {"type": "BertProcessing", **ends}})
    special = {"pad_token": PAD, "unk_token": UNKNOWN, "cls_token": START, "sep_token": END}
    card = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.length}
    write_json(path.with_name("tokenizer_config.json"), card | special)
    tokenizer = ["transformers", "PreTrainedTokenizerFast"]
    return {"bert": ["latent_diffusion", "LDMBertModel"], "tokenizer": tokenizer}


def _save_clip(model: Any, folder: Path) -> dict[str, Any]:
    from transformers import CLIPTokenizer

    model.network.save_pretrained(folder / "text_encoder")
    config, words = model.config, text_folders("clip", model.config.path)[1]
    words = CLIPTokenizer.from_pretrained(words, model_max_length=config.length)
    words.save_pretrained(folder / "tokenizer")
    index: dict[str, Any] = {"requires_safety_checker": False}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"]}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"]}
    nothing = ("safety_checker", "feature_extractor", "image_encoder")
    return index | {part: [None, None] for part in nothing}
