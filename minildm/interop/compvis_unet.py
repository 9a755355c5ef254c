"""The official UNet: what its config says, and what it calls our tensors.

Block for block it runs as ours does, so that its lists of blocks count as ours. The official
constructor takes more than the weights depend on; what changes the network is read or, where we
cannot express it, refused.
"""

from collections.abc import Iterator
from typing import Any

from minildm.checkpoints import CheckpointError
from minildm.interop.places import Place, empty, fill, layer
from minildm.interop.reading import Section, Tensors
from minildm.unet import UNet, UNetConfig

TARGET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
IN_WHOLE_MODEL = "model.diffusion_model."  # what its names begin with there

_CH_MULT = (1, 2, 4, 8)  # the official default
_ONLY = {  # what the official code could also do, and no published model does
    "dims": 2,
    "conv_resample": True,
    "num_classes": None,
    "n_embed": None,
    "use_new_attention_order": False,
}
# The side at training, the precision there, and two ways to a head's width that come to the same
# where heads divide the channels; elsewhere UNetConfig refuses.
_UNUSED = ("image_size", "use_fp16", "legacy")

_RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "to_emb": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
}


def load_unet(params: Section, tensors: Tensors) -> UNet:
    """A UNet with its official weights, named as in the UNet itself, without a prefix."""
    config = unet_config(params)
    if any(str(name).startswith(IN_WHOLE_MODEL) for name in tensors.named):
        raise CheckpointError(
            f"{tensors.source} holds a whole model: give the tensors whose names begin with "
            f"{IN_WHOLE_MODEL!r}, without that"
        )
    model = empty(lambda: UNet(config))
    fill(model, places(config), tensors)
    return model.eval()


def unet_config(params: Section) -> UNetConfig:
    """The official `params` of a UNet as our config.

    Raises ValueError for what is missing, not known, or cannot be expressed, with key and value.
    """
    for key, value in _ONLY.items():
        params.choice(key, [value], value)
    shape = _sizes(params) | _heads(params) | {"d_cond": _d_cond(params)}
    params.check_all_read(_UNUSED)
    try:
        return UNetConfig(**shape)
    except ValueError as error:
        raise ValueError(f"{params.where}: {error}") from error


def _sizes(params: Section) -> dict[str, Any]:
    width_mult = params.integers("channel_mult", _CH_MULT)
    if width_mult and width_mult[0] != 1:  # the official last convolution takes model_channels
        raise ValueError(f"{params.where}: channel_mult={list(width_mult)} must begin with 1")
    factors = params.integers("attention_resolutions")  # by which a level is smaller
    switch = [False, True]
    return {
        "in_channels": params.integer("in_channels"),
        "out_channels": params.integer("out_channels"),
        "width": params.integer("model_channels"),
        "width_mult": width_mult,
        "res_blocks": params.integer("num_res_blocks"),
        "attn_levels": tuple(i for i in range(len(width_mult)) if 2**i in factors),
        "depth": params.integer("transformer_depth", 1),
        "dropout": params.number("dropout", 0.0),
        "scale_shift": params.choice("use_scale_shift_norm", switch, False),
        "resblock_updown": params.choice("resblock_updown", switch, False),
        "checkpoint": params.choice("use_checkpoint", switch, False),
    }


def _heads(params: Section) -> dict[str, int | None]:
    """Heads by number or by width; -1 stands for neither, and the width goes first."""
    names = {"heads": "num_heads", "d_head": "num_head_channels"}
    given = {ours: params.given(key, -1) for ours, key in names.items()}
    if not any(given.values()):
        raise ValueError(f"{params.where}: give num_heads or num_head_channels")
    read = {ours: params.integer(key) if given[ours] else None for ours, key in names.items()}
    params.choice("num_heads_upsample", sorted({-1, read["heads"] or -1}), -1)
    return read | {"heads": None} if given["d_head"] else read


def _d_cond(params: Section) -> int | None:
    if params.choice("use_spatial_transformer", [False, True], False):
        return params.integer("context_dim")
    if params.given("context_dim", None):
        width = params.content["context_dim"]
        raise ValueError(f"{params.where}: context_dim={width!r} needs use_spatial_transformer")
    return None


