"""What does not fit or cannot be expressed is refused by name, and nothing is left of it."""

import copy
import functools
import operator
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import shaken
from interop import diffusers_models as tiny
from interop.diffusers_models import DDIM, LDM, STABLE, TEXT, change_json
from interop.official_models import KL, UNET, saved, whole

from minildm import conditioning as tau
from minildm import interop
from minildm.compression.autoencoder import Autoencoder
from minildm.diffusion.unet import UNet
from minildm.training.checkpoint import CheckpointError

NAME = "quant_conv.bias"
MISFITS: list[tuple[dict[str, Any], str]] = [
    ({NAME: None}, r"1 tensors .*quant_conv\.bias: file nothing, model \(6,\)"),
    ({"more": torch.ones(1)}, r"more: file \(1,\), model nothing"),
    ({NAME: torch.ones(4)}, r"quant_conv\.bias: file \(4,\), model \(6,\)"),
    ({NAME: torch.full((6,), torch.nan)}, r"quant_conv\.bias: file values that are not finite"),
    ({NAME: torch.ones(6).long()}, r"quant_conv\.bias: file torch\.int64, not floats"),
    ({f"more.{i}": torch.ones(1) for i in range(30)}, "30 tensors do not fit"),
]


@pytest.mark.parametrize(("changes", "said"), MISFITS, ids=[said for _, said in MISFITS])
def test_a_tensor_that_does_not_fit_is_named(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    config, tensors = saved(shaken(Autoencoder(KL)), tmp_path)
    unused = {"loss.logvar": torch.tensor(0.0), "colorize": torch.ones(3, 4, 1, 1)}
    interop.load_compvis(config, tensors | unused)
    tensors = {name: value for name, value in (tensors | changes).items() if value is not None}
    with pytest.raises(CheckpointError, match=rf"(?s)checkpoint: .*{said}") as raised:
        interop.load_compvis(config, tensors)
    assert len(str(raised.value).splitlines()) <= 11  # ten of them are listed


CLIP = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
OFFICIAL: list[tuple[str, Any, str]] = [
    ("guidance", 3, "guidance=3 is not known"),
    ("first_stage_config", None, "lacks 'autoencoder'"),
    ("unet_config.target", "ldm.UNet", "target='ldm.UNet' is not known"),
    ("beta_schedule", "sqrt", "beta_schedule='sqrt' cannot be expressed, only .'linear', 'sqrt_"),
    ("linear_end", 0.0001, "beta_end=0.0001 must lie in 0.0015"),
    ("loss_type", "huber", "loss='huber'"),
    ("scale_factor", 0.0, "the latents must be positive, got 0.0"),
    ("linear_end", 0.03, "alphas_cumprod are not of the config's schedule"),
    ("scale_by_std", True, "lacks 'scale_factor'"),
    ("unet_config.params.in_channels", 5, "in_channels=5"),
    ("first_stage_config.params.ddconfig.double_z", False, "double_z=False cannot be expressed"),
    ("cond_stage_config.params.in_channels", 10**9, r"mapper.weight: file .*, model \(3, 10001\)"),
    ("cond_stage_config", CLIP, "clip=None must be a folder"),
]


@pytest.mark.parametrize(("key", "value", "said"), OFFICIAL, ids=[said for *_, said in OFFICIAL])
def test_an_official_config_that_cannot_be_expressed_is_refused(
    key: str, value: Any, said: str, semantic: Any
) -> None:
    config, tensors = copy.deepcopy(semantic[0]), semantic[1]
    *path, last = key.split(".")
    functools.reduce(operator.getitem, path, config["params"])[last] = value
    with pytest.raises(ValueError, match=said):
        interop.load_compvis(config, tensors)


@pytest.fixture(scope="module")
def semantic(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = whole(tau.SemanticConfig(labels=("a", "b"), stages=1))
    return saved(model, tmp_path_factory.mktemp("semantic"))


SCHEDULER, SHAPE = "scheduler/scheduler_config.json", "unet/config.json"
PIPELINES: list[tuple[str, Callable[[Path], object], str]] = [
    (LDM, lambda f: (f / "vqvae/config.json").write_text("{"), r"vqvae/config\.json"),
    (LDM, lambda f: change_json(f / "vqvae/config.json", scaling_factor=-1), "positive, got -1"),
    (LDM, lambda f: change_json(f / SCHEDULER, clip_sample=...), "clip_z0=True requires pixels"),
    (DDIM, lambda f: change_json(f / SCHEDULER, clip_sample_range=2), "clip_sample_range=2 cannot"),
    (DDIM, lambda f: (f / "model_index.json").unlink(), r"one model .*p/unet.; it holds sched"),
    (LDM, lambda f: change_json(f / "model_index.json", _class_name="Flux"), "'Flux' is not"),
    (LDM, lambda f: tiny.unet(in_channels=4).save_pretrained(f / "unet"), "unet.in_channels=4"),
    (LDM, lambda f: change_json(f / SHAPE, act_fn="gelu"), r"/unet: act_fn='gelu' cannot"),
    (LDM, lambda f: change_json(f / SHAPE, num_class_embeds=9), "num_class_embeds=9 is not known"),
    (TEXT, lambda f: change_json(f / SHAPE, attention_head_dim=[4, 3]), r"heads=\[4, 3\] must"),
    (TEXT, lambda f: change_json(f / SHAPE, transformer_layers_per_block=[1, 2]), r"depth=\[1, 2"),
    (TEXT, lambda f: [p.unlink() for p in (f / "tokenizer").iterdir()], "is not a tokenizer"),
    (STABLE, lambda f: (f / "text_encoder/model.safetensors").unlink(), "must hold|lacks"),
]


@pytest.mark.parametrize("case", range(len(PIPELINES)))
def test_a_pipeline_that_does_not_fit_is_refused(case: int, tmp_path: Path) -> None:
    name, spoil, said = PIPELINES[case]
    tiny.pipeline(name, tmp_path / "words").save_pretrained(tmp_path / "p")
    spoil(tmp_path / "p")
    with pytest.raises(ValueError, match=said):
        interop.load_diffusers(tmp_path / "p")


def scaled(model: Any) -> Any:
    getattr(model, "autoencoder", model).scale.fill_(2)
    return model


CLASSES = tau.ClassConfig(classes=("a",), d_cond=8)
TEXTS = tau.TextConfig(d_cond=8, vocab_size=9, length=77)
HYBRID = tau.HybridConfig(tokens=CLASSES, concat=tau.LowResConfig())
OURS: list[tuple[str, Callable[[], Any], str]] = [
    ("compvis", lambda: UNet(replace(UNET, groups=8)), "cannot express groups=8, only 32"),
    ("compvis", lambda: UNet(replace(UNET, channel_mult=(2, 2))), "channels=32, only 64"),
    (
        "compvis",
        lambda: Autoencoder(replace(KL, groups=8, patch=2)),
        "groups=8, only 32; patch=2, only 1: train with --set model.patch=1",
    ),
    ("compvis", lambda: scaled(Autoencoder(KL)), "scale=2.0 of a part alone"),
    ("compvis", replace(TEXTS, heads=4).build, "cannot express heads=4, only 8"),
    ("compvis", lambda: whole(HYBRID), r"lacks LowResConfig\("),
    (
        "compvis",
        lambda: scaled(whole(tau.InpaintConfig())),
        "scale_factor must be 1 for inpainting",
    ),
    ("diffusers", lambda: Autoencoder(replace(KL, hid_z_channels=6)), "z_channels=3, only 6"),
    ("diffusers", lambda: UNet(replace(UNET, heads=2, d_head=None)), "express heads=2, only None"),
    ("diffusers", lambda: UNet(replace(UNET, d_cond=5, resblock_updown=True)), "resblock_updown"),
    ("diffusers", lambda: whole(CLASSES), "has no pipeline for kind='class'"),
]


@pytest.mark.parametrize("case", range(len(OURS)))
def test_what_another_project_cannot_express_is_refused(case: int, tmp_path: Path) -> None:
    project, build, said = OURS[case]
    save = interop.save_compvis if project == "compvis" else interop.save_diffusers
    with pytest.raises(ValueError, match=said):
        save(build(), tmp_path / "own.ckpt")
    assert not list(tmp_path.iterdir())


def test_other_wrong_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to='minildm' must be one of diffusers, compvis"):
        interop.convert("mixed-kl-f4", tmp_path / "out")
    with pytest.raises(ValueError, match="patch=2, only 1"):
        interop.convert("mixed-kl-f4", tmp_path / "out", to="diffusers")
    with pytest.raises(ValueError, match="emoji-classifier is a Classifier, which diffusers"):
        interop.convert("emoji-classifier", tmp_path / "out", to="diffusers")
    with pytest.raises(ValueError, match="model='away/missing' is not known"):
        interop.convert("away/missing", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"missing\.ckpt is missing"):
        interop.load_compvis({}, tmp_path / "missing.ckpt")
    interop.save_diffusers(UNet(UNET), tmp_path / "unet")
    with pytest.raises(ValueError, match="unet is a UNet, which minildm files cannot hold"):
        interop.convert(tmp_path / "unet", tmp_path / "out")
    assert not (tmp_path / "out").exists()
