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
    share,
    shuffled,
    text_following,
)
from minildm.evaluation.intervals import mean_interval, proportion_interval
from minildm.training.classifier import ClassifierConfig

LABELS, GROUPS = ("food-a", "food-b", "animal-a", "heart"), ("a", "b")
STYLES = ("flat", "round", "thin")
N = 120


class Reader(nn.Module):
    """A classifier that reads label and style from an image's first two pixels."""

    config = ClassifierConfig(labels=LABELS, groups=GROUPS, styles=STYLES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        label, style = (10 * x[:, 0, 0, :2]).round().long().unbind(1)
        numbers = {"label": (label, 4), "group": (label // 2, 2), "style": (style, 3)}
        return {name: F.one_hot(*number).float() for name, number in numbers.items()}


def images_of(labels: list[int], styles: list[int]) -> Tensor:
    """Images in which `Reader` sees these."""
    x = torch.zeros(len(labels), 3, 4, 4)
    x[:, 0, 0, :2] = torch.tensor([labels, styles]).T / 10
    return x


def prompts_and_images(n: int = N) -> tuple[list[Prompt], Tensor]:
    """n prompts, each of its own subject, half with a style; and images that fit them."""
    draw = torch.Generator().manual_seed(n)
    labels = torch.randint(4, (n,), generator=draw).tolist()
    styles = torch.randint(3, (n,), generator=draw).tolist()
    prompts = [
        Prompt(f"thing {i}", LABELS[label], GROUPS[label // 2], STYLES[style] if i % 2 else None)
        for i, (label, style) in enumerate(zip(labels, styles, strict=True))
    ]
    return prompts, images_of(labels, styles)


@pytest.mark.parametrize("n", [2, 3, 50])
def test_a_shuffling_leaves_nothing_in_its_place(n: int) -> None:
    for seed in range(20):
        order = shuffled(n, seed)
        assert sorted(order.tolist()) == list(range(n))
        assert not (order == torch.arange(n)).any()


def test_a_shares_interval_contains_the_truth_as_often_as_it_says() -> None:
    """Clusters of six, alike in two thirds: Wilson's alone would contain it far less often."""
    draw, hits = torch.Generator().manual_seed(0), torch.zeros(2)
    for _ in range(200):
        common = torch.rand(40, 1, generator=draw) < 0.3
        own = torch.rand(40, 6, generator=draw) < 0.3
        alike = torch.rand(40, 6, generator=draw) < 2 / 3
        right = torch.where(alike, common, own).flatten()
        found = (
            share(right, torch.arange(240) // 6),
            proportion_interval(int(right.sum()), 240),
        )
        hits += torch.tensor([m.low <= 0.3 <= m.high for m in found])
    assert hits[0] > 0.91 * 200 > hits[1]


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


# Classes.


def test_accuracy_counts_the_classifiers_hits() -> None:
    assert group_of_class(TinyImages()).tolist() == [0, 1, 1]
    x = images_of([0, 1, 2, 3, 0], [0, 1, 2, 0, 1])
    assert accuracy(Reader(), x, torch.tensor([0, 1, 2, 3, 1]), "label") == (
        proportion_interval(4, 5)
    )
    assert accuracy(Reader(), x, torch.tensor([0, 0, 1, 1, 1])).value == 4 / 5
    assert accuracy(Reader(), torch.full((3, 3, 4, 4), 127).byte(), torch.zeros(3).long()).n == 3


# Captions.


def test_images_of_the_prompts_follow_and_shuffled_ones_do_not() -> None:
    prompts, x = prompts_and_images()
    found = text_following(x, prompts, Reader(), real=x)
    for question, chance, n in (("label", 1 / 4, N), ("group", 1 / 2, N), ("style", 1 / 3, N / 2)):
        assert found[question].value == found[f"{question}_real"].value == 1
        assert found[question].n == n
        assert found[question].low < 1  # N right answers prove no certainty
        assert found[f"{question}_shuffled"].low < chance < found[f"{question}_shuffled"].high
    assert found.settings["follows"] == {"label": True, "group": True, "style": True}


def test_a_model_that_ignores_its_prompts_scores_at_chance() -> None:
    prompts, x = prompts_and_images()
    with pytest.raises(ValueError, match="label='a2' is not known"):
        text_following(x, [prompts[0]._replace(label="a2"), *prompts[1:]], Reader())
    for samples in (x[shuffled(N, seed=5)], x[:1].expand(N, -1, -1, -1)):
        found = text_following(samples, prompts, Reader(), real=x)
        assert not any(found.settings["follows"].values())
        assert found["group"].value < 0.7 and found["group_real"].value == 1


def test_prompts_of_emoji_ask_for_what_their_images_are() -> None:
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


def layouts(n: int) -> dict[str, Tensor]:
    """Two or three boxes each, in different quarters; in every fifth two of one class."""
    draw = torch.Generator().manual_seed(n)
    boxes, classes = torch.zeros(n, 4, 4), torch.full((n, 4), -1)
    for i in range(n):
        kinds = torch.randperm(NOTHING, generator=draw)
        for k, quarter in enumerate(torch.randperm(4, generator=draw)[: 2 + i % 2].tolist()):
            size = 0.25 + 0.2 * torch.rand(2, generator=draw)
            corner = torch.tensor([quarter % 2, quarter // 2]) / 2
            corner = corner + (0.5 - size) * torch.rand(2, generator=draw)
            boxes[i, k] = torch.cat([corner, corner + size])
            classes[i, k] = kinds[k]
        if i % 5 == 0:
            classes[i, 1] = classes[i, 0]
    return {"boxes": boxes, "classes": classes}


def painted(asked: dict[str, Tensor], size: int = 32) -> Tensor:
    """Images that are "nothing" except for the boxes, each in its class's colour."""
    x = CODES[NOTHING].view(1, 3, 1, 1).repeat(len(asked["boxes"]), 1, size, size)
    for image, boxes, classes in zip(x, asked["boxes"], asked["classes"], strict=True):
        for box, label in zip((boxes * size).round().int().tolist(), classes.tolist(), strict=True):
            if label >= 0:
                image[:, box[1] : box[3], box[0] : box[2]] = CODES[label].view(3, 1, 1)
    return x


MEASURES = ("objects", "filled", "empty", "found", "iou")


def test_images_of_the_layouts_follow_and_shuffled_ones_do_not() -> None:
    asked = layouts(10)
    x = painted(asked)
    found = layout_following(x, asked, Counter(), real=x)
    assert all(found[name] == found[f"{name}_real"] for name in MEASURES)
    for name in ("objects", "filled", "found", "empty"):
        assert found[name].value == 1
    assert found["iou"].value > 0.75
    assert found["objects_shuffled"].value < 0.1 and found["found_shuffled"].value < 0.2
    assert all(found.settings["follows"][name] for name in ("objects", "filled", "found", "iou"))
    assert found["objects"].n == int((asked["classes"] >= 0).sum())
    pairs = 2 * (10 // 5)  # those requested twice cannot be told apart
    assert found["found"].n == found["objects"].n - pairs


def test_a_model_that_ignores_its_layouts_scores_at_chance() -> None:
    asked = layouts(10)
    other = {name: values.roll(1, 0) for name, values in asked.items()}
    found = layout_following(painted(other), asked, Counter())
    assert not any(found.settings["follows"].values()) and found["objects"].value < 0.2
    nothing = painted({**asked, "classes": torch.full((10, 4), -1)})
    found = layout_following(nothing, asked, Counter())
    assert found["objects"].value == found["filled"].value == 0
    assert found["empty"].value == 1 and not found.settings["follows"]["empty"]


def test_the_right_object_in_the_wrong_place_is_located_there() -> None:
    asked = {
        "boxes": torch.tensor([[[0.1, 0.1, 0.4, 0.4]]] * 2),
        "classes": torch.tensor([[7], [30]]),
    }
    there = {**asked, "boxes": torch.tensor([[[0.6, 0.5, 0.9, 0.8]]] * 2)}
    x = painted(there, 64)
    found = located(x, asked["boxes"][:, 0], asked["classes"][:, 0], Counter())
    assert (found - there["boxes"][:, 0]).abs().max() < 0.04
    evaluation = layout_following(x, asked, Counter())
    assert evaluation["iou"].value == evaluation["objects"].value == 0


def test_overlaps_are_intersection_over_union() -> None:
    a = torch.tensor([[0.0, 0.0, 0.5, 0.5]] * 4)
    b = torch.tensor([[0, 0, 0.5, 0.5], [0.25, 0, 0.75, 0.5], [0.5, 0.5, 1, 1], [0, 0, 1, 1]])
    assert torch.allclose(overlaps(a, b), torch.tensor([1, 1 / 3, 0, 1 / 4]))
