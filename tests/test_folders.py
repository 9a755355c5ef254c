"""Folders of pictures and torchvision sets: pixels, splits, and each way a folder can be wrong."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from minildm.data.folders import ImageFolder, PictureSet, split_of, torchvision_set

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def save(path: Path, color: tuple[int, ...] = RED, size: tuple[int, int] = (20, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA" if len(color) == 4 else "RGB", size, color).save(path)
    return path


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Thirty red ants in ant/ and, deeper, as many blue bees in big_bee/."""
    for i in range(30):
        save(tmp_path / "zoo" / "ant" / f"{i:02d}.png", RED)
        save(tmp_path / "zoo" / "big_bee" / "deep" / f"{i:02d}.JPG", BLUE)
    return tmp_path / "zoo"


def colors(item: dict) -> list[float]:
    return item["image"].mean(dim=(1, 2)).tolist()


def test_subfolders_are_classes(zoo: Path) -> None:
    data = ImageFolder(zoo, 8, split="all")
    assert len(data) == 60
    assert data.classes == data.groups == ("ant", "big_bee")
    assert data.name == "zoo-all"
    ant, bee = data[0], data[-1]
    assert ant["image"].shape == (3, 8, 8)
    assert ant["image"].dtype == torch.float32
    assert colors(ant) == [1.0, -1.0, -1.0]
    assert colors(bee) == pytest.approx([-1.0, -1.0, 1.0], abs=0.02)  # JPEG
    assert (ant["caption"], bee["caption"]) == ("ant", "big bee")
    assert [int(bee[key]) for key in ("label", "group", "style")] == [1, 1, 0]
    assert bee["label"].dtype == torch.int64
    with pytest.raises(IndexError):
        data[60]


def test_a_flat_folder_is_one_class_named_after_it(tmp_path: Path) -> None:
    save(tmp_path / "kites" / "a.png")
    (tmp_path / "kites" / "notes.txt").write_text("not a picture")
    (tmp_path / "kites" / "no pictures here").mkdir()
    data = ImageFolder(tmp_path / "kites", 4, split="all")
    assert data.classes == ("kites",)
    assert data.captions == ["kites"]


def test_attributes_agree_with_the_items(zoo: Path) -> None:
    data = ImageFolder(zoo, 8, split="all")
    before = data[31]["image"]
    assert data.images.shape == (60, 3, 8, 8)
    assert data.images.dtype == torch.uint8
    assert data.images is data.images
    for i, item in enumerate(data):
        assert torch.equal(item["image"], data.images[i].float() / 127.5 - 1)
        assert item["label"] == data.labels[i]
        assert item["group"] == data.group_ids[i]
        assert item["style"] == data.style_ids[i]
        assert item["caption"] == data.captions[i]
    assert torch.equal(data[31]["image"], before)
    assert data.styles[data.style_ids[0]]


def test_a_picture_is_decoded_once(zoo: Path) -> None:
    data = ImageFolder(zoo, 8, split="all")
    first = data[0]["image"]
    data.source[0][0].unlink()
    assert torch.equal(data[0]["image"], first)
    data.source[-1][0].write_bytes(b"")
    with pytest.raises(ValueError, match=r"29\.JPG"):
        data[-1]


