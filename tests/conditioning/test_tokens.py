"""Classes, captions, layouts and ids as tokens: content, dropping, user input, errors."""

import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from minildm.conditioning import (
    CaptionTokenizer,
    ClassConfig,
    Conditioner,
    ConditionerConfig,
    Conditioning,
    FrozenTextConfig,
    HybridConfig,
    IdsConfig,
    LayoutConfig,
    LowResConfig,
    SemanticConfig,
    TextConfig,
)
from minildm.conditioning.transformer import grid_waves

WORDS = CaptionTokenizer.trained_on(["a red apple", "a green dog and a cat"])
SMALL: dict[str, Any] = {"d_cond": 8, "depth": 1, "heads": 2, "d_head": 4}
BOX = (0.25, 0.5, 0.75, 1.0)
CLASSES = ClassConfig(classes=("ant", "bee", "bumblebee"), d_cond=5)
CONFIGS = {
    "class": CLASSES,
    "text": TextConfig(vocab_size=len(WORDS), length=8, **SMALL),
    "layout": LayoutConfig(classes=("dog", "cat"), grid=5, **SMALL),
    "ids": IdsConfig(vocab_size=9, length=4, null_id=8, p_uncond=0.1, **SMALL),
    "hybrid": HybridConfig(tokens=CLASSES, concat=LowResConfig()),
}
INPUT = {
    "class": ["bee", "ant", "bee"],
    "text": ["a red apple", "a dog", "a cat"],
    "layout": [[("cat", BOX)], [("dog", BOX), ("cat", BOX)], []],
    "ids": [[0, 1, 2, 8], [3, 3, 3, 3], [0, 0, 1, 2]],
    "hybrid": {"low_res": torch.zeros(3, 3, 4, 4), "y": ["bee", "ant", "bee"]},
}


def build(kind: str, **changes: Any) -> Any:
    tau = replace(CONFIGS[kind], **changes).build()
    if kind == "text":
        tau.set_tokenizer(WORDS)
    return tau.eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_dropped_condition_is_exactly_the_null_condition(kind: str) -> None:
    tau = build(kind)
    batch, drop = tau.batch_from(INPUT[kind], 3), torch.tensor([True, False, True])
    kept, dropped, null = tau(batch), tau(batch, drop=drop), tau.null(3)
    assert dropped.tokens.shape == kept.tokens.shape == null.tokens.shape
    assert torch.equal(dropped.tokens[drop], null.tokens[drop])
    assert torch.equal(dropped.tokens[1], kept.tokens[1])
    assert not torch.allclose(kept.tokens[1], null.tokens[1])
    assert null.concat is None
    assert kept.concat is dropped.concat  # an image is never dropped
    assert tau.config.has_null and tau.config.p_uncond == 0.1


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_conditioner_draws_nothing_and_learns_with_the_unet(kind: str) -> None:
    tau = build(kind).train()
    state = torch.get_rng_state()
    batch = tau.batch_from(INPUT[kind], 3)
    tau(batch, drop=torch.tensor([True, False, False])).tokens.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is not None for p in tau.parameters())


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_meta_device_gives_shapes_and_loaded_weights_the_same_tokens(kind: str) -> None:
    tau = build(kind)
    with torch.device("meta"):
        empty = tau.config.build()
    empty.load_state_dict(tau.state_dict(), strict=True, assign=True)
    assert not any(x.is_meta for x in (*empty.parameters(), *empty.buffers()))
    if kind == "text":
        empty.set_tokenizer(WORDS)
    batch = tau.batch_from(INPUT[kind], 3)
    assert torch.equal(empty(batch).tokens, tau(batch).tokens)
    assert empty.double()(batch).tokens.dtype == torch.float64


@pytest.mark.parametrize("kind", ["class", "text", "layout", "ids"])
def test_a_single_condition_is_repeated(kind: str) -> None:
    tau = build(kind)
    batch = tau.batch_from(INPUT[kind][0], 2)
    assert torch.equal(tau(batch).tokens, tau(tau.batch_from([INPUT[kind][0]] * 2, 2)).tokens)


