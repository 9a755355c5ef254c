"""E and D: sizes, normalisation inside, noise as an argument, the codebook."""

import pytest
import torch
import torch.nn.functional as F
from helpers import randn, shaken, tiny_autoencoder_config

from minildm.compression.autoencoder import Autoencoder

VQ = tiny_autoencoder_config(regularizer="vq", codebook_size=11)


@pytest.fixture
def autoencoder() -> Autoencoder:
    return shaken(Autoencoder(tiny_autoencoder_config())).eval()


@pytest.mark.parametrize(
    ("changes", "f"),
    [
        ({"channel_mult": (1,)}, 1),
        ({"channel_mult": (1, 2, 2), "attn_levels": (1, 2)}, 4),
        ({"hid_z_channels": 5, "mid_attn": True}, 2),
        ({"patch": 3, "channel_mult": (1,)}, 3),
    ],
)
def test_latents_are_f_times_smaller(changes: dict, f: int) -> None:
    model = Autoencoder(tiny_autoencoder_config(**changes))
    x = torch.zeros(2, 3, 3 * f, f)
    posterior, z = model.posterior(x), model.encode(x)
    assert model.f == f
    assert posterior.mean.shape == posterior.logvar.shape == z.shape == (2, 2, 3, 1)
    assert model.decode(z).shape == x.shape


@torch.no_grad()
def test_shift_and_scale_are_inside_the_autoencoder(autoencoder: Autoencoder) -> None:
    x = randn(2, 3, 8, 12).clamp(-1, 1)
    raw = autoencoder.posterior(x).mean
    x_rec = autoencoder.decoder(raw)
    autoencoder.shift.fill_(0.3)
    autoencoder.scale.fill_(2.5)
    z = autoencoder.encode(x, sample=False)
    assert torch.allclose(z, (raw - 0.3) / 2.5, atol=1e-6)
    assert torch.allclose(autoencoder.decode(z), x_rec, atol=1e-5)


@torch.no_grad()
def test_all_noise_comes_from_the_argument(autoencoder: Autoencoder) -> None:
    x, eps = randn(2, 3, 8, 8).clamp(-1, 1), randn(2, 2, 4, 4, seed=1)
    mean, logvar = autoencoder.posterior(x)
    expected = mean + (0.5 * logvar).exp() * eps
    assert torch.allclose(autoencoder.encode(x, noise=lambda like: eps), expected)
    assert torch.equal(autoencoder.encode(x, sample=False), mean)
    assert not torch.equal(autoencoder.encode(x), autoencoder.encode(x))


@torch.no_grad()
def test_a_patch_enters_as_channels() -> None:
    patched = shaken(Autoencoder(tiny_autoencoder_config(patch=2)))
    whole = Autoencoder(tiny_autoencoder_config(in_channels=12))
    whole.load_state_dict(patched.state_dict())
    x, z = randn(2, 3, 8, 16), randn(2, 2, 2, 4)
    as_channels = F.pixel_unshuffle(x, 2)
    assert torch.allclose(patched.encoder(x), whole.encoder(as_channels), atol=1e-6)
    assert torch.allclose(F.pixel_unshuffle(patched.decode(z), 2), whole.decode(z), atol=1e-6)


@torch.no_grad()
def test_the_decoder_quantises_first() -> None:
    model = shaken(Autoencoder(VQ)).eval()
    x, quantizer = randn(2, 3, 8, 12).clamp(-1, 1), model.decoder.quantizer
    z = model.encode(x)
    assert torch.equal(z, model.encode(x, sample=False))  # nothing is drawn
    assert z.unique().numel() == z.numel()  # before quantisation: continuous
    codes = quantizer.codes(quantizer.nearest(z))
    assert not torch.allclose(z, codes)
    assert torch.allclose(model.decode(z), model.decoder.render(codes), atol=1e-5)


def test_images_that_do_not_fit_and_absent_posteriors_are_refused() -> None:
    with pytest.raises(ValueError, match="x is 7 x 8 pixels; both sides must be multiples of f=2"):
        Autoencoder(VQ).encode(torch.zeros(1, 3, 7, 8))
    with pytest.raises(ValueError, match="'vq' has no posterior"):
        Autoencoder(VQ).posterior(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 10**9}, r"channels=1000000000 must lie in 1\.\."),
        ({"channel_mult": (1,) * 1000}, "channel_mult"),
        ({"attn_levels": (2,)}, "attn_levels"),
        ({"regularizer": "vq"}, "codebook_size=None, regularizer='vq'"),
        ({"regularizer": "vq", "codebook_size": 10**9}, "codebook_size=1000000000 must lie in"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_autoencoder_config(**changes)
