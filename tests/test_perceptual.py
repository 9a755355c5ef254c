"""The perceptual distance and the Frechet features: both of each, and which one one gets."""

import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minildm import EmojiDataset, features
from minildm.features import (
    EPS,
    INCEPTION_FILES,
    LPIPS,
    VGG_FILE,
    InceptionFeatures,
    OfflineDistance,
    OfflineFeatures,
    PerceptualDistance,
    frechet_features,
    perceptual_distance,
)
from minildm.metrics import psnr


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A torch hub folder of our own, without any weights; its checkpoints folder."""
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
    """Smooth pictures: (n, 3, side, side) in [-1, 1]."""
    x = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(x, (side, side), mode="bilinear")


# Both distances.


def test_zero_for_equal_pictures_positive_and_the_same_both_ways(
    distance: PerceptualDistance,
) -> None:
    x, y = blobs(3, 48), blobs(3, 48, seed=1)
    assert distance(x, x).tolist() == [0.0] * 3
    there, back = distance(x, y), distance(y, x)
    assert there.shape == (3,) and (there > 1e-3).all()
    assert torch.allclose(there, back, rtol=1e-5)
    assert torch.allclose(distance(x[1:2], y[1:2]), there[1:2], rtol=1e-4)  # each pair alone
    wide = blobs(1, 64)[..., :40]
    assert distance(wide, -wide).shape == (1,)


def test_gradients_reach_both_pictures_and_no_weight(distance: PerceptualDistance) -> None:
    assert not any(weight.requires_grad for weight in distance.parameters())
    x, y = blobs(2).requires_grad_(), blobs(2, seed=1).requires_grad_()
    distance(x, y).sum().backward()
    assert all(part.grad.isfinite().all() and part.grad.abs().max() > 0 for part in (x, y))


def test_the_gradient_is_the_slope(distance: PerceptualDistance) -> None:
    x, y = blobs(1), blobs(1, seed=1).requires_grad_()
    distance(x, y).sum().backward()
    step = 1e-3 * y.grad / y.grad.norm()
    with torch.no_grad():
        slope = (distance(x, y + step) - distance(x, y - step)) / (2 * step.norm())
    assert float(slope) == pytest.approx(float(y.grad.norm()), rel=0.05)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_pictures_have_finite_gradients(distance: PerceptualDistance, value: float) -> None:
    x, y = torch.full((1, 3, 32, 32), value), torch.full((1, 3, 32, 32), value, requires_grad=True)
    found = distance(x, y)
    found.sum().backward()
    assert found.tolist() == [0.0] and y.grad.isfinite().all()


def test_features_that_are_all_zero_are_no_trouble() -> None:
    hid = torch.zeros(1, 4, 2, 2, requires_grad=True)
    features._unit(hid).sum().backward()
    assert hid.grad.isfinite().all()
    lengths = features._unit(torch.full((1, 4, 1, 1), 3.0)).square().sum(1)
    assert torch.allclose(lengths, torch.ones(1, 1, 1)) and EPS < 1e-8


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


def test_what_is_wrong_with_the_pictures_is_named(distance: PerceptualDistance) -> None:
    x = torch.zeros(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"\(2, 3, 32, 32\) and \(1, 3, 32, 32\)"):
        distance(x, x[:1])
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        distance(x[:, :1], x[:, :1])
    small = x[..., : distance.min_side - 1]
    with pytest.raises(ValueError, match=f"sides of at least {distance.min_side}"):
        distance(small, small)
    least = x[..., : distance.min_side, : distance.min_side]
    assert distance(least, least + 0.5).shape == (2,)  # a last map of one pixel


# Each against its definition.


def test_lpips_equals_the_packages_own(lpips_vgg: PerceptualDistance, hub: Path) -> None:
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs = lpips.LPIPS(net="vgg", verbose=False)
    x, y = blobs(3, 40), blobs(3, 40, seed=1)
    with torch.no_grad():
        expected = theirs(x, y).flatten()
        assert torch.allclose(lpips_vgg(x, y), expected, rtol=1e-4)
    assert expected.min() > 1e-3 and lpips_vgg.name == "LPIPS (VGG)"


def test_the_offline_distance_by_its_formula(offline: PerceptualDistance) -> None:
    x, y = blobs(2, 64), blobs(2, 64, seed=1)
    total = torch.zeros(2)
    net = OfflineFeatures()
    for name in ("block0", "block2", "block4", "block10", "block15"):
        a, b = (net.maps(part, (name,))[name] for part in (x, y))
        cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        total += (2 - 2 * cosine).mean(dim=(1, 2)) / 5  # |u - v|^2 of two of length 1
    assert torch.allclose(offline(x, y), total, rtol=1e-4)
    assert offline.name == "EfficientNet-Lite0 distance"


def test_a_shift_is_nearer_than_a_blur_that_psnr_finds_no_worse(
    offline: PerceptualDistance,
) -> None:
    """On emoji moved by a pixel, and blurred just as far by PSNR: about .11 against .40."""
    x = EmojiDataset("val", 64).images[:24] / 127.5 - 1
    shifted = F.pad(x, (1, 0, 0, 0), mode="replicate")[..., :-1]
    blurred = torch.empty_like(x)
    for i, limit in enumerate(psnr(x, shifted)):
        small, large = 0.1, 8.0
        for _ in range(12):
            middle = math.sqrt(small * large)
            ticks = torch.arange(-12, 13) / middle
            kernel = (-0.5 * ticks**2).softmax(0).view(1, 1, 1, 25)
            rows = F.conv2d(F.pad(x[i][:, None], (12,) * 4, mode="replicate"), kernel)
            blurred[i] = F.conv2d(rows, kernel.mT)[:, 0]
            worse = psnr(x[i : i + 1], blurred[i : i + 1]) < limit
            small, large = (small, middle) if worse else (middle, large)
    assert (psnr(x, blurred) - psnr(x, shifted)).abs().max() < 0.1
    with torch.no_grad():
        moved, dull = offline(x, shifted), offline(x, blurred)
    assert (moved < dull).float().mean() > 0.9
    assert moved.mean() < dull.mean() / 2


# Which one one gets.


def test_auto_takes_lpips_where_it_can_be_had(lpips_vgg: PerceptualDistance) -> None:
    assert isinstance(lpips_vgg, LPIPS)
    assert isinstance(perceptual_distance(), LPIPS)


def test_without_weights_auto_says_once_what_stands_in(
    hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "empty"))
    with caplog.at_level(logging.WARNING, logger="minildm"):
        for _ in range(2):
            assert isinstance(perceptual_distance(), OfflineDistance)
            assert isinstance(frechet_features(), OfflineFeatures)
            perceptual_distance("offline")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    for line, files, instead in (
        (said[0], [VGG_FILE], "EfficientNet-Lite0 distance"),
        (said[1], INCEPTION_FILES, "EfficientNet-Lite0"),
    ):
        assert all(name in line for name in files) and f"{instead} stands in" in line
        assert str(tmp_path / "empty" / "checkpoints") in line
    assert not (tmp_path / "empty").exists()


def test_lpips_without_weights_says_how_to_fetch_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=rf"{VGG_FILE}.*internet.*python -c .*vgg16"):
        perceptual_distance("lpips")
    with pytest.raises(ValueError, match=r"kind='vgg' .*'auto', 'lpips', 'offline'"):
        perceptual_distance("vgg")


def test_the_file_asked_for_is_torchvisions() -> None:
    from torchvision.models import VGG16_Weights

    assert VGG16_Weights.IMAGENET1K_V1.url.endswith(f"/{VGG_FILE}")


# Inception.


class Brightness(nn.Module):
    """Stands for Inception: bytes in, a tuple out."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert x.dtype == torch.uint8
        return (x.float().mean(dim=(2, 3)),)


