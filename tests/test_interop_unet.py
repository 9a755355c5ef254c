"""The published UNets load exactly, and then compute what diffusers computes with them.

Names and shapes are the official ones; for the numbers, widths are narrowed and weights drawn, and
diffusers' own conversion of official checkpoints says where each tensor belongs. What that does
not know is added here: self-attention, and residual blocks that resize.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers_copy import DTYPES, TOLERANCE, error
from einops import rearrange
from published import CONFIGS, drawn, listed_shapes, names_hash, official_state, on_meta
from torch import Tensor

from minildm import UNet, interop

with warnings.catch_warnings():
    # Deprecations inside diffusers and what it imports, none of which a test could mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from diffusers import UNet2DConditionModel, UNet2DModel
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        update_unet_resnet_ldm_to_diffusers,
    )
    from diffusers.models.attention_processor import Attention

TARGET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
PUBLISHED = {c["path"]: c for c in CONFIGS if "unet_config" in c}
DIFFERENT = {c["unet_state_dict"]["keys_sha256"]: path for path, c in PUBLISHED.items()}

TEXT = PUBLISHED["configs/latent-diffusion/txt2img-1p4B-eval.yaml"]
STABLE = TEXT["unet_config"] | {"context_dim": 768}  # Stable Diffusion v1


def loaded(params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> UNet:
    return interop.load_compvis({"target": TARGET, "params": params}, tensors)


def shapes_of(model: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return listed_shapes(model["unet_state_dict"]["keys_sha256"])


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("path", PUBLISHED)
def test_a_published_unet_loads_exactly(path: str) -> None:
    theirs = PUBLISHED[path]
    tensors = on_meta(shapes_of(theirs))
    model = loaded(theirs["unet_config"], tensors)
    assert len(tensors) == theirs["unet_state_dict"]["n_keys"]
    assert names_hash(official_state(model)) == theirs["unet_state_dict"]["keys_sha256"]
    assert parameters(model) == theirs["unet_params"]


def test_all_nineteen_are_there() -> None:
    assert (len(PUBLISHED), len(DIFFERENT)) == (19, 11)


def stable_shapes() -> dict[str, tuple[int, ...]]:
    """Those of the official text-to-image model, but for tokens of 768."""
    condition = re.compile(r".*attn2\.to_[kv]\.weight")
    return {
        name: (shape[0], 768) if condition.match(name) else shape
        for name, shape in shapes_of(TEXT).items()
    }


def test_stable_diffusion_loads_exactly() -> None:
    tensors = on_meta(stable_shapes())
    model = loaded(STABLE, tensors)
    assert names_hash(official_state(model)) == names_hash(tensors)
    with torch.device("meta"):
        theirs = UNet2DConditionModel(cross_attention_dim=768)  # diffusers' defaults are its sizes
    assert parameters(model) == parameters(theirs) == 859_520_964


def test_heads_and_widths_are_not_left_to_the_shapes() -> None:
    """Which no tensor shows."""
    one, eight = (
        PUBLISHED[f"models/ldm/{name}/config.yaml"] for name in ("cin256", "lsun_churches256")
    )
    wide, many = (loaded(m["unet_config"], on_meta(shapes_of(m))).config for m in (one, eight))
    assert (wide.heads, wide.d_head, wide.heads_of(512)) == (None, 32, 16)
    assert (many.heads, many.d_head, many.heads_of(768)) == (8, None, 8)


def narrowed(params: Mapping[str, Any]) -> Callable[[int], int]:
    """A size that makes the first level 32 channels wide: the same network, small enough to run."""
    width, d_cond = params["model_channels"], params.get("context_dim")

    def size(n: int) -> int:
        return n // width * 32 if n % width == 0 else 24 if n == d_cond else n

    return size


def narrow(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and drawn tensors by their official names."""
    params, size = dict(model["unet_config"]), narrowed(model["unet_config"])
    for key in ("model_channels", "context_dim"):
        params |= {key: size(params[key])} if key in params else {}
    params |= {"num_head_channels": 8} if "num_head_channels" in params else {}
    shapes = {name: tuple(map(size, shape)) for name, shape in shapes_of(model).items()}
    return params, drawn(shapes)


