"""What a run measures, for every kind of model that a sweep may train or be given."""

import pytest
import torch

from minildm import (
    Autoencoder,
    AutoencoderConfig,
    LatentDiffusion,
    LatentDiffusionConfig,
    UNetConfig,
    pretrained,
)
from minildm.experiments import DataConfig
from minildm.sweeps.measuring import ALWAYS, Ruler, at_side
from minildm.sweeps.settings import sampling_of

KINDS = {  # a shipped model: what it is asked to show
    "emoji-class": "accuracy",
    "emoji-text": "accuracy",
    "scenes-layout": "objects",
    "scenes-semantic": "objects",
    "emoji-sr": "psnr",
    "emoji-inpaint": "psnr",
}
FEW = sampling_of({"steps": 2}, "here")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model_is_measured_on_what_it_is_asked_for(name: str) -> None:
    model = pretrained(name)
    ruler = Ruler(model, None, 20, seed=0)
    x = ruler.sample(model, FEW)
    assert x.shape == (20, 3, 64, 64)
    found = ruler(x)
    assert {*found} == {*ALWAYS, KINDS[name]}
    assert all(n >= 20 for _, n in found.values())
    again = Ruler(model, None, 20, seed=0, metrics=(KINDS[name],))
    assert torch.equal(again.sample(model, FEW), x)  # the same conditions, the same noise
    assert again(x) == {KINDS[name]: found[KINDS[name]]}


@pytest.mark.parametrize("name", ["emoji-sr", "emoji-inpaint"])
def test_the_truth_itself_is_beyond_any_sample(name: str) -> None:
    model = pretrained(name)
    ruler = Ruler(model, None, 20, seed=0, metrics=("psnr",))
    (best, _), (drawn, _) = (
        ruler(ruler.asked.truth)["psnr"],
        ruler(ruler.sample(model, FEW))["psnr"],
    )
    assert best == float("inf") and 5 < drawn < 40


def test_real_pictures_are_nearer_than_noise_and_recognised() -> None:
    model = pretrained("emoji-class")
    data = DataConfig(size=64, subgroups=model.config.conditioner.classes)
    ruler = Ruler(model, data, 60, seed=0, metrics=("proxy_fid", "accuracy"))
    noise = torch.rand(60, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    real, other = ruler(ruler.truth(data)), ruler(noise)
    assert real["proxy_fid"][0] < 0.2 * other["proxy_fid"][0]
    assert real["accuracy"][0] > 0.8 > other["accuracy"][0]


def test_a_model_without_conditions_draws_as_many_as_asked() -> None:
    unet = UNetConfig(
        in_channels=3, out_channels=3, width=8, width_mult=(1,), attn_levels=(), groups=4, d_head=8
    )
    first = AutoencoderConfig(regularizer="identity", z_channels=3)
    config = LatentDiffusionConfig(autoencoder=first, unet=unet, image_size=32)
    model = LatentDiffusion(config).eval()
    assert isinstance(model.autoencoder, Autoencoder)
    data = DataConfig(size=32, subgroups=("heart",))
    ruler = Ruler(model, data, 70, seed=0)  # more than a batch
    assert ruler.metrics == ALWAYS
    assert ruler.sample(model, FEW).shape == ruler.truth(data).shape == (70, 3, 32, 32)


def test_pictures_are_shown_to_a_judge_at_the_side_it_knows() -> None:
    flat = torch.full((2, 3, 32, 32), 0.25)
    assert torch.allclose(at_side(flat, 64), torch.full((2, 3, 64, 64), 0.25))
    assert torch.allclose(at_side(flat, 16), torch.full((2, 3, 16, 16), 0.25), atol=1e-6)
    assert at_side(flat, 32) is flat
