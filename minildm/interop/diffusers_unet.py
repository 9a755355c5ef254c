"""UNets of diffusers: what their configs say, what they call our tensors; and back.

Two classes there: UNet2DModel has self-attention, UNet2DConditionModel cross-attention. What the
latter calls `attention_head_dim` is the number of heads, in the former it is their width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minildm.interop.compvis_unet import transformer_block
from minildm.interop.diffusers_autoencoder import attention, widths
from minildm.interop.places import Place, fill, layer
from minildm.interop.reading import Section, Tensors
from minildm.unet import UNet, UNetConfig

SELF, CROSS = KINDS = ("UNet2DModel", "UNet2DConditionModel")

_ONE, _NO = (1, 1.0), (None,)  # the values that we can express, the default first
_ONLY: dict[str, Sequence[object]] = {  # what diffusers could also do, and we cannot
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0, 0.0),
    "downsample_padding": _ONE,
    "mid_block_scale_factor": _ONE,
    "act_fn": ("silu", "swish"),  # two names of one
    "norm_eps": (1e-5,),
    "class_embed_type": _NO,
    "num_class_embeds": _NO,
}
_ONLY_OF = {
    SELF: {"mid_block_type": ("UNetMidBlock2D",), "add_attention": (True,)},
    CROSS: {
        "mid_block_type": ("UNetMidBlock2DCrossAttn",),
        "only_cross_attention": (False,),
        "mid_block_only_cross_attention": (None, False),
        "dual_cross_attention": (False,),
        "cross_attention_norm": _NO,
        "attention_type": ("default",),
        "num_attention_heads": _NO,
        "reverse_transformer_layers_per_block": _NO,
        "encoder_hid_dim": _NO,
        "encoder_hid_dim_type": _NO,
        "addition_embed_type": _NO,
        "addition_time_embed_dim": _NO,
        "projection_class_embeddings_input_dim": _NO,
        "class_embeddings_concat": (False,),
        "resnet_skip_time_act": (False,),
        "resnet_out_scale_factor": (1.0, 1),
        "time_embedding_act_fn": _NO,
        "timestep_post_act": _NO,
        "time_cond_proj_dim": _NO,
        "conv_in_kernel": (3,),
        "conv_out_kernel": (3,),
    },
}
# The latent's side; a precision; what belongs to things that are refused above.
_UNUSED = (
    "sample_size",
    "upcast_attention",
    "num_train_timesteps",
    "addition_embed_type_num_heads",
)

# A block's name -> whether it attends, and how it changes the size; None: as the config says
_BLOCKS = {
    SELF: {
        "DownBlock2D": (False, "conv"),
        "ResnetDownsampleBlock2D": (False, "resnet"),
        "AttnDownBlock2D": (True, None),
    },
    CROSS: {"DownBlock2D": (False, "conv"), "CrossAttnDownBlock2D": (True, "conv")},
}
_UP_OF = {  # and of the way up
    "DownBlock2D": "UpBlock2D",
    "ResnetDownsampleBlock2D": "ResnetUpsampleBlock2D",
    "AttnDownBlock2D": "AttnUpBlock2D",
    "CrossAttnDownBlock2D": "CrossAttnUpBlock2D",
}

_RES_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "to_emb": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
}


def load_unet(kind: str, params: Section, tensors: Tensors) -> UNet:
    """A UNet with its weights."""
    config = unet_config(kind, params)
    linear = bool(params.content.get("use_linear_projection", False))
    with torch.device("meta"):
        model = UNet(config)
    fill(model, places(config, linear=linear), tensors)
    return model.eval()


def unet_config(kind: str, params: Section) -> UNetConfig:
    """The parameters of a UNet2DModel or a UNet2DConditionModel as our config.

    Raises ValueError for what is missing, not known, or cannot be expressed, with key and value.
    """
    for key, values in (_ONLY | _ONLY_OF[kind]).items():
        params.choice(key, values, values[0])
    width, width_mult = widths(params)
    params.choice("time_embedding_dim", [None, 4 * width], None)
    groups = params.integer("norm_num_groups", 32)
    shape: dict[str, Any] = {
        "in_channels": params.integer("in_channels"),
        "out_channels": params.integer("out_channels"),
        "width": width,
        "width_mult": width_mult,
        "res_blocks": params.integer("layers_per_block", 2),
        "groups": groups,
        "dropout": params.number("dropout", 0.0),
    }
    norms = params.choice("resnet_time_scale_shift", ["default", "scale_shift"], "default")
    shape["scale_shift"] = norms == "scale_shift"
    shape |= _levels(kind, params, [width * m for m in width_mult])
    if kind == SELF:  # with scale and shift there, the middle's attention may lack its norm
        norms = [groups] if shape["scale_shift"] else [None, groups]
        params.choice("attn_norm_num_groups", norms, None)
    else:
        params.choice("use_linear_projection", [False, True], False)
        shape["d_cond"] = params.integer("cross_attention_dim", 1280)
        shape["depth"] = _same(params, "transformer_layers_per_block", len(width_mult), 1)
    params.check_all_read(_UNUSED)
    try:
        return UNetConfig(**shape)
    except ValueError as error:
        raise ValueError(f"{params.where}: {error}") from error


def _levels(kind: str, params: Section, channels: list[int]) -> dict[str, Any]:
    """Where it attends, by how many heads, and how levels change the size."""
    blocks = _BLOCKS[kind]
    down = params.names("down_block_types", tuple(blocks))
    up = params.names("up_block_types", tuple(_UP_OF[name] for name in blocks))
    resize = {"down": "conv", "up": "conv"}
    if kind == SELF:
        for way in resize:
            resize[way] = params.choice(f"{way}sample_type", ["conv", "resnet"], "conv")
    ups = {_UP_OF[name]: value for name, value in blocks.items()}
    on_way_down = [blocks[name] for name in down]
    on_way_up = [ups[name] for name in reversed(up)]  # from level 0 on
    attends = [attend for attend, _ in on_way_down]
    if len(down) != len(channels) or attends != [attend for attend, _ in on_way_up]:
        raise ValueError(
            f"{params.where}: up_block_types={list(up)} must mirror down_block_types={list(down)}, "
            f"one for each of the {len(channels)} block_out_channels"
        )
    # the last level does not halve, level 0 does not double
    ways = {how or resize["down"] for _, how in on_way_down[:-1]}
    ways |= {how or resize["up"] for _, how in on_way_up[1:]}
    if len(ways) > 1:
        raise ValueError(
            f"{params.where}: down_block_types={list(down)} and up_block_types={list(up)} with "
            f"downsample_type={resize['down']!r}, upsample_type={resize['up']!r} resize partly by "
            "convolutions, partly by residual blocks; all must do the same"
        )
    attn_levels = tuple(i for i, attend in enumerate(attends) if attend)
    heads = _heads(kind, params, channels, {*attn_levels, len(channels) - 1})
    return {"attn_levels": attn_levels, "resblock_updown": ways == {"resnet"}, **heads}


def _heads(
    kind: str, params: Section, channels: list[int], attending: set[int]
) -> dict[str, int | None]:
    key = "attention_head_dim"
    if kind == SELF:
        if key in params.content and not params.given(key, None):
            return {"heads": 1, "d_head": None}  # as wide as the level
        return {"heads": None, "d_head": params.integer(key, 8)}
    if not isinstance(params.content.get(key, 8), Sequence):
        return {"heads": params.integer(key, 8), "d_head": None}
    heads = params.integers(key)
    if len(heads) == len(channels) and min(heads) > 0:
        for levels in (range(len(channels)), attending):  # elsewhere a number says nothing
            each = {channels[i] / heads[i] for i in levels}
            if len(each) == 1 and (d_head := each.pop()).is_integer():
                return {"heads": None, "d_head": int(d_head)}
            if len({heads[i] for i in levels}) == 1:
                return {"heads": heads[-1], "d_head": None}
    raise ValueError(
        f"{params.where}: {key}={list(heads)} cannot be expressed, only one number of heads for "
        "all levels that attend, or one width of heads"
    )


def _same(params: Section, key: str, n: int, default: int) -> int:
    """A number that may also be said once for each level."""
    if not isinstance(params.content.get(key, default), Sequence):
        return params.integer(key, default)
    values = params.integers(key)
    if len(values) != n or len(set(values)) != 1 or values[0] < 1:
        raise ValueError(
            f"{params.where}: {key}={list(values)} cannot be expressed, only one for all levels"
        )
    return values[0]


def places(config: UNetConfig, *, linear: bool = False) -> Iterator[Place]:
    """Our tensors and diffusers' names. linear: transformers begin and end with linear layers."""
    for i in (0, 2):
        yield from layer(f"time_mlp.{i}", f"time_embedding.linear_{1 + i // 2}")
    yield from layer("down.0.0", "conv_in")
    yield from _down(config, linear)
    yield from _res_block("middle.0", "mid_block.resnets.0", widens=False)
    width = config.width * config.width_mult[-1]
    yield from _attention(config, "middle.1", "mid_block.attentions.0", width, linear)
    yield from _res_block("middle.2", "mid_block.resnets.1", widens=False)
    yield from _up(config, linear)
    yield from layer("norm_out", "conv_norm_out")
    yield from layer("conv_out", "conv_out")


