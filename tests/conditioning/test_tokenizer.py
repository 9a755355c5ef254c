"""Captions as numbers: a learned vocabulary, its files, unknown words."""

from pathlib import Path

import pytest
import torch

from minildm.conditioning.tokenizer import SPECIAL, CaptionTokenizer

CAPTIONS = ["a red apple", "a dog", "two dogs and a cat", "eight o'clock", "a high-heeled shoe"]


@pytest.fixture
def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.trained_on(CAPTIONS)


def test_every_word_of_the_captions_is_known(tokenizer: CaptionTokenizer) -> None:
    assert not any(tokenizer.unknown(caption) for caption in CAPTIONS)
    words = {w for c in CAPTIONS for w in c.replace("'", " ' ").replace("-", " - ").split()}
    assert len(tokenizer) == len(SPECIAL) + len(words)
    assert {tokenizer.number(word) for word in words} == set(range(4, 4 + len(words)))


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


def test_unknown_words_are_named_as_they_were_written(tokenizer: CaptionTokenizer) -> None:
    assert tokenizer.unknown("a Zorgly dog, blue") == ["Zorgly", ",", "blue"]
    assert tokenizer.words("a zorgly dog") == ["a", "[UNK]", "dog"]
    assert tokenizer.number("zorgly") is None
    ids = tokenizer(["a zorgly dog", "a bluish dog"], length=8)
    assert torch.equal(ids[0], ids[1])  # nothing of an unknown word is left


def test_only_the_most_frequent_words_fit_a_small_vocabulary() -> None:
    small = CaptionTokenizer.trained_on(["a a a b b c"], max_words=len(SPECIAL) + 2)
    assert small.words("a b c") == ["a", "b", "[UNK]"]


def test_a_caption_that_is_too_long_is_refused(tokenizer: CaptionTokenizer) -> None:
    assert tokenizer(["a red apple"], 5).shape == (1, 5)
    with pytest.raises(ValueError, match=r"'a red apple' has 3 tokens, at most 2"):
        tokenizer(["a red apple"], 4)


def test_a_saved_tokenizer_comes_back(tokenizer: CaptionTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    again = CaptionTokenizer.load(tmp_path / "tokenizer.json")
    assert torch.equal(again(CAPTIONS, 9), tokenizer(CAPTIONS, 9))
    assert again.unknown("a whale") == ["whale"]
    assert len(again) == len(tokenizer)


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"model": 3}', b"a\nb\n", b"\xff\xfe"])
@pytest.mark.parametrize("read", [CaptionTokenizer.load, CaptionTokenizer.word_pieces])
def test_a_broken_file_is_named(read: object, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "words"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"words is not a (tokenizer|vocabulary)"):
        read(path)
