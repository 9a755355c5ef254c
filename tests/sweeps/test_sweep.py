"""What a sweep varies: settings are resolved, and mistakes are found before anything runs."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweeps.tiny import tiny_sweep
from typer.testing import CliRunner

from minildm import PRESETS, Sweep, cli, data_dir, read_sweep
from minildm.sweeps.sweep import Run
from minildm.training.configs import from_dict, to_dict

STANDARD = sorted(path.stem for path in data_dir().parent.glob("notebooks/sweeps/*.toml"))


@pytest.mark.parametrize("name", STANDARD)
def test_a_standard_sweep_resolves_and_goes_through_json(name: str) -> None:
    sweep = read_sweep(name)
    assert sweep.question.endswith("?") and len(sweep.seeds) >= 3
    for run in sweep.runs():
        assert from_dict(Run, json.loads(json.dumps(to_dict(run)))) == run
        if run.experiment is None:
            assert run.model == "emoji-class"
        else:
            assert run.experiment.train.seed == run.seed
            assert run.experiment.train.steps >= max(run.measure_at)


def test_a_level_changes_what_it_names_and_nothing_else() -> None:
    level = {"unet.channels": 16, "train.lr": 5e-4, "first_stage.kl_weight": 0.1}
    [run] = Sweep(name="x", levels={"a": level}, seeds=(3,)).runs()
    base, stage = PRESETS["emoji-class-f4"], PRESETS["emoji-kl-f4"]
    unet = replace(base.unet, channels=16)
    train = replace(base.train, lr=5e-4, seed=3)
    assert run.experiment == replace(base, unet=unet, train=train)
    assert run.first_stage == replace(stage, kl_weight=0.1, data=replace(stage.data, size=32))
    assert run.name == "x-a-seed3"


def test_settings_of_first_stages_do_not_matter_to_pixels() -> None:
    runs = read_sweep("f").changed({"first_stage.train.steps": 7}).runs()[:6]
    found = [run.first_stage and run.first_stage.model.f for run in runs]
    assert found == [None, 2, 4, 8, 16, 32]
    assert {run.first_stage.train.steps for run in runs[1:]} == {7}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet.chanels": 16}, "rate=bad: field of UNetConfig='chanels' is not known; did you"),
        ({"preset": "emoji-kl-f4"}, "field of LatentDiffusionExperiment='model' is not known"),
        ({"first_stage": "emoji-kl-f8"}, "unet.in_channels=3"),
        ({"model": "emoji-clas"}, "did you mean 'emoji-class'"),
        ({"name": "no name"}, "name='no name'"),
        ({"levels": {}}, "levels=[]"),
        ({"levels": {"a b": {}, "A-b": {}}}, "must be different"),
        ({"samples": 19}, "samples=19 must lie in 20.."),
        ({"samplings": {"few": {"step": 2}}}, "rate=low: field of SamplingConfig"),
    ],
)
def test_a_wrong_sweep_is_refused(changes: dict[str, Any], message: str) -> None:
    known = changes.keys() & {"name", "levels", "samples", "samplings"}
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny_sweep(**(changes if known else {"levels": {"good": {}, "bad": changes}}))


def test_a_toml_file_with_a_grid_or_with_levels(tmp_path: Path) -> None:
    path = tmp_path / "My widths.toml"
    path.write_text(
        "seeds = [0, 1]\nsamples = 40\n[shared]\ntrain.steps = 50\n"
        '[grid]\n"unet.channels" = [16, 24]\n[grid.train]\nlr = [1e-3, 5e-4]\n'
    )
    sweep = read_sweep(path)
    assert (sweep.name, sweep.seeds, sweep.samples) == ("my_widths", (0, 1), 40)
    assert list(sweep.levels) == [f"channels {c}, lr {lr}" for c in (16, 24) for lr in (1e-3, 5e-4)]
    last = sweep.runs()[-1].experiment
    assert (last.unet.channels, last.train.lr, last.train.steps) == (24, 5e-4, 50)
    path.write_text('[grid]\n"unet.channels" = [16, 24]\n')
    assert read_sweep(path).runs()[0].name == "unet.channels-16-seed0"  # one key: its name
    path.write_text("[levels.small]\nunet.channels = 16\n[levels.large]\nunet.channels = 24\n")
    assert [run.experiment.unet.channels for run in read_sweep(path).runs()[:2]] == [16, 24]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("levels = 3", "requires levels"),
        ('sead = [0]\n[grid]\n"unet.channels" = [16]', "did you mean 'seeds'"),
        ("[levels.a", "Expected ']'"),
    ],
)
def test_a_wrong_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"mine\.toml.* {message}"):
        read_sweep(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("g",), "sweep='g' is not known"),
        (("sampler", "--set", "sampling.sampler=heun"), "each level sets its own sampling.sampler"),
        (("f", "--level", "3"), "level='3' is not known"),
    ],
)
def test_the_command_refuses_before_anything_runs(words: tuple[str, ...], message: str) -> None:
    ended = CliRunner().invoke(cli.app, ["sweep", *words])
    assert isinstance(ended.exception, ValueError)  # `cli.main` prints it as one line
    assert message in str(ended.exception)
    assert not Path("nowhere").exists()
