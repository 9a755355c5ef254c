"""Model folders: what goes in comes out; what is damaged is named, and runs no code."""

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSES, shaken, tiny_ldm_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minildm.compression.autoencoder import Autoencoder
from minildm.conditioning import (
    CaptionTokenizer,
    ClassConfig,
    ConditionerConfig,
    FrozenTextConfig,
    HybridConfig,
    IdsConfig,
    InpaintConfig,
    LayoutConfig,
    SemanticConfig,
    TextConfig,
)
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.training.checkpoint import (
    CheckpointError,
    load_model,
    pretrained,
    read_card,
    reader_of,
    save_model,
    shipped_names,
)
from minildm.training.classifier import Classifier, ClassifierConfig, Segmenter, SegmenterConfig
from minildm.training.ema import EMA

KINDS = ("autoencoder", "latent-diffusion", "classifier", "segmenter")


@pytest.fixture
def models() -> dict[str, Any]:
    """One model of each kind with random weights; the first stage has a scale."""
    ldm = shaken(LatentDiffusion(tiny_ldm_config()))
    ldm.autoencoder.scale.fill_(1.7)
    config = ClassifierConfig(labels=("a", "b"), groups=("g",), styles=("s",), channels=8)
    segmenter = Segmenter(SegmenterConfig(labels=("a", "b"), channels=8))
    autoencoder = Autoencoder(ldm.config.autoencoder)
    autoencoder.load_state_dict(ldm.autoencoder.state_dict())
    trained = (autoencoder, ldm, shaken(Classifier(config)), shaken(segmenter))
    return dict(zip(KINDS, trained, strict=True))


@pytest.fixture
def folders(models: dict[str, Any], tmp_path: Path) -> dict[str, Path]:
    """The same, saved."""
    for kind, model in models.items():
        save_model(model, tmp_path / kind, first_stage="../autoencoder", info={"steps": 7})
    return {kind: tmp_path / kind for kind in models}


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def on_meta(model: nn.Module) -> list[str]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if tensor.is_meta]


# --- round trips ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_bit_for_bit(kind: str, models: dict, folders: dict) -> None:
    state = torch.get_rng_state()
    loaded = load_model(folders[kind], kind=kind)
    assert type(loaded) is type(models[kind])
    assert loaded.config == models[kind].config
    assert same(loaded, models[kind])
    assert not on_meta(loaded)
    assert not any(module.training for module in loaded.modules())
    assert read_card(folders[kind])["info"] == {"steps": 7}
    assert torch.equal(torch.get_rng_state(), state)
    trained = {name for name, p in models[kind].named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trained
    if kind == "latent-diffusion":
        x, y = (m.eval().sample(["red"], steps=2, seed=0) for m in (loaded, models[kind]))
        assert torch.equal(x, y)


CONDITIONERS = {
    "none": ConditionerConfig(),
    "class": ClassConfig(classes=CLASSES, d_cond=8),
    "text": TextConfig(vocab_size=8, length=8, d_cond=8, depth=1, heads=1, d_head=8),
    "layout": LayoutConfig(classes=CLASSES, grid=4, d_cond=8, depth=1, heads=1, d_head=8),
    "ids": IdsConfig(vocab_size=9, d_cond=8, depth=1, heads=1, d_head=8),
    "inpaint": InpaintConfig(),
    "semantic": SemanticConfig(labels=CLASSES, stages=1),
    "hybrid": HybridConfig(
        tokens=TextConfig(vocab_size=8, length=8, d_cond=8, depth=1, heads=1, d_head=8),
        concat=SemanticConfig(labels=CLASSES, stages=1),
    ),
}


@pytest.mark.parametrize("name", CONDITIONERS)
def test_every_conditioner_comes_back(name: str, tmp_path: Path) -> None:
    config = tiny_ldm_config(CONDITIONERS[name])
    model = shaken(LatentDiffusion(config))
    if reader := reader_of(model):
        reader.set_tokenizer(CaptionTokenizer.trained_on(["a red green blue"]))
    save_model(model.autoencoder, tmp_path / "ae")
    save_model(model, tmp_path / "ldm", first_stage="../ae")
    loaded = load_model(tmp_path / "ldm")
    assert loaded.config == model.config
    assert same(loaded, model)
    assert not on_meta(loaded)
    if reader := reader_of(loaded):
        assert reader.tokenizer(["a", "red"], 8).shape == (2, 8)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, dict(loaded.named_buffers())[name]), name


