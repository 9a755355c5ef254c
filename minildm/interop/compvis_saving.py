"""Our models as the official code has them: its names for the tensors, its config beside them."""

from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml
from safetensors.torch import save
from torch import Tensor, nn

from minildm.autoencoder import Autoencoder, AutoencoderConfig
from minildm.conditioning import Conditioner
from minildm.diffusion import LatentDiffusion, LatentDiffusionConfig, ScheduleConfig
from minildm.files import atomic_write
from minildm.interop import compvis_autoencoder, compvis_conditioner, compvis_diffusion
from minildm.interop import compvis_unet as unets
from minildm.interop.compvis_conditioner import BERT, CLASSES, MAPS
from minildm.interop.compvis_diffusion import CLIP, clip_of, diffusion_places
from minildm.interop.places import Place, below
from minildm.interop.reading import PathLike, Section
from minildm.schedule import NoiseSchedule
from minildm.tau_theta import ConditionerConfig
from minildm.unet import UNet, UNetConfig

SUFFIXES = (".ckpt", ".safetensors")
_KEYS = {  # what of a batch a condition was trained on
    "none": "image",
    "class": "class_label",
    "text": "caption",
    "layout": "coordinates_bbox",
    "ids": "coordinates_bbox",
    "low_res": "LR_image",
    "inpaint": "masked_image",
    "semantic": "segmentation",
}
# Of our configs, what no weight depends on, and what the official code does its own way.
_FREE = {"zero_init", "commitment", "vq_legacy", "hid_z_channels"}

Official = dict[str, Any]  # a target and its params


def save_compvis(
    model: LatentDiffusion | Autoencoder | UNet | Conditioner,
    path: PathLike,
    *,
    scale_by_std: bool = False,
) -> None:
    """Write a model's tensors by their official names, and its official config beside them.

    path: a `.ckpt` or a `.safetensors`; the config has the same name and `.yaml`. Each file
    appears whole or not at all. `load_compvis` of both gives the same tensors, exactly.
    scale_by_std: scale_factor is a tensor, as where the official code measured it; else it is in
    the config. A frozen CLIP is in the checkpoint, its words are not. Class names, our own
    vocabulary and the boxes of a layout have no official place: tokens come out as numbers.

    Raises ValueError, with the field, for a model that the official code cannot express: other
    groups than 32, pixels that enter as channels, a latent that is shifted, v-prediction, ...
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path={path} must end in {' or '.join(SUFFIXES)}")
    if isinstance(model, LatentDiffusion):
        config, tensors = _whole(model, scale_by_std)
    else:
        config, tensors = _part(model)
    text = yaml.safe_dump({"model": config}, sort_keys=False)
    with atomic_write(path) as file:
        if path.suffix == ".safetensors":
            file.write(save(tensors))
        else:
            _write_pickle(tensors, file)
    with atomic_write(path.with_suffix(".yaml")) as file:
        file.write(text.encode())


def _write_pickle(tensors: dict[str, Tensor], file: BinaryIO) -> None:
    try:
        torch.save({"state_dict": tensors}, file)
    except RuntimeError as error:  # what it says when it could not write hides the reason
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _part(model: Autoencoder | UNet | Conditioner) -> tuple[Official, dict[str, Tensor]]:
    if isinstance(model, Autoencoder):
        if model.scale != 1 or model.shift != 0:
            raise ValueError(
                f"shift={model.shift:.4g}, scale={model.scale:.4g} have no place in a first stage "
                "alone: save the whole model"
            )
        config, places = official_autoencoder(model.config), compvis_autoencoder.places
    elif isinstance(model, UNet):
        config, places = official_unet(model.config, side=64), unets.places
    else:
        config, places = official_conditioner(model), compvis_conditioner.places
        if not isinstance(config, dict) or config["target"] in (CLIP, "torch.nn.Identity"):
            raise ValueError("this conditioner has no tensors of its own: save the whole model")
    return config, _named(model, places(model.config))


def _whole(model: LatentDiffusion, scale_by_std: bool) -> tuple[Official, dict[str, Tensor]]:
    config = official_diffusion(model, scale_by_std)
    whole = nn.ModuleDict({"model": model})
    if clip := clip_of(model):
        whole["clip"] = clip
    tensors = _named(whole, diffusion_places(model.config, clip=clip))
    if model.config.conditioner.concat == "inpaint" and model.config.conditioner.kind == "none":
        first_stage = compvis_autoencoder.places(model.config.autoencoder)
        copies = below(first_stage, "model.autoencoder.", compvis_diffusion.CONDITIONS)
        tensors |= {name: t.clone() for name, t in _named(whole, copies).items()}
    tensors |= schedule_tables(model.config.schedule)
    if scale_by_std:
        tensors["scale_factor"] = _scale_factor(model.autoencoder).float()
    return config, tensors


def _named(model: nn.Module, places: Iterator[Place]) -> dict[str, Tensor]:
    """Tensors by their official names, on the CPU; none holds on to a larger one."""
    state, tensors = model.state_dict(), {}
    for place in places:
        for name, part in zip(place.theirs, place.split(state[place.ours]), strict=True):
            value = part.detach().cpu().contiguous()
            alone = value.untyped_storage().nbytes() == value.nbytes
            tensors[name] = value if alone else value.clone()
    return tensors


def schedule_tables(config: ScheduleConfig) -> dict[str, Tensor]:
    """The official schedule's tables: (T,) each, in float32."""
    if config.kind == "cosine":
        schedule = NoiseSchedule.cosine(config.T)  # in float64
    else:
        make = getattr(NoiseSchedule, config.kind)
        schedule = make(config.T, config.b0, config.b1, dtype=torch.float64)
    abar = schedule.alphas_cumprod.double()
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    alphas, betas = abar / before, 1 - abar / before
    variance = betas * (1 - before) / (1 - abar)
    tables = {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - abar).log(),
        "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - before) * alphas.sqrt() / (1 - abar),
    }
    return {name: table.float() for name, table in tables.items()}