def levels(params: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
    """The width of each level, and whether it attends."""
    widths = [params["model_channels"] * m for m in params["channel_mult"]]
    return widths, [2**i in params["attention_resolutions"] for i in range(len(widths))]


def heads(params: Mapping[str, Any], channels: int) -> int:
    d_head = params.get("num_head_channels")
    return channels // d_head if d_head else params["num_heads"]


def conditional(params: Mapping[str, Any]) -> UNet2DConditionModel:
    widths, attends = levels(params)
    return UNet2DConditionModel(
        in_channels=params["in_channels"],
        out_channels=params["out_channels"],
        block_out_channels=widths,
        down_block_types=[f"{'CrossAttn' * a}DownBlock2D" for a in attends],
        up_block_types=[f"{'CrossAttn' * a}UpBlock2D" for a in attends[::-1]],
        layers_per_block=params["num_res_blocks"],
        attention_head_dim=[heads(params, width) for width in widths],  # their number, there
        transformer_layers_per_block=params["transformer_depth"],
        cross_attention_dim=params["context_dim"],
    )


def unconditional(params: Mapping[str, Any]) -> UNet2DModel:
    widths, attends = levels(params)
    resize = params.get("resblock_updown", False)
    plain = "Resnet{}sampleBlock2D" if resize else "{}Block2D"
    kind = "resnet" if resize else "conv"
    model = UNet2DModel(
        in_channels=params["in_channels"],
        out_channels=params["out_channels"],
        block_out_channels=widths,
        down_block_types=["AttnDownBlock2D" if a else plain.format("Down") for a in attends],
        up_block_types=["AttnUpBlock2D" if a else plain.format("Up") for a in attends[::-1]],
        layers_per_block=params["num_res_blocks"],
        attn_norm_num_groups=32,
        downsample_type=kind,
        upsample_type=kind,
        resnet_time_scale_shift="scale_shift" if params.get("use_scale_shift_norm") else "default",
        flip_sin_to_cos=True,
        freq_shift=0,
    )
    for attention in (m for m in model.modules() if isinstance(m, Attention)):
        attention.heads = heads(params, attention.inner_dim)  # there, one width for all levels
    return model


RESIZES_UP = re.compile(r"output_blocks\.(\d+)\.([12])\.(in|emb|out)_layers")
RESIZES_DOWN = re.compile(r"(down_blocks\.\d+)\.resnets\.2\.")  # two are the level's own
FLAT = {"norm": "group_norm", "proj_out": "to_out.0"}


def converted(params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors by diffusers' names."""
    blocks = params["num_res_blocks"]
    up = {name: found for name in tensors if (found := RESIZES_UP.match(name))}
    prefixed = {f"model.diffusion_model.{n}": t for n, t in tensors.items() if n not in up}
    state = convert_ldm_unet_checkpoint(prefixed, {"layers_per_block": blocks})
    state = {RESIZES_DOWN.sub(r"\1.downsamplers.0.", name): t for name, t in state.items()}
    for name, found in up.items():
        place = f"up_blocks.{int(found[1]) // (blocks + 1)}.upsamplers.0"
        moved = {"old": f"output_blocks.{found[1]}.{found[2]}", "new": place}
        update_unet_resnet_ldm_to_diffusers([name], state, tensors, moved)
    return state if params.get("use_spatial_transformer") else split(params, state)


def split(params: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Self-attention: q, k, v of one head beside each other become three linear layers."""
    renamed = {}
    for name, tensor in state.items():
        if ".attentions." not in name:
            renamed[name] = tensor
            continue
        block, layer, kind = name.rsplit(".", 2)
        if layer == "qkv":
            n = heads(params, len(tensor) // 3)
            parts = rearrange(tensor, "(h qkv d) ... -> qkv (h d) ...", h=n, qkv=3)
            for part, q in zip(parts, ("to_q", "to_k", "to_v"), strict=True):
                renamed[f"{block}.{q}.{kind}"] = part.reshape(part.shape[:2])
        else:
            renamed[f"{block}.{FLAT[layer]}.{kind}"] = tensor.reshape(tensor.shape[:2])
    return renamed


@DTYPES
@pytest.mark.parametrize("path", DIFFERENT.values())
@torch.no_grad()
def test_a_loaded_unet_computes_what_diffusers_computes(
    path: str, dtype: torch.dtype, randn: Any
) -> None:
    params, tensors = narrow(PUBLISHED[path])
    ours = loaded(params, tensors).to(dtype)
    with torch.device("meta"):
        theirs = (conditional if ours.config.d_cond else unconditional)(params)
    theirs.load_state_dict(converted(params, tensors), assign=True)
    theirs.to(dtype).eval()
    side = 2 ** (len(params["channel_mult"]) - 1)
    z = randn(2, params["in_channels"], side, 2 * side, dtype=dtype)
    t, tokens = torch.tensor([3, 900]), []
    if ours.config.d_cond:
        tokens = [randn(2, 5, params["context_dim"], seed=1, dtype=dtype)]
    assert error(ours(z, t, *tokens), theirs(z, t, *tokens).sample) < TOLERANCE[dtype]


@pytest.mark.parametrize("path", DIFFERENT.values())
def test_what_was_loaded_comes_out_again(path: str) -> None:
    params, tensors = narrow(PUBLISHED[path])
    state = official_state(loaded(params, tensors))
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)
