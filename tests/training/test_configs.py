"""Experiments as data: JSON, dotted overrides, presets that fit together, refused values."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_ldm_config

from minildm.compression.autoencoder import Autoencoder
from minildm.conditioning import ClassConfig, ConditionerConfig, HybridConfig, LowResConfig
from minildm.training.configs import LatentDiffusionExperiment, from_dict, override, to_dict
from minildm.training.presets import FIRST_STAGES, PIXELS, PRESETS, PUBLISHED, RELEASED

LDMS = {n: e for n, e in PRESETS.items() if isinstance(e, LatentDiffusionExperiment)}
HYBRID = HybridConfig(tokens=ClassConfig(classes=("a", "b"), d_cond=8), concat=LowResConfig())
CONFIGS = PUBLISHED | PRESETS | {"hybrid": tiny_ldm_config(HYBRID)}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_goes_through_json(name: str) -> None:
    config = CONFIGS[name]
    again = from_dict(type(config), json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert hash(again) == hash(config)  # tuples, not lists


def test_override_replaces_by_dotted_names() -> None:
    experiment = PRESETS["emoji-class"]
    changes = {"train.lr": 1, "unet.d_cond": None, "conditioner.p_uncond": 0.2}
    changed = override(experiment, changes)
    assert changed.train == replace(experiment.train, lr=1.0)
    assert changed.unet == replace(experiment.unet, d_cond=None)
    assert changed.conditioner == replace(experiment.conditioner, p_uncond=0.2)
    assert changed.data == experiment.data
    other = override(experiment, {"conditioner": {"kind": "none"}})
    assert other.conditioner == ConditionerConfig()


# --- presets ---


@pytest.mark.parametrize("name", LDMS)
def test_a_diffusion_preset_fits_its_first_stage(name: str) -> None:
    factor = name.removeprefix("emoji-class-f")
    first_stage = f"emoji-kl-f{factor if factor.isdigit() else 4}"
    first_stage += "-gpu" if name.endswith("-gpu") else ""
    model = PIXELS if factor == "1" else PRESETS[first_stage].model
    assert LDMS[name].model_config(model).image_size == LDMS[name].data.size
    with pytest.raises(ValueError, match=r"in_channels=\d+"):
        LDMS[name].model_config(PRESETS["kl-f32"].model)


# --- the published ones, against what the official repository says ---

OFFICIAL = json.loads((Path(__file__).parents[1] / "official/params.json").read_text())["configs"]
CHANNELS = {"kl": {2: 2, 4: 3, 8: 4, 16: 16, 32: 64}, "vq": {2: 2, 4: 3, 8: 4, 16: 8, 32: 16}}
CODES = {2: 2048, 4: 8192, 8: 16384, 16: 16384, 32: 16384}


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_tab_8_has_its_factors_channels_and_codebooks(name: str) -> None:
    """As kl-f16-c8 and vq-f4-n256 say; else the table's largest for that factor."""
    config, (kind, f) = PRESETS[name].model, re.match(r"(kl|vq)-f(\d+)", name).groups()
    c, n = (re.search(rf"-{letter}(\d+)", name) for letter in "cn")
    assert (config.regularizer, config.f) == (kind, int(f))
    assert config.z_channels == (int(c[1]) if c else CHANNELS[kind][int(f)])
    codes = CODES[int(f)] if kind == "vq" else None
    assert config.codebook_size == (int(n[1]) if n else codes)
    assert len(FIRST_STAGES) == 15


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_first_stage_has_the_official_size_and_loss(name: str) -> None:
    path = f"models/first_stage_models/{name}/config.yaml"
    official = next(c for c in OFFICIAL if c["path"] == path)
    wanted, experiment = official["lossconfig"]["params"], RELEASED[name]
    with torch.device("meta"):
        model = Autoencoder(experiment.model)
    assert sum(p.numel() for p in model.parameters()) == official["params"]["total"]
    game, train = experiment.adversarial, experiment.train
    assert train.lr == pytest.approx(official["base_learning_rate"] * train.batch_size)
    assert (game.weight, game.start) == (wanted["disc_weight"], wanted["disc_start"])
    assert game.disc_layers == wanted.get("disc_num_layers", 3)
    assert (train.betas, train.decay, train.ema_decay) == ((0.5, 0.9), "constant", 0.0)
    kl = experiment.model.regularizer == "kl"
    assert game.limit == pytest.approx(1e4 / (3 * 256**2) if kl else 1e4, rel=1e-12)
    weight = "kl_weight" if kl else "codebook_weight"
    assert getattr(experiment, weight) == wanted[weight]
    assert kl or (experiment.model.commitment, experiment.model.vq_legacy) == (0.25, True)


# --- refused values ---

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("emoji-class", {"train.step": 5}, "field of TrainConfig='step' .*did you mean 'steps'"),
    ("emoji-class", {"train.seed": 2**64}, "seed=18446744073709551616 must lie in"),
    ("emoji-class", {"train.steps": True}, "steps=True must be int"),
    ("emoji-class", {"train": {"lr": 1.0}}, "missing 1 required .*'steps'"),
    ("emoji-class", {"train.betas": [0.9, "x"]}, "betas='x' must be float"),
    ("emoji-class", {"train.precision": "fp8"}, "precision='fp8' must be one of 'auto'"),
    ("emoji-class", {"train.lr": float("nan")}, "lr=nan"),
    ("emoji-class", {"conditioner.kind": "text"}, "did you mean"),
    ("emoji-class", {"data.kind": "mnist"}, "kind='mnist' must be one of 'emoji'"),
    ("emoji-class", {"data.size": 10**9}, "size=1000000000"),
    ("emoji-class", {"data.kind": "folder"}, "path='' must be given for kind='folder'"),
    ("emoji-class", {"data.masks": ["stars"]}, "masks"),
    ("emoji-kl-f4", {"restart_dead": 5}, "restart_dead=5 requires regularizer='vq'"),
    ("emoji-kl-f4", {"model": to_dict(PIXELS)}, "nothing to train"),
]


@pytest.mark.parametrize(("name", "changes", "said"), WRONG)
def test_a_wrong_override_is_named(name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        override(PRESETS[name], changes)


def test_mixed_images_are_emoji_scenes_and_photographs() -> None:
    config = replace(PRESETS["mixed-kl-f4"].data, size=32)
    mixed, parts = config.dataset("val"), config.parts("val")
    assert [part.name for part in parts] == ["emoji-val", "scenes-val", "photos-val"]
    assert len(mixed) == sum(map(len, parts)) and mixed.config == config
    assert torch.equal(mixed.images[-1], parts[-1].images[-1])
