"""What training makes of a batch: mirrored boxes, named styles, a task's input."""

import pytest
import torch
from helpers import randn

from minildm.data.scenes import ScenesDataset
from minildm.data.transforms import (
    degrade_for_task,
    mirrored,
    mirrored_boxes,
    random_flips,
    shrink,
    style_caption,
    with_styles,
)
from minildm.layers import BatchRandom


def rng(seed: int = 0) -> BatchRandom:
    return BatchRandom(torch.Generator().manual_seed(seed))


def test_mirrored_boxes_are_where_the_mirrored_image_has_its_objects() -> None:
    """A scene's semantic map says where an object's pixels are; its box must hold them."""
    found = 0
    for item in ScenesDataset("train", 64, n=12):
        batch = {key: item[key][None] for key in ("image", "semantic", "boxes", "classes")}
        out = mirrored(batch, torch.tensor([True]))
        assert torch.equal(out["image"][0], item["image"].flip(-1))
        for box, kind in zip(out["boxes"][0], item["classes"].tolist(), strict=True):
            if kind < 0 or (item["classes"] == kind).sum() > 1:
                continue
            rows, columns = torch.nonzero(out["semantic"][0] == 8 + kind, as_tuple=True)
            left, top, right, bottom = (64 * box).tolist()
            assert left - 1 <= columns.min() and columns.max() <= right + 1
            assert top - 1 <= rows.min() and rows.max() <= bottom + 1
            found += 1
    assert found > 10


def test_only_the_chosen_and_only_real_boxes_move() -> None:
    boxes = torch.tensor([[[0.1, 0.2, 0.4, 0.9], [0.0, 0.0, 0.0, 0.0]]]).repeat(2, 1, 1)
    batch = {"boxes": boxes, "classes": torch.tensor([[3, -1]] * 2), "label": torch.arange(2)}
    chosen = torch.tensor([False, True])
    out = mirrored_boxes(batch, chosen)
    x = randn(400, 1, 1, 2)
    flipped = (random_flips(x, rng()) == x.flip(-1)).flatten(1).all(1)
    assert 160 < int(flipped.sum()) < 240
    assert torch.equal(out["boxes"][0], boxes[0]) and not out["boxes"][1, 1].any()
    assert torch.allclose(out["boxes"][1, 0], torch.tensor([0.6, 0.2, 0.9, 0.9]))
    assert torch.allclose(mirrored_boxes(out, chosen)["boxes"], boxes)
    assert mirrored_boxes({"label": 1}, chosen) == {"label": 1}


@pytest.mark.parametrize("as_bytes", [True, False])
def test_a_task_gets_its_input(as_bytes: bool) -> None:
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    x = pixels.float() / 127.5 - 1
    batch = {"image": pixels if as_bytes else x, "label": torch.arange(4)}

    def made(kind: str, degradation: str = "bicubic") -> dict[str, torch.Tensor]:
        return degrade_for_task(batch, kind, 2, degradation, ("boxes",), rng())

    assert set(made("low_res")) == {"label", "low_res"}
    assert torch.equal(made("low_res")["low_res"], shrink(x, 2))
    assert not torch.equal(made("low_res", "degraded")["low_res"], shrink(x, 2))
    inpaint = made("inpaint")
    assert torch.equal(inpaint["image"], x) and inpaint["mask"].shape == (4, 1, 8, 8)
    assert made("class") is batch
    maps = {"semantic": torch.ones(2, 4, 4, dtype=torch.uint8)}
    out = degrade_for_task(maps, "semantic", 2, "bicubic", (), rng())
    assert out["semantic"].dtype == torch.int64


def test_styles_are_named_in_their_share_of_the_captions() -> None:
    n, share = 4000, 0.3
    batch = {"caption": ["a dog"] * n, "style": torch.arange(n) % 2}
    captions = with_styles(batch, ("flat", "round"), share, rng())["caption"]
    assert set(captions[::2]) == {"a dog", "a dog, flat style"}  # each its own style
    assert set(captions[1::2]) == {"a dog", style_caption("a dog", "round")}
    named = sum(caption != "a dog" for caption in captions) / n
    assert abs(named - share) < 4 * (share * (1 - share) / n) ** 0.5
    assert with_styles(batch, ("flat", "round"), 0.0, rng()) is batch
