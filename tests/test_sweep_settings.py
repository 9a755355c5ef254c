"""What a sweep may vary: names, types, and what they come to."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minildm import PRESETS, SWEEPS, Run, Sweep, UNet, read_sweep
from minildm.files import data_dir
from minildm.presets import FACTOR_UNETS, PIXELS
from minildm.sweeps import one_run
from minildm.sweeps import sweep as sweeps
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


def test_both_ways_of_a_condition_are_trained_alike() -> None:
    one, other = (plan_of(level).experiment for level in map(
        SWEEPS["conditioning"].settings, SWEEPS["conditioning"].levels))  # fmt: skip
    assert one.alone_steps == other.alone_steps == 0
    assert (one.train, one.data, one.objective, one.t_bias) == (
        other.train, other.data, other.objective, other.t_bias
    )  # fmt: skip
    beside = {"in_channels": other.unet.in_channels, "d_cond": other.unet.d_cond}
    assert replace(one.unet, **beside) == other.unet  # but for where the condition enters
    assert one.conditioner.p_uncond == other.conditioner.p_uncond == 0


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
        ({"sampling.steps": 0}, "sampling.steps=0 must be a whole number, at least 1"),
        ({"sampling.steps": True}, "sampling.steps=True must be a whole number"),
        ({"sampling.steps": 5000}, "sampling.steps=5000 must be at most T=1000"),
        ({"schedule.T": 100, "sampling.steps": 101}, "must be at most T=100"),
        ({"sampling.sampler": 3}, "sampling.sampler: '3' is not known. Known: ddim"),
        ({"sampling.eta": "abc"}, "sampling.eta='abc' must be a number, at least 0"),
        ({"sampling.eta": -1.0}, "sampling.eta=-1.0 must be a number, at least 0"),
        ({"sampling.eta": 1.0, "sampling.sampler": "heun"}, "belongs to the sampler 'ddim', not"),
        ({"sampling.spacing": "leeding"}, "did you mean 'leading'"),
        ({"sampling.guidance_scale": "abc"}, "sampling.guidance_scale='abc' must be a number"),
        ({"sampling.guidance_rescale": 2}, "sampling.guidance_rescale=2 must be a number in [0, 1"),
        ({"sampling.guidance_interval": 5}, "sampling.guidance_interval=5 must be two whole"),
        ({"sampling.guidance_interval": [1]}, "sampling.guidance_interval=[1] must be two whole"),
        ({"sampling.guidance_interval": [0, 0.5]}, "guidance_interval=[0, 0.5] must be two whole"),
        ({"sampling.guidance_interval": [9, 1]}, "0 <= first <= last"),
        (
            {"preset": "emoji-uncond", "sampling.guidance_scale": 3.0},
            "guidance_scale=3.0 must be 1",
        ),
        (
            {
                "conditioner.null_class": False,
                "conditioner.p_uncond": 0.0,
                "sampling.guidance_scale": 2,
            },
            "sampling.guidance_scale=2 must be 1",
        ),
        (
            {
                "schedule.zero_terminal_snr": True,
                "objective.predict": "v",
                "sampling.spacing": "leading",
            },
            "sampling.spacing='leading' must be 'trailing'",
        ),
        ({"data.subgroups": ["hart"]}, "data.subgroups: 'hart' is not known; did you mean 'heart'"),
        ({"data.subgroups": ["heart", "heart"]}, "must name nothing twice"),
        ({"data.styles": ["nto"]}, "data.styles: 'nto' is not known; did you mean 'noto'"),
        ({"first_stage.data.subgroups": ["hart"]}, "first_stage: data.subgroups: 'hart'"),
        ({"train.seed": 3}, "train.seed is each run's own"),
        ({"preset": "scenes-layout"}, "alone_steps=1500 must be 0"),
        ({"preset": "emoji-clas"}, "did you mean 'emoji-class'"),
        ({"preset": "emoji-kl-f4"}, "'emoji-kl-f4' is not known"),
        ({"first_stage": "emoji-class"}, "first_stage: preset: 'emoji-class' is not known"),
        ({"first_stage.model.z_chanels": 3}, "did you mean 'model.z_channels'"),
        ({"first_stage": "emoji-kl-f8"}, "z_channels=4"),
        ({"latent_std": 0}, "latent_std=0 must be a positive number"),
        ({"latent_std": float("nan")}, "latent_std=nan must be a positive number"),
        ({"model": "emoji-clas"}, "did you mean 'emoji-class'"),
        ({"model": 3}, "model: '3' is not known"),
        ({"model": "emoji-kl-f4"}, "model='emoji-kl-f4': it is of kind 'autoencoder', and must be"),
        ({"model": "emoji-judge"}, "model='emoji-judge': it is of kind 'judge', and must be"),
        ({"model": str(data_dir())}, "is no model's folder: it has no config.json"),
        ({"model": "emoji-class", "sampling.steps": 1001}, "must be at most T=1000"),
        ({"model": "emoji-sr", "sampling.guidance_scale": 2}, "guidance_scale=2 must be 1"),
        (
            {"trained_first_stage": "emoji-judge"},
            "trained_first_stage='emoji-judge': it is of kind",
        ),
        ({"trained_first_stage": "nope"}, "trained_first_stage: 'nope' is not known"),
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
        ({"metrics": ("xyz",)}, "'xyz' is not known. Known: proxy_fid"),
        ({"metrics": ("kidd",)}, "'kidd' is not known; did you mean 'kid'? Known: proxy_fid"),
        ({"metrics": "kid"}, "metrics='kid' must be a list"),
        ({"metrics": (3,)}, "metrics=[3] must be a list of names"),
        ({"name": 3}, "name=3 must be a word"),
        ({"seeds": 3}, "seeds=3 must be a list"),
        ({"seeds": ([0],)}, "must be different whole numbers"),
        ({"measure_at": 100}, "measure_at=100 must be a list"),
        ({"measure_at": (2.0,)}, "must lie in 1..1150"),
        ({"samples": "500"}, "samples='500' must be a whole number"),
        ({"samples": 50.5}, "samples=50.5 must be a whole number"),
        ({"question": 3}, "question=3 must be a text"),
        ({"paper": None}, "paper=None must be a text"),
        ({"levels": [1]}, "levels=[1] must be a table"),
        ({"levels": {"a": 1}}, "levels['a']=1 must be a table of settings"),
        ({"shared": 3}, "shared=3 must be a table"),
        ({"samplings": 3}, "samplings=3 must be a table"),
        ({"samplings": {"few": 3}}, "samplings['few']=3 must be a table of settings"),
        ({"samplings": {"few": {"steps": 1001}}}, "width=narrow: samplings['few']: sampling.steps"),
        (
            {"samplings": {"h": {"sampler": "heun"}}, "shared": {"sampling.eta": 1.0}},
            "samplings['h']: sampling.eta=1.0 belongs to the sampler 'ddim', not to 'heun'",
        ),
        *(
            ({"samplings": {label: {"steps": 3}}}, f"samplings[{label!r}] is taken")
            for label in ("plain", "Plain", "first stage", "first_stage")
        ),
        *(
            ({"samplings": {label: {"steps": 3}}}, f"samplings[{label!r}] is to be the name of a")
            for label in ("a/b", "ddim: 5", "", "..", "a\\b", "5?")
        ),
        ({"samplings": {"ddim 5": {"steps": 5}, "ddim_5": {"steps": 6}}}, "are not told apart"),
        (
            {"levels": {"a": {"model": "emoji-class"}}, "metrics": ("psnr",)},
            "metrics='psnr' says nothing of model='emoji-class'; proxy_fid",
        ),
        ({"levels": {"a": {"model": "emoji-class"}}, "measure_at": (5,)}, "nothing is trained"),
        *(({"name": column}, f"name={column!r} is taken") for column in sweeps.COLUMNS),
        ({"metrics": ("objects",)}, "'objects' says nothing here"),
        ({"samplings": {"few": {"step": 2}}}, "did you mean 'steps'"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        Sweep(**{**SWEEP, **changes})
    assert said in str(caught.value)


def test_the_names_that_are_taken_are_those_of_a_run() -> None:
    assert one_run.BOUND in sweeps.TAKEN


@pytest.mark.parametrize(
    "level",
    [
        {"sampling.eta": 1, "sampling.guidance_interval": [0, 400], "sampling.spacing": "linspace"},
        {"sampling.steps": 1000, "sampling.guidance_scale": 0},
        {"model": "emoji-sr"},
        {"model": "scenes-layout", "sampling.guidance_scale": 3.0},
        {"trained_first_stage": "emoji-class"},  # that of a diffusion model
        {"preset": "scenes-layout", "alone_steps": 0},
        {"data.styles": ["noto", "blob"], "data.subgroups": ["heart"]},
    ],
)
def test_a_level_that_can_be_is_accepted(level: dict[str, Any]) -> None:
    sweep = Sweep(name="x", levels={"good": level}, samplings={"5 steps, ddim": {"steps": 5}})
    [run] = sweep.runs(seeds=[0])
    assert Run.from_dict(run.as_dict()).plan() == plan_of(level)


def test_metrics_of_a_trained_model_are_those_of_its_condition() -> None:
    level = {"levels": {"a": {"model": "emoji-sr"}}}
    assert Sweep(name="x", **level, metrics=["psnr"]).metrics == ("psnr",)
    level = {"levels": {"a": {"model": "scenes-semantic"}}}
    assert Sweep(name="x", **level, metrics=["objects"]).metrics == ("objects",)


def test_a_setting_that_every_level_has_of_its_own_is_no_change() -> None:
    with pytest.raises(ValueError, match=r"sampling\.sampler='heun' for all levels would change"):
        SWEEPS["sampler"].changed(**{"sampling.sampler": "heun"})
    with pytest.raises(ValueError, match=r"unet\.width=8 for all levels"):
        Sweep(**SWEEP).changed(unet={"width": 8})
    some = Sweep(name="x", levels={"base": {}, "wide": {"unet.width": 48}})
    assert some.changed(**{"unet.width": 24}).settings("base") == {"unet.width": 24}


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
        ("levels = 3", "levels=3 must be a table"),
        ("grid = 3", "grid=3 must be a table of lists"),
        ("grid = [1]", "grid=[1] must be a table of lists"),
        ("grid = {}", "a list of values for each name"),
        ('samplings = 3\n[grid]\n"unet.width" = [16]', "samplings=3 must be a table"),
        ('seeds = 3\n[grid]\n"unet.width" = [16]', "seeds=3 must be a list"),
        ('measure_at = 100\n[grid]\n"unet.width" = [16]', "measure_at=100 must be a list"),
        ('metrics = "kid"\n[grid]\n"unet.width" = [16]', "metrics='kid' must be a list"),
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
