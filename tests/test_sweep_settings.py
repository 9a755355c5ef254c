"""What a sweep may vary: names, types, and what they come to."""

from pathlib import Path
from typing import Any

import pytest
import torch

from minildm import PRESETS, SWEEPS, Run, Sweep, UNet, read_sweep
from minildm.presets import FACTOR_UNETS, PIXELS
from minildm.sweeps.settings import changed, plan_of
from minildm.sweeps.sweep import grid, slug

SWEEP = {"name": "width", "levels": {"narrow": {"unet.width": 16}, "wide": {"unet.width": 48}}}


def parameters(name: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(PRESETS[name].unet).parameters())


def test_the_factors_have_nearly_the_same_parameters() -> None:
    counts = [parameters(f"emoji-class-f{f}") for f in (1, 2, 4, 8, 16, 32)]
    assert max(counts) / min(counts) < 1.05  # the paper's Tab. 14: 258 to 274 M
    assert tuple(FACTOR_UNETS) == (1, 2, 4, 8, 16, 32)


def test_the_factors_differ_in_the_unet_alone() -> None:
    levels = [PRESETS[f"emoji-class-f{f}"] for f in FACTOR_UNETS]
    assert len({(e.train, e.data, e.objective, e.schedule, e.t_bias) for e in levels}) == 1


@pytest.mark.parametrize("name", SWEEPS)
def test_every_standard_sweep_fits_its_first_stages(name: str) -> None:
    sweep = SWEEPS[name]
    assert len(sweep.seeds) >= 3
    assert sweep.question.endswith("?")
    for label in sweep.levels:
        plan = plan_of(sweep.settings(label), 5)
        if plan.experiment is None:
            assert plan.model == "emoji-class"
            continue
        first = plan.first_stage.model if plan.first_stage else PIXELS
        config = plan.experiment.model_config(first, ("ant", "bee"), 30, tuple("abc"))
        assert config.image_size == plan.experiment.data.size
        assert plan.experiment.train.seed == 5
        if plan.first_stage:
            assert plan.first_stage.data.size == plan.experiment.data.size


def test_the_issue_s_factors_are_there() -> None:
    names = "f regularizer first_stage_attention ddim_steps sampler guidance_scale objective"
    assert {*names.split(), "latent_scale", "conditioning"} == {*SWEEPS}


def test_a_level_changes_what_it_names_and_nothing_else() -> None:
    plan = plan_of({"unet.width": 16, "train.lr": 5e-4, "first_stage.kl_weight": 0.1}, seed=3)
    base = PRESETS["emoji-class"]
    assert plan.experiment.unet.width == 16
    assert plan.experiment.unet.width_mult == base.unet.width_mult
    assert (plan.experiment.train.lr, plan.experiment.train.seed) == (5e-4, 3)
    assert plan.experiment.train.steps == base.train.steps
    assert plan.first_stage.kl_weight == 0.1
    assert plan.first_stage.model == PRESETS["emoji-kl-f4"].model


def test_lists_become_tuples() -> None:
    experiment = changed(PRESETS["emoji-class"], {"unet.width_mult": [1, 2, 2]}, "x")
    assert experiment.unet.width_mult == (1, 2, 2)


