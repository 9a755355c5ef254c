"""The embedded photographs: the table, the licences, the split, the crops, the errors."""

import csv
import importlib.util
import pickle
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, default_collate

import minildm
from minildm.data import photos as module
from minildm.data.photos import PhotoDataset, crop_box, detail, load_photo, photo_table

FOLDER = Path(__file__).resolve().parent.parent / "data/photos"
ALLOWED = {"public-domain", "CC0-1.0", "CC-BY-2.0", "CC-BY-3.0", "CC-BY-4.0"}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder of three photographs of our own making: noise, a flat one, a small one."""
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    pixels = {
        "noise": rng.integers(0, 256, (96, 160, 3), dtype=np.uint8),
        "flat": np.full((96, 96, 3), 90, np.uint8),
        "small": rng.integers(0, 256, (64, 32, 3), dtype=np.uint8),
    }
    header = "file,title,author,source,licence,split,width,height,url\n"
    lines = []
    for name, picture in pixels.items():
        Image.fromarray(picture).save(tmp_path / f"pictures/{name}.webp", lossless=True)
        size = f"{picture.shape[1]},{picture.shape[0]}"
        lines.append(f"{name}.webp,some {name},me,here 1.0,CC0-1.0,train,{size},\n")
    (tmp_path / "photos.csv").write_text(header + "".join(lines))
    return tmp_path


def build() -> ModuleType:
    """data/photos/build.py as a module."""
    spec = importlib.util.spec_from_file_location("photos_build", FOLDER / "build.py")
    loaded = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        spec.loader.exec_module(loaded)
        sys.modules.pop("chosen", None)
    return loaded


# the files


def test_the_table_and_the_files_are_the_same() -> None:
    rows = photo_table()
    assert [row.file for row in rows] == sorted(p.name for p in (FOLDER / "pictures").iterdir())
    for row in rows:
        with Image.open(FOLDER / "pictures" / row.file) as image:
            assert (image.format, image.mode) == ("WEBP", "RGB")
            assert image.size == (row.width, row.height)
        assert row.width % 32 == row.height % 32 == 0
        assert 288 <= min(row.width, row.height) <= 512
        assert all((row.title, row.author, row.source))
        assert re.fullmatch(r"[a-z_]+\.webp", row.file)
        assert not row.url or row.url.startswith("http")
    assert len({row.title for row in rows}) == len(rows)


def test_licences_allow_it_and_none_asks_for_the_same() -> None:
    rows = photo_table()
    assert {row.licence for row in rows} <= ALLOWED
    assert not any(re.search("SA|GPL|GFDL|NC|ND", row.licence) for row in rows)
    assert all(row.licence in build().LICENCES for row in rows)


def test_the_set_stays_small() -> None:
    assert 60 <= len(photo_table()) <= 80
    assert sum(p.stat().st_size for p in (FOLDER / "pictures").iterdir()) <= 3_200_000
    assert (FOLDER / "contact_sheet.webp").stat().st_size < 120_000


def test_no_two_photographs_are_the_same() -> None:
    rows = photo_table()
    small = torch.stack([F.adaptive_avg_pool2d(load_photo(r.name).float(), 8) for r in rows])
    distance = torch.cdist(small.flatten(1), small.flatten(1)) / 192**0.5  # rms grey values
    assert distance.fill_diagonal_(255.0).min() > 10


def test_the_card_counts_what_is_there() -> None:
    card, rows = (FOLDER / "README.md").read_text(), photo_table()
    table = {
        cells[0]: [int(n) for n in cells[1:]]
        for line in re.findall(r"^\| (.+) \|$", card, re.M)
        if (cells := line.split(" | "))[-1].isdigit()
    }
    columns = re.search(r"^\| package \| (.+) \| all \|$", card, re.M)[1].split(" | ")
    counts = Counter((row.source, row.licence) for row in rows)
    for source in {row.source for row in rows}:
        expected = [counts[source, licence] for licence in columns]
        assert table.pop(source) == [*expected, sum(expected)]
    totals = [sum(row.licence == licence for row in rows) for licence in columns]
    assert table == {"all": [*totals, len(rows)]}
    size = sum(p.stat().st_size for p in (FOLDER / "pictures").iterdir())
    splits = Counter(row.split for row in rows)
    assert f"- size: {size:,} bytes" in card
    assert f"# Photographs: {len(rows)} freely" in card
    assert f"photographs: {len(rows)}, of which {splits['train']} are for training and" in card
    assert f"and {splits['val']} for validation" in card
    named = [int(n) for n in re.search(r"By eye: (\d+)\D+(\d+)\D+(\d+)", card).groups()]
    assert sum(named) == len(rows)


def test_the_table_is_what_was_chosen() -> None:
    made, rows = build(), photo_table()
    titles = [t for pictures in made.RESOURCE.values() for t in pictures.values()]
    titles += [single.title for single in made.SINGLE.values()]
    assert sorted(titles) == sorted(row.title for row in rows)
    assert all(row.split == made.split_of(row.file) for row in rows)
    for row in rows:
        single = made.SINGLE.get(row.name)
        if single:
            assert (row.author, row.licence) == (single.author, single.licence)


def test_building_never_enlarges_and_keeps_the_middle() -> None:
    made, rng = build(), np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 256, (400, 650, 3), dtype=np.uint8))
    for short in (288, 320, 384):
        small = made.shrink(wide, short)
        assert small.height == short
        assert small.width % 32 == 0
        assert 0 <= 650 * short / 400 - small.width < 32
        other = ImageOps.mirror(made.shrink(ImageOps.mirror(wide), short))
        assert np.abs(np.asarray(small, int) - np.asarray(other, int)).max() <= 1
    image, encoded = made.encode(Image.new("RGB", (450, 300), "red"))
    assert image.size == (416, 288)
    assert len(encoded) < 48_000


# the split and the whole pictures


def test_splits_share_no_photograph() -> None:
    train, val = ({row.file for row in photo_table(split)} for split in ("train", "val"))
    assert not train & val
    assert train | val == {row.file for row in photo_table()}
    assert 0.1 < len(val) / len(train | val) < 0.2
    for split, names in (("train", train), ("val", val)):
        assert {row.file for row in PhotoDataset(split, 32).photographs} == names


def test_a_whole_photograph_is_what_pillow_reads() -> None:
    for name in ("koala", "lute.webp"):
        x, path = load_photo(name), FOLDER / "pictures" / f"{name.removesuffix('.webp')}.webp"
        expected = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
        assert x.dtype == torch.uint8
        assert x.is_contiguous()
        assert np.array_equal(x.numpy(), expected)
    before = load_photo("koala")[:, 0, 0].tolist()
    load_photo("koala").zero_()  # a copy: the kept picture is not the caller's
    assert load_photo("koala")[:, 0, 0].tolist() == before
    assert minildm.load_photo is load_photo


# the crops


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_items(size: int) -> None:
    data = PhotoDataset("val", size, crops=2)
    assert len(data) == 2 * len(photo_table("val")) == len(data.captions) == len(data.labels)
    assert data.images.shape == (len(data), 3, size, size)
    assert data.images.dtype == torch.uint8
    item = data[3]
    assert item["image"].shape == (3, size, size)
    assert item["image"].dtype == torch.float32
    assert torch.equal(item["image"], data.images[3].float() / 127.5 - 1)
    assert item["image"].min() >= -1
    assert item["image"].max() <= 1
    assert item["caption"] == photo_table("val")[1].title
    assert (item["label"], item["group"], item["style"]) == (0, 0, 0)
    assert data.classes == data.groups == data.styles == ("photograph",)
    assert data.photo_ids.tolist()[:4] == [0, 0, 1, 1]
    batch = default_collate([data[0], data[-1]])
    assert batch["image"].shape == (2, 3, size, size)


def lanczos(start: int, stop: int, length: int, size: int) -> np.ndarray:
    """(size, length) float64: the Lanczos-3 weights that reduce [start, stop) to `size`."""
    scale = (stop - start) / size
    centre = start + (np.arange(size)[:, None] + 0.5) * scale
    x = (np.arange(length)[None] + 0.5 - centre) / scale
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [32, 128])
def test_a_crop_is_its_box_reduced(size: int) -> None:
    """Against the formula of the filter in float64, and inside the rim against the cut-out."""
    data = PhotoDataset("val", size, crops=4)
    for i in range(0, len(data), 5):
        row = data.photographs[data.photo_ids[i]]
        left, top, right, bottom = data.box(i)
        assert right - left == bottom - top >= size  # never enlarged
        assert 0 <= left < right <= row.width
        assert 0 <= top < bottom <= row.height
        x, made = load_photo(row.name), data.images[i].numpy().astype(float)
        across, down = lanczos(left, right, row.width, size), lanczos(top, bottom, row.height, size)
        wide = np.clip(x.numpy() @ across.T, 0, 255)  # Pillow rounds and clips between the passes
        assert np.abs(made - np.clip(down @ wide, 0, 255)).max() < 2
        cut = x[:, top:bottom, left:right].permute(1, 2, 0).numpy()
        small = Image.fromarray(cut).resize((size, size), Image.Resampling.LANCZOS)
        inner = np.s_[:, 3:-3, 3:-3]  # at the rim the filter sees what lies around the crop
        assert np.array_equal(made[inner], np.asarray(small).transpose(2, 0, 1)[inner])


def test_sides_are_spread_over_the_octaves() -> None:
    """log(side / size) is uniform between 0 and log(short / size)."""
    boxes = [crop_box(f"a {k}", 900, 512, 32) for k in range(4000)]
    sides = np.array([right - left for left, _, right, _ in boxes])
    octaves = np.histogram(np.log2(sides / 32), bins=4, range=(0, 4))[0]
    assert sides.min() >= 32
    assert sides.max() <= 512
    assert np.all(np.abs(octaves - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5)
    lefts = np.array([left / (900 - (right - left)) for left, _, right, _ in boxes])
    assert abs(lefts.mean() - 0.5) < 5 * (1 / 12 / 4000) ** 0.5
    assert crop_box("a 0", 512, 512, 512) == (0, 0, 512, 512)


def test_crops_are_fixed_by_their_number() -> None:
    first, again = PhotoDataset("val", 32), PhotoDataset("val", 32)
    order = list(reversed(range(len(first))))
    backwards = torch.stack([again[i]["image"] for i in order])[order]
    assert torch.equal(backwards, first.images.float() / 127.5 - 1)
    more = PhotoDataset("val", 32, crops=first.crops + 3)
    kept = [p * more.crops + k for p in range(11) for k in range(first.crops)]
    assert torch.equal(more.images[kept], first.images)
    copied = pickle.loads(pickle.dumps(PhotoDataset("val", 32)))
    assert torch.equal(copied[5]["image"], first[5]["image"])
    batch = next(iter(DataLoader(again, batch_size=7, num_workers=0)))
    assert torch.equal(batch["image"], torch.stack([first[i]["image"] for i in range(7)]))


def test_the_first_crops_are_these() -> None:
    """Recorded once: a change of the drawing is a change of the data, and must say so."""
    data = PhotoDataset("val", 64)
    boxes = [(661, 125, 829, 293), (412, 30, 874, 492), (218, 63, 648, 493)]
    assert [data.box(i) for i in range(3)] == boxes


def test_crops_differ_and_none_is_mirrored() -> None:
    data = PhotoDataset("train", 32)
    assert len(data) == 24 * len(photo_table("train"))
    flat = data.images.flatten(1)
    assert len(torch.unique(flat, dim=0)) == len(flat)
    seen = {bytes(row) for row in flat.numpy()}
    mirrored = data.images.flip(-1).flatten(1).numpy()
    assert not any(bytes(row) in seen for row in mirrored)


def test_bare_crops_are_rare() -> None:
    for size in (32, 64, 128):
        data = PhotoDataset("train", size, crops=6)
        details = [detail(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in data.images]
        assert np.mean(np.array(details) < module.MIN_DETAIL) < 0.01


def test_detail_counts_edges() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    assert detail(Image.fromarray(stripes)) == 0
    stripes[:, 1::2] = 255  # every pair across differs, none down
    assert detail(Image.fromarray(stripes)) == 0.5
    stripes[:, 1::2] = module.EDGE - 1
    assert detail(Image.fromarray(stripes)) == 0


def test_a_photograph_without_detail_gives_crops_all_the_same(small: Path) -> None:
    data = PhotoDataset("train", 32, crops=3, folder=small)
    assert len(data) == 9
    flat = data.images[3:6]
    assert (flat.int() - 90).abs().max() <= 1


def test_photographs_too_small_for_the_size_are_left_out(small: Path) -> None:
    assert [row.name for row in PhotoDataset("train", 33, folder=small).photographs] == [
        "noise",
        "flat",
    ]
    usable = [row for row in photo_table() if min(row.width, row.height) >= 400]
    assert list(PhotoDataset("all", 400, crops=1).photographs) == usable


def test_a_crop_of_full_resolution_is_the_pixels_themselves() -> None:
    data = PhotoDataset("all", 512, crops=2)
    for i in range(len(data)):
        left, top, right, bottom = data.box(i)
        x = load_photo(data.photographs[data.photo_ids[i]].name)
        assert torch.equal(data.images[i], x[:, top:bottom, left:right])


def test_the_fingerprint_follows_arguments_and_files(small: Path) -> None:
    prints = {
        PhotoDataset("train", 32, folder=small).fingerprint,
        PhotoDataset("all", 32, folder=small).fingerprint,
        PhotoDataset("train", 16, folder=small).fingerprint,
        PhotoDataset("train", 32, crops=2, folder=small).fingerprint,
    }
    assert len(prints) == 4
    assert PhotoDataset("train", 32, folder=small).fingerprint in prints
    shutil.copy(small / "pictures/noise.webp", small / "kept.webp")
    Image.new("RGB", (160, 96), "red").save(small / "pictures/noise.webp", lossless=True)
    assert PhotoDataset("train", 32, folder=small).fingerprint not in prints
    shutil.copy(small / "kept.webp", small / "pictures/noise.webp")
    assert PhotoDataset("train", 32, folder=small).fingerprint in prints


# bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"split": "test"}, "split='test'"),
        ({"size": 0}, "size=0"),
        ({"size": 513}, "size=513 must lie between 8 and 512.*never enlarged"),
        ({"crops": 0}, "crops=0"),
    ],
)
def test_bad_arguments(arguments: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PhotoDataset(**arguments)


def test_an_unknown_name_is_told_what_is_close() -> None:
    with pytest.raises(ValueError, match=r"name='koalla'.*koala"):
        load_photo("koalla")
    with pytest.raises(IndexError):
        PhotoDataset("val", 32, crops=1)[11]


def test_missing_and_damaged_files_are_named(small: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.photos\.csv: no such file.*build\.py"):
        photo_table(folder=tmp_path / "nowhere")
    data = PhotoDataset("train", 32, folder=small)
    (small / "pictures/noise.webp").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"noise\.webp: damaged"):
        data[0]
    Image.new("RGB", (32, 32)).save(small / "pictures/noise.webp")
    with pytest.raises(ValueError, match=r"noise\.webp: 32 x 32, its table says 160 x 96"):
        load_photo("noise", small)
    (small / "pictures/noise.webp").unlink()
    for use in (lambda: load_photo("noise", small), lambda: PhotoDataset("train", folder=small)):
        with pytest.raises(FileNotFoundError, match=r"noise\.webp: no such file"):
            use()
    (small / "photos.csv").write_text("file,title\na.webp,b\n")
    with pytest.raises(ValueError, match=r"photos\.csv: damaged"):
        photo_table(folder=small)


def test_the_table_can_be_read_by_anyone() -> None:
    with (FOLDER / "photos.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [row.file for row in photo_table()]
    assert b"\r" not in (FOLDER / "photos.csv").read_bytes()
