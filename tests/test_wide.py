"""Wide scenes: an ordinary scene's objects, as large as there, on a larger picture."""

import numpy as np
import pytest
import torch

from minildm.data.scenes import (
    BACKGROUNDS,
    GROUNDS,
    IN_SKY,
    KINDS,
    MAX_HIDDEN,
    OBJECTS,
    ONLY_ONE,
    SKIES,
    STYLES,
    overlap,
)
from minildm.data.wide import EACH, wide_layout, wide_scene


def layouts(ratio: int, count: int = 6) -> list:
    everything = range(len(STYLES))
    return [wide_layout(np.random.default_rng(i), ratio, everything) for i in range(count)]


def test_objects_have_as_many_pixels_as_in_an_ordinary_scene() -> None:
    """At a ratio, an object's height is that share of what place draws: .55 to 1.12 of nearest."""
    for ratio in (1, 4):
        for layout in layouts(ratio):
            for placed in layout.objects:
                kind = KINDS[placed.kind]
                assert ratio * placed.h + 1e-9 >= 0.19 and ratio * placed.h <= 1.12 * kind.height
                allowed = kind.where.split()
                assert {SKIES[layout.sky], GROUNDS[layout.ground]} & set(allowed)


def test_a_wide_scene_is_as_full_and_keeps_the_rules() -> None:
    for layout in layouts(4):
        assert 0.8 * EACH * 16 <= len(layout.objects) <= EACH * 16
        boxes = [placed.box for placed in layout.objects]  # from far to near
        for i, box in enumerate(boxes):
            hidden = sum(overlap(box, nearer) for nearer in boxes[i + 1 :])
            assert hidden <= MAX_HIDDEN * overlap(box, box) + 1e-9
        names = [OBJECTS[placed.kind] for placed in layout.objects]
        assert all(names.count(name) <= 1 for name in ONLY_ONE)
        assert 0.1 < sum(name in IN_SKY for name in names) / len(names) < 0.5
        for name, placed in zip(names, layout.objects, strict=True):
            foot = placed.y + placed.h
            assert foot <= layout.horizon if name in IN_SKY else foot >= layout.horizon - 1e-9


def test_picture_and_map_agree_and_follow_the_number_and_seed() -> None:
    item, same, other = wide_scene(3), wide_scene(3), wide_scene(3, seed=1)
    assert item["image"].shape == (3, 256, 256) and item["semantic"].shape == (256, 256)
    assert item["image"].abs().max() <= 1 and item["semantic"].dtype == torch.int64
    assert torch.equal(item["image"], same["image"])
    assert not torch.equal(item["semantic"], other["semantic"])
    labels = item["semantic"].unique()
    assert int((labels < len(BACKGROUNDS)).sum()) == 2 and len(labels) > 8


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="size=250 must be a multiple of ratio=4"):
        wide_scene(0, 250)
    with pytest.raises(ValueError, match="ratio=0"):
        wide_scene(0, ratio=0)
    with pytest.raises(ValueError, match="i=-1"):
        wide_scene(-1)
