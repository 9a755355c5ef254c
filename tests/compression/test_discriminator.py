"""The patch GAN's sizes against the published ones, and what a patch is."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from minildm.compression.discriminator import DiscriminatorConfig, PatchDiscriminator

OFFICIAL = Path(__file__).parents[1] / "official/params.json"
LOSSES = [c for c in json.loads(OFFICIAL.read_text())["configs"] if "discriminator_params" in c]


@pytest.mark.parametrize("published", LOSSES, ids=lambda c: c["path"])
def test_the_published_discriminators_have_as_many_parameters(published: dict) -> None:
    layers = published["lossconfig"]["params"].get("disc_num_layers", 3)
    model = PatchDiscriminator(DiscriminatorConfig(layers=layers))
    assert sum(p.numel() for p in model.parameters()) == published["discriminator_params"]


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_depends_on_its_patch_alone(layers: int, patch: int) -> None:
    model = PatchDiscriminator(DiscriminatorConfig(channels=2, layers=layers)).double().eval()
    x = torch.randn(1, 3, 160, 128, dtype=torch.float64, requires_grad=True)
    logits = model(x)
    assert logits.shape == (1, 1, 160 // 2**layers - 2, 128 // 2**layers - 2)
    middle = logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2]
    seen = torch.autograd.grad(middle, x)[0][0].abs().sum(0) > 0  # (H, W)
    assert (seen.any(1).sum(), seen.any(0).sum()) == (patch, patch)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_least_side_leaves_one_logit(layers: int) -> None:
    model = PatchDiscriminator(DiscriminatorConfig(channels=2, layers=layers))
    side = model.config.least_side
    assert model(torch.zeros(2, 3, side, side)).shape == (2, 1, 1, 1)


def test_first_weights_are_small_and_norms_near_one() -> None:
    model = PatchDiscriminator(DiscriminatorConfig())
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert (len(convs), len(norms)) == (5, 3)
    for conv in convs:
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert (conv.bias is None) == (conv in convs[1:-1])  # where a norm follows
    assert all(m.weight.mean().item() == pytest.approx(1.0, abs=0.01) for m in norms)


@pytest.mark.parametrize("field", ["in_channels", "channels", "layers"])
@pytest.mark.parametrize("value", [0, 10**9])
def test_sizes_out_of_range_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{field}={value} must lie in 1\.\."):
        DiscriminatorConfig(**{field: value})
