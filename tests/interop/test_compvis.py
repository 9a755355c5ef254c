"""Official models load exactly, whole and in parts; what was loaded comes out again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import shaken, tiny_clip
from interop import official_models as official
from interop.official_models import BY_NAME, same
from torch import Tensor, nn

from minildm import conditioning as tau
from minildm import interop
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.diffusion.objective import ObjectiveConfig
from minildm.diffusion.schedule import ScheduleConfig
from minildm.interop.compvis import _parts, _views, read_part, write_part
from minildm.interop.weights import exported
from minildm.training.presets import PUBLISHED, RELEASED


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def official_state(part: Any) -> dict[str, Tensor]:
    """A part's tensors by their official names, without writing a file."""
    parts = _parts(part)
    return exported(_views(parts, dict.fromkeys(parts, "")))


# --- every published model, on the meta device ---


@pytest.mark.parametrize("path", official.FIRST_STAGES)
def test_a_published_first_stage_loads_exactly(path: str) -> None:
    stage = official.FIRST_STAGES[path]
    config, tensors = official.first_stage(stage)
    model = interop.load_compvis({"model": config}, tensors)
    assert official.names_hash(official_state(model)) == stage["state_dict"]["keys_sha256"]
    assert parameters(model) == stage["params"]["total"]
    assert model.f == stage["f"]
    if path.startswith("models"):
        assert model.config == RELEASED[path.split("/")[2]].model


@pytest.mark.parametrize("name", BY_NAME)
def test_a_published_model_loads_whole(name: str) -> None:
    model = interop.load_compvis(*official.whole_model(BY_NAME[name]))
    presets = [PUBLISHED[name]] if name in PUBLISHED else PUBLISHED.values()  # of other names
    assert model.config in presets
    assert read_part(write_part(model.config)) == model.config
    assert parameters(model.unet) == BY_NAME[name]["unet_params"]
    encoder = BY_NAME[name]["cond_stage"]
    scores = encoder.get("params_breakdown", {}).get("to_logits_unused", 0)  # of next words
    if "state_dict" in encoder:
        assert parameters(model.conditioner) == encoder["params"] - scores
    wanted = BY_NAME[name]["unet_state_dict"]["keys_sha256"]
    assert official.names_hash(official_state(model.unet)) == wanted
    assert not any(buffer.is_meta for buffer in model.schedule.buffers())


# --- there and back ---

CLASSES = tau.ClassConfig(classes=("a", "b"), d_cond=32)
SEMANTIC = tau.SemanticConfig(labels=("0", "1"), stages=1)


def own(conditioner: tau.ConditionerConfig = CLASSES) -> LatentDiffusion:
    schedule = ScheduleConfig(kind="linear", beta_start=0.0001, beta_end=0.02)
    objective = ObjectiveConfig(predict="z0", loss="l1")
    model = official.whole(conditioner, schedule=schedule, objective=objective)
    model.autoencoder.scale.fill_(0.37)
    return model


def through_files(model: Any, folder: Path, **options: Any) -> Any:
    interop.save_compvis(model, folder / "own.safetensors")
    return interop.load_compvis(folder / "own.yaml", folder / "own.safetensors", **options)


@pytest.mark.parametrize(
    ("conditioner", "read"),
    [
        (SEMANTIC, "semantic"),
        (tau.LowResConfig(), "low_res"),
        (tau.InpaintConfig(), "inpaint"),
        (tau.TextConfig(d_cond=32, vocab_size=40, length=9), "ids"),
        (tau.LayoutConfig(d_cond=32, classes=("a", "b"), grid=4, max_boxes=2), "layout"),
    ],
    ids=lambda config: getattr(config, "kind", ""),
)
def test_a_condition_comes_out_again(conditioner: Any, read: str, tmp_path: Path) -> None:
    model = official.whole(conditioner)
    again = through_files(model, tmp_path)
    assert again.config.conditioner.kind == read  # own words become numbers
    assert replace(again.config, conditioner=conditioner) == model.config
    assert same(again.state_dict(), model.state_dict())


