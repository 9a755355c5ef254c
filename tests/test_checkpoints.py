"""Model folders: what goes in comes out, and what is broken is named."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from minildm import (
    EMA,
    PRESETS,
    Autoencoder,
    AutoencoderConfig,
    LatentDiffusion,
    UNet,
    load_model,
    pretrained,
    save_model,
)
from minildm.checkpoints import CheckpointError, fingerprint, from_dict, read_card, to_dict
from minildm.experiments import LatentDiffusionExperiment
from minildm.judge import Judge, JudgeConfig

KINDS = ("autoencoder", "latent-diffusion", "judge")


@pytest.fixture
def models(ldm_config: Any, shaken: Any) -> dict[str, nn.Module]:
    """One model of each kind, its weights at random; the first stage has a scale."""
    ldm = shaken(LatentDiffusion(ldm_config))
    ldm.autoencoder.scale.fill_(1.7)
    judge = JudgeConfig(labels=("a", "b"), groups=("g",), styles=("s",), width=8)
    return {"autoencoder": ldm.autoencoder, "latent-diffusion": ldm, "judge": shaken(Judge(judge))}


@pytest.fixture
def folders(models: dict[str, nn.Module], tmp_path: Path) -> dict[str, Path]:
    """The same, saved."""
    for kind, model in models.items():
        save_model(model, tmp_path / kind, first_stage="../autoencoder")
    return {kind: tmp_path / kind for kind in models}


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


# --- round trips ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_bit_for_bit(kind: str, models: dict, folders: dict) -> None:
    loaded = load_model(folders[kind], kind=kind)
    assert type(loaded) is type(models[kind])
    assert loaded.config == models[kind].config
    assert same(loaded, models[kind])
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_loading_leaves_the_callers_random_state(kind: str, folders: dict) -> None:
    state = torch.get_rng_state()
    load_model(folders[kind])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["autoencoder", "judge"])
def test_half_precision_comes_back_rounded_as_float32(
    kind: str, models: dict, tmp_path: Path
) -> None:
    save_model(models[kind], tmp_path / "half", half=True)
    for name, weight in load_model(tmp_path / "half").state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, models[kind].state_dict()[name].half().float())
    save_model(models[kind], tmp_path / "whole")
    half, whole = (tmp_path / d / "model.safetensors" for d in ("half", "whole"))
    assert half.stat().st_size < 0.8 * whole.stat().st_size


def test_a_diffusion_model_shares_its_first_stage(models: dict, folders: dict) -> None:
    tensors = load_file(folders["latent-diffusion"] / "model.safetensors")
    assert tensors
    assert not any(name.startswith("autoencoder.") for name in tensors)
    loaded = load_model(folders["latent-diffusion"])
    assert same(loaded.autoencoder, models["autoencoder"])
    assert not any(p.requires_grad for p in loaded.autoencoder.parameters())


def test_folders_that_move_together_stay_together(folders: dict, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for kind, folder in folders.items():
        folder.rename(tmp_path / "elsewhere" / kind)
    assert load_model(tmp_path / "elsewhere" / "latent-diffusion").config.image_size == 16


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_weights_are_preferred(
    kind: str, models: dict, tmp_path: Path, shaken: Any
) -> None:
    model = models[kind].requires_grad_(True)
    ema = EMA(model)
    if kind == "latent-diffusion":
        save_model(model.autoencoder, tmp_path / "autoencoder")
        shaken(model.unet, seed=1)
    else:
        shaken(model, seed=1)
    save_model(model, tmp_path / "m", ema=ema.shadow, first_stage="../autoencoder")
    own, averaged = load_model(tmp_path / "m", ema=False), load_model(tmp_path / "m")
    assert same(own, model)
    assert not same(averaged, model)
    ema.copy_to(model)
    assert same(averaged, model)


def test_a_later_save_without_averages_is_not_overruled_by_old_ones(
    models: dict, tmp_path: Path, shaken: Any
) -> None:
    model = models["judge"]
    save_model(model, tmp_path, ema=EMA(model).shadow)
    shaken(model, seed=1)
    save_model(model, tmp_path)
    assert same(load_model(tmp_path), model)


def test_info_is_remembered(models: dict, tmp_path: Path) -> None:
    save_model(models["judge"], tmp_path, info={"steps": 7, "data": "tiny"})
    assert read_card(tmp_path)["info"] == {"steps": 7, "data": "tiny"}


@pytest.mark.parametrize("name", PRESETS)
def test_an_experiment_goes_through_json(name: str) -> None:
    experiment = PRESETS[name]
    text = json.dumps(to_dict(experiment))
    assert from_dict(type(experiment), json.loads(text)) == experiment


@pytest.mark.parametrize("name", [n for n, e in PRESETS.items() if hasattr(e, "unet")])
def test_a_whole_models_config_goes_through_json(name: str) -> None:
    experiment = PRESETS[name]
    assert isinstance(experiment, LatentDiffusionExperiment)
    first = AutoencoderConfig(z_channels=experiment.unet.out_channels, width_mult=(1, 2, 4))
    config = experiment.model_config(first, ("ant", "bee"))
    again = from_dict(type(config), json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert isinstance(again.conditioner.classes, tuple)
    with torch.device("meta"):  # it can be built
        assert UNet(again.unet).config == config.unet


def test_a_config_is_validated_when_it_is_read(ldm_config: Any) -> None:
    content = to_dict(ldm_config)
    content["unet"]["width"] = 7
    with pytest.raises(ValueError, match="width=7"):
        from_dict(type(ldm_config), content)


def test_unknown_fields_are_named(ldm_config: Any) -> None:
    content = to_dict(ldm_config)
    content["unet"]["colour"] = "red"
    with pytest.raises(ValueError, match=r"UNetConfig has no \['colour'\]"):
        from_dict(type(ldm_config), content)


# --- the hash ---


def test_the_hash_is_of_the_values_not_of_their_layout(models: dict) -> None:
    model = models["autoencoder"]
    before = fingerprint(model)
    assert fingerprint(model.to(memory_format=torch.channels_last)) == before
    assert fingerprint(model.double()) == before
    with torch.no_grad():
        model.decoder.conv_out.bias[0] += 1e-3
    assert fingerprint(model) != before


def test_the_hash_sees_the_scale(models: dict) -> None:
    before = fingerprint(models["autoencoder"])
    models["autoencoder"].scale.fill_(2.0)
    assert fingerprint(models["autoencoder"]) != before


def test_another_first_stage_is_refused(models: dict, folders: dict, shaken: Any) -> None:
    save_model(shaken(models["autoencoder"], seed=9), folders["autoencoder"])
    with pytest.raises(CheckpointError, match=r"trained on another first stage.*autoencoder"):
        load_model(folders["latent-diffusion"])


def test_a_missing_first_stage_is_named(folders: dict) -> None:
    for file in folders["autoencoder"].iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match=r"autoencoder is no model's folder"):
        load_model(folders["latent-diffusion"])


# --- what is broken ---


@pytest.mark.parametrize("part", [0.0, 0.0001, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors"])
def test_weights_that_were_cut_short_are_named(
    name: str, part: float, models: dict, tmp_path: Path
) -> None:
    model = models["judge"]
    save_model(model, tmp_path, ema=EMA(model).shadow)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(part * len(content))])
    with pytest.raises(CheckpointError, match=f"{name} is cut short"):
        load_model(tmp_path)


def test_weights_that_are_something_else_are_named(folders: dict) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\n"
    (folders["judge"] / "model.safetensors").write_bytes(pointer)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short or no safetensors"):
        load_model(folders["judge"])


def edited(folder: Path, edit: Callable[[dict], Any]) -> Path:
    path = folder / "config.json"
    card = json.loads(path.read_text())
    changed = edit(card)
    path.write_text(json.dumps(card if changed is None else changed))
    return folder


BROKEN_CARDS: dict[str, tuple[str, Callable[[dict], Any]]] = {
    "format": ("says format 2, kind 'autoencoder'", lambda c: c.update(format=2)),
    "kind": ("kind 'gan'", lambda c: c.update(kind="gan")),
    "no kind": ("kind None", lambda c: c.pop("kind") and None),
    "no config": ("config", lambda c: {k: v for k, v in c.items() if k != "config"}),
    "a list": ("config.json", lambda c: [c]),
    "unknown field": ("AutoencoderConfig has no", lambda c: c["config"].update(colour=1)),
    "bad value": ("z_channels=0", lambda c: c["config"].update(z_channels=0)),
    "bad type": ("config.json", lambda c: c["config"].update(width="wide")),
}


@pytest.mark.parametrize("case", BROKEN_CARDS)
def test_a_config_that_does_not_fit_is_named(case: str, folders: dict) -> None:
    said, edit = BROKEN_CARDS[case]
    with pytest.raises(CheckpointError, match=said) as caught:
        load_model(edited(folders["autoencoder"], edit))
    assert "config.json" in str(caught.value)


def test_a_diffusion_model_whose_first_stage_is_not_named_is_refused(folders: dict) -> None:
    folder = edited(folders["latent-diffusion"], lambda c: c.pop("first_stage") and None)
    with pytest.raises(CheckpointError, match=r"config\.json.*first_stage"):
        load_model(folder)


@pytest.mark.parametrize("content", [b"", b'{"format": 1, "ki', b"\xff\xfe"])
def test_a_config_that_is_no_json_is_named(content: bytes, folders: dict) -> None:
    (folders["judge"] / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json is not readable as JSON"):
        load_model(folders["judge"])


def test_weights_of_another_model_are_listed(folders: dict) -> None:
    folder = edited(folders["autoencoder"], lambda c: c["config"].update(width=16))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: \d+ tensors do not fit") as got:
        load_model(folder)
    lines = str(got.value).splitlines()
    assert len(lines) == 11  # the first ten
    assert "decoder.conv_in.bias: file (16,), model (32,)" in str(got.value)


def test_tensors_too_few_and_too_many_are_listed(folders: dict) -> None:
    folder = edited(folders["autoencoder"], lambda c: c["config"].update(mid_attn=True))
    with pytest.raises(CheckpointError, match=r"norm\.bias: file nothing, model \(16,\)") as got:
        load_model(folder)
    assert "conv1.bias: file (16,), model nothing" in str(got.value)


def test_files_that_are_missing_are_named(folders: dict, tmp_path: Path) -> None:
    (folders["judge"] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load_model(folders["judge"])
    with pytest.raises(CheckpointError, match=r"nowhere is no model's folder"):
        load_model(tmp_path / "nowhere")


def test_a_model_of_another_kind_is_refused(folders: dict) -> None:
    with pytest.raises(CheckpointError, match="kind 'judge', not 'autoencoder'"):
        load_model(folders["judge"], kind="autoencoder")


def test_a_full_disk_loses_nothing(
    models: dict, folders: dict, shaken: Any, full_disk: Callable[..., None]
) -> None:
    model, folder = models["autoencoder"], folders["autoencoder"]
    old = {p.name: p.read_bytes() for p in folder.iterdir()}
    shaken(model, seed=5)
    for room in (0, 100, len(old["model.safetensors"]) - 1):
        full_disk(room)
        with pytest.raises(OSError, match=r"No space left.*model\.safetensors"):
            save_model(model, folder, ema=dict(model.named_parameters()))
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == old
    assert load_model(folders["latent-diffusion"]) is not None  # and with it the hash still fits


def test_a_disk_that_fills_between_two_files_leaves_a_model(
    models: dict, tmp_path: Path, shaken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["judge"]
    save_model(model, tmp_path, ema=EMA(model).shadow)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minildm.checkpoints.write_json", full)
    shaken(model, seed=5)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, tmp_path, ema=EMA(model).shadow)
    assert same(load_model(tmp_path), model)


def test_saving_what_is_no_model_is_refused(models: dict, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got Linear"):
        save_model(nn.Linear(1, 1), tmp_path)
    with pytest.raises(ValueError, match="must name its first_stage"):
        save_model(models["latent-diffusion"], tmp_path)
    assert not list(tmp_path.iterdir())


# --- what ships ---


def test_pretrained_finds_what_lies_in_the_weights(
    models: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINILDM_DATA", str(tmp_path))
    save_model(models["judge"], tmp_path / "weights" / "small-judge")
    save_model(models["autoencoder"], tmp_path / "weights" / "small-ae")
    assert isinstance(pretrained("small-ae"), Autoencoder)
    with pytest.raises(ValueError, match="'big' is not known; known: small-ae, small-judge"):
        pretrained("big")


def test_a_replaced_field_survives(models: dict, tmp_path: Path) -> None:
    config = replace(models["autoencoder"].config, patch=2, zero_init=True, dropout=0.1)
    save_model(Autoencoder(config), tmp_path)
    assert load_model(tmp_path).config == config
