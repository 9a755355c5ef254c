"""The embedded emoji: the file, the split, the items, the cache, the errors."""

import hashlib
import json
import pickle
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from minildm.data import emoji as module
from minildm.data.emoji import (
    STYLES,
    EmojiDataset,
    EmojiFile,
    load_rgba,
    read_emoji,
    validation_families,
)

FOLDER = Path(__file__).resolve().parent.parent / "data/emoji"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of this module's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILDM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def file() -> EmojiFile:
    return read_emoji()


@pytest.fixture(scope="module")
def train() -> EmojiDataset:
    return EmojiDataset("train", 32)


@pytest.fixture(scope="module")
def val() -> EmojiDataset:
    return EmojiDataset("val", 32)


@pytest.fixture
def small(tmp_path: Path, file: EmojiFile) -> Path:
    """A file of a few drawings, quick to decode."""
    kept = [i for i, e in enumerate(file.emoji) if file.rows[e]["subgroup"] == "food-fruit"]
    chunks = [file.blob[file.offsets[i] : file.offsets[i + 1]] for i in kept]
    meta = {"styles": STYLES, "groups": file.groups, "emoji": file.rows}
    path = tmp_path / "small.npz"
    np.savez(
        path,
        blob=np.frombuffer(b"".join(chunks), np.uint8),
        offsets=np.cumsum([0, *map(len, chunks)]),
        emoji=file.emoji[kept],
        style=file.style[kept],
        meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
    )
    return path


def test_file_is_the_one_on_the_card_and_fits(file: EmojiFile) -> None:
    card = (FOLDER / "README.md").read_text()
    size = (FOLDER / "emoji.npz").stat().st_size
    assert f"sha256: `{file.sha256}`" in card
    assert f"size: {size:,} bytes" in card
    assert size <= 18_000_000
    assert (FOLDER / "contact_sheet.webp").stat().st_size <= 400_000


def test_card_counts_the_pictures(file: EmojiFile) -> None:
    table = dict(
        re.findall(r"^\| ([a-z-]+) \| \d+ \| (.+) \|$", (FOLDER / "README.md").read_text(), re.M)
    )
    count = Counter((file.rows[e]["group"], s) for e, s in zip(file.emoji, file.style, strict=True))
    for group in file.groups:
        numbers = [count[group, style] for style in range(len(STYLES))]
        assert table[group] == " | ".join(map(str, [*numbers, sum(numbers)]))


def test_pictures_are_consistent(file: EmojiFile) -> None:
    assert len(file.offsets) - 1 == len(file.emoji) == len(file.style) > 7000
    assert file.offsets[0] == 0 and file.offsets[-1] == len(file.blob)
    assert (np.diff(file.offsets) > 0).all()
    assert set(file.style) == set(range(len(STYLES)))
    assert set(file.emoji) == set(range(len(file.rows)))
    pairs = set(zip(file.emoji.tolist(), file.style.tolist(), strict=True))
    assert len(pairs) == len(file.emoji)  # one drawing per emoji and style
    for row in file.rows:
        assert row["subgroup"] in file.groups[row["group"]]
        assert set(row) == {"hexcode", "name", "group", "subgroup", "tags", "caption", "family"}


def test_every_picture_decodes_and_none_is_there_twice(file: EmojiFile) -> None:
    pixels = module.decode(file, 32)
    assert pixels.shape == (len(file.emoji), 3, 32, 32)
    assert (pixels.reshape(len(pixels), -1).std(axis=1) > 1).all()  # none is blank
    for style in range(len(STYLES)):
        whole = [file.rgba(i).tobytes() for i in np.flatnonzero(file.style == style)[:200]]
        assert len(set(whole)) == len(whole)


def test_nothing_unfit_for_a_class(file: EmojiFile) -> None:
    names = {row["name"] for row in file.rows}
    unfit = {"middle finger", "water pistol", "kitchen knife", "dagger", "bomb", "cigarette"}
    unfit |= {"crossed swords", "syringe", "pill", "beer mug", "wine glass", "coffin"}
    assert not names & unfit
    assert not any(re.search("1F3F[B-F]", row["hexcode"]) for row in file.rows)  # skin tones
    assert not {"flags", "component"} & set(file.groups)


