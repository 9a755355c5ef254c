"""The latents of a data set: posteriors of both sides, the cache, the scale."""

import pytest
import torch
from helpers import TinyImages, shaken, tiny_autoencoder_config

from minildm.compression.autoencoder import Autoencoder
from minildm.compression.quantizer import DiagonalGaussian
from minildm.data.latents import encode_dataset, measure_scale


@pytest.fixture
def autoencoder() -> Autoencoder:
    return shaken(Autoencoder(tiny_autoencoder_config(dropout=0.1)))


@torch.no_grad()
def test_moments_are_the_posteriors_of_each_image_and_its_mirror_image(
    autoencoder: Autoencoder,
) -> None:
    data = TinyImages(131)  # more than one batch of 128
    moments = encode_dataset(autoencoder, data)
    assert moments.shape == (131, 2, 4, 8, 8) and autoencoder.training
    autoencoder.eval()
    for i in (0, 130):
        x = data[i]["image"][None]
        for side, view in enumerate((x, x.flip(-1))):
            posterior = autoencoder.posterior(view)
            ours = DiagonalGaussian.from_moments(moments[i, side][None])
            assert torch.allclose(ours.mean, posterior.mean, atol=1e-5)
            assert torch.allclose(ours.logvar, posterior.logvar, atol=1e-5)


def test_the_cache_knows_data_weights_and_precision(autoencoder: Autoencoder) -> None:
    runs: list[int] = []
    autoencoder.encoder.register_forward_hook(lambda *_: runs.append(1))

    def encoded(n: int = 12, precision: str = "fp32", again: bool = True) -> torch.Tensor:
        runs.clear()
        moments = encode_dataset(autoencoder, TinyImages(n), precision)
        assert bool(runs) == again
        return moments

    first = encoded()
    assert torch.equal(encoded(again=False), first) and len(encoded(5)) == 5
    rough = encoded(precision="bf16")
    assert rough.dtype == torch.float32 and not torch.equal(rough, first)
    assert torch.allclose(rough, first, atol=0.1 * first.abs().max().item())
    shaken(autoencoder, seed=4)
    assert not torch.allclose(encoded(), first, atol=1e-3)


@torch.no_grad()
def test_the_measured_scale_gives_unit_variance(autoencoder: Autoencoder) -> None:
    data = TinyImages()
    autoencoder.scale.fill_(123.0)  # the old value is not used
    autoencoder.scale.fill_(measure_scale(autoencoder, data))
    x = torch.stack([item["image"] for item in data])
    z = autoencoder.eval().encode(torch.cat([x, x.flip(-1)]).repeat(40, 1, 1, 1))
    assert z.std().item() == pytest.approx(1.0, abs=0.01)
    vq = Autoencoder(tiny_autoencoder_config(regularizer="vq", codebook_size=8))
    assert measure_scale(vq, data) == 1.0
