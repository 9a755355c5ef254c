"""Classes, captions, layouts and ids as tokens: content and dropping."""

from typing import Any

import numpy as np
import pytest
import torch

from minildm.conditioning import (
    CaptionTokenizer,
    ClassConfig,
    HybridConfig,
    IdsConfig,
    LayoutConfig,
    LowResConfig,
    TextConfig,
)
from minildm.conditioning.tokens import grid_waves

WORDS = CaptionTokenizer.trained_on(["a red apple", "a green dog and a cat"])
SMALL: dict[str, Any] = {"d_cond": 8, "depth": 1, "heads": 2, "d_head": 4}
BOX = (0.25, 0.5, 0.75, 1.0)
CLASSES = ClassConfig(classes=("ant", "bee", "bumblebee"), d_cond=5)
CONFIGS = {
    "class": CLASSES,
    "text": TextConfig(vocab_size=len(WORDS), length=8, **SMALL),
    "layout": LayoutConfig(classes=("dog", "cat"), grid=5, **SMALL),
    "hybrid": HybridConfig(tokens=CLASSES, concat=LowResConfig()),
    "ids": IdsConfig(vocab_size=9, length=4, **SMALL),
}
INPUT = {
    "class": ["bee", "ant", "bee"],
    "text": ["a red apple", "a dog", "a cat"],
    "layout": [[("cat", BOX)], [("dog", BOX), ("cat", BOX)], []],
    "hybrid": {"low_res": torch.zeros(3, 3, 4, 4), "y": ["bee", "ant", "bee"]},
    "ids": [[0, 1, 2, 8], [3, 3, 3, 3], [0, 0, 1, 2]],
}


def build(kind: str) -> Any:
    tau = CONFIGS[kind].build()
    if kind == "text":
        tau.set_tokenizer(WORDS)
    return tau.eval()


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "ids"])
def test_a_dropped_condition_is_exactly_the_null_condition(kind: str) -> None:
    tau = build(kind)
    batch, drop = tau.batch_from(INPUT[kind], 3), torch.tensor([True, False, True])
    kept, dropped, null = tau(batch), tau(batch, drop=drop), tau.null(3)
    assert dropped.tokens.shape == kept.tokens.shape == null.tokens.shape
    assert torch.equal(dropped.tokens[drop], null.tokens[drop])
    assert torch.equal(dropped.tokens[1], kept.tokens[1])
    assert not torch.allclose(kept.tokens[1], null.tokens[1])
    assert null.concat is None
    assert kept.concat is dropped.concat  # an image is never dropped
    assert tau.config.p_uncond == 0.1


@pytest.mark.parametrize("kind", ["class", "text", "layout", "ids"])
def test_a_single_condition_is_repeated(kind: str) -> None:
    tau = build(kind)
    batch = tau.batch_from(INPUT[kind][0], 2)
    assert torch.equal(tau(batch).tokens, tau(tau.batch_from([INPUT[kind][0]] * 2, 2)).tokens)


@pytest.mark.parametrize(
    ("y", "labels"),
    [
        (["ant"], [0, 0]),
        (torch.tensor([0, 1], dtype=torch.int32), [0, 1]),
        (np.int64(2), [2, 2]),
        ([np.int8(2), "ant"], [2, 0]),
    ],
)
def test_names_and_labels_are_understood(y: object, labels: list[int]) -> None:
    label = build("class").batch_from(y, len(labels))["label"]
    assert label.tolist() == labels
    assert label.dtype == torch.int64


def test_a_box_is_its_corners_and_its_class() -> None:
    tau = build("layout")
    ids = tau.ids(tau.batch_from([("cat", BOX)], 1))
    # On a grid of 5 x 5 positions 0.25 is 1, 0.5 is 2, 0.75 is 3 and 1 is 4: rows of 5.
    assert ids.tolist() == [[2 * 5 + 1, 4 * 5 + 3, 25 + 1, *[25 + 2] * 9]]


def test_padding_has_no_effect_wherever_its_boxes_lie() -> None:
    tau = build("layout")
    boxes, classes = torch.rand(2, 4, 4), torch.full((2, 4), -1)
    assert torch.equal(tau.ids({"boxes": boxes, "classes": classes}), torch.full((2, 12), 27))
    boxes[:, 0], classes[:, 0] = torch.tensor(BOX), 1
    batch = tau.batch_from({"boxes": boxes, "classes": classes}, 2)
    fewer = {"boxes": boxes[:, :1], "classes": classes[:, :1]}
    assert torch.equal(tau(batch).tokens, tau(fewer).tokens)


def test_corners_start_alike_where_they_are_near() -> None:
    tau, table = build("layout"), grid_waves(5, 8)
    assert torch.equal(tau.network.embedding.weight[:25], table)
    assert all(0.7 < w.std() < 1.3 for w in (table, tau.network.position.weight))
    grid = table.view(5, 5, 8)  # rows of y, then x
    assert torch.equal(grid[..., :4], grid[:1, :, :4].expand(5, -1, -1))
    assert torch.equal(grid[..., 4:], grid[:, :1, 4:].expand(-1, 5, -1))
    assert (grid[0, :, 0].diff() < 0).all()  # half a wave over the grid


@pytest.mark.parametrize(("side", "d"), [(16, 128), (60, 64), (2, 3)])
def test_the_waves_of_a_grid_tell_its_positions_apart(side: int, d: int) -> None:
    table = grid_waves(side, d)
    assert (torch.cdist(table, table) + 100 * torch.eye(side**2)).min() > 0.1