def test_an_unconditional_model_accepts_no_condition() -> None:
    tau = ConditionerConfig().build()
    assert tau({"label": torch.tensor([1])}, drop=torch.tensor([True])) == Conditioning(None, None)
    assert type(tau) is Conditioner and not tau.state_dict() and tau.batch_from(None, 3) == {}
    with pytest.raises(ValueError, match="y='cat' must be None: this model is unconditional"):
        tau.batch_from("cat", 1)
    with pytest.raises(ValueError, match="no null condition"):
        tau.null(1)


# --- classes ---


@pytest.mark.parametrize(
    ("y", "labels"),
    [(2, [2, 2]), (("ant", 2), [0, 2]), (torch.tensor([0, 1], dtype=torch.int32), [0, 1])],
)
def test_names_and_labels_are_understood(y: object, labels: list[int]) -> None:
    label = build("class").batch_from(y, len(labels))["label"]
    assert label.tolist() == labels
    assert label.dtype == torch.int64


def test_classes_may_have_no_null() -> None:
    tau = build("class", p_uncond=0.0, null_class=False)
    assert torch.equal(tau({"label": torch.arange(3)}).tokens[:, 0], tau.embedding.weight)
    with pytest.raises(ValueError, match="kind='class' has no null condition"):
        tau.null(1)


# --- captions and ids ---


def test_unknown_words_are_named_in_a_warning() -> None:
    captions = ["a Zorgly dog", "a whale", "a Zorgly cat"]
    with pytest.warns(UserWarning, match=r"read as \[UNK\]: 'Zorgly', 'whale'"):
        assert build("text").batch_from(captions, 1) == {"caption": captions}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build("text").batch_from("a dog", 3) == {"caption": ["a dog"] * 3}


def test_a_text_model_needs_its_own_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"tokenizer has 5 tokens, must have vocab_size="):
        build("text").set_tokenizer(CaptionTokenizer.trained_on(["one"]))
    with pytest.raises(ValueError, match="has no tokenizer"):
        CONFIGS["text"].build().null(1)


def test_ids_are_the_transformers_input() -> None:
    tau = build("ids")
    ids = tau.batch_from(INPUT["ids"], 3)["ids"]
    assert torch.equal(tau({"ids": ids}).tokens, tau.network(ids))
    assert torch.equal(tau.null(1).tokens, tau.network(torch.full((1, 4), 8)))
    assert not replace(CONFIGS["ids"], null_id=None, p_uncond=0.0).has_null


# --- layouts ---


def test_a_box_is_its_corners_and_its_class() -> None:
    tau = build("layout")
    ids = tau.ids(tau.batch_from([("cat", BOX)], 1))
    assert ids.shape == (1, 12)
    # On a grid of 5 x 5 positions 0.25 is 1, 0.5 is 2, 0.75 is 3 and 1 is 4: rows of 5.
    assert ids[0].tolist() == [2 * 5 + 1, 4 * 5 + 3, 25 + 1, *[25 + 2] * 9]


