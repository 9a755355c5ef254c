"""Scenes: whatever an item says of its picture is true of the pixels."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from minildm.data.scenes import (
    BACKGROUNDS,
    GROUNDS,
    IN_SKY,
    KINDS,
    MAX_HIDDEN,
    MIN_HEIGHT,
    OBJECTS,
    PLURALS,
    SKIES,
    STYLES,
    Placed,
    ScenesDataset,
    counted,
    draw_layout,
    fits,
    listed,
    overlap,
    paint_object,
    render,
    sprites,
)

SIZE, N = 64, 200


@pytest.fixture(scope="module")
def scenes() -> list[dict]:
    return list(ScenesDataset(size=SIZE, n=N))


def layouts(count: int) -> list:
    everything = range(len(STYLES))
    return [draw_layout(np.random.default_rng([7, i]), everything) for i in range(count)]


def objects(item: dict) -> list[tuple[int, list[float]]]:
    """The item's (class, box) without the padding."""
    pairs = zip(item["classes"].tolist(), item["boxes"].tolist(), strict=True)
    return [(kind, box) for kind, box in pairs if kind >= 0]


def alpha_of(placed: Placed, style: int, size: int) -> np.ndarray:
    """(S, S) bool: where the object alone would be drawn."""
    canvas, semantic = np.zeros((size, size, 3), np.float32), np.zeros((size, size), np.int64)
    paint_object(canvas, semantic, placed, sprites(STYLES[style])[placed.kind], np.ones(3))
    return semantic > 0


def test_52_objects_drawn_in_every_style() -> None:
    assert len(OBJECTS) == len(set(OBJECTS)) == 52
    for kind in KINDS:
        places = set(kind.where.split())
        assert places <= set(GROUNDS) or places <= set(SKIES)
    for style in STYLES:
        for kind, sprite in zip(KINDS, sprites(style), strict=True):
            opaque = (np.asarray(sprite)[..., 3] > 127).mean()

            assert opaque >= MAX_HIDDEN / (1 - 0.25), (style, kind.name)
            assert kind.height * sprite.width / sprite.height < 0.8, (style, kind.name)


def test_every_place_has_several_objects() -> None:
    for place in (*GROUNDS, *SKIES):
        assert sum(place in kind.where.split() for kind in KINDS) >= 5


def test_an_item_has_the_shapes_and_types_of_the_contract(scenes: list[dict]) -> None:
    item = scenes[0]
    kinds = {key: (tuple(v.shape), v.dtype) for key, v in item.items() if key != "caption"}
    assert kinds == {
        "image": ((3, SIZE, SIZE), torch.float32),
        "boxes": ((4, 4), torch.float32),
        "classes": ((4,), torch.int64),
        "semantic": ((SIZE, SIZE), torch.int64),
        "label": ((), torch.int64),
        "group": ((), torch.int64),
        "style": ((), torch.int64),
    }
    images = torch.stack([item["image"] for item in scenes])
    assert -1 <= images.min() < -0.8
    assert 0.8 < images.max() <= 1


def test_a_batch_is_collated() -> None:
    batch = next(iter(DataLoader(ScenesDataset(size=16, n=5), batch_size=5)))
    assert batch["boxes"].shape == (5, 4, 4)
    assert batch["semantic"].shape == (5, 16, 16)
    assert len(batch["caption"]) == 5


def test_boxes_lie_in_the_picture_and_are_high_enough(scenes: list[dict]) -> None:
    for item in scenes:
        boxes = torch.tensor([box for _, box in objects(item)])
        assert 2 <= len(boxes) <= 4
        assert ((boxes >= 0) & (boxes <= 1)).all()
        assert (boxes[:, 2] > boxes[:, 0]).all()
        assert (boxes[:, 3] - boxes[:, 1] >= MIN_HEIGHT - 1e-6).all()
        assert (item["classes"][len(boxes) :] == -1).all()
        assert (item["boxes"][len(boxes) :] == 0).all()


