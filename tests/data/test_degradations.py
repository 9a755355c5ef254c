"""Degradations and masks against plain formulas, Pillow and counts."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers import randn
from PIL import Image
from torch import Tensor

from minildm.data.scenes import ScenesDataset
from minildm.data.transforms import (
    MASKS,
    blur,
    centre_mask,
    degraded,
    draw_masks,
    enlarge,
    mean_fill,
    shrink,
    to_segments,
)
from minildm.layers import BatchRandom


def rng(seed: int = 0, rank: int = 0, world: int = 1) -> BatchRandom:
    return BatchRandom(torch.Generator().manual_seed(seed), rank, world)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.stack([item["image"] for item in ScenesDataset("val", 64, n=6)])


def test_shrinking_is_pillows_bicubic(x: Tensor) -> None:
    """On floats Pillow rounds nothing."""
    for image, small in zip(x.flatten(0, 1), shrink(x, 4).flatten(0, 1), strict=True):
        theirs = Image.fromarray(image.numpy()).resize((16, 16), Image.Resampling.BICUBIC)
        assert np.abs(small.numpy() - np.asarray(theirs).clip(-1, 1)).max() < 1e-5
    flat = torch.full((1, 3, 8, 8), 0.3)
    assert torch.allclose(enlarge(shrink(flat, 4), 4), flat, atol=1e-6)
    with pytest.raises(ValueError, match="factor=5 must divide the sides"):
        shrink(x, 5)


def test_a_blur_has_its_sigma() -> None:
    """A point becomes a Gaussian: its variance is sigma^2, in x and in y."""
    x, sigma = (
        torch.zeros(3, 3, 33, 33, dtype=torch.float64),
        torch.tensor([0.0, 1.0, 2.5]).double(),
    )
    x[:, :, 16, 16] = 1
    out = blur(x, sigma, widest=2.5)
    off = torch.arange(33, dtype=torch.float64) - 16
    assert torch.allclose(out.sum((2, 3)), torch.ones(3, 3, dtype=torch.float64))
    for axis in (2, 3):
        spread = (out.sum(axis) * off**2).sum(-1)
        assert torch.allclose(spread, (sigma**2)[:, None].expand(3, 3), rtol=0.05)
    assert torch.equal(out[0], x[0])


def test_degraded_images_are_further_off_and_follow_the_generator(x: Tensor) -> None:
    clean, one = shrink(x, 4), degraded(x, 4, rng())
    assert one.shape == clean.shape and one.abs().max() <= 1
    assert torch.equal(one, degraded(x, 4, rng())) and not torch.equal(one, degraded(x, 4, rng(1)))
    assert ((one - clean).square().mean((1, 2, 3)) > 1e-4).all()
    halves = [degraded(part, 4, rng(0, rank, 2)) for rank, part in enumerate(x.chunk(2))]
    assert torch.equal(torch.cat(halves), one)  # two processes


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
def test_masks_are_binary_and_follow_the_generator(kind: str, size: tuple[int, int]) -> None:
    masks = MASKS[kind](50, size, rng())
    assert masks.shape == (50, 1, *size) and ((masks == 0) | (masks == 1)).all()
    parts = [MASKS[kind](25, size, rng(0, rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat(parts), masks)  # two processes
    assert len({tuple(m.flatten().tolist()) for m in masks}) > (3 if kind == "halves" else 45)


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("strokes", 0.1, 0.5), ("boxes", 0.1, 0.4), ("halves", 0.5, 0.5)]
)
def test_holes_have_their_size(kind: str, low: float, high: float) -> None:
    hole = 1 - MASKS[kind](300, (32, 32), rng()).mean((1, 2, 3))
    assert low <= float(hole.mean()) <= high and hole.amax() < 0.95


def test_every_mask_has_known_pixels_and_a_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    share = draw_masks(("lama", "halves"), 1000, (32, 32), rng()).mean((1, 2, 3))
    assert share.amin() > 0 and share.amax() < 1
    assert 0.45 < (share == 0.5).float().mean() < 0.56  # halves, and a few others by chance

    def nothing(n: int, size: tuple[int, int], rng: Any) -> Tensor:
        return torch.ones(n, 1, *size)

    monkeypatch.setitem(MASKS, "nothing", nothing)
    masks = draw_masks(("nothing",), 3, (8, 8), rng())
    assert torch.equal(masks, centre_mask((8, 8)).expand(3, 1, 8, 8))
    assert masks.sum() == 3 * (64 - 16)


def test_distances_to_segments_are_those_of_the_formula() -> None:
    a, b = torch.tensor([[0.2, 0.3]]), torch.tensor([[0.8, 0.3]])
    y, x = (torch.arange(10) + 0.5) / 10, (torch.arange(20) + 0.5) / 20
    beyond = (x[None] - x[None].clamp(0.2, 0.8)) ** 2
    exact = ((y[:, None] - 0.3) ** 2 + beyond).sqrt()
    assert torch.allclose(to_segments(a, b, (10, 20))[0], exact, atol=1e-6)


def test_the_mean_fills_holes_alone() -> None:
    x, mask = randn(1, 3, 2, 2), torch.tensor([[[[1.0, 1.0], [1.0, 0.0]]]])
    filled = mean_fill(x, mask)
    assert torch.allclose(filled[..., 1, 1], x.flatten(2)[..., :3].mean(-1))
    assert torch.equal(filled * mask, x * mask)
