"""The checks of notebook 12: right answers pass, typical mistakes are named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_exercises import ODD
from torch import Tensor
from torchvision.ops import box_iou

from minildm.conditioning import ConditionerConfig, LayoutConditioner
from minildm.exercises import layout_tokens
from minildm.following import overlaps

Fn = Callable[..., Any]
CHECKS = TOKENS, IOU = layout_tokens.check_tokens, layout_tokens.check_iou


def packages(boxes: Tensor, classes: Tensor, grid: int, n_classes: int) -> Tensor:
    """What the package's conditioner makes of one layout."""
    names = tuple(map(str, range(n_classes)))
    config = ConditionerConfig(
        kind="layout", classes=names, grid=grid, max_boxes=len(boxes), d_cond=8, depth=1
    )
    batch = {"boxes": boxes[None], "classes": classes[None]}
    return LayoutConditioner(config).ids(batch)[0].view(-1, 3)


def one_by_one(boxes: Tensor, classes: Tensor, grid: int, n_classes: int) -> Tensor:
    """Row after row, in Python's own numbers."""
    rows = []
    for box, label in zip(boxes.tolist(), classes.tolist(), strict=True):
        left, top, right, bottom = (round(v * (grid - 1)) for v in box)
        row = [top * grid + left, bottom * grid + right, grid**2 + label]
        rows.append([grid**2 + n_classes] * 3 if label < 0 else row)
    return torch.tensor(rows)


def tokens(
    number: Fn = lambda xy, g: g * xy[:, 1] + xy[:, 0],
    places: Fn = lambda boxes, g: (boxes * (g - 1)).round().long(),
    name: Fn = lambda classes, g: g**2 + classes,
    nothing: Fn = lambda g, n: g**2 + n,
    order: Fn = lambda first, second, name: (first, second, name),
    padded: Fn = lambda rows, pads, nothing: torch.where(pads[:, None], nothing, rows),
) -> Fn:
    """The exercise's solution, put together from parts."""

    def fn(boxes: Tensor, classes: Tensor, grid: int, n: int) -> Tensor:
        where = places(boxes, grid)
        parts = number(where[:, :2], grid), number(where[:, 2:], grid), name(classes, grid)
        return padded(torch.stack(order(*parts), dim=1), classes < 0, nothing(grid, n))

    return fn


def iou(
    shared: Fn = lambda sides: sides.clamp(min=0).prod(dim=1),
    below: Fn = lambda s, a, b: a + b - s,
) -> Fn:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        sides = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
        areas = ((box[:, 2:] - box[:, :2]).prod(dim=1) for box in (a, b))
        return shared(sides) / below(shared(sides), *areas)

    return fn


def hull(a: Tensor, b: Tensor) -> Tensor:
    return (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(dim=1)


RIGHT: list[tuple[Fn, Fn]] = [
    (TOKENS, packages),
    (TOKENS, one_by_one),
    (TOKENS, tokens()),
    (IOU, overlaps),
    (IOU, lambda a, b: box_iou(a, b).diagonal()),
    (IOU, iou()),
]


@pytest.mark.parametrize(("check", "fn"), RIGHT)
def test_a_right_answer_passes_however_it_is_written(check: Fn, fn: Fn) -> None:
    verdict = check(fn)
    assert verdict.ok, verdict


WRONG: dict[str, tuple[Fn, Fn, str]] = {
    "x for y": (TOKENS, tokens(lambda xy, g: g * xy[:, 0] + xy[:, 1]), "x and y are swapped"),
    "times grid": (
        TOKENS,
        tokens(places=lambda boxes, g: (boxes * g).round().long()),
        "not by grid",
    ),
    "grid - 1 a row": (
        TOKENS,
        tokens(lambda xy, g: (g - 1) * xy[:, 1] + xy[:, 0]),
        "not grid − 1 times",
    ),
    "cut off": (TOKENS, tokens(places=lambda boxes, g: (boxes * (g - 1)).long()), "round them"),
    "bare class": (TOKENS, tokens(name=lambda classes, g: classes), "begin at grid²."),
    "class + 1": (TOKENS, tokens(name=lambda classes, g: g**2 + classes + 1), "not at grid² − 1"),
    "class - 1": (TOKENS, tokens(name=lambda classes, g: g**2 + classes - 1), "still a corner"),
    "class first": (TOKENS, tokens(order=lambda a, b, c: (c, a, b)), "class comes last"),
    "corners swapped": (TOKENS, tokens(order=lambda a, b, c: (b, a, c)), "top-left comes first"),
    "width": (
        TOKENS,
        lambda boxes, *rest: tokens()(
            torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1), *rest
        ),
        "width and height",
    ),
    "pads": (TOKENS, tokens(padded=lambda rows, pads, nothing: rows), "left as they are"),
    "pads' class": (
        TOKENS,
        tokens(
            padded=lambda rows, pads, nothing: torch.cat(
                [rows[:, :2], torch.where(pads[:, None], nothing, rows[:, 2:])], dim=1
            )
        ),
        "its corners must be",
    ),
    "pads -1": (TOKENS, tokens(nothing=lambda g, n: -1), "pads get −1"),
    "pads n - 1": (TOKENS, tokens(nothing=lambda g, n: g**2 + n - 1), "first number that is no"),
    "tokens: flat": (TOKENS, lambda *args: tokens()(*args).flatten(), "its shape is (15,)"),
    "tokens: other": (TOKENS, lambda *args: 3 * tokens()(*args), "not (1)'s"),
    "tokens: in place": (TOKENS, lambda b, *rest: tokens()(b.clamp_(0.1), *rest), "in place"),
    "sum": (IOU, iou(below=lambda s, a, b: a + b), "take it off once"),
    "area": (IOU, iou(below=lambda s, a, b: 1), "divide it by the union"),
    "first": (IOU, iou(below=lambda s, a, b: a), "the first box's area"),
    "second": (IOU, iou(below=lambda s, a, b: b), "the second box's area"),
    "smaller": (IOU, iou(below=lambda s, a, b: torch.minimum(a, b)), "smaller area"),
    "larger": (IOU, iou(below=lambda s, a, b: torch.maximum(a, b)), "larger area"),
    "hull": (IOU, lambda a, b: iou(below=lambda *_: hull(a, b))(a, b), "box round both"),
    "no clamp": (IOU, iou(lambda sides: sides.prod(dim=1)), "a side is negative"),
    "late clamp": (IOU, iou(lambda sides: sides.prod(dim=1).clamp(min=0)), "not their product"),
    "sides": (
        IOU,
        iou(lambda sides: sides.clamp(min=0).sum(dim=1), lambda *_: 1),
        "width times height",
    ),
    "distance": (IOU, lambda a, b: 1 - iou()(a, b), "1 − IoU"),
    "matrix": (IOU, box_iou, "its shape is (4, 4)"),
    "iou: other": (IOU, lambda a, b: 2 * iou()(a, b), "not those of (3)"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_named(mistake: str) -> None:
    check, fn, said = WRONG[mistake]
    verdict = check(fn)
    assert not verdict.ok and said in verdict.message, verdict


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", ODD)
def test_no_answer_makes_a_check_raise(check: Fn, case: str) -> None:
    verdict = check(ODD[case][0])
    assert verdict.ok is False and "\n" not in verdict.message and len(verdict.message) < 200


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_leaves_the_random_state_alone(check: Fn) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check(lambda a, *_: torch.randn(a.shape))
    assert torch.equal(torch.get_rng_state(), before)
