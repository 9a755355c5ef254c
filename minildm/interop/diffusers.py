"""diffusers folders, in and out: single models, and whole pipelines of latent diffusion."""

from pathlib import Path
from typing import Any

from torch import Tensor

from minildm import conditioning as tau
from minildm.compression.autoencoder import Autoencoder, AutoencoderConfig
from minildm.conditioning.text_encoders import END, PAD, START, UNKNOWN, text_folders
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.diffusion.unet import UNet
from minildm.files import new_folder, write_json
from minildm.interop import configs, weights
from minildm.interop.weights import NAMES, TABLES, fill, read_mapping
from minildm.training.checkpoint import CheckpointError, on_meta, reading
from minildm.training.configs import from_dict

VERSION = "0.42.1"  # of diffusers, whose names and defaults these are
WEIGHTS = "diffusion_pytorch_model.safetensors"
MODELS = {"AutoencoderKL": Autoencoder, "VQModel": Autoencoder}
MODELS |= {"UNet2DModel": UNet, "UNet2DConditionModel": UNet}
PIPELINES: dict[str, str] = TABLES["pipelines"]
LDM, SUPER, TEXT, STABLE, INPAINT, DDIM, DDPM = PIPELINES


def load_diffusers(folder: str | Path) -> Autoencoder | UNet | LatentDiffusion:
    """Load what `save_pretrained` wrote: a model of MODELS, or a pipeline of PIPELINES.

    CLIP requires the extra `text` and stays in the folder; the spacing of a scheduler's steps and
    safety checkers are not read. The result is on the CPU, in float32 and in evaluation mode.
    Raises CheckpointError (a ValueError) for a key that cannot be expressed, such as clip_sample of
    latents, for files that are missing, damaged or would run code, and for tensors that do not fit.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        return _load_model(folder)
    kind = read_mapping(folder / "model_index.json").get("_class_name")
    with reading(folder):
        tau.look_up(kind, list(PIPELINES), "_class_name")
        unet, stage = _load_model(folder / "unet"), PIPELINES[kind]
        c = unet.config.in_channels
        pixels = AutoencoderConfig(regularizer="identity", in_channels=c, z_channels=c)
        parts = {
            "autoencoder": _load_model(folder / stage) if stage else Autoencoder(pixels),
            "unet": unet,
            "conditioner": _load_conditioner(folder, kind),
        }
        if kind == SUPER:  # it does not read the scaling_factor
            parts["autoencoder"].scale.fill_(1)
        times = dict(read_mapping(folder / "scheduler/scheduler_config.json"))
        # DDIM's and DDPM's clip by default; StableDiffusionPipeline turns it off
        clips = times.get("_class_name") in ("DDIMScheduler", "DDPMScheduler")
        times["clip_sample"] = kind != STABLE and times.get("clip_sample", clips)
        fields = configs.read_fields("DDIMScheduler", times, strict=False)
        fields["side"] = read_mapping(folder / "unet/config.json").get("sample_size") or 64
        fields |= {"sampler": "ddpm", "steps": fields["T"]} if kind == DDPM else {}
        config = configs.whole(fields, {name: part.config for name, part in parts.items()})
    return LatentDiffusion(config, **parts).eval()


def _load_model(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        holds = ", ".join(sorted(path.name for path in folder.glob("*"))[:9]) or "nothing"
        wanted = f"model_index.json, as a pipeline, or config.json, as one model ({folder}/unet)"
        raise CheckpointError(f"{folder} must have {wanted}; it holds {holds}")
    params = read_mapping(folder / "config.json")
    kind = params.get("_class_name")
    with reading(folder):
        tau.look_up(kind, list(MODELS), "_class_name")
        fields = configs.read_fields(kind, params)
        factor, shift = fields.get("scaling_factor", 1.0), fields.get("shift_factor", 0.0)
        model = on_meta(MODELS[kind], configs.config_of(fields))
        fill(model, _views, _weights(folder), factor=factor, shift=shift)
    return model.eval()


def _views(model: Autoencoder | UNet | tau.Conditioner) -> dict[str, Tensor]:
    """diffusers' tensors of a model, as `weights.views`."""
    names = weights.numbered(model) | NAMES[f"diffusers_{type(model).__name__}"]
    return weights.views(model, names, flat=2)


def _weights(folder: Path) -> dict[str, Any]:
    """A part's tensors by today's names; safetensors before pickles, float16 last."""
    paths = [path for end in TABLES["weights"] for path in folder.glob(f"*model.{end}")]
    path = paths[0] if paths else folder / WEIGHTS
    files, was = {path.name}, NAMES["diffusers_first_year"]
    if path.suffix == ".json":  # of weights in several files
        files = set(read_mapping(path)["weight_map"].values())
    tensors = [weights.read_tensors(folder / name).items() for name in files]
    return {weights.renamed(name, was): tensor for part in tensors for name, tensor in part}


