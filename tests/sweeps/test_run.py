"""One run: what it measures, and that it continues where it was stopped."""

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sweeps.tiny import tiny_sweep

from minildm import EmojiDataset, Sweep, load_model, pretrained
from minildm.data.scenes import ScenesDataset
from minildm.evaluation.following import draw_conditions, layout_following
from minildm.sweeps import run as module
from minildm.sweeps.run import data_of, follows, measure_at_end, scores, shown, train
from minildm.training.configs import DataConfig
from minildm.training.loop import read_log

[RUN] = tiny_sweep(
    levels={"low": {"train.lr": 1e-3}}, measure_at=(2,), samplings={"three": {"steps": 3}}
).runs()


DISTANCES = ("proxy_fid", "kid", "precision", "recall")


@pytest.fixture(autouse=True)
def few_real_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFERENCE", 120)


def test_a_run_that_is_stopped_continues_to_the_same_numbers(tmp_path: Path) -> None:
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    records = train(RUN, stopped, tmp_path)
    assert [record.step for record in itertools.islice(records, 2)] == [1, 2]
    records.close()  # after the save of step 2, before or after it is measured
    records = list(train(RUN, stopped, tmp_path))
    assert [record.step for record in records] == [1, 2, 3, 4]
    assert list(train(RUN, stopped, tmp_path)) == records
    list(train(RUN, whole, tmp_path))
    rows, again = measure_at_end(RUN, stopped), measure_at_end(RUN, whole)
    assert [r["value"] for r in rows] == [r["value"] for r in again]
    steps = {(2, "default"), (4, "default"), (4, "three"), (4, "first stage")}
    assert {(row["step"], row["sampling"]) for row in rows} == steps
    assert {row["metric"] for row in rows} == {*DISTANCES, "accuracy"}
    assert {(row["n"], row["real"]) for row in rows} == {(20, 120)}
    for name in ("model", "ema"):
        a, b = (load_file(place / f"model/{name}.safetensors") for place in (stopped, whole))
        assert all(torch.equal(a[key], b[key]) for key in b)
    assert list(shown(whole)) == ["2-default", "4-default", "4-first-stage", "4-three"]
    last = [row for row in rows if row["step"] == 4]
    assert len({row["seconds"] for row in last}) == 1 and last[0]["seconds"] > 0
    speeds = {row["sampling"]: row.get("images_per_second") for row in rows}
    assert speeds["first stage"] is None and speeds["three"] > 0


def test_too_few_images_are_refused_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DataConfig, "dataset", lambda *_: range(6))
    with pytest.raises(ValueError, match="6 images are too few to compare samples with"):
        next(train(RUN, tmp_path, tmp_path))


def test_a_first_stage_is_trained_once_and_rescaled_for_each_level(tmp_path: Path) -> None:
    shared = {"first_stage": "emoji-kl-f4", "first_stage.train.steps": 2}
    shared |= {"first_stage.data.subgroups": ["heart"], "first_stage.train.batch_size": 4}
    sweep = tiny_sweep(levels={"1": {"latent_std": 1.0}, "4": {"latent_std": 4.0}})
    stages = []
    for run in sweep.changed({**shared, "train.steps": 1}).runs():
        place = tmp_path / run.name
        list(train(run, place, tmp_path))
        stages.append(load_model(place / "first_stage"))
    [stage] = tmp_path.glob("first_stages/*")
    assert len(read_log(stage)) == 2
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    one, four = (stage.encode(x, sample=False) for stage in stages)
    assert torch.allclose(4 * one, four, rtol=1e-5)
    assert torch.allclose(stages[0].decode(one), stages[1].decode(four), atol=1e-5)


@pytest.mark.parametrize("name", ["scenes-layout", "scenes-semantic", "emoji-sr", "emoji-inpaint"])
def test_every_kind_of_model_is_measured_by_its_condition(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenes = name.startswith("scenes")
    small = ScenesDataset("val", 64, n=24) if scenes else EmojiDataset("val", 64)
    monkeypatch.setattr(module, "data_of", lambda *_: small)
    levels = {"a": {"model": name, "sampling.steps": 1}}
    [run] = Sweep(name="x", levels=levels, seeds=(0,), samples=20).runs()
    assert not list(train(run, tmp_path, tmp_path))  # nothing to train
    rows = measure_at_end(run, tmp_path)
    metric = "objects" if scenes else "psnr"
    assert {row["metric"] for row in rows} == {*DISTANCES, metric}
    assert all(row["n"] >= 20 for row in rows)


def test_real_images_score_better_than_noise() -> None:
    [run] = Sweep(name="x", levels={"a": {"model": "emoji-class"}}, seeds=(0,), samples=60).runs()
    model, device = pretrained("emoji-class"), torch.device("cpu")
    data = data_of(run, model, "train")
    _, requested, images = draw_conditions(model, 60, 0, data)
    noise = torch.rand(60, 3, 64, 64) * 2 - 1
    real, other = (scores(x, data, device)["proxy_fid"].value for x in (images, noise))
    assert real < 0.2 * other
    real, other = (follows(x, requested, x, data, device)["accuracy"] for x in (images, noise))
    assert real.value > 0.8 > other.value and real.n == 60


def test_objects_are_counted_as_the_evaluation_counts_them() -> None:
    _, layouts, x = draw_conditions(pretrained("scenes-layout"), 6, 0)
    found = layout_following(x, layouts, pretrained("scenes-classifier"))["objects"]
    again = follows(x, layouts, x, ScenesDataset("val", 64, n=1), torch.device("cpu"))["objects"]
    assert again[::3] == found[::3] and found.value > 0.8
