"""Encode, decode and quantise as diffusers do, element by element, with random weights.

diffusers' first stages keep no latent of another width than E's last layer for KL, and their
quantiser measures distances by `cdist`: ours differs from it by rounding.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers_copy import (
    DTYPES,
    TOLERANCE,
    AutoencoderKL,
    VQModel,
    copy_autoencoder,
    error,
    same_parameters,
)

from minildm import Autoencoder, AutoencoderConfig
from minildm.regularizers import VectorQuantizer

KL = AutoencoderConfig(z_channels=3, width=8, width_mult=(1, 2, 2), attn_levels=(1,), groups=4)
VQ = AutoencoderConfig(
    regularizer="vq",
    codebook_size=32,
    vq_legacy=True,
    z_channels=2,
    hid_z_channels=4,
    width=8,
    width_mult=(1, 2, 2),
    attn_levels=(1,),
    groups=4,
)
CONFIGS = {
    "kl": KL,
    "kl, attention everywhere": replace(KL, attn_levels=(0, 1, 2)),
    "kl, middle attention alone": replace(KL, attn_levels=()),
    "kl, without attention": replace(KL, attn_levels=(), mid_attn=False),
    "vq": VQ,
    "vq, one level": replace(VQ, width_mult=(1,), attn_levels=(0,)),
    "vq, without attention": replace(VQ, attn_levels=(), mid_attn=False, res_blocks=1),
}
SIZES = pytest.mark.parametrize("size", [(16, 24), (8, 4)], ids=("16x24", "8x4"))


def twins(
    config: AutoencoderConfig, dtype: torch.dtype, shaken: Any
) -> tuple[Autoencoder, AutoencoderKL | VQModel]:
    """Our model and theirs with the same weights."""
    ours = shaken(Autoencoder(config)).to(dtype)
    attends = [i in config.attn_levels for i in range(len(config.width_mult))]
    shape = {
        "block_out_channels": [config.width * m for m in config.width_mult],
        "down_block_types": [f"{'Attn' * a}DownEncoderBlock2D" for a in attends],
        "up_block_types": [f"{'Attn' * a}UpDecoderBlock2D" for a in attends[::-1]],
        "layers_per_block": config.res_blocks,
        "latent_channels": config.hid_z_channels or config.z_channels,
        "norm_num_groups": config.groups,
        "mid_block_add_attention": config.mid_attn,
    }
    if config.regularizer == "vq":
        codes = {"num_vq_embeddings": config.codebook_size, "vq_embed_dim": config.z_channels}
        theirs = VQModel(**shape, **codes).to(dtype)
    else:
        theirs = AutoencoderKL(**shape).to(dtype)
    copy_autoencoder(ours, theirs)
    assert same_parameters(ours, theirs)
    return ours.eval(), theirs.eval()


@DTYPES
@SIZES
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_encoder_is_theirs(
    name: str, size: tuple[int, int], dtype: torch.dtype, shaken: Any, randn: Any
) -> None:
    ours, theirs = twins(CONFIGS[name], dtype, shaken)
    x = randn(2, 3, *size, dtype=dtype).clamp(-1, 1)
    if ours.config.regularizer == "vq":
        assert error(ours.encode(x), theirs.encode(x).latents) < TOLERANCE[dtype]
        return
    posterior, moments = ours.posterior(x), theirs.encode(x).latent_dist
    assert error(posterior.mean, moments.mean) < TOLERANCE[dtype]
    assert error(posterior.logvar, moments.logvar) < TOLERANCE[dtype]
    assert error(posterior.kl(), moments.kl()) < TOLERANCE[dtype]
    assert error(ours.encode(x, sample=False), moments.mode()) < TOLERANCE[dtype]


@DTYPES
@SIZES
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_decoder_is_theirs(
    name: str, size: tuple[int, int], dtype: torch.dtype, shaken: Any, randn: Any
) -> None:
    ours, theirs = twins(CONFIGS[name], dtype, shaken)
    sides = [side // ours.f for side in size]
    z = randn(2, ours.config.z_channels, *sides, dtype=dtype)
    assert error(ours.decode(z), theirs.decode(z).sample) < TOLERANCE[dtype]


@DTYPES
@torch.no_grad()
def test_a_drawn_latent_is_theirs(dtype: torch.dtype, shaken: Any, randn: Any) -> None:
    ours, theirs = twins(KL, dtype, shaken)
    x = randn(2, 3, 16, 24, dtype=dtype).clamp(-1, 1)
    moments = theirs.encode(x).latent_dist
    z = moments.sample(generator=torch.Generator().manual_seed(3))
    replay = torch.Generator().manual_seed(3)
    noise = torch.randn(z.shape, generator=replay, dtype=dtype)
    assert error(ours.encode(x, noise=lambda _: noise), z) < TOLERANCE[dtype]


@torch.no_grad()
def test_scale_is_one_over_their_scaling_factor(shaken: Any, randn: Any) -> None:
    ours, theirs = twins(KL, torch.float64, shaken)
    theirs.config.scaling_factor = 0.18215
    ours.scale.fill_(1 / 0.18215)
    x = randn(1, 3, 8, 8, dtype=torch.float64).clamp(-1, 1)
    z = theirs.encode(x).latent_dist.mean * theirs.config.scaling_factor
    assert error(ours.encode(x, sample=False), z) < 1e-10
    assert error(ours.decode(z), theirs.decode(z / 0.18215).sample) < 1e-10


@DTYPES
@torch.no_grad()
def test_the_codes_and_their_loss_are_theirs(dtype: torch.dtype, shaken: Any, randn: Any) -> None:
    ours, theirs = twins(VQ, dtype, shaken)
    z = randn(3, 2, 6, 8, dtype=dtype)
    codes, loss, (_, _, indices) = theirs.quantize(z)
    quantized = ours.decoder.quantizer(z)
    assert quantized.indices.unique().numel() > 10  # not one code for all
    assert torch.equal(ours.code_indices(z).flatten(), indices)
    assert torch.equal(quantized.indices.flatten(), indices)
    assert error(quantized.z, codes) < TOLERANCE[dtype]
    assert error(quantized.loss, loss) < TOLERANCE[dtype]
    assert error(quantized.loss, theirs.decode(z).commit_loss) < TOLERANCE[dtype]


@pytest.mark.parametrize("legacy", [True, False])
def test_the_gradients_of_the_quantiser_are_theirs(legacy: bool, randn: Any) -> None:
    """Straight through to z, and from the loss to codebook and z."""
    double = torch.float64
    theirs = VQModel(num_vq_embeddings=16, vq_embed_dim=2).quantize.to(double)
    theirs.legacy = legacy
    ours = VectorQuantizer(16, 2, legacy=legacy).to(double)
    g = randn(2, 2, 5, 3, seed=2, dtype=double)
    gradients = []
    for net, codebook in ((ours, ours.codebook), (theirs, theirs.embedding.weight)):
        codebook.data.copy_(randn(16, 2, dtype=double))
        z = randn(2, 2, 5, 3, seed=1, dtype=double).requires_grad_()
        codes, loss, _ = net(z)
        gradients.append(torch.autograd.grad(loss + (g * codes).sum(), (z, codebook)))
    for mine, other in zip(*gradients, strict=True):
        assert error(mine, other) < 1e-12


@pytest.mark.parametrize(
    ("legacy", "on_codes", "on_latents"), [(False, 1.0, 0.3), (True, 0.3, 1.0)]
)
def test_the_quantiser_has_its_formulas_loss_and_gradients(
    legacy: bool, on_codes: float, on_latents: float, randn: Any
) -> None:
    quantizer = VectorQuantizer(8, 2, commitment=0.3, legacy=legacy).double()
    quantizer.codebook.data.copy_(randn(8, 2, dtype=torch.float64))
    z = randn(2, 2, 4, 5, seed=1, dtype=torch.float64).requires_grad_()
    g = randn(2, 2, 4, 5, seed=2, dtype=torch.float64)
    out = quantizer(z)
    to_z, to_codebook = torch.autograd.grad(out.loss + (g * out.z).sum(), (z, quantizer.codebook))
    pixels = z.detach().permute(0, 2, 3, 1).reshape(-1, 2)  # (B h w, c)
    book = quantizer.codebook.detach()
    nearest = [min(range(8), key=lambda k: float(((p - book[k]) ** 2).sum())) for p in pixels]
    assert out.indices.flatten().tolist() == nearest
    apart = pixels - book[nearest]
    loss = (on_codes + on_latents) * (apart**2).mean()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    want_z = g.permute(0, 2, 3, 1).reshape(-1, 2) + on_latents * 2 * apart / apart.numel()
    torch.testing.assert_close(to_z.permute(0, 2, 3, 1).reshape(-1, 2), want_z)
    want_codebook = torch.zeros(8, 2, dtype=torch.float64)
    for k, distance in zip(nearest, apart, strict=True):
        want_codebook[k] -= on_codes * 2 * distance / apart.numel()
    torch.testing.assert_close(to_codebook, want_codebook)


def test_float32_takes_codes_as_near_as_float64_finds(randn: Any) -> None:
    """In a full codebook, rounding may choose between neighbours, never a worse one."""
    quantizer = VectorQuantizer(4096, 3)
    quantizer.codebook.data.copy_(randn(4096, 3))
    z = randn(2, 3, 32, 32, seed=1)
    pixels = z.permute(0, 2, 3, 1).reshape(-1, 3).double()
    book = quantizer.codebook.detach().double()
    chosen = book[quantizer.nearest(z).flatten()]
    taken = (pixels - chosen).square().sum(1)
    best = torch.cdist(pixels, book).square().min(1).values
    assert (taken - best).max() < 2e-6 * pixels.square().sum(1).max()
