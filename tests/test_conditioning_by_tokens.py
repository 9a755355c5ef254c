"""Captions and layouts as tokens: what they hold, what is dropped, what is refused."""

import re
import warnings
from typing import Any

import pytest
import torch

from minildm import ConditionerConfig
from minildm.conditioning import (
    IdConditioner,
    LayoutConditioner,
    TextConditioner,
    build_conditioner,
)
from minildm.tokenizer import CaptionTokenizer
from minildm.transformer import place_waves

WORDS = CaptionTokenizer.trained_on(["a red apple", "a green dog and a cat"])
SMALL = {"d_cond": 8, "depth": 1, "heads": 2, "d_head": 4}
BOX = (0.25, 0.5, 0.75, 1.0)


def text(**options: Any) -> TextConditioner:
    config = ConditionerConfig(
        kind="text", vocab_size=len(WORDS), **{"length": 8, **SMALL, **options}
    )
    tau = build_conditioner(config)
    tau.set_tokenizer(WORDS)
    return tau.eval()


def layout(**options: Any) -> LayoutConditioner:
    config = ConditionerConfig(kind="layout", classes=("dog", "cat"), grid=5, **SMALL, **options)
    return build_conditioner(config).eval()


# --- captions ---


def test_a_caption_becomes_as_many_tokens_as_are_allowed() -> None:
    tokens = text()({"caption": ["a red apple", "a dog"]}).tokens
    assert tokens.shape == (2, 8, 8)
    assert not torch.allclose(tokens[0], tokens[1])


def test_no_condition_is_the_empty_caption() -> None:
    tau = text()
    assert torch.equal(tau.null(2).tokens, tau({"caption": ["", ""]}).tokens)


@pytest.mark.parametrize("kind", ["text", "layout"])
def test_training_drops_whole_conditions_at_its_rate(kind: str) -> None:
    n, p = 2000, 0.3
    tau = text(p_uncond=p) if kind == "text" else layout(p_uncond=p)
    batch = {"caption": ["a red apple"] * n}
    if kind == "layout":
        batch = tau.batch_from([("dog", BOX)], n)
    kept, null = tau({k: v[:1] for k, v in batch.items()}).tokens, tau.null(1).tokens
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        tokens = tau.train()(batch).tokens
    dropped = torch.isclose(tokens, null, atol=1e-6).all(dim=(1, 2))
    assert (dropped ^ torch.isclose(tokens, kept, atol=1e-6).all(dim=(1, 2))).all()
    assert abs(dropped.float().mean().item() - p) < 4 * (p * (1 - p) / n) ** 0.5


def test_the_transformer_learns_with_the_unet() -> None:
    tau = text()
    tau({"caption": ["a red apple"]}).tokens.sum().backward()
    assert all(p.grad is not None for p in tau.parameters())


