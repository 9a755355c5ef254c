"""E and D: sizes, normalisation inside, randomness as an argument, clear errors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minildm import Autoencoder, AutoencoderConfig
from minildm.autoencoder import Decoder, Encoder
from minildm.layers import ResBlock, SelfAttention2d

TINY = AutoencoderConfig(
    z_channels=2, width=8, width_mult=(1, 2), res_blocks=1, groups=4, mid_attn=False
)


@pytest.mark.parametrize(
    ("changes", "f"),
    [
        ({"width_mult": (1,)}, 1),
        ({}, 2),
        ({"patch": 2}, 4),
        ({"width_mult": (1, 2, 2), "attn_levels": (1, 2)}, 4),
        ({"hid_z_channels": 5, "mid_attn": True}, 2),
        ({"patch": 3, "width_mult": (1,)}, 3),
    ],
)
@pytest.mark.parametrize(("batch", "h", "w"), [(1, 3, 1), (2, 2, 5)])
def test_latents_are_f_times_smaller(changes: dict, f: int, batch: int, h: int, w: int) -> None:
    model = Autoencoder(replace(TINY, **changes))
    x = torch.zeros(batch, 3, f * h, f * w)
    assert model.f == model.config.f == f
    posterior = model.posterior(x)
    assert posterior.mean.shape == posterior.logvar.shape == (batch, 2, h, w)
    z = model.encode(x)
    assert z.shape == (batch, 2, h, w)
    assert model.decode(z).shape == x.shape


@torch.no_grad()
def test_shift_and_scale_live_inside_the_autoencoder(autoencoder: Autoencoder, randn: Any) -> None:
    x = randn(2, 3, 8, 12).clamp(-1, 1)
    raw = autoencoder.posterior(x).mean
    x_rec = autoencoder.decoder(raw)
    autoencoder.shift.fill_(0.3)
    autoencoder.scale.fill_(2.5)
    z = autoencoder.encode(x, sample=False)
    assert torch.allclose(z, (raw - 0.3) / 2.5, atol=1e-6)
    assert torch.allclose(autoencoder.normalize(raw), z)
    assert torch.allclose(autoencoder.decode(z), x_rec, atol=1e-5)
    assert {"shift", "scale"} <= autoencoder.state_dict().keys()


@torch.no_grad()
def test_the_mean_is_the_same_every_time_and_draws_nothing(
    autoencoder: Autoencoder, randn: Any
) -> None:
    x, state = randn(2, 3, 8, 8).clamp(-1, 1), torch.get_rng_state()
    first = autoencoder.encode(x, sample=False)
    assert torch.equal(first, autoencoder.encode(x, sample=False))
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_a_draw_takes_its_noise_from_the_argument(autoencoder: Autoencoder, randn: Any) -> None:
    x, eps = randn(2, 3, 8, 8).clamp(-1, 1), randn(2, 2, 4, 4, seed=1)
    state = torch.get_rng_state()
    posterior = autoencoder.posterior(x)
    expected = posterior.mean + (0.5 * posterior.logvar).exp() * eps
    assert torch.allclose(autoencoder.encode(x, noise=lambda like: eps), expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(autoencoder.encode(x), autoencoder.encode(x))


@torch.no_grad()
def test_a_patch_enters_as_channels(shaken: Any, randn: Any) -> None:
    patched = shaken(Autoencoder(replace(TINY, patch=2)))
    whole = Autoencoder(replace(TINY, in_channels=12))
    whole.load_state_dict(patched.state_dict())
    x, z = randn(2, 3, 8, 16), randn(2, 2, 2, 4)
    as_channels = F.pixel_unshuffle(x, 2)
    assert torch.allclose(patched.encoder(x), whole.encoder(as_channels), atol=1e-6)
    assert torch.allclose(F.pixel_unshuffle(patched.decode(z), 2), whole.decode(z), atol=1e-6)


def count(module: torch.nn.Module, kind: type) -> int:
    return sum(isinstance(m, kind) for m in module.modules())


@pytest.mark.parametrize(("mid_attn", "middle"), [(True, 1), (False, 0)])
def test_the_decoder_has_one_more_block_a_level(mid_attn: bool, middle: int) -> None:
    config = replace(TINY, width_mult=(1, 2, 2), res_blocks=2, attn_levels=(2,), mid_attn=mid_attn)
    encoder, decoder = Encoder(config), Decoder(config)
    assert count(encoder, ResBlock) == 3 * 2 + 2
    assert count(decoder, ResBlock) == 3 * 3 + 2
    assert count(encoder, SelfAttention2d) == 2 + middle
    assert count(decoder, SelfAttention2d) == 3 + middle


@pytest.mark.parametrize("zero_init", [True, False])
def test_zero_init_makes_residual_blocks_their_skip(zero_init: bool) -> None:
    model = Autoencoder(replace(TINY, zero_init=zero_init))
    blocks = [m for m in model.modules() if isinstance(m, ResBlock)]
    assert all((block.conv2.weight == 0).all().item() == zero_init for block in blocks)


@torch.no_grad()
def test_the_log_variance_is_clamped(autoencoder: Autoencoder, randn: Any) -> None:
    bias = autoencoder.encoder.to_moments.bias
    bias[2:] = torch.tensor([1e6, -1e6])
    logvar = autoencoder.posterior(randn(1, 3, 4, 4)).logvar
    assert (logvar[:, 0] == 20).all()
    assert (logvar[:, 1] == -30).all()


def test_images_of_a_batch_do_not_see_each_other(autoencoder: Autoencoder, randn: Any) -> None:
    x = randn(2, 3, 8, 8).clamp(-1, 1)
    both = autoencoder.encode(x, sample=False)
    assert torch.allclose(autoencoder.encode(x[1:], sample=False), both[1:], atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 3, 7, 8), "x is 7 x 8 pixels; both sides must be multiples of f=2"),
        ((1, 3, 8, 5), "multiples of f=2"),
        ((1, 1, 8, 8), r"x must be \(B, 3, H, W\), got \(1, 1, 8, 8\)"),
        ((3, 8, 8), r"x must be \(B, 3, H, W\)"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    shape: tuple[int, ...], said: str, autoencoder: Autoencoder
) -> None:
    with pytest.raises(ValueError, match=said):
        autoencoder.encode(torch.zeros(shape))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"regularizer": "vae"}, "regularizer='vae' is not known"),
        ({"z_channels": 0}, "z_channels=0 must be at least 1"),
        ({"res_blocks": 0}, "res_blocks=0"),
        ({"patch": 0}, "patch=0"),
        ({"width_mult": ()}, "width_mult"),
        ({"width_mult": (1, 0)}, "width_mult"),
        ({"width": 6}, "groups=4"),
        ({"width": 2, "width_mult": (2, 4)}, "groups=4"),
        ({"attn_levels": (2,)}, "attn_levels"),
        ({"attn_levels": (-1,)}, "attn_levels"),
    ],
)
def test_configs_that_cannot_be_built_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(TINY, **changes)
