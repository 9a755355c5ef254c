"""Following conditions, on samples of known truth: the requested images, shuffled ones, one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import randn
from torch import Tensor, nn

from minildm.data.dataset import as_float
from minildm.data.emoji import EmojiDataset
from minildm.data.scenes import CROP_CLASSES, OBJECTS
from minildm.data.transforms import enlarge, shrink
from minildm.evaluation.following import (
    accuracy,
    baseline,
    draw_conditions,
    evaluate_model,
    evaluate_restoration,
    given_of,
    kept,
    layout_following,
    located,
    overlaps,
    shuffled,
    text_following,
)
from minildm.evaluation.intervals import proportion_interval
from minildm.training.checkpoint import pretrained
from minildm.training.classifier import ClassifierConfig

LABELS, GROUPS, STYLES = ("food-a", "food-b", "animal-a", "heart"), ("a", "b"), ("flat", "thin")
SUBJECTS = torch.arange(120)
REQUESTED = {"label": SUBJECTS * 7 % 19 % 4, "style": SUBJECTS // 2 % 2, "subject": SUBJECTS}
REQUESTED["group"] = REQUESTED["label"] // 2


class Reader(nn.Module):
    """A classifier that reads label and style from an image's first two pixels."""

    config = ClassifierConfig(labels=LABELS, groups=GROUPS, styles=STYLES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        label, style = (10 * x[:, 0, 0, :2]).round().long().unbind(1)
        numbers = {"label": (label, 4), "group": (label // 2, 2), "style": (style, 2)}
        return {name: F.one_hot(*number).float() for name, number in numbers.items()}


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Images in which `Reader` sees what is requested."""
    x = torch.zeros(120, 3, 4, 4)
    x[:, 0, 0, :2] = torch.stack([REQUESTED["label"], REQUESTED["style"]], dim=1) / 10
    return x


@pytest.mark.parametrize("n", [2, 3, 50])
def test_a_shuffling_leaves_nothing_in_its_place(n: int) -> None:
    for seed in range(20):
        order = shuffled(n, seed)
        assert sorted(order.tolist()) == list(range(n))
        assert not (order == torch.arange(n)).any()


def test_accuracy_counts_the_classifiers_hits(x: Tensor) -> None:
    truth = torch.cat([(REQUESTED["label"][:30] + 2) % 4, REQUESTED["label"][30:]])
    assert accuracy(Reader(), x, truth, "label") == proportion_interval(90, 120)
    assert accuracy(Reader(), x, truth // 2).value == 0.75


# Captions.


def test_images_of_the_captions_follow_and_shuffled_ones_do_not(x: Tensor) -> None:
    found, order = text_following(x, REQUESTED, Reader(), real=x, seed=3), shuffled(120, 3)
    for question in ("label", "group", "style"):
        assert found[question].value == found[f"{question}_real"].value == 1
        assert found[question].low < 1  # N right answers prove no certainty
        same = REQUESTED[question] == REQUESTED[question][order]
        assert found[f"{question}_shuffled"].value == int(same.sum()) / 120 < 0.7
    assert found.settings["follows"] == {"label": True, "group": True, "style": True}
    plain = {k: column for k, column in REQUESTED.items() if k != "style"}
    assert set(text_following(x, plain, Reader()).settings["follows"]) == {"label", "group"}


def test_a_model_that_ignores_its_captions_scores_at_chance(x: Tensor) -> None:
    for samples in (x[shuffled(120, seed=5)], x[:1].expand(120, -1, -1, -1)):
        found = text_following(samples, REQUESTED, Reader(), real=x)
        assert not any(found.settings["follows"].values())
        assert found["group"].value < 0.7 and found["group_real"].value == 1
    with pytest.raises(ValueError, match="must know these classes, in order: face-smiling"):
        evaluate_model(pretrained("emoji-text"), classifier=Reader())


def model_of(kind: str) -> Any:
    config = SimpleNamespace(conditioner=SimpleNamespace(kind=kind), image_size=32)
    return SimpleNamespace(config=config, autoencoder=SimpleNamespace(f=4))


def test_captions_and_classes_request_what_their_images_are() -> None:
    val = EmojiDataset("val", 32, subgroups=("heart", "food-fruit"))
    n = len(val) + 5  # some images come twice
    styled, requested, x = draw_conditions(model_of("text"), n, 3, val, styled=True)
    plain, without, _ = draw_conditions(model_of("text"), n, 3, val)
    names, of_classes, same = draw_conditions(model_of("class"), n, 3, val)
    assert torch.equal(x, same) and set(without) == set(of_classes) == {*requested} - {"style"}
    questions, items = ("label", "group", "style"), list(val)
    for i, caption in enumerate(plain):
        [item] = [item for item in items if torch.equal(item["image"], x[i])]
        assert [item[key] for key in questions] == [requested[key][i] for key in questions]
        assert names[i] == val.classes[item["label"]] and caption == item["caption"]
        assert styled[i] == f"{caption}, {val.styles[item['style']]} style"
    assert len(requested["subject"].unique()) == len(set(val.hexcodes))
    assert draw_conditions(model_of("none"), 4, 3, val)[:2] == (None, {})
    assert len(draw_conditions(model_of("low_res"), n, 3, val)[2]) == len(val)


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
    nothing = painted(layouts["boxes"], torch.full((10, 3), -1))
    found = layout_following(nothing, layouts, Counter())
    assert found["objects"].value == found["filled"].value == 0 and found["empty"].value == 1


def test_the_right_object_in_the_wrong_place_is_located_there() -> None:
    boxes, labels = torch.tensor([[0.1, 0.1, 0.4, 0.4]] * 2), torch.tensor([7, 30])
    there = torch.tensor([[0.6, 0.5, 0.9, 0.8]] * 2)
    found = located(painted(there[:, None], labels[:, None], 64), boxes, labels, Counter())
    assert (found - there).abs().max() < 0.04
    assert overlaps(found, boxes).tolist() == [0, 0]


# Restorations.


@pytest.fixture(scope="module")
def emoji() -> Tensor:
    return as_float(EmojiDataset("val", 64, subgroups=("food-fruit", "heart")).images[:40])


def test_what_is_given_follows_the_seed_and_is_filled_or_enlarged(emoji: Tensor) -> None:
    for task in ("low_res", "inpaint"):
        given, same, other = (given_of(emoji, task, seed=seed) for seed in (1, 1, 2))
        assert all(torch.equal(given[key], same[key]) for key in given)
    assert not torch.equal(given["mask"], other["mask"])
    small = given_of(emoji, "low_res")
    assert torch.equal(small["low_res"], shrink(emoji, 4))
    assert torch.equal(baseline(small), enlarge(small["low_res"], 4))
    known = given["mask"].expand_as(emoji) == 1
    assert torch.equal(baseline(given)[known], emoji[known])


def test_kept_is_the_psnr_of_what_was_given(emoji: Tensor) -> None:
    assert kept(emoji, given_of(emoji, "low_res")).isinf().all()
    given = given_of(emoji, "inpaint")
    worse = torch.where(given["mask"] > 0.5, emoji, -emoji)  # the hole does not count
    assert kept(worse, given).isinf().all()
    alone = ((0.25 * emoji * given["mask"]) ** 2).mean((1, 2, 3))  # on [0, 1]: half the difference
    assert torch.allclose(kept(emoji * 0.5, given), -10 * alone.log10(), atol=1e-3)


@pytest.mark.parametrize("task", ["low_res", "inpaint"])
def test_who_follows_is_told_from_who_does_not(task: str, emoji: Tensor) -> None:
    """One model answers with the baseline, which is true to its condition; one with grey."""
    noise, found, model = 0.05 * randn(*emoji.shape), {}, model_of(task)
    for name, answer in (("good", baseline), ("bad", lambda given: 0.0)):
        model.sample = lambda given, answer=answer, **_: (answer(given) + noise).clamp(-1, 1)
        found[name] = evaluate_restoration(model, emoji, given_of(emoji, task), groups=4, steps=7)
    good, bad = found["good"]["model"], found["bad"]["model"]
    assert good.settings["follows"] == {"kept": True} and good.settings["steps"] == 7
    assert bad.settings["follows"] == {"kept": False}
    assert set(found["good"]) == {"model", "bicubic" if task == "low_res" else "mean fill"}
    assert good["psnr"].value > bad["psnr"].high and good["psnr"].n == len(emoji)
    assert {"ssim", "perceptual", "kid", "precision", "kept", "kept_shuffled"} <= set(good)