def _load_conditioner(folder: Path, kind: str) -> tau.Conditioner:
    if kind in (STABLE, INPAINT):
        clip = {"hidden_size": 512, "max_position_embeddings": 77}
        clip |= read_mapping(folder / "text_encoder/config.json")
        fields = {"d_cond": clip["hidden_size"], "length": clip["max_position_embeddings"]}
        config = tau.FrozenTextConfig(encoder="clip", path=str(folder), **fields)
        hybrid = tau.HybridConfig(tokens=config, concat=configs.STABLE_INPAINT)
        return (hybrid if kind == INPAINT else config).build()
    if kind != TEXT:
        return (tau.LowResConfig() if kind == SUPER else tau.ConditionerConfig()).build()
    params = read_mapping(folder / "bert/config.json")
    fields = configs.read_fields("LDMBertModel", params, strict=False)
    model = on_meta(from_dict(tau.TextConfig, fields).build)
    fill(model, _views, _weights(folder / "bert"))
    words = folder / "tokenizer/tokenizer.json"
    words = words if words.is_file() else words.with_name("vocab.txt")
    model.set_tokenizer(tau.CaptionTokenizer.load(words))
    return model.eval()


def save_diffusers(model: Autoencoder | UNet | LatentDiffusion, folder: str | Path) -> None:
    """Write a model in float32 as a new folder, whole or not at all, for `from_pretrained`.

    Of a LatentDiffusion that no pipeline fits (see `_pipeline_for`), save the parts. Raises
    ValueError naming what diffusers cannot express, FileExistsError for a folder with content.
    """
    with new_folder(folder) as target:
        if not isinstance(model, LatentDiffusion):
            _save_model(model, target)
            return
        kind, config = _pipeline_for(model), model.config
        stage, side = PIPELINES[kind], config.image_size // config.autoencoder.f
        index = {
            "unet": ["diffusers", _save_model(model.unet, target / "unet", side)],
            "scheduler": ["diffusers", "DDIMScheduler"],
        }
        if stage:
            index[stage] = ["diffusers", _save_model(model.autoencoder, target / stage)]
        fields = vars(config.schedule) | vars(config.objective) | vars(config.sampling)
        timing = configs.write_fields("DDIMScheduler", fields)
        _write_card(target / "scheduler/scheduler_config.json", "DDIMScheduler", timing)
        if kind == TEXT:
            index |= _save_bert(model.conditioner, target)
        if kind in (STABLE, INPAINT):
            index |= _save_clip(getattr(model.conditioner, "tokens", model.conditioner), target)
        _write_card(target / "model_index.json", kind, index)


def _write_card(path: Path, kind: str, content: dict[str, Any]) -> None:
    write_json(path, {"_class_name": kind, "_diffusers_version": VERSION, **content})


def _save_model(model: Autoencoder | UNet, folder: Path, side: int = 64) -> str:
    config, fields = model.config, configs.fields_of(model.config, side)
    if isinstance(model, UNet):
        kind = "UNet2DModel" if config.d_cond is None else "UNet2DConditionModel"
        fields["heads"] = config.heads or [max(1, c // config.d_head) for c in fields["widths"]]
    else:
        kind = "VQModel" if config.regularizer == "vq" else "AutoencoderKL"
        fields["scaling_factor"] = 1 / float(model.scale)
        fields["shift_factor"] = float(model.shift) or None
    with reading("diffusers"):
        params = configs.write_fields(kind, fields)
        configs.check_same(config, configs.config_of(configs.read_fields(kind, params)))
    _write_card(folder / "config.json", kind, params)
    weights.write_tensors(folder / WEIGHTS, weights.exported(_views(model)))
    return kind


def _pipeline_for(model: LatentDiffusion) -> str:
    """The pipeline that diffusers has for a model; ValueError if it has none."""
    text, stage = model.config.conditioner, model.config.autoencoder
    shift, scale = float(model.autoencoder.shift), float(model.autoencoder.scale)
    concat, tokens = getattr(text, "concat", None), getattr(text, "tokens", text)
    clip = getattr(tokens, "encoder", "") == "clip" and stage.regularizer == "kl"
    fits = {
        LDM: text.kind == "none" and stage.regularizer != "identity",
        DDIM: text.kind == "none" and stage.regularizer == "identity",
        SUPER: text.kind == "low_res" and stage.z_channels == 3 and scale == 1,
        STABLE: clip and concat is None,
        INPAINT: clip and concat == configs.STABLE_INPAINT,
        TEXT: text.kind == "text" and (text.length, stage.f) == (77, 8),
    }
    found = [kind for kind, fit in fits.items() if fit and not shift]
    if not found:
        given = f"kind={text.kind!r}, {stage.regularizer}, f={stage.f}, {shift=}, {scale=}"
        raise ValueError(f"diffusers has no pipeline for {given}: save its parts, as model.unet")
    return found[0]


def _save_bert(model: Any, folder: Path) -> dict[str, list[str]]:
    config, words = model.config, model.tokenizer
    card = {"architectures": ["LDMBertModel"], "pad_token_id": words.pad}
    card |= configs.write_fields("LDMBertModel", vars(config) | {"hidden": 4 * config.d_cond})
    write_json(folder / "bert/config.json", card)
    weights.write_tensors(folder / "bert/model.safetensors", weights.exported(_views(model)))
    path = folder / "tokenizer/tokenizer.json"
    words.save(path)
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
    return {
        "requires_safety_checker": False,
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
