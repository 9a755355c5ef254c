"""Trainings that begin on the objects alone: what they see, and what they hand on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainings import Training, identical

from minildm import ConditionerConfig, ScenesDataset
from minildm.data.alone import GREY, ObjectsAlone
from minildm.data.scenes import BACKGROUNDS
from minildm.experiments import DataConfig


def test_only_the_objects_are_left() -> None:
    scenes = ScenesDataset("val", 48, n=6, seed=3)
    alone = ObjectsAlone(scenes)
    for i in range(len(scenes)):
        whole, item = scenes[i], alone[i]
        covered = whole["semantic"] >= len(BACKGROUNDS)
        assert covered.any() and not covered.all()
        assert torch.equal(item["image"][:, covered], whole["image"][:, covered])
        assert (item["image"][:, ~covered] == GREY / 127.5 - 1).all()
        for key in ("boxes", "classes", "semantic", "caption", "style"):
            same = item[key] == whole[key]
            assert same.all() if isinstance(same, torch.Tensor) else same
        assert alone.without_image(i)["caption"] == whole["caption"]


def test_they_are_other_data_than_the_scenes_and_the_same_each_time() -> None:
    scenes = ScenesDataset("train", 16, n=3, styles=("blob", "noto"))
    alone, again = ObjectsAlone(scenes), ObjectsAlone(ScenesDataset("train", 16, n=3))
    assert alone.name == "scenes-train-alone" and len(alone) == 3
    assert alone.fingerprint == ObjectsAlone(scenes).fingerprint
    assert len({alone.fingerprint, again.fingerprint, scenes.fingerprint}) == 3
    assert {int(alone.without_image(i)["style"]) for i in range(3)} <= {0, 4}


@pytest.fixture
def on_scenes(trainings: dict[str, Training]) -> Training:
    """The tiny diffusion training on a handful of scenes and their layouts, objects first."""
    ldm = trainings["ldm"]
    conditioner = ConditionerConfig(
        kind="layout", grid=5, d_cond=8, depth=1, heads=2, d_head=4, p_uncond=0.0
    )
    experiment = replace(
        ldm.experiment,
        conditioner=conditioner,
        unet=replace(ldm.experiment.unet, d_cond=8),
        data=DataConfig(kind="scenes", size=16),
        alone_steps=4,
    )
    data = ScenesDataset("train", 16, n=10)
    return Training(ldm.start, experiment, {**ldm.options, "data": data})


def test_the_objects_come_first_and_the_scenes_begin_with_what_they_taught(
    on_scenes: Training, tmp_path: Path
) -> None:
    records = list(on_scenes(tmp_path / "run"))
    steps = on_scenes.experiment.train.steps
    assert [r.step for r in records] == [*range(1, 5), *range(1, steps + 1)]
    # The same by hand, in two runs
    first = on_scenes.experiment.on_objects_alone()
    alone = ObjectsAlone(on_scenes.options["data"])
    by_hand = list(on_scenes(tmp_path / "first", first, data=alone))
    then = replace(on_scenes.experiment, alone_steps=0)
    by_hand += list(on_scenes(tmp_path / "then", then, init=tmp_path / "first"))
    assert [r.terms for r in by_hand] == [r.terms for r in records]
    ours, theirs = (load_file(tmp_path / run / "model.safetensors") for run in ("run", "then"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    without = list(on_scenes(tmp_path / "without", then))
    assert without[0].terms != records[4].terms


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_it_goes_on_where_it_was_cut_off(on_scenes: Training, tmp_path: Path, stop: int) -> None:
    whole = list(on_scenes(tmp_path / "whole"))
    started = on_scenes(tmp_path / "cut")
    for _ in range(stop):
        next(started)
    started.close()
    again = list(on_scenes(tmp_path / "cut"))
    assert [r.terms for r in again] == [r.terms for r in whole[-len(again) :]]
    assert len(again) >= len(whole) - stop  # at most what was not saved yet comes twice
    for folder in (".", "alone"):
        assert identical(tmp_path / "whole" / folder, tmp_path / "cut" / folder)


def test_a_model_to_start_from_takes_the_objects_place(on_scenes: Training, tmp_path: Path) -> None:
    list(on_scenes(tmp_path / "first", replace(on_scenes.experiment, alone_steps=0)))
    records = list(on_scenes(tmp_path / "run", init=tmp_path / "first"))
    assert [r.step for r in records] == [*range(1, on_scenes.experiment.train.steps + 1)]
    assert not (tmp_path / "run/alone").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alone_steps": -1}, "alone_steps=-1 must not be negative"),
        ({"data": DataConfig(size=16)}, "alone_steps=4 needs data.kind='scenes', got 'emoji'"),
    ],
)
def test_a_beginning_that_cannot_be_is_refused(
    on_scenes: Training, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(on_scenes.experiment, **changes)


def test_other_data_have_no_objects_to_be_left_alone(
    on_scenes: Training, tmp_path: Path, trainings: dict[str, Training]
) -> None:
    tiny = trainings["ldm"].options["data"]
    with pytest.raises(ValueError, match="objects alone are cut out of scenes, got TinyPictures"):
        next(on_scenes(tmp_path / "run", data=tiny))
    assert not (tmp_path / "run").exists()
