"""Folders of images and torchvision sets: pixels, splits, and each way a folder can be wrong."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from minildm.data.folder import ImageFolder, split_of, torchvision_set

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
    def names(split: str) -> set[str]:
        return set(ImageFolder(zoo, 4, split=split).columns["file"])

    before = names("val")
    assert not names("train") & before and names("train") | before == names("all")
    save(zoo / "ant" / "new.png")
    assert before <= names("val") and len(names("all")) == 61
    shares = [split_of(f"ant/{i}.png") == "val" for i in range(4000)]
    assert sum(shares) / 4000 == pytest.approx(0.1, abs=0.02)


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
    assert data.classes == (tmp_path.name,)  # no subfolders: one class


def test_the_fingerprint_is_names_and_content_not_place_and_time(zoo: Path) -> None:
    first, kept = ImageFolder(zoo, 8).fingerprint, zoo / "ant/03.png"
    moved = shutil.copytree(zoo, zoo.parent / "moved", copy_function=shutil.copyfile)
    assert ImageFolder(moved, 8).fingerprint == first
    save(kept, GREEN)
    changed = ImageFolder(zoo, 8).fingerprint
    kept.rename(kept.with_name("renamed.png"))
    assert len({first, changed, ImageFolder(zoo, 8).fingerprint}) == 3


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = tmp_path / f"broken.{suffix}"
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"broken\..* is damaged"):
        ImageFolder(tmp_path, 8, split="all")


def test_folders_that_cannot_be_used_are_named(zoo: Path) -> None:
    save(zoo.parent / "one" / "a.png")
    with pytest.raises(ValueError, match=r"split='val' of .* is empty"):
        ImageFolder(zoo.parent / "one", 8, split="val")
    save(zoo / "stray.png")
    with pytest.raises(ValueError, match=r"stray\.png is next to the class folders"):
        ImageFolder(zoo, 8)


def test_a_torchvision_set_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(list):
        """CIFAR10 as torchvision gives it: pairs of an image and a label."""

        classes, targets = ("airplane", "automobile"), [0, 1, 1]

        def __init__(self, root: Path, train: bool, download: bool) -> None:
            image = Image.new("RGB", (32, 32), (40, 40, 40) if train else (200, 200, 200))
            super().__init__((image, label) for label in self.targets)

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    train, val = (torchvision_set("CIFAR10", ".", 16, split) for split in ("train", "val"))
    assert train.name == "CIFAR10-train" and train.labels.tolist() == [0, 1, 1]
    assert train[2]["caption"] == "automobile" and train[2]["image"].shape == (3, 16, 16)
    assert train.images.unique().tolist() == [40] and val.images.unique().tolist() == [200]


@pytest.mark.parametrize("name", ["CIFAR10", "CelebA", "Flowers102", "ImageNet"])
def test_a_missing_torchvision_set_says_how_to_get_it(tmp_path: Path, name: str) -> None:
    with pytest.raises(RuntimeError, match="download"):
        torchvision_set(name, tmp_path, 8)
