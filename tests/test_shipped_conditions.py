"""The shipped models of captions and layouts do what they are asked; others would be found out.

Shares of the judges, with intervals, beside the same samples with the conditions dealt anew.
"""

import pytest
import torch

from minildm import EmojiDataset, ScenesDataset, pretrained
from minildm.data.variants import mirrored_boxes
from minildm.diffusion import LatentDiffusion
from minildm.following import (
    emoji_prompts,
    layout_following,
    sample_conditions,
    scene_layouts,
    text_following,
)
from minildm.types import Batch

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


@pytest.fixture(scope="module")
def layout() -> LatentDiffusion:
    return pretrained("scenes-layout")


@pytest.fixture(scope="module")
def layouts() -> Batch:
    return scene_layouts(ScenesDataset("val", 64, n=48), 48)


def test_objects_are_what_and_where_they_are_asked(layout: LatentDiffusion, layouts: Batch) -> None:
    judge = pretrained("scenes-judge")
    x = sample_conditions(layout, layouts, **SAMPLING)
    found = layout_following(x, layouts, judge)
    assert all(found.settings["follows"].values())
    # The same objects on the other side: a model that knows what, and not where, would not mind.
    turned = mirrored_boxes(layouts, torch.ones(48, dtype=torch.bool))
    mirrored = layout_following(x, turned, judge)
    for key in ("objects", "filled", "found"):
        assert found[key].low > mirrored[key].high, key


def test_a_model_of_layouts_that_ignores_them_is_found_out(
    layout: LatentDiffusion, layouts: Batch
) -> None:
    """Scenes of other layouts, given to these."""
    others = {key: value.roll(1, 0) for key, value in layouts.items()}
    x = sample_conditions(layout, others, **SAMPLING)
    found = layout_following(x, layouts, pretrained("scenes-judge"))
    assert not any(found.settings["follows"].values())
