"""What reads the condition in a diffusers folder: LDMBert, CLIP, or a conditioner of ours."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minildm.checkpoints import CheckpointError, from_dict, to_dict
from minildm.conditioning import (
    Conditioner,
    ConditionerConfig,
    FrozenTextConditioner,
    SpatialConditioner,
    TextConditioner,
    build_conditioner,
)
from minildm.files import write_json
from minildm.interop.diffusers_files import (
    VERSION,
    WEIGHTS,
    read_mapping,
    read_weights,
    write_weights,
)
from minildm.interop.places import Place, fill, layer
from minildm.interop.reading import Section
from minildm.tokenizer import END, PAD, START, UNKNOWN, CaptionTokenizer

BERT, CLIP, OURS = "bert", "text_encoder", "conditioner"  # folders
_OWN = "minildm"  # the class in our own conditioner's config

_BERT_ONLY = {
    "model_type": "ldmbert",
    "activation_function": "gelu",
    "scale_embedding": False,
}
_SPECIAL = {"pad_token": PAD, "unk_token": UNKNOWN, "cls_token": START, "sep_token": END}


def load_bert(folder: Path) -> TextConditioner:
    """LDMTextToImagePipeline's LDMBertModel, with the words in `tokenizer`."""
    path = folder / BERT / "config.json"
    params = Section(read_mapping(path), str(path))
    for key, value in _BERT_ONLY.items():
        params.choice(key, [value], value)
    d = params.integer("d_model", 1280)
    params.choice("encoder_ffn_dim", [4 * d], 5120)
    sizes = {"depth": "encoder_layers", "heads": "encoder_attention_heads", "d_head": "head_dim"}
    sizes |= {"vocab_size": "vocab_size", "length": "max_position_embeddings"}
    known = {"depth": 32, "heads": 8, "d_head": 64, "vocab_size": 30522, "length": 77}
    shape = {ours: params.integer(name, known[ours]) for ours, name in sizes.items()}
    try:
        config = ConditionerConfig(kind="text", d_cond=d, **shape)
    except ValueError as error:
        raise ValueError(f"{params.where}: {error}") from error
    with torch.device("meta"):
        model = build_conditioner(config)
    tensors = read_weights(folder / BERT, "model")
    kept = {k: v for k, v in tensors.named.items() if not k.startswith("to_logits.")}
    fill(model, bert_places(config), tensors._replace(named=kept))  # next words are not asked
    words = _words(folder / "tokenizer")
    try:
        model.set_tokenizer(words)
    except ValueError as error:
        raise CheckpointError(f"{folder / 'tokenizer'}: {error}") from error
    return model.eval()


def _words(folder: Path) -> CaptionTokenizer:
    if (folder / "tokenizer.json").is_file():
        return CaptionTokenizer.load(folder / "tokenizer.json")
    if (folder / "tokenizer_config.json").is_file():
        path = folder / "tokenizer_config.json"
        Section(read_mapping(path), str(path)).choice("do_lower_case", [True], True)
    return CaptionTokenizer.word_pieces(folder / "vocab.txt")


def bert_places(config: ConditionerConfig) -> Iterator[Place]:
    """Our tensors and LDMBertModel's names."""
    for ours, theirs in (("embedding", "embed_tokens"), ("position", "embed_positions")):
        yield Place(f"network.{ours}.weight", (f"model.{theirs}.weight",))
    for i in range(config.depth):
        ours, theirs = f"network.blocks.{i}", f"model.layers.{i}"
        yield from layer(f"{ours}.norm1", f"{theirs}.self_attn_layer_norm")
        for matrix in ("q", "k", "v"):
            names = f"{ours}.attn.to_{matrix}.weight", f"{theirs}.self_attn.{matrix}_proj.weight"
            yield Place(names[0], names[1:])
        yield from layer(f"{ours}.attn.to_out", f"{theirs}.self_attn.out_proj")
        yield from layer(f"{ours}.norm2", f"{theirs}.final_layer_norm")
        yield from layer(f"{ours}.ff.0", f"{theirs}.fc1")
        yield from layer(f"{ours}.ff.2", f"{theirs}.fc2")
    yield from layer("network.norm", "model.layer_norm")


