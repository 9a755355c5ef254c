"""The shipped models of captions and layouts do what they are asked; one that did not would fail.

Shares of the judges, with intervals, beside the same samples with the conditions dealt anew.
"""

import pytest
import torch

from minildm import EmojiDataset, ScenesDataset, pretrained
from minildm.diffusion import LatentDiffusion
from minildm.following import (
    emoji_prompts,
    layout_following,
    sample_conditions,
    scene_layouts,
    text_following,
)

SAMPLING = {"steps": 10, "guidance_scale": 3.0, "seed": 0, "sampler": "dpm_solver_pp"}


@pytest.fixture(scope="module")
def text() -> LatentDiffusion:
    return pretrained("emoji-text")


@pytest.fixture(scope="module")
def layout() -> LatentDiffusion:
    return pretrained("scenes-layout")


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


def test_layouts_are_followed_and_shuffled_ones_are_at_chance(layout: LatentDiffusion) -> None:
    scenes = ScenesDataset("val", 64, n=24)
    layouts, judge = scene_layouts(scenes, 24), pretrained("scenes-judge")
    x = sample_conditions(layout, layouts, **SAMPLING)
    found = layout_following(x, layouts, judge)
    assert found.settings["follows"]["objects"] and found.settings["follows"]["found"]
    assert found["objects_shuffled"].value < 0.15
    nothing = {"boxes": layouts["boxes"], "classes": torch.full_like(layouts["classes"], -1)}
    blind = sample_conditions(layout, nothing, **SAMPLING | {"guidance_scale": 1.0})
    assert not layout_following(blind, layouts, judge).settings["follows"]["objects"]
