"""RePaint's resampling: DDIM without it, and on the way to the true conditional with it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minildm import NoiseSchedule
from minildm.guidance import keep_known
from minildm.samplers import ddim, repaint
from minildm.toy import gaussian_eps
from minildm.types import Denoise

F64 = torch.float64
RHO = 0.9


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear(dtype=F64)


def drawn(seed: int = 0) -> Any:
    draw = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=draw, dtype=like.dtype)


def _same(z: Tensor, t: Tensor) -> Tensor:
    return z


def correlated_eps(schedule: NoiseSchedule) -> Denoise:
    """E[eps | z_t] for pairs (B, 1, 1, 2) of unit variance with correlation RHO."""
    cov = torch.tensor([[1, RHO], [RHO, 1]], dtype=F64)

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        abar = schedule.alphas_cumprod[t[0]]
        spread = abar * cov + (1 - abar) * torch.eye(2, dtype=F64)
        return (1 - abar).sqrt() * z @ torch.linalg.inv(spread)

    return denoise


def filled(schedule: NoiseSchedule, steps: int, again: int, n: int = 4000) -> tuple[float, float]:
    """Slope and spread of the second value over the first, which is known and kept."""
    noise = drawn()
    known = noise(torch.zeros(n, 1, 1, 2, dtype=F64))
    edit = keep_known(schedule, known, torch.tensor([1.0, 0.0], dtype=F64).view(1, 1, 1, 2), noise)
    options: Any = {"edit": edit, "again": again, "spacing": "trailing", "noise": noise}
    *_, last = repaint(correlated_eps(schedule), schedule, noise(known), steps, **options)
    y, hole = known[..., 0].flatten(), last.z[..., 1].flatten()
    slope = float((y * hole).mean() / y.square().mean())
    return slope, float((hole - slope * y).std())


def test_resampling_brings_blending_to_the_true_conditional(schedule: NoiseSchedule) -> None:
    """p(hole | y) = N(RHO y, 1 - RHO^2); blending alone misses it however many steps it takes."""
    blended, many_steps = filled(schedule, 20, 1)[0], filled(schedule, 200, 1)[0]
    few, more = filled(schedule, 20, 3)[0], filled(schedule, 20, 10)[0]
    assert max(blended, many_steps) < 0.7 < few < more < RHO + 0.02
    slope, spread = filled(schedule, 200, 12)
    assert slope == pytest.approx(RHO, abs=0.03)
    assert spread == pytest.approx((1 - RHO**2) ** 0.5, abs=0.1)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_once_is_ddim(eta: float, spacing: Any, schedule: NoiseSchedule, randn: Any) -> None:
    z_T, known = randn(2, 1, 1, 2, dtype=F64), randn(2, 1, 1, 2, seed=1, dtype=F64)
    mask, ends = torch.tensor([1.0, 0.0], dtype=F64).view(1, 1, 1, 2), []
    for sampler, more in ((ddim, {}), (repaint, {"again": 1})):
        noise = drawn(3)
        options: Any = {"eta": eta, "spacing": spacing, "noise": noise, **more}
        edit = keep_known(schedule, known, mask, noise)
        ends.append(list(sampler(correlated_eps(schedule), schedule, z_T, 7, edit=edit, **options)))
    for one, other in zip(*ends, strict=True):
        assert one.t == other.t
        assert torch.equal(one.z, other.z)
        assert torch.equal(one.z0_hat, other.z0_hat)


def test_with_nothing_known_the_law_stays(schedule: NoiseSchedule) -> None:
    noise = drawn()
    z_T = noise(torch.zeros(10_000, 1, 1, 1, dtype=F64))
    edit = keep_known(schedule, torch.zeros_like(z_T), torch.zeros(1, 1, 1, 1, dtype=F64), noise)
    options: Any = {"edit": edit, "again": 3, "eta": 0.0, "spacing": "trailing", "noise": noise}
    *_, last = repaint(gaussian_eps(schedule, 1.5, 1.0), schedule, z_T, 200, **options)
    assert last.z.mean().item() == pytest.approx(1.5, abs=0.02)
    assert last.z.std().item() == pytest.approx(1.0, abs=0.05)


def test_it_asks_the_network_again_times_a_step(schedule: NoiseSchedule, randn: Any) -> None:
    asked, plain = [], gaussian_eps(schedule, 0.0, 1.0)

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        asked.append(int(t[0]))
        return plain(z, t)

    z_T = randn(1, 1, 1, 1, dtype=F64)
    steps = list(repaint(denoise, schedule, z_T, 4, edit=_same, again=3))
    assert [step.t for step in steps] == [751, 501, 251, 1]
    assert asked == [t for t in (751, 501, 251, 1) for _ in range(3)]


@pytest.mark.parametrize(("again", "eta"), [(0, 0.0), (2, -1.0), (1, float("nan"))])
def test_a_bad_argument_is_refused(
    again: int, eta: float, schedule: NoiseSchedule, randn: Any
) -> None:
    denoise = gaussian_eps(schedule, 0.0, 1.0)
    with pytest.raises(ValueError, match=f"got again={again}, eta={eta}"):
        next(repaint(denoise, schedule, randn(1, 1, 1, 1), edit=_same, again=again, eta=eta))
