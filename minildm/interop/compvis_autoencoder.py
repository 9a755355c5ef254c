"""The official first stages: what their configs say, and what they call our tensors.

The official constructors take more than the weights depend on; what changes the network is read
or, where we cannot express it, refused.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minildm.autoencoder import Autoencoder, AutoencoderConfig
from minildm.interop.places import Place, empty, fill, layer
from minildm.interop.reading import Section, Tensors

TARGETS = {
    "ldm.models.autoencoder.AutoencoderKL": "kl",
    "ldm.models.autoencoder.VQModel": "vq",
    "ldm.models.autoencoder.VQModelInterface": "vq",
    "ldm.models.autoencoder.IdentityFirstStage": "identity",
}

# Of the first stage's own tensors, those that inference does not need: discriminator, LPIPS and
# their like, averages of the weights (names without dots), colours for semantic maps.
UNUSED = re.compile(r"loss\.|model_ema\.|colorize$")

# Where a whole latent diffusion model keeps its first stage, and what else it holds.
FIRST_STAGE = "first_stage_model."
LDM_PARTS = re.compile(
    r"model\.|model_ema\.|cond_stage_model\.|logvar$|scale_factor$|betas$|lvlb_weights$"
    r"|(sqrt_|log_|posterior_|alphas_cumprod)[a-z0-9_]*$"
)

_TRAINING = ("lossconfig", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor")
_VQ_TRAINING = ("batch_resize_range", "scheduler_config", "lr_g_factor", "use_ema")
_CH_MULT = (1, 2, 4, 8)  # the official default
_ONLY = {  # of ddconfig: what the official code could also do, and no published model does
    "resamp_with_conv": True,
    "use_linear_attn": False,
    "give_pre_end": False,
    "tanh_out": False,
}


def load_autoencoder(target: str, params: Section, tensors: Tensors) -> Autoencoder:
    """A first stage with its official weights; of a whole model's, those below its name."""
    config = autoencoder_config(target, params)
    model = empty(lambda: Autoencoder(config))
    fill(model, places(config), _first_stage_of(tensors), own=own_buffers(model), unused=UNUSED)
    return model.eval()


def own_buffers(model: Autoencoder) -> dict[str, Tensor]:
    """What no official file holds: shift 0, scale 1, a codebook's counters.

    Those at zero: its codes count as used just now, so that training keeps them.
    """
    own = {name: torch.zeros(b.shape, dtype=b.dtype) for name, b in model.named_buffers()}
    return own | {"scale": torch.ones(())}


def _first_stage_of(tensors: Tensors) -> Tensors:
    whole = (FIRST_STAGE, "model.diffusion_model.")
    if not any(str(name).startswith(whole) for name in tensors.named):
        return tensors
    kept = {
        str(name).removeprefix(FIRST_STAGE): value
        for name, value in tensors.named.items()
        if str(name).startswith(FIRST_STAGE) or not LDM_PARTS.match(str(name))
    }
    return tensors._replace(named=kept)


def autoencoder_config(target: str, params: Section) -> AutoencoderConfig:
    """The official `params` of a first stage as our config.

    Raises ValueError for what is missing, not known, or cannot be expressed, with key and value.
    """
    regularizer = TARGETS[target]
    if regularizer == "identity":
        return AutoencoderConfig(regularizer="identity", in_channels=3, z_channels=3)
    shape, codebook = params.section("ddconfig"), {}
    for key, value in _ONLY.items():
        shape.choice(key, [value], value)
    shape.choice("double_z", [regularizer == "kl"], True)  # mean and log-variance, or z alone
    if regularizer == "vq":
        params.choice("remap", [None], None)
        size = params.integer("n_embed")
        # The official quantiser comes in its "legacy" form, with a beta that no config sets.
        codebook = {"codebook_size": size, "commitment": 0.25, "vq_legacy": True}
    sizes = _sizes(params, shape)
    shape.check_all_read()
    unused = (*_VQ_TRAINING, "sane_index_shape") if regularizer == "vq" else ()
    params.check_all_read((*_TRAINING, *unused))
    try:
        return AutoencoderConfig(regularizer=regularizer, **sizes, **codebook)
    except ValueError as error:
        raise ValueError(f"{params.where}: {error}") from error


def _sizes(params: Section, shape: Section) -> dict[str, Any]:
    c_in = shape.integer("in_channels")
    shape.choice("out_ch", [c_in])
    z_channels, hid_z = params.integer("embed_dim"), shape.integer("z_channels")
    attends = shape.choice("attn_type", ["vanilla", "none"], "vanilla") == "vanilla"
    attn_levels = _attn_levels(shape)
    return {
        "in_channels": c_in,
        "z_channels": z_channels,
        "hid_z_channels": None if hid_z == z_channels else hid_z,
        "width": shape.integer("ch"),
        "width_mult": shape.integers("ch_mult", _CH_MULT),
        "res_blocks": shape.integer("num_res_blocks"),
        "attn_levels": attn_levels if attends else (),
        "mid_attn": attends,
        "dropout": shape.number("dropout", 0.0),
    }