def places(config: UNetConfig) -> Iterator[Place]:
    """Our tensors and the official names, for a UNet of groups=32."""
    for i in (0, 2):
        yield from layer(f"time_mlp.{i}", f"time_embed.{i}")
    yield from _down(config)
    yield from _res_block("middle.0", "middle_block.0", widens=False)
    yield from _attention(config, "middle.1", "middle_block.1")
    yield from _res_block("middle.2", "middle_block.2", widens=False)
    yield from _up(config)
    yield from layer("norm_out", "out.0")
    yield from layer("conv_out", "out.2")


def _down(config: UNetConfig) -> Iterator[Place]:
    yield from layer("down.0.0", "input_blocks.0.0")
    at, channels = 1, config.width
    for i, c_out in enumerate(config.width * m for m in config.width_mult):
        for _ in range(config.res_blocks):
            names = f"down.{at}", f"input_blocks.{at}"
            yield from _stage(config, i, *names, widens=channels != c_out)
            at, channels = at + 1, c_out
        if i < len(config.width_mult) - 1:
            yield from _resample(config, f"down.{at}.0", f"input_blocks.{at}.0", "op")
            at += 1


def _up(config: UNetConfig) -> Iterator[Place]:
    at = 0
    for i in reversed(range(len(config.width_mult))):
        for block in range(config.res_blocks + 1):
            ours, theirs = f"up.{at}", f"output_blocks.{at}"
            yield from _stage(config, i, ours, theirs, widens=True)  # the skip's channels on top
            if i > 0 and block == config.res_blocks:
                last = 2 if i in config.attn_levels else 1
                yield from _resample(config, f"{ours}.{last}", f"{theirs}.{last}", "conv")
            at += 1


def _stage(config: UNetConfig, i: int, ours: str, theirs: str, *, widens: bool) -> Iterator[Place]:
    yield from _res_block(f"{ours}.0", f"{theirs}.0", widens=widens)
    if i in config.attn_levels:
        yield from _attention(config, f"{ours}.1", f"{theirs}.1")


def _resample(config: UNetConfig, ours: str, theirs: str, conv: str) -> Iterator[Place]:
    if config.resblock_updown:
        yield from _res_block(ours, theirs, widens=False)
    else:
        yield from layer(f"{ours}.conv", f"{theirs}.{conv}")


def _res_block(ours: str, theirs: str, *, widens: bool) -> Iterator[Place]:
    for mine, name in _RES_BLOCK.items():
        yield from layer(f"{ours}.{mine}", f"{theirs}.{name}")
    if widens:
        yield from layer(f"{ours}.skip", f"{theirs}.skip_connection")


def _attention(config: UNetConfig, ours: str, theirs: str) -> Iterator[Place]:
    yield from layer(f"{ours}.norm", f"{theirs}.norm")
    if config.d_cond is None:
        for mine, name in (("to_qkv", "qkv"), ("to_out", "proj_out")):  # over flattened pixels
            yield Place(f"{ours}.{mine}.weight", (f"{theirs}.{name}.weight",), flat=1)
            yield Place(f"{ours}.{mine}.bias", (f"{theirs}.{name}.bias",))
        return
    for name in ("proj_in", "proj_out"):
        yield from layer(f"{ours}.{name}", f"{theirs}.{name}")
    for i in range(config.depth):
        yield from transformer_block(f"{ours}.blocks.{i}", f"{theirs}.transformer_blocks.{i}")


def transformer_block(ours: str, theirs: str) -> Iterator[Place]:
    """A block over tokens; diffusers calls its tensors the same."""
    for name in ("norm1", "norm2", "norm3"):
        yield from layer(f"{ours}.{name}", f"{theirs}.{name}")
    for mine, name in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for matrix in ("to_q", "to_k", "to_v"):
            yield Place(f"{ours}.{mine}.{matrix}.weight", (f"{theirs}.{name}.{matrix}.weight",))
        yield from layer(f"{ours}.{mine}.to_out", f"{theirs}.{name}.to_out.0")
    yield from layer(f"{ours}.ff.0.proj", f"{theirs}.ff.net.0.proj")
    yield from layer(f"{ours}.ff.2", f"{theirs}.ff.net.2")