# --- the configs ---


def official_autoencoder(config: AutoencoderConfig, side: int = 256) -> Official:
    """A first stage's target and params. side: of the pictures, a multiple of f."""
    if config.regularizer == "identity":
        return {"target": "ldm.models.autoencoder.IdentityFirstStage", "params": {}}
    kl = config.regularizer == "kl"
    shape = {
        "double_z": kl,
        "z_channels": config.hid_z_channels or config.z_channels,
        "resolution": side,
        "in_channels": config.in_channels,
        "out_ch": config.in_channels,
        "ch": config.width,
        "ch_mult": list(config.width_mult),
        "num_res_blocks": config.res_blocks,
        "attn_resolutions": [side // 2**i for i in config.attn_levels],
        "attn_type": "vanilla" if config.mid_attn else "none",
        "dropout": config.dropout,
    }
    params = {"embed_dim": config.z_channels, "ddconfig": shape}
    params |= {} if kl else {"n_embed": config.codebook_size}
    params["lossconfig"] = {"target": "torch.nn.Identity"}
    target = f"ldm.models.autoencoder.{'AutoencoderKL' if kl else 'VQModelInterface'}"
    read = compvis_autoencoder.autoencoder_config(target, Section(params, "autoencoder"))
    _check_same("autoencoder", asdict(config), asdict(read))
    return {"target": target, "params": params}


def official_unet(config: UNetConfig, side: int) -> Official:
    """A UNet's target and params. side: of the latents."""
    by_number = config.heads is not None
    params = {
        "image_size": side,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": config.width,
        "attention_resolutions": [2**i for i in config.attn_levels],
        "num_res_blocks": config.res_blocks,
        "channel_mult": list(config.width_mult),
        "num_heads" if by_number else "num_head_channels": config.heads or config.d_head,
        "dropout": config.dropout,
        "use_scale_shift_norm": config.scale_shift,
        "resblock_updown": config.resblock_updown,
        "use_checkpoint": config.checkpoint,
    }
    if config.d_cond is not None:
        params |= {"use_spatial_transformer": True, "context_dim": config.d_cond}
        params["transformer_depth"] = config.depth
    _check_same("unet", asdict(config), asdict(unets.unet_config(Section(params, "unet"))))
    return {"target": unets.TARGET, "params": params}


def official_conditioner(model: Conditioner) -> Official | str:
    """`cond_stage_config`: a target and params, or the word for none of its own."""
    config: ConditionerConfig = model.config
    if config.kind == "none":
        words = {"none": "__is_unconditional__", "inpaint": "__is_first_stage__"}
        if config.concat == "semantic":
            sizes = {"n_stages": config.stages, "in_channels": len(config.labels)}
            return {"target": MAPS, "params": sizes | {"out_channels": config.channels}}
        return words.get(config.concat, {"target": "torch.nn.Identity", "params": {}})
    if config.concat == "semantic":
        raise ValueError(f"conditioner: concat='semantic' beside kind={config.kind!r} {_NO}")
    if config.kind == "class":
        n = len(config.classes) + config.null_class
        return {"target": CLASSES, "params": {"embed_dim": config.d_cond, "n_classes": n}}
    if config.encoder == "clip":
        return {"target": CLIP, "params": {"max_length": config.length}}
    if config.encoder != "trained" or (config.heads, config.d_head) != (8, 64):
        odd = f"encoder={config.encoder!r}, heads={config.heads}, d_head={config.d_head}"
        raise ValueError(f"conditioner: {odd} {_NO}, only 'clip', or 'trained' with 8 heads of 64")
    network = getattr(model, "tokens", model).network
    words_and_places = network.embedding.num_embeddings, network.position.num_embeddings
    params = {"n_embed": config.d_cond, "n_layer": config.depth}
    params |= dict(zip(("vocab_size", "max_seq_len"), words_and_places, strict=True))
    params["use_tokenizer"] = config.kind == "text" and words_and_places[0] == 30522
    return {"target": BERT, "params": params}


def official_diffusion(model: LatentDiffusion, scale_by_std: bool = False) -> Official:
    """A whole model's target and params."""
    config, conditioner = model.config, model.config.conditioner
    if model.autoencoder.shift != 0:
        raise ValueError(f"autoencoder: shift={model.autoencoder.shift:.4g} {_NO}, only 0")
    side = config.image_size // config.autoencoder.f
    tokens, beside = conditioner.kind != "none", conditioner.concat != "none"
    key = "hybrid" if tokens and beside else "crossattn" if tokens else None
    stage = official_conditioner(model.conditioner)
    params = _timing(config) | {
        "image_size": side,
        "channels": config.autoencoder.z_channels,
        "first_stage_key": "image",
        "cond_stage_key": _KEYS[conditioner.kind if tokens else conditioner.concat],
        "cond_stage_trainable": isinstance(stage, dict) and conditioner.encoder == "trained",
        "conditioning_key": key,
        "concat_mode": beside,
        "use_ema": False,
        "unet_config": official_unet(config.unet, side),
        "first_stage_config": official_autoencoder(config.autoencoder, config.image_size),
        "cond_stage_config": stage,
    }
    factor = {"scale_by_std": True} if scale_by_std else {}
    if not scale_by_std:
        factor["scale_factor"] = _scale_factor(model.autoencoder).item()
    return {"target": compvis_diffusion.TARGET, "params": params | factor}


def _timing(config: LatentDiffusionConfig) -> Official:
    schedule, objective = config.schedule, config.objective
    kinds = {ours: theirs for theirs, ours in compvis_diffusion.KINDS.items()}
    predicts = {ours: theirs for theirs, ours in compvis_diffusion.PREDICTS.items()}
    if schedule.zero_terminal_snr or objective.predict not in predicts:
        odd = f"zero_terminal_snr={schedule.zero_terminal_snr}, predict={objective.predict!r}"
        raise ValueError(f"{odd} {_NO}, only False with 'eps' or 'z0'")
    return {
        "timesteps": schedule.T,
        "beta_schedule": kinds[schedule.kind],
        "linear_start": schedule.b0,
        "linear_end": schedule.b1,
        "parameterization": predicts[objective.predict],
        "loss_type": objective.loss,
    }


_NO = "cannot be expressed in the official code"


def _check_same(where: str, ours: dict[str, Any], read: dict[str, Any]) -> None:
    """ValueError names what the official code would take for something else."""
    odd = [name for name in ours if name not in _FREE and ours[name] != read[name]]
    if odd:
        listed = ", ".join(f"{name}={ours[name]!r} (only {read[name]!r})" for name in odd)
        raise ValueError(f"{where}: {listed} {_NO}")


def _scale_factor(autoencoder: Autoencoder) -> Tensor:
    """1 / scale in float64: in float32, too, what comes back is the same scale."""
    scale = autoencoder.scale.detach().double().cpu()
    factor = 1 / scale
    near = factor.float()
    for candidate in chain([near], *([near.nextafter(near.new_tensor(e))] for e in (0.0, 9e9))):
        if (1 / candidate.double()).float() == scale.float():
            return candidate.double()
    return factor
