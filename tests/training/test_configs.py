"""Experiments as data: JSON, dotted overrides, presets that fit together, refused values."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_ldm_config

from minildm.compression.autoencoder import Autoencoder
from minildm.conditioning import ClassConfig, ConditionerConfig, HybridConfig, LowResConfig
from minildm.diffusion.latent_diffusion import LatentDiffusionConfig
from minildm.diffusion.unet import UNet
from minildm.training.configs import (
    AutoencoderExperiment,
    ClassifierExperiment,
    DataConfig,
    LatentDiffusionExperiment,
    TrainConfig,
    as_regression,
    from_dict,
    override,
    to_dict,
    with_steps,
)
from minildm.training.presets import CLEAR_SUBGROUPS, FACTOR_UNETS, LADDER, PIXELS, PRESETS
from minildm.training.published import FIRST_STAGES, PUBLISHED, RELEASED

LDMS = {n: e for n, e in PRESETS.items() if isinstance(e, LatentDiffusionExperiment)}
AES = {n: e for n, e in PRESETS.items() if isinstance(e, AutoencoderExperiment)}


@pytest.mark.parametrize("name", [*PRESETS, *PUBLISHED])
def test_a_config_goes_through_json(name: str) -> None:
    config = PRESETS.get(name) or PUBLISHED[name]
    again = from_dict(type(config), json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert hash(again) == hash(config)  # tuples, not lists


def test_a_hybrid_goes_through_json() -> None:
    tokens = ClassConfig(classes=("a", "b"), d_cond=8)
    config = tiny_ldm_config(HybridConfig(tokens=tokens, concat=LowResConfig()))
    again = from_dict(LatentDiffusionConfig, to_dict(config))
    assert again == config
    assert isinstance(again.conditioner.tokens, ClassConfig)


BAD_TABLES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"steps": 1, "batchsize": 2}, "field of TrainConfig='batchsize' .*'batch_size'"),
    "type": ({"steps": "many"}, "steps='many' must be int"),
    "bool": ({"steps": True}, "steps=True must be int"),
    "missing": ({}, "steps"),
    "choice": ({"steps": 1, "decay": "step"}, "decay='step' must be one of 'cosine', 'linear'"),
    "range": ({"steps": 0}, "steps=0"),
    "tuple": ({"steps": 1, "betas": 0.9}, "betas=0.9 must be"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_wrong_table_is_named(case: str) -> None:
    table, said = BAD_TABLES[case]
    with pytest.raises(ValueError, match=said):
        from_dict(TrainConfig, table)


def test_override_replaces_by_dotted_names() -> None:
    experiment = PRESETS["emoji-class"]
    changed = override(
        experiment,
        {"train.steps": 5, "unet.channels": 16, "train.lr": 1, "conditioner.p_uncond": 0.2},
    )
    assert (changed.train.steps, changed.train.lr, changed.unet.channels) == (5, 1.0, 16)
    assert changed.conditioner == replace(experiment.conditioner, p_uncond=0.2)
    assert replace(changed, train=experiment.train, unet=experiment.unet).data == experiment.data
    other = override(experiment, {"unet.d_cond": None, "conditioner": {"kind": "none"}})
    assert (other.unet.d_cond, other.conditioner) == (None, ConditionerConfig())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.step": 5}, "field of TrainConfig='train.step'|field of TrainConfig='step'"),
        ({"unett.channels": 5}, "'unett' .*did you mean 'unet'"),
        ({"train.steps": "x"}, "steps='x' must be int"),
        ({"train.steps.more": 1}, "steps={'more': 1} must be int"),
        ({"conditioner.kind": "text"}, "kind='text'"),
        ({"train.betas": [0.9, "x"]}, "betas='x' must be float"),
        ({"data.masks": ["stars"]}, "masks"),
    ],
)
def test_a_wrong_override_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        override(PRESETS["emoji-class"], changes)


def test_with_steps_changes_the_training_alone() -> None:
    experiment = PRESETS["emoji-class"]
    longer = with_steps(experiment, 99, lr=0.5)
    assert longer.train == replace(experiment.train, steps=99, lr=0.5)
    assert replace(longer, train=experiment.train) == experiment


# --- presets ---


@pytest.mark.parametrize("name", LDMS)
def test_a_diffusion_preset_fits_its_first_stage(name: str) -> None:
    factor = name.removeprefix("emoji-class-f")
    first_stage = f"emoji-kl-f{factor if factor.isdigit() else 4}"
    first_stage += "-gpu" if name.endswith("-gpu") else ""
    model = PIXELS if factor == "1" else AES[first_stage].model
    config = LDMS[name].model_config(model)
    assert (config.unet, config.sampling) == (LDMS[name].unet, LDMS[name].sampling)
    assert config.image_size == LDMS[name].data.size
    with pytest.raises(ValueError, match=r"in_channels=\d+"):
        LDMS[name].model_config(AES["kl-f32"].model)


def test_the_factor_presets_are_of_one_size() -> None:
    with torch.device("meta"):
        sizes = {f: UNet(LDMS[f"emoji-class-f{f}"].unet) for f in FACTOR_UNETS}
    counts = {f: sum(p.numel() for p in unet.parameters()) for f, unet in sizes.items()}
    assert list(counts) == [1, 2, 4, 8, 16, 32]
    assert 1.5e6 < min(counts.values()) < max(counts.values()) < 1.62e6


def test_the_ladder_has_every_factor_twice() -> None:
    rungs = {(e.model.regularizer, e.model.f) for e in LADDER.values()}
    assert rungs == {(kind, f) for kind in ("kl", "vq") for f in (2, 4, 8, 16, 32)}
    assert (PIXELS.f, len(CLEAR_SUBGROUPS), len(LADDER)) == (1, 12, 10)


def test_regression_asks_for_z0_where_there_is_only_noise() -> None:
    config = as_regression(PRESETS["emoji-sr"])
    assert (config.objective.predict, config.schedule.T) == ("z0", 2)
    assert config.schedule.build().alphas_cumprod[-1] == 0
    assert config.unet == PRESETS["emoji-sr"].unet


# --- the published ones, against what the official repository says ---

OFFICIAL = json.loads((Path(__file__).parents[1] / "official/params.json").read_text())["configs"]
TAB_8 = {  # name: f, c, codebook
    "kl-f2": (2, 2, None),
    "vq-f2": (2, 2, 2048),
    "kl-f4": (4, 3, None),
    "vq-f4": (4, 3, 8192),
    "vq-f4-noattn": (4, 3, 8192),
    "vq-f4-n256": (4, 3, 256),
    "kl-f8": (8, 4, None),
    "vq-f8": (8, 4, 16384),
    "vq-f8-n256": (8, 4, 256),
    "kl-f16": (16, 16, None),
    "kl-f16-c8": (16, 8, None),
    "vq-f16": (16, 8, 16384),
    "kl-f32": (32, 64, None),
    "kl-f32-c16": (32, 16, None),
    "vq-f32": (32, 16, 16384),
}


def test_tab_8_has_its_factors_channels_and_codebooks() -> None:
    models = {name: experiment.model for name, experiment in FIRST_STAGES.items()}
    assert {n: (m.f, m.z_channels, m.codebook_size) for n, m in models.items()} == TAB_8
    assert all(PRESETS[name] is FIRST_STAGES[name] for name in TAB_8)


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
    assert game.discriminator.layers == wanted.get("disc_num_layers", 3)
    assert (train.betas, train.decay, train.ema_decay) == ((0.5, 0.9), "constant", 0.0)
    kl = experiment.model.regularizer == "kl"
    assert game.limit == pytest.approx(1e4 / (3 * 256**2) if kl else 1e4, rel=1e-12)
    if kl:
        assert experiment.kl_weight == wanted["kl_weight"]
    else:
        assert experiment.codebook_weight == wanted["codebook_weight"]
        assert (experiment.model.commitment, experiment.model.vq_legacy) == (0.25, True)


# --- refused values ---


@pytest.mark.parametrize(
    ("build", "options", "said"),
    [
        (TrainConfig, {"steps": 10, "batch_size": 10**9}, "batch_size=1000000000"),
        (TrainConfig, {"steps": 10, "lr": 0.0}, "lr=0.0"),
        (TrainConfig, {"steps": 10, "lr": float("nan")}, "lr=nan"),
        (TrainConfig, {"steps": 10, "log_every": 0}, "log_every=0"),
        (TrainConfig, {"steps": 10, "ema_decay": 1.0}, "ema_decay=1.0"),
        (TrainConfig, {"steps": 10, "precision": "fp8"}, "precision='fp8' must be one of 'auto'"),
        (DataConfig, {"kind": "mnist"}, "kind='mnist' must be one of 'emoji'"),
        (DataConfig, {"size": 10**9}, "size=1000000000"),
        (DataConfig, {"kind": "folder"}, "path='' must be given for kind='folder'"),
        (DataConfig, {"path": "x"}, "path='x'"),
        (DataConfig, {"masks": ()}, "masks=()"),
        (DataConfig, {"style_words": 2.0}, "style_words=2.0"),
        (ClassifierExperiment, {"crops": True, "maps": True}, "exclude each other"),
        (ClassifierExperiment, {"maps": True}, "require data.kind='scenes'"),
    ],
)
def test_impossible_values_are_refused(build: Any, options: dict[str, Any], said: str) -> None:
    if build is ClassifierExperiment:
        options = {"train": TrainConfig(steps=1), **options}
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        build(**options)


def test_impossible_losses_are_refused() -> None:
    kl, vq = PRESETS["emoji-kl-f4"], PRESETS["vq-f4"]
    with pytest.raises(ValueError, match="restart_dead=5 requires regularizer='vq'"):
        replace(kl, restart_dead=5)
    with pytest.raises(ValueError, match="kl_weight=-1"):
        replace(kl, kl_weight=-1.0)
    with pytest.raises(ValueError, match="precision='fp16' must be 'bf16' or 'fp32'"):
        replace(vq, train=replace(vq.train, precision="fp16"))
