"""Captions: the tokenizer and its files; frozen encoders equal transformers with their weights.

The sentence encoder is the real one; BERT and CLIP are tiny and random.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import tiny_clip
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, BertTokenizerFast, CLIPTextModel, CLIPTokenizer

from minildm.conditioning import CaptionTokenizer, FrozenTextConditioner, FrozenTextConfig
from minildm.conditioning import text_encoders as encoders

CAPTIONS = ["a red apple", "a dog", "two dogs and a cat", "eight o'clock", "a high-heeled shoe"]
TOKENIZER = CaptionTokenizer.trained_on(CAPTIONS)
HARD = ["a red apple", "Two dogs, and a zorgly whale!", "", "naïve café 日本 x"]


# --- the tokenizer ---


def test_a_caption_is_start_words_end_and_padding(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    words = {w for c in CAPTIONS for w in c.replace("'", " ' ").replace("-", " - ").split()}
    for tokenizer in (TOKENIZER, CaptionTokenizer.load(tmp_path / "tokenizer.json")):
        assert len(tokenizer) == 4 + len(words)
        ids = tokenizer(["a dog", "", "a Red apple", "a zorgly dog"], length=6)
        assert ids.dtype == torch.int64
        pad, unknown, start, end = range(4)  # the special tokens come first
        a, dog, red, apple = tokenizer(["a dog red apple"], 6)[0, 1:5].tolist()
        assert len({a, dog, red, apple, *range(4)}) == 8
        assert ids[0].tolist() == [start, a, dog, end, pad, pad]
        assert ids[1].tolist() == [start, end, pad, pad, pad, pad]
        assert ids[2].tolist() == [start, a, red, apple, end, pad]
        assert ids[3].tolist() == [start, a, unknown, dog, end, pad]
        assert tokenizer.unknown("a Zorgly dog, blue") == ["Zorgly", ",", "blue"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("words.json", b"{}"), ("words.json", b"\xff\xfe"), ("words.txt", b"a\nb\n")],
)
def test_a_broken_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not a tokenizer"):
        CaptionTokenizer.load(tmp_path / name)


def test_word_pieces_are_berts() -> None:
    folder, _ = encoders.text_folders("minilm")
    theirs = BertTokenizerFast.from_pretrained(folder, local_files_only=True)
    truth = theirs(HARD, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    for name in ("vocab.txt", "tokenizer.json"):  # which pads and cuts at 128
        ours = CaptionTokenizer.load(folder / name)
        assert torch.equal(ours([*HARD, "dog " * 200], 202)[:4, :77], truth)
        assert len(ours) == len(theirs) == 30522
        assert ours.unknown("a 🦄 dog, zorgly") == ["🦄"]


# --- frozen encoders ---


def of_clip(folder: Path) -> FrozenTextConditioner:
    return FrozenTextConfig(encoder="clip", path=str(folder), d_cond=16, length=8).build()


@torch.no_grad()
def test_minilm_equals_transformers_on_a_padded_batch() -> None:
    folder, _ = encoders.text_folders("minilm")
    theirs = BertModel.from_pretrained(folder, local_files_only=True).eval()
    words = BertTokenizerFast.from_pretrained(folder, local_files_only=True)
    batch = words(HARD, padding="max_length", max_length=24, return_tensors="pt")
    truth, there = theirs(**batch).last_hidden_state, batch["attention_mask"].bool()
    tokens = FrozenTextConfig().build()({"caption": HARD}).tokens
    assert tokens.shape == (4, 24, 384)
    assert (tokens - truth)[there].abs().max() < 1e-5
    assert truth[there].std() > 0.1
    assert not tokens[~there].any()  # zeros after a caption's end
    with torch.autocast("cpu", torch.bfloat16):  # neighbours and autocast change nothing
        assert torch.equal(FrozenTextConfig().build()({"caption": HARD[:1]}).tokens[0], tokens[0])


@torch.no_grad()
def test_bert_in_a_folder_equals_transformers(tmp_path: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "Red", "##dish"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    words = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), do_lower_case=False)
    words.save_pretrained(tmp_path)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "vocab_size": 9, "max_position_embeddings": 12}
    BertModel(BertConfig(**shape)).save_pretrained(tmp_path)
    tau = FrozenTextConfig(encoder="bert", path=str(tmp_path), d_cond=16, length=6).build()
    assert tau.ids({"caption": ["a Red reddish"]}).tolist() == [[2, 5, 7, 6, 8, 3]]
    truth = BertModel.from_pretrained(tmp_path).eval()(torch.tensor([[2, 5, 7, 3]]))
    tokens = tau({"caption": ["a Red"]}).tokens
    assert (tokens[:, :4] - truth.last_hidden_state).abs().max() < 1e-5
    assert not tokens[:, 4:].any()


@torch.no_grad()
def test_clip_equals_transformers(tmp_path: Path) -> None:
    clip, captions = tiny_clip(tmp_path), ["a red dog", "", "Red"]
    tau = of_clip(clip)
    words = CLIPTokenizer.from_pretrained(clip)
    ids = words(captions, padding="max_length", max_length=8, return_tensors="pt")["input_ids"]
    assert torch.equal(tau.ids({"caption": captions}), ids)
    truth = CLIPTextModel.from_pretrained(clip).eval()(ids).last_hidden_state
    tokens = tau({"caption": captions}).tokens
    assert (tokens - truth).abs().max() < 1e-5
    assert torch.equal(tau.null(1).tokens, tokens[1:2])


def test_the_encoder_is_no_part_of_the_model_and_reads_a_caption_once() -> None:
    state, read = torch.get_rng_state(), []
    tau = FrozenTextConfig().build().train()
    assert torch.equal(torch.get_rng_state(), state)  # a training's random numbers are its own
    assert not tau.state_dict() and not list(tau.parameters())
    tau.network.register_forward_hook(lambda *_: read.append(1))
    for captions in (["a dog", "a cat", "a dog"], ["a cat"], ["a dog", "a cow"]):
        tokens = tau({"caption": captions}).tokens
        assert not tokens.requires_grad and not tau.network.training
    assert len(read) == 3
    assert tau.double()({"caption": ["a dog"]}).tokens.dtype == torch.float64


def test_what_a_frozen_encoder_cannot_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"d_cond=8 must lie in 384\.\.384"):
        FrozenTextConfig(d_cond=8).build()
    monkeypatch.setattr(encoders, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'minildm\[text\]'"):
        FrozenTextConfig().build()


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (lambda clip: (clip / "model.safetensors").unlink(), "model.safetensors"),
    (lambda clip: (clip / "config.json").unlink(), ".+"),
    (lambda clip: save_file({}, clip / "model.safetensors", {"format": "pt"}), "it lacks"),
    (lambda clip: [path.unlink() for path in clip.glob("[tv]o*")], "it lacks tokenizer.json"),
]


@pytest.mark.parametrize(("lose", "said"), BROKEN)
def test_an_incomplete_clip_is_refused(tmp_path: Path, lose: Callable, said: str) -> None:
    lose(tiny_clip(tmp_path))
    with pytest.raises(ValueError, match=rf"must hold clip's config.json, .* vocabulary: .*{said}"):
        of_clip(tmp_path)
