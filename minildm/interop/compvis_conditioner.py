"""The official encoders of conditions: what their configs say, and what they call our tensors.

Class tables; transformers over tokens, of captions or numbered by somebody else; semantic maps.
"""

import re
from collections.abc import Iterator
from typing import Any

from minildm.checkpoints import CheckpointError
from minildm.conditioning import Conditioner, ConditionerConfig, TextConditioner, build_conditioner
from minildm.frozen_text import minilm_files
from minildm.interop.places import Place, empty, fill, layer
from minildm.interop.reading import Section, Tensors
from minildm.tokenizer import CaptionTokenizer

_MODULES = "ldm.modules.encoders.modules"
CLASSES, TOKENS, BERT, MAPS = (
    f"{_MODULES}.{name}"
    for name in ("ClassEmbedder", "TransformerEmbedder", "BERTEmbedder", "SpatialRescaler")
)
TARGETS = (CLASSES, TOKENS, BERT, MAPS)
IN_WHOLE_MODEL = "cond_stage_model."  # what its names begin with there

# What inference does not need: the scores of next words, which the encoder never computes.
UNUSED = re.compile(r"transformer\.to_logits\.")

_WORD_PIECES = 30522  # BERT's uncased vocabulary
_IMAGENET = 1000
_UNUSED_PARAMS = ("device", "key")  # where it ran, and the batch's entry that it read


def load_conditioner(target: str, params: Section, tensors: Tensors) -> Conditioner:
    """A conditioner with its official weights, named as in itself, without a prefix.

    Raises ImportError for a BERTEmbedder where the extra `text`, with its words, is missing.
    """
    config = conditioner_config(target, params)
    if any(str(name).startswith(IN_WHOLE_MODEL) for name in tensors.named):
        raise CheckpointError(
            f"{tensors.source} holds a whole model: give the tensors whose names begin with "
            f"{IN_WHOLE_MODEL!r}, without that"
        )
    model = empty(lambda: build_conditioner(config))
    fill(model, places(config), tensors, unused=UNUSED)
    if isinstance(model, TextConditioner):
        model.set_tokenizer(CaptionTokenizer.word_pieces(minilm_files() / "vocab.txt"))
    return model.eval()


def conditioner_config(target: str, params: Section) -> ConditionerConfig:
    """The official `params` of an encoder of conditions as our config.

    Raises ValueError for what is missing, not known, or cannot be expressed, with key and value.
    """
    if target == MAPS:
        shape = _semantic(params)
    elif target == CLASSES:
        shape = _classes(params)
    else:
        shape = _transformer(params, bert=target == BERT)
    params.check_all_read(_UNUSED_PARAMS)
    try:
        return ConditionerConfig(**shape)
    except ValueError as error:
        raise ValueError(f"{params.where}: {error}") from error


def _classes(params: Section) -> dict[str, Any]:
    """The names are numbers. A table of 1001 has "no class" last, as the official cin256-v2."""
    n = params.integer("n_classes", _IMAGENET)
    null_class = n == _IMAGENET + 1
    return {
        "kind": "class",
        "d_cond": params.integer("embed_dim"),
        "classes": tuple(map(str, range(n - null_class))),
        "null_class": null_class,
    } | ({} if null_class else {"p_uncond": 0.0})


def _semantic(params: Section) -> dict[str, Any]:
    """One-hot maps, halved bilinearly; the labels' names are numbers."""
    params.choice("method", ["bilinear"], "bilinear")
    params.choice("multiplier", [0.5], 0.5)
    params.choice("bias", [False], False)
    return {
        "concat": "semantic",
        "stages": params.integer("n_stages", 1),
        "labels": tuple(map(str, range(params.integer("in_channels", 3)))),
        "channels": params.integer("out_channels"),
    }


def _transformer(params: Section, *, bert: bool) -> dict[str, Any]:
    reads = bert and params.choice("use_tokenizer", [True, False], True)
    if bert:
        params.choice("embedding_dropout", [0.0, 0], 0.0)
    vocabulary = {"default": _WORD_PIECES} if bert else {}
    shape = {
        "kind": "text" if reads else "ids",
        "d_cond": params.integer("n_embed"),
        "depth": params.integer("n_layer"),
        "vocab_size": params.integer("vocab_size", **vocabulary),
        "length": params.integer("max_seq_len", 77),
    }
    if reads:
        params.choice("vocab_size", [_WORD_PIECES], _WORD_PIECES)
        return shape
    return shape | {"p_uncond": 0.0}  # no token stands for "no condition"


def places(config: ConditionerConfig) -> Iterator[Place]:
    """Our tensors and the official names."""
    if config.concat == "semantic":
        yield Place("spatial.mapper.weight", ("channel_mapper.weight",))
        return
    if config.kind == "class":
        yield Place("embedding.weight", ("embedding.weight",))
        return
    if config.kind == "none":
        return
    for ours, theirs in (("embedding", "token_emb"), ("position", "pos_emb.emb")):
        yield Place(f"network.{ours}.weight", (f"transformer.{theirs}.weight",))
    for i in range(config.depth):  # there, attention and feed-forward take turns in one list
        block, layers = f"network.blocks.{i}", "transformer.attn_layers.layers"
        attn, ff = f"{layers}.{2 * i}", f"{layers}.{2 * i + 1}"
        yield from layer(f"{block}.norm1", f"{attn}.0")
        for matrix in ("to_q", "to_k", "to_v"):
            yield Place(f"{block}.attn.{matrix}.weight", (f"{attn}.1.{matrix}.weight",))
        yield from layer(f"{block}.attn.to_out", f"{attn}.1.to_out")
        yield from layer(f"{block}.norm2", f"{ff}.0")
        yield from layer(f"{block}.ff.0", f"{ff}.1.net.0.0")
        yield from layer(f"{block}.ff.2", f"{ff}.1.net.2")
    yield from layer("network.norm", "transformer.norm")
