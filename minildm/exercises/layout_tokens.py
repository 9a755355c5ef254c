"""Checks of notebook 12: boxes as tokens, and the overlap of two boxes."""

import torch
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function


def check_tokens(fn: object) -> Result:
    """Check `tokens(boxes, classes, grid, n_classes)`: (K, 4) in [0, 1], (K,) -> (K, 3) int64.

    Rows (top-left, bottom-right, class); a class of -1 makes a row of three times "nothing".
    """
    praise = "a corner is a number, a class is a number, and nothing is one, too."
    return check_function(fn, [_tokens(32, 52), _tokens(8, 11), _tokens(90, 3, pads=0)], praise)


def _tokens(grid: int, n_classes: int, pads: int = 2) -> Trial:
    draw = torch.Generator().manual_seed(grid)
    low, size = 0.6 * torch.rand(5, 2, generator=draw), 0.1 + 0.3 * torch.rand(5, 2, generator=draw)
    boxes = torch.cat([low, low + size], dim=1)
    classes = torch.randint(n_classes, (5,), generator=draw)
    boxes[0], classes[0] = torch.tensor([0.0, 0.0, 1.0, 1.0]), n_classes - 1
    boxes[5 - pads :], classes[5 - pads :] = 0.0, -1
    right = _rows(_numbered(boxes, grid), grid**2 + classes, classes, grid**2 + n_classes)
    mistakes = _wrong_corners(boxes, classes, grid, n_classes)
    mistakes |= _wrong_names(boxes, classes, grid, n_classes)
    mistakes = {why: wrong for why, wrong in mistakes.items() if not torch.equal(wrong, right)}
    return Trial((boxes, classes, grid, n_classes), right, mistakes, "its numbers are not (1)'s.")


def _numbered(
    boxes: Tensor,
    grid: int,
    steps: int | None = None,
    across: int = 1,
    down: int | None = None,
    floor: bool = False,
) -> Tensor:
    """The corners' numbers, (1), or what comes of other factors: (K, 2)."""
    places = boxes * (grid - 1 if steps is None else steps)
    places = (places.floor() if floor else places.round()).long()
    return (grid if down is None else down) * places[:, 1::2] + across * places[:, 0::2]


def _rows(numbers: Tensor, names: Tensor, classes: Tensor, pad: int) -> Tensor:
    """(K, 2), (K,) -> (K, 3), with `pad` where there is no box."""
    rows = torch.cat([numbers, names[:, None]], dim=1)
    return torch.where(classes[:, None] < 0, pad, rows)


def _wrong_corners(boxes: Tensor, classes: Tensor, grid: int, n_classes: int) -> dict[str, Tensor]:
    sized = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    wrong = {
        "x and y are swapped: the row counts grid times.": (
            _numbered(boxes, grid, across=grid, down=1)
        ),
        "the coordinates go from 0 to grid − 1, so multiply by that, not by grid.": (
            _numbered(boxes, grid, grid)
        ),
        "a row of the grid has `grid` cells: y counts grid times, not grid − 1 times.": (
            _numbered(boxes, grid, down=grid - 1)
        ),
        "the coordinates are cut off; round them to the nearest line of the grid.": (
            _numbered(boxes, grid, floor=True)
        ),
        "the corners are swapped: top-left comes first.": _numbered(boxes, grid).flip(1),
        "the second number is made of width and height; boxes hold the right bottom corner.": (
            _numbered(sized, grid)
        ),
    }
    nothing = grid**2 + n_classes
    return {why: _rows(w, grid**2 + classes, classes, nothing) for why, w in wrong.items()}