@pytest.mark.parametrize(
    ("level", "said"),
    [
        ({"unet.widht": 16}, "did you mean 'unet.width'"),
        ({"unet.width": "wide"}, "unet.width='wide' must be"),
        ({"train.steps": 10.5}, "train.steps=10.5 must be a whole number"),
        ({"unet.width": 17}, "width=17"),
        ({"train.flip": 1}, "train.flip=1 must be a bool"),
        ({"sampling.stps": 3}, "did you mean 'steps'"),
        ({"sampling.sampler": "dim"}, "did you mean 'ddim'"),
        ({"sampling.steps": 0}, "sampling.steps=0 must be at least 1"),
        ({"preset": "emoji-clas"}, "did you mean 'emoji-class'"),
        ({"preset": "emoji-kl-f4"}, "'emoji-kl-f4' is not known"),
        ({"first_stage": "emoji-class"}, "first_stage: preset: 'emoji-class' is not known"),
        ({"first_stage.model.z_chanels": 3}, "did you mean 'model.z_channels'"),
        ({"first_stage": "emoji-kl-f8"}, "z_channels=4"),
        ({"latent_std": 0}, "latent_std=0 must be a positive number"),
        ({"model": "emoji-clas"}, "did you mean 'emoji-class'"),
        ({"model": "emoji-class", "train.steps": 3}, "train.steps would change nothing"),
        ({"first_stage": "emoji-kl-f4", "trained_first_stage": "emoji-kl-f4"}, "not both"),
    ],
)
def test_a_level_that_cannot_be_is_refused_by_name(level: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"^x=bad") as caught:
        Sweep(name="x", levels={"good": {}, "bad": level})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "no name"}, "name='no name'"),
        ({"levels": {}}, "levels must name at least one"),
        ({"levels": {"a b": {}, "a-b": {}}}, "are not told apart"),
        ({"seeds": ()}, "seeds=()"),
        ({"seeds": (0, 0)}, "must be different"),
        ({"seeds": (0, -1)}, "whole numbers"),
        ({"measure_at": (0,)}, "must lie in 1..1150"),
        ({"measure_at": (1151,)}, "must lie in 1..1150"),
        ({"samples": 19}, "samples=19 are too few for proxy_fid, at least 20"),
        ({"metrics": ("fod",)}, "'fod' is not known"),
        ({"metrics": ("objects",)}, "'objects' says nothing here"),
        ({"samplings": {"few": {"step": 2}}}, "did you mean 'steps'"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        Sweep(**{**SWEEP, **changes})
    assert said in str(caught.value)


def test_runs_are_seed_by_seed_and_go_through_json() -> None:
    sweep = Sweep(**SWEEP, seeds=(0, 4))
    runs = sweep.runs()
    assert [(r.level, r.seed) for r in runs] == [
        ("narrow", 0), ("wide", 0), ("narrow", 4), ("wide", 4)
    ]  # fmt: skip
    assert len({run.name for run in runs}) == 4
    assert all(Run.from_dict(run.as_dict()) == run for run in runs)
    assert Sweep.from_dict(sweep.as_dict()) == sweep
    assert [run.name for run in sweep.runs(["wide"], [4])] == ["width-wide-seed4"]


@pytest.mark.parametrize(("levels", "seeds"), [(["huge"], None), (None, [7])])
def test_runs_that_are_not_in_a_sweep_are_refused(levels: Any, seeds: Any) -> None:
    with pytest.raises(ValueError, match="is not known"):
        Sweep(**SWEEP).runs(levels, seeds)


def test_a_toml_is_a_sweep(tmp_path: Path) -> None:
    path = tmp_path / "My widths.toml"
    path.write_text('seeds = [0, 1]\nsamples = 40\n[shared]\n"train.steps" = 50\n[grid]\n'
                    '"unet.width" = [16, 32]\n[grid.train]\nlr = [1e-3, 5e-4]\n')  # fmt: skip
    sweep = read_sweep(path)
    assert sweep.name == "my_widths"
    assert sweep.seeds == (0, 1)
    assert len(sweep.levels) == 4
    assert sweep.settings("width 32, lr 0.0005") == {
        "train.steps": 50, "unet.width": 32, "train.lr": 5e-4
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("levels = 3", "levels"),
        ("seeds = [0]", "needs levels, or a grid"),
        ('[grid]\n"unet.width" = 16', "a list of values for each name"),
        ('sead = [0]\n[grid]\n"unet.width" = [16]', "did you mean 'seeds'"),
        ("[levels.a", "Expected ']'"),
    ],
)
def test_a_toml_that_is_none_is_refused_by_its_path(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        read_sweep(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)


def test_one_axis_is_labelled_by_its_values() -> None:
    assert [label for label, _ in grid({"unet.width": [16, 32]})] == ["16", "32"]


@pytest.mark.parametrize(
    ("label", "name"), [("KL, f = 4", "kl-f-4"), ("1.5", "1.5"), ("*", "level")]
)
def test_labels_make_folder_names(label: str, name: str) -> None:
    assert slug(label) == name
