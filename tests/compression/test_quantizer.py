"""The KL penalty's Gaussian against torch.distributions; the codebook against its definition."""

import math
from typing import Any

import pytest
import torch
from einops import rearrange
from helpers import randn
from scipy import stats
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from minildm.compression.quantizer import DiagonalGaussian, VectorQuantizer, code_usage

F64 = torch.float64


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_kl_is_that_of_torch_distributions(spread: float) -> None:
    ours = DiagonalGaussian.from_moments(spread * randn(3, 8, 2, 5, dtype=F64))
    q = Independent(Normal(ours.mean, (0.5 * ours.logvar).exp()), 3)
    p = Independent(Normal(torch.zeros_like(ours.mean), torch.ones_like(ours.mean)), 3)
    assert torch.allclose(ours.kl(), kl_divergence(q, p), rtol=1e-10)


def test_moments_are_mean_then_log_variance_within_bounds() -> None:
    moments = torch.tensor([-100.0, 100.0, -100.0, 100.0]).view(1, 4, 1, 1)
    posterior = DiagonalGaussian.from_moments(moments)
    assert posterior.mode().flatten().tolist() == [-100.0, 100.0]
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]


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


def test_usage_is_counted_over_an_epoch() -> None:
    made = quantizer().train()
    made.epoch_latents = 48  # two batches of 24
    batches = [randn(1, 3, 4, 6, seed=seed, dtype=F64) for seed in range(4)]
    chosen = [by_hand(z, made.codebook.detach())[1].flatten() for z in batches]
    counts = [indices.bincount(minlength=7) for indices in chosen]
    expected = [counts[0], *[counts[0] + counts[1]] * 3, counts[2] + counts[3]]
    for z, total in zip([*batches, batches[0]], expected, strict=True):
        made(z)
        assert made.usage() == code_usage(total)  # of the last whole epoch, or of the first so far
    made.begin(place_all=False)
    assert not any(value.any() for value in (made.counts, made.last_counts, made.idle))


def test_perplexity_is_the_exponential_of_scipys_entropy() -> None:
    share, perplexity = code_usage(torch.tensor([1, 3, 0, 0]))
    assert (share, perplexity.item()) == (0.5, pytest.approx(math.exp(stats.entropy([1, 3]))))


def test_dead_codes_move_onto_latents() -> None:
    made = VectorQuantizer(16, 3).double().train()
    made.restart_after = 3
    made.begin(place_all=True)
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
    made.begin(place_all=True)
    z = randn(1, 3, 2, 2, dtype=F64)  # four latents, always the same
    for _ in range(20):
        made(z)
    usage, perplexity = made.usage()
    assert usage * 64 <= 4 and perplexity <= 4 + 1e-9


@pytest.mark.parametrize("mode", ["evaluation", "no gradients"])
def test_outside_training_nothing_is_counted_or_moved(mode: str) -> None:
    made = quantizer(8).train(mode == "no gradients")
    made.restart_after = 1
    made.begin(place_all=True)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with torch.set_grad_enabled(mode == "evaluation"):
        made(randn(2, 3, 4, 4, dtype=F64))
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