def test_unknown_words_are_read_as_unknown_and_named_in_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"does not know 'Zorgly', 'whale': read as \[UNK\]"):
        batch = text().batch_from(["a Zorgly dog", "a whale", "a Zorgly cat"], 1)
    assert batch == {"caption": ["a Zorgly dog", "a whale", "a Zorgly cat"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text().batch_from("a dog", 3) == {"caption": ["a dog"] * 3}


@pytest.mark.parametrize("y", [None, 3, [1, 2], {"caption": ["a"]}])
def test_what_is_no_caption_is_refused(y: object) -> None:
    with pytest.raises(ValueError, match="must be a caption or a list of captions"):
        text().batch_from(y, 1)


def test_a_prompt_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="has 7 tokens, must be at most 6"):
        text().batch_from("a red apple and a green dog", 1)


def test_a_vocabulary_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenizer has 5 tokens, the model"):
        text().set_tokenizer(CaptionTokenizer.trained_on(["one"]))
    bare = build_conditioner(ConditionerConfig(kind="text", vocab_size=9, **SMALL))
    with pytest.raises(ValueError, match="has no tokenizer"):
        bare.null(1)
    with pytest.raises(ValueError, match="vocab_size=0"):
        build_conditioner(ConditionerConfig(kind="text"))


# --- ids ---


def ids(**options: Any) -> IdConditioner:
    config = {"kind": "ids", "vocab_size": 9, "length": 4, "null_id": 8, **SMALL, **options}
    return build_conditioner(ConditionerConfig(**config)).eval()


def test_ids_are_read_as_they_are() -> None:
    tau, numbers = ids(), torch.tensor([[0, 1, 2, 8], [3, 3, 3, 3]])
    tokens = tau({"ids": numbers}).tokens
    assert tokens.shape == (2, 4, 8)
    assert torch.equal(tokens, tau.network(numbers))
    assert torch.equal(tau.null(2).tokens, tau.network(torch.full((2, 4), 8)))
    assert torch.equal(tau.batch_from(numbers.tolist(), 1)["ids"], numbers)
    assert tau.batch_from([1, 2, 3, 4], 3)["ids"].tolist() == [[1, 2, 3, 4]] * 3


def test_training_drops_ids_where_there_is_a_null() -> None:
    tau, numbers = ids(p_uncond=0.5), torch.tensor([[0, 1, 2, 3]]).expand(400, 4)
    null = tau.null(1).tokens
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        tokens = tau.train()({"ids": numbers}).tokens
    dropped = torch.isclose(tokens, null, atol=1e-6).all(dim=(1, 2))
    assert 160 < int(dropped.sum()) < 240
    with pytest.raises(ValueError, match=r"null_id=None: .*guidance_scale must be 1"):
        ids(null_id=None, p_uncond=0.0).null(1)


@pytest.mark.parametrize(
    ("y", "said"),
    [
        ([[0, 1, 2, 9]], "ids must lie in 0..8, got 0..9"),
        ([[0, 1, 2, -1]], "ids must lie in 0..8, got -1..2"),
        ([[0, 1, 2]], "ids must be (B, 4) int64, got (1, 3)"),
        ([[0.5, 1, 2, 3]], "ids must be (B, 4) int64, got (1, 4) torch.float32"),
        ("dog", "y='dog' must be ids (B, 4)"),
        (None, "y=None must be ids (B, 4)"),
        ([[1, 2], [3]], "must be ids (B, 4)"),
        (3, "ids must be (B, 4) int64, got ()"),
    ],
)
def test_ids_that_cannot_be_are_refused(y: object, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        ids().batch_from(y, 1)


def test_ids_need_a_vocabulary() -> None:
    with pytest.raises(ValueError, match="vocab_size=0"):
        ids(vocab_size=0, null_id=None, p_uncond=0.0)


# --- layouts ---


def test_a_box_is_its_corners_and_its_class() -> None:
    tau = layout()
    ids = tau.ids(tau.batch_from([("cat", BOX)], 1))
    assert ids.shape == (1, 12)
    # On a grid of 5 x 5 positions .25 is 1, .5 is 2, .75 is 3 and 1 is 4: rows of 5.
    assert ids[0, :3].tolist() == [2 * 5 + 1, 4 * 5 + 3, 25 + 1]
    assert (ids[0, 3:] == tau.nothing).all()


def test_corners_begin_alike_where_they_are_near() -> None:
    tau = layout()
    table = tau.network.embedding.weight.detach()
    for x, y in ((0.0, 0.0), (0.5, 0.25), (0.75, 0.75)):
        number = tau.ids(tau.batch_from([("cat", (x, y, 1.0, 1.0))], 1))[0, 0]
        at = place_waves(5, table.shape[1])[round(4 * y) * 5 + round(4 * x)]
        assert torch.equal(table[number], at)
    others = (table[25:], tau.network.position.weight.detach())
    assert all(0.8 < rows.std() < 1.2 for rows in others)


def test_corners_of_all_positions_differ() -> None:
    tau = layout(max_boxes=30)
    ticks = torch.linspace(0, 1, 5).tolist()
    boxes = [(x, y, 1.01 * x + 0.01, 1.01 * y + 0.01) for x in ticks[:-1] for y in ticks[:-1]]
    ids = tau.ids(tau.batch_from([("dog", box) for box in boxes], 1))
    assert len(set(ids[0, 0 : 3 * len(boxes) : 3].tolist())) == len(boxes)


def test_padding_says_nothing_wherever_its_boxes_lie() -> None:
    tau = layout()
    boxes, classes = torch.rand(2, 4, 4), torch.full((2, 4), -1)
    assert torch.equal(tau({"boxes": boxes, "classes": classes}).tokens, tau.null(2).tokens)
    boxes[:, 0], classes[:, 0] = torch.tensor(BOX), 1
    fewer = {"boxes": boxes[:, :1], "classes": classes[:, :1]}
    assert torch.equal(tau({"boxes": boxes, "classes": classes}).tokens, tau(fewer).tokens)


def test_one_layout_is_drawn_n_times_and_a_batch_is_taken_as_it_is() -> None:
    tau = layout()
    batch = tau.batch_from([("cat", BOX)], 3)
    assert batch["boxes"].shape == (3, 4, 4)
    assert torch.equal(tau.ids(tau.batch_from(batch, 3)), tau.ids(batch))
    two = tau.batch_from([[("cat", BOX)], [("dog", BOX), ("cat", BOX)]], 1)
    assert two["classes"].tolist() == [[1, -1, -1, -1], [0, 1, -1, -1]]


REFUSED = {
    "upside down": ([("dog", (0.1, 0.9, 0.5, 0.2))], "rising"),
    "no width": ([("dog", (0.5, 0.1, 0.5, 0.2))], "rising"),
    "outside": ([("dog", (-0.2, 0.1, 0.5, 0.2))], r"box \[-0\.2.* in \[0, 1\]"),
    "NaN": ([("dog", (float("nan"), 0.1, 0.5, 0.2))], "must be"),
    "unknown class": ([("dgo", BOX)], "class='dgo' is not known; did you mean 'dog'"),
    "three numbers": ([("dog", (0.1, 0.2, 0.3))], "four numbers"),
    "five boxes": ([("dog", BOX)] * 5, r"K <= 4"),
    "a word": ("dog", "must be layouts"),
    "nothing": (None, "must be layouts"),
    "numbers": ([1, 2], "must be layouts"),
    "label out of range": (
        {"boxes": torch.tensor([[BOX]]), "classes": torch.tensor([[2]])},
        r"classes must lie in -1\.\.1",
    ),
    "shapes": (
        {"boxes": torch.tensor([[BOX]]), "classes": torch.tensor([[0, 1]])},
        r"boxes must be \(B, K <= 4, 4\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layout_that_cannot_be_is_refused(case: str) -> None:
    y, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        layout().batch_from(y, 1)


@pytest.mark.parametrize(
    "wrong", [{"depth": 0}, {"heads": 0}, {"max_boxes": 0}, {"length": 2}, {"grid": 1}]
)
def test_a_config_that_cannot_be_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ConditionerConfig(kind="layout", classes=("dog",), **wrong)


def test_a_layout_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="needs classes"):
        build_conditioner(ConditionerConfig(kind="layout"))
