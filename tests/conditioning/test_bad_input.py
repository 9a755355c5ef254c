"""What is refused: user input, configs, models without their data's names."""

import re
from typing import Any

import pytest
import torch
from conditioning.test_spatial import CONFIGS as SPATIAL
from conditioning.test_tokens import BOX, build

from minildm.conditioning import (
    CaptionTokenizer,
    ClassConfig,
    Conditioner,
    ConditionerConfig,
    Conditioning,
    SemanticConfig,
    TextConfig,
)

X, MASK = torch.zeros(2, 3, 8, 8), torch.ones(2, 1, 8, 8)
LAYOUT, IDS = "must be layouts of at most 4", "must be ids (B, 4), integers from 0, below 9"
INPAINT = "must be a dict of image (B, 3, H, W) in -1..1 and mask (B, 1, H, W) of 0 and 1"
LOW_RES = "must be a dict of low_res (B, 3, h, w) in -1..1"
LABELS = "must be a dict of semantic (B, H, W), sides multiples of 2^2, numbers of ('sky', "
WRONG: list[tuple[str, Any, str]] = [
    ("class", None, "y=None must be class names or labels; known: ('ant', "),
    ("class", ["ant", "bumble"], "class='bumble' is not known; did you mean 'bumblebee'"),
    ("class", [1.0], "y=[1.0] must be class names or labels; known: ('ant', "),
    ("text", [1, 2], "must be a caption or a list of captions"),
    ("text", "a red apple and a green dog", "has 7 tokens, at most 6"),
    ("layout", [("dog", (0.5, 0.1, 0.5, 0.2))], LAYOUT),
    ("layout", [("dog", (float("nan"), 0.1, 0.5, 0.2))], LAYOUT),
    ("layout", [("dog", BOX)] * 5, LAYOUT),
    ("layout", [("dgo", BOX)], "class='dgo' is not known; did you mean 'dog'"),
    ("ids", [[0, 1, 2, 9]], IDS),
    ("ids", "dog", f"y='dog' {IDS}"),
    ("hybrid", ["ant"], "must be a dict with what 'low_res' reads, and what 'class'"),
    ("low_res", X / 0, LOW_RES),
    ("inpaint", {"image": X}, INPAINT),
    ("inpaint", {"image": X + 2, "mask": MASK}, INPAINT),
    ("inpaint", {"image": X, "mask": MASK[:, 0]}, INPAINT),
    ("semantic", torch.full((1, 8, 8), 4), LABELS),
    ("semantic", torch.zeros(1, 8, 6), LABELS),
]


@pytest.mark.parametrize(("kind", "y", "said"), WRONG)
def test_wrong_user_input_is_refused(kind: str, y: object, said: str) -> None:
    tau = SPATIAL[kind].build() if kind in SPATIAL else build(kind)
    with pytest.raises(ValueError, match=re.escape(said)):
        tau.batch_from(y, 2)


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (TextConfig, {"p_uncond": 1.0}, "p_uncond=1.0 must lie in [0, 1)"),
        (ClassConfig, {"null_class": False}, "p_uncond=0.1 must lie in [0, 1), and be 0"),
        (TextConfig, {"d_cond": 10**9}, "d_cond=1000000000 must lie in 0..10000"),
        (SemanticConfig, {"stages": -1}, "stages=-1 must"),
    ],
)
def test_impossible_configs_are_refused(config: type, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        config(**options)


def test_an_unconditional_model_accepts_no_condition() -> None:
    tau = ConditionerConfig().build()
    assert tau({"label": torch.tensor([1])}, drop=torch.tensor([True])) == Conditioning(None, None)
    assert type(tau) is Conditioner and not tau.state_dict() and tau.batch_from(None, 3) == {}
    with pytest.raises(ValueError, match="y='cat' must be None: this model is unconditional"):
        tau.batch_from("cat", 1)


def test_a_text_model_needs_its_own_tokenizer_and_names_unknown_words() -> None:
    tau, captions = build("text"), ["a Zorgly dog", "a whale", "a Zorgly cat"]
    with pytest.raises(ValueError, match=r"tokenizer has 5 tokens, must have vocab_size="):
        tau.set_tokenizer(CaptionTokenizer.trained_on(["one"]))
    with pytest.warns(UserWarning, match=r"read as \[UNK\]: 'Zorgly', 'whale'"):
        assert tau.batch_from(captions, 1) == {"caption": captions}
