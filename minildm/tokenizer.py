"""Captions as numbers: a vocabulary learned from captions and kept with the model, or BERT's."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from minildm.files import atomic_write

PAD, UNKNOWN, START, END = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")  # BERT's names


class CaptionTokenizer:
    """Captions -> (B, length) int64: start, the words, end, then padding, as BERT's.

    A word that is not in the vocabulary becomes the unknown token; `unknown` names it. A tokenizer
    that pads or cuts by itself no longer does.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        missing = [name for name in SPECIAL if tokenizer.token_to_id(name) is None]
        if missing:
            raise ValueError(f"tokenizer lacks the tokens {', '.join(missing)}")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.pad, self._unknown, self._start, self._end = map(tokenizer.token_to_id, SPECIAL)

    @classmethod
    def trained_on(cls, captions: Iterable[str], max_words: int = 8192) -> "CaptionTokenizer":
        """The vocabulary of these captions: lower case, split at spaces and punctuation."""
        tokenizer = Tokenizer(models.WordLevel({UNKNOWN: 1}, unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(
            vocab_size=max_words, special_tokens=list(SPECIAL), show_progress=False
        )
        tokenizer.train_from_iterator(captions, trainer)
        return cls(tokenizer)

    @classmethod
    def word_pieces(cls, vocabulary: str | Path) -> "CaptionTokenizer":
        """BERT's uncased word pieces (Devlin et al. 2019) from its `vocab.txt`, a piece a line.

        Raises ValueError for a file that is missing or lacks the special tokens.
        """
        try:
            pieces = Path(vocabulary).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{vocabulary} is no vocabulary: {error}") from error
        if missing := set(SPECIAL) - set(pieces):
            raise ValueError(
                f"{vocabulary} is no vocabulary: it lacks {', '.join(sorted(missing))}"
            )
        numbers = {piece: i for i, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.WordPiece(numbers, unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.add_special_tokens([name for name in (*SPECIAL, "[MASK]") if name in numbers])
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> "CaptionTokenizer":
        """From a `tokenizer.json`, such as `save` writes; ValueError names a broken file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
            return cls(Tokenizer.from_str(text))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path} is no tokenizer: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json`, whole or not at all."""
        with atomic_write(path) as file:
            file.write(self._tokenizer.to_str().encode())

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def number(self, token: str) -> int | None:
        """The number of a token, None for one that is not there."""
        return self._tokenizer.token_to_id(token)

    def words(self, caption: str) -> list[str]:
        """The tokens of a caption, as text; unknown ones as [UNK]."""
        return self._tokenizer.encode(caption, add_special_tokens=False).tokens

    def unknown(self, caption: str) -> list[str]:
        """The words of a caption that the vocabulary does not have."""
        encoding = self._tokenizer.encode(caption, add_special_tokens=False)
        return [
            caption[slice(*where)]
            for number, where in zip(encoding.ids, encoding.offsets, strict=True)
            if number == self._unknown
        ]

    def __call__(self, captions: Sequence[str], length: int) -> Tensor:
        """B captions -> (B, length) int64. Raises ValueError for one that is too long."""
        encodings = self._tokenizer.encode_batch(list(captions), add_special_tokens=False)
        rows = [[self._start, *encoding.ids, self._end] for encoding in encodings]
        return padded(captions, rows, length, self.pad)


def padded(captions: Sequence[str], rows: Sequence[Sequence[int]], length: int, pad: int) -> Tensor:
    """The tokens of B captions, start and end among them, as one tensor (B, length) int64.

    Raises ValueError for a caption that is too long, with its words.
    """
    ids = torch.full((len(captions), length), pad)
    for row, caption, tokens in zip(ids, captions, rows, strict=True):
        if len(tokens) > length:
            raise ValueError(
                f"caption {caption!r:.60} has {len(tokens) - 2} tokens, must be at most "
                f"{length - 2}"
            )
        row[: len(tokens)] = torch.tensor(tokens)
    return ids
