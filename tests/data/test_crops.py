"""Crops of scenes: the content of the box, the true label, no object in empty places."""

import numpy as np
import pytest
import torch
from helpers import randn

from minildm.data.scene_rendering import KINDS, OBJECTS
from minildm.data.scenes import CropsDataset, ScenesDataset, crop, empty_box, overlap


@pytest.fixture(scope="module")
def scenes() -> ScenesDataset:
    return ScenesDataset("val", 64, n=40)


@pytest.fixture(scope="module")
def crops(scenes: ScenesDataset) -> CropsDataset:
    return CropsDataset(scenes)


def test_a_crop_of_whole_pixels_is_those_pixels() -> None:
    x = randn(2, 3, 16, 8)
    boxes = torch.tensor([[0.5, 0.25, 1.0, 0.5], [0.0, 0.0, 0.5, 0.25]])
    cut = crop(x, boxes, side=4, margin=0.0)
    assert torch.allclose(cut[0], x[0, :, 4:8, 4:8], atol=1e-5)
    assert torch.allclose(cut[1], x[1, :, 0:4, 0:4], atol=1e-5)


def test_the_margin_is_on_every_side_and_edges_are_repeated() -> None:
    x = randn(1, 3, 16, 16)
    inner = torch.tensor([[0.25, 0.25, 0.75, 0.75]])
    outer = torch.tensor([[0.125, 0.125, 0.875, 0.875]])
    assert torch.allclose(crop(x, inner, 8, margin=0.25), crop(x, outer, 8, margin=0.0), atol=1e-5)
    ramp = torch.linspace(-1, 1, 8).expand(1, 3, 8, 8)
    cut = crop(ramp, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 16, margin=0.5)
    assert torch.equal(cut[..., 0], torch.full((1, 3, 16), -1.0)) and cut.max() == 1


def test_every_object_comes_once_and_empty_places_are_empty(
    scenes: ScenesDataset, crops: CropsDataset
) -> None:
    named = crops.labels < len(OBJECTS)
    classes = scenes.column("classes")
    assert torch.equal(crops.labels[named], classes[classes >= 0])
    assert 0.8 * len(scenes) < int((~named).sum()) <= len(scenes)
    for box, i in zip(crops.boxes[~named].tolist(), crops.scene_ids[~named].tolist(), strict=True):
        assert not any(overlap(box, other) for other in scenes.column("boxes")[i].tolist())
    assert empty_box(np.random.default_rng(0), torch.tensor([[0.0, 0, 1, 1]])) is None


def test_groups_and_styles_follow_the_labels(scenes: ScenesDataset, crops: CropsDataset) -> None:
    for i, item in enumerate(crops):
        style = scenes.styles[scenes.without_image(int(crops.scene_ids[i]))["style"]]
        if item["caption"] == "nothing":
            expected = ("nothing", "none")
        else:
            expected = ("sky" if KINDS[item["label"]].in_sky else "ground", style)
        assert (crops.groups[item["group"]], crops.styles[item["style"]]) == expected


def test_an_item_is_the_crop_of_its_box(scenes: ScenesDataset, crops: CropsDataset) -> None:
    for i in (0, 17, len(crops) - 1):
        x = scenes[int(crops.scene_ids[i])]["image"][None]
        own = crop(x, crops.boxes[i : i + 1])[0]
        assert torch.allclose(crops[i]["image"], own, atol=1 / 127)
    other = CropsDataset(ScenesDataset("val", 64, n=40, seed=1))
    assert other.fingerprint != crops.fingerprint
