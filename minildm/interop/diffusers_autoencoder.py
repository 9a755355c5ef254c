"""First stages of diffusers: what their configs say, what they call our tensors; and back."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minildm.autoencoder import Autoencoder, AutoencoderConfig
from minildm.interop.places import Place, fill, layer
from minildm.interop.reading import Section, Tensors

KINDS = {"AutoencoderKL": "kl", "VQModel": "vq"}

_SCALING = 0.18215  # of both classes, where a config says nothing
_ONLY = {  # what diffusers could also do, and we cannot
    "norm_type": "group",
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "lookup_from_codebook": False,
}
# The side at training, and a precision. `sample_size` is the UNet's to say.
_UNUSED = ("sample_size", "force_upcast")
_DOWN = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")  # without and with attention
_UP = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


def load_autoencoder(kind: str, params: Section, tensors: Tensors) -> Autoencoder:
    """A first stage with its weights; `scaling_factor` and `shift_factor` are its normalisation."""
    scaling = params.number("scaling_factor", _SCALING)
    if not scaling > 0:
        raise ValueError(f"{params.where}: scaling_factor={scaling} must be positive")
    shift = params.number("shift_factor") if params.given("shift_factor", None) else 0.0
    config = autoencoder_config(kind, params)
    with torch.device("meta"):
        model = Autoencoder(config)
    # Counters at zero: a codebook's codes count as used just now, so that training keeps them.
    own = {name: torch.zeros(b.shape, dtype=b.dtype) for name, b in model.named_buffers()}
    own |= {"scale": torch.tensor(1 / scaling), "shift": torch.tensor(shift)}
    fill(model, places(config), tensors, own=own)
    return model.eval()


def autoencoder_config(kind: str, params: Section) -> AutoencoderConfig:
    """The parameters of an AutoencoderKL or a VQModel as our config.

    Raises ValueError for what is missing, not known, or cannot be expressed, with key and value.
    """
    for key, value in _ONLY.items():
        params.choice(key, [value], value)
    params.choice("act_fn", ["silu", "swish"], "silu")  # two names of one
    c_in = params.integer("in_channels", 3)
    params.choice("out_channels", [c_in], 3)
    latent = params.integer("latent_channels", {"kl": 4, "vq": 3}[KINDS[kind]])
    width, width_mult = widths(params)
    shape: dict[str, Any] = {"z_channels": latent}
    if KINDS[kind] == "vq":
        c = params.integer("vq_embed_dim") if params.given("vq_embed_dim", None) else latent
        shape = {"z_channels": c, "hid_z_channels": None if c == latent else latent}
        # Its quantiser comes in the "legacy" form, with a beta that no config sets.
        shape |= {"codebook_size": params.integer("num_vq_embeddings", 256), "vq_legacy": True}
    shape |= {
        "in_channels": c_in,
        "width": width,
        "width_mult": width_mult,
        "res_blocks": params.integer("layers_per_block", 1),
        "attn_levels": _attn_levels(params, len(width_mult)),
        "mid_attn": params.choice("mid_block_add_attention", [True, False], True),
        "groups": params.integer("norm_num_groups", 32),
    }
    params.check_all_read((*_UNUSED, "scaling_factor", "shift_factor"))
    try:
        return AutoencoderConfig(regularizer=KINDS[kind], **shape)
    except ValueError as error:
        raise ValueError(f"{params.where}: {error}") from error


def widths(params: Section) -> tuple[int, tuple[int, ...]]:
    """`block_out_channels` as a width and its multiples; ValueError for what is none."""
    channels = params.integers("block_out_channels")
    if not channels or channels[0] < 1 or any(c % channels[0] for c in channels):
        raise ValueError(
            f"{params.where}: block_out_channels={list(channels)} must be multiples of the first"
        )
    return channels[0], tuple(c // channels[0] for c in channels)


def _attn_levels(params: Section, levels: int) -> tuple[int, ...]:
    down, up = params.names("down_block_types", _DOWN), params.names("up_block_types", _UP)
    attends = [name == _DOWN[1] for name in down]
    if len(down) != levels or attends[::-1] != [name == _UP[1] for name in up]:
        raise ValueError(
            f"{params.where}: up_block_types={list(up)} must mirror down_block_types={list(down)}, "
            f"one for each of the {levels} block_out_channels"
        )
    return tuple(i for i, attend in enumerate(attends) if attend)


def places(config: AutoencoderConfig) -> Iterator[Place]:
    """Our tensors and diffusers' names."""
    yield from _half(config, "encoder", "down_blocks", "downsamplers", config.res_blocks)
    yield from layer("encoder.to_moments", "quant_conv")
    if config.regularizer == "vq":
        yield Place("decoder.quantizer.codebook", ("quantize.embedding.weight",))
    yield from layer("decoder.from_z", "post_quant_conv")
    yield from _half(config, "decoder", "up_blocks", "upsamplers", config.res_blocks + 1)


