"""Official UNets from files: exported and read again, refused by name where they do not fit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from published import official_state
from safetensors.torch import save_file
from torch import Tensor

from minildm import UNet, UNetConfig, interop
from minildm.checkpoints import CheckpointError

TARGET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
PARAMS = {
    "image_size": 16,  # at training
    "in_channels": 3,
    "out_channels": 2,
    "model_channels": 32,
    "attention_resolutions": [8, 2],  # the factor 8 is never reached
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "num_heads": 4,
}
CONFIG = UNetConfig(
    in_channels=3,
    out_channels=2,
    width=32,
    width_mult=(1, 2),
    res_blocks=1,
    attn_levels=(1,),
    heads=4,
    d_head=None,
)
TOKENS = {"use_spatial_transformer": True, "context_dim": 6}
KINDS: dict[str, tuple[dict[str, Any], UNetConfig]] = {
    "self-attention": ({}, CONFIG),
    "heads by width": ({"num_head_channels": 16}, replace(CONFIG, heads=None, d_head=16)),
    "tokens": (TOKENS | {"transformer_depth": 2}, replace(CONFIG, d_cond=6, depth=2)),
    "residual blocks resize": (
        {"resblock_updown": True, "use_scale_shift_norm": True, "attention_resolutions": []},
        replace(CONFIG, resblock_updown=True, scale_shift=True, attn_levels=()),
    ),
    "training": (
        {"dropout": 0.25, "use_checkpoint": True},
        replace(CONFIG, dropout=0.25, checkpoint=True),
    ),
    "said, and without effect": (
        {"num_head_channels": -1, "num_heads_upsample": 4, "legacy": False, "use_fp16": True},
        CONFIG,
    ),
    "the official multipliers": (
        {"channel_mult": None, "attention_resolutions": [1, 8]},
        replace(CONFIG, width_mult=(1, 2, 4, 8), attn_levels=(0, 3)),
    ),
}


def official(changes: dict[str, Any]) -> dict[str, Any]:
    """The small config with these changes; without what is None."""
    params = {key: value for key, value in (PARAMS | changes).items() if value is not None}
    return {"target": TARGET, "params": params}


def inputs(config: UNetConfig, randn: Any) -> tuple[Tensor, ...]:
    z, t = randn(2, 3, 8, 16), torch.tensor([0, 700])
    return (z, t) if config.d_cond is None else (z, t, randn(2, 5, config.d_cond, seed=1))


def tensors_of(config: UNetConfig, shaken: Any) -> dict[str, Tensor]:
    return official_state(shaken(UNet(config)))


@pytest.fixture
def tensors(shaken: Any) -> dict[str, Tensor]:
    return tensors_of(CONFIG, shaken)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_was_exported_loads_as_the_same_network(kind: str, shaken: Any, randn: Any) -> None:
    changes, config = KINDS[kind]
    model = shaken(UNet(config)).eval()
    again = interop.load_compvis(official(changes), official_state(model))
    assert again.config == config
    z = inputs(config, randn)
    assert torch.equal(again(*z), model(*z))


def test_a_loaded_unet_is_ready_to_use_and_to_train(tensors: dict[str, Tensor]) -> None:
    before = torch.get_rng_state()
    model = interop.load_compvis({"model": official({})}, tensors)
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert not any(t.is_meta for t in model.state_dict().values())


def test_the_callers_tensors_stay_the_callers(tensors: dict[str, Tensor]) -> None:
    tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    model = interop.load_compvis(official({}), tensors)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(torch.equal(tensors[name], kept[name]) for name in kept)


FORMATS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "unet.ckpt": lambda tensors, path: torch.save({"state_dict": tensors, "epoch": 3}, path),
    "unet.safetensors": lambda tensors, path: save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_and_left(
    name: str, dtype: torch.dtype, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    config, checkpoint = tmp_path / "config.yaml", tmp_path / name
    config.write_text(yaml.safe_dump({"model": official({}), "data": {"target": "anything"}}))
    stored = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    FORMATS[name](stored, checkpoint)
    before = checkpoint.read_bytes()
    model = interop.load_compvis(config, checkpoint)
    state = official_state(model)
    assert all(torch.equal(state[key], stored[key].float()) for key in stored)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert checkpoint.read_bytes() == before


QKV, EMBED = "middle_block.1.qkv.weight", "time_embed.0.bias"
MISFITS = {
    "missing": ({QKV: None}, r"middle_block\.1\.qkv\.weight \(192, 64, 1\) is missing"),
    "foreign": ({"label_emb.weight": torch.ones(1)}, r"label_emb\.weight has no place"),
    "our axes": (
        {QKV: torch.ones(192, 64, 1, 1)},
        r"qkv\.weight is \(192, 64, 1, 1\), must be \(192, 64, 1\)",
    ),
    "shape": ({EMBED: torch.ones(32)}, r"time_embed\.0\.bias is \(32,\), must be \(128,\)"),
    "nan": ({EMBED: torch.full((128,), torch.nan)}, r"time_embed\.0\.bias holds .* not finite"),
    "whole numbers": ({EMBED: torch.arange(128)}, r"time_embed\.0\.bias is torch\.int64"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_tensor_that_does_not_fit_is_named(
    misfit: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    changes, said = MISFITS[misfit]
    changed = {name: value for name, value in (tensors | changes).items() if value is not None}
    torch.save(changed, tmp_path / "odd.ckpt")
    with pytest.raises(CheckpointError, match=rf"(?s)odd\.ckpt: 1 tensors do not fit.*{said}"):
        interop.load_compvis(official({}), tmp_path / "odd.ckpt")


def test_a_network_of_another_depth_does_not_fit(shaken: Any) -> None:
    tensors = tensors_of(replace(CONFIG, d_cond=6, depth=2), shaken)
    with pytest.raises(CheckpointError, match=r"transformer_blocks\.1\.norm1\.weight has no place"):
        interop.load_compvis(official(TOKENS), tensors)


def test_a_whole_model_is_refused_with_what_to_do(tensors: dict[str, Tensor]) -> None:
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=r"holds a whole model.*'model\.diffusion_model\.'"):
        interop.load_compvis(official({}), whole)


BAD = {
    "unknown": ({"act": "relu"}, "act='relu' is not known; known: attention_resolutions"),
    "volumes": ({"dims": 3}, "dims=3 cannot be expressed, only 2"),
    "no convolutions": ({"conv_resample": False}, "conv_resample=False cannot be expressed"),
    "classes": ({"num_classes": 10}, "num_classes=10 cannot be expressed, only None"),
    "codes": ({"n_embed": 10}, "n_embed=10 cannot be expressed, only None"),
    "another order": (
        {"use_new_attention_order": True},
        "use_new_attention_order=True cannot be expressed, only False",
    ),
    "other heads upwards": ({"num_heads_upsample": 2}, "num_heads_upsample=2 .* only -1, 4"),
    "no heads": ({"num_heads": -1}, "give num_heads or num_head_channels"),
    "zero heads": ({"num_heads": 0}, "num_heads=0 must be a whole number >= 1"),
    "heads that do not divide": ({"num_heads": 5}, "64 channels do not split into heads=5"),
    "widths that do not divide": ({"num_head_channels": 24}, "64 channels .* d_head=24"),
    "no tokens": ({"use_spatial_transformer": True}, "lacks 'context_dim'"),
    "tokens for nothing": ({"context_dim": 6}, "context_dim=6 needs use_spatial_transformer"),
    "several tokens": (TOKENS | {"context_dim": [6, 8]}, r"context_dim=\[6, 8\] must be a whole"),
    "no depth": (TOKENS | {"transformer_depth": 0}, "transformer_depth=0 must be a whole number"),
    "a wide first level": ({"channel_mult": [2, 4]}, r"channel_mult=\[2, 4\] must begin with 1"),
    "no levels": ({"channel_mult": []}, r"width_mult=\(\)"),
    "blocks per level": ({"num_res_blocks": [1, 2]}, r"num_res_blocks=\[1, 2\] must be a whole"),
    "one factor": ({"attention_resolutions": 2}, "attention_resolutions=2 must be a list"),
    "width": ({"model_channels": 48}, "width=48 .* groups=32"),
    "truth": ({"resblock_updown": 1}, "resblock_updown=1 cannot be expressed, only False, True"),
    "share": ({"dropout": "none"}, "dropout='none' must be a number"),
    "lacking": ({"out_channels": None}, "lacks 'out_channels'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_network_we_cannot_express_is_refused(
    case: str, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    changes, said = BAD[case]
    path = tmp_path / "odd.yaml"
    path.write_text(yaml.safe_dump({"model": official(changes)}))
    with pytest.raises(ValueError, match=rf"odd\.yaml: model\.params.*{said}"):
        interop.load_compvis(path, tensors)