def test_a_mirrored_layout_has_the_mirrored_corners() -> None:
    tau = build("layout")
    left, top, right, bottom = BOX[0], BOX[1], 0.5, BOX[3]
    ids, mirrored = (
        tau.ids(tau.batch_from([("cat", (a, top, b, bottom))], 1))[0]
        for a, b in ((left, right), (1 - right, 1 - left))
    )
    columns, rows = ids[:2] % 5, ids[:2] // 5
    assert torch.equal(mirrored[:2] % 5, 4 - columns.flip(0))
    assert torch.equal(mirrored[:2] // 5, rows)


def test_corners_start_alike_where_they_are_near() -> None:
    tau = build("layout")
    table, position = (m.weight.detach() for m in (tau.network.embedding, tau.network.position))
    assert torch.equal(table[:25], grid_waves(5, 8))
    assert all(0.7 < rows.std() < 1.3 for rows in (table[25:], position))


def test_padding_has_no_effect_wherever_its_boxes_lie() -> None:
    tau = build("layout")
    boxes, classes = torch.rand(2, 4, 4), torch.full((2, 4), -1)
    assert torch.equal(tau.ids({"boxes": boxes, "classes": classes}), torch.full((2, 12), 27))
    boxes[:, 0], classes[:, 0] = torch.tensor(BOX), 1
    fewer = {"boxes": boxes[:, :1], "classes": classes[:, :1]}
    assert torch.equal(tau({"boxes": boxes, "classes": classes}).tokens, tau(fewer).tokens)
    batch = tau.batch_from({"boxes": boxes, "classes": classes}, 2)
    assert torch.equal(batch["boxes"], boxes) and torch.equal(batch["classes"], classes)


# --- errors ---

LAYOUT = "must be layouts of at most 4"
WRONG: list[tuple[str, Any, str]] = [
    ("class", None, "y=None must be class names or labels; known: ('ant', "),
    ("class", ["ant", "bumble"], "class='bumble' is not known; did you mean 'bumblebee'"),
    ("class", [3], "class=3 is not known"),
    ("text", None, "y=None must be a caption or a list of captions"),
    ("text", [1, 2], "must be a caption or a list of captions"),
    ("text", "a red apple and a green dog", "has 7 tokens, at most 6"),
    ("layout", [("dog", (0.5, 0.1, 0.5, 0.2))], LAYOUT),
    ("layout", [("dog", (-0.2, 0.1, 0.5, 0.2))], LAYOUT),
    ("layout", [("dog", (float("nan"), 0.1, 0.5, 0.2))], LAYOUT),
    ("layout", [("dog", (0.1, 0.2, 0.3))], LAYOUT),
    ("layout", [("dog", BOX)] * 5, LAYOUT),
    ("layout", [("dog", ("a", "b", "c", "d"))], LAYOUT),
    ("layout", "dog", LAYOUT),
    ("layout", None, LAYOUT),
    ("layout", {"boxes": torch.tensor([[BOX]]), "classes": torch.tensor([[2]])}, LAYOUT),
    ("layout", {"boxes": torch.tensor([[BOX]]), "classes": torch.tensor([[0, 1]])}, LAYOUT),
    ("layout", [("dgo", BOX)], "class='dgo' is not known; did you mean 'dog'"),
    ("ids", [[0, 1, 2, 9]], "must be ids (B, 4), integers in 0..8"),
    ("ids", [[0, 1, 2]], "must be ids (B, 4)"),
    ("ids", [[0.5, 1, 2, 3]], "must be ids (B, 4)"),
    ("ids", "dog", "y='dog' must be ids (B, 4)"),
    ("hybrid", ["ant"], "y must be a dict of ('low_res', 'y')"),
    ("hybrid", {"low_res": torch.zeros(3, 4, 4)}, "y must be a dict of ('low_res', 'y')"),
]


@pytest.mark.parametrize(("kind", "y", "said"), WRONG)
def test_wrong_user_input_is_refused(kind: str, y: object, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        build(kind).batch_from(y, 1)


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (ConditionerConfig, {"kind": "class"}, "kind='class' must be 'none' in a Conditioner"),
        (ClassConfig, {"classes": ("ant", "ant")}, "classes must be different names"),
        (TextConfig, {"p_uncond": 1.0}, "p_uncond=1.0 must lie in [0, 1)"),
        (ClassConfig, {"null_class": False}, "p_uncond=0.1 must be 0 without a null condition"),
        (IdsConfig, {"vocab_size": 5, "p_uncond": 0.1}, "must be 0 without a null condition"),
        (IdsConfig, {"vocab_size": 5, "null_id": 5}, "null_id=5 must lie in 0..4"),
        (TextConfig, {"d_cond": 10**9}, "d_cond=1000000000 must be"),
        (TextConfig, {"vocab_size": 10**9}, "vocab_size=1000000000 must be"),
        (LayoutConfig, {"max_boxes": 10**9}, "max_boxes=1000000000 must be"),
        (LayoutConfig, {"grid": 0}, "grid=0 must be an integer in 1..1000"),
        (SemanticConfig, {"stages": -1}, "stages=-1 must be"),
        (FrozenTextConfig, {"encoder": "t5"}, "encoder='t5' must be 'minilm', 'clip' or 'bert'"),
        (FrozenTextConfig, {"encoder": "clip"}, "path='' must be the folder of"),
        (HybridConfig, {"tokens": CLASSES, "concat": ConditionerConfig()}, "must be a kind with"),
    ],
)
def test_impossible_configs_are_refused(config: type, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        config(**options)


@pytest.mark.parametrize("config", [ClassConfig, TextConfig, SemanticConfig])
def test_a_config_that_lacks_the_datas_names_cannot_be_built(config: Any) -> None:
    with pytest.raises(ValueError, match=r"(classes|labels|vocab_size) must not be empty to build"):
        config().build()