def test_the_semantic_map_shows_just_what_the_item_names(scenes: list[dict]) -> None:
    for item in scenes:
        sky, ground = divmod(int(item["label"]), len(GROUNDS))
        named = {sky, len(SKIES) + ground} | {len(BACKGROUNDS) + k for k, _ in objects(item)}
        assert set(item["semantic"].unique().tolist()) == named


def test_objects_in_the_semantic_map_lie_in_their_boxes(scenes: list[dict]) -> None:
    for item in scenes:
        inside = torch.zeros(SIZE, SIZE, dtype=torch.int64)
        for kind, box in objects(item):
            x0, y0, x1, y1 = (round(v * SIZE) for v in box)
            mine = item["semantic"][y0:y1, x0:x1] == len(BACKGROUNDS) + kind
            inside[y0:y1, x0:x1] |= mine.long()
            assert mine.any()
        assert torch.equal(inside.bool(), item["semantic"] >= len(BACKGROUNDS))


def test_at_least_a_quarter_of_each_object_can_be_seen() -> None:
    for layout in layouts(150):
        masks = [alpha_of(placed, layout.style, SIZE) for placed in layout.objects]
        for i, mask in enumerate(masks):
            hidden = np.any(masks[i + 1 :], axis=0) if masks[i + 1 :] else np.zeros_like(mask)
            assert (mask & ~hidden).sum() >= 0.25 * mask.sum()


def test_boxes_hide_each_other_up_to_the_limit_only() -> None:
    shares = []
    for layout in layouts(300):
        assert list(layout.objects) == sorted(layout.objects)
        boxes = [placed.box for placed in layout.objects]
        for i, box in enumerate(boxes):
            hidden = sum(overlap(box, nearer) for nearer in boxes[i + 1 :])
            shares.append(hidden / overlap(box, box))
    assert max(shares) <= MAX_HIDDEN + 1e-9
    assert np.mean(np.array(shares) > 0) > 0.1  # it does happen: depth can be learned


def test_overlap_and_fits_in_known_cases() -> None:
    assert overlap((0, 0, 2, 2), (1, 1, 3, 4)) == 1
    assert overlap((0, 0, 1, 1), (1, 0, 2, 1)) == 0
    far = Placed(near=0.6, kind=0, x=0.1, y=0.1, w=0.4, h=0.4, flip=False)
    front = far._replace(near=0.7, x=0.2, y=0.2, w=0.1, h=0.1)
    assert fits(front, [far])  # hides a sixteenth of it
    assert not fits(front._replace(w=0.3, h=0.3), [far])
    assert not fits(front._replace(near=0.5), [far])  # wholly behind it


def test_boxes_fit_tightly_around_the_drawings() -> None:
    size = 256
    for layout in layouts(40):
        for placed in layout.objects:
            rows, columns = np.nonzero(alpha_of(placed, layout.style, size))
            seen = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            assert np.abs(np.array(seen) - np.array(placed.box) * size).max() < 6


def test_another_size_shows_the_same_scene() -> None:
    small, large = ScenesDataset(size=64, n=20), ScenesDataset(size=256, n=20)
    for a, b in zip(small, large, strict=True):
        assert a["caption"] == b["caption"]
        assert torch.equal(a["classes"], b["classes"])
        assert torch.equal(a["boxes"], b["boxes"])
        shrunk = torch.nn.functional.avg_pool2d(b["image"], 4)
        assert (a["image"] - shrunk).abs().mean() < 0.05
        assert (a["semantic"] == b["semantic"][2::4, 2::4]).float().mean() > 0.95


def test_an_item_depends_on_its_seed_split_index_and_size_alone() -> None:
    first = ScenesDataset(size=32, n=9)[4]
    state = torch.get_rng_state()
    np_state = np.random.get_state()[1].copy()  # noqa: NPY002
    torch.manual_seed(1)
    again = ScenesDataset(size=32, n=99)[4]
    torch.set_rng_state(state)
    assert all(torch.equal(first[key], again[key]) for key in first if key != "caption")
    assert first["caption"] == again["caption"]
    assert (np_state == np.random.get_state()[1]).all()  # noqa: NPY002
    others = (
        ScenesDataset(size=32, n=9)[5],
        ScenesDataset(size=32, n=9, seed=1)[4],
        ScenesDataset("val", size=32, n=9)[4],
    )
    assert not any(torch.equal(first["image"], other["image"]) for other in others)


