"""Flips, styles, inputs of tasks and masks against plain formulas, Pillow and counts."""

import numpy as np
import pytest
import torch
from helpers import randn
from PIL import Image
from torch import Tensor

from minildm.data.scenes import ScenesDataset
from minildm.data.transforms import (
    MASKS,
    draw_masks,
    enlarge,
    mean_fill,
    mirrored,
    shrink,
    style_caption,
    task_inputs,
    with_styles,
)
from minildm.layers import BatchRandom


def rng(seed: int = 0, rank: int = 0, world: int = 1) -> BatchRandom:
    return BatchRandom(torch.Generator().manual_seed(seed), rank, world)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.stack([item["image"] for item in ScenesDataset("val", 64, n=6)])


def test_boxes_move_with_their_pixels_where_chosen() -> None:
    boxes = torch.tensor([[[1, 2, 4, 9], [5, 0, 10, 2], [0, 0, 0, 0]]]).repeat(2, 1, 1) / 10
    maps, classes = torch.full((2, 10, 10), 7), torch.tensor([[0, 1, -1]] * 2)
    maps[:, 2:9, 1:4], maps[:, 0:2, 5:10] = 0, 1  # each box is filled with its class
    batch = {"image": maps[:, None].float(), "semantic": maps, "boxes": boxes, "classes": classes}
    out = mirrored(batch, torch.tensor([True, False]))
    assert torch.equal(out["semantic"], torch.stack([maps[0].flip(-1), maps[1]]))
    assert torch.equal(out["image"][:, 0].long(), out["semantic"]) and not out["boxes"][:, 2].any()
    for i, k in ((0, 0), (0, 1), (1, 0), (1, 1)):
        x0, y0, x1, y1 = (10 * out["boxes"][i, k]).round().int().tolist()
        assert (out["semantic"][i, y0:y1, x0:x1] == k).all()
        assert (x1 - x0) * (y1 - y0) == (maps == k).sum() / 2


def test_styles_are_named_in_their_share_of_the_captions() -> None:
    n, share = 4000, 0.3
    styled = [style_caption("a dog", style) for style in ("flat", "round")] * (n // 2)
    captions = with_styles({"caption": ["a dog"] * n, "styled": styled}, share, rng())["caption"]
    assert set(captions[::2]) == {"a dog", "a dog, flat style"}  # each its own style
    assert set(captions[1::2]) == {"a dog", "a dog, round style"}
    named = sum(caption != "a dog" for caption in captions) / n
    assert abs(named - share) < 4 * (share * (1 - share) / n) ** 0.5


def test_a_task_gets_its_input() -> None:
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    x, batch = pixels.float() / 127.5 - 1, {"image": pixels, "semantic": pixels[:, 0]}

    def made(kind: str) -> dict[str, Tensor]:
        return task_inputs(batch, kind, 2, rng(), masks=("boxes",))

    assert torch.equal(made("low_res")["low_res"], shrink(x, 2)) and len(made("low_res")) == 1
    assert torch.equal(made("inpaint")["image"], x)
    assert torch.equal(made("inpaint")["mask"], MASKS["boxes"](4, (8, 8), rng()))
    assert made("semantic")["semantic"].dtype == torch.int64 and not made("class")


def test_shrinking_is_pillows_bicubic(x: Tensor) -> None:
    """On floats Pillow rounds nothing."""
    for image, small in zip(x.flatten(0, 1), shrink(x, 4).flatten(0, 1), strict=True):
        theirs = Image.fromarray(image.numpy()).resize((16, 16), Image.Resampling.BICUBIC)
        assert np.abs(small.numpy() - np.asarray(theirs).clip(-1, 1)).max() < 1e-5
    flat = torch.full((1, 3, 8, 8), 0.3)
    assert torch.allclose(enlarge(shrink(flat, 4), 4), flat, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("lama", 0.1, 0.5), ("strokes", 0.1, 0.5), ("boxes", 0.1, 0.4), ("halves", 0.5, 0.5)],
)
def test_masks_are_binary_of_their_size_and_follow_the_generator(
    kind: str, low: float, high: float
) -> None:
    size = 32, 80
    masks = MASKS[kind](100, size, rng())
    assert masks.shape == (100, 1, *size) and ((masks == 0) | (masks == 1)).all()
    parts = [MASKS[kind](50, size, rng(0, rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat(parts), masks)  # two processes
    assert len(masks.flatten(1).unique(dim=0)) >= (4 if kind == "halves" else 90)
    hole = 1 - masks.mean((1, 2, 3))
    assert low <= float(hole.mean()) <= high and hole.amax() < 0.95


def test_each_image_has_a_mask_of_one_kind_with_known_pixels_and_a_hole() -> None:
    share = draw_masks(("lama", "halves"), 1000, (16, 16), rng()).mean((1, 2, 3))
    assert share.amin() > 0 and share.amax() < 1
    assert 0.45 < (share == 0.5).float().mean() < 0.56  # halves, and a few others by chance


def test_the_mean_fills_holes_alone() -> None:
    x, mask = randn(1, 3, 2, 2), torch.tensor([[[[1.0, 1.0], [1.0, 0.0]]]])
    filled = mean_fill(x, mask)
    assert torch.allclose(filled[..., 1, 1], x.flatten(2)[..., :3].mean(-1))
    assert torch.equal(filled * mask, x * mask)
