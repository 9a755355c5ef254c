"""Experiments as data: presets that fit together, an ablation as a replace, wishes refused."""

from dataclasses import replace

import pytest

from minildm import PRESETS, ConditionerConfig
from minildm.experiments import (
    AutoencoderExperiment,
    DataConfig,
    JudgeExperiment,
    LatentDiffusionExperiment,
    TrainConfig,
)
from minildm.presets import PIXELS

LDMS = {n: e for n, e in PRESETS.items() if isinstance(e, LatentDiffusionExperiment)}
AES = {n: e for n, e in PRESETS.items() if isinstance(e, AutoencoderExperiment)}


def test_every_preset_is_an_experiment() -> None:
    judges = [e for e in PRESETS.values() if isinstance(e, JudgeExperiment)]
    assert LDMS
    assert AES
    assert len(LDMS) + len(AES) + len(judges) == len(PRESETS)


@pytest.mark.parametrize("name", LDMS)
def test_a_diffusion_preset_fits_its_first_stage(name: str) -> None:
    factor = name.removeprefix("emoji-class-f")
    first_stage = f"emoji-kl-f{factor if factor.isdigit() else 4}"
    first_stage += "-gpu" if name.endswith("-gpu") else ""
    model = PIXELS if factor == "1" else AES[first_stage].model
    experiment = LDMS[name]
    config = experiment.model_config(model, ("ant", "bee"))
    assert config.image_size == experiment.data.size
    assert config.unet == experiment.unet
    if experiment.conditioner.kind == "class":
        assert config.conditioner == replace(experiment.conditioner, classes=("ant", "bee"))


def test_a_first_stage_that_does_not_fit_is_refused() -> None:
    wider = replace(AES["emoji-kl-f4"].model, z_channels=4)
    with pytest.raises(ValueError, match="z_channels=4 must be the UNet's"):
        LDMS["emoji-class"].model_config(wider, ("ant",))


def test_an_unconditional_ablation_needs_no_classes() -> None:
    preset = LDMS["emoji-class"]
    plain = replace(preset, unet=replace(preset.unet, d_cond=None), conditioner=ConditionerConfig())
    config = plain.model_config(AES["emoji-kl-f4"].model, ("ant", "bee"))
    assert config.conditioner.classes == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"save_every": 0}, "save_every=0"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"lr": float("nan")}, "lr=nan must be positive"),
        ({"grad_clip": -1.0}, "grad_clip=-1.0"),
        ({"decay": "step"}, "decay='step' is not known"),
        ({"precision": "fp8"}, "precision='fp8' must be auto"),
    ],
)
def test_impossible_trainings_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig(**{"steps": 10, **changes})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "mnist"}, "kind='mnist' is not known"),
        ({"kind": "folder"}, "a folder needs a path"),
        ({"kind": "emoji", "path": "x"}, "path='x'"),
    ],
)
def test_impossible_data_are_refused(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DataConfig(**options)
