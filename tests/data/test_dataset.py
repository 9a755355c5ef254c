"""The base of the data sets: items, columns, defaults, fingerprints, the cache."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from minildm.data.dataset import ImageDataset, cached
from minildm.files import cache_dir

IMAGES = torch.arange(3 * 3 * 4 * 4, dtype=torch.uint8).view(3, 3, 4, 4)


def test_an_item_has_every_column() -> None:
    data = ImageDataset(
        IMAGES,
        name="three",
        labels=torch.tensor([1, 0, 1]),
        classes=("big_cat", "dog"),
        columns={"code": ["a", "b", "c"], "size": torch.tensor([3.0, 4.0, 5.0])},
    )
    item = data[-1]
    assert torch.equal(item["image"], IMAGES[2].float() / 127.5 - 1)
    assert (int(item["label"]), int(item["group"]), int(item["style"])) == (1, 1, 0)
    assert (item["caption"], item["code"], float(item["size"])) == ("dog", "c", 5.0)
    assert data.captions == ["dog", "big cat", "dog"] and data.groups == data.classes
    with pytest.raises(IndexError):
        data[3]
    batch = next(iter(DataLoader(data, batch_size=3)))
    assert batch["image"].shape == (3, 3, 4, 4) and batch["code"] == ["a", "b", "c"]


def test_a_function_gives_the_images_at_the_first_use() -> None:
    calls = []
    labels = torch.zeros(3, dtype=torch.int64)
    data = ImageDataset(lambda: calls.append(1) or IMAGES, name="late", labels=labels)
    assert len(data) == 3 and data.without_image(1)["caption"] == "image" and not calls
    assert torch.equal(data.images, IMAGES) and data.images is data.images and len(calls) == 1


def test_the_fingerprint_is_the_contents() -> None:
    def fingerprint(images: torch.Tensor = IMAGES, **options: object) -> str:
        return ImageDataset(images, **{"name": "a", **options}).fingerprint

    others = [
        fingerprint(IMAGES + 1),
        fingerprint(columns={"caption": ["x", "y", "z"]}),
        fingerprint(columns={"code": ["x", "y", "z"]}),
        fingerprint(columns={"style": torch.tensor([0, 1, 0])}),
        fingerprint(classes=("thing",)),
    ]
    assert fingerprint() == fingerprint(name="b") and len({fingerprint(), *others}) == 6


@pytest.mark.parametrize("damage", [b"", b"not a tensor" * 9, None])
def test_a_damaged_cache_file_is_made_again(
    damage: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINILDM_CACHE", str(tmp_path / "cache"))
    assert torch.equal(cached("a", lambda: IMAGES), IMAGES)
    assert torch.equal(cached("a", lambda: IMAGES + 1), IMAGES)  # from the file
    file = cache_dir() / "a.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] if damage is None else damage)
    assert torch.equal(cached("a", lambda: IMAGES), IMAGES) and file.read_bytes() == whole
