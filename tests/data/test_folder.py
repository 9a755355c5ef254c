"""Folders of images, sets of torch and torchvision: pixels, splits, captions, wrong content."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import MNIST

from minildm.conditioning import look_up
from minildm.data.folder import ImageFolder, read_image, split_of, wrap_dataset

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(path: Path, color: tuple[int, ...] = RED) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA" if len(color) == 4 else "RGB", (20, 20), color).save(path)


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Thirty red ants in ant/ and, deeper, as many blue bees in big_bee/."""
    for i in range(30):
        save(tmp_path / "zoo" / "ant" / f"{i:02d}.png", RED)
        save(tmp_path / "zoo" / "big_bee" / "deep" / f"{i:02d}.JPG", BLUE)
    return tmp_path / "zoo"


def colors(item: dict[str, Any]) -> list[float]:
    return item["image"].mean(dim=(1, 2)).tolist()


def files(root: Path, split: str) -> set[str]:
    return set(ImageFolder(root, 4, split=split).columns["file"])


def test_subfolders_are_classes(zoo: Path) -> None:
    for name in (".cache/a.png", "__MACOSX/a.png", "ant/._00.png", "ant/.thumbs/a.png"):
        (zoo / name).parent.mkdir(parents=True, exist_ok=True)
        (zoo / name).write_bytes(b"")  # the system's own files are skipped
    data = ImageFolder(zoo, 8, split="all")
    assert len(data) == 60 and data.classes == data.groups == ("ant", "big_bee")
    ant, bee = data[0], data[-1]
    assert colors(ant) == [1.0, -1.0, -1.0]
    assert colors(bee) == pytest.approx([-1.0, -1.0, 1.0], abs=0.02)  # JPEG
    assert (ant["caption"], bee["caption"]) == ("ant", "big bee")
    assert (ant["file"], bee["file"]) == ("ant/00.png", "big_bee/deep/29.JPG")
    batch = next(iter(DataLoader(data, batch_size=60, num_workers=1)))
    assert batch["label"].tolist() == [0] * 30 + [1] * 30


def test_the_split_is_by_name_and_adding_files_moves_none(zoo: Path) -> None:
    before = files(zoo, "val")
    assert not files(zoo, "train") & before and files(zoo, "train") | before == files(zoo, "all")
    save(zoo / "ant" / "new.png")
    assert before <= files(zoo, "val") and len(files(zoo, "all")) == 61
    shares = [split_of(f"ant/{i}.png") == "val" for i in range(4000)]
    assert sum(shares) / 4000 == pytest.approx(0.1, abs=0.02)
    alone = next(f"solo/{i}.png" for i in range(100) if split_of(f"solo/{i}.png") == "val")
    save(zoo / alone)  # a class with a single image
    assert alone in files(zoo, "train") - files(zoo, "val")


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "test")])
def test_folders_with_the_names_of_splits_are_the_splits(names: tuple[str, ...], zoo: Path) -> None:
    for name in names:
        shutil.copytree(zoo, zoo.parent / "data" / name)
    for split, name in zip(("train", "val"), names, strict=False):
        data = ImageFolder(zoo.parent / "data", 4, split=split)
        assert {file.partition("/")[0] for file in data.columns["file"]} == {name}
        assert data.classes == ("ant", "big_bee") and len(data) == 60


def test_names_are_the_same_on_every_system(tmp_path: Path) -> None:
    save(tmp_path / "cafe\u0301" / "e\u0301.jfif")  # as macOS may write é
    save(tmp_path / "tea" / "a.png")
    data = ImageFolder(tmp_path, 4, split="all")
    assert data.classes[0] == "caf\u00e9" and data.columns["file"][0] == "caf\u00e9/\u00e9.jfif"
    assert look_up("cafe\u0301", data.classes, "class") == 0


def test_every_kind_of_image_becomes_square_rgb(tmp_path: Path) -> None:
    save(tmp_path / "a.png", (9, 9, 9, 0))  # transparent: over white
    save(tmp_path / "b.png", (255, 0, 0, 128))
    Image.fromarray(np.full((5, 5), 128 * 256, np.uint16)).save(tmp_path / "c.png")
    checkerboard = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    checkerboard.save(tmp_path / "d.png")  # antialiased to grey
    thirds = np.repeat(np.array([[RED, GREEN, BLUE]], np.uint8), 10, 1).repeat(10, 0)
    Image.fromarray(thirds).save(tmp_path / "e.png")  # the centre of the longer side is kept
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: turn it by 90 degrees clockwise to see it
    Image.fromarray(thirds[:, 5:25]).resize((20, 20)).save(tmp_path / "f.png", exif=exif)
    data = ImageFolder(tmp_path, 8, split="all")
    grey, expected = [0.0] * 3, [[1.0] * 3, [1.0, 0.0, 0.0]]
    for item, color in zip(data, [*expected, grey, grey, [-1.0, 1.0, -1.0]], strict=False):
        assert colors(item) == pytest.approx(color, abs=0.15)
    turned = data[5]["image"]  # red, which was left, is above
    assert turned[0, 0].mean() > 0.9 and turned[2, -1].mean() > 0.9
    assert data.classes == ("image",)  # no subfolders: one class


