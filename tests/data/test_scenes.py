"""Scenes and their crops: what an item says of its image is true of the pixels."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randn
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
    MIN_HEIGHT,
    CropsDataset,
    ScenesDataset,
    crop,
    draw_layout,
    empty_box,
    listed,
    overlap,
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
    canvas, semantic = np.zeros((size, size, 3), np.float32), np.zeros((size, size), np.uint8)
    paint_object(canvas, semantic, placed, sprites(STYLES[style])[placed.kind], np.ones(3))
    return semantic > 0


def test_maps_show_the_named_objects_in_their_boxes(scenes: list[dict[str, Any]]) -> None:
    for item in scenes:
        sky, ground = divmod(int(item["label"]), len(GROUNDS))
        named = {sky, len(SKIES) + ground} | {len(BACKGROUNDS) + k for k, _ in objects(item)}
        assert set(item["semantic"].unique().tolist()) == named and int(item["group"]) == ground
        inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        for kind, box in objects(item):
            x0, y0, x1, y1 = (round(v * SIZE) for v in box)
            inside[y0:y1, x0:x1] |= item["semantic"][y0:y1, x0:x1] == len(BACKGROUNDS) + kind
        assert torch.equal(inside, item["semantic"] >= len(BACKGROUNDS))
        n, boxes = len(objects(item)), item["boxes"]  # then padding
        assert 2 <= n <= 4 and (item["classes"][n:] == -1).all() and not boxes[n:].any()
        assert (boxes[:n, 3] - boxes[:n, 1] >= MIN_HEIGHT - 1e-6).all()


def test_drawings_fill_their_boxes_and_a_quarter_of_each_is_visible(layouts: list[Layout]) -> None:
    for layout in layouts[:60]:
        free = np.ones((256, 256), bool)
        for placed in reversed(layout.objects):  # the nearest first
            mask = alpha_of(placed, layout.style, 256)
            rows, columns = np.nonzero(mask)
            seen = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert np.abs(np.array(seen) - np.array(placed.box) * 256).max() < 6
            assert (mask & free).sum() >= 0.25 * mask.sum()
            free &= ~mask


def test_captions_name_every_object_the_ground_and_the_sky(scenes: list[dict[str, Any]]) -> None:
    for item in scenes:
        sky, ground = divmod(int(item["label"]), len(GROUNDS))
        where = "a road" if GROUNDS[ground] == "road" else GROUNDS[ground]
        assert f" on {where} under a {SKIES[sky]} sky" in item["caption"]
        for kind, n in Counter(KINDS[kind] for kind, _ in objects(item)).items():
            assert listed([kind] * n) in item["caption"]
    named = {kind.name: kind for kind in KINDS}
    for names, words in (
        ("house person mushroom", "a house, a person and a mushroom"),
        ("elephant sheep sheep sheep", "an elephant and three sheep"),
        ("person moon person", "two people and the moon"),
    ):
        assert listed([named[name] for name in names.split()]) == words


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
        canvas, semantic = np.ones((32, 32, 3), np.float32), np.zeros((32, 32), np.uint8)
        placed = Placed(near=0, kind=3, x=0.125, y=0.125, w=0.75, h=0.75, flip=flip)
        paint_object(canvas, semantic, placed, sprite, np.ones(3))
        assert canvas[..., 0] == pytest.approx(1, abs=0.01)  # red and white contain all the red
        assert ((semantic == len(BACKGROUNDS) + 3) == (canvas[..., 1] < 0.5)).all()
        canvases.append(canvas)
    assert (canvases[0] == canvases[1][:, ::-1]).all() and (canvases[0] != canvases[1]).any()


def test_columns_images_and_maps_are_those_of_the_items() -> None:
    data = ScenesDataset("val", size=16, n=4, styles=("noto", "blob"))
    assert data.images.dtype == data.maps.dtype == torch.uint8
    for i, item in enumerate(data):
        assert torch.equal(data.images[i].float() / 127.5 - 1, item["image"])
        assert torch.equal(data.maps[i].long(), item["semantic"])
        assert data.styles[item["style"]] in ("noto", "blob")
        assert data.classes[item["label"]].startswith(data.groups[item["group"]])


def test_a_plain_background_leaves_the_objects_alone() -> None:
    plain, scenes = (ScenesDataset(size=48, n=4, background=b) for b in ("plain", "scene"))
    for item, whole in zip(plain, scenes, strict=True):
        covered = whole["semantic"] >= len(BACKGROUNDS)
        assert torch.equal(item["image"][:, covered], whole["image"][:, covered])
        assert (item["image"][:, ~covered] == GREY / 127.5 - 1).all() and covered.any()
        assert torch.equal(item["boxes"], whole["boxes"]) and item["caption"] == whole["caption"]


def test_an_item_depends_on_its_arguments_alone_and_the_fingerprint_follows_them() -> None:
    def made(**options: Any) -> ScenesDataset:
        return ScenesDataset(**{"size": 16, "n": 5} | options)

    first, again = made(), made(n=99, styles=tuple(reversed(STYLES)))
    assert all(torch.equal(first[4][k], again[-95][k]) for k in first[4] if k != "caption")
    assert first.fingerprint == made().fingerprint
    changed = [made(**c) for c in ({"seed": 1}, {"split": "val"}, {"styles": ["blob"]})]
    assert not any(torch.equal(first[4]["image"], other[4]["image"]) for other in changed)
    changed += [made(size=17), made(n=4), made(background="plain")]
    assert len({first.fingerprint, *(other.fingerprint for other in changed)}) == 7


def test_a_crop_is_the_content_of_its_box_with_a_margin() -> None:
    x = randn(2, 3, 16, 8)
    boxes = torch.tensor([[0.5, 0.25, 1.0, 0.5], [0.0, 0.0, 0.5, 0.25]])
    cut = crop(x, boxes, side=4, margin=0.0)
    assert torch.allclose(cut[0], x[0, :, 4:8, 4:8], atol=1e-5)
    assert torch.allclose(cut[1], x[1, :, 0:4, 0:4], atol=1e-5)
    ramp = torch.linspace(-1, 1, 8).expand(1, 3, 8, 8)
    cut = crop(ramp, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 16, margin=0.5)  # edges are repeated
    assert torch.equal(cut[..., 0], torch.full((1, 3, 16), -1.0)) and cut.max() == 1


def test_every_object_is_cut_once_and_empty_places_are_empty() -> None:
    scenes = ScenesDataset("val", 64, n=40)
    crops, classes = CropsDataset(scenes), scenes.columns["classes"]
    named = crops.labels < len(OBJECTS)
    assert torch.equal(crops.labels[named], classes[classes >= 0])
    assert 0.8 * len(scenes) < int((~named).sum()) <= len(scenes)
    for item, box, i in zip(crops, crops.boxes, crops.scene_ids.tolist(), strict=True):
        own = crop(scenes[i]["image"][None], box[None])[0]
        assert torch.allclose(item["image"], own, atol=1 / 127)
        empty, style = item["caption"] == "nothing", scenes.styles[scenes.style_ids[i]]
        others = scenes.columns["boxes"][i].tolist() if empty else []
        assert not any(overlap(box, other) for other in others)
        group = "nothing" if empty else "sky" if KINDS[item["label"]].in_sky else "ground"
        assert crops.groups[item["group"]] == group
        assert crops.styles[item["style"]] == ("none" if empty else style)
    assert empty_box(np.random.default_rng(0), torch.tensor([[0.0, 0, 1, 1]])) is None
