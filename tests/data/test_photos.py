"""The embedded photographs: the table and its card, the crops."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from minildm.data.dataset import to_tensor
from minildm.data.photos import PhotoDataset, cut
from minildm.files import data_dir

LICENCES = {"public-domain", "CC0-1.0", "CC-BY-2.0", "CC-BY-3.0", "CC-BY-4.0"}


@pytest.fixture(scope="module")
def val() -> PhotoDataset:
    return PhotoDataset("val", 32)


def test_the_table_the_files_and_the_choice_agree() -> None:
    folder = data_dir() / "photos"
    with (folder / "chosen.csv").open(newline="", encoding="utf-8") as file:
        chosen = {f"{row['name']}.webp": row for row in csv.DictReader(file)}
    splits = [PhotoDataset(split, 8, crops=1).photographs for split in ("train", "val", "all")]
    train, val, rows = ({row["file"]: row for row in split} for split in splits)
    assert sorted(train | val) == list(rows) == sorted(chosen) and not train.keys() & val.keys()
    assert list(rows) == sorted(file.name for file in (folder / "pictures").iterdir())
    for name, row in rows.items():
        with Image.open(folder / "pictures" / name) as image:
            assert (image.format, *map(str, image.size)) == ("WEBP", row["width"], row["height"])
            assert image.width % 32 == image.height % 32 == 0
        assert row["licence"] in LICENCES and row["title"] == chosen[name]["title"]
        assert row["author"] and row["source"] and chosen[name]["author"] in ("", row["author"])


def test_a_crop_is_its_box_reduced(val: PhotoDataset) -> None:
    """Against torch's antialiased filter, which is a little softer."""
    for i in range(0, len(val), 11):
        file = val.photographs[val.photo_ids[i]]["file"]
        image = Image.open(data_dir() / "photos/pictures" / file)
        left, top, right, bottom = cut(image, f"{file} {i % val.crops}", 32)[0]
        assert right - left == bottom - top >= 32  # never enlarged
        box = to_tensor(image)[None, :, top:bottom, left:right].float()
        reduced = F.interpolate(box, (32, 32), mode="bicubic", antialias=True)[0]
        assert (val.images[i] - reduced).abs().mean() < 2.5


def test_sides_are_spread_over_the_octaves() -> None:
    """log(side / size) is uniform between 0 and log(short / size)."""
    cells = np.random.default_rng(0).integers(0, 256, (43, 75), dtype=np.uint8)
    photo = Image.fromarray(cells).resize((900, 512), Image.Resampling.NEAREST)  # detail everywhere
    boxes = [cut(photo, f"a {k}", 32)[0] for k in range(1000)]
    sides = np.array([right - left for left, _, right, _ in boxes])
    octaves = np.histogram(np.log2(sides / 32), bins=4, range=(0, 4))[0]
    assert sides.min() >= 32 and sides.max() <= 512
    assert np.all(np.abs(octaves - 250) < 5 * (1000 * 0.25 * 0.75) ** 0.5)


def test_crops_are_fixed_by_their_number(val: PhotoDataset) -> None:
    more = PhotoDataset("val", 32, crops=val.crops + 1)
    kept = [p * more.crops + k for p in range(len(val.photographs)) for k in range(val.crops)]
    assert torch.equal(more.images[kept], val.images)
    flat = val.images.flatten(1)
    assert len(torch.unique(flat, dim=0)) == len(flat)
