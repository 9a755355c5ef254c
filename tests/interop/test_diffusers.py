"""diffusers folders: exact through load and save, read whatever their age; refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randn, shaken
from interop import diffusers_models as tiny
from interop.diffusers_models import LDM, STABLE, SUPER, TEXT, change_json, error
from safetensors.torch import load_file, save_file
from torch import Tensor

from minildm import interop
from minildm.compression.autoencoder import Autoencoder, AutoencoderConfig
from minildm.conditioning import ClassConfig, TextConfig
from minildm.diffusion.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from minildm.diffusion.unet import UNet, UNetConfig

KL = AutoencoderConfig(z_channels=3, channels=8, channel_mult=(1, 2), num_res_blocks=1, groups=4)
UNET = UNetConfig(
    in_channels=3, out_channels=3, channels=8, channel_mult=(1, 2), attn_levels=(1,), groups=4,
    d_head=4, num_res_blocks=1,
)  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"
MODELS: dict[str, Callable[[], Any]] = {
    "kl": lambda: tiny.first_stage("AutoencoderKL", levels=3, layers_per_block=2),
    "vq": lambda: tiny.first_stage(vq_embed_dim=2, act_fn="swish", scaling_factor=0.25),
    "unet": tiny.unet,
    "unet with tokens": lambda: tiny.unet(cross_attention_dim=5),
}


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors below a folder, by file and name."""
    return {
        f"{path.relative_to(folder)}: {name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same(model: Any, again: Any) -> bool:
    state = again.state_dict()
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_exactly(name: str, tmp_path: Path) -> None:
    MODELS[name]().save_pretrained(tmp_path / "theirs")
    ours = interop.load_diffusers(tmp_path / "theirs")
    assert not ours.training and all(p.dtype == torch.float32 for p in ours.parameters())
    interop.save_diffusers(ours, tmp_path / "ours")
    there, here = tensors_in(tmp_path / "theirs"), tensors_in(tmp_path / "ours")
    assert there.keys() == here.keys() and all(torch.equal(there[k], here[k]) for k in there)
    again = interop.load_diffusers(tmp_path / "ours")
    assert again.config == ours.config and same(ours, again)
    said, truth = (
        json.loads((tmp_path / f"{n}/config.json").read_text()) for n in ("ours", "theirs")
    )
    free = {"sample_size", "act_fn", "norm_type", "scaling_factor"}
    assert {k: truth[k] for k in said if k not in free} == {
        k: v for k, v in said.items() if k not in free
    }
    assert said.get("scaling_factor", 1) == pytest.approx(truth.get("scaling_factor", 1))


@torch.no_grad()
def test_linear_layers_depth_per_level_and_one_head_are_read(tmp_path: Path) -> None:
    z, t, tokens = randn(2, 3, 8, 8), torch.tensor([3, 700]), randn(2, 7, 5, seed=1)
    changes = {"use_linear_projection": True, "transformer_layers_per_block": [2, 2]}
    theirs = tiny.unet(cross_attention_dim=5, attention_head_dim=[2, 4], **changes)
    theirs.save_pretrained(tmp_path / "linear")
    ours = interop.load_diffusers(tmp_path / "linear")
    assert (ours.config.d_head, ours.config.heads, ours.config.depth) == (4, None, 2)
    assert error(ours(z, t, tokens), theirs(z, t, tokens).sample) < 1e-5
    theirs = tiny.unet(attention_head_dim=None)
    theirs.save_pretrained(tmp_path / "one head")
    ours = interop.load_diffusers(tmp_path / "one head")
    assert ours.config.heads == 1
    assert error(ours(z, t), theirs(z, t).sample) < 1e-5


def test_a_shift_is_shift_factor(tmp_path: Path) -> None:
    ours = shaken(Autoencoder(KL)).eval()
    ours.scale.fill_(1.7)
    ours.shift.fill_(-0.6)
    interop.save_diffusers(ours, tmp_path / "ours")
    assert same(ours, interop.load_diffusers(tmp_path / "ours"))


def test_names_of_the_first_year_and_pickles_are_read(tmp_path: Path) -> None:
    tiny.first_stage("AutoencoderKL").save_pretrained(tmp_path)
    ours, path = interop.load_diffusers(tmp_path), tmp_path / WEIGHTS
    tensors = load_file(path)
    for new, old in {
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "proj_attn",
    }.items():
        tensors = {name.replace(f".{new}.", f".{old}."): v for name, v in tensors.items()}
    path.unlink()
    torch.save(tensors, path.with_suffix(".bin"))
    assert same(ours, interop.load_diffusers(tmp_path))


def test_half_precision_is_read_if_there_is_no_other(tmp_path: Path) -> None:
    tiny.unet().save_pretrained(tmp_path)
    ours, path = interop.load_diffusers(tmp_path), tmp_path / WEIGHTS
    half = {name: v.half() for name, v in load_file(path).items()}
    save_file(half, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert same(ours, interop.load_diffusers(tmp_path))
    path.unlink()
    rounded = interop.load_diffusers(tmp_path).conv_out.weight
    assert torch.equal(rounded, ours.conv_out.weight.half().float())


def test_a_scale_that_the_pipeline_does_not_read_is_not_read(tmp_path: Path) -> None:
    tiny.pipeline(SUPER, tmp_path / "words").save_pretrained(tmp_path / "p")
    assert interop.load_diffusers(tmp_path / "p").autoencoder.scale == 1
    assert interop.load_diffusers(tmp_path / "p/vqvae").scale.item() == pytest.approx(1 / 0.18215)


# --- what cannot be expressed, theirs ---

KEYS: list[tuple[str, dict[str, Any], str]] = [
    ("across", {"act_fn": "gelu"}, "act_fn='gelu' cannot be expressed, only .'silu'."),
    ("plain", {"add_attention": False}, "add_attention=False cannot"),
    ("plain", {"num_class_embeds": 9}, "num_class_embeds=9 is not known"),
    ("across", {"attention_head_dim": [4, 3]}, r"attention_head_dim=\[4, 3\] cannot be"),
    ("across", {"transformer_layers_per_block": [1, 2]}, r"depth=\[1, 2\] must be int"),
    ("plain", {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "up_block_types=.* cannot be"),
    ("plain", {"upsample_type": "resnet"}, "upsample_type=True cannot|upsample_type='resnet' c"),
    ("across", {"antigravity": True}, "antigravity=True is not known"),
    ("vae", {"use_quant_conv": False}, "use_quant_conv=False cannot .* only .True."),
    ("vae", {"latents_mean": [0.1]}, r"latents_mean=\[0.1\] is not known"),
    ("vae", {"scaling_factor": 0}, "scaling_factor=0 must be positive"),
    ("vae", {"_class_name": "AutoencoderTiny"}, "'AutoencoderTiny' is not known; known: Autoenco"),
]


@pytest.mark.parametrize(("model", "changes", "said"), KEYS, ids=str)
def test_a_key_that_cannot_be_expressed_is_named(
    model: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    build: dict[str, Callable[[], Any]] = {
        "across": lambda: tiny.unet(cross_attention_dim=5),
        "plain": tiny.unet,
        "vae": lambda: tiny.first_stage("AutoencoderKL"),
    }
    build[model]().save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=rf"config\.json.*({said})"):
        interop.load_diffusers(tmp_path)


def spoil_weights(folder: Path) -> None:
    tensors = load_file(folder / "unet" / WEIGHTS)
    tensors["conv_in.bias"][0] = torch.nan
    save_file(tensors, folder / "unet" / WEIGHTS)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


SCHEDULER = "scheduler/scheduler_config.json"
PARTS: list[tuple[str, Callable[[Path], object], str]] = [
    (LDM, spoil_weights, "conv_in.bias: file values that are not finite"),
    (LDM, lambda f: cut(f / "unet" / WEIGHTS), "cut short"),
    (LDM, lambda f: (f / "vqvae/config.json").write_text("{"), "cannot be read"),
    (LDM, lambda f: change_json(f / SCHEDULER, clip_sample=True), "clip_sample=True cannot"),
    (LDM, lambda f: change_json(f / SCHEDULER, clip_sample=...), "clip_sample=True cannot"),
    (LDM, lambda f: change_json(f / SCHEDULER, beta_schedule="sigmoid"), "'sigmoid' cannot"),
    (LDM, lambda f: change_json(f / "model_index.json", _class_name="Flux"), "'Flux' is not"),
    (LDM, lambda f: tiny.unet(in_channels=4).save_pretrained(f / "unet"), "unet.in_channels=4"),
    (TEXT, lambda f: change_json(f / "vqvae/config.json", shift_factor=0.1), "shift_factor=0.1"),
    (TEXT, lambda f: change_json(f / "bert/config.json", activation_function="relu"), "'relu' "),
    (TEXT, lambda f: [p.unlink() for p in (f / "tokenizer").iterdir()], "is not a tokenizer"),
    (STABLE, lambda f: (f / "text_encoder/model.safetensors").unlink(), "must (hold|have)|lacks"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(PARTS)))
def test_a_pipeline_that_does_not_fit_is_refused(case: int, tmp_path: Path) -> None:
    name, spoil, said = PARTS[case]
    tiny.pipeline(name, tmp_path / "words").save_pretrained(tmp_path / "p")
    spoil(tmp_path / "p")
    with pytest.raises(ValueError, match=said):
        interop.load_diffusers(tmp_path / "p")


# --- what cannot be expressed, ours ---


def model(unet: Any = UNET, **changes: Any) -> LatentDiffusion:
    shape = {"autoencoder": KL, "unet": unet, "image_size": 16}
    return LatentDiffusion(LatentDiffusionConfig(**shape | changes))


def scaled_pixels() -> LatentDiffusion:
    pixels = model(autoencoder=AutoencoderConfig(regularizer="identity", z_channels=3))
    pixels.autoencoder.scale.fill_(0.5)
    return pixels


OURS: dict[str, tuple[Callable[[], Any], str]] = {
    "patches": (lambda: Autoencoder(replace(KL, patch=2)), "patch=2, only 1"),
    "pixels": (
        lambda: Autoencoder(AutoencoderConfig(regularizer="identity", z_channels=3)),
        "cannot express regularizer='identity', only 'kl'",
    ),
    "first level": (lambda: Autoencoder(replace(KL, channel_mult=(2, 2))), "channels=8, only 16"),
    "a wide middle": (lambda: Autoencoder(replace(KL, hid_z_channels=6)), "z_channels=3, only 6"),
    "heads": (
        lambda: UNet(replace(UNET, attn_levels=(0, 1), heads=2, d_head=None)),
        "cannot express heads=2, only None",
    ),
    "resizing": (
        lambda: UNet(replace(UNET, d_cond=5, resblock_updown=True)),
        "resblock_updown=True",
    ),
    "scaled pixels": (scaled_pixels, "has no pipeline for .* scale=0.5"),
    "classes": (
        lambda: model(replace(UNET, d_cond=4), conditioner=ClassConfig(classes=("a",), d_cond=4)),
        "has no pipeline for kind='class' .*: save the model's parts",
    ),
    "no words": (
        lambda: model(
            replace(UNET, d_cond=4),
            autoencoder=replace(KL, channel_mult=(1, 1, 1, 1)),
            conditioner=TextConfig(d_cond=4, vocab_size=9, length=77),
        ),
        "has no tokenizer: call set_tokenizer first",
    ),
}


@pytest.mark.parametrize("case", OURS)
def test_what_diffusers_cannot_express_is_refused(case: str, tmp_path: Path) -> None:
    build, said = OURS[case]
    with pytest.raises(ValueError, match=said):
        interop.save_diffusers(build(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_content_is_kept(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/notes").write_text("mine")
    with pytest.raises(FileExistsError, match="kept already exists"):
        interop.save_diffusers(UNet(UNET), tmp_path / "kept")
    assert [p.name for p in tmp_path.rglob("*")] == ["kept", "notes"]
