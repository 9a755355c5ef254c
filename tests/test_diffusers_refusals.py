"""Folders that are broken, and models that cannot be expressed: refused by name, either way."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers_tiny as tiny
import pytest
import torch
from diffusers_copy import AutoencoderKL
from diffusers_tiny import LDM, SD, TEXT, UNET, change_json
from safetensors.torch import load_file, save_file
from torch import Tensor

from minildm import (
    Autoencoder,
    AutoencoderConfig,
    ConditionerConfig,
    LatentDiffusion,
    LatentDiffusionConfig,
    UNet,
    frozen_text,
    interop,
)
from minildm.checkpoints import CheckpointError

KL = AutoencoderConfig(z_channels=3, width=8, width_mult=(1, 2), res_blocks=1, groups=4)
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    config = replace(UNET, d_cond=5, heads=2, d_head=None, attn_levels=(0, 1))
    tiny.unet(config).save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    tiny.unet().save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    tiny.first_stage(AutoencoderKL).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


KEYS: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation": ("unet", {"act_fn": "gelu"}, "act_fn='gelu' cannot be expressed, only 'silu'"),
    "attention": ("plain", {"add_attention": False}, "add_attention=False .*, only True"),
    "classes": ("plain", {"num_class_embeds": 9}, "num_class_embeds=9 cannot .*, only None"),
    "time": ("unet", {"class_embed_type": "timestep"}, "class_embed_type='timestep' cannot"),
    "sines first": ("unet", {"flip_sin_to_cos": False}, "flip_sin_to_cos=False cannot"),
    "more text": ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),
    "heads": ("unet", {"attention_head_dim": [4, 2]}, r"attention_head_dim=\[4, 2\] cannot be"),
    "depths": (
        "unet",
        {"transformer_layers_per_block": [1, 2]},
        r"transformer_layers_per_block=\[1, 2\] cannot be expressed, only one for all",
    ),
    "a middle without norm": (
        "plain",
        {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": None},
        "attn_norm_num_groups=None cannot be expressed, only 4",
    ),
    "blocks": (
        "plain",
        {"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]},
        "down_block_types=.*SkipDownBlock2D.* must be a list of some of DownBlock2D, Resnet",
    ),
    "not mirrored": (
        "plain",
        {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]},
        "up_block_types=.* must mirror down_block_types=",
    ),
    "half and half": (
        "plain",
        {"upsample_type": "resnet"},
        "upsample_type='resnet' resize partly by convolutions, partly by residual blocks",
    ),
    "widths": (
        "plain",
        {"block_out_channels": [8, 12]},
        r"block_out_channels=\[8, 12\] must be multiples of the first",
    ),
    "a new key": ("unet", {"antigravity": True}, "antigravity=True is not known; known: act_fn"),
    "no channels": ("unet", {"in_channels": ...}, "lacks 'in_channels'"),
    "groups": ("unet", {"norm_num_groups": 3}, "must be multiples of groups=3"),
    "no quant_conv": ("vae", {"use_quant_conv": False}, "use_quant_conv=False cannot .* only True"),
    "means": ("vae", {"latents_mean": [0.1]}, r"latents_mean=\[0.1\] cannot be expressed"),
    "other pictures": ("vae", {"out_channels": 4}, "out_channels=4 cannot be expressed, only 3"),
    "no scale": ("vae", {"scaling_factor": 0}, "scaling_factor=0.0 must be positive"),
    "another class": (
        "vae",
        {"_class_name": "AutoencoderTiny"},
        "_class_name='AutoencoderTiny' is not known; known: AutoencoderKL, VQModel, UNet2DModel, ",
    ),
    "no class": ("vae", {"_class_name": ...}, "names no _class_name"),
}


@pytest.mark.parametrize("case", KEYS)
def test_what_cannot_be_expressed_is_refused_by_its_key(
    case: str, request: pytest.FixtureRequest
) -> None:
    model, changes, said = KEYS[case]
    folder = request.getfixturevalue(model)
    change_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}.*{said}"):
        interop.load_diffusers(folder)


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def spoiled(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        tensors[name].view(-1)[0] = torch.nan


class Runs:
    """In a pickle: would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has neither model_index.json nor"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not readable as"),
    "no object": (
        lambda f: (f / "config.json").write_text("[]"),
        "must hold an object, not a list",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"holds no weights: {WEIGHTS} is missing"),
    "cut short": (lambda f: os.truncate(f / WEIGHTS, 5000), f"{WEIGHTS} is cut short or no"),
    "one missing": (
        lambda f: changed(f, lambda t: t.pop("conv_in.bias")),
        r"1 tensors do not fit, such as\n  conv_in.bias \(8,\) is missing",
    ),
    "one more": (
        lambda f: changed(f, lambda t: t.update(extra=torch.zeros(1))),
        "extra has no place in this model",
    ),
    "another shape": (
        lambda f: changed(f, lambda t: t.update({"conv_in.bias": torch.zeros(9)})),
        r"conv_in.bias is \(9,\), must be \(8,\)",
    ),
    "NaN": (
        lambda f: changed(f, spoiled),
        r"\d\d tensors do not fit, such as(\n  \S+ holds values that are not finite[^\n]*){10}$",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_broken_folder_is_refused_by_name(case: str, plain: Path) -> None:
    spoil, said = FILES[case]
    spoil(plain)
    with pytest.raises(CheckpointError, match=said):
        interop.load_diffusers(plain)


def test_a_pickle_that_would_run_code_runs_nothing(plain: Path, tmp_path: Path) -> None:
    tensors: dict[str, Any] = load_file(plain / WEIGHTS)
    (plain / WEIGHTS).unlink()
    ran = tmp_path / "ran"
    torch.save(tensors | {"conv_in.bias": Runs(ran)}, (plain / WEIGHTS).with_suffix(".bin"))
    with pytest.raises(CheckpointError, match="would run code; nothing was run"):
        interop.load_diffusers(plain)
    assert not ran.exists()


# --- pipelines ---

PARTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "another pipeline": (
        LDM,
        lambda f: change_json(f / "model_index.json", _class_name="KandinskyPipeline"),
        "_class_name='KandinskyPipeline' is not known; known: LDMPipeline, LDMSuper",
    ),
    "no unet": (LDM, lambda f: (f / "unet/config.json").unlink(), "unet/config.json is missing"),
    "a unet for a first stage": (
        LDM,
        lambda f: change_json(f / "vqvae/config.json", _class_name="UNet2DModel"),
        "_class_name='UNet2DModel' is not known; known: AutoencoderKL, VQModel$",
    ),
    "no scheduler": (
        LDM,
        lambda f: (f / "scheduler/scheduler_config.json").unlink(),
        "scheduler_config.json is missing",
    ),
    "clipped": (
        LDM,
        lambda f: change_json(f / "scheduler/scheduler_config.json", clip_sample=True),
        "clip_sample=True cannot be expressed, only False",
    ),
    "clipped, unsaid": (
        LDM,
        lambda f: change_json(f / "scheduler/scheduler_config.json", clip_sample=...),
        "clip_sample=True cannot be expressed, only False",
    ),
    "its own betas": (
        LDM,
        lambda f: change_json(f / "scheduler/scheduler_config.json", trained_betas=[0.1]),
        r"trained_betas=\[0.1\] cannot be expressed, only None",
    ),
    "another schedule": (
        LDM,
        lambda f: change_json(f / "scheduler/scheduler_config.json", beta_schedule="sigmoid"),
        "beta_schedule='sigmoid' cannot be expressed, only 'scaled_linear', 'linear', 'squared",
    ),
    "other channels": (
        LDM,
        lambda f: tiny.unet(replace(UNET, in_channels=4)).save_pretrained(f / "unet"),
        "z_channels=3 must be the UNet's in_channels=4",
    ),
    "a shift": (
        TEXT,
        lambda f: change_json(f / "vqvae/config.json", shift_factor=0.1),
        "shift_factor=0.1 is not read by this pipeline; allowed: null or 0",
    ),
    "BERT": (
        TEXT,
        lambda f: change_json(f / "bert/config.json", activation_function="relu"),
        "bert/config.json: activation_function='relu' cannot be expressed, only 'gelu'",
    ),
    "fewer words": (
        TEXT,
        lambda f: (
            (f / "tokenizer/tokenizer.json").unlink(),
            (f / "tokenizer/vocab.txt").write_text("\n".join(tiny.WORDS[:-1])),
        ),
        "tokenizer has 9 tokens, the model 10",
    ),
    "no words": (
        TEXT,
        lambda f: [path.unlink() for path in (f / "tokenizer").iterdir()],
        "vocab.txt is no vocabulary",
    ),
    "no CLIP": (
        SD,
        lambda f: (f / "text_encoder/model.safetensors").unlink(),
        "holds no CLIP",
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_pipeline_that_does_not_fit_is_refused_by_name(case: str, tmp_path: Path) -> None:
    name, spoil, said = PARTS[case]
    frozen_text.frozen_text.cache_clear()
    tiny.pipeline(name, tmp_path / "words").save_pretrained(tmp_path / "p")
    spoil(tmp_path / "p")
    with pytest.raises(ValueError, match=said):
        interop.load_diffusers(tmp_path / "p")


def test_without_transformers_clip_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen_text.frozen_text.cache_clear()
    tiny.pipeline(SD, tmp_path / "words").save_pretrained(tmp_path / "p")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'minildm\[text\]'"):
        interop.load_diffusers(tmp_path / "p")


# --- ours, that diffusers cannot express ---

FIRST_STAGES = {
    "patches": ({"patch": 2}, "patch=2: there pixels do not enter 2x2 as channels"),
    "pixels": ({"regularizer": "identity"}, "regularizer='identity': diffusers has no first stage"),
    "a narrow start": ({"width_mult": (2, 2)}, "width_mult=.* the first level has the width"),
    "a wide middle": ({"hid_z_channels": 6}, "hid_z_channels=6: AutoencoderKL's 1x1 convolutions"),
}


@pytest.mark.parametrize("case", FIRST_STAGES)
def test_a_first_stage_that_diffusers_lacks_is_refused(case: str, tmp_path: Path) -> None:
    changes, said = FIRST_STAGES[case]
    first_stage = replace(KL, **changes)
    with pytest.raises(ValueError, match=f"diffusers cannot express this first stage: {said}"):
        interop.save_diffusers(Autoencoder(first_stage), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_on_patches_the_unet_can_be_saved_by_itself(tmp_path: Path) -> None:
    config = LatentDiffusionConfig(autoencoder=replace(KL, patch=2), unet=UNET, image_size=16)
    model = LatentDiffusion(config)
    with pytest.raises(ValueError, match="only patch=1 can be saved, or the UNet by itself"):
        interop.save_diffusers(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    interop.save_diffusers(model.unet, tmp_path / "out")
    assert interop.load_diffusers(tmp_path / "out").config == UNET


def test_scaled_pixels_are_refused(tmp_path: Path) -> None:
    pixels = AutoencoderConfig(regularizer="identity", z_channels=3)
    model = LatentDiffusion(LatentDiffusionConfig(autoencoder=pixels, unet=UNET, image_size=16))
    model.autoencoder.scale.fill_(0.5)
    with pytest.raises(ValueError, match=r"pixels with shift=0, scale=0.5; only 0 and 1"):
        interop.save_diffusers(model, tmp_path / "out")


def test_captions_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    tau = ConditionerConfig(kind="text", d_cond=4, vocab_size=9)
    unet = replace(UNET, d_cond=4)
    config = LatentDiffusionConfig(autoencoder=KL, unet=unet, conditioner=tau, image_size=16)
    with pytest.raises(ValueError, match="has no tokenizer: call set_tokenizer first"):
        interop.save_diffusers(LatentDiffusion(config), tmp_path / "out")
    assert not list(tmp_path.iterdir())


UNETS = {
    "heads": (
        {"attn_levels": (0, 1), "heads": 2, "d_head": None},
        r"heads=2 on levels of \[8, 16\] channels; UNet2DModel has one width",
    ),
    "resizing": ({"d_cond": 5, "resblock_updown": True}, "resblock_updown=True with d_cond=5"),
    "a narrow start": ({"width_mult": (2, 2)}, "width_mult=.* the first level has the width"),
}


@pytest.mark.parametrize("case", UNETS)
def test_a_unet_that_diffusers_lacks_is_refused(case: str, tmp_path: Path) -> None:
    changes, said = UNETS[case]
    with pytest.raises(ValueError, match=f"diffusers cannot express this UNet: {said}"):
        interop.save_diffusers(UNet(replace(UNET, **changes)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"must be an Autoencoder, a UNet or .*, got Linear"):
        interop.save_diffusers(torch.nn.Linear(1, 1), tmp_path / "out")


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/notes").write_text("mine")
    with pytest.raises(FileExistsError, match="kept is there already, and kept: name a new"):
        interop.save_diffusers(UNet(UNET), tmp_path / "kept")
    assert [p.name for p in tmp_path.rglob("*")] == ["kept", "notes"]
    (tmp_path / "empty").mkdir()
    interop.save_diffusers(UNet(UNET), tmp_path / "empty")
    interop.load_diffusers(tmp_path / "empty")


@pytest.mark.parametrize("room", [0, 3000])
def test_on_a_full_disk_nothing_is_left(
    room: int, tmp_path: Path, full_disk: Callable[..., None]
) -> None:
    full_disk(room)
    with pytest.raises(OSError, match="No space left"):
        interop.save_diffusers(UNet(UNET), tmp_path / "out")
    assert not list(tmp_path.iterdir())
