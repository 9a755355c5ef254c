"""The checks of notebooks 02 and 03: right answers pass, typical mistakes are named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from exercise_rules import (  # noqa: F401
    test_a_check_leaves_the_random_state_alone,
    test_a_mistake_is_named,
    test_no_answer_makes_a_check_raise,
)
from torch import Tensor

from minildm.exercises import autoencoder_kl, vector_quantisation
from minildm.regularizers import DiagonalGaussian, VectorQuantizer, code_usage

Fn = Callable[..., Any]
SIZE = (1, 2, 3)  # the axes of a latent
CHECKS = (
    autoencoder_kl.check_kl,
    autoencoder_kl.check_scale,
    vector_quantisation.check_quantise,
    vector_quantisation.check_code_statistics,
)


def half(terms: Tensor) -> Tensor:
    return 0.5 * terms.sum(SIZE)


def packages_own(z: Tensor, codebook: Tensor) -> Tensor:
    """The package's quantiser with that codebook."""
    quantizer = VectorQuantizer(*codebook.shape)
    quantizer.codebook.data = codebook.detach()
    return quantizer(z).z


def chosen(z: Tensor, codebook: Tensor, how: str = "argmin") -> Tensor:
    """Codes by hand, with no detour for the gradient."""
    flat = rearrange(z, "b c h w -> (b h w) c")
    indices = getattr(torch.cdist(flat.detach(), codebook.detach()), how)(1)
    return rearrange(codebook[indices], "(b h w) c -> b c h w", b=len(z), h=z.shape[2])


def transposed(z: Tensor, codebook: Tensor) -> Tensor:
    """Channels are never moved to the end."""
    table = torch.cdist(z.reshape(-1, z.shape[1]), codebook)
    return codebook[table.argmin(1)].reshape(z.shape)


def not_moved_back(z: Tensor, codebook: Tensor) -> Tensor:
    flat = rearrange(z, "b c h w -> (b h w) c")
    return codebook[torch.cdist(flat, codebook).argmin(1)].reshape(z.shape)


def by_product(z: Tensor, codebook: Tensor) -> Tensor:
    flat = rearrange(z, "b c h w -> (b h w) c")
    best = (flat @ codebook.T).argmax(1)
    return rearrange(codebook[best], "(b h w) c -> b c h w", b=len(z), h=z.shape[2])


def statistics(indices: Tensor, k: int) -> Tensor:
    return torch.stack(code_usage(indices.flatten().bincount(minlength=k)))


def of_batches(indices: Tensor, k: int) -> Tensor:
    return torch.stack([statistics(batch, k) for batch in indices])


def naive_entropy(indices: Tensor, k: int) -> Tensor:
    share = indices.flatten().bincount(minlength=k) / indices.numel()
    return torch.stack([(share > 0).double().mean(), (-(share * share.log()).sum()).exp()])


def with_perplexity(fn: Callable[[Tensor], Tensor]) -> Fn:
    """The right usage, and something made of the entropy in nats."""

    def answer(indices: Tensor, k: int) -> Tensor:
        usage, perplexity = statistics(indices, k)
        return torch.stack([usage, fn(perplexity.log())])

    return answer


RIGHT: list[tuple[Fn, Fn]] = [
    (autoencoder_kl.check_kl, lambda m, v: DiagonalGaussian(m, v).kl()),
    (
        autoencoder_kl.check_kl,
        lambda m, v: torch.distributions.kl_divergence(
            torch.distributions.Normal(m, (v / 2).exp()), torch.distributions.Normal(0.0, 1.0)
        ).sum(SIZE),
    ),
    (autoencoder_kl.check_scale, lambda m, v: (m.var() + v.exp().mean()).sqrt()),
    (
        autoencoder_kl.check_scale,
        lambda m, v: (m.square().mean() - m.mean() ** 2 + v.exp().mean()) ** 0.5,
    ),
    (vector_quantisation.check_quantise, packages_own),
    (vector_quantisation.check_quantise, lambda z, e: chosen(z, e).detach() + z - z.detach()),
    (vector_quantisation.check_code_statistics, statistics),
    (
        vector_quantisation.check_code_statistics,  # in bits, both ways
        with_perplexity(lambda nats: 2 ** (nats / torch.tensor(2.0).double().log())),
    ),
]


@pytest.mark.parametrize(("check", "fn"), RIGHT)
def test_a_right_answer_passes_however_it_is_written(check: Fn, fn: Fn) -> None:
    verdict = check(fn)
    assert verdict.ok, verdict


