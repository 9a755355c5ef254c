"""Single models of diffusers: the same there and here, and exact through both folders."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers_tiny as tiny
import pytest
import torch
from diffusers_copy import AutoencoderKL, VQModel, error
from diffusers_tiny import UNET, change_json, tensors_in
from published import CONFIGS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minildm import Autoencoder, AutoencoderConfig, UNet, UNetConfig, interop
from minildm.interop import diffusers_autoencoder, diffusers_unet
from minildm.interop.reading import Section, Tensors

KL = AutoencoderConfig(
    z_channels=3, width=8, width_mult=(1, 2), res_blocks=1, attn_levels=(1,), groups=4
)
DEEP = replace(UNET, width_mult=(1, 2, 3), res_blocks=2, attn_levels=(0, 2))
ACROSS = replace(DEEP, d_cond=5, depth=2, heads=2, d_head=None)
FIRST_STAGES = {
    "kl": (AutoencoderKL, {}),
    "kl, no attention": (AutoencoderKL, {"mid_block_add_attention": False, "levels": 1}),
    "kl, three levels": (AutoencoderKL, {"levels": 3, "layers_per_block": 2}),
    "vq": (VQModel, {}),
    "vq, another width": (VQModel, {"vq_embed_dim": 2, "levels": 3, "act_fn": "swish"}),
}
UNETS = {
    "self-attention": UNET,
    "self-attention, deep": replace(DEEP, d_head=8),
    "residual blocks resize, the time scales": replace(
        DEEP, resblock_updown=True, scale_shift=True
    ),
    "no level attends": replace(UNET, attn_levels=()),
    "cross-attention": ACROSS,
    "cross-attention, heads by width": replace(ACROSS, heads=None, d_head=4),
    "cross-attention, the time scales": replace(ACROSS, scale_shift=True, dropout=0.1),
}


def saved(model: nn.Module, folder: Path) -> nn.Module:
    """What we read of theirs."""
    model.save_pretrained(folder)
    return interop.load_diffusers(folder)


@pytest.mark.parametrize("case", FIRST_STAGES)
@torch.no_grad()
def test_their_first_stage_gives_the_same_here(case: str, tmp_path: Path, randn: Any) -> None:
    kind, shape = FIRST_STAGES[case]
    theirs = tiny.first_stage(kind, **shape, scaling_factor=0.25)
    ours = saved(theirs, tmp_path / "theirs")
    assert ours.scale == 4
    x = randn(2, 3, 8, 12).clamp(-1, 1)
    if kind is VQModel:
        z = theirs.encode(x).latents
    else:
        z = theirs.encode(x).latent_dist.mean
        noise = randn(*z.shape, seed=3)
        draw = z + theirs.encode(x).latent_dist.std * noise
        assert error(ours.encode(x, noise=lambda _: noise), draw / 4) < 1e-5
    assert error(ours.encode(x, sample=False), z / 4) < 1e-5
    assert error(ours.decode(z / 4), theirs.decode(z).sample) < 1e-5


@pytest.mark.parametrize("case", UNETS)
@torch.no_grad()
def test_their_unet_gives_the_same_here(case: str, tmp_path: Path, randn: Any) -> None:
    theirs = tiny.unet(UNETS[case])
    ours = saved(theirs, tmp_path / "theirs")
    assert ours.config == replace(UNETS[case], dropout=0.0)
    z, t, tokens = randn(2, 3, 8, 8), torch.tensor([3, 700]), {}
    if ours.config.d_cond:
        tokens = {"encoder_hidden_states": randn(2, 7, 5, seed=1)}
    assert error(ours(z, t, *tokens.values()), theirs(z, t, **tokens).sample) < 1e-5


@torch.no_grad()
def test_linear_layers_and_one_head_are_read_too(tmp_path: Path, randn: Any) -> None:
    z, t, tokens = randn(2, 3, 8, 8), torch.tensor([3, 700]), randn(2, 7, 5, seed=1)
    theirs = tiny.unet(ACROSS)
    changed = {
        **theirs.config,
        "use_linear_projection": True,
        "transformer_layers_per_block": [2] * 3,
    }
    theirs = tiny.shaken(type(theirs)(**changed)).eval()
    ours = saved(theirs, tmp_path / "linear")
    assert ours.config == ACROSS
    assert error(ours(z, t, tokens), theirs(z, t, tokens).sample) < 1e-5
    theirs = tiny.unet(UNET)
    theirs = tiny.shaken(type(theirs)(**{**theirs.config, "attention_head_dim": None})).eval()
    ours = saved(theirs, tmp_path / "one head")
    assert ours.config == replace(UNET, heads=1, d_head=None)
    assert error(ours(z, t), theirs(z, t).sample) < 1e-5


MODELS: dict[str, Callable[[], nn.Module]] = {
    "KL": lambda: tiny.first_stage(AutoencoderKL),
    "VQ": lambda: tiny.first_stage(VQModel, vq_embed_dim=2),
    "UNet": lambda: tiny.unet(DEEP),
    "UNet with tokens": lambda: tiny.unet(ACROSS),
}


@pytest.mark.parametrize("case", MODELS)
def test_load_save_load_is_exact(case: str, tmp_path: Path) -> None:
    ours = saved(MODELS[case](), tmp_path / "theirs")
    interop.save_diffusers(ours, tmp_path / "ours")
    there, here = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in there)
    again = interop.load_diffusers(tmp_path / "ours")
    assert again.config == ours.config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())
    said = json.loads((tmp_path / "ours/config.json").read_text())
    truth = json.loads((tmp_path / "theirs/config.json").read_text())
    assert {k: truth[k] for k in said if k != "sample_size"} == {
        k: v for k, v in said.items() if k != "sample_size"
    }


@pytest.mark.parametrize("vq", [False, True], ids=("kl", "vq"))
@torch.no_grad()
def test_the_shift_goes_into_the_convolutions(
    vq: bool, tmp_path: Path, shaken: Any, randn: Any
) -> None:
    codes = {"regularizer": "vq", "codebook_size": 12, "hid_z_channels": 5} if vq else {}
    ours = shaken(Autoencoder(replace(KL, **codes))).eval()
    ours.scale.fill_(1.7)
    ours.shift.fill_(-0.6)
    interop.save_diffusers(ours, tmp_path / "ours")
    theirs = (VQModel if vq else AutoencoderKL).from_pretrained(tmp_path / "ours").eval()
    again = interop.load_diffusers(tmp_path / "ours")
    assert (again.shift, again.scale) == (0, ours.scale)
    x, scaling = randn(2, 3, 8, 12).clamp(-1, 1), theirs.config.scaling_factor
    z = theirs.encode(x).latents if vq else theirs.encode(x).latent_dist.mean
    assert error(z * scaling, ours.encode(x, sample=False)) < 1e-5
    z = ours.encode(x, sample=False)
    assert error(theirs.decode(z / scaling).sample, ours.decode(z)) < 1e-5
    assert ours.shift == torch.tensor(-0.6)  # the model itself stays as it is


def test_a_shift_factor_is_our_shift(tmp_path: Path) -> None:
    ours = saved(tiny.first_stage(AutoencoderKL, shift_factor=0.25), tmp_path / "theirs")
    assert ours.shift == 0.25


# --- files ---


def test_the_first_years_names_are_read(tmp_path: Path) -> None:
    """Then attention of UNet2DModel and the first stages had layers of other names."""
    theirs = tiny.first_stage(AutoencoderKL)
    ours = saved(theirs, tmp_path / "theirs")
    path = tmp_path / "theirs/diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new, old in names.items():
        tensors = {name.replace(f".{new}.", f".{old}."): v for name, v in tensors.items()}
    assert sum(".query." in name for name in tensors) == 10
    path.unlink()
    torch.save(tensors, path.with_suffix(".bin"))
    again = interop.load_diffusers(tmp_path / "theirs")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


def test_half_precision_is_read_where_there_is_no_other(tmp_path: Path) -> None:
    ours = saved(tiny.unet(), tmp_path / "theirs")
    path = tmp_path / "theirs/diffusion_pytorch_model.safetensors"
    half = {name: v.half() for name, v in load_file(path).items()}
    save_file(half, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    same = interop.load_diffusers(tmp_path / "theirs")
    assert torch.equal(same.conv_out.weight, ours.conv_out.weight)
    path.unlink()
    rounded = interop.load_diffusers(tmp_path / "theirs")
    assert torch.equal(rounded.conv_out.weight, ours.conv_out.weight.half().float())


def test_keys_of_later_configs_may_be_missing(tmp_path: Path) -> None:
    ours = saved(tiny.unet(), tmp_path / "theirs")
    later = ("attn_norm_num_groups", "add_attention", "downsample_type", "dropout", "norm_eps")
    change_json(tmp_path / "theirs/config.json", **dict.fromkeys(later, ...))
    assert interop.load_diffusers(tmp_path / "theirs").config == ours.config


# --- published sizes ---


def on_meta(kind: type, **shape: Any) -> tuple[str, Section, Tensors]:
    with torch.device("meta"):
        model = kind(**shape)
    named: dict[str, Tensor] = model.state_dict()
    content = {k: v for k, v in model.config.items() if k[:1] != "_"}
    content = json.loads(json.dumps(content))
    return kind.__name__, Section(content, "config"), Tensors(named, "meta", ours=True)


def test_stable_diffusions_unet_has_its_size() -> None:
    down = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    shape = {"down_block_types": down, "cross_attention_dim": 768, "sample_size": 64}
    model = diffusers_unet.load_unet(*on_meta(tiny.diffusers.UNet2DConditionModel, **shape))
    assert sum(p.numel() for p in model.parameters()) == 859_520_964
    assert model.config == UNetConfig(
        width=320, width_mult=(1, 2, 4, 4), attn_levels=(0, 1, 2), heads=8, d_head=None, d_cond=768
    )


def test_stable_diffusions_first_stage_has_its_size() -> None:
    shape = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    shape |= {"down_block_types": ["DownEncoderBlock2D"] * 4}
    shape |= {"up_block_types": ["UpDecoderBlock2D"] * 4}
    model = diffusers_autoencoder.load_autoencoder(*on_meta(AutoencoderKL, **shape))
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    assert model.config == AutoencoderConfig()


def test_the_faces_unet_has_its_official_size() -> None:
    official = next(c for c in CONFIGS if "celebahq-ldm" in c["path"])
    down = ["DownBlock2D"] + ["AttnDownBlock2D"] * 3
    shape = {"down_block_types": down, "attention_head_dim": 32, "sample_size": 64}
    model = diffusers_unet.load_unet(*on_meta(tiny.diffusers.UNet2DModel, **shape))
    assert sum(p.numel() for p in model.parameters()) == official["unet_params"]
    assert isinstance(model, UNet)
