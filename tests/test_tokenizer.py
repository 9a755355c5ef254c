"""Captions as numbers: a vocabulary that is learned, kept, and honest about unknown words."""

from pathlib import Path

import pytest
import torch

from minildm.tokenizer import SPECIAL, CaptionTokenizer

CAPTIONS = ["a red apple", "a dog", "two dogs and a cat", "eight o'clock", "a high-heeled shoe"]


@pytest.fixture
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.trained_on(CAPTIONS)


def test_every_word_of_the_captions_is_known(tokenizer: CaptionTokenizer) -> None:
    assert not any(tokenizer.unknown(caption) for caption in CAPTIONS)
    words = {w for c in CAPTIONS for w in c.replace("'", " ' ").replace("-", " - ").split()}
    assert len(tokenizer) == len(SPECIAL) + len(words)


def test_a_caption_is_start_words_end_and_padding(tokenizer: CaptionTokenizer) -> None:
    ids = tokenizer(["a dog", "", "a red apple"], length=6)
    assert ids.shape == (3, 6)
    assert ids.dtype == torch.int64
    pad, _unknown, start, end = range(4)  # the special tokens come first
    a, dog = ids[0, 1:3].tolist()
    assert ids[0].tolist() == [start, a, dog, end, pad, pad]
    assert ids[1].tolist() == [start, end, pad, pad, pad, pad]
    assert ids[2, 1] == a
    assert len({*ids[2, 1:4].tolist(), dog}) == 4


def test_case_does_not_matter_and_order_does(tokenizer: CaptionTokenizer) -> None:
    ids = tokenizer(["A Red APPLE", "a red apple", "red a apple"], length=8)
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[1], ids[2])


def test_unknown_words_are_named_as_they_were_written(tokenizer: CaptionTokenizer) -> None:
    assert tokenizer.unknown("a Zorgly dog, blue") == ["Zorgly", ",", "blue"]
    assert tokenizer.words("a zorgly dog") == ["a", "[UNK]", "dog"]
    ids = tokenizer(["a zorgly dog", "a bluish dog"], length=8)
    assert torch.equal(ids[0], ids[1])  # nothing of an unknown word is left


def test_only_the_most_frequent_words_fit_a_small_vocabulary() -> None:
    small = CaptionTokenizer.trained_on(["a a a b b c"], max_words=len(SPECIAL) + 2)
    assert small.words("a b c") == ["a", "b", "[UNK]"]


@pytest.mark.parametrize(("length", "fits"), [(5, True), (4, False)])
def test_a_caption_that_is_too_long_is_refused(
    length: int, fits: bool, tokenizer: CaptionTokenizer
) -> None:
    if fits:
        assert tokenizer(["a red apple"], length).shape == (1, 5)
        return
    with pytest.raises(ValueError, match=r"'a red apple' has 3 tokens, must be at most 2"):
        tokenizer(["a red apple"], length)


def test_what_is_saved_comes_back(tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    again = CaptionTokenizer.load(tmp_path / "tokenizer.json")
    assert torch.equal(again(CAPTIONS, 9), tokenizer(CAPTIONS, 9))
    assert again.unknown("a whale") == ["whale"]
    assert len(again) == len(tokenizer)


def test_training_is_the_same_each_time() -> None:
    first, second = (CaptionTokenizer.trained_on(CAPTIONS) for _ in range(2))
    assert torch.equal(first(CAPTIONS, 9), second(CAPTIONS, 9))


@pytest.mark.parametrize("content", ["", "{}", '{"model": 3}'])
def test_a_broken_file_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        CaptionTokenizer.load(path)
    with pytest.raises(ValueError, match="is no tokenizer"):
        CaptionTokenizer.load(tmp_path / "missing.json")
