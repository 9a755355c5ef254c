"""Super-resolution, inpainting and semantic maps, with models whose answers are known."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import randn, shaken, tiny_ldm_config
from torch import Tensor

from minildm.compression.autoencoder import Autoencoder, AutoencoderConfig
from minildm.conditioning import ConditionerConfig
from minildm.data.dataset import as_float
from minildm.data.emoji import EmojiDataset
from minildm.data.transforms import enlarge, mean_fill, shrink
from minildm.diffusion.guidance import image_guided
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.evaluation.following import evaluate_restoration
from minildm.evaluation.image_metrics import psnr
from minildm.evaluation.restoration import baseline, distance_to, given_of, kept


@pytest.fixture(scope="module")
def x() -> Tensor:
    return as_float(EmojiDataset("val", 64, subgroups=("food-fruit", "heart")).images[:40])


def test_what_is_given_follows_the_seed_and_the_baselines_are_bicubic_and_the_mean(
    x: Tensor,
) -> None:
    for task in ("low_res", "inpaint"):
        one, same = (given_of(x, task, degradation="degraded", seed=1) for _ in range(2))
        assert all(torch.equal(one[key], same[key]) for key in one)
    given = given_of(x, "inpaint")
    assert not torch.equal(given["mask"], one["mask"])
    assert torch.equal(baseline(given), mean_fill(x, given["mask"]))
    assert torch.equal(given_of(x, "low_res")["low_res"], shrink(x, 4))
    assert torch.equal(baseline(given_of(x, "low_res")), enlarge(shrink(x, 4), 4))


def test_kept_is_the_psnr_of_what_was_given(x: Tensor) -> None:
    assert kept(x, given_of(x, "low_res")).isinf().all()
    given = given_of(x, "inpaint")
    worse = torch.where(given["mask"] > 0.5, x, -x)  # the hole does not count
    assert kept(worse, given).isinf().all()
    alone = ((0.25 * x * given["mask"]) ** 2).mean((1, 2, 3))  # on [0, 1]: half of the difference
    assert torch.allclose(kept(x * 0.5, given), -10 * alone.log10(), atol=1e-3)


@pytest.mark.parametrize("task", ["low_res", "inpaint"])
def test_who_follows_is_told_from_who_does_not(task: str, x: Tensor) -> None:
    """One model answers with the baseline, which is true to its condition; one with grey."""
    noise, found = 0.05 * randn(*x.shape), {}
    for name, answer in (("good", baseline), ("bad", lambda given: 0.0)):
        model = SimpleNamespace(
            autoencoder=SimpleNamespace(f=4),
            sample=lambda given, answer=answer, **_: (answer(given) + noise).clamp(-1, 1),
        )
        found[name] = evaluate_restoration(model, x, given_of(x, task), groups=4, steps=7)
    good, bad = found["good"]["model"], found["bad"]["model"]
    assert good.settings["follows"] == {"kept": True} and good.settings["steps"] == 7
    assert bad.settings["follows"] == {"kept": False}
    assert set(found["good"]) == {"model", "bicubic" if task == "low_res" else "mean fill"}
    assert good["psnr"].value > bad["psnr"].high and good["psnr"].n == len(x)
    assert {"ssim", "perceptual", "kid", "precision", "kept", "kept_shuffled"} <= set(good)


# Super-resolution by guidance alone.


def mean_colour(x: Tensor, y: Tensor) -> Tensor:
    return (x.mean((2, 3)) - y.mean((2, 3))).square().sum(1)


def test_the_distance_is_half_the_square_of_what_the_shrunk_image_misses() -> None:
    x, y = randn(3, 3, 8, 8).clamp(-1, 1), randn(3, 3, 2, 2, seed=1).clamp(-1, 1)
    pixels = Autoencoder(AutoencoderConfig(regularizer="identity", z_channels=3))
    found = distance_to(y, pixels)(x)
    expected = 0.5 * (shrink(x, 4) - y).square().flatten(1).sum(1)
    assert found.shape == (3,) and torch.allclose(found, expected)
    perceptual = distance_to(y, pixels, mean_colour)(x)
    assert torch.allclose(perceptual, mean_colour(enlarge(y, 4), enlarge(shrink(x, 4), 4)))


@pytest.mark.parametrize(("perceptual", "scale"), [(None, 0.05), (mean_colour, 20.0)])
def test_guided_samples_come_nearer_to_the_small_image(perceptual: Any, scale: float) -> None:
    model = shaken(LatentDiffusion(tiny_ldm_config(ConditionerConfig()))).eval()
    y = (0.3 * randn(3, 3, 4, 4)).clamp(-1, 1)
    distance = distance_to(y, model.autoencoder, perceptual)
    options = {"n": 3, "size": 16, "seed": 0, "steps": 15, "spacing": "trailing"}
    alone = model.sample(**options)
    near = model.sample(
        guide=lambda denoise: image_guided(denoise, model.schedule, distance, scale), **options
    )
    far = perceptual or (lambda a, b: -psnr(a, b))
    assert far(shrink(near, 4), y).mean() < far(shrink(alone, 4), y).mean()
    assert near.shape == (3, 3, 16, 16) and not near.requires_grad