WRONG: dict[str, tuple[Fn, Fn, str]] = {
    "kl: no minus one": (CHECKS[0], lambda m, v: half(m**2 + v.exp() - v), "minus one"),
    "kl: mean": (CHECKS[0], lambda m, v: 0.5 * (m**2 + v.exp() - 1 - v).mean(SIZE), "sums them"),
    "kl: no half": (CHECKS[0], lambda m, v: 2 * half(m**2 + v.exp() - 1 - v), "one half"),
    "kl: no exp": (CHECKS[0], lambda m, v: half(m**2 + v - 1 - v), "take its exp"),
    "kl: std": (CHECKS[0], lambda m, v: half(m**2 + (v / 2).exp() - 1 - v), "standard deviation"),
    "kl: logstd": (CHECKS[0], lambda m, s: half(m**2 + (2 * s).exp() - 1 - 2 * s), "no factor 2"),
    "kl: var²": (CHECKS[0], lambda m, v: half(m**2 + v.exp() ** 2 - 1 - v), "squared"),
    "kl: plus log": (CHECKS[0], lambda m, v: half(m**2 + v.exp() - 1 + v), "wrong sign"),
    "kl: mean once": (CHECKS[0], lambda m, v: half(m + v.exp() - 1 - v), "not squared"),
    "kl: no mean": (CHECKS[0], lambda m, v: half(v.exp() - 1 - v), "mean is missing"),
    "kl: negative": (CHECKS[0], lambda m, v: -half(m**2 + v.exp() - 1 - v), "turned round"),
    "kl: all": (CHECKS[0], lambda m, v: half(m**2 + v.exp() - 1 - v).sum(), "shape is ()"),
    "kl: other": (CHECKS[0], lambda m, v: half(m**4), "not those of the equation"),
    "scale: means": (CHECKS[1], lambda m, v: m.std(), "means alone"),
    "scale: within": (CHECKS[1], lambda m, v: v.exp().mean().sqrt(), "own spread"),
    "scale: averaged": (
        CHECKS[1],
        lambda m, v: torch.stack(
            [(a.var() + b.exp().mean()).sqrt() for a, b in zip(m, v, strict=True)]
        ).mean(),
        "over batches",
    ),
    "scale: first": (CHECKS[1], lambda m, v: (m[0].var() + v[0].exp().mean()).sqrt(), "first"),
    "scale: stds": (CHECKS[1], lambda m, v: m.std() + v.exp().mean().sqrt(), "variances add up"),
    "scale: no root": (CHECKS[1], lambda m, v: m.var() + v.exp().mean(), "root is missing"),
    "scale: mean std": (
        CHECKS[1],
        lambda m, v: (m.var() + (v / 2).exp().mean() ** 2).sqrt(),
        "mean variance",
    ),
    "scale: late exp": (CHECKS[1], lambda m, v: (m.var() + v.mean().exp()).sqrt(), "before"),
    "scale: no exp": (CHECKS[1], lambda m, v: (m.var() + v.mean()).sqrt(), "take its exp"),
    "scale: rms": (
        CHECKS[1],
        lambda m, v: (m.square().mean() + v.exp().mean()).sqrt(),
        "about the mean",
    ),
    "scale: factor": (CHECKS[1], lambda m, v: (m.var() + v.exp().mean()) ** -0.5, "inverted"),
    "vq: no gradient": (CHECKS[2], chosen, "no gradient reaches z"),
    "vq: detached": (CHECKS[2], lambda z, e: chosen(z, e).detach(), "everything is detached"),
    "vq: to codes": (CHECKS[2], lambda z, e: z - z.detach() + chosen(z, e), "the codebook gets"),
    "vq: doubled": (
        CHECKS[2],
        lambda z, e: 2 * z + (chosen(z, e) - 2 * z).detach(),
        "gradients are not",
    ),
    "vq: farthest": (CHECKS[2], lambda z, e: chosen(z, e, "argmax"), "farthest"),
    "vq: product": (CHECKS[2], by_product, "long codes win"),
    "vq: unchanged": (CHECKS[2], lambda z, e: z, "returns z unchanged"),
    "vq: swapped": (CHECKS[2], lambda z, e: chosen(z, e) + (z - chosen(z, e)), "z unchanged"),
    "vq: wrong axis": (CHECKS[2], transposed, "mixes channels and places"),
    "vq: laid out": (CHECKS[2], not_moved_back, "laid out wrongly"),
    "vq: remainder": (CHECKS[2], lambda z, e: z - chosen(z, e), "z minus its code"),
    "vq: indices": (CHECKS[2], lambda z, e: chosen(z, e)[:, 0], "shape is"),
    "counts: of batches": (CHECKS[3], lambda i, k: of_batches(i, k).mean(0), "count the choices"),
    "counts: perplexity of batches": (
        CHECKS[3],
        lambda i, k: torch.stack([statistics(i, k)[0], of_batches(i, k)[:, 1].mean()]),
        "entropy of all counts",
    ),
    "counts: usage of batches": (
        CHECKS[3],
        lambda i, k: torch.stack([of_batches(i, k)[:, 0].mean(), statistics(i, k)[1]]),
        "any batch uses it",
    ),
    "counts: last": (CHECKS[3], lambda i, k: statistics(i[-1], k), "last batch"),
    "counts: exp of bits": (
        CHECKS[3],
        with_perplexity(lambda nats: (nats / torch.tensor(2.0).double().log()).exp()),
        "log2 wants 2",
    ),
    "counts: 2 to nats": (CHECKS[3], with_perplexity(lambda nats: 2**nats), "not 2 ** H"),
    "counts: entropy": (CHECKS[3], with_perplexity(lambda nats: nats), "that is the entropy;"),
    "counts: bits": (
        CHECKS[3],
        with_perplexity(lambda nats: nats / torch.tensor(2.0).double().log()),
        "in bits",
    ),
    "counts: sign": (CHECKS[3], with_perplexity(lambda nats: (-nats).exp()), "sign is wrong"),
    "counts: 0 log 0": (CHECKS[3], naive_entropy, "came out as NaN"),
    "counts: number": (
        CHECKS[3],
        lambda i, k: statistics(i, k) * torch.tensor([k, 1]),
        "divide by K",
    ),
    "counts: swapped": (CHECKS[3], lambda i, k: statistics(i, k).flip(0), "swapped"),
}