def test_indices_count_from_both_ends() -> None:
    data = ScenesDataset(size=16, n=3)
    assert len(data) == len(list(data)) == 3
    assert torch.equal(data[-1]["image"], data[2]["image"])
    with pytest.raises(IndexError):
        data[3]


def test_captions_name_every_object_the_ground_and_the_sky(scenes: list[dict]) -> None:
    for item in scenes:
        sky, ground = divmod(int(item["label"]), len(GROUNDS))
        assert int(item["group"]) == ground
        caption = item["caption"]
        assert f" under a {SKIES[sky]} sky" in caption
        before, after = caption.split(f" under a {SKIES[sky]} sky")
        before, where = before.rsplit(" on ", 1)
        assert where.removeprefix("a ") == GROUNDS[ground]
        parts = [*before.replace(" and ", ", ").split(", ")]
        parts += after.removeprefix(" with ").replace(" and ", ", ").split(", ") if after else []
        names = Counter(OBJECTS[kind] for kind, _ in objects(item))
        assert sorted(parts) == sorted(counted(name, number) for name, number in names.items())


def test_captions_read_like_english() -> None:
    assert listed(["dog"]) == "a dog"
    assert listed(["house", "person", "mushroom"]) == "a house, a person and a mushroom"
    assert listed(["elephant", "sheep", "sheep", "sheep"]) == "an elephant and three sheep"
    assert listed(["person", "moon", "person"]) == "two people and the moon"
    assert counted("sun", 1) == "the sun"
    assert set(PLURALS) <= set(OBJECTS)
    assert not any(name.endswith(("s", "ch", "y", "man")) for name in set(OBJECTS) - set(PLURALS))


def test_objects_stand_and_hang_where_they_belong() -> None:
    for layout in layouts(300):
        names = [OBJECTS[placed.kind] for placed in layout.objects]
        assert any(name not in IN_SKY for name in names)
        assert names.count("sun") <= 1
        assert names.count("moon") <= 1
        for placed, name in zip(layout.objects, names, strict=True):
            place = SKIES[layout.sky] if name in IN_SKY else GROUNDS[layout.ground]
            assert place in KINDS[placed.kind].where.split()
            below = placed.y + placed.h > layout.horizon
            assert below == (name not in IN_SKY)


def test_every_class_style_and_background_comes_up() -> None:
    seen = layouts(2000)
    counts = Counter(placed.kind for layout in seen for placed in layout.objects)
    assert len(counts) == 52
    assert min(counts.values()) > 15
    assert len({(layout.sky, layout.ground, layout.style) for layout in seen}) == 3 * 5 * 5
    assert {len(layout.objects) for layout in seen} == {2, 3, 4}
    flipped = np.mean([placed.flip for layout in seen for placed in layout.objects])
    assert 0.4 < flipped < 0.6


def test_nearer_is_lower_and_larger() -> None:
    house = OBJECTS.index("house")
    placed = [p for layout in layouts(2000) for p in layout.objects if p.kind == house]
    foot, height = np.array([(p.y + p.h, p.h) for p in placed]).T
    assert np.corrcoef(foot, height)[0, 1] > 0.7


def test_styles_can_be_chosen() -> None:
    data = ScenesDataset(size=16, n=30, styles=("blob", "noto"))
    assert {STYLES[int(item["style"])] for item in data} == {"blob", "noto"}
    assert data.styles == STYLES


