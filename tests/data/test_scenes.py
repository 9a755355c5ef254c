"""Scenes: what an item says of its image is true of the pixels."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minildm.data.scene_rendering import (
    BACKGROUNDS,
    GREY,
    GROUNDS,
    KINDS,
    OBJECTS,
    SKIES,
    STYLES,
    Layout,
    Placed,
    paint_object,
    sprites,
)
from minildm.data.scenes import (
    MAX_HIDDEN,
    MIN_HEIGHT,
    ScenesDataset,
    draw_layout,
    listed,
    overlap,
    wide_layout,
    wide_scene,
)

SIZE = 64


@pytest.fixture(scope="module")
def scenes() -> list[dict[str, Any]]:
    return list(ScenesDataset(size=SIZE, n=120))


@pytest.fixture(scope="module")
def layouts() -> list[Layout]:
    return [draw_layout(np.random.default_rng([7, i]), range(len(STYLES))) for i in range(1500)]


def objects(item: dict[str, Any]) -> list[tuple[int, list[float]]]:
    """The item's (class, box) without the padding."""
    pairs = zip(item["classes"].tolist(), item["boxes"].tolist(), strict=True)
    return [(kind, box) for kind, box in pairs if kind >= 0]


def alpha_of(placed: Placed, style: int, size: int) -> np.ndarray:
    """(S, S) bool: where the object alone would be drawn."""
    canvas, semantic = np.zeros((size, size, 3), np.float32), np.zeros((size, size), np.int64)
    paint_object(canvas, semantic, placed, sprites(STYLES[style])[placed.kind], np.ones(3))
    return semantic > 0


def test_the_semantic_map_shows_the_named_objects_in_their_boxes(
    scenes: list[dict[str, Any]],
) -> None:
    for item in scenes:
        sky, ground = divmod(int(item["label"]), len(GROUNDS))
        named = {sky, len(SKIES) + ground} | {len(BACKGROUNDS) + k for k, _ in objects(item)}
        assert set(item["semantic"].unique().tolist()) == named and int(item["group"]) == ground
        inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        for kind, box in objects(item):
            x0, y0, x1, y1 = (round(v * SIZE) for v in box)
            inside[y0:y1, x0:x1] |= item["semantic"][y0:y1, x0:x1] == len(BACKGROUNDS) + kind
        assert torch.equal(inside, item["semantic"] >= len(BACKGROUNDS))


def test_boxes_fit_around_the_drawings_and_pad_with_zeros(
    scenes: list[dict[str, Any]], layouts: list[Layout]
) -> None:
    for item in scenes:
        n, boxes = len(objects(item)), item["boxes"]
        assert 2 <= n <= 4 and (item["classes"][n:] == -1).all() and not boxes[n:].any()
        assert (boxes[:n, 3] - boxes[:n, 1] >= MIN_HEIGHT - 1e-6).all()
    for placed, style in [(p, layout.style) for layout in layouts[:25] for p in layout.objects]:
        rows, columns = np.nonzero(alpha_of(placed, style, 256))
        seen = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert np.abs(np.array(seen) - np.array(placed.box) * 256).max() < 6


def test_at_least_a_quarter_of_each_object_is_visible(layouts: list[Layout]) -> None:
    for layout in layouts[:100]:
        masks = [alpha_of(placed, layout.style, SIZE) for placed in layout.objects]
        for i, mask in enumerate(masks):
            hidden = np.any([np.zeros_like(mask), *masks[i + 1 :]], axis=0)
            assert (mask & ~hidden).sum() >= 0.25 * mask.sum()


def test_an_item_depends_on_its_seed_split_index_and_size_alone() -> None:
    first = ScenesDataset(size=32, n=9)[4]
    torch.manual_seed(1)
    again = ScenesDataset(size=32, n=99)[-95]
    assert all(torch.equal(first[key], again[key]) for key in first if key != "caption")
    changes = ({"seed": 1}, {"split": "val"}, {"styles": ["blob"]})
    for options in changes:
        other = ScenesDataset(**{"size": 32, "n": 9, **options})[4]
        assert not torch.equal(first["image"], other["image"])


def test_captions_name_every_object_the_ground_and_the_sky(scenes: list[dict[str, Any]]) -> None:
    for item in scenes:
        sky, ground = divmod(int(item["label"]), len(GROUNDS))
        before, after = item["caption"].split(f" under a {SKIES[sky]} sky")
        before, where = before.rsplit(" on ", 1)
        assert where.removeprefix("a ") == GROUNDS[ground]
        parts = before.replace(" and ", ", ").split(", ")
        parts += after.removeprefix(" with ").replace(" and ", ", ").split(", ") if after else []
        names = Counter(OBJECTS[kind] for kind, _ in objects(item))
        assert sorted(parts) == sorted(listed([name] * n) for name, n in names.items())
    assert listed(["house", "person", "mushroom"]) == "a house, a person and a mushroom"
    assert listed(["elephant", "sheep", "sheep", "sheep"]) == "an elephant and three sheep"
    assert listed(["person", "moon", "person"]) == "two people and the moon"


