"""Our tensor names in the official code and in diffusers: functions where blocks are numbered
otherwise, then the rules of tables.yaml.
"""

import re
from collections.abc import Callable

from minildm.compression.autoencoder import AutoencoderConfig
from minildm.diffusion.unet import UNetConfig
from minildm.interop.engine import TABLES, Rules

_LINEAR = r"\.to_(qkv|out)\.weight$"  # 1x1 convolutions of ours
_NAMES = TABLES["names"]


def official_autoencoder(config: AutoencoderConfig) -> Rules:
    """AutoencoderKL and VQModel of the official code."""
    level = _level(config, "{net}.{way}.{i}.", "block.{n}", "attn.{n}", "{way}sample")
    return Rules(level | _NAMES["official_autoencoder"])


def diffusers_autoencoder(config: AutoencoderConfig) -> Rules:
    """AutoencoderKL and VQModel of diffusers, whose attention consists of linear layers."""
    parts = ("resnets.{n}", "attentions.{n}", "{way}samplers.0")
    level = _level(config, "{net}.{way}_blocks.{at}.", *parts)
    return Rules(level | _NAMES["diffusers_autoencoder"], flat=(_LINEAR, 2))


def _level(
    config: AutoencoderConfig, level: str, *parts: str
) -> dict[str, str | Callable[[re.Match[str]], str]]:
    """A level is one list of ours: residual blocks, each with its attention, then resampling."""

    def rename(found: re.Match[str]) -> str:
        net, at, position = found[1], int(found[2]), int(found[3])
        down = net == "encoder"
        i = at if down else len(config.channel_mult) - 1 - at
        n, attends = divmod(position, 2 if i in config.attn_levels else 1)
        part = parts[2 if n == config.num_res_blocks + (not down) else attends]
        words = {"net": net, "way": "down" if down else "up", "i": i, "at": at, "n": n}
        return f"{level}{part}.".format(**words)

    last = {} if config.mid_attn else {r"\.middle\.1\.(?=.)": ".middle.2."}
    return {r"^(encoder|decoder)\.levels\.(\d+)\.(\d+)\.": rename, **last}


def official_unet() -> Rules:
    """UNetModel; its attention consists of convolutions over flattened pixels."""
    return Rules(_NAMES["official_unet"], flat=(_LINEAR, 1))


def diffusers_unet(config: UNetConfig, *, linear: bool = False) -> Rules:
    """UNet2DModel and UNet2DConditionModel.

    linear: spatial transformers begin and end with linear layers (`use_linear_projection`).
    """
    per_level, last = config.num_res_blocks + 1, len(config.channel_mult) - 1

    def rename(found: re.Match[str]) -> str:
        way, at, position = found[1], int(found[2]), int(found[3])
        if way == "down" and at == 0:
            return "conv_in."
        level, n = divmod(at - (way == "down"), per_level)
        attends = (level if way == "down" else last - level) in config.attn_levels
        if position > attends or (way == "down" and n == config.num_res_blocks):
            return f"{way}_blocks.{level}.{way}samplers.0."
        return f"{way}_blocks.{level}.{('resnets', 'attentions')[position]}.{n}."

    norm = {} if config.d_cond else {r"\.norm\.(?=\w+$)": ".group_norm."}
    names = {r"^(down|up)\.(\d+)\.(\d+)\.": rename, **norm, **_NAMES["diffusers_unet"]}
    flat = r"\.proj_(in|out)\.weight$" if linear else _LINEAR
    return Rules(names, flat=(flat, 2), heads=config.heads_of)


def official_conditioner() -> Rules:
    """All encoders; in a transformer's list attention and feed-forward alternate."""
    parts = {"norm1": (0, "0"), "attn": (0, "1"), "norm2": (1, "0")}
    parts |= {"ff.0": (1, "1.net.0.0"), "ff.2": (1, "1.net.2")}

    def rename(found: re.Match[str]) -> str:
        second, part = parts[found[2]]
        return f"transformer.attn_layers.layers.{2 * int(found[1]) + second}.{part}."

    pattern = r"network\.blocks\.(\d+)\.(norm1|attn|norm2|ff\.0|ff\.2)\."
    return Rules({r"^tokens\.": "", pattern: rename, **_NAMES["official_conditioner"]})
