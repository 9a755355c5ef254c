"""The perceptual distances: each against its formula, their gradients, and which one is chosen."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import randn
from torch import Tensor, nn

from minildm.compression import perceptual
from minildm.compression.perceptual import (
    LPIPS,
    VGG_FILE,
    EfficientNetLite0,
    OfflineDistance,
    PerceptualDistance,
    perceptual_distance,
)


@pytest.fixture(scope="module")
def offline() -> PerceptualDistance:
    return perceptual_distance("offline")


@pytest.fixture(scope="module")
def lpips_vgg(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PerceptualDistance]:
    """On a VGG of seeded weights: one kernel for all channels in, so that the file is small."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        state = vgg16().state_dict()
    for name, weight in state.items():
        shape, axes = weight.shape, 2 if name.startswith("features") else 0
        spread = (2 / (9 * shape[1])) ** 0.5 if len(shape) == 4 else 0.1
        own = [*shape[:axes], *[1] * len(shape[axes:])]
        state[name] = (spread * randn(*own)).expand(shape)
    hub = tmp_path_factory.mktemp("hub")
    (hub / "checkpoints").mkdir()
    torch.save(state, hub / "checkpoints" / VGG_FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "_hub_dir", str(hub))
        yield perceptual_distance("lpips")


@pytest.fixture(params=["offline", "lpips_vgg"])
def distance(request: pytest.FixtureRequest) -> PerceptualDistance:
    return request.getfixturevalue(request.param)


def blobs(n: int, side: int = 32, seed: int = 0) -> Tensor:
    """Smooth images: (n, 3, side, side) in [-1, 1]."""
    x = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(x, (side, side), mode="bilinear")


def test_zero_for_equal_images_and_symmetric(distance: PerceptualDistance) -> None:
    x, y = blobs(3, 48), blobs(3, 48, seed=1)
    assert distance(x, x).tolist() == [0.0] * 3
    there, back = distance(x, y), distance(y, x)
    assert there.shape == (3,) and (there > 1e-3).all()
    assert torch.allclose(there, back, rtol=1e-5)
    assert torch.allclose(distance(x[1:2], y[1:2]), there[1:2], rtol=1e-4)  # each pair alone
    least = blobs(1, 64)[..., : distance.min_side, : distance.min_side + 8]
    assert distance(least, -least).shape == (1,)


def test_the_gradient_lowers_the_distance_and_reaches_no_weight(
    distance: PerceptualDistance,
) -> None:
    assert not any(weight.requires_grad for weight in distance.parameters())
    x, y = blobs(1), blobs(1, seed=1).requires_grad_()
    distance(x, y).sum().backward()
    assert distance(x, y - 1e-3 * y.grad / y.grad.norm()) < distance(x, y)
    flat = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance(flat, torch.zeros(1, 3, 32, 32)).sum().backward()
    assert flat.grad.isfinite().all()


def test_it_always_evaluates_and_computes_in_float32(distance: PerceptualDistance) -> None:
    x, y = blobs(2), blobs(2, seed=1)
    expected = distance(x, y)
    nn.Sequential(distance).train()
    assert not any(module.training for module in distance.modules())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(x, y), expected)
        assert torch.allclose(distance(x, y.bfloat16()), expected, rtol=0.1)


def test_lpips_equals_the_packages_own(lpips_vgg: PerceptualDistance) -> None:
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs = lpips.LPIPS(net="vgg", verbose=False)
    x, y = blobs(3, 40), blobs(3, 40, seed=1)
    with torch.no_grad():
        assert torch.allclose(lpips_vgg(x, y), theirs(x, y).flatten(), rtol=1e-4)
    assert isinstance(perceptual_distance(), LPIPS)  # "auto", where the weights are


def test_the_offline_distance_by_its_formula(offline: PerceptualDistance) -> None:
    x, y, net = blobs(2, 64), blobs(2, 64, seed=1), EfficientNetLite0()
    total = torch.zeros(2)
    for name in ("block0", "block2", "block4", "block10", "block15"):
        a, b = (net.maps(part, (name,))[name] for part in (x, y))
        total += (2 - 2 * F.cosine_similarity(a, b)).mean(dim=(1, 2)) / 5  # |u - v|^2, unit lengths
    assert torch.allclose(offline(x, y), total, rtol=1e-4)


def test_without_weights_one_warning_says_what_replaces_lpips(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "empty"))
    perceptual.announce_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="minildm"):
        assert all(isinstance(perceptual_distance(), OfflineDistance) for _ in range(2))
    (record,) = caplog.records
    assert VGG_FILE in record.getMessage()
    assert "EfficientNet-Lite0 distance replaces it" in record.getMessage()
    with pytest.raises(FileNotFoundError, match=rf"{VGG_FILE}.*vgg16.*downloads it"):
        perceptual_distance("lpips")
    assert not (tmp_path / "empty").exists()  # nothing is downloaded
    with pytest.raises(ValueError, match=r"kind='vgg' must be 'auto', 'lpips' or 'offline'"):
        perceptual_distance("vgg")
