"""Guiding by a small picture: the distance in closed form, and samples that come nearer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minildm import Autoencoder, ConditionerConfig, LatentDiffusion, LatentDiffusionConfig
from minildm.data.corruptions import enlarge, shrink
from minildm.fidelity import psnr
from minildm.presets import PIXELS
from minildm.upscaling import distance_to, sample_towards


@pytest.fixture
def pixels() -> Autoencoder:
    return Autoencoder(PIXELS).eval()


def mean_colour(x: Tensor, y: Tensor) -> Tensor:
    return (x.mean((2, 3)) - y.mean((2, 3))).square().sum(1)


def test_the_distance_is_half_the_square_of_what_the_shrunk_picture_misses(
    pixels: Autoencoder, randn: Any
) -> None:
    x, y = randn(3, 3, 8, 8).clamp(-1, 1), randn(3, 3, 2, 2, seed=1).clamp(-1, 1)
    found = distance_to(y, pixels)(x)
    assert found.shape == (3,)
    small = F.interpolate(x, size=(2, 2), mode="bicubic", antialias=True).clamp(-1, 1)
    assert torch.allclose(found, 0.5 * ((small - y) ** 2).flatten(1).sum(1), rtol=1e-5)
    assert distance_to(shrink(x, 2), pixels, factor=2)(x).abs().max() < 1e-9


def test_a_perceptual_distance_sees_both_at_full_size(pixels: Autoencoder, randn: Any) -> None:
    x, y = randn(2, 3, 8, 8).clamp(-1, 1), randn(2, 3, 2, 2, seed=1).clamp(-1, 1)
    seen = []

    def far(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a, b))
        return mean_colour(a, b)

    distance_to(y, pixels, far)(x)
    assert torch.equal(seen[0][0], enlarge(y, 4))
    assert torch.equal(seen[0][1], enlarge(shrink(x, 4), 4))


@pytest.fixture
def unconditional(ldm_config: LatentDiffusionConfig, shaken: Callable) -> LatentDiffusion:
    config = replace(
        ldm_config, unet=replace(ldm_config.unet, d_cond=None), conditioner=ConditionerConfig()
    )
    return shaken(LatentDiffusion(config)).eval()


@pytest.mark.parametrize(("perceptual", "scale"), [(None, 0.05), (mean_colour, 20.0)])
def test_samples_come_nearer_to_the_small_picture(
    unconditional: LatentDiffusion, perceptual: Any, scale: float, randn: Any
) -> None:
    y = (0.3 * randn(3, 3, 4, 4)).clamp(-1, 1)
    options = {"perceptual": perceptual, "steps": 15, "spacing": "trailing"}
    plain, near = (sample_towards(unconditional, y, s, **options) for s in (0.0, scale))
    assert torch.allclose(
        plain, unconditional.sample(n=3, size=16, seed=0, steps=15, spacing="trailing"), atol=1e-5
    )
    far = perceptual or (lambda a, b: -psnr(a, b))
    assert far(shrink(near, 4), y).mean() < far(shrink(plain, 4), y).mean()
    assert near.shape == (3, 3, 16, 16) and not near.requires_grad


def test_parts_of_a_batch_make_no_difference(unconditional: LatentDiffusion, randn: Any) -> None:
    y = (0.3 * randn(3, 3, 4, 4)).clamp(-1, 1)
    whole, parts = (
        sample_towards(unconditional, y, 0.05, steps=5, batch=b, spacing="trailing") for b in (3, 2)
    )
    assert torch.allclose(whole, parts, atol=1e-4)


def test_conditions_are_dealt_with_their_pictures(
    ldm_config: LatentDiffusionConfig, shaken: Callable, randn: Any
) -> None:
    """A model of super-resolution, guided by its own condition; another factor than f's."""
    unet = replace(ldm_config.unet, d_cond=None, in_channels=ldm_config.unet.in_channels + 3)
    conditioner = ConditionerConfig(concat="low_res", p_uncond=0.0)
    model = shaken(LatentDiffusion(replace(ldm_config, unet=unet, conditioner=conditioner))).eval()
    y, f = (0.3 * randn(3, 3, 4, 4)).clamp(-1, 1), model.autoencoder.f
    options = {"factor": f, "steps": 4, "spacing": "trailing"}
    x = sample_towards(model, y, 0.0, {"low_res": y}, batch=2, **options)
    same = model.sample({"low_res": y}, seed=0, steps=4, spacing="trailing")
    assert x.shape == (3, 3, 4 * f, 4 * f) and torch.allclose(x, same, atol=1e-5)


def test_pictures_out_of_range_are_refused(unconditional: LatentDiffusion) -> None:
    with pytest.raises(ValueError, match=r"low_res must lie in \[-1, 1\], got 0..255"):
        pixels = torch.tensor([0.0, 255.0]).repeat(1, 3, 4, 2)
        sample_towards(unconditional, pixels, 1.0, steps=2)