def test_a_model_of_our_own_is_read_as_official(tmp_path: Path) -> None:
    model = own()
    again = through_files(model, tmp_path)
    assert again.config == model.config  # names and the null class included
    options = {"steps": 3, "seed": 0, "eta": 1.0, "guidance_scale": 2.0}
    assert torch.equal(again.sample(["b", "a"], **options), model.sample(["b", "a"], **options))
    config = yaml.safe_load((tmp_path / "own.yaml").read_text())["model"]  # the official content
    there = interop.load_compvis(config, tmp_path / "own.safetensors")
    assert there.config.conditioner.classes == ("0", "1", "2")  # numbers, one for "no class"


@pytest.mark.parametrize("name", ["autoencoder", "unet", "conditioner"])
def test_a_part_is_saved_alone_and_read_from_a_whole_model(name: str, tmp_path: Path) -> None:
    model = own()
    config, tensors = official.saved(model, tmp_path)
    model.autoencoder.scale.fill_(1)  # belongs to the whole model
    part = getattr(model, name)
    assert same(through_files(part, tmp_path).state_dict(), part.state_dict())
    key = {"autoencoder": "first_stage", "unet": "unet", "conditioner": "cond_stage"}[name]
    inside = interop.load_compvis(config["params"][f"{key}_config"], {"state_dict": tensors})
    assert type(inside) is type(part)
    assert same(inside.state_dict(), part.state_dict())


@torch.no_grad()
def test_stable_diffusion_keeps_its_clip(tmp_path: Path) -> None:
    clip = tau.FrozenTextConfig(encoder="clip", path=str(tiny_clip(tmp_path)), d_cond=16, length=10)
    model = own(clip)
    shaken(model.conditioner.network, seed=9)  # not the folder's
    interop.save_diffusers(model, tmp_path / "pipeline")
    interop.convert(tmp_path / "pipeline", tmp_path / "own.ckpt", to="compvis")
    again = interop.load_compvis(tmp_path / "own.yaml", tmp_path / "own.ckpt")  # its own CLIP
    assert same(again.conditioner.network.state_dict(), model.conditioner.network.state_dict())
    (tmp_path / "model.safetensors").unlink()  # its words and config are enough
    again = through_files(model, tmp_path, clip=tmp_path)
    captions = {"caption": ["a red dog", ""]}
    assert torch.equal(model.conditioner(captions).tokens, again.conditioner(captions).tokens)
    assert again.sample("red", steps=2, guidance_scale=5.0).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="must hold clip's"):
        interop.convert(tmp_path / "own.safetensors", tmp_path / "ours", clip=tmp_path)


def test_stable_diffusion_inpaints(tmp_path: Path) -> None:
    clip = tau.FrozenTextConfig(encoder="clip", path=str(tiny_clip(tmp_path)), d_cond=16, length=10)
    model = own(tau.HybridConfig(tokens=clip, concat=tau.InpaintConfig(stable=True)))
    again = through_files(model, tmp_path)
    assert again.config == model.config and same(again.state_dict(), model.state_dict())
    part = yaml.safe_load((tmp_path / "own.yaml").read_text())["model"]
    assert part["target"] == "ldm.models.diffusion.ddpm.LatentInpaintDiffusion"
    assert part["params"]["conditioning_key"] == "hybrid"


def test_a_loaded_model_samples_and_trains(tmp_path: Path) -> None:
    own = official.whole(tau.SemanticConfig(labels=("a", "b"), stages=1))
    config, tensors = official.saved(own, tmp_path)
    config["params"] |= {"scale_by_std": True, "scale_factor": 1.0}
    tensors["scale_factor"] = torch.tensor(0.7)
    before = torch.get_rng_state()
    model = interop.load_compvis(config, tensors | official.averages(tensors))
    averaged = {name: 2 * tensor for name, tensor in own.unet.state_dict().items()}
    assert same(model.unet.state_dict(), averaged)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.autoencoder.scale.item() == pytest.approx(1 / 0.7)
    assert not model.training
    assert not any(p.requires_grad for p in model.autoencoder.parameters())
    maps = torch.arange(16 * 16).reshape(1, 16, 16) % 2
    x = model.sample(maps, steps=2, seed=0)
    assert x.shape == (1, 3, 16, 16)
    model.train().loss({"image": x, "semantic": maps})["loss"].backward()
    trained = (*model.unet.parameters(), model.conditioner.mapper.weight)
    assert all(p.grad is not None for p in trained)
