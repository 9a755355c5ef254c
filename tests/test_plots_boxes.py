"""Boxes in pictures: lines where the boxes are, one colour each, and clear refusals."""

import pytest
import torch
from matplotlib.colors import to_rgb
from torch import Tensor

from minildm import plots
from minildm.plots import PALETTE

GREY = torch.full((2, 3, 16, 16), 128, dtype=torch.uint8)
BOX = torch.tensor([0.25, 0.5, 0.75, 1.0])
BOXES = torch.stack([torch.stack([BOX, torch.zeros(4)]), torch.stack([BOX / 2, BOX])])
LAYOUTS = {"boxes": BOXES, "classes": torch.tensor([[1, -1], [0, 1]])}


def color(k: int) -> Tensor:
    return torch.tensor([round(255 * part) for part in to_rgb(PALETTE[k])], dtype=torch.uint8)


def test_a_line_of_the_box_s_colour_runs_round_it_and_nothing_else_changes() -> None:
    drawn = plots.boxed(GREY, LAYOUTS, zoom=4)
    assert drawn.shape == (2, 3, 64, 64) and drawn.dtype == torch.uint8
    expected = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    expected[:, 32:64, 16:48] = color(0)[:, None, None]
    expected[:, 34:62, 18:46] = 128  # within the line of two pixels; the pad draws none
    assert torch.equal(drawn[0], expected)


def test_the_second_box_has_the_second_colour() -> None:
    drawn = plots.boxed(GREY, LAYOUTS, zoom=4)[1]
    assert torch.equal(drawn[:, 63, 30], color(1)) and torch.equal(drawn[:, 16, 16], color(0))


def test_names_stand_above_their_boxes_and_within_the_picture() -> None:
    plain = plots.boxed(GREY, LAYOUTS, zoom=8)
    named = plots.boxed(GREY, LAYOUTS, ["duck", "motorcycle"], zoom=8)
    rows, columns = (plain != named)[0].any(dim=0).nonzero().unbind(1)
    assert rows.min() >= 50 and rows.max() <= 66 and columns.min() >= 32
    other = plots.boxed(GREY, LAYOUTS, ["cat", "motorcycle"], zoom=8)
    assert torch.equal(other[0], named[0]) and not torch.equal(other[1], named[1])
    right = {"boxes": torch.tensor([[[0.9, 0.0, 1.0, 0.1]]]), "classes": torch.tensor([[0]])}
    label = plots.boxed(GREY[:1], right, ["motorcycle"], zoom=8)[0]
    is_label = (label == color(0)[:, None, None]).all(dim=0)
    assert is_label[:10, :].any(dim=0).nonzero().min() < 100  # it moved in from the edge


def test_pictures_in_the_unit_range_are_drawn_as_their_bytes() -> None:
    x = GREY.float() / 127.5 - 1
    assert torch.equal(plots.boxed(x, LAYOUTS), plots.boxed(GREY, LAYOUTS))
    none = {"boxes": BOXES, "classes": torch.full((2, 2), -1)}
    assert torch.equal(plots.boxed(x, none, zoom=1), GREY)


def test_an_eighth_box_and_more_start_the_colours_again() -> None:
    many = {"boxes": BOX.expand(1, 9, 4), "classes": torch.zeros(1, 9, dtype=torch.int64)}
    drawn = plots.boxed(GREY[:1], many, ["a"], zoom=4)[0]
    assert torch.equal(drawn[:, 63, 30], color(0))  # the ninth, drawn last


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"boxes": BOXES[:1]}, "boxes"),
        ({"classes": torch.zeros(2, 3)}, "classes"),
        ({"boxes": BOXES[..., :3]}, "boxes"),
    ],
)
def test_other_shapes_are_refused(change: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plots.boxed(GREY, {**LAYOUTS, **change})


def test_a_zoom_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="zoom=0"):
        plots.boxed(GREY, LAYOUTS, zoom=0)
