"""The shipped models that are given a picture keep to it; who did not would be found out.

Against rivals that learn nothing, and the same samples with the conditions dealt anew.
"""

import pytest
import torch
from torch import Tensor

from minildm import EmojiDataset, pretrained
from minildm.data.wide import wide_scene
from minildm.diffusion import LatentDiffusion
from minildm.evaluation import pictures
from minildm.features import perceptual_distance
from minildm.fidelity import psnr
from minildm.intervals import mean_interval
from minildm.restoring import (
    evaluate_restoration,
    evaluate_segmenter,
    evaluate_semantic,
    given_of,
    plain,
    restored,
)
from minildm.segmenter import agreement, segmented

N, SAMPLING = 40, {"steps": 10, "sampler": "dpm_solver_pp", "seed": 0}
KINDS = ("animal-mammal", "clothing", "food-fruit", "place-building")
RIVALS = {"emoji-sr": "bicubic", "emoji-inpaint": "mean fill"}


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Emoji that no training saw, of some kinds in all styles."""
    val = EmojiDataset("val", 64, subgroups=KINDS)
    order = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))
    return pictures(val)[order[:N]]


@pytest.fixture(scope="module")
def semantic() -> LatentDiffusion:
    return pretrained("scenes-semantic")


@pytest.mark.parametrize("name", RIVALS)
def test_what_is_given_is_kept(name: str, x: Tensor) -> None:
    model = pretrained(name)
    found = evaluate_restoration(model, x, groups=4, **SAMPLING)
    ours, rival = found["model"], found[RIVALS[name]]
    assert ours.settings["follows"] and ours.settings["seed"] == 0
    assert ours["kept"].value > ours["kept_shuffled"].value + 5  # dB
    if name == "emoji-sr":
        assert ours["perceptual"].value < rival["perceptual"].low
        assert ours["ssim"].low > rival["ssim"].high


@pytest.mark.parametrize("name", RIVALS)
def test_picture_by_picture_it_is_nearer_to_the_truth_than_its_rival(name: str, x: Tensor) -> None:
    """In pixels and in features; of holes, where strokes leave something to go by: not halves."""
    model, far = pretrained(name), perceptual_distance("offline")
    given = given_of(x, model.config.conditioner.concat, masks=("strokes",))
    ours, theirs = restored(model, given, **SAMPLING), plain(given)
    with torch.no_grad():
        nearer = far(x, theirs) - far(x, ours)
    assert mean_interval(nearer).low > 0
    assert mean_interval(psnr(x, ours) - psnr(x, theirs)).low > 0


@pytest.mark.parametrize("name", RIVALS)
def test_samples_for_other_conditions_do_not_follow(name: str, x: Tensor) -> None:
    """The same model, asked for what belongs to other pictures."""
    model = pretrained(name)
    given = given_of(x, model.config.conditioner.concat)
    sample = model.sample
    model.sample = lambda y, **kw: sample({k: v.roll(1, 0) for k, v in y.items()}, **kw)
    found = evaluate_restoration(model, x, given, groups=4, **SAMPLING)
    assert not found["model"].settings["follows"]


def test_the_segmenter_sees_what_there_is() -> None:
    found = evaluate_segmenter(pretrained("scenes-segmenter"), N)
    assert found["pixels"].low > 0.9 and found["iou"].low > 0.6


def test_maps_are_followed_and_shuffled_ones_are_at_chance(semantic: LatentDiffusion) -> None:
    found = evaluate_semantic(semantic, pretrained("scenes-segmenter"), N, **SAMPLING)
    assert found.settings["follows"] == {"pixels": True, "iou": True}
    assert found["iou"].value > 2 * found["iou_shuffled"].value
    assert found["pixels"].value > 0.7 and found["pixels_shuffled"].value < 0.6


def test_a_map_of_four_times_the_side_is_followed_too(semantic: LatentDiffusion) -> None:
    scenes = [wide_scene(i) for i in range(3)]
    maps = torch.stack([scene["semantic"] for scene in scenes])
    drawn = semantic.sample(maps, **SAMPLING)
    assert drawn.shape == (3, 3, 256, 256)
    found = segmented(pretrained("scenes-segmenter"), drawn)
    right, chance = agreement(found, maps)[1], agreement(found, maps.roll(1, 0))[1]
    assert right.min() > 2 * chance.max()