def test_the_fingerprint_is_names_and_content_not_place_and_time(zoo: Path) -> None:
    first, kept = ImageFolder(zoo, 8).fingerprint, zoo / "ant/03.png"
    moved = shutil.copytree(zoo, zoo.parent / "moved", copy_function=shutil.copyfile)
    assert ImageFolder(moved, 8).fingerprint == first
    (moved / "ant").rename(moved / "bee")  # without classes the folder's own name does not count
    assert ImageFolder(moved / "bee", 8).fingerprint == ImageFolder(zoo / "ant", 8).fingerprint
    save(kept, GREEN)
    changed = ImageFolder(zoo, 8).fingerprint
    kept.rename(kept.with_name("renamed.png"))
    assert len({first, changed, ImageFolder(zoo, 8).fingerprint}) == 3


def test_captions_are_in_a_table_or_beside_the_images(zoo: Path) -> None:
    rows = [{"file_name": f"{i:02d}.png", "text": f"a red ant, number {i}"} for i in range(30)]
    table = zoo / "ant/metadata.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)) + "\n")
    for i in range(30):
        (zoo / f"big_bee/deep/{i:02d}.txt").write_text(f"a blue bee, number {i}\n")
    captions = ImageFolder(zoo, 4, split="all").captions
    assert (captions[28], captions[37]) == ("a red ant, number 28", "a blue bee, number 7")
    table.write_text("")
    with pytest.raises(ValueError, match=r"30 of 60 images in .* have no caption: ant/00\.png"):
        ImageFolder(zoo, 4)
    table.write_text('{"file_name": "00.png", "caption": "an ant"}\n')
    with pytest.raises(ValueError, match=r"metadata.jsonl must hold.*file_name.*KeyError..text"):
        ImageFolder(zoo, 4)


def test_damaged_files_and_grey_of_another_depth_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "webp", "gif"):
        Image.fromarray(noise).save(file := tmp_path / f"broken.{suffix}")
        file.write_bytes(file.read_bytes()[:900])
        with pytest.raises(ValueError, match=r"broken\..* cannot be read"):
            read_image(file, 8)
    for grey in (np.uint16(4095), np.float32(0.5), np.int32(70000)):
        Image.fromarray(np.full((4, 4), grey)).save(file := tmp_path / "scan.tif")
        with pytest.raises(ValueError, match=r"scan\.tif cannot be read: grey of .* (16|32) bits"):
            read_image(file, 8)


def test_folders_that_cannot_be_used_are_named(zoo: Path) -> None:
    save(zoo.parent / "one" / "a.png")
    with pytest.raises(ValueError, match=r"split='val' of .* is empty"):
        ImageFolder(zoo.parent / "one", 8, split="val")
    for name in ("a.heic", "b.avif", "c.HEIC", "d.txt"):
        (zoo.parent / "one" / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"skipped 3 of 4 files: \.avif, \.heic$"):
        ImageFolder(zoo.parent / "one", 8)
    for name in ("train/a/x.png", "val/a/x.png", "others/a/x.png"):
        save(zoo.parent / "split" / name)
    with pytest.raises(ValueError, match=r"others/a/x\.png is next to the folders of splits"):
        ImageFolder(zoo.parent / "split", 8)
    save(zoo / "stray.png")
    with pytest.raises(ValueError, match=r"stray\.png is next to the folders of classes"):
        ImageFolder(zoo, 8)


# --- data sets of torch and torchvision ---

X = torch.rand(4, 1, 28, 28)


def test_any_torch_dataset_can_be_wrapped() -> None:
    floats = TensorDataset(X, torch.tensor([2, 0, 1, 2]))
    data, images = wrap_dataset(floats, 28), (X * 255).round().byte()
    assert data.labels.tolist() == [2, 0, 1, 2] and data.classes == ("0", "1", "2")
    assert torch.equal(data.images, images.expand(-1, 3, -1, -1))
    same, other = TensorDataset(images, data.labels), TensorDataset(1 - X, data.labels)
    assert wrap_dataset(same, 28).fingerprint == data.fingerprint
    assert wrap_dataset(other, 28).fingerprint != data.fingerprint
    rows = [{"image": Image.new("RGB", (9, 8), GREEN), "caption": "a leaf"}]
    assert wrap_dataset(rows, 8).captions == ["a leaf"]


def test_torchvisions_sets_keep_their_names(tmp_path: Path) -> None:
    """MNIST: grey, 28 pixels, its own files. ImageNet names each class several times."""
    raw, grey = tmp_path / "MNIST/raw", bytes([128]) * (2 * 28 * 28)
    raw.mkdir(parents=True)
    for kind, header, content in (("images", [2, 28, 28], grey), ("labels", [2], bytes([1, 0]))):
        numbers = np.array([0x800 + len(header), *header], ">i4").tobytes()
        for part in ("train", "t10k"):
            (raw / f"{part}-{kind}-idx{len(header)}-ubyte").write_bytes(numbers + content)
    data = wrap_dataset(MNIST(tmp_path), 32)
    assert data.images.shape == (2, 3, 32, 32) and data.images.unique().tolist() == [128]
    assert data.captions == ["1 - one", "0 - zero"]
    imagenet = TensorDataset(X, torch.tensor([0, 1, 0, 1]))
    imagenet.classes = [("tench", "Tinca tinca"), ("hen",)]
    assert wrap_dataset(imagenet, 8).classes == ("tench", "hen")
