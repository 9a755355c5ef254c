"""Builds diffusers' models of our sizes, copies our weights into them, compares what both give.

What differs there, and is handled here:
- q, k, v are three linear layers, one after the other; ours is one 1x1 convolution that keeps
  q, k and v of a head beside each other.
- `attention_head_dim` of UNet2DConditionModel is the *number* of heads, of UNet2DModel their width.
- The timestep embedding starts with the sines unless `flip_sin_to_cos`.
"""

import warnings
from collections.abc import Iterator

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from minildm import Autoencoder, UNet, UNetConfig
from minildm.layers import Downsample, ResBlock, SelfAttention2d, SpatialTransformer, Upsample

with warnings.catch_warnings():
    # Deprecations inside diffusers and what it imports, none of which a test could mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

__all__ = ["AutoencoderKL", "VQModel", "convert_ldm_vae_checkpoint"]  # for tests to import

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # of the output's largest value
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=("float32", "float64"))


def unconditional(config: UNetConfig) -> UNet2DModel:
    attends = [i in config.attn_levels for i in range(len(config.width_mult))]
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    plain = plain if config.resblock_updown else ("DownBlock2D", "UpBlock2D")
    resample = "resnet" if config.resblock_updown else "conv"
    return UNet2DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=[config.width * m for m in config.width_mult],
        down_block_types=["AttnDownBlock2D" if a else plain[0] for a in attends],
        up_block_types=["AttnUpBlock2D" if a else plain[1] for a in attends[::-1]],
        layers_per_block=config.res_blocks,
        attention_head_dim=config.d_head,
        norm_num_groups=config.groups,
        attn_norm_num_groups=config.groups,
        downsample_type=resample,
        upsample_type=resample,
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
        flip_sin_to_cos=True,
        freq_shift=0,
    )


def conditional(config: UNetConfig) -> UNet2DConditionModel:
    attends = [i in config.attn_levels for i in range(len(config.width_mult))]
    heads = config.heads or [config.width * m // config.d_head for m in config.width_mult]
    return UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=[config.width * m for m in config.width_mult],
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
        layers_per_block=config.res_blocks,
        attention_head_dim=heads,
        transformer_layers_per_block=config.depth,
        cross_attention_dim=config.d_cond,
        norm_num_groups=config.groups,
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
    )


def pieces(module: nn.Module, kinds: tuple[type, ...]) -> list[nn.Module]:
    """The module's blocks of these kinds in the order in which they run."""
    if isinstance(module, kinds):
        return [module]
    return [piece for child in module.children() for piece in pieces(child, kinds)]


OURS = (ResBlock, SelfAttention2d, SpatialTransformer, Downsample, Upsample)


def their_pieces(module: nn.Module) -> Iterator[nn.Module]:
    """The same of one of their blocks: each residual block before its attention."""
    attentions = [block for block in getattr(module, "attentions", None) or [] if block is not None]
    resnets = list(module.resnets)
    if "Mid" in type(module).__name__:
        yield from (resnets[0], *attentions, resnets[1])
    else:
        for i, resnet in enumerate(resnets):
            yield from (resnet, *attentions[i : i + 1])
    for name in ("downsamplers", "upsamplers"):
        yield from getattr(module, name, None) or []


def their_blocks(net: nn.Module, order: str) -> list[nn.Module]:
    blocks = [b for name in order.split() for b in _listed(getattr(net, name))]
    return [piece for block in blocks for piece in their_pieces(block)]


def _listed(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def copy(source: nn.Module, target: nn.Module) -> None:
    """One layer's weights; 1x1 convolutions and linear layers hold the same numbers."""
    for name in ("weight", "bias"):
        value, into = getattr(source, name), getattr(target, name)
        assert (value is None) == (into is None)
        if into is not None:
            into.data.copy_(value.reshape(into.shape))


def copy_res(ours: ResBlock, theirs: nn.Module) -> None:
    pairs = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
    if ours.to_emb is not None:
        pairs["to_emb"] = "time_emb_proj"
    if not isinstance(ours.skip, nn.Identity):
        pairs["skip"] = "conv_shortcut"
    assert (theirs.conv_shortcut is not None) == ("skip" in pairs)
    for mine, name in pairs.items():
        copy(getattr(ours, mine), getattr(theirs, name))


def copy_attention(ours: SelfAttention2d, theirs: nn.Module) -> None:
    copy(ours.norm, theirs.group_norm)
    copy(ours.to_out, theirs.to_out[0])
    for name in ("weight", "bias"):
        rows = getattr(ours.to_qkv, name).data
        rows = rearrange(rows, "(head qkv d) ... -> qkv (head d) ...", head=ours.heads, qkv=3)
        for part, layer in zip(rows, (theirs.to_q, theirs.to_k, theirs.to_v), strict=True):
            into = getattr(layer, name)
            into.data.copy_(part.reshape(into.shape))


def copy_transformer(ours: SpatialTransformer, theirs: nn.Module) -> None:
    for name in ("norm", "proj_in", "proj_out"):
        copy(getattr(ours, name), getattr(theirs, name))
    for mine, block in zip(ours.blocks, theirs.transformer_blocks, strict=True):
        for name in ("norm1", "norm2", "norm3"):
            copy(getattr(mine, name), getattr(block, name))
        for attn, name in ((mine.self_attn, "attn1"), (mine.cross_attn, "attn2")):
            for layer in ("to_q", "to_k", "to_v"):
                copy(getattr(attn, layer), getattr(getattr(block, name), layer))
            copy(attn.to_out, getattr(block, name).to_out[0])
        copy(mine.ff[0].proj, block.ff.net[0].proj)
        copy(mine.ff[2], block.ff.net[2])


def copy_blocks(ours: list[nn.Module], theirs: list[nn.Module]) -> None:
    for mine, block in zip(ours, theirs, strict=True):
        if isinstance(mine, ResBlock):
            copy_res(mine, block)
        elif isinstance(mine, SelfAttention2d):
            copy_attention(mine, block)
        elif isinstance(mine, SpatialTransformer):
            copy_transformer(mine, block)
        else:
            copy(mine.conv, block.conv)


def copy_autoencoder(ours: Autoencoder, theirs: AutoencoderKL | VQModel) -> None:
    for mine, net, order in (
        (ours.encoder, theirs.encoder, "down_blocks mid_block"),
        (ours.decoder, theirs.decoder, "mid_block up_blocks"),
    ):
        copy_blocks(pieces(mine, OURS), their_blocks(net, order))
        copy(mine.conv_in, net.conv_in)
        copy(mine.norm_out, net.conv_norm_out)
        copy(mine.conv_out, net.conv_out)
    copy(ours.encoder.to_moments, theirs.quant_conv)
    copy(ours.decoder.from_z, theirs.post_quant_conv)
    if ours.decoder.quantizer is not None:
        theirs.quantize.embedding.weight.data.copy_(ours.decoder.quantizer.codebook)


def copy_unet(ours: UNet, theirs: nn.Module) -> None:
    copy_blocks(pieces(ours, OURS), their_blocks(theirs, "down_blocks mid_block up_blocks"))
    copy(ours.time_mlp[0], theirs.time_embedding.linear_1)
    copy(ours.time_mlp[2], theirs.time_embedding.linear_2)
    copy(ours.down[0][0], theirs.conv_in)
    copy(ours.norm_out, theirs.conv_norm_out)
    copy(ours.conv_out, theirs.conv_out)


def same_parameters(ours: nn.Module, theirs: nn.Module) -> bool:
    return sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