def _half(
    config: AutoencoderConfig, net: str, levels: str, resample: str, blocks: int
) -> Iterator[Place]:
    yield from layer(f"{net}.conv_in", f"{net}.conv_in")
    order = list(enumerate(config.width_mult))
    before = 1
    if net == "decoder":  # both begin at the coarsest
        order.reverse()
        before = config.width_mult[-1]
    for at, (i, mult) in enumerate(order):
        ours, theirs = f"{net}.levels.{at}", f"{net}.{levels}.{at}"
        step = 2 if i in config.attn_levels else 1
        for b in range(blocks):
            widens = b == 0 and mult != before
            yield from _res_block(f"{ours}.{b * step}", f"{theirs}.resnets.{b}", widens=widens)
            if i in config.attn_levels:
                yield from attention(f"{ours}.{b * step + 1}", f"{theirs}.attentions.{b}")
        if at < len(order) - 1:
            yield from layer(f"{ours}.{blocks * step}.conv", f"{theirs}.{resample}.0.conv")
        before = mult
    yield from _res_block(f"{net}.middle.0", f"{net}.mid_block.resnets.0", widens=False)
    if config.mid_attn:
        yield from attention(f"{net}.middle.1", f"{net}.mid_block.attentions.0")
    last = 2 if config.mid_attn else 1
    yield from _res_block(f"{net}.middle.{last}", f"{net}.mid_block.resnets.1", widens=False)
    yield from layer(f"{net}.norm_out", f"{net}.conv_norm_out")
    yield from layer(f"{net}.conv_out", f"{net}.conv_out")


def _res_block(ours: str, theirs: str, *, widens: bool) -> Iterator[Place]:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield from layer(f"{ours}.{name}", f"{theirs}.{name}")
    if widens:
        yield from layer(f"{ours}.skip", f"{theirs}.conv_shortcut")


def attention(ours: str, theirs: str, heads: int = 1) -> Iterator[Place]:
    """Self-attention: there q, k, v and the last projection are linear layers."""
    yield from layer(f"{ours}.norm", f"{theirs}.group_norm")
    parts = {"to_qkv": ("to_q", "to_k", "to_v"), "to_out": ("to_out.0",)}
    for mine, names in parts.items():
        heads_of = heads if mine == "to_qkv" else 1
        for kind, flat in (("weight", 2), ("bias", 0)):
            named = tuple(f"{theirs}.{name}.{kind}" for name in names)
            yield Place(f"{ours}.{mine}.{kind}", named, flat=flat, heads=heads_of)


