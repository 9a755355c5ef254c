"""Classifier-free guidance: its two ends, the line between them, the order of the batch."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers_copy import error
from torch import Tensor

from minildm import Conditioning, guided
from minildm.guidance import cat_conditions, conditioned

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from diffusers.guiders.guider_utils import rescale_noise_cfg


def eps_theta(z: Tensor, t: Tensor, c: Conditioning) -> Tensor:
    """Depends on all it gets, nonlinearly on the condition."""
    return z * t.view(-1, 1, 1, 1) + (c.tokens**3).mean(dim=(1, 2)).view(-1, 1, 1, 1)


@pytest.fixture
def given(randn: Any) -> tuple[Tensor, Tensor, Conditioning, Conditioning]:
    """z, t, condition, null."""
    c, c_null = (Conditioning(tokens=randn(3, 2, 4, seed=s)) for s in (1, 2))
    return randn(3, 2, 4, 4), torch.tensor([1, 5, 9]), c, c_null


def test_scale_one_is_the_plain_conditional_in_one_single_call(given: Any) -> None:
    z, t, c, c_null = given
    sizes = []

    def counted(z: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        sizes.append(len(z))
        return eps_theta(z, t, c)

    assert torch.equal(guided(counted, c, c_null, 1.0)(z, t), eps_theta(z, t, c))
    assert sizes == [3]


def test_scale_zero_is_the_unconditional(given: Any) -> None:
    z, t, c, c_null = given
    assert torch.allclose(guided(eps_theta, c, c_null, 0.0)(z, t), eps_theta(z, t, c_null))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0, 7.5])
def test_guidance_is_linear_in_the_scale(scale: float, given: Any) -> None:
    z, t, c, c_null = given
    eps_null, eps_c = eps_theta(z, t, c_null), eps_theta(z, t, c)
    expected = (1 - scale) * eps_null + scale * eps_c
    assert torch.allclose(guided(eps_theta, c, c_null, scale)(z, t), expected, atol=1e-5)


def test_one_doubled_call_with_the_null_first(given: Any) -> None:
    z, t, c, c_null = given
    calls = []

    def recorded(z: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        calls.append((z, t, c.tokens))
        return eps_theta(z, t, c)

    guided(recorded, c, c_null, 2.0)(z, t)
    ((z_both, t_both, tokens),) = calls
    assert torch.equal(z_both, torch.cat([z, z]))
    assert torch.equal(t_both, torch.cat([t, t]))
    assert torch.equal(tokens[:3], c_null.tokens)
    assert torch.equal(tokens[3:], c.tokens)


def test_both_kinds_of_condition_are_doubled(randn: Any) -> None:
    first, second = (Conditioning(randn(2, 1, 4, seed=s), randn(2, 3, 4, 4)) for s in (1, 2))
    both = cat_conditions(first, second)
    assert torch.equal(both.tokens, torch.cat([first.tokens, second.tokens]))
    assert torch.equal(both.concat, torch.cat([first.concat, second.concat]))
    assert cat_conditions(first._replace(concat=None), second._replace(concat=None)).concat is None


def test_conditioned_binds_the_condition(given: Any) -> None:
    z, t, c, _ = given
    denoise: Callable[[Tensor, Tensor], Tensor] = conditioned(eps_theta, c)
    assert torch.equal(denoise(z, t), eps_theta(z, t, c))


# --- rescale and interval ---


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
def test_rescaled_guidance_is_theirs(rescale: float, given: Any) -> None:
    z, t, c, c_null = given
    eps_null, eps_c = eps_theta(z, t, c_null), eps_theta(z, t, c)
    eps_hat = eps_null + 5.0 * (eps_c - eps_null)
    expected = rescale_noise_cfg(eps_hat, eps_c, rescale)
    assert error(guided(eps_theta, c, c_null, 5.0, rescale=rescale)(z, t), expected) < 1e-6


def test_full_rescaling_gives_each_sample_the_spread_of_the_conditional(randn: Any) -> None:
    def network(z: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        return z * c.tokens.mean(dim=(1, 2)).view(-1, 1, 1, 1)

    c, c_null = (Conditioning(tokens=torch.full((3, 1, 1), width)) for width in (3.0, 1.0))
    z, t = randn(3, 2, 4, 4), torch.tensor([5, 5, 5])
    plain = guided(network, c, c_null, 4.0)(z, t)
    tamed = guided(network, c, c_null, 4.0, rescale=1.0)(z, t)
    assert torch.allclose(plain.std(dim=(1, 2, 3)), 9 * z.std(dim=(1, 2, 3)))
    assert torch.allclose(tamed.std(dim=(1, 2, 3)), 3 * z.std(dim=(1, 2, 3)))


def test_outside_of_its_interval_guidance_is_one_plain_call(randn: Any) -> None:
    c, c_null = (Conditioning(tokens=randn(3, 2, 4, seed=s)) for s in (1, 2))
    z, sizes = randn(3, 2, 4, 4), []

    def counted(z: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        sizes.append(len(z))
        return eps_theta(z, t, c)

    denoise, always = (
        guided(counted, c, c_null, 3.0, interval=interval) for interval in ((10, 20), None)
    )
    for time in (0, 9, 10, 15, 20, 21, 999):
        t, inside = torch.full((3,), time), 10 <= time <= 20
        sizes.clear()
        eps_hat = denoise(z, t)
        assert sizes == ([6] if inside else [3])
        assert torch.equal(eps_hat, always(z, t) if inside else eps_theta(z, t, c))


@pytest.mark.parametrize("rescale", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_an_impossible_rescale_is_refused(scale: float, rescale: float, given: Any) -> None:
    _, _, c, c_null = given
    with pytest.raises(ValueError, match=r"rescale=.* must lie in \[0, 1\]"):
        guided(eps_theta, c, c_null, scale, rescale=rescale)


@pytest.mark.parametrize("interval", [(5, 4), (-1, 4)])
def test_an_impossible_interval_is_refused(interval: tuple, given: Any) -> None:
    _, _, c, c_null = given
    with pytest.raises(ValueError, match=r"interval=.* must be two times"):
        guided(eps_theta, c, c_null, 3.0, interval=interval)
