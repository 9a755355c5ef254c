"""The official encoders of conditions, exactly: every name, shape and parameter, what they compute.

Names and shapes are the official ones. For the numbers there are two truths: the description of
the official encoder, written out in float64 below, and diffusers' model of it.
"""

import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from published import CONFIGS, drawn, listed_shapes, names_hash, official_state, on_meta
from torch import Tensor

from minildm import interop
from minildm.checkpoints import CheckpointError
from minildm.conditioning import ClassConditioner, Conditioner, IdConditioner, TextConditioner

with warnings.catch_warnings():
    # Deprecations inside diffusers and what it imports, none of which a test could mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
        LDMBertConfig,
        LDMBertModel,
    )

MODULES = "ldm.modules.encoders.modules"
PUBLISHED = {
    c["path"]: c["cond_stage"]
    for c in CONFIGS
    if re.search(
        "ClassEmbedder|BERTEmbedder|SpatialRescaler", c.get("cond_stage", {}).get("target", "")
    )
}
TINY = {"n_embed": 12, "n_layer": 2, "vocab_size": 40, "max_seq_len": 7}


def loaded(name: str, params: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Conditioner:
    return interop.load_compvis({"target": f"{MODULES}.{name}", "params": params}, tensors)


def of_size(**params: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of an official transformer, from the published one of the layout model."""
    listed = listed_shapes(
        PUBLISHED["models/ldm/layout2img-openimages256/config.yaml"]["state_dict"]["keys_sha256"]
    )
    size = {512: params["n_embed"], 2048: 4 * params["n_embed"], 8192: params["vocab_size"]}
    size |= {92: params["max_seq_len"]}
    inner = re.compile(r".*\.to_[qkv]\.weight")  # 8 heads of 64, which is 512 as well
    shapes = {}
    for name, shape in listed.items():
        found = re.match(r".*\.layers\.(\d+)\.", name)
        if found and int(found[1]) >= 2 * params["n_layer"]:
            continue
        new = [size[n] for n in shape]
        if inner.match(name):
            new[0] = 512
        if name.endswith("to_out.weight"):
            new[1] = 512
        shapes[name] = tuple(new)
    return shapes


@pytest.mark.parametrize("path", PUBLISHED)
def test_a_published_encoder_loads_exactly(path: str) -> None:
    theirs = PUBLISHED[path]
    tensors = on_meta(listed_shapes(theirs["state_dict"]["keys_sha256"]))
    model = loaded(theirs["target"].rpartition(".")[2], theirs["hparams"], tensors)
    state = official_state(model)
    unused = {name for name in tensors if name.startswith("transformer.to_logits.")}
    assert len(tensors) == theirs["state_dict"]["n_keys"]
    assert state.keys() == tensors.keys() - unused
    whole = state | {name: tensors[name] for name in unused}
    assert names_hash(whole) == theirs["state_dict"]["keys_sha256"]
    scores = theirs.get("params_breakdown", {}).get("to_logits_unused", 0)
    assert bool(scores) == bool(unused)
    assert sum(p.numel() for p in model.parameters()) == theirs["params"] - scores


def test_all_eight_are_there() -> None:
    assert len(PUBLISHED) == 8


def test_a_published_encoder_is_of_its_kind() -> None:
    found = {}
    for path, theirs in PUBLISHED.items():
        tensors = on_meta(listed_shapes(theirs["state_dict"]["keys_sha256"]))
        model = loaded(theirs["target"].rpartition(".")[2], theirs["hparams"], tensors)
        found[path.split("/")[2]] = (type(model), model.config)
    kind, text = found["text2img256"]
    assert kind is TextConditioner
    assert (text.d_cond, text.depth, text.length, text.vocab_size) == (640, 32, 77, 30522)
    assert (text.heads, text.d_head) == (8, 64)
    kind, layout = found["layout2img-openimages256"]
    assert kind is IdConditioner
    assert (layout.d_cond, layout.depth, layout.length, layout.vocab_size) == (512, 16, 92, 8192)
    kind, classes = found["cin256-v2.yaml"]
    assert kind is ClassConditioner
    assert (len(classes.classes), classes.classes[-1], classes.null_class) == (1000, "999", True)
    assert not found["cin256"][1].null_class


# --- what they compute ---


def encoded(tensors: Mapping[str, Tensor], ids: Tensor, depth: int) -> Tensor:
    """The official encoder, written out: 8 heads of 64, each norm before its layer, no mask."""
    w = {name.removeprefix("transformer."): t.double() for name, t in tensors.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["token_emb.weight"][ids] + w["pos_emb.emb.weight"][: ids.shape[1]]
    for i in range(depth):
        attn, ff = (f"attn_layers.layers.{n}" for n in (2 * i, 2 * i + 1))
        h = norm(x, f"{attn}.0")
        q, k, v = (
            (h @ w[f"{attn}.1.to_{m}.weight"].T).unflatten(-1, (8, 64)).transpose(1, 2)
            for m in "qkv"
        )
        weights = (q @ k.transpose(2, 3) / math.sqrt(64)).softmax(dim=-1)  # (B, 8, M, M)
        h = (weights @ v).transpose(1, 2).flatten(2)
        x = x + h @ w[f"{attn}.1.to_out.weight"].T + w[f"{attn}.1.to_out.bias"]
        h = norm(x, f"{ff}.0")
        h = h @ w[f"{ff}.1.net.0.0.weight"].T + w[f"{ff}.1.net.0.0.bias"]
        h = h * (1 + torch.erf(h / math.sqrt(2))) / 2  # the plain GELU
        x = x + h @ w[f"{ff}.1.net.2.weight"].T + w[f"{ff}.1.net.2.bias"]
    return norm(x, "norm")


def drawn_ids(params: Mapping[str, int]) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(params["vocab_size"], (3, params["max_seq_len"]), generator=draw)


@pytest.mark.parametrize("name", ["TransformerEmbedder", "BERTEmbedder"])
@torch.no_grad()
def test_ids_are_encoded_as_described(name: str) -> None:
    tensors, ids = drawn(of_size(**TINY)), drawn_ids(TINY)
    more = {"use_tokenizer": False} if name == "BERTEmbedder" else {}
    model = loaded(name, {**TINY, **more, "device": "cpu"}, tensors).double()
    tokens = model({"ids": ids}).tokens
    assert tokens.shape == (3, 7, 12)
    assert (tokens - encoded(tensors, ids, depth=2)).abs().max() < 1e-10


WORDS = {"n_embed": 12, "n_layer": 1, "vocab_size": 30522, "max_seq_len": 9}


@torch.no_grad()
def test_captions_are_encoded_as_described() -> None:
    tensors = drawn(of_size(**WORDS))
    sizes = {key: WORDS[key] for key in ("n_embed", "n_layer", "max_seq_len")}
    model = loaded("BERTEmbedder", sizes, tensors).double()
    assert model.config.vocab_size == 30522
    # [CLS], "a" and "dog" as everybody's uncased BERT numbers them, [SEP], padding.
    ids = torch.tensor([[101, 1037, 3899, 102, 0, 0, 0, 0, 0], [101, 102, 0, 0, 0, 0, 0, 0, 0]])
    truth = encoded(tensors, ids, depth=1)
    assert (model({"caption": ["A dog", ""]}).tokens - truth).abs().max() < 1e-10
    assert (model.null(1).tokens - truth[1:]).abs().max() < 1e-10


DIFFUSERS = {
    "0": "self_attn_layer_norm",
    "1.to_q": "self_attn.q_proj",
    "1.to_k": "self_attn.k_proj",
    "1.to_v": "self_attn.v_proj",
    "1.to_out": "self_attn.out_proj",
}
DIFFUSERS_FF = {"0": "final_layer_norm", "1.net.0.0": "fc1", "1.net.2": "fc2"}


def converted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors by diffusers' names."""
    tops = {"token_emb": "embed_tokens", "pos_emb.emb": "embed_positions", "norm": "layer_norm"}
    state = {}
    for name, tensor in tensors.items():
        module, kind = name.removeprefix("transformer.").rsplit(".", 1)
        if module == "to_logits":
            state[f"to_logits.{kind}"] = tensor
        elif found := re.fullmatch(r"attn_layers\.layers\.(\d+)\.(.+)", module):
            i, part = int(found[1]), (DIFFUSERS_FF if int(found[1]) % 2 else DIFFUSERS)[found[2]]
            state[f"model.layers.{i // 2}.{part}.{kind}"] = tensor
        else:
            state[f"model.{tops[module]}.{kind}"] = tensor
    return state


@torch.no_grad()
def test_diffusers_encodes_the_same() -> None:
    tensors, ids = drawn(of_size(**TINY)), drawn_ids(TINY)
    theirs = LDMBertModel(
        LDMBertConfig(
            vocab_size=TINY["vocab_size"],
            max_position_embeddings=TINY["max_seq_len"],
            encoder_layers=TINY["n_layer"],
            encoder_ffn_dim=4 * TINY["n_embed"],
            encoder_attention_heads=8,
            head_dim=64,
            d_model=TINY["n_embed"],
        )
    )
    theirs.load_state_dict(converted(tensors))
    truth = theirs.double().eval().model(ids, return_dict=False)[0]
    tokens = loaded("TransformerEmbedder", TINY, tensors).double()({"ids": ids}).tokens
    assert (tokens - truth).abs().max() < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("n", [1000, 1001])
def test_a_class_is_its_row(n: int, randn: Any) -> None:
    table = randn(n, 6)
    params = {"embed_dim": 6, "n_classes": n, "key": "class_label"}
    model = loaded("ClassEmbedder", params, {"embedding.weight": table})
    assert torch.equal(model(model.batch_from(["7", "999"], 2)).tokens[:, 0], table[[7, 999]])
    with pytest.raises(ValueError, match=r"label must lie in 0\.\.999"):
        model({"label": torch.tensor([1000])})
    if n == 1001:
        assert torch.equal(model.null(2).tokens[:, 0], table[[1000, 1000]])
        return
    with pytest.raises(ValueError, match="null_class=False: this model knows no"):
        model.null(2)


# --- in and out, and what does not fit ---


@pytest.mark.parametrize("name", ["TransformerEmbedder", "BERTEmbedder", "ClassEmbedder"])
def test_what_was_loaded_comes_out_again(name: str, randn: Any) -> None:
    if name == "ClassEmbedder":
        params, tensors = {"embed_dim": 6, "n_classes": 5}, {"embedding.weight": randn(5, 6)}
    else:
        size = WORDS if name == "BERTEmbedder" else TINY
        params, tensors = size, drawn(of_size(**size))
    model = loaded(name, params, tensors)
    state = official_state(model)
    assert {n for n in tensors if n not in state} <= {
        "transformer.to_logits.weight",
        "transformer.to_logits.bias",
    }
    assert all(torch.equal(state[n], tensors[n]) for n in state)
    assert not model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    again = loaded(name, params, state)
    assert again.config == model.config
    assert all(torch.equal(t, state[n]) for n, t in official_state(again).items())


BAD = {
    "unknown": ("TransformerEmbedder", {"rotary": True}, "rotary=True is not known"),
    "other words": ("BERTEmbedder", {"vocab_size": 100}, "vocab_size=100 cannot be expressed"),
    "dropout": ("BERTEmbedder", {"embedding_dropout": 0.1}, "embedding_dropout=0.1 cannot"),
    "truth": ("BERTEmbedder", {"use_tokenizer": 1}, "use_tokenizer=1 cannot"),
    "no depth": ("TransformerEmbedder", {"n_layer": 0}, "n_layer=0 must be a whole number"),
    "too short": ("TransformerEmbedder", {"max_seq_len": 2}, "length=2 must be at least 3"),
    "no vocabulary": ("TransformerEmbedder", {"vocab_size": None}, "vocab_size=None"),
    "no width": ("ClassEmbedder", {"n_classes": 3}, "lacks 'embed_dim'"),
    "no classes": ("ClassEmbedder", {"embed_dim": 2, "n_classes": 0}, "n_classes=0"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_encoder_we_cannot_express_is_refused(case: str) -> None:
    name, changes, said = BAD[case]
    params = changes if name == "ClassEmbedder" else TINY | changes
    with pytest.raises(ValueError, match=rf"config\.params.*{said}"):
        loaded(name, params, {})


def test_a_tensor_that_does_not_fit_is_named() -> None:
    tensors = drawn(of_size(**TINY))
    odd = tensors | {"transformer.norm.weight": torch.ones(5), "model.betas": torch.ones(3)}
    with pytest.raises(CheckpointError, match=r"(?s)2 tensors do not fit.*norm\.weight is \(5,\)"):
        loaded("TransformerEmbedder", TINY, odd)
    deeper = TINY | {"n_layer": 3}
    with pytest.raises(CheckpointError, match=r"layers\.4\.0\.weight \(12,\) is missing"):
        loaded("TransformerEmbedder", deeper, tensors)


def test_a_whole_model_is_refused_with_what_to_do() -> None:
    whole = {f"cond_stage_model.{name}": t for name, t in drawn(of_size(**TINY)).items()}
    with pytest.raises(CheckpointError, match=r"holds a whole model.*'cond_stage_model\.'"):
        loaded("TransformerEmbedder", TINY, whole)
