"""Each wrong argument ends in one sentence that names it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TinyImages, randn

from minildm.data import emoji, photos
from minildm.data.dataset import ImageDataset
from minildm.data.emoji import EmojiDataset, load_rgba
from minildm.data.folder import ImageFolder, torchvision_set
from minildm.data.latents import LatentDataset
from minildm.data.photos import PhotoDataset, load_photo, photo_table
from minildm.data.scenes import ScenesDataset, wide_scene
from minildm.data.transforms import draw_masks
from minildm.layers import BatchRandom

BYTES = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("make", "arguments", "said"),
    [
        (ImageDataset, {"images": BYTES.float(), "name": "a"}, "images must be .* uint8, got"),
        (ImageDataset, {"images": BYTES[:, :1], "name": "a"}, "images must be .* uint8, got"),
        (ImageDataset, {"images": BYTES[:0], "name": "a"}, "one length, at least 1"),
        (
            ImageDataset,
            {"images": BYTES, "name": "a", "captions": ["one"]},
            "columns must have one length.*'caption': 1",
        ),
        (EmojiDataset, {"split": "test"}, "split='test'.*train, val, all"),
        (EmojiDataset, {"size": 48}, "size=48.*32, 64, 128"),
        (EmojiDataset, {"styles": ["notto"]}, "styles='notto'.*'noto'.*fluent3d"),
        (EmojiDataset, {"styles": []}, r"styles=\(\)"),
        (EmojiDataset, {"subgroups": ["food-fruits"]}, "subgroups='food-fruits'.*'food-fruit'"),
        (EmojiDataset, {"split": "unpaired"}, "unpaired=0 must lie between 1"),
        (EmojiDataset, {"subgroups": ["geometric"], "styles": ["fluent3d"]}, "no emoji of geom"),
        (load_rgba, {"hexcode": "1F9C1", "style": "blob"}, "1F9C1.*'blob'; it has: noto, twemoji"),
        (ScenesDataset, {"split": "test"}, "split='test'"),
        (ScenesDataset, {"size": 0}, "size=0 must lie between 1"),
        (ScenesDataset, {"n": 0}, "n=0 must lie between 1"),
        (ScenesDataset, {"seed": -1}, "seed=-1 must lie between 0"),
        (ScenesDataset, {"styles": ["oil"]}, "styles='oil'"),
        (ScenesDataset, {"background": "none"}, "background='none'.*plain"),
        (wide_scene, {"i": 0, "size": 250}, "size=250 must be a multiple of ratio=4"),
        (PhotoDataset, {"split": "test"}, "split='test'"),
        (PhotoDataset, {"size": 513}, "size=513 must lie between 8 and 512"),
        (PhotoDataset, {"crops": 0}, "crops=0"),
        (load_photo, {"name": "koalla"}, "name='koalla'.*'koala'"),
        (ImageFolder, {"root": ".", "size": 8, "split": "test"}, "split='test'"),
        (ImageFolder, {"root": ".", "size": 8, "val_fraction": 2.0}, "val_fraction=2.0"),
        (torchvision_set, {"name": "MNIST", "root": ".", "size": 8}, "name='MNIST'.*CIFAR10"),
        (LatentDataset, {"data": TinyImages(), "moments": randn(3)}, "12 images, moments 3"),
        (
            LatentDataset,
            {"data": TinyImages(), "moments": randn(12), "keep": ["semantic"]},
            "'tiny' have no 'semantic'",
        ),
    ],
)
def test_a_wrong_argument_is_named(make: Any, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(**arguments)


@pytest.mark.parametrize("kinds", [(), ("lama", "stars")])
def test_unknown_masks_are_refused(kinds: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="Allowed: lama, strokes, boxes, halves"):
        draw_masks(kinds, 2, (8, 8), BatchRandom())


def test_unknown_classes_and_sizes_are_named(tmp_path: Path) -> None:
    fruit = EmojiDataset("val", 32, subgroups=["food-fruit"])
    with pytest.raises(ValueError, match=r"subgroup='food-frut'.*'food-fruit'"):
        fruit.label_of("food-frut")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="size=0 must lie between 1"):
        ImageFolder(tmp_path, 0, split="all")


@pytest.mark.parametrize("keep", [0, 10, 5000, -100, None])
def test_damaged_and_missing_data_files_are_named(
    keep: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (emoji.data_dir() / "emoji/emoji.npz").read_bytes()
    (tmp_path / "emoji").mkdir()
    flipped = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    (tmp_path / "emoji/emoji.npz").write_bytes(flipped if keep is None else whole[:keep])
    monkeypatch.setenv("MINILDM_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"emoji\.npz: damaged"):
        EmojiDataset()
    (tmp_path / "emoji/emoji.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"photos\.csv"):
        photo_table()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/photos.csv").write_text("file,title\na.webp,b\n")
    with pytest.raises(ValueError, match=r"photos\.csv: damaged"):
        photo_table()
    with pytest.raises(ValueError, match=r"a\.webp: missing, damaged, or not an image"):
        photos._decoded(tmp_path / "photos/pictures/a.webp")