def test_items_have_the_form_of_a_batch(train: EmojiDataset) -> None:
    batch = default_collate([train[i] for i in range(4)])
    assert batch["image"].shape == (4, 3, 32, 32) and batch["image"].dtype == torch.float32
    for key in ("label", "group", "style"):
        assert batch[key].shape == (4,) and batch[key].dtype == torch.int64
    assert all(isinstance(text, str) for text in batch["caption"] + batch["hexcode"])
    assert len(batch["caption"]) == len(batch["hexcode"]) == 4


def test_tensors_of_the_whole_set_agree_with_the_items(train: EmojiDataset) -> None:
    assert train.images.shape == (len(train), 3, 32, 32) and train.images.dtype == torch.uint8
    for index in (0, 1234, len(train) - 1):
        item = train[index]
        assert torch.equal(((item["image"] + 1) * 127.5).round().byte(), train.images[index])
        assert item["label"] == train.labels[index] and item["group"] == train.group_ids[index]
        assert item["style"] == train.style_ids[index]
        assert item["caption"] == train.captions[index]
        assert item["hexcode"] == train.hexcodes[index]


def test_pictures_lie_over_pure_white(train: EmojiDataset) -> None:
    images = train.images.float() / 127.5 - 1
    assert images.min() >= -1 and images.max() == 1
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]  # (N, 3, 4)
    assert (corners == 1).float().mean() > 0.9
    assert images.mean() > 0  # emoji are mostly white