def test_objects_are_where_they_belong(layouts: list[Layout]) -> None:
    for layout in layouts:
        kinds = [KINDS[placed.kind] for placed in layout.objects]
        assert any(not kind.in_sky for kind in kinds)
        for placed, kind in zip(layout.objects, kinds, strict=True):
            assert (SKIES[layout.sky] if kind.in_sky else GROUNDS[layout.ground]) in kind.places
            assert (placed.y + placed.h > layout.horizon) != kind.in_sky
            assert kind.many or kinds.count(kind) == 1
    counts = Counter(placed.kind for layout in layouts for placed in layout.objects)
    assert len(counts) == 52 and min(counts.values()) > 10
    house = OBJECTS.index("house")
    placed = [p for layout in layouts for p in layout.objects if p.kind == house]
    foot, height = np.array([(p.y + p.h, p.h) for p in placed]).T
    assert np.corrcoef(foot, height)[0, 1] > 0.7  # nearer is lower and larger


def test_drawings_have_no_dark_fringe_and_are_mirrored() -> None:
    drawing = np.zeros((90, 90, 4), np.uint8)
    drawing[20:70, 10:70] = (255, 0, 0, 255)  # around it, transparent black
    sprite, canvases = Image.fromarray(drawing).convert("RGBa"), []
    for flip in (False, True):
        canvas, semantic = np.ones((32, 32, 3), np.float32), np.zeros((32, 32), np.int64)
        placed = Placed(near=0, kind=3, x=0.125, y=0.125, w=0.75, h=0.75, flip=flip)
        paint_object(canvas, semantic, placed, sprite, np.ones(3))
        assert canvas[..., 0] == pytest.approx(1, abs=0.01)  # red and white contain all the red
        assert ((semantic == len(BACKGROUNDS) + 3) == (canvas[..., 1] < 0.5)).all()
        canvases.append(canvas)
    assert (canvases[0] == canvases[1][:, ::-1]).all() and (canvases[0] != canvases[1]).any()


def test_columns_and_images_are_those_of_the_items() -> None:
    data = ScenesDataset("val", size=16, n=4, styles=("noto", "blob"))
    maps = data.column("semantic")
    assert data.images.dtype == maps.dtype == torch.uint8 and len(data) == len(data.labels) == 4
    for i, item in enumerate(data):
        assert torch.equal(data.images[i].float() / 127.5 - 1, item["image"])
        assert torch.equal(maps[i].long(), item["semantic"])
        assert torch.equal(data.columns["boxes"][i], item["boxes"])
        assert data.captions[i] == item["caption"] and data.labels[i] == item["label"]
        assert data.styles[item["style"]] in ("noto", "blob")
        assert data.classes[item["label"]].startswith(data.groups[item["group"]])


def test_a_plain_background_leaves_the_objects_alone() -> None:
    plain, scenes = (ScenesDataset(size=48, n=4, background=b) for b in ("plain", "scene"))
    for item, whole in zip(plain, scenes, strict=True):
        covered = whole["semantic"] >= len(BACKGROUNDS)
        assert torch.equal(item["image"][:, covered], whole["image"][:, covered])
        assert (item["image"][:, ~covered] == GREY / 127.5 - 1).all() and covered.any()
        assert torch.equal(item["boxes"], whole["boxes"]) and item["caption"] == whole["caption"]


def test_the_fingerprint_follows_the_arguments() -> None:
    def fingerprint(**options: Any) -> str:
        return ScenesDataset(**{"size": 16, "n": 3} | options).fingerprint

    assert fingerprint() == fingerprint() == fingerprint(styles=tuple(reversed(STYLES)))
    changed = ({"size": 17}, {"n": 4}, {"seed": 1}, {"split": "val"}, {"styles": ["noto"]})
    changed += ({"background": "plain"},)
    assert len({fingerprint(), *(fingerprint(**options) for options in changed)}) == 7


def test_wide_scenes_follow_the_rules_of_ordinary_ones() -> None:
    for seed in range(3):
        layout = wide_layout(np.random.default_rng(seed), 4, range(len(STYLES)))
        assert 0.8 * 48 <= len(layout.objects) <= 48  # as dense as ordinary scenes
        boxes = [placed.box for placed in layout.objects]
        for i, placed in enumerate(layout.objects):
            kind, foot = KINDS[placed.kind], placed.y + placed.h
            assert MIN_HEIGHT - 1e-9 <= 4 * placed.h <= 1.12 * kind.height
            assert (foot <= layout.horizon) if kind.in_sky else (foot >= layout.horizon - 1e-9)
            hidden = sum(overlap(boxes[i], nearer) for nearer in boxes[i + 1 :])
            assert hidden <= MAX_HIDDEN * overlap(boxes[i], boxes[i]) + 1e-9
            assert kind.many or sum(p.kind == placed.kind for p in layout.objects) == 1
    item, same, other = wide_scene(3), wide_scene(3), wide_scene(3, seed=1)
    assert item["image"].shape == (3, 256, 256) and item["semantic"].shape == (256, 256)
    assert torch.equal(item["image"], same["image"])
    assert not torch.equal(item["semantic"], other["semantic"])
