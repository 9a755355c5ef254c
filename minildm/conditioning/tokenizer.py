"""Captions as numbers: a vocabulary learned from captions and kept with the model, or BERT's."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor

from minildm.files import atomic_write

PAD, UNKNOWN, START, END = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")  # BERT's names


class CaptionTokenizer:
    """Captions -> (B, length) int64: start, the words, end, padding, as in BERT.

    special: the tokens for padding, unknown words, start and end. Padding and truncation of
    `tokenizer` itself are turned off. Raises ValueError for a tokenizer without these tokens.
    """

    def __init__(self, tokenizer: Tokenizer, special: Sequence[str] = SPECIAL) -> None:
        if missing := [name for name in special if tokenizer.token_to_id(name) is None]:
            raise ValueError(f"tokenizer must have the tokens {', '.join(missing)}")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.pad, self._unknown, self._start, self._end = map(tokenizer.token_to_id, special)

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
    def word_pieces(cls, path: str | Path) -> "CaptionTokenizer":
        """BERT's uncased word pieces (Devlin et al. 2019), a `vocab.txt`. ValueError if broken."""
        try:
            return cls(BertWordPieceTokenizer.from_file(str(path))._tokenizer)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path} is not a vocabulary: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> "CaptionTokenizer":
        """Read a `tokenizer.json`, such as `save` writes. Raises ValueError for a broken file."""
        try:
            return cls(Tokenizer.from_str(Path(path).read_text(encoding="utf-8")))
        except Exception as error:
            raise ValueError(f"{path} is not a tokenizer: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` atomically."""
        with atomic_write(path) as file:
            file.write(self._tokenizer.to_str().encode())

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def number(self, token: str) -> int | None:
        """The id of a token; None outside the vocabulary."""
        return self._tokenizer.token_to_id(token)

    def words(self, caption: str) -> list[str]:
        """The tokens of a caption as text, unknown ones as [UNK]."""
        return self._tokenizer.encode(caption, add_special_tokens=False).tokens

    def unknown(self, caption: str) -> list[str]:
        """The words of a caption that are outside the vocabulary."""
        encoding = self._tokenizer.encode(caption, add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return [caption[slice(*where)] for number, where in pairs if number == self._unknown]

    def __call__(self, captions: Sequence[str], length: int) -> Tensor:
        """B captions -> (B, length) int64. Raises ValueError for one that is too long."""
        ids = torch.full((len(captions), length), self.pad)
        encodings = self._tokenizer.encode_batch(list(captions), add_special_tokens=False)
        for row, caption, encoding in zip(ids, captions, encodings, strict=True):
            if (n := len(encoding.ids)) > length - 2:
                raise ValueError(f"caption {caption!r:.60} has {n} tokens, at most {length - 2}")
            row[: n + 2] = torch.tensor([self._start, *encoding.ids, self._end])
        return ids
