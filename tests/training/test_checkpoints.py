"""Model folders: what goes in comes out; what is damaged is named, and runs no code."""

import functools
import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CLASSES, shaken, tiny_autoencoder_config, tiny_ldm_config
from safetensors.torch import load_file, save, save_file
from torch import nn

from minildm.compression.autoencoder import Autoencoder
from minildm.conditioning import (
    CaptionTokenizer,
    ClassConfig,
    FrozenTextConfig,
    HybridConfig,
    SemanticConfig,
    TextConfig,
)
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.training.checkpoint import (
    CheckpointError,
    load_model,
    read_card,
    reader_of,
    save_model,
)
from minildm.training.classifier import Classifier, ClassifierConfig, Segmenter, SegmenterConfig

NAMES = {"labels": ("a", "b"), "channels": 8}
TEXT = TextConfig(vocab_size=8, length=8, d_cond=8, depth=1, heads=1, d_head=8)
HYBRID = HybridConfig(tokens=TEXT, concat=SemanticConfig(labels=CLASSES, stages=1))


def ldm(conditioner: Any) -> LatentDiffusion:
    """A diffusion model on the first stage that `saved` writes."""
    model = LatentDiffusion(tiny_ldm_config(conditioner), autoencoder=model_of("autoencoder"))
    if reader := reader_of(model):
        reader.set_tokenizer(CaptionTokenizer.trained_on(["a red green blue"]))
    shaken(model.unet), shaken(model.conditioner)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "autoencoder": lambda: shaken(Autoencoder(tiny_autoencoder_config())),
    "classifier": lambda: Classifier(ClassifierConfig(groups=("g",), styles=("s",), **NAMES)),
    "segmenter": lambda: Segmenter(SegmenterConfig(**NAMES)),
    "class": lambda: ldm(ClassConfig(classes=CLASSES, d_cond=8)),
    "hybrid": lambda: ldm(HYBRID),
}


def model_of(kind: str) -> Any:
    """A model with random weights, by its name above; the same at every call."""
    torch.manual_seed(0)
    return MODELS[kind]()


def saved(kind: str, folder: Path) -> Path:
    """The folder of such a model, next to that of its first stage."""
    save_model(model_of("autoencoder"), folder / "autoencoder")
    save_model(model_of(kind), folder / kind, first_stage="../autoencoder")
    return folder / kind


