"""Frozen text encoders: what transformers computes from the same weights, outside the model.

The sentence encoder is the real one; BERT and CLIP are tiny and random.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conditioning.tiny_clip import tiny_clip
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizerFast, CLIPTextModel, CLIPTokenizer

from minildm.conditioning import CaptionTokenizer, FrozenTextConditioner, FrozenTextConfig
from minildm.conditioning import text_encoders as encoders

CAPTIONS = ["a red apple", "Two dogs, and a zorgly whale!", "", "naïve café 日本 x"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test reads its encoders again."""
    yield
    encoders.frozen_network.cache_clear()


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return tiny_clip(tmp_path)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A tiny BERT of its own vocabulary, with capitals."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "Red", "##dish"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    words = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), do_lower_case=False)
    words.save_pretrained(tmp_path)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "vocab_size": 9, "max_position_embeddings": 12}
    torch.manual_seed(0)
    BertModel(BertConfig(**shape)).save_pretrained(tmp_path)
    return tmp_path


def conditioner(**options: Any) -> FrozenTextConditioner:
    return FrozenTextConfig(**options).build().eval()


def of_clip(folder: Path, **options: Any) -> FrozenTextConditioner:
    return conditioner(**{"encoder": "clip", "path": str(folder), "d_cond": 16, **options})


# --- MiniLM and BERT ---


def test_word_pieces_are_berts(tmp_path: Path) -> None:
    folder = encoders.minilm_files()
    ours = CaptionTokenizer.word_pieces(folder / "vocab.txt")
    theirs = BertTokenizerFast.from_pretrained(folder, local_files_only=True)
    truth = theirs(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt")
    assert torch.equal(ours(CAPTIONS, 77), truth["input_ids"])
    assert torch.equal(encoders.frozen_tokenizer("minilm")(CAPTIONS, 77), truth["input_ids"])
    assert len(ours) == len(theirs) == 30522
    assert ours.words("unbelievably red") == theirs.tokenize("unbelievably red")
    assert ours.unknown("a 🦄 dog, zorgly") == ["🦄"]
    ours.save(tmp_path / "tokenizer.json")
    own = folder / "tokenizer.json"  # which pads and cuts at 128
    for again in map(CaptionTokenizer.load, (tmp_path / "tokenizer.json", own)):
        assert torch.equal(again([*CAPTIONS, "dog " * 200], 202)[:4], ours(CAPTIONS, 202))


@torch.no_grad()
def test_minilm_equals_transformers_on_a_padded_batch() -> None:
    folder = encoders.minilm_files()
    theirs = BertModel.from_pretrained(folder, local_files_only=True).eval()
    words = BertTokenizerFast.from_pretrained(folder, local_files_only=True)
    batch = words(CAPTIONS, padding="max_length", max_length=24, return_tensors="pt")
    truth = theirs(**batch).last_hidden_state
    tokens = conditioner()({"caption": CAPTIONS}).tokens
    there = batch["attention_mask"].bool()
    assert tokens.shape == (4, 24, 384)
    assert (tokens - truth)[there].abs().max() < 1e-5
    assert truth[there].std() > 0.1
    assert not tokens[~there].any()  # zeros after a caption's end


@torch.no_grad()
def test_bert_in_a_folder_equals_transformers(bert: Path) -> None:
    tau = conditioner(encoder="bert", path=str(bert), d_cond=16, length=6)
    assert tau.ids({"caption": ["a Red reddish"]}).tolist() == [[2, 5, 7, 6, 8, 3]]
    truth = BertModel.from_pretrained(bert).eval()(torch.tensor([[2, 5, 7, 3]]))
    tokens = tau({"caption": ["a Red"]}).tokens
    assert (tokens[:, :4] - truth.last_hidden_state).abs().max() < 1e-5
    assert not tokens[:, 4:].any()


def test_the_encoder_is_no_part_of_the_model() -> None:
    state = torch.get_rng_state()
    tau = conditioner()
    assert torch.equal(torch.get_rng_state(), state)  # a training's random numbers are its own
    assert not tau.state_dict() and not list(tau.parameters())
    tokens = tau.train()({"caption": ["a dog"]}).tokens
    assert not tokens.requires_grad and not tau.network.training
    assert tau.double()({"caption": ["a dog"]}).tokens.dtype == torch.float64


def test_a_dropped_caption_is_the_empty_caption() -> None:
    tau = conditioner().train()
    tokens = tau({"caption": ["a dog"] * 3}, drop=torch.tensor([True, False, True])).tokens
    null, kept = tau.null(3).tokens, tau({"caption": ["a dog"]}).tokens[0]
    assert torch.equal(null, tau({"caption": [""] * 3}).tokens)
    assert torch.equal(tokens[0::2], null[0::2])
    assert torch.equal(tokens[1], kept)


def test_neighbours_and_autocast_change_nothing() -> None:
    one = conditioner()({"caption": ["a red apple"]}).tokens
    with torch.autocast("cpu", torch.bfloat16):
        many = conditioner()({"caption": ["a longer caption of many words", "a red apple"]}).tokens
    assert torch.equal(one[0], many[1])


def test_each_caption_is_read_once() -> None:
    tau, read = conditioner(), []
    tau.network.register_forward_hook(lambda *_: read.append(1))
    try:
        for captions in (["a dog", "a cat", "a dog"], ["a cat"], ["a dog", "a cow"]):
            tau({"caption": captions})
    finally:
        tau.network._forward_hooks.clear()
    assert len(read) == 3


def test_unknown_words_and_long_prompts_are_named() -> None:
    tau = conditioner(length=6)
    with pytest.warns(UserWarning, match="'🦄'"):
        tau.batch_from("a 🦄", 1)
    with pytest.raises(ValueError, match="has 5 tokens, at most 4"):
        tau.batch_from("one two three four five", 1)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'minildm\[text\]'"):
        conditioner()


@pytest.mark.parametrize("options", [{"d_cond": 128}, {"length": 513}])
def test_sizes_that_the_encoder_lacks_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match=r"d_cond=\d+ must be 384 and length=\d+ at most 512"):
        conditioner(**options)


