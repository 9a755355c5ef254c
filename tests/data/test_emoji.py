"""The embedded emoji: the split, the selections, the pixels."""

import hashlib

import numpy as np
import pytest

from minildm.data.emoji import STYLES, EmojiDataset, read_emoji
from minildm.files import data_dir


@pytest.fixture(scope="module")
def splits() -> dict[str, EmojiDataset]:
    return {split: EmojiDataset(split, 32) for split in ("train", "val", "all")}


@pytest.fixture(scope="module")
def family() -> dict[str, str]:
    """The family of each code point."""
    return {d.emoji["hexcode"]: d.emoji["family"] for d in read_emoji(data_dir()).values()}


def test_images_are_the_drawings_over_white() -> None:
    data = EmojiDataset("train", 32, subgroups=("food-fruit", "animal-bird"))
    for i in (0, 50, len(data) - 1):
        drawing = read_emoji(data_dir())[data.hexcodes[i], STYLES[data.style_ids[i]]]
        pixels = np.asarray(drawing.rgba(), np.float64) / 255
        white = pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:]  # (128, 128, 3)
        mean = white.reshape(32, 4, 32, 4, 3).mean((1, 3)).transpose(2, 0, 1)
        assert np.abs(data[i]["image"].numpy() - (2 * mean - 1)).mean() < 0.03
        assert data[i]["hexcode"] == data.hexcodes[i]
    corners = data.images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).float().mean() > 0.9


def test_the_split_is_disjoint_by_family(
    splits: dict[str, EmojiDataset], family: dict[str, str]
) -> None:
    train, val, both = splits.values()
    assert not {family[code] for code in train.hexcodes} & {family[code] for code in val.hexcodes}
    assert sorted(train.hexcodes + val.hexcodes) == sorted(both.hexcodes)
    assert 0.10 <= len(val) / len(both) <= 0.12
    hearts = [EmojiDataset(split, 32, subgroups=["heart"]).images for split in ("train", "val")]
    assert all((hearts[0] != image).flatten(1).any(1).all() for image in hearts[1])


def test_the_split_does_not_change(family: dict[str, str]) -> None:
    """The shipped models were trained without these families."""
    emoji = [drawing.emoji for drawing in read_emoji(data_dir()).values()]
    families = {e["family"] for e in emoji if e["split"] == "val"}
    roles = ("1F9D1-200D-1F680", "1F468-200D-1F680", "1F469-200D-1F680")  # astronauts
    assert len({family[code] for code in roles}) == 1
    digest = hashlib.sha256(" ".join(sorted(families)).encode()).hexdigest()
    assert len(families) == 166 and digest.startswith("987231c675f9d208")


def test_subgroups_and_styles_are_selected(splits: dict[str, EmojiDataset]) -> None:
    fruit = EmojiDataset("all", 32, subgroups=["food-sweet", "food-fruit"], styles=["blob", "noto"])
    assert fruit.classes == ("food-sweet", "food-fruit")  # in the given order
    assert set(fruit.style_ids.tolist()) == {STYLES.index("noto"), STYLES.index("blob")}
    assert {fruit.groups[i] for i in fruit.group_ids.tolist()} == {"food-drink"}
    train, symbols = splits["train"], EmojiDataset("all", 32, subgroups=["geometric"])
    assert {symbols.groups[i] for i in symbols.group_ids.tolist()} == {"symbols"}
    assert len(train.classes) == 47 and train.groups.index("symbols") not in train.group_ids
    assert EmojiDataset("val", 32, styles=["blob"]).classes == train.classes


def test_unpaired_styles_are_held_out_in_their_own_split(splits: dict[str, EmojiDataset]) -> None:
    rest, apart = (EmojiDataset(split, 32, unpaired=8) for split in ("train", "unpaired"))
    drawn, held_out, train = (
        set(zip(data.hexcodes, data.style_ids.tolist(), strict=True))
        for data in (rest, apart, splits["train"])
    )
    assert not drawn & held_out and drawn | held_out == train
    assert len(set(apart.hexcodes)) == len(apart) > 100  # one style of each
    assert len(set(apart.hexcodes) & set(rest.hexcodes)) > 0.9 * len(apart)  # known in others
