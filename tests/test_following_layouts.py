"""Judging layouts, on pictures of known truth: the asked boxes, others' boxes, no box at all."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minildm import ConditionerConfig, ScenesDataset
from minildm.data.crops import CROP_CLASSES, CropsDataset
from minildm.data.scenes import OBJECTS
from minildm.following import (
    evaluate_layout,
    layout_following,
    located,
    overlaps,
    scene_layouts,
)
from minildm.judge import JudgeConfig

N, NOTHING = 60, len(OBJECTS)
STEPS = torch.linspace(-1, 1, 4)
CODES = torch.cartesian_prod(STEPS, STEPS, STEPS)[: NOTHING + 1]  # a colour for each class


class Counter(torch.nn.Module):
    """A judge of crops: each pixel within the margin votes for the class of its colour."""

    config = JudgeConfig(
        labels=CROP_CLASSES, groups=CropsDataset.groups, styles=CropsDataset.styles
    )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        inner = x[:, :, 3:-3, 3:-3].flatten(2).transpose(1, 2)  # (B, pixels, 3)
        votes = F.one_hot(torch.cdist(inner, CODES).argmin(2), NOTHING + 1).float().mean(1)
        return {"label": (votes + 1e-3).log()}


def layouts(n: int = N) -> dict[str, Tensor]:
    """Two or three boxes each, in different quarters; often two of one class."""
    draw = torch.Generator().manual_seed(n)
    boxes, classes = torch.zeros(n, 4, 4), torch.full((n, 4), -1)
    for i in range(n):
        quarters = torch.randperm(4, generator=draw)[: 2 + i % 2].tolist()
        kinds = torch.randperm(NOTHING, generator=draw)
        for k, quarter in enumerate(quarters):
            size = 0.25 + 0.2 * torch.rand(2, generator=draw)
            corner = torch.tensor([quarter % 2, quarter // 2]) / 2
            corner = corner + (0.5 - size) * torch.rand(2, generator=draw)
            boxes[i, k] = torch.cat([corner, corner + size])
            classes[i, k] = kinds[k]
        if i % 5 == 0:
            classes[i, 1] = classes[i, 0]
    return {"boxes": boxes, "classes": classes}


def painted(asked: dict[str, Tensor], size: int = 32) -> Tensor:
    """Pictures that are "nothing" but for the boxes, each in its class's colour."""
    x = CODES[NOTHING].view(1, 3, 1, 1).repeat(len(asked["boxes"]), 1, size, size)
    for picture, boxes, classes in zip(x, asked["boxes"], asked["classes"], strict=True):
        for box, label in zip((boxes * size).round().int().tolist(), classes.tolist(), strict=True):
            if label >= 0:
                picture[:, box[1] : box[3], box[0] : box[2]] = CODES[label].view(3, 1, 1)
    return x


MEASURES = ("objects", "filled", "empty", "found", "iou")


