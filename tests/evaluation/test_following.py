"""Following conditions, on samples of known truth: the requested images, shuffled ones, one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import TinyImages
from torch import Tensor, nn

from minildm.data.emoji import EmojiDataset
from minildm.data.scenes import CROP_CLASSES, OBJECTS
from minildm.evaluation.following import (
    Prompt,
    accuracy,
    controlled,
    emoji_prompts,
    group_of_class,
    layout_following,
    located,
    overlaps,
    shuffled,
    text_following,
)
from minildm.evaluation.intervals import mean_interval, proportion_interval
from minildm.training.classifier import ClassifierConfig

LABELS, GROUPS = ("food-a", "food-b", "animal-a", "heart"), ("a", "b")
STYLES = ("flat", "round", "thin")
TRUTH = torch.arange(120) * 7 % 19 % 4  # a label for each of 120 subjects
PROMPTS = [
    Prompt(f"thing {i}", LABELS[label], GROUPS[label // 2], STYLES[i // 2 % 3])
    for i, label in enumerate(TRUTH.tolist())
]


class Reader(nn.Module):
    """A classifier that reads label and style from an image's first two pixels."""

    config = ClassifierConfig(labels=LABELS, groups=GROUPS, styles=STYLES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        label, style = (10 * x[:, 0, 0, :2]).round().long().unbind(1)
        numbers = {"label": (label, 4), "group": (label // 2, 2), "style": (style, 3)}
        return {name: F.one_hot(*number).float() for name, number in numbers.items()}


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Images in which `Reader` sees what the prompts request."""
    x = torch.zeros(120, 3, 4, 4)
    x[:, 0, 0, :2] = torch.stack([TRUTH, torch.arange(120) // 2 % 3], dim=1) / 10
    return x


@pytest.mark.parametrize("n", [2, 3, 50])
def test_a_shuffling_leaves_nothing_in_its_place(n: int) -> None:
    for seed in range(20):
        order = shuffled(n, seed)
        assert sorted(order.tolist()) == list(range(n))
        assert not (order == torch.arange(n)).any()


def test_controls_are_measured_on_permuted_and_on_real_rows() -> None:
    x, y = torch.arange(50.0), {"a": torch.arange(50.0), "b": 2 * torch.arange(50.0)}

    @controlled
    def measured(x: Tensor, y: dict[str, Any], scale: int) -> dict[str, Any]:
        assert torch.equal(2 * y["a"], y["b"])  # all columns in the same order
        return {"error": mean_interval(-scale * (x - y["a"]).abs())}

    found = measured(x, y, 2, real=x + 1, seed=3)
    assert found["error"].value == 0 and found["error_real"].value == -2
    order = shuffled(50, 3)
    assert found["error_shuffled"].value == pytest.approx(-2 * float((x - order).abs().mean()))
    assert found.settings == {"shuffle_seed": 3, "follows": {"error": True}}


def test_accuracy_counts_the_classifiers_hits(x: Tensor) -> None:
    assert group_of_class(TinyImages()).tolist() == [0, 1, 1]
    truth = torch.cat([(TRUTH[:30] + 2) % 4, TRUTH[30:]])  # first the other group
    assert accuracy(Reader(), x, truth, "label") == proportion_interval(90, 120)
    assert accuracy(Reader(), x, truth // 2).value == 0.75


# Captions.


def test_images_of_the_prompts_follow_and_shuffled_ones_do_not(x: Tensor) -> None:
    found = text_following(x, PROMPTS, Reader(), real=x)
    for question in ("label", "group", "style"):
        assert found[question].value == found[f"{question}_real"].value == 1
        assert found[question].low < 1  # N right answers prove no certainty
        assert found[f"{question}_shuffled"].value < 0.7
    assert found.settings["follows"] == {"label": True, "group": True, "style": True}
    plain = text_following(x, [prompt._replace(style=None) for prompt in PROMPTS], Reader())
    assert plain.settings["follows"] == {"label": True, "group": True}


def test_a_model_that_ignores_its_prompts_scores_at_chance(x: Tensor) -> None:
    for samples in (x[shuffled(120, seed=5)], x[:1].expand(120, -1, -1, -1)):
        found = text_following(samples, PROMPTS, Reader(), real=x)
        assert not any(found.settings["follows"].values())
        assert found["group"].value < 0.7 and found["group_real"].value == 1
    with pytest.raises(ValueError, match="label='a2' is not known"):
        text_following(x[:2], [PROMPTS[0]._replace(label="a2"), PROMPTS[1]], Reader())


def test_prompts_of_emoji_request_what_their_images_are() -> None:
    val = EmojiDataset("val", 32)
    styled, real = emoji_prompts(val, 20, styled=True, seed=3)
    plain, same = emoji_prompts(val, 20, seed=3)
    assert torch.equal(real, same) and real.shape == (20, 3, 32, 32)
    for prompt, other, x in zip(styled, plain, real, strict=True):
        assert prompt.caption == f"{other.caption}, {prompt.style} style" and other.style is None
        rows = [i for i in range(len(val)) if val.hexcodes[i] == prompt.subject]
        i = next(i for i in rows if val.styles[val.style_ids[i]] == prompt.style)
        assert torch.equal(val[i]["image"], x)
        assert prompt[1:3] == (val.classes[val.labels[i]], val.groups[val.group_ids[i]])
    with pytest.raises(ValueError, match=r"n=0 must be in 1\.\."):
        emoji_prompts(val, 0)


# Layouts.

NOTHING = len(OBJECTS)
CODES = torch.cartesian_prod(*[torch.linspace(-1, 1, 4)] * 3)[: NOTHING + 1]  # a colour a class


class Counter(nn.Module):
    """A classifier of crops: each pixel within the margin votes for the class of its colour."""

    config = ClassifierConfig(labels=CROP_CLASSES, groups=("all",), styles=("one",))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        inner = x[:, :, 3:-3, 3:-3].flatten(2).transpose(1, 2)  # (B, pixels, 3)
        votes = F.one_hot(torch.cdist(inner, CODES).argmin(2), NOTHING + 1).float().mean(1)
        return {"label": (votes + 1e-3).log()}


@pytest.fixture
def layouts() -> dict[str, Tensor]:
    """Ten of two boxes in opposite quarters, different classes but for the last two, and a pad."""
    draw = torch.Generator().manual_seed(0)
    size = 0.25 + 0.2 * torch.rand(10, 2, 2, generator=draw)
    corner = (0.5 - size) * torch.rand(10, 2, 2, generator=draw)
    corner[:, 1] += 0.5
    boxes = F.pad(torch.cat([corner, corner + size], dim=2), (0, 0, 0, 1))
    classes = torch.stack([torch.randperm(NOTHING, generator=draw)[:3] for _ in range(10)])
    classes[:, 2], classes[8:, 1] = -1, classes[8:, 0]
    return {"boxes": boxes, "classes": classes}


def painted(boxes: Tensor, classes: Tensor, size: int = 32) -> Tensor:
    """Images that are "nothing" except for the boxes, each in its class's colour."""
    x = CODES[NOTHING].view(1, 3, 1, 1).repeat(len(boxes), 1, size, size)
    for i, k in (classes >= 0).nonzero().tolist():
        left, top, right, bottom = (boxes[i, k] * size).round().int().tolist()
        x[i, :, top:bottom, left:right] = CODES[classes[i, k]].view(3, 1, 1)
    return x


def test_images_of_the_layouts_follow_and_shuffled_ones_do_not(layouts: dict[str, Tensor]) -> None:
    x = painted(**layouts)
    found = layout_following(x, layouts, Counter(), real=x)
    for name in ("objects", "filled", "found", "empty"):
        assert found[name].value == found[f"{name}_real"].value == 1
    assert found["iou"].value > 0.75
    assert found["objects_shuffled"].value < 0.1 and found["found_shuffled"].value < 0.5
    assert all(found.settings["follows"][name] for name in ("objects", "found", "iou"))
    assert found["objects"].n == 20 and found["found"].n == 16  # equal ones cannot be told apart


def test_empty_images_have_nothing_in_boxes_and_elsewhere(layouts: dict[str, Tensor]) -> None:
    nothing = painted(layouts["boxes"], torch.full((10, 3), -1))
    found = layout_following(nothing, layouts, Counter())
    assert found["objects"].value == found["filled"].value == 0
    assert found["empty"].value == 1 and not any(found.settings["follows"].values())


def test_the_right_object_in_the_wrong_place_is_located_there() -> None:
    boxes, labels = torch.tensor([[0.1, 0.1, 0.4, 0.4]] * 2), torch.tensor([7, 30])
    there = torch.tensor([[0.6, 0.5, 0.9, 0.8]] * 2)
    found = located(painted(there[:, None], labels[:, None], 64), boxes, labels, Counter())
    assert (found - there).abs().max() < 0.04
    assert overlaps(found, boxes).tolist() == [0, 0]