# --- CLIP ---


@torch.no_grad()
def test_clip_equals_transformers(clip: Path) -> None:
    tau = of_clip(clip, length=10)
    captions = ["a red dog", "", "Red"]
    words = CLIPTokenizer.from_pretrained(clip)
    ids = words(captions, padding="max_length", max_length=10, return_tensors="pt")["input_ids"]
    assert torch.equal(tau.ids({"caption": captions}), ids)
    truth = CLIPTextModel.from_pretrained(clip).eval()(ids).last_hidden_state
    tokens = tau({"caption": captions}).tokens
    assert (tokens - truth).abs().max() < 1e-5
    assert torch.equal(tau.null(1).tokens, tokens[1:2])
    assert not tau.state_dict()
    assert tau.tokenizer.words("red") == ["red</w>"]
    assert tau.batch_from("a red dog", 2) == {"caption": ["a red dog"] * 2}
    with pytest.raises(ValueError, match="'red a dog' has 4 tokens, at most 2"):
        of_clip(clip, length=4).batch_from("red a dog", 1)


def test_a_pipelines_folder_holds_encoder_and_vocabulary_apart(clip: Path, tmp_path: Path) -> None:
    expected = of_clip(clip, length=8)({"caption": ["red"]}).tokens
    encoders.frozen_network.cache_clear()
    files = [path for path in clip.iterdir() if path.is_file()]
    for folder, names in {"text_encoder": ("config.json", "model.safetensors")}.items():
        (clip / folder).mkdir()
        (clip / "tokenizer").mkdir()
        for path in files:
            path.rename(clip / (folder if path.name in names else "tokenizer") / path.name)
    assert torch.equal(of_clip(clip, length=8)({"caption": ["red"]}).tokens, expected)


def test_a_clip_without_weights_can_be_filled(clip: Path) -> None:
    source = encoders.frozen_network("clip", str(clip))
    (clip / "model.safetensors").unlink()
    network = encoders.clip_to_fill(str(clip))
    assert all(p.is_meta for p in network.parameters())
    config = FrozenTextConfig(encoder="clip", path=str(clip), d_cond=16, length=8)
    tau = FrozenTextConditioner(config, network)
    tau.network.load_state_dict(source.state_dict(), assign=True)
    tokens = tau({"caption": ["a red dog"]}).tokens
    assert torch.equal(tokens, FrozenTextConditioner(config, source)({"caption": ["a red dog"]})[0])


def without(weights: Path, name: str) -> None:
    tensors = load_file(weights)
    del tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})


HALVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda clip: (clip / "model.safetensors").unlink(), "model.safetensors"),
    "no config": (lambda clip: (clip / "config.json").unlink(), "config.json"),
    "a cut file": (lambda clip: os.truncate(clip / "model.safetensors", 5000), ".+"),
    "a lost tensor": (
        lambda clip: without(clip / "model.safetensors", "text_model.final_layer_norm.bias"),
        "it lacks .*final_layer_norm.bias",
    ),
    "no words": (
        lambda clip: [
            (clip / name).unlink(missing_ok=True)
            for name in ("vocab.json", "merges.txt", "tokenizer.json")
        ],
        "it lacks vocab.json, merges.txt",
    ),
}


@pytest.mark.parametrize("case", HALVES)
def test_an_incomplete_clip_is_refused(clip: Path, case: str) -> None:
    lose, said = HALVES[case]
    lose(clip)
    with pytest.raises(ValueError, match=rf"must hold clip's config.json, .* vocabulary: .*{said}"):
        of_clip(clip, length=4)
