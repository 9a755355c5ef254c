"""Every published KL first stage and every UNet has the official number and shapes of tensors."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from minildm import Autoencoder, AutoencoderConfig, UNet, UNetConfig

OFFICIAL = Path(__file__).parent / "official"
CONFIGS = json.loads((OFFICIAL / "params.json").read_text())["configs"]
TENSORS = json.loads((OFFICIAL / "tensors.json").read_text())  # hash -> ["name (shape)", ...]
FIRST_STAGES = {c["path"]: c for c in CONFIGS if c["kind"] == "kl first stage"}
MODELS = {c["path"]: c for c in CONFIGS if "unet_config" in c}


def official_autoencoder(stage: dict) -> Autoencoder:
    shape, levels = stage["ddconfig"], range(len(stage["ddconfig"]["ch_mult"]))
    config = AutoencoderConfig(
        in_channels=shape["in_channels"],
        z_channels=stage["embed_dim"],
        hid_z_channels=shape["z_channels"],
        width=shape["ch"],
        width_mult=tuple(shape["ch_mult"]),
        res_blocks=shape["num_res_blocks"],
        attn_levels=tuple(
            i for i in levels if shape["resolution"] // 2**i in shape["attn_resolutions"]
        ),
    )
    with torch.device("meta"):
        return Autoencoder(config)


def official_unet(shape: dict) -> UNet:
    d_head = shape.get("num_head_channels")
    config = UNetConfig(
        in_channels=shape["in_channels"],
        out_channels=shape["out_channels"],
        width=shape["model_channels"],
        width_mult=tuple(shape["channel_mult"]),
        res_blocks=shape["num_res_blocks"],
        attn_levels=tuple(
            i for i in range(len(shape["channel_mult"])) if 2**i in shape["attention_resolutions"]
        ),
        heads=None if d_head else shape["num_heads"],
        d_head=d_head,
        d_cond=shape["context_dim"] if shape.get("use_spatial_transformer") else None,
        depth=shape.get("transformer_depth", 1),
        scale_shift=shape.get("use_scale_shift_norm", False),
        resblock_updown=shape.get("resblock_updown", False),
    )
    with torch.device("meta"):
        return UNet(config)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def shapes(module: nn.Module) -> Counter[tuple[int, ...]]:
    return Counter(tuple(p.shape) for p in module.parameters())


def official_shapes(key: str) -> Counter[tuple[int, ...]]:
    """The shapes listed under a hash, after the two merges that our modules make.

    The autoencoder's q, k and v are one convolution here; the UNet's attention convolves over
    flattened pixels there, so its kernels (c_out, c_in, 1) get a second spatial axis of 1.
    """
    merged = Counter()
    for line in TENSORS[key]:
        name, _, listed = line.partition(" ")
        shape = tuple(int(n) for n in listed.strip("()").split(",") if n)
        module, _, leaf = name.rpartition(".")[0].rpartition(".")
        if leaf in ("k", "v") and "attn" in module:
            continue  # q stands for the three
        if leaf == "q" and "attn" in module:
            shape = (3 * shape[0], *shape[1:])
        merged[(*shape, 1) if len(shape) == 3 else shape] += 1
    return merged


@pytest.mark.parametrize("path", FIRST_STAGES)
def test_a_kl_first_stage_has_the_official_size(path: str) -> None:
    stage = FIRST_STAGES[path]
    ours, theirs = official_autoencoder(stage), stage["params"]
    assert parameters(ours) == theirs["total"]
    assert parameters(ours.encoder) == theirs["encoder"] + theirs["quant_conv"]
    assert parameters(ours.decoder) == theirs["decoder"] + theirs["post_quant_conv"]
    assert shapes(ours) == official_shapes(stage["state_dict"]["keys_sha256"])
    assert ours.f == stage["f"]


@pytest.mark.parametrize("path", FIRST_STAGES)
def test_a_kl_first_stage_has_the_official_latent(path: str) -> None:
    stage = FIRST_STAGES[path]
    side = stage["ddconfig"]["resolution"]
    x = torch.empty(1, 3, side, side, device="meta")
    assert (
        list(official_autoencoder(stage).posterior(x).mean.shape[1:])
        == (stage["latent_shape_at_resolution"])
    )


@pytest.mark.parametrize("path", MODELS)
def test_a_unet_has_the_official_size(path: str) -> None:
    model = MODELS[path]
    ours, parts = official_unet(model["unet_config"]), model["unet_params_breakdown"]
    assert parameters(ours) == model["unet_params"]
    assert parameters(ours.time_mlp) == parts["time_embed"]
    assert parameters(ours.down) == parts["input_blocks"]
    assert parameters(ours.middle) == parts["middle_block"]
    assert parameters(ours.up) == parts["output_blocks"]
    assert parameters(ours.norm_out) + parameters(ours.conv_out) == parts["out"]
    assert shapes(ours) == official_shapes(model["unet_state_dict"]["keys_sha256"])


def test_all_published_models_are_covered() -> None:
    kinds = Counter(config["kind"] for config in CONFIGS)
    assert len(FIRST_STAGES) == kinds["kl first stage"] == 8
    assert len(MODELS) == sum(n for kind, n in kinds.items() if "first stage" not in kind) > 15


def test_a_wrong_shape_would_show() -> None:
    stage = next(iter(FIRST_STAGES.values()))
    wrong = {**stage, "ddconfig": {**stage["ddconfig"], "attn_resolutions": []}}
    key = stage["state_dict"]["keys_sha256"]
    assert shapes(official_autoencoder(wrong)) != official_shapes(key)