def test_pictures_of_the_layouts_follow_and_dealt_anew_they_do_not() -> None:
    asked = layouts()
    x = painted(asked)
    found = layout_following(x, asked, Counter(), real=x)
    assert all(found[name] == found[f"{name}_real"] for name in MEASURES)
    for name in ("objects", "filled", "found"):
        assert found[name].value == 1
    assert found["empty"].value == 1 and found["iou"].value > 0.75
    assert found["objects_shuffled"].value < 0.1 and found["found_shuffled"].value < 0.2
    assert found.settings["follows"] == dict.fromkeys(MEASURES, True)
    assert found["objects"].n == int((asked["classes"] >= 0).sum())
    pairs = 2 * (N // 5)  # those asked for twice cannot be told apart
    assert found["found"].n == found["objects"].n - pairs


def test_a_model_that_ignores_its_layouts_scores_at_chance() -> None:
    asked = layouts()
    other = {name: values.roll(1, 0) for name, values in asked.items()}
    found = layout_following(painted(other), asked, Counter(), real=painted(asked))
    assert not any(found.settings["follows"].values())
    assert found["objects"].value < 0.1 and found["objects_real"].value == 1


def test_an_empty_picture_is_empty_and_no_more() -> None:
    asked = layouts(20)
    nothing = painted({**asked, "classes": torch.full((20, 4), -1)})
    found = layout_following(nothing, asked, Counter())
    assert found["objects"].value == found["filled"].value == 0
    assert found["empty"].value == 1
    follows = found.settings["follows"]
    assert not (follows["objects"] or follows["filled"] or follows["empty"])


def test_the_right_object_in_the_wrong_place_is_found_there() -> None:
    asked = {
        "boxes": torch.tensor([[[0.1, 0.1, 0.4, 0.4]]] * 2),
        "classes": torch.tensor([[7], [30]]),
    }
    there = {**asked, "boxes": torch.tensor([[[0.6, 0.5, 0.9, 0.8]]] * 2)}
    x = painted(there, 64)
    found = located(x, asked["boxes"][:, 0], asked["classes"][:, 0], Counter())
    assert (found - there["boxes"][:, 0]).abs().max() < 0.04
    judged = layout_following(x, asked, Counter())
    assert judged["iou"].value == judged["objects"].value == 0


def test_overlaps_are_intersection_over_union() -> None:
    a = torch.tensor([[0.0, 0.0, 0.5, 0.5]] * 4)
    b = torch.tensor([[0, 0, 0.5, 0.5], [0.25, 0, 0.75, 0.5], [0.5, 0.5, 1, 1], [0, 0, 1, 1]])
    assert torch.allclose(overlaps(a, b), torch.tensor([1, 1 / 3, 0, 1 / 4]))


def test_real_scenes_are_asked_for_as_they_are() -> None:
    scenes = ScenesDataset("val", 32, n=5)
    asked = scene_layouts(scenes, 3)
    assert torch.equal(asked["boxes"][2], scenes[2]["boxes"])
    assert torch.equal(asked["classes"][1], scenes[1]["classes"])
    with pytest.raises(ValueError, match=r"n=6 must lie in 2\.\.5"):
        scene_layouts(scenes, 6)


def test_a_model_of_scenes_is_judged_at_each_scale() -> None:
    """A fake that paints what it is asked for where guidance is strong, else nothing."""

    def sample(y: dict[str, Tensor], *, noise: Any, guidance_scale: float, steps: int) -> Tensor:
        classes = y["classes"] if guidance_scale > 2 else torch.full_like(y["classes"], -1)
        return painted({"boxes": y["boxes"], "classes": classes}, 64)

    conditioner = ConditionerConfig(kind="layout", classes=OBJECTS)
    config = SimpleNamespace(conditioner=conditioner, image_size=64)
    model = SimpleNamespace(config=config, sample=sample)
    found = evaluate_layout(model, Counter(), 12, [1.0, 3.0], steps=4, seed=2)
    assert list(found) == ["guidance 1", "guidance 3"]
    assert found["guidance 3"]["objects"].value > 0.75  # one may hide a part of another
    assert found["guidance 1"]["objects"].value == 0
    settings = found["guidance 3"].settings
    assert (settings["guidance_scale"], settings["steps"], settings["seed"]) == (3.0, 4, 2)
    assert "objects_real" in found["guidance 1"]
    config.conditioner = ConditionerConfig(kind="layout", classes=("dog",))
    with pytest.raises(ValueError, match="not the objects of the scenes"):
        evaluate_layout(model, Counter(), 12, [1.0])


def test_other_judges_and_numbers_are_refused() -> None:
    asked = layouts(4)
    other = Counter()
    other.config = JudgeConfig(labels=("a",), groups=("b",), styles=("c",))
    with pytest.raises(ValueError, match="one of crops of scenes"):
        layout_following(painted(asked), asked, other)
    with pytest.raises(ValueError, match="4 layouts need as many pictures, got 3"):
        layout_following(painted(asked)[:3], asked, Counter())
