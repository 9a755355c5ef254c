"""The shipped models follow their conditions, and samples for other conditions do not."""

import warnings

import pytest
import torch
from einops import rearrange

from minildm.compression.perceptual import perceptual_distance
from minildm.data.emoji import EmojiDataset
from minildm.data.scenes import ScenesDataset
from minildm.data.transforms import mirrored
from minildm.evaluation.following import (
    baseline,
    draw_conditions,
    evaluate_model,
    evaluate_restoration,
    given_of,
    layout_following,
    restored,
    text_following,
)
from minildm.evaluation.intervals import mean_interval
from minildm.evaluation.metrics import psnr
from minildm.training.checkpoint import pretrained
from minildm.training.classifier import agreement, logits_of

SAMPLING = {"steps": 6, "seed": 0, "sampler": "dpm_solver_pp"}
GUIDED = SAMPLING | {"guidance_scale": 3.0}
BASELINES = {"emoji-sr": "bicubic", "emoji-inpaint": "mean fill"}


def test_captions_are_followed_and_the_null_caption_is_not() -> None:
    model, classifier = pretrained("emoji-text"), pretrained("emoji-classifier")
    captions, requested, _ = draw_conditions(model, 128, 0, EmojiDataset("train", 64), styled=True)
    found = text_following(model.sample(captions, **GUIDED), requested, classifier)
    assert found.settings["follows"] == {"label": True, "group": True, "style": True}
    for question, most in (("label", 0.15), ("group", 0.35), ("style", 0.4)):
        assert found[f"{question}_shuffled"].value < most, question
    x = model.sample([""] * 64, **SAMPLING, guidance_scale=1.0)
    ignored = text_following(x, {k: v[:64] for k, v in requested.items()}, classifier)
    assert not any(ignored.settings["follows"].values())


def test_objects_are_what_and_where_they_are_requested() -> None:
    model, classifier = pretrained("scenes-layout"), pretrained("scenes-classifier")
    layouts, _, _ = draw_conditions(model, 16, seed=0)
    x = model.sample(layouts, **GUIDED)
    found = layout_following(x, layouts, classifier)
    assert all(found.settings["follows"][key] for key in ("objects", "filled", "found", "iou"))
    # The same objects on the other side: a model that knows what, and not where, would not mind.
    turned = mirrored(layouts, torch.ones(16, dtype=torch.bool))
    misled = layout_following(x, turned, classifier)
    for key in ("objects", "filled", "found"):
        assert found[key].low > misled[key].high, key


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_given_is_kept_and_the_baseline_surpassed(name: str) -> None:
    val = EmojiDataset("val", 64, subgroups=("animal-mammal", "clothing", "food-fruit"))
    model, far = pretrained(name), perceptual_distance("offline")
    given, _, x = draw_conditions(model, 32, 0, val)
    found = evaluate_restoration(model, x, given, groups=4, **SAMPLING)
    ours, theirs = found["model"], found[BASELINES[name]]
    assert ours.settings["follows"]["kept"]
    assert ours["kept"].value > ours["kept_shuffled"].value + 5  # dB
    if name == "emoji-sr":
        assert ours["perceptual"].value < theirs["perceptual"].low
    # Image by image, in pixels and in features; for strokes, which leave something to go by.
    given = given_of(x, model.config.conditioner.kind, masks=("strokes",))
    sample, alone = restored(model, given, **SAMPLING), baseline(given)
    with torch.no_grad():
        assert mean_interval(far(x, alone) - far(x, sample)).low > 0
    assert mean_interval(psnr(x, sample) - psnr(x, alone)).low > 0


def test_maps_are_followed_also_at_four_times_the_side() -> None:
    semantic = pretrained("scenes-semantic")
    (found,) = evaluate_model(semantic, n=24, **SAMPLING).values()
    assert found.settings["follows"] == {"pixels": True, "iou": True}
    assert found["iou"].value > 2 * found["iou_shuffled"].value
    assert found["pixels"].value > 0.7 and found["pixels_shuffled"].value < 0.6
    assert found["pixels_real"].low > 0.9 and found["iou_real"].low > 0.6
    ordinary = ScenesDataset("val", 64, n=32).maps.long()  # sixteen of them in one map
    maps = rearrange(ordinary, "(n r c) h w -> n (r h) (c w)", r=4, c=4)
    x = semantic.sample(maps, **SAMPLING)
    found = logits_of(pretrained("scenes-segmenter"), x).argmax(1)
    right, chance = agreement(found, maps)[1], agreement(found, maps.roll(1, 0))[1]
    assert x.shape == (2, 3, 256, 256) and right.min() > 2 * chance.max()


@pytest.mark.parametrize(
    ("name", "keys", "measured"),
    [
        ("emoji-class", ["guidance 1"], {"accuracy", "accuracy_real", "food-drink"}),
        ("emoji-text", ["plain, guidance 1", "styled, guidance 1"], {"label", "group_real"}),
        ("scenes-segmenter", ["held-out scenes"], {"pixels", "iou"}),
    ],
)
def test_any_model_is_evaluated_in_one_call(name: str, keys: list[str], measured: set) -> None:
    with warnings.catch_warnings(action="ignore"):  # of unknown words
        options = {"per_class": 1, "n": 4, "steps": 2, "guidance_scale": (1.0,)}
        found = evaluate_model(pretrained(name), **options)
    assert list(found) == keys
    assert all(measured <= set(evaluation) for evaluation in found.values())