def test_beyond_the_room_for_them_pictures_are_decoded_anew(
    zoo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minildm.data.folders.KEPT_BYTES", 3 * 8 * 8)
    data = ImageFolder(zoo, 8, split="all")
    pictures = [item["image"] for item in data]
    for file, _ in data.source[:2]:
        file.unlink()
    assert torch.equal(data[0]["image"], pictures[0])
    with pytest.raises(ValueError, match=r"01\.png"):
        data[1]


def test_batches_with_workers(zoo: Path) -> None:
    loader = DataLoader(ImageFolder(zoo, 8, split="all"), batch_size=60, num_workers=1)
    batch = next(iter(loader))
    assert batch["image"].shape == (60, 3, 8, 8)
    assert batch["label"].tolist() == [0] * 30 + [1] * 30
    assert batch["caption"][0] == "ant"


def test_train_and_val_divide_the_files(zoo: Path) -> None:
    train, val, everything = (
        {file for file, _ in ImageFolder(zoo, 8, split=split, val_fraction=0.3).source}
        for split in ("train", "val", "all")
    )
    assert not train & val
    assert train | val == everything
    assert 0 < len(val) < len(train)
    assert ImageFolder(zoo, 8).name == "zoo-train"


def test_the_split_is_by_name_and_adding_files_moves_none(zoo: Path) -> None:
    before = {file for file, _ in ImageFolder(zoo, 8, split="val", val_fraction=0.3).source}
    save(zoo / "ant" / "new.png")
    assert before <= {file for file, _ in ImageFolder(zoo, 8, split="val", val_fraction=0.3).source}
    shares = [split_of(f"ant/{i}.png", 0.1) == "val" for i in range(4000)]
    assert sum(shares) / 4000 == pytest.approx(0.1, abs=0.02)


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    save(tmp_path / "clear.png", (9, 9, 9, 0))
    save(tmp_path / "half.png", (255, 0, 0, 128))
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=0)
    clear, half, palette = ImageFolder(tmp_path, 4, split="all")
    assert colors(clear) == colors(palette) == [1.0, 1.0, 1.0]
    assert colors(half) == pytest.approx([1.0, 0.0, 0.0], abs=0.01)


def test_the_centre_of_the_longer_side_is_kept(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, :10], pixels[:, 10:20], pixels[:, 20:] = RED, GREEN, BLUE
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "tall.png")
    for item in ImageFolder(tmp_path, 10, split="all"):
        assert colors(item) == [-1.0, 1.0, -1.0]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_respected(tmp_path: Path, suffix: str) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8], pixels[:, 8:] = RED, BLUE
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: turn it by 90 degrees clockwise to see it
    Image.fromarray(pixels).save(tmp_path / f"turned.{suffix}", exif=exif)
    image = ImageFolder(tmp_path, 16, split="all")[0]["image"]
    assert image[0, :7].mean() > 0.9  # red, which was left, is above
    assert image[2, 9:].mean() > 0.9


def test_resizing_is_antialiased(tmp_path: Path) -> None:
    checker = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checker).save(tmp_path / "checker.png")
    image = ImageFolder(tmp_path, 8, split="all")[0]["image"]
    assert image.abs().max() < 0.1  # grey all over; picking pixels would give black or white


def test_small_grey_and_16_bit_pictures(tmp_path: Path) -> None:
    Image.new("L", (1, 3), 255).save(tmp_path / "a.png")
    Image.fromarray(np.full((5, 5), 128 * 256, np.uint16)).save(tmp_path / "b.png")
    white, grey = ImageFolder(tmp_path, 4, split="all")
    assert colors(white) == [1.0, 1.0, 1.0]
    assert colors(grey) == pytest.approx([0.0, 0.0, 0.0], abs=0.01)


def test_large_jpegs_look_as_if_decoded_in_full(tmp_path: Path) -> None:
    y, x = np.mgrid[0:400, 0:400] / 400
    pixels = np.stack([x, y, 0.5 + 0.5 * np.sin(20 * x * y)], -1) * 255
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "b.png")
    jpeg, png = ImageFolder(tmp_path, 32, split="all")
    assert (jpeg["image"] - png["image"]).abs().mean() < 0.02


def test_flip_appends_the_mirror_images(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    data = ImageFolder(tmp_path, 4, split="all", flip=True)
    assert len(data) == len(data.captions) == len(data.images) == 4
    assert torch.equal(data[2]["image"], data[0]["image"].flip(-1))
    assert not torch.equal(data[2]["image"], data[0]["image"])
    assert torch.equal(data[1]["image"], data[3]["image"])


def test_the_fingerprint_follows_the_files_and_the_arguments(zoo: Path) -> None:
    def fingerprint(size: int = 8, **options) -> str:
        return ImageFolder(zoo, size, **options).fingerprint

    first = fingerprint()
    assert first == fingerprint()
    others = [fingerprint(9), fingerprint(split="val"), fingerprint(flip=True)]
    kept = ImageFolder(zoo, 8).source[0][0]
    os.utime(kept, ns=(1, 1))
    others.append(fingerprint())
    kept.rename(kept.with_name("renamed.png"))
    others.append(fingerprint())
    assert len({first, *others}) == 6


def test_the_systems_own_files_are_skipped(zoo: Path) -> None:
    for name in (".cache/a.png", "__MACOSX/a.png", "ant/._00.png", "ant/.thumbs/a.png"):
        (zoo / name).parent.mkdir(parents=True, exist_ok=True)
        (zoo / name).write_bytes(b"")
    assert len(ImageFolder(zoo, 8, split="all")) == 60


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"root=.*nowhere.* is not a folder"):
        ImageFolder(tmp_path / "nowhere", 8)