@pytest.mark.parametrize("name", INCEPTION_FILES)
def test_inception_is_taken_where_its_weights_are(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoints" / name
    path.parent.mkdir()
    path.touch()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    loaded = []
    monkeypatch.setattr(features, "_inception", lambda found: loaded.append(found) or Brightness())
    found = frechet_features()
    assert isinstance(found, InceptionFeatures) and found.name == "Inception"
    assert loaded == [path]
    levels = torch.tensor([0, 1, 127, 128, 254, 255], dtype=torch.uint8)
    x = (levels / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    assert torch.equal(found(x), levels.float()[:, None].expand(-1, 3))  # as it was in the file
    assert torch.equal(found(1.01 * torch.ones(1, 3, 4, 4)), torch.full((1, 3), 255.0))
    assert not found.train().net.training


def test_inceptions_file_fits_torch_fidelitys_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file of its names and shapes; where each layer is a mean, the features are brightness."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Net

    with monkeypatch.context() as patch, torch.device("meta"):
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(Net, "load_state_dict", lambda *_: None)
        shapes = {k: (v.shape, v.dtype) for k, v in Net("x", ["2048"], "x").state_dict().items()}
    state = {}
    for key, (shape, dtype) in shapes.items():
        zero = key.endswith(("bias", "running_mean", "num_batches_tracked"))
        value = 0.0 if zero else 1 / math.prod(shape[1:])  # a convolution's mean; else 1
        state[key] = torch.full((), value, dtype=dtype).expand(shape)
    path = tmp_path / INCEPTION_FILES[0]
    torch.save(state, path)
    net = InceptionFeatures(path)
    found = net(torch.stack([torch.zeros(3, 20, 20), torch.ones(3, 20, 20)]))
    assert found.shape == (2, net.num_features) and found[0].abs().max() < 0.01
    assert found[1].min() > 0.3 and found[1].max() < 1.01  # less than 1 where edges are padded
