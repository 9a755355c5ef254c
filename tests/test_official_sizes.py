"""Every published first stage and every UNet has the official number and shapes of tensors."""

import ast
from collections import Counter

import pytest
import torch
from published import CONFIGS, FIRST_STAGES, TENSORS, official_config, official_shapes, on_meta
from torch import nn

from minildm import Autoencoder, UNet, UNetConfig, interop
from minildm.layers import SelfAttention2d

MODELS = {c["path"]: c for c in CONFIGS if "unet_config" in c}


def official_autoencoder(stage: dict) -> Autoencoder:
    return interop.load_compvis(official_config(stage), on_meta(official_shapes(stage)))


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


def unet_shapes(key: str) -> Counter[tuple[int, ...]]:
    """The shapes listed under a hash.

    The official attention convolves over flattened pixels: its kernels (c_out, c_in, 1) get a
    second spatial axis of 1, as ours have.
    """
    listed = (ast.literal_eval(line.split(" ", 1)[1]) for line in TENSORS[key])
    return Counter((*shape, 1) if len(shape) == 3 else shape for shape in listed)


@pytest.mark.parametrize("path", FIRST_STAGES)
def test_a_first_stage_has_the_official_size(path: str) -> None:
    stage = FIRST_STAGES[path]
    ours, theirs = official_autoencoder(stage), stage["params"]
    quantizer = ours.decoder.quantizer
    parts = {
        "encoder": parameters(ours.encoder) - parameters(ours.encoder.to_moments),
        "quant_conv": parameters(ours.encoder.to_moments),
        "post_quant_conv": parameters(ours.decoder.from_z),
        "codebook": 0 if quantizer is None else parameters(quantizer),
        "total": parameters(ours),
    }
    parts["decoder"] = parameters(ours.decoder) - parts["post_quant_conv"] - parts["codebook"]
    assert parts == theirs
    assert ours.f == stage["f"]


@pytest.mark.parametrize("path", FIRST_STAGES)
def test_a_first_stage_has_the_official_latent(path: str) -> None:
    stage, model = FIRST_STAGES[path], official_autoencoder(FIRST_STAGES[path])
    side = stage["ddconfig"]["resolution"]
    z = model.encode(torch.empty(1, 3, side, side, device="meta"), sample=False)
    assert list(z.shape[1:]) == stage["latent_shape_at_resolution"]
    assert model.decoder.render(z).shape == (1, 3, side, side)


@pytest.mark.parametrize("path", FIRST_STAGES)
def test_a_first_stage_attends_where_the_official_one_does(path: str) -> None:
    """Counted on what its official tensors are called."""
    stage = FIRST_STAGES[path]
    modules = official_autoencoder(stage).modules()
    theirs = sum(name.endswith(".q.weight") for name in official_shapes(stage))
    assert sum(isinstance(module, SelfAttention2d) for module in modules) == theirs


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
    assert shapes(ours) == unet_shapes(model["unet_state_dict"]["keys_sha256"])


def test_all_published_models_are_covered() -> None:
    kinds = Counter(config["kind"] for config in CONFIGS)
    assert (kinds["kl first stage"], kinds["vq first stage"]) == (8, 5)
    assert len(FIRST_STAGES) == 13
    assert len(MODELS) == sum(n for kind, n in kinds.items() if "first stage" not in kind) > 15


@pytest.mark.parametrize(
    "wrong",
    [{"attn_resolutions": []}, {"attn_type": "none"}, {"num_res_blocks": 1}, {"ch_mult": [1, 2]}],
    ids=str,
)
def test_a_wrong_shape_would_show(wrong: dict) -> None:
    stage = FIRST_STAGES["models/first_stage_models/vq-f8/config.yaml"]
    changed = {**stage, "ddconfig": stage["ddconfig"] | wrong}
    with pytest.raises(ValueError, match="tensors do not fit"):
        official_autoencoder(changed)