def _down(config: UNetConfig, linear: bool) -> Iterator[Place]:
    at, channels = 1, config.width
    for i, c_out in enumerate(config.width * m for m in config.width_mult):
        block = f"down_blocks.{i}"
        for j in range(config.res_blocks):
            yield from _res_block(f"down.{at}.0", f"{block}.resnets.{j}", widens=channels != c_out)
            if i in config.attn_levels:
                names = f"down.{at}.1", f"{block}.attentions.{j}"
                yield from _attention(config, *names, c_out, linear)
            at, channels = at + 1, c_out
        if i < len(config.width_mult) - 1:
            yield from _resample(config, f"down.{at}.0", f"{block}.downsamplers.0")
            at += 1


def _up(config: UNetConfig, linear: bool) -> Iterator[Place]:
    at = 0
    for k, i in enumerate(reversed(range(len(config.width_mult)))):
        block, width = f"up_blocks.{k}", config.width * config.width_mult[i]
        for j in range(config.res_blocks + 1):  # each with the skip's channels on top
            yield from _res_block(f"up.{at}.0", f"{block}.resnets.{j}", widens=True)
            if i in config.attn_levels:
                names = f"up.{at}.1", f"{block}.attentions.{j}"
                yield from _attention(config, *names, width, linear)
            if i > 0 and j == config.res_blocks:
                last = 2 if i in config.attn_levels else 1
                yield from _resample(config, f"up.{at}.{last}", f"{block}.upsamplers.0")
            at += 1