@pytest.mark.parametrize("subfolder", [None, "ant"])
def test_an_empty_folder_is_named(tmp_path: Path, subfolder: str | None) -> None:
    if subfolder:
        (tmp_path / subfolder).mkdir()
    (tmp_path / "notes.txt").write_text("not a picture")
    with pytest.raises(ValueError, match=r"no picture .*\.png.* in .*" + tmp_path.name):
        ImageFolder(tmp_path, 8)


def test_a_class_without_pictures_is_named(zoo: Path) -> None:
    (zoo / "cow").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*cow has no picture"):
        ImageFolder(zoo, 8)


def test_pictures_beside_class_folders_are_named(zoo: Path) -> None:
    save(zoo / "stray.png")
    with pytest.raises(ValueError, match=r"stray\.png lies beside the class folders"):
        ImageFolder(zoo, 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
def test_a_truncated_picture_is_named_when_it_is_read(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = tmp_path / f"broken.{suffix}"
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:900])
    data = ImageFolder(tmp_path, 8, split="all")
    with pytest.raises(ValueError, match=r"broken\..* is not a readable picture.*move it out"):
        data[0]
    with pytest.raises(ValueError, match=r"broken"):
        _ = data.images


def test_what_is_no_picture_inside_is_named_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.png is not a readable picture"):
        ImageFolder(tmp_path, 8, split="all")[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0 must be at least 1"),
        ({"split": "test"}, "split='test' must be"),
        ({"val_fraction": 0.0}, "val_fraction=0.0 must lie"),
        ({"val_fraction": 1e-9, "split": "val"}, "split='val' of .* is empty"),
    ],
)
def test_bad_arguments_are_named(zoo: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageFolder(zoo, **{"size": 8} | options)


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 as torchvision stores it, with four pictures a file and no checksums."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for i, name in enumerate(names):
        pixels = np.full((4, 3 * 32 * 32), 40 * i, np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2, i]}))
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship"]
    meta = pickle.dumps({"label_names": [*classes, "truck"]})
    (folder / CIFAR10.meta["filename"]).write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "train_list", [[name, None] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [[names[5], None]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": None})
    return tmp_path


def test_torchvision_cifar10_on_disk(cifar: Path) -> None:
    train = torchvision_set("CIFAR10", cifar, 16)
    assert isinstance(train, PictureSet)
    assert len(train) == 20
    assert train.name == "CIFAR10-train"
    assert train.labels[:8].tolist() == [0, 1, 2, 0, 0, 1, 2, 1]
    assert train[7]["caption"] == "automobile"
    assert train[7]["image"].shape == (3, 16, 16)
    assert train.images[4].unique().tolist() == [40]
    val = torchvision_set("CIFAR10", cifar, 16, "val", flip=True)
    assert len(val) == 8
    assert val.images[0].unique().tolist() == [200]
    assert val.fingerprint != train.fingerprint


@pytest.mark.parametrize("name", ["CIFAR10", "CelebA", "Flowers102", "ImageNet"])
def test_a_torchvision_set_that_is_not_there_says_how_to_get_it(tmp_path: Path, name: str) -> None:
    how = "image-net.org" if name == "ImageNet" else "download=True"
    with pytest.raises(FileNotFoundError, match=rf"no {name} in root=.*{how}"):
        torchvision_set(name, tmp_path, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("MNIST",), "name='MNIST' must be one of CIFAR10"),
        (("CIFAR10", "test"), "split='test' must be"),
    ],
)
def test_torchvision_arguments_are_named(tmp_path: Path, arguments: tuple, message: str) -> None:
    name, *split = arguments
    with pytest.raises(ValueError, match=message):
        torchvision_set(name, tmp_path, 8, *split)