def export(
    model: Autoencoder, *, fold_scale: bool = False
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The class, the config and the tensors of a first stage, as diffusers has them.

    The shift goes into the 1x1 convolutions: no pipeline of latent diffusion reads one; the scale,
    too, with fold_scale, where it is not read either. Else it is `scaling_factor`. Raises
    ValueError for what diffusers cannot express.
    """
    config = model.config
    _check_expressible(config)
    state, scale = _folded(model, fold_scale=fold_scale), float(model.scale)
    tensors = {
        name: part
        for place in places(config)
        for name, part in zip(place.theirs, place.split(state[place.ours]), strict=True)
    }
    attends = [i in config.attn_levels for i in range(len(config.width_mult))]
    vq = config.regularizer == "vq"
    params = {
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "down_block_types": [_DOWN[a] for a in attends],
        "up_block_types": [_UP[a] for a in attends[::-1]],
        "block_out_channels": [config.width * m for m in config.width_mult],
        "layers_per_block": config.res_blocks,
        "act_fn": "silu",
        "latent_channels": config.hid_z_channels or config.z_channels,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.mid_attn,
        "scaling_factor": 1.0 if fold_scale else _reciprocal(scale),
    }
    if vq:
        codes = {"num_vq_embeddings": config.codebook_size, "vq_embed_dim": config.z_channels}
        return "VQModel", params | codes, tensors
    return "AutoencoderKL", params, tensors


def _check_expressible(config: AutoencoderConfig) -> None:
    flaw = ""
    if config.regularizer == "identity":
        flaw = "regularizer='identity': diffusers has no first stage that leaves pixels as they are"
    elif config.patch != 1:
        flaw = (
            f"patch={config.patch}: there pixels do not enter {config.patch}x{config.patch} as "
            "channels, and convolutions that are the same at every pixel cannot stand for that; "
            "only patch=1 can be saved, or the UNet by itself"
        )
    elif config.width_mult[0] != 1:
        flaw = f"width_mult={config.width_mult}: there the first level has the width of conv_in"
    elif config.regularizer == "kl" and config.hid_z_channels not in (None, config.z_channels):
        flaw = (
            f"hid_z_channels={config.hid_z_channels}: AutoencoderKL's 1x1 convolutions keep the "
            f"number of channels, z_channels={config.z_channels}"
        )
    if flaw:
        raise ValueError(f"diffusers cannot express this first stage: {flaw}")


def check_pixels(model: Autoencoder) -> None:
    """ValueError where pixels are shifted or scaled before they are noised."""
    if (float(model.shift), float(model.scale)) != (0.0, 1.0):
        raise ValueError(
            f"diffusers cannot express pixels with shift={float(model.shift):.6g}, scale="
            f"{float(model.scale):.6g}; only 0 and 1"
        )


def _folded(model: Autoencoder, *, fold_scale: bool) -> dict[str, Tensor]:
    """The tensors of a first stage whose latents need no shift (and no scale) any more."""
    state, c = dict(model.state_dict()), model.config.z_channels
    shift, scale = float(model.shift), float(model.scale) if fold_scale else 1.0
    if (shift, scale) == (0.0, 1.0):
        return state
    names = ("encoder.to_moments", "decoder.from_z")
    (w_in, b_in), (w_out, b_out) = (
        [state[f"{name}.{kind}"].double() for kind in ("weight", "bias")] for name in names
    )
    spread = w_in.new_full((len(b_in) - c,), 2 * math.log(scale))  # KL: the log-variance
    w_in = torch.cat([w_in[:c] / scale, w_in[c:]])
    b_in = torch.cat([(b_in[:c] - shift) / scale, b_in[c:] - spread])
    b_out = b_out + shift * w_out.sum((1, 2, 3))
    changed = {
        f"{names[0]}.weight": w_in,
        f"{names[0]}.bias": b_in,
        f"{names[1]}.weight": w_out * scale,
        f"{names[1]}.bias": b_out,
    }
    if model.config.regularizer == "vq":  # distances keep their order
        codes = "decoder.quantizer.codebook"
        changed[codes] = (state[codes].double() - shift) / scale
    return state | {name: tensor.to(state[name]) for name, tensor in changed.items()}


def _reciprocal(scale: float) -> float:
    """The shortest number whose reciprocal, in float32, is the scale."""
    for digits in range(1, 17):
        short = float(f"{1 / scale:.{digits}g}")
        if torch.tensor(1 / short) == torch.tensor(scale):
            return short
    return 1 / scale