def _resample(config: UNetConfig, ours: str, theirs: str) -> Iterator[Place]:
    if config.resblock_updown:
        yield from _res_block(ours, theirs, widens=False)
    else:
        yield from layer(f"{ours}.conv", f"{theirs}.conv")


def _res_block(ours: str, theirs: str, *, widens: bool) -> Iterator[Place]:
    for mine, name in _RES_BLOCK.items():
        yield from layer(f"{ours}.{mine}", f"{theirs}.{name}")
    if widens:
        yield from layer(f"{ours}.skip", f"{theirs}.conv_shortcut")


def _attention(
    config: UNetConfig, ours: str, theirs: str, channels: int, linear: bool
) -> Iterator[Place]:
    if config.d_cond is None:
        yield from attention(ours, theirs, config.heads_of(channels))
        return
    yield from layer(f"{ours}.norm", f"{theirs}.norm")
    for name in ("proj_in", "proj_out"):
        flat = 2 if linear else 0
        yield Place(f"{ours}.{name}.weight", (f"{theirs}.{name}.weight",), flat=flat)
        yield Place(f"{ours}.{name}.bias", (f"{theirs}.{name}.bias",))
    for i in range(config.depth):
        yield from transformer_block(f"{ours}.blocks.{i}", f"{theirs}.transformer_blocks.{i}")


def export(model: UNet, side: int | None = None) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The class, the config and the tensors of a UNet, as diffusers has them.

    side: of the latents that it was made for. Raises ValueError for what diffusers cannot express.
    """
    config, state = model.config, model.state_dict()
    kind = SELF if config.d_cond is None else CROSS
    params = _sizes(config, kind) | _resizing(config, kind) | {"sample_size": side}
    tensors = {
        name: part
        for place in places(config)
        for name, part in zip(place.theirs, place.split(state[place.ours]), strict=True)
    }
    return kind, params, tensors


def _sizes(config: UNetConfig, kind: str) -> dict[str, Any]:
    if config.width_mult[0] != 1:
        raise ValueError(
            f"diffusers cannot express this UNet: width_mult={config.width_mult}: there the first "
            "level has the width of conv_in"
        )
    params = {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": [config.width * m for m in config.width_mult],
        "layers_per_block": config.res_blocks,
        "norm_num_groups": config.groups,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "dropout": config.dropout,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "attention_head_dim": _head_dim(config, kind),
    }
    if kind == SELF:
        return params | {"attn_norm_num_groups": config.groups}
    transformers = {"transformer_layers_per_block": config.depth}
    return params | transformers | {"cross_attention_dim": config.d_cond}


def _head_dim(config: UNetConfig, kind: str) -> int | list[int]:
    """The number of heads, or their width: see the module."""
    channels = [config.width * m for m in config.width_mult]
    if kind == CROSS:
        if config.heads is not None:
            return config.heads
        return [max(1, c // config.d_head) for c in channels]
    attending = {channels[i] for i in config.attn_levels} | {channels[-1]}
    found = {c // config.heads_of(c) for c in attending}
    if len(found) > 1:
        raise ValueError(
            f"diffusers cannot express this UNet: heads={config.heads} on levels of "
            f"{sorted(attending)} channels; UNet2DModel has one width of heads (d_head)"
        )
    return found.pop()


def _resizing(config: UNetConfig, kind: str) -> dict[str, Any]:
    attends = [i in config.attn_levels for i in range(len(config.width_mult))]
    plain, attending, types = "DownBlock2D", "AttnDownBlock2D", {}
    if kind == CROSS:
        attending = "CrossAttnDownBlock2D"
        if config.resblock_updown and len(attends) > 1:
            raise ValueError(
                "diffusers cannot express this UNet: resblock_updown=True with d_cond="
                f"{config.d_cond}; UNet2DConditionModel changes the size by convolutions"
            )
    else:
        way = "resnet" if config.resblock_updown else "conv"
        types = {"downsample_type": way, "upsample_type": way}
        plain = "ResnetDownsampleBlock2D" if config.resblock_updown else plain
    down = [attending if attend else plain for attend in attends]
    return types | {"down_block_types": down, "up_block_types": [_UP_OF[d] for d in down[::-1]]}
