"""What tasks do to pictures, against plain formulas, other libraries and counts."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minildm import EmojiDataset
from minildm.data.corruptions import (
    MASKS,
    blur,
    boxed_middle,
    draw_masks,
    enlarge,
    jpeg,
    mean_fill,
    shrink,
    spoiled,
    strokes,
    to_segments,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return EmojiDataset("val", 64, subgroups=("food-fruit",)).images[:6].float() / 127.5 - 1


def test_shrinking_is_pillow_s_bicubic(x: Tensor) -> None:
    """Pillow's resizing is the antialiased bicubic that papers use; on floats it rounds nothing."""
    for picture, small in zip(x.flatten(0, 1), shrink(x, 4).flatten(0, 1), strict=True):
        theirs = Image.fromarray(picture.numpy()).resize((16, 16), Image.Resampling.BICUBIC)
        assert np.abs(small.numpy() - np.asarray(theirs).clip(-1, 1)).max() < 1e-5


def test_shrinking_refuses_what_does_not_divide(x: Tensor) -> None:
    with pytest.raises(ValueError, match="factor=5 must divide the sides"):
        shrink(x, 5)
    flat = torch.full((1, 3, 8, 8), 0.3)
    assert torch.allclose(enlarge(shrink(flat, 4), 4), flat, atol=1e-6)


def test_a_blur_has_its_sigma() -> None:
    """A point becomes a Gaussian: its variance is sigma^2, in x and in y."""
    x, sigma = torch.zeros(3, 3, 33, 33, dtype=torch.float64), torch.tensor([0.0, 1.0, 2.5])
    x[:, :, 16, 16] = 1
    out = blur(x, sigma.double())
    off = torch.arange(33, dtype=torch.float64) - 16
    assert torch.allclose(out.sum((2, 3)), torch.ones(3, 3, dtype=torch.float64))
    for axis in (2, 3):
        spread = (out.sum(axis) * off**2).sum(-1)
        assert torch.allclose(spread, (sigma.double() ** 2)[:, None].expand(3, 3), rtol=0.05)
    assert torch.equal(out[0], x[0])


def test_jpeg_is_pillow_s_and_loses_more_at_low_quality(x: Tensor) -> None:
    loss = [(jpeg(x, [q] * len(x)) - x).square().mean() for q in (20, 60, 95)]
    assert loss[0] > loss[1] > loss[2] > 0
    assert jpeg(x, [95] * len(x)).shape == x.shape


def test_spoiled_pictures_are_further_off_and_follow_the_generator(x: Tensor) -> None:
    clean, one = shrink(x, 4), spoiled(x, 4, seeded())
    assert one.shape == clean.shape and one.abs().max() <= 1
    assert torch.equal(one, spoiled(x, 4, seeded()))
    assert not torch.equal(one, spoiled(x, 4, seeded(1)))
    assert ((one - clean).square().mean((1, 2, 3)) > 1e-4).all()


# --- masks ---


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
def test_masks_are_binary_and_their_generator_s(kind: str, size: tuple[int, int]) -> None:
    masks = MASKS[kind](50, size, seeded())
    assert masks.shape == (50, 1, *size) and ((masks == 0) | (masks == 1)).all()
    assert torch.equal(masks, MASKS[kind](50, size, seeded()))
    assert len({tuple(m.flatten().tolist()) for m in masks}) > (3 if kind == "halves" else 45)


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("strokes", 0.1, 0.5), ("boxes", 0.1, 0.4), ("halves", 0.5, 0.5)]
)
def test_holes_are_about_as_large_as_meant(kind: str, low: float, high: float) -> None:
    hole = 1 - MASKS[kind](500, (64, 64), seeded()).mean((1, 2, 3))
    assert low <= float(hole.mean()) <= high
    assert hole.amax() < 0.95


def test_every_drawn_mask_knows_something_and_hides_something() -> None:
    masks = draw_masks(("lama", "halves"), 2000, (32, 32), seeded())
    share = masks.mean((1, 2, 3))
    assert share.amin() > 0 and share.amax() < 1
    halves = (share == 0.5).float().mean()
    assert 0.45 < halves < 0.56  # one half of them, and few others by chance


def test_a_mask_of_nothing_gets_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(n: int, size: tuple[int, int], generator: Any = None) -> Tensor:
        return torch.ones(n, 1, *size)

    monkeypatch.setitem(MASKS, "nothing", nothing)
    masks = draw_masks(("nothing",), 3, (8, 8))
    assert torch.equal(masks, boxed_middle((8, 8)).expand(3, 1, 8, 8))
    assert masks.sum() == 3 * (64 - 16)


def test_distances_to_segments_are_those_of_the_formula() -> None:
    a, b = torch.tensor([[0.2, 0.3]]), torch.tensor([[0.8, 0.3]])
    far = to_segments(a, b, (10, 20))[0]
    assert far.shape == (10, 20)
    y, x = (torch.arange(10) + 0.5) / 10, (torch.arange(20) + 0.5) / 20
    beyond = (x[None] - x[None].clamp(0.2, 0.8)) ** 2
    assert torch.allclose(far, ((y[:, None] - 0.3) ** 2 + beyond).sqrt(), atol=1e-6)


def test_strokes_are_connected_lines_of_their_width() -> None:
    """Each pixel of a hole lies within reach of the path: holes are no single pixels."""
    mask = strokes(20, (64, 64), seeded())
    hole = 1 - mask
    neighbours = torch.nn.functional.max_pool2d(-hole, 3, 1, 1).neg()  # 1 where all nine are holes
    assert (neighbours.sum((1, 2, 3)) > 0.3 * hole.sum((1, 2, 3))).all()


def test_unknown_masks_are_refused() -> None:
    for kinds in ((), ("lama", "stars")):
        with pytest.raises(ValueError, match="must be some of lama, strokes, boxes, halves"):
            draw_masks(kinds, 2, (8, 8))


def test_the_mean_fills_holes_alone() -> None:
    x = torch.arange(12.0).view(1, 3, 2, 2)
    mask = torch.tensor([[[[1.0, 1.0], [1.0, 0.0]]]])
    filled = mean_fill(x, mask)
    assert torch.equal(filled[..., 1, 1], x.flatten(2)[..., :3].mean(-1))
    assert torch.equal(filled * mask, x * mask)
