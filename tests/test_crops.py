"""Crops of scenes: the right piece of the picture, labelled with the truth, clear when empty."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minildm import PRESETS, ScenesDataset, load_model, pretrained, train_judge
from minildm.data.crops import CROP_CLASSES, CropsDataset, crop, empty_box
from minildm.data.scenes import IN_SKY, OBJECTS, overlap
from minildm.experiments import DataConfig, JudgeExperiment, TrainConfig
from minildm.judge import correct
from minildm.metrics import reconstruct


@pytest.fixture(scope="module")
def scenes() -> ScenesDataset:
    return ScenesDataset("val", 64, n=40)


@pytest.fixture(scope="module")
def crops(scenes: ScenesDataset) -> CropsDataset:
    return CropsDataset(scenes)


def test_a_crop_of_whole_pixels_is_those_pixels(randn: Any) -> None:
    x = randn(2, 3, 16, 8)
    boxes = torch.tensor([[0.5, 0.25, 1.0, 0.5], [0.0, 0.0, 0.5, 0.25]])
    cut = crop(x, boxes, side=4, margin=0.0)
    assert torch.allclose(cut[0], x[0, :, 4:8, 4:8], atol=1e-5)
    assert torch.allclose(cut[1], x[1, :, 0:4, 0:4], atol=1e-5)


def test_the_margin_lies_on_every_side(randn: Any) -> None:
    x = randn(1, 3, 16, 16)
    inner = torch.tensor([[0.25, 0.25, 0.75, 0.75]])
    outer = torch.tensor([[0.125, 0.125, 0.875, 0.875]])
    assert torch.allclose(crop(x, inner, 8, margin=0.25), crop(x, outer, 8, margin=0.0), atol=1e-5)


def test_beyond_the_picture_its_edge_goes_on() -> None:
    x = torch.linspace(-1, 1, 8).expand(1, 3, 8, 8)
    cut = crop(x, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 16, margin=0.5)
    assert cut.min() == -1 and cut.max() == 1
    assert torch.equal(cut[..., 0], torch.full((1, 3, 16), -1.0))


def test_bad_boxes_are_refused() -> None:
    x = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="boxes \\(K, 4\\), got"):
        crop(x, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="rising"):
        crop(x, torch.tensor([[0.5, 0, 0.2, 1.0], [0, 0, 1, 1]]))


def test_every_object_is_there_once_and_empty_places_are_clear(
    scenes: ScenesDataset, crops: CropsDataset
) -> None:
    named = crops.labels < len(OBJECTS)
    asked = [scenes.without_image(i) for i in range(len(scenes))]
    expected = torch.cat([scene["classes"][scene["classes"] >= 0] for scene in asked])
    assert torch.equal(crops.labels[named], expected)
    assert 0.8 * len(scenes) < int((~named).sum()) <= len(scenes)
    for box, i in zip(crops.boxes[~named].tolist(), crops.scene_ids[~named].tolist(), strict=True):
        assert all(not overlap(box, other) for other in asked[i]["boxes"].tolist())
        semantic = scenes[i]["semantic"]
        x0, y0, x1, y1 = (round(64 * v) for v in box)
        assert float((semantic[y0:y1, x0:x1] >= 8).float().mean()) < 0.1  # background, by truth


def test_groups_and_styles_follow_the_labels(scenes: ScenesDataset, crops: CropsDataset) -> None:
    for i in range(len(crops)):
        name, scene = crops.classes[crops.labels[i]], scenes.without_image(int(crops.scene_ids[i]))
        if name == "nothing":
            expected = ("nothing", "none")
        else:
            expected = ("sky" if name in IN_SKY else "ground", crops.styles[scene["style"]])
        assert (crops.groups[crops.group_ids[i]], crops.styles[crops.style_ids[i]]) == expected


def test_an_item_is_the_crop_of_its_box(scenes: ScenesDataset, crops: CropsDataset) -> None:
    for i in (0, 17, len(crops) - 1):
        x = scenes[int(crops.scene_ids[i])]["image"][None]
        item = crops[i]
        assert torch.allclose(item["image"], crop(x, crops.boxes[i : i + 1])[0], atol=1 / 127)
        assert item["label"] == crops.labels[i] and item["image"].shape == (3, 32, 32)


def test_the_same_scenes_give_the_same_crops(scenes: ScenesDataset, crops: CropsDataset) -> None:
    again = CropsDataset(ScenesDataset("val", 64, n=40))
    assert torch.equal(again.boxes, crops.boxes) and again.fingerprint == crops.fingerprint
    other = CropsDataset(ScenesDataset("val", 64, n=40, seed=1))
    assert other.fingerprint != crops.fingerprint


def test_where_all_is_full_no_empty_box_is_found() -> None:
    assert empty_box(np.random.default_rng(0), torch.tensor([[0.0, 0, 1, 1]])) is None


def test_a_judge_of_crops_trains_from_its_preset(tmp_path: Path, crops: CropsDataset) -> None:
    preset = PRESETS["scenes-judge"]
    assert preset.crops and preset.data.kind == "scenes"
    few = replace(preset, train=TrainConfig(steps=2, batch_size=8, precision="fp32"), width=8)
    records = list(train_judge(few, crops, run_dir=tmp_path / "judge", device="cpu"))
    judge = load_model(tmp_path / "judge")
    assert len(records) == 2
    assert judge.config.labels == CROP_CLASSES and judge.config.groups == crops.groups


def test_crops_need_scenes(monkeypatch: pytest.MonkeyPatch, scenes: ScenesDataset) -> None:
    with pytest.raises(ValueError, match=r"crops=True needs data\.kind='scenes', got 'emoji'"):
        JudgeExperiment(train=TrainConfig(steps=1), crops=True)
    monkeypatch.setattr(DataConfig, "dataset", lambda self, split: scenes)
    data, train = DataConfig(kind="scenes"), TrainConfig(steps=1)
    assert isinstance(
        JudgeExperiment(train=train, data=data, crops=True).dataset("val"), CropsDataset
    )
    assert JudgeExperiment(train=train, data=data).dataset("val") is scenes


def test_the_shipped_judge_knows_objects_in_real_scenes_and_in_soft_ones() -> None:
    scenes = ScenesDataset("val", 64, n=40)
    crops, x = CropsDataset(scenes), scenes.images.float() / 127.5 - 1
    soft = reconstruct(pretrained("emoji-kl-f4"), x)[crops.scene_ids]
    judge = pretrained("scenes-judge")
    assert correct(judge, crop(x[crops.scene_ids], crops.boxes), crops.labels, "label").all()
    assert correct(judge, crop(soft, crops.boxes), crops.labels, "label").float().mean() > 0.85