def save_bert(model: TextConditioner, folder: Path) -> None:
    """`bert` and `tokenizer`, for LDMTextToImagePipeline."""
    config, state, words = model.config, model.state_dict(), _words_of(model)
    params = {
        **_BERT_ONLY,
        "architectures": ["LDMBertModel"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.length,
        "encoder_layers": config.depth,
        "encoder_attention_heads": config.heads,
        "head_dim": config.d_head,
        "d_model": config.d_cond,
        "encoder_ffn_dim": 4 * config.d_cond,
        "pad_token_id": words.pad,
    }
    tensors = {
        name: part
        for place in bert_places(config)
        for name, part in zip(place.theirs, place.split(state[place.ours]), strict=True)
    }
    # It scores next words, too, which no pipeline asks for; without them it warns that it draws.
    tensors["to_logits.weight"] = torch.zeros(config.vocab_size, config.d_cond)
    tensors["to_logits.bias"] = torch.zeros(config.vocab_size)
    write_json(folder / BERT / "config.json", params)
    write_weights(folder / BERT / "model.safetensors", tensors)
    _save_words(words, config.length, folder / "tokenizer")


def _words_of(model: TextConditioner) -> CaptionTokenizer:
    if model.tokenizer is None:
        raise ValueError("this model of text has no tokenizer: call set_tokenizer first")
    return model.tokenizer


def _save_words(words: CaptionTokenizer, length: int, folder: Path) -> None:
    """The tokenizer, which there adds start and end by itself."""
    words.save(folder / "tokenizer.json")
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    numbers = {name: words.number(name) for name in (END, START)}
    content["post_processor"] = {
        "type": "BertProcessing",
        "sep": [END, numbers[END]],
        "cls": [START, numbers[START]],
    }
    write_json(folder / "tokenizer.json", content)
    card = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length}
    write_json(folder / "tokenizer_config.json", card | _SPECIAL)


def load_clip(folder: Path) -> FrozenTextConditioner:
    """StableDiffusionPipeline's CLIP, which stays there; ImportError without transformers."""
    path = folder / CLIP / "config.json"
    params = Section(read_mapping(path), str(path))
    params.choice("model_type", ["clip_text_model"], "clip_text_model")
    length = params.integer("max_position_embeddings", 77)
    words = folder / "tokenizer" / "tokenizer_config.json"
    if words.is_file():
        length = min(length, int(read_mapping(words).get("model_max_length", length)))
    config = ConditionerConfig(
        kind="text",
        encoder="clip",
        encoder_path=str(folder),
        d_cond=params.integer("hidden_size", 512),
        length=length,
    )
    return build_conditioner(config)


def save_clip(model: FrozenTextConditioner, folder: Path) -> None:
    """`text_encoder` and `tokenizer`, for StableDiffusionPipeline; written by transformers."""
    model.network.network.save_pretrained(folder / CLIP)
    model.tokenizer.save(folder / "tokenizer", model.config.length)


def load_own(folder: Path) -> Conditioner:
    """A conditioner that diffusers has no class for, as `save_own` wrote it."""
    content = read_mapping(folder / OURS / "config.json")
    where = folder / OURS / "config.json"
    if content.pop("_class_name", None) != _OWN:
        raise CheckpointError(f"{where} must name the _class_name {_OWN!r}")
    content.pop("_diffusers_version", None)
    try:
        config = from_dict(ConditionerConfig, content)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    with torch.random.fork_rng([]):  # first weights are drawn, only to be replaced
        model = build_conditioner(config)
    state = model.state_dict()
    if state:
        fill(model, [Place(name, (name,)) for name in state], read_weights(folder / OURS))
    if isinstance(reader := getattr(model, "tokens", model), TextConditioner):
        reader.set_tokenizer(CaptionTokenizer.load(folder / OURS / "tokenizer.json"))
    return model.eval()


def save_own(model: Conditioner, folder: Path) -> None:
    """`conditioner`: its config and its tensors by our names."""
    card = {"_class_name": _OWN, "_diffusers_version": VERSION, **to_dict(model.config)}
    write_json(folder / OURS / "config.json", card)
    if state := model.state_dict():
        write_weights(folder / OURS / f"{WEIGHTS}.safetensors", state)
    reader: Any = model.tokens if isinstance(model, SpatialConditioner) else model
    if isinstance(reader, TextConditioner):
        _words_of(reader).save(folder / OURS / "tokenizer.json")