@pytest.mark.parametrize("size", [32, 64, 128])
def test_sizes(small: Path, size: int) -> None:
    data = EmojiDataset("all", size, subgroups=["food-fruit"], path=small)
    assert data[0]["image"].shape == (3, size, size)
    exact = EmojiDataset("all", 128, subgroups=["food-fruit"], path=small).images.float()
    if size < 128:
        mean = torch.nn.functional.avg_pool2d(exact, 128 // size)
        assert (mean - data.images).abs().mean() < 4  # of 255: the same picture, smaller


def test_split_is_disjoint_by_family(
    file: EmojiFile, train: EmojiDataset, val: EmojiDataset
) -> None:
    family = {row["hexcode"]: row["family"] for row in file.rows}
    in_train = {family[code] for code in train.hexcodes}
    in_val = {family[code] for code in val.hexcodes}
    assert not in_train & in_val
    both = EmojiDataset("all", 32)
    assert sorted(train.hexcodes + val.hexcodes) == sorted(both.hexcodes)
    assert 0.10 <= len(val) / len(both) <= 0.12


def test_split_is_disjoint_in_pixels(train: EmojiDataset, val: EmojiDataset) -> None:
    in_train = {image.numpy().tobytes() for image in train.images}
    assert not any(image.numpy().tobytes() in in_train for image in val.images)


GENDERED = [
    ("1F468", "1F469", "1F9D1", "1F9D4", "1F468-200D-1F9B0", "1F471-200D-2640-FE0F"),
    ("1F466", "1F467", "1F9D2"),
    ("1F474", "1F475", "1F9D3"),
    ("1F9D1-200D-1F680", "1F468-200D-1F680", "1F469-200D-1F680"),
    ("1F46E", "1F46E-200D-2642-FE0F", "1F46E-200D-2640-FE0F"),
    ("1F9DC", "1F9DC-200D-2642-FE0F", "1F9DC-200D-2640-FE0F"),
    ("1F46A", "1F468-200D-1F469-200D-1F466", "1F469-200D-1F467"),
    ("1F48F", "1F469-200D-2764-FE0F-200D-1F48B-200D-1F468"),
    ("1F46B", "1F46C", "1F46D", "1F9D1-200D-1F91D-200D-1F9D1"),
    ("1F385", "1F936", "1F9D1-200D-1F384"),
]


@pytest.mark.parametrize("codes", GENDERED)
def test_variants_by_gender_are_one_family(file: EmojiFile, codes: tuple[str, ...]) -> None:
    family = {row["hexcode"]: row["family"] for row in file.rows}
    assert len({family[code] for code in codes}) == 1


def test_roles_of_every_name_stay_together(file: EmojiFile) -> None:
    family = {row["name"]: row["family"] for row in file.rows}
    pairs = [(name, name.replace("woman", "man", 1)) for name in family if "woman" in name]
    found = [pair for pair in pairs if pair[1] in family]
    assert len(found) > 80
    assert [pair for pair in found if family[pair[0]] != family[pair[1]]] == []


def test_different_things_are_different_families(file: EmojiFile) -> None:
    family = {row["name"]: row["family"] for row in file.rows}
    names = ("person", "child", "older person", "astronaut", "cook", "red apple", "male sign")
    names += ("female sign", "right arrow", "red heart", "heart on fire")
    assert len({family[name] for name in names}) == len(names)


def test_every_default_class_is_in_both_splits(train: EmojiDataset, val: EmojiDataset) -> None:
    assert train.classes == val.classes and len(train.classes) == 47
    for data, least in ((train, 20), (val, 4)):
        counts = torch.bincount(data.labels, minlength=len(data.classes))
        assert counts.min() >= least
    share = torch.bincount(val.labels) / (torch.bincount(val.labels) + torch.bincount(train.labels))
    assert share.max() < 0.17


def test_split_does_not_change(file: EmojiFile) -> None:
    """A model trained yesterday must not meet its validation set in training today."""
    families = validation_families(file)
    assert len(families) == 166
    digest = hashlib.sha256(" ".join(sorted(families)).encode()).hexdigest()
    assert digest.startswith("987231c675f9d208")


def test_selection(file: EmojiFile, train: EmojiDataset) -> None:
    fruit = EmojiDataset("all", 32, subgroups=["food-sweet", "food-fruit"], styles=["blob", "noto"])
    assert fruit.classes == ("food-sweet", "food-fruit")  # in the order asked for
    assert fruit.label_of("food-fruit") == 1
    assert set(fruit.style_ids.tolist()) == {STYLES.index("noto"), STYLES.index("blob")}
    assert {fruit.groups[i] for i in fruit.group_ids.tolist()} == {"food-drink"}
    animals = EmojiDataset("all", 32, groups=["animals-nature"], min_count=1)
    assert animals.classes == tuple(file.groups["animals-nature"])
    assert len(animals) == sum(file.rows[e]["group"] == "animals-nature" for e in file.emoji)
    assert animals.groups == train.groups == tuple(file.groups)


def test_symbols_are_off_unless_asked_for(train: EmojiDataset) -> None:
    number = train.groups.index("symbols")
    assert number not in train.group_ids
    for arguments in ({"symbols": True}, {"groups": ["symbols"]}, {"subgroups": ["geometric"]}):
        assert number in EmojiDataset("all", 32, **arguments).group_ids
    everything = EmojiDataset("all", 32, symbols=True, min_count=1)
    assert len(everything) == len(read_emoji().emoji)


def test_labels_do_not_depend_on_the_styles(train: EmojiDataset) -> None:
    assert EmojiDataset("val", 32, styles=["blob"]).classes == train.classes


CAPTIONS = {
    "1F34E": "a red apple",
    "1F347": "grapes",
    "1F35E": "bread",
    "1F418": "an elephant",
    "1F984": "a unicorn",
    "1F68C": "a bus",
    "1F3E1": "a house with a garden",
    "1F9D1-200D-1F680": "an astronaut",
    "1F3CB-FE0F-200D-2642-FE0F": "a man lifting weights",
    "1F46E": "a police officer",
    "1F468-200D-1F469-200D-1F467-200D-1F467": "a family of a man, a woman and two girls",
    "1F468-200D-1F9B0": "a man with red hair",
    "1F550": "a clock at one o'clock",
    "1F5FD": "the Statue of Liberty",
    "1F385": "Santa Claus",
    "1F53B": "the red triangle pointed down symbol",
}


def test_captions_read_well(file: EmojiFile) -> None:
    caption = {row["hexcode"]: row["caption"] for row in file.rows}
    assert {code: caption[code] for code in CAPTIONS} == CAPTIONS
    assert len(set(caption.values())) == len(caption)
    for text in caption.values():
        assert text == text.strip() and "  " not in text and len(text.split()) <= 14
        assert not re.match(r"a [aio](?!ne-)|an [bcdfgjkpqtvwz]", text)


def test_load_rgba(file: EmojiFile) -> None:
    apple = load_rgba("1F34E", "twemoji")
    assert apple.size == (128, 128) and apple.mode == "RGBA"
    assert apple.getpixel((0, 0))[3] == 0 and apple.getpixel((64, 80))[3] == 255
    assert load_rgba("2602").tobytes() == load_rgba("2602-fe0f").tobytes()
    with pytest.raises(ValueError, match=r"1F346F.*style 'blob'"):
        load_rgba("1F346F", "blob")
    with pytest.raises(ValueError, match=r"1F9C1.*'blob', there is one in noto, twemoji"):
        load_rgba("1F9C1", "blob")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "test"}, ["split='test'", "train, val, all"]),
        ({"size": 48}, ["size=48", "32, 64, 128"]),
        ({"styles": ["notto"]}, ["styles='notto'", "'noto'", "fluent3d"]),
        ({"styles": "noto"}, ["styles='noto'", "sequence"]),
        ({"styles": []}, ["styles=()"]),
        ({"subgroups": ["food-fruits"]}, ["subgroups='food-fruits'", "'food-fruit'", "drink"]),
        ({"subgroups": ["drink", "drink"]}, ["subgroups=", "twice"]),
        ({"groups": ["animal"]}, ["groups='animal'", "animals-nature", "objects"]),
        ({"min_count": 0}, ["min_count=0", "at least 1"]),
        ({"min_count": 1000}, ["min_count=1000", "no subgroup"]),
        ({"subgroups": ["geometric"], "styles": ["fluent3d"]}, ["geometric", "fluent3d"]),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        EmojiDataset(**{"size": 32, **arguments})
    assert all(word in str(error.value) for word in words), error.value