def _attn_levels(shape: Section) -> tuple[int, ...]:
    """`attn_resolutions` are sides of the feature maps at the configured resolution."""
    levels = range(len(shape.integers("ch_mult", _CH_MULT)))
    side, sides = shape.integer("resolution"), shape.integers("attn_resolutions")
    if side % 2 ** max(levels, default=0):
        f = 2 ** levels[-1]
        raise ValueError(f"{shape.where}: resolution={side} must be a multiple of f={f}")
    return tuple(i for i in levels if side // 2**i in sides)


def places(config: AutoencoderConfig) -> Iterator[Place]:
    """Our tensors and the official names, for a first stage of groups=32, patch=1."""
    if config.regularizer == "identity":
        return
    yield from _encoder(config)
    yield from layer("encoder.to_moments", "quant_conv")
    if config.regularizer == "vq":
        yield Place("decoder.quantizer.codebook", ("quantize.embedding.weight",))
    yield from layer("decoder.from_z", "post_quant_conv")
    yield from _decoder(config)


def _encoder(config: AutoencoderConfig) -> Iterator[Place]:
    yield from layer("encoder.conv_in", "encoder.conv_in")
    widths = [config.width * m for m in config.width_mult]
    for i, channels in enumerate([config.width, *widths[:-1]]):
        names = f"encoder.levels.{i}", f"encoder.down.{i}"
        yield from _level(config, i, *names, channels, blocks=config.res_blocks)
        if i < len(widths) - 1:
            last = config.res_blocks * (2 if i in config.attn_levels else 1)
            yield from layer(f"encoder.levels.{i}.{last}.conv", f"encoder.down.{i}.downsample.conv")
    yield from _ends(config, "encoder")


def _decoder(config: AutoencoderConfig) -> Iterator[Place]:
    yield from layer("decoder.conv_in", "decoder.conv_in")
    widths = [config.width * m for m in config.width_mult]
    for i, channels in enumerate([*widths[1:], widths[-1]]):  # there, too, 0 is full resolution
        ours = f"decoder.levels.{len(widths) - 1 - i}"
        blocks = config.res_blocks + 1
        yield from _level(config, i, ours, f"decoder.up.{i}", channels, blocks=blocks)
        if i > 0:
            last = blocks * (2 if i in config.attn_levels else 1)
            yield from layer(f"{ours}.{last}.conv", f"decoder.up.{i}.upsample.conv")
    yield from _ends(config, "decoder")


def _level(
    config: AutoencoderConfig, i: int, ours: str, theirs: str, channels: int, *, blocks: int
) -> Iterator[Place]:
    attends, width = i in config.attn_levels, config.width * config.width_mult[i]
    for b in range(blocks):
        at = b * (2 if attends else 1)
        widens = b == 0 and channels != width
        yield from _res_block(f"{ours}.{at}", f"{theirs}.block.{b}", widens=widens)
        if attends:
            yield from _attention(f"{ours}.{at + 1}", f"{theirs}.attn.{b}")


def _ends(config: AutoencoderConfig, net: str) -> Iterator[Place]:
    yield from _res_block(f"{net}.middle.0", f"{net}.mid.block_1", widens=False)
    if config.mid_attn:
        yield from _attention(f"{net}.middle.1", f"{net}.mid.attn_1")
    last = 2 if config.mid_attn else 1
    yield from _res_block(f"{net}.middle.{last}", f"{net}.mid.block_2", widens=False)
    yield from layer(f"{net}.norm_out", f"{net}.norm_out")
    yield from layer(f"{net}.conv_out", f"{net}.conv_out")


def _res_block(ours: str, theirs: str, *, widens: bool) -> Iterator[Place]:
    for name in ("norm1", "conv1", "norm2", "conv2"):
        yield from layer(f"{ours}.{name}", f"{theirs}.{name}")
    if widens:
        yield from layer(f"{ours}.skip", f"{theirs}.nin_shortcut")


def _attention(ours: str, theirs: str) -> Iterator[Place]:
    yield from layer(f"{ours}.norm", f"{theirs}.norm")
    yield from layer(f"{ours}.to_qkv", f"{theirs}.q", f"{theirs}.k", f"{theirs}.v")
    yield from layer(f"{ours}.to_out", f"{theirs}.proj_out")