def test_a_frozen_encoder_is_not_in_the_folder(tmp_path: Path) -> None:
    config = tiny_ldm_config(FrozenTextConfig(encoder="minilm", length=8))
    model = LatentDiffusion(config)
    save_model(model.autoencoder, tmp_path / "ae")
    save_model(model, tmp_path / "ldm", first_stage="../ae")
    assert {k.partition(".")[0] for k in load_file(tmp_path / "ldm/model.safetensors")} == {"unet"}
    loaded = load_model(tmp_path / "ldm")
    (a,), (b,) = (m.conditioner({"caption": ["a cat"]}).tokens for m in (model, loaded))
    assert torch.equal(a, b)


def test_half_precision_comes_back_rounded_as_float32(models: dict, tmp_path: Path) -> None:
    model = models["classifier"]
    save_model(model, tmp_path / "half", half=True)
    for name, weight in load_model(tmp_path / "half").state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, model.state_dict()[name].half().float())


def test_averaged_weights_are_preferred_until_a_save_without(models: dict, tmp_path: Path) -> None:
    model = models["classifier"]
    ema, folder = EMA(model), tmp_path / "m"
    shaken(model, seed=1)
    save_model(model, folder, ema=ema.shadow)
    own, averaged = load_model(folder, ema=False), load_model(folder)
    assert same(own, model)
    assert not same(averaged, model)
    save_model(model, folder)
    assert same(load_model(folder), model)
    ema.copy_to(model)
    assert same(averaged, model)


def test_another_first_stage_is_refused(models: dict, folders: dict) -> None:
    save_model(shaken(models["autoencoder"], seed=9), folders["autoencoder"])
    with pytest.raises(CheckpointError, match=r"first_stage='\.\./autoencoder' is not the one"):
        load_model(folders["latent-diffusion"])
    shutil.rmtree(folders["autoencoder"])
    with pytest.raises(CheckpointError, match=r"autoencoder has no readable config\.json"):
        load_model(folders["latent-diffusion"])
    with pytest.raises(ValueError, match="first_stage=None must be the folder"):
        save_model(models["latent-diffusion"], folders["latent-diffusion"])


# --- damaged folders ---


def edited(folder: Path, edit: Callable[[dict], Any]) -> Path:
    path = folder / "config.json"
    card = json.loads(path.read_text())
    edit(card)
    path.write_text(json.dumps(card))
    return folder


CARDS: dict[str, tuple[str, Callable[[dict], Any]]] = {
    "the first format": ("is of format 1", lambda c: c.update(format=1)),
    "a later format": ("has format 3", lambda c: c.update(format=3)),
    "kind": ("kind 'gan'; known: format 2 of autoencoder", lambda c: c.update(kind="gan")),
    "no config": ("no table 'config'", lambda c: c.pop("config")),
    "unknown field": (
        "field of AutoencoderConfig='colour'",
        lambda c: c["config"].update(colour=1),
    ),
    "value": ("z_channels=0", lambda c: c["config"].update(z_channels=0)),
    "type": ("channels='wide' must be int", lambda c: c["config"].update(channels="wide")),
    "other weights": ("size mismatch for", lambda c: c["config"].update(channels=16)),
    "more layers": ("Missing key", lambda c: c["config"].update(mid_attn=True)),
}


@pytest.mark.parametrize("case", CARDS)
def test_a_config_that_does_not_fit_is_named(case: str, folders: dict) -> None:
    said, edit = CARDS[case]
    with pytest.raises(CheckpointError, match=said) as caught:
        load_model(edited(folders["autoencoder"], edit))
    assert str(folders["autoencoder"]) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 10


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(
    name: str, value: float, models: dict, tmp_path: Path
) -> None:
    model = models["classifier"]
    save_model(model, tmp_path, ema=EMA(model).shadow)
    tensors = load_file(tmp_path / name)
    tensors["blocks.1.conv1.weight"][0, 0, 0, 0] = value
    save_file(tensors, tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name}: tensor 'blocks\.1\.conv1\.weight'"):
        load_model(tmp_path)


def test_a_model_of_another_kind_is_refused(folders: dict, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="kind 'classifier', not 'autoencoder'"):
        load_model(folders["classifier"], kind="autoencoder")
    with pytest.raises(CheckpointError, match=r"nowhere has no readable config\.json"):
        load_model(tmp_path / "nowhere")


