"""Guidance by a condition, an image or a mask: closed forms, diffusers, the official order."""

from typing import Any

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from diffusion.references import COSINE, F64, SCHEDULE, error
from helpers import randn
from torch import Tensor

from minildm.conditioning import Conditioning
from minildm.diffusion.guidance import guided, image_guided, keep_known
from minildm.diffusion.schedule import Prediction
from minildm.teaching.toy import mixture_eps


class EpsTheta:
    """Depends on all its inputs, nonlinearly on the condition; keeps its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, z: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        self.calls.append((z, t, c.tokens))
        return z * t.view(-1, 1, 1, 1) + (c.tokens**3).mean(dim=(1, 2)).view(-1, 1, 1, 1)


def given() -> tuple[Tensor, Tensor, Conditioning, Conditioning]:
    """z, t, condition, null."""
    c, c_null = (Conditioning(tokens=randn(3, 2, 4, seed=s)) for s in (1, 2))
    return randn(3, 2, 4, 4), torch.tensor([1, 5, 9]), c, c_null


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 7.5])
def test_guidance_is_one_doubled_call_and_linear(scale: float, rescale: float) -> None:
    (z, t, c, c_null), network = given(), EpsTheta()
    eps_hat = guided(network, c, c_null, scale, rescale=rescale)(z, t)
    doubled = (z, z), (t, t), (c_null.tokens, c.tokens)  # the null first
    for seen, pair in zip(*network.calls, doubled, strict=True):
        assert torch.equal(seen, torch.cat(pair))
    eps_null, eps_c = network(z, t, c_null), network(z, t, c)
    expected = rescale_noise_cfg((1 - scale) * eps_null + scale * eps_c, eps_c, rescale)
    assert error(eps_hat, expected) < 1e-5


@pytest.mark.parametrize("interval", [None, (10, 20), (20, 10)])
def test_without_guidance_there_is_one_single_call(interval: Any) -> None:
    (z, _, c, c_null), network = given(), EpsTheta()
    denoise = guided(network, c, c_null, 3.0 if interval else 1.0, interval=interval)
    for time in (0, 9, 10, 15, 20, 21, 999):
        t = torch.full((3,), time)
        network.calls.clear()
        eps_hat, inside = denoise(z, t), interval is not None and 10 <= time <= 20
        assert len(network.calls[0][0]) == (6 if inside else 3)
        assert torch.equal(eps_hat, network(z, t, c)) != inside


@pytest.mark.parametrize(("scale", "schedule"), [(0.0, SCHEDULE), (2.5, SCHEDULE), (2.5, COSINE)])
def test_image_guiding_adds_the_gradient_of_the_distance(scale: float, schedule: Any) -> None:
    """For a Gaussian z0_hat is linear in z_t, and its slope is known: appendix C, Eq. 16."""
    z, y = (randn(4, 2, 1, 3, seed=s, dtype=F64) for s in (0, 1))
    eps = mixture_eps(schedule, torch.full((1, 1, 1, 1), 1.0), 0.7)
    t = torch.tensor([3, 200, 600, 999])  # where COSINE has no signal left, it is not steered

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        return schedule.prediction("eps", eps(z, t), z, t)

    def distance(z0: Tensor) -> Tensor:
        return 0.5 * (z0 - y).square().sum(dim=(1, 2, 3))

    steered = image_guided(denoise, schedule, distance, scale)(z, t)
    abar = schedule.alphas_cumprod[t].view(4, 1, 1, 1)
    slope = abar.sqrt() * 0.7**2 / (abar * 0.7**2 + 1 - abar) * (abar > 1e-5)  # of z0_hat in z_t
    expected = eps(z, t) + scale * (1 - abar).sqrt() * slope * (denoise(z, t).z0 - y)
    assert torch.allclose(steered.eps, expected, rtol=1e-9)
    assert torch.allclose(schedule.q_sample(steered.z0, t, expected), z)
    assert not steered.eps.requires_grad


def test_the_blend_is_the_official_one() -> None:
    known, z, eps = (randn(3, 2, 2, 4, seed=s, dtype=F64) for s in (0, 1, 2))
    t, abar = torch.full((3,), 400), SCHEDULE.alphas_cumprod[400]
    mask = torch.tensor([1, 1, 0, 0.25], dtype=F64).expand(1, 1, 2, 4)  # with a soft edge
    edited = keep_known(SCHEDULE, known, mask, noise=lambda like: eps)(z, t)
    noised = abar.sqrt() * known + (1 - abar).sqrt() * eps
    assert torch.allclose(edited, mask * noised + (1 - mask) * z)
    one = keep_known(SCHEDULE, known[:1], mask, noise=lambda like: eps[:1])(z, t)
    assert torch.allclose(one[0], edited[0])
