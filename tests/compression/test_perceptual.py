"""The perceptual distances: each against its formula, their gradients, and which one is chosen."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
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
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A torch hub folder of our own, without weights; its checkpoints folder."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "_hub_dir", str(folder))
        (folder / "checkpoints").mkdir()
        yield folder / "checkpoints"


@pytest.fixture(scope="module")
def offline() -> PerceptualDistance:
    return perceptual_distance("offline")


@pytest.fixture(scope="module")
def lpips_vgg(hub: Path) -> Iterator[PerceptualDistance]:
    """On a VGG of seeded weights: one kernel for all channels in, so that the file is small."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in vgg16().state_dict().items()}
    generator, state = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        state[name] = torch.zeros(()).expand(shape)
        if name.startswith("features") and len(shape) == 4:
            kernel = torch.randn(shape[0], shape[1], 1, 1, generator=generator)
            state[name] = (kernel * (2 / (9 * shape[1])) ** 0.5).expand(shape)
        elif name.startswith("features"):
            state[name] = 0.1 * torch.randn(shape, generator=generator)
    torch.save(state, hub / VGG_FILE)
    yield perceptual_distance("lpips")
    (hub / VGG_FILE).unlink()


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
    assert there.shape == (3,)
    assert (there > 1e-3).all()
    assert torch.allclose(there, back, rtol=1e-5)
    assert torch.allclose(distance(x[1:2], y[1:2]), there[1:2], rtol=1e-4)  # each pair alone
    least = distance.min_side
    wide = blobs(1, 64)[..., :least, : least + 8]
    assert distance(wide, -wide).shape == (1,)


def test_the_gradient_is_the_slope_and_reaches_no_weight(distance: PerceptualDistance) -> None:
    assert not any(weight.requires_grad for weight in distance.parameters())
    x, y = blobs(1).requires_grad_(), blobs(1, seed=1).requires_grad_()
    distance(x, y).sum().backward()
    assert x.grad.abs().max() > 0
    step = 1e-3 * y.grad / y.grad.norm()
    with torch.no_grad():
        slope = (distance(x, y + step) - distance(x, y - step)) / (2 * step.norm())
    assert float(slope) == pytest.approx(float(y.grad.norm()), rel=0.05)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_uniform_images_have_finite_gradients(distance: PerceptualDistance, value: float) -> None:
    x, y = torch.full((1, 3, 32, 32), value), torch.full((1, 3, 32, 32), value, requires_grad=True)
    found = distance(x, y)
    found.sum().backward()
    assert found.tolist() == [0.0]
    assert y.grad.isfinite().all()
    hid = torch.zeros(1, 4, 2, 2, requires_grad=True)  # features that are all zero
    perceptual._unit(hid).sum().backward()
    assert hid.grad.isfinite().all()


def test_it_always_evaluates_and_computes_in_float32(distance: PerceptualDistance) -> None:
    x, y = blobs(2), blobs(2, seed=1)
    expected = distance(x, y)
    nn.Sequential(distance).train()
    assert not any(module.training for module in distance.modules())
    with torch.autocast("cpu", torch.bfloat16):
        found = distance(x, y)
        rounded = distance(x, y.bfloat16())
    assert found.dtype == rounded.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.allclose(rounded, expected, rtol=0.1)


def test_lpips_equals_the_packages_own(lpips_vgg: PerceptualDistance) -> None:
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs = lpips.LPIPS(net="vgg", verbose=False)
    x, y = blobs(3, 40), blobs(3, 40, seed=1)
    with torch.no_grad():
        expected = theirs(x, y).flatten()
        assert torch.allclose(lpips_vgg(x, y), expected, rtol=1e-4)
    assert expected.min() > 1e-3
    assert isinstance(perceptual_distance(), LPIPS)  # "auto", where the weights are


def test_the_offline_distance_by_its_formula(offline: PerceptualDistance) -> None:
    x, y, net = blobs(2, 64), blobs(2, 64, seed=1), EfficientNetLite0()
    total = torch.zeros(2)
    for name in ("block0", "block2", "block4", "block10", "block15"):
        a, b = (net.maps(part, (name,))[name] for part in (x, y))
        cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        total += (2 - 2 * cosine).mean(dim=(1, 2)) / 5  # |u - v|^2 of two of length 1
    assert torch.allclose(offline(x, y), total, rtol=1e-4)
    assert offline.name == "EfficientNet-Lite0 distance"


def test_without_weights_auto_says_once_what_replaces_lpips(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "empty"))
    perceptual.announce_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="minildm"):
        for _ in range(2):
            assert isinstance(perceptual_distance(), OfflineDistance)
            perceptual_distance("offline")
    (said,) = (record.getMessage() for record in caplog.records)
    assert VGG_FILE in said
    assert str(tmp_path / "empty" / "checkpoints") in said
    assert "EfficientNet-Lite0 distance replaces it" in said
    assert not (tmp_path / "empty").exists()  # nothing is downloaded


def test_lpips_without_weights_says_how_to_fetch_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torchvision.models import VGG16_Weights

    assert VGG16_Weights.IMAGENET1K_V1.url.endswith(f"/{VGG_FILE}")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"{VGG_FILE}.*vgg16.*downloads it"):
        perceptual_distance("lpips")
    with pytest.raises(ValueError, match=r"kind='vgg' must be 'auto', 'lpips' or 'offline'"):
        perceptual_distance("vgg")