def _wrong_names(boxes: Tensor, classes: Tensor, grid: int, n_classes: int) -> dict[str, Tensor]:
    """Mistakes with classes and pads."""
    numbers, names, nothing = _numbered(boxes, grid), grid**2 + classes, grid**2 + n_classes
    there = (classes >= 0)[:, None]

    def rows(names: Tensor, pad: int = nothing) -> Tensor:
        return _rows(numbers, names, classes, pad)

    return {
        "classes share their numbers with corners here; theirs begin at grid².": rows(classes),
        "the classes begin at grid², not at grid² − 1 or + 1.": rows(names + 1),
        "the classes begin at grid²; grid² − 1 is still a corner.": rows(names - 1),
        "the class comes last: (top-left, bottom-right, class).": (
            torch.where(there, torch.cat([names[:, None], numbers], dim=1), nothing)
        ),
        "pads are left as they are; their three tokens are all grid² + n_classes.": (
            torch.cat([numbers, names[:, None]], dim=1)
        ),
        'only the class of a pad is "nothing"; its corners must be, too.': (
            torch.cat([numbers, torch.where(there, names[:, None], nothing)], dim=1)
        ),
        "pads get −1; the token for nothing is grid² + n_classes.": rows(names, -1),
        "the token for nothing is grid² + n_classes, the first number that is no class.": (
            rows(names, nothing - 1)
        ),
    }


def check_iou(fn: object) -> Result:
    """Check `iou(a, b)`: two lists of xyxy boxes (J, 4) -> their overlaps (J,) in [0, 1]."""
    return check_function(
        fn, [_overlap(both=True), _overlap(both=False)], "that is how boxes are compared."
    )


def _overlap(both: bool) -> Trial:
    """Pairs that overlap; with both=False also pairs that do not, side by side and across."""
    a = [[0.1, 0.2, 0.5, 0.8], [0.0, 0.0, 1.0, 1.0], [0.2, 0.2, 0.4, 0.5], [0.3, 0.1, 0.6, 0.7]]
    b = [[0.3, 0.1, 0.9, 0.6], [0.2, 0.3, 0.5, 0.7], [0.2, 0.2, 0.4, 0.5], [0.4, 0.0, 0.5, 0.9]]
    if not both:  # apart: in x alone, in y alone, and in both
        a += [[0.0, 0.0, 0.2, 0.5], [0.1, 0.6, 0.5, 0.9], [0.0, 0.0, 0.2, 0.2]]
        b += [[0.5, 0.1, 0.9, 0.6], [0.2, 0.1, 0.4, 0.3], [0.6, 0.7, 0.9, 0.9]]
    first, second = torch.tensor(a), torch.tensor(b)
    sides = torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])
    shared = sides.clamp(min=0).prod(dim=1)
    one, other = ((box[:, 2:] - box[:, :2]).prod(dim=1) for box in (first, second))
    right = shared / (one + other - shared)
    hull = torch.maximum(first[:, 2:], second[:, 2:]) - torch.minimum(first[:, :2], second[:, :2])
    mistakes = {
        "the union counts the shared part twice; take it off once.": shared / (one + other),
        "that is the shared area; divide it by the union.": shared,
        "it divides by the first box's area; divide by the union.": shared / one,
        "it divides by the second box's area; divide by the union.": shared / other,
        "it divides by the smaller area; divide by the union.": shared / torch.minimum(one, other),
        "it divides by the larger area; divide by the union.": shared / torch.maximum(one, other),
        "it divides by the box round both; divide by the union of the two.": (
            shared / hull.prod(dim=1)
        ),
        "where boxes are apart, a side is negative; clamp both at 0 before you multiply.": (
            sides.prod(dim=1) / (one + other - sides.prod(dim=1))
        ),
        "clamp the sides, not their product: two negative sides make a positive area.": (
            sides.prod(dim=1).clamp(min=0) / (one + other - sides.prod(dim=1).clamp(min=0))
        ),
        "the sides are not multiplied: areas are width times height.": (
            sides.clamp(min=0).sum(dim=1)
        ),
        "that is the distance, 1 − IoU.": 1 - right,
    }
    mistakes = {why: wrong for why, wrong in mistakes.items() if not torch.allclose(wrong, right)}
    return Trial((first, second), right, mistakes, "its values are not those of (3).")
