"""The KL penalty's Gaussian against torch.distributions; the codebook against its definition."""

from typing import Any

import pytest
import torch
from einops import rearrange
from helpers import randn
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from minildm.compression.quantizer import DiagonalGaussian, VectorQuantizer, code_usage

F64 = torch.float64


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
def test_kl_is_that_of_torch_distributions(spread: float) -> None:
    moments = spread * randn(3, 8, 2, 5, dtype=F64)
    mean, logvar = moments[:, :4], moments[:, 4:].clamp(-30, 20)
    q = Independent(Normal(mean, (0.5 * logvar).exp()), 3)
    p = Independent(Normal(torch.zeros_like(mean), torch.ones_like(mean)), 3)
    ours = DiagonalGaussian.from_moments(moments)
    assert torch.allclose(ours.kl(), kl_divergence(q, p), rtol=1e-10)


def quantizer(codes: int = 7, channels: int = 3, **options: Any) -> VectorQuantizer:
    made = VectorQuantizer(codes, channels, **options).double()
    with torch.no_grad():
        made.codebook.copy_(randn(codes, channels, seed=1, dtype=F64))
    return made


def by_hand(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and indices from all distances."""
    distances = torch.cdist(rearrange(z, "b c h w -> (b h w) c"), codebook)
    indices = distances.argmin(1).view(len(z), *z.shape[2:])  # (B, h, w)
    return rearrange(codebook[indices], "b h w c -> b c h w"), indices


def test_the_nearest_code_is_chosen() -> None:
    made, z = quantizer(codes=2**14), randn(2, 3, 16, 33, dtype=F64)  # distances in two parts
    codes, indices = by_hand(z, made.codebook)
    found = made(z)
    assert torch.equal(found.indices, indices)
    assert torch.allclose(found.z, codes, rtol=0, atol=1e-14)
    assert made(codes).loss == 0


@pytest.mark.parametrize("legacy", [False, True])
def test_loss_and_gradients_are_the_formulas(legacy: bool) -> None:
    """Legacy puts beta on the codebook's term: the same value, other gradients."""
    made = quantizer(commitment=0.25, legacy=legacy)
    z, weights = randn(2, 3, 4, 5, dtype=F64).requires_grad_(), randn(2, 3, 4, 5, seed=2, dtype=F64)
    found, parts = made(z), (z, made.codebook)
    straight = torch.autograd.grad((found.z * weights).sum(), parts, allow_unused=True)
    assert torch.equal(straight[0], weights) and straight[1] is None
    codes, indices = by_hand(z.detach(), made.codebook.detach())
    squared = (z.detach() - codes).square().mean()
    assert found.loss.item() == pytest.approx(1.25 * squared.item(), rel=1e-12)
    found.loss.backward()
    to_z, to_codes = (1.0, 0.25) if legacy else (0.25, 1.0)
    slope = 2 * (z.detach() - codes) / z.numel()
    assert torch.allclose(z.grad, to_z * slope, rtol=0, atol=1e-14)
    expected = torch.zeros_like(made.codebook)
    expected.index_add_(0, indices.flatten(), -rearrange(slope, "b c h w -> (b h w) c"))
    assert torch.allclose(made.codebook.grad, to_codes * expected, rtol=0, atol=1e-14)


def test_half_precision_compares_in_float32() -> None:
    made, z = quantizer(500), randn(2, 3, 16, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = made.float()(z)
    assert found.z.dtype == found.loss.dtype == torch.float32
    made = made.bfloat16()
    assert torch.equal(made.nearest(z), by_hand(z.double(), made.codebook.double())[1])


def test_usage_is_counted_over_batches_and_forgets() -> None:
    made = quantizer().train()
    batches = [randn(1, 3, 4, 6, seed=seed, dtype=F64) for seed in range(4)]
    chosen = torch.cat([by_hand(z, made.codebook.detach())[1].flatten() for z in batches])
    for z in batches:
        made(z)
    assert torch.equal(made.counts, chosen.bincount(minlength=7)) and len(chosen.unique()) > 3
    one = made.codes(torch.full((1, 4, 6), 2)).detach()
    for _ in range(400):
        made(one)
    assert code_usage(made.counts) == (1 / 7, 1.0)
    assert 350 <= made.counts.sum() <= 700 + 24  # between 50 and 100 a code


def test_dead_codes_move_onto_latents() -> None:
    made = VectorQuantizer(16, 3).double().train()
    made.restart_after = 3
    made.idle.fill_(2**40)
    z = randn(2, 3, 4, 4, dtype=F64)
    points = rearrange(z, "b c h w -> (b h w) c")
    made(z)
    assert all((points == code).all(1).any() for code in made.codebook)
    with torch.no_grad():
        made.codebook[5] = 100.0  # no latent is near it from now on
    for _ in range(3):
        assert (made.codebook[5] == 100.0).all()
        made(z)
    used, kept = made.nearest(z).unique(), made.codebook.detach().clone()
    made(z)
    assert (points == made.codebook[5]).all(1).any()
    assert torch.equal(made.codebook[used], kept[used])


def test_restarts_do_not_count_as_usage() -> None:
    """Few latents, many codes: a code that moves onto a latent is chosen at once."""
    made = VectorQuantizer(64, 3).double().train()
    made.restart_after = 1
    made.idle.fill_(2**40)
    z = randn(1, 3, 2, 2, dtype=F64)  # four latents, always the same
    for _ in range(20):
        made(z)
    usage, perplexity = code_usage(made.counts)
    assert usage * 64 <= 4 and perplexity <= 4 + 1e-9


@pytest.mark.parametrize("mode", ["evaluation", "no gradients"])
def test_outside_training_nothing_is_counted_or_moved(mode: str) -> None:
    made = quantizer(8).train(mode == "no gradients")
    made.restart_after = 1
    made.idle.fill_(2**40)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with torch.set_grad_enabled(mode == "evaluation"):
        made(randn(2, 3, 4, 4, dtype=F64))
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