def same(one: nn.Module, other: nn.Module) -> bool:
    """Also in the buffers that are not saved."""
    first, second = ({**m.state_dict(), **dict(m.named_buffers())} for m in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def on_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


# --- round trips ---


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model, folder, state = model_of(kind), saved(kind, tmp_path), torch.get_rng_state()
    loaded = load_model(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(loaded) is type(model) and loaded.config == model.config
    assert same(loaded, model)
    assert not any(module.training for module in loaded.modules())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trained
    if reader := reader_of(loaded):
        assert reader.tokenizer(["a", "red"], 8).shape == (2, 8)


def test_a_frozen_encoder_is_not_in_the_folder(tmp_path: Path) -> None:
    model = LatentDiffusion(tiny_ldm_config(FrozenTextConfig(encoder="minilm", length=8)))
    save_model(model.autoencoder, tmp_path / "ae")
    save_model(model, tmp_path / "ldm", first_stage="../ae")
    assert {k.partition(".")[0] for k in load_file(tmp_path / "ldm/model.safetensors")} == {"unet"}
    loaded = load_model(tmp_path / "ldm")
    (a,), (b,) = (m.conditioner({"caption": ["a cat"]}).tokens for m in (model, loaded))
    assert torch.equal(a, b)


def test_averaged_weights_are_preferred_until_a_save_without(tmp_path: Path) -> None:
    own, average = model_of("classifier"), shaken(model_of("classifier"), seed=1)
    save_model(own, tmp_path, ema=dict(average.named_parameters()), info={"steps": 7})
    assert read_card(tmp_path)["info"] == {"steps": 7}
    assert same(load_model(tmp_path, ema=False), own)
    assert same(load_model(tmp_path), average)
    save_model(own.half(), tmp_path)
    assert same(load_model(tmp_path), own.float())  # rounded, as float32


# --- damaged folders ---

SIZES = (
    "autoencoder.z_channels autoencoder.channels autoencoder.num_res_blocks "
    "autoencoder.codebook_size unet.channels unet.num_res_blocks unet.depth unet.d_cond "
    "conditioner.d_cond schedule.T image_size sampling.steps"
)
CARDS: list[tuple[str, Any, str]] = [
    ("format", 1, "has format 1, kind 'latent-diffusion'; known: format 2"),
    ("kind", "gan", "kind 'gan'; known: format 2 of autoencoder"),
    ("config.colour", 1, "field of LatentDiffusionConfig='colour'"),
    ("config.unet.channels", 16, "size mismatch for"),  # other weights
    ("config.unet.num_res_blocks", 2, "Missing key"),
    *[(f"config.{name}", 10**9, "cannot be loaded") for name in SIZES.split()],
]


@pytest.mark.parametrize(("name", "value", "said"), CARDS)
def test_a_config_that_does_not_fit_is_named(
    name: str, value: Any, said: str, tmp_path: Path
) -> None:
    folder, (*path, last) = saved("class", tmp_path), name.split(".")
    card = json.loads((folder / "config.json").read_text())
    functools.reduce(dict.__getitem__, path, card)[last] = value
    (folder / "config.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=said) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 11


def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    model = model_of("classifier")
    save_model(model, tmp_path, ema=dict(model.named_parameters()))
    tensors = load_file(tmp_path / "ema.safetensors")
    tensors["conv_in.bias"][0] = float("nan")
    save_file(tensors, tmp_path / "ema.safetensors")
    with pytest.raises(CheckpointError, match=r"ema.safetensors: tensor 'conv_in\.bias'"):
        load_model(tmp_path)


def test_another_model_than_required_is_refused(tmp_path: Path) -> None:
    stage, folder = tmp_path / "autoencoder", saved("class", tmp_path)
    with pytest.raises(CheckpointError, match="kind 'latent-diffusion', not 'autoencoder'"):
        load_model(folder, kind="autoencoder")
    save_model(shaken(load_model(stage), seed=9), stage)
    with pytest.raises(CheckpointError, match=r"first_stage='\.\./autoencoder' is not the one"):
        load_model(folder)
    shutil.rmtree(stage)
    with pytest.raises(CheckpointError, match=r"autoencoder has no readable config\.json"):
        load_model(folder)
    with pytest.raises(ValueError, match="first_stage=None must be the folder"):
        save_model(model_of("class"), folder)


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
    ways = ["cut", "flip", "pickle", "swap", "key"]
    how = draw.choice([*ways, *["value"] * 4] if file.name == "config.json" else ways)
    if how == "cut":
        content = content[: draw.randrange(len(content))]
    elif how == "flip":
        for _ in range(draw.choice((1, 8, 64))):
            place = draw.randrange(min(len(content), draw.choice((64, 4096, 10**9))))
            content[place] ^= 1 << draw.randrange(8)
    elif how == "pickle":
        content = pickle.dumps(Bomb(bomb))
    elif how == "swap":
        content = (other / file.name).read_bytes() if (other / file.name).exists() else b"{}"
    elif file.suffix == ".safetensors":
        tensors = load_file(file)
        name = draw.choice(sorted(tensors))
        tensors[draw.choice(("new", "unet.", "autoencoder.scale", ""))] = tensors.pop(name)
        content = save(tensors)
    else:
        table = whole = json.loads(content)
        key = draw.choice(sorted(table))
        while isinstance(table[key], dict) and table[key] and draw.random() < 0.8:
            table, key = table[key], draw.choice(sorted(table[key]))
        if how == "key":
            table.pop(key)
        else:
            table[key] = draw.choice([None, -1, 0, 10**9, 1e308, "x", "../..", [], {}, [[]], True])
        content = json.dumps(whole).encode()
    file.write_bytes(content)
    return f"{file.name} {how}"


@pytest.mark.parametrize("kind", ["autoencoder", "class", "hybrid"])
def test_random_damage_gives_a_named_error_or_loads(kind: str, tmp_path: Path) -> None:
    """40 of each kind."""
    good, model = tmp_path / "good", model_of(kind)
    other = saved("classifier", tmp_path)
    save_model(model, good, first_stage="../autoencoder", ema=dict(model.named_parameters()))
    refused, folder = 0, tmp_path / "damaged"
    for seed in range(40):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        done = corrupt(folder, other, tmp_path / "bomb", random.Random(seed))
        try:
            loaded = load_model(folder)
        except CheckpointError as error:
            assert str(folder) in str(error), done
            refused += 1
        else:
            assert not on_meta(loaded), done
        assert not (tmp_path / "bomb").exists(), done
    assert refused > 20