def test_drawings_leave_no_dark_fringe() -> None:
    """Colours are mixed by alpha: what is transparent has no say in them."""
    disc = np.zeros((90, 90, 4), np.uint8)
    disc[20:70, 20:70] = (255, 0, 0, 255)  # around it, transparent black
    sprite = Image.fromarray(disc).convert("RGBa")
    canvas, semantic = np.ones((32, 32, 3), np.float32), np.zeros((32, 32), np.int64)
    placed = Placed(near=0, kind=3, x=0.1, y=0.1, w=0.71, h=0.71, flip=False)
    paint_object(canvas, semantic, placed, sprite, np.ones(3))
    assert canvas[..., 0] == pytest.approx(1, abs=0.01)  # red and white alike hold all the red
    assert canvas[16, 16].tolist() == pytest.approx([1, 0, 0], abs=0.01)
    assert ((semantic == len(BACKGROUNDS) + 3) == (canvas[..., 1] < 0.5)).all()


def test_an_object_is_cut_at_the_pictures_edge() -> None:
    sprite = Image.new("RGBA", (10, 10), "red").convert("RGBa")
    canvas, semantic = np.zeros((10, 10, 3), np.float32), np.zeros((10, 10), np.int64)
    for x, y in ((-0.2, 0.8), (0.8, -0.2)):
        placed = Placed(near=0, kind=0, x=x, y=y, w=0.4, h=0.4, flip=False)
        paint_object(canvas, semantic, placed, sprite, np.ones(3))
    assert semantic[8:, :2].all()
    assert semantic[:2, 8:].all()
    assert (semantic > 0).sum() == 8


def test_a_flip_mirrors_the_drawing() -> None:
    layout = layouts(1)[0]
    pictures = []
    for flip in (False, True):
        placed = layout.objects[0]._replace(x=0.25, y=0.25, w=0.5, h=0.5, flip=flip)
        canvas, semantic = np.zeros((32, 32, 3), np.float32), np.zeros((32, 32), np.int64)
        paint_object(canvas, semantic, placed, sprites("noto")[placed.kind], np.ones(3))
        pictures.append(canvas)
    assert np.abs(pictures[0] - pictures[1][:, ::-1]).max() == 0
    assert np.abs(pictures[0] - pictures[1]).max() > 0


def test_nights_are_darker_than_days() -> None:
    layout = layouts(1)[0]
    day, night = (
        render(layout._replace(sky=SKIES.index(sky)), np.random.default_rng(0), 32)[0].mean()
        for sky in ("day", "night")
    )
    assert night < 0.6 * day


@pytest.mark.parametrize("size", [1, 2, 7, 33])
def test_any_size_works(size: int) -> None:
    for item in ScenesDataset(size=size, n=10):
        assert item["image"].shape == (3, size, size)
        assert item["semantic"].shape == (size, size)


def test_images_are_the_items_pictures() -> None:
    data = ScenesDataset(size=16, n=4)
    assert data.images.dtype == torch.uint8
    for i, item in enumerate(data):
        assert torch.equal(data.images[i].float() / 127.5 - 1, item["image"])


def test_names_are_there_for_every_number() -> None:
    data = ScenesDataset("val", size=16, n=1)
    assert data.name == "scenes-val"
    assert len(data.classes) == len(set(data.classes)) == len(SKIES) * len(GROUNDS)
    assert data.classes[7] == "snow, night"  # 1 * 5 + 2
    assert data.groups == GROUNDS
    assert data.semantic_classes == (*BACKGROUNDS, *data.objects)
    assert len(BACKGROUNDS) == 8


def test_the_fingerprint_follows_the_arguments() -> None:
    def fingerprint(**options) -> str:
        return ScenesDataset(**{"size": 16, "n": 3} | options).fingerprint

    assert fingerprint() == fingerprint() == fingerprint(styles=reversed(STYLES))
    changed = ({"size": 17}, {"n": 4}, {"seed": 1}, {"split": "val"}, {"styles": ["noto"]})
    assert len({fingerprint(), *(fingerprint(**options) for options in changed)}) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split='test' must be one of"),
        ({"size": 0}, "size=0 must be at least 1"),
        ({"n": 0}, "n=0 must be at least 1"),
        ({"n": -3}, "n=-3 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"styles": ["noto", "oil"]}, r"styles=\('noto', 'oil'\) must be some of"),
        ({"styles": []}, r"styles=\(\) must be some of"),
    ],
)
def test_bad_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScenesDataset(**options)