NUMBERS = [
    "autoencoder.z_channels",
    "autoencoder.channels",
    "autoencoder.num_res_blocks",
    "autoencoder.codebook_size",
    "unet.channels",
    "unet.num_res_blocks",
    "unet.depth",
    "unet.d_cond",
    "conditioner.d_cond",
    "schedule.T",
    "image_size",
    "sampling.steps",
]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [10**9, 10**30, -1])
def test_sizes_of_a_billion_are_refused(name: str, value: int, folders: dict) -> None:
    def edit(card: dict) -> None:
        table = card["config"]
        *path, last = name.split(".")
        for key in path:
            table = table[key]
        table[last] = value

    with pytest.raises(CheckpointError):
        load_model(edited(folders["latent-diffusion"], edit))


class Bomb:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.path,)


def corrupt(folder: Path, other: Path, bomb: Path, draw: random.Random) -> str:
    """Damage one file of a model's folder at random; what was done."""
    file = draw.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    content = bytearray(file.read_bytes())
    ways = ("cut", "flip", "pickle", "swap", "key", "empty")
    how = draw.choice([*ways, *["value"] * 4] if file.name == "config.json" else ways)
    if how == "cut":
        content = content[: draw.randrange(len(content))]
    elif how == "flip":
        for _ in range(draw.choice((1, 8, 64))):
            content[draw.randrange(min(len(content), draw.choice((64, 4096, 10**9))))] ^= 1 << (
                draw.randrange(8)
            )
    elif how == "pickle":
        content = bytearray(pickle.dumps(Bomb(bomb)))
    elif how == "swap":
        content = bytearray(
            (other / file.name).read_bytes() if (other / file.name).exists() else b"{}"
        )
    elif how == "empty":
        content = bytearray()
    elif file.suffix == ".safetensors":
        tensors: dict[str, Tensor] = load_file(file)
        name = draw.choice(sorted(tensors))
        tensors[draw.choice(("new", "unet.", "autoencoder.scale", ""))] = tensors.pop(name)
        save_file(tensors, file)
        return f"{file.name} {how}"
    else:
        table = whole = json.loads(content)
        key = draw.choice(sorted(table))
        while isinstance(table[key], dict) and table[key] and draw.random() < 0.8:
            table, key = table[key], draw.choice(sorted(table[key]))
        if how == "key":
            table.pop(key)
        else:
            table[key] = draw.choice([None, -1, 0, 10**9, 1e308, "x", "../..", [], {}, [[]], True])
        content = bytearray(json.dumps(whole).encode())
    file.write_bytes(content)
    return f"{file.name} {how}"


@pytest.mark.parametrize("kind", ["autoencoder", "latent-diffusion", "text"])
def test_random_damage_gives_a_named_error_or_loads(
    kind: str, models: dict, tmp_path: Path
) -> None:
    """40 of each kind."""
    good, model = tmp_path / "good", models.get(kind)
    if kind == "text":
        config = tiny_ldm_config(CONDITIONERS["text"], autoencoder=models["autoencoder"].config)
        model = LatentDiffusion(config, autoencoder=models["autoencoder"])
        reader_of(model).set_tokenizer(CaptionTokenizer.trained_on(["a red green blue"]))
    save_model(models["autoencoder"], tmp_path / "autoencoder")
    save_model(models["classifier"], tmp_path / "other")
    save_model(model, good, first_stage="../autoencoder", ema=dict(model.named_parameters()))
    refused = 0
    for seed in range(40):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        done = corrupt(folder, tmp_path / "other", tmp_path / "bomb", random.Random(seed))
        try:
            loaded = load_model(folder)
        except (CheckpointError, FileNotFoundError) as error:
            assert str(error), done
            refused += 1
        else:
            assert not on_meta(loaded), done
        assert not (tmp_path / "bomb").exists(), done
    assert refused > 20


# --- what ships ---


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_model_loads(name: str) -> None:
    model = pretrained(name)
    assert not on_meta(model)
    if isinstance(model, LatentDiffusion):
        scales = {"emoji-class": 3.0, "emoji-text": 3.0, "scenes-layout": 2.0}
        assert model.config.sampling.guidance_scale == scales.get(name, 1.0)
        assert model.config.sampling.sampler == "ddim"
