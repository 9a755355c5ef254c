"""The shipped model of captions does what it is asked; one that did not would be found out.

Shares of the judge, with intervals, beside the same samples with the captions dealt anew.
"""

import pytest

from minildm import EmojiDataset, pretrained
from minildm.diffusion import LatentDiffusion
from minildm.following import emoji_prompts, sample_conditions, text_following

SAMPLING = {"steps": 10, "guidance_scale": 3.0, "seed": 0, "sampler": "dpm_solver_pp"}


@pytest.fixture(scope="module")
def text() -> LatentDiffusion:
    return pretrained("emoji-text")


def test_captions_are_followed_and_shuffled_ones_are_at_chance(text: LatentDiffusion) -> None:
    prompts, _ = emoji_prompts(EmojiDataset("train", 64), 96, styled=True)
    judge = pretrained("emoji-judge")
    x = sample_conditions(text, [p.caption for p in prompts], **SAMPLING)
    found = text_following(x, prompts, judge)
    assert found.settings["follows"] == {"label": True, "group": True, "style": True}
    for question, most in (("label", 0.15), ("group", 0.35), ("style", 0.4)):
        assert found[f"{question}_shuffled"].value < most, question


def test_a_model_of_captions_that_ignores_them_is_found_out(text: LatentDiffusion) -> None:
    """The same samples, given to other captions than they were drawn for."""
    prompts, _ = emoji_prompts(EmojiDataset("train", 64), 96, styled=True)
    x = sample_conditions(text, ["" for _ in prompts], **SAMPLING | {"guidance_scale": 1.0})
    found = text_following(x, prompts, pretrained("emoji-judge"))
    assert not any(found.settings["follows"].values())