def test_unknown_class_is_named(train: EmojiDataset) -> None:
    with pytest.raises(ValueError, match=r"subgroup='animal-brid'.*'animal-bird'.*Allowed: face-"):
        train.label_of("animal-brid")


@pytest.mark.parametrize("keep", [0, 10, 5000, -100])
def test_a_damaged_file_is_named(tmp_path: Path, small: Path, keep: int) -> None:
    path = tmp_path / "cut.npz"
    path.write_bytes(small.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.npz: damaged"):
        EmojiDataset(path=path)


def test_a_flipped_bit_is_noticed(tmp_path: Path, small: Path) -> None:
    content = bytearray(small.read_bytes())
    content[5000] ^= 1
    path = tmp_path / "flipped.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped\.npz: damaged"):
        EmojiDataset(path=path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz.*build\.py"):
        EmojiDataset(path=tmp_path / "nowhere.npz")


def test_damaged_cache_is_rebuilt(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINILDM_CACHE", str(tmp_path / "cache"))
    data = {"split": "all", "size": 32, "subgroups": ["food-fruit"], "path": small}
    fresh = EmojiDataset(**data).images
    (cached,) = (tmp_path / "cache").iterdir()
    good = cached.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for bad in (b"", good[:40], good[:-50], bytes(flipped), good[:-1] + b"x", b"PK" + good):
        cached.write_bytes(bad)
        assert torch.equal(EmojiDataset(**data).images, fresh)
        assert cached.read_bytes() == good


def test_cache_saves_the_decoding(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"split": "all", "size": 64, "subgroups": ["food-fruit"], "path": small}
    fresh = EmojiDataset(**data).images
    monkeypatch.setattr(module, "on_white", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(EmojiDataset(**data).images, fresh)


def test_a_cache_that_cannot_be_written_costs_time_alone(
    tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("MINILDM_CACHE", str(tmp_path / "a-file/cache"))
    data = EmojiDataset("all", 32, subgroups=["food-fruit"], path=small)
    assert len(data.images) == len(data)


def test_fingerprint_tells_selections_apart(train: EmojiDataset, val: EmojiDataset) -> None:
    assert train.fingerprint == EmojiDataset("train", 32).fingerprint
    others = [val, EmojiDataset("train", 64), EmojiDataset("train", 32, styles=["noto"])]
    others += [EmojiDataset("train", 32, symbols=True), EmojiDataset("train", 32, min_count=11)]
    assert len({data.fingerprint for data in [train, *others]}) == 1 + len(others)
    assert re.fullmatch("[0-9a-f]{64}", train.fingerprint)
    assert train.name == "emoji-train"


def test_datasets_travel_to_worker_processes(small: Path) -> None:
    data = EmojiDataset("all", 32, subgroups=["food-fruit"], path=small)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[3]["image"], data[3]["image"])
