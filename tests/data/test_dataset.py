"""The base of the data sets: items, columns, defaults, fingerprints, the cache."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from minildm.data.dataset import ImageDataset, cached

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


def test_a_damaged_cache_file_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINILDM_CACHE", str(tmp_path))
    assert torch.equal(cached("a", lambda: IMAGES), IMAGES)
    assert torch.equal(cached("a", lambda: IMAGES + 1), IMAGES)  # from the file
    file = tmp_path / "a.safetensors"
    whole = file.read_bytes()
    for damage in (b"", whole[:-1]):
        file.write_bytes(damage)
        assert torch.equal(cached("a", lambda: IMAGES), IMAGES) and file.read_bytes() == whole
