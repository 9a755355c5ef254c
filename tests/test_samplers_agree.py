"""All samplers draw from the data's distribution as steps grow: an energy test on a mixture."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minildm import NoiseSchedule, ddim
from minildm.samplers import SAMPLERS, _move, heun, predict, timesteps
from minildm.toy import mixture_eps

F64 = torch.float64
N, SPREAD = 1000, 0.3
POINTS = torch.tensor([[1.5, 0.0], [-0.5, 1.3], [-1.0, -1.2]], dtype=F64).view(3, 2, 1, 1)
STEPS = {"ddpm": 500, "ddim": 250, "euler": 250, "plms": 50, "heun": 50, "dpm_solver_pp": 50}


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear(dtype=F64)


def seeded(seed: int) -> Callable[[Tensor], Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=draw, dtype=like.dtype)


def data(seed: int) -> Tensor:
    """Draws from the mixture: (N, 2, 1, 1)."""
    draw = torch.Generator().manual_seed(seed)
    points = POINTS[torch.randint(len(POINTS), (N,), generator=draw)]
    return points + SPREAD * seeded(seed + 1000)(points)


def p_value(one: Tensor, other: Tensor, shuffles: int = 199) -> float:
    """Of the energy distance (Szekely & Rizzo 2004) between two samples, by permutation.

    2 E|x - y| - E|x - x'| - E|y - y'| is 0 for equal distributions alone. With signs +-1 for
    the two halves it is a quadratic form of the distances, so that a shuffle costs a product.
    """
    both = torch.cat([one, other]).flatten(1)
    apart = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist")
    signs = torch.cat([torch.ones(len(one)), -torch.ones(len(other))]).to(both)
    draw = torch.Generator().manual_seed(0)
    shuffled = [signs[torch.randperm(len(signs), generator=draw)] for _ in range(shuffles)]
    trials = torch.stack([signs, *shuffled])  # (1 + shuffles, 2 N)
    energies = -((trials @ apart) * trials).sum(dim=1)
    return (energies >= energies[0]).double().mean().item()


def start(schedule: NoiseSchedule, t: int = 999) -> Tensor:
    """True z_t, so that the sampler alone is judged."""
    z0 = data(100)
    return schedule.q_sample(z0, torch.full((N,), t), seeded(300)(z0))


def drawn(name: str, schedule: NoiseSchedule, steps: int, **options: Any) -> Tensor:
    """N samples."""
    denoise = mixture_eps(schedule, POINTS, SPREAD)
    options = {"spacing": "trailing", "noise": seeded(3), **options}
    *_, last = SAMPLERS[name](denoise, schedule, start(schedule), steps, **options)
    return last.z


def test_the_test_itself_passes_equal_distributions_and_sees_unequal_ones() -> None:
    values = [p_value(data(seed), data(seed + 50)) for seed in range(8)]
    assert sum(p <= 0.05 for p in values) <= 2
    assert max(values) > 0.3
    assert p_value(data(0), data(50) + 0.15) <= 0.01
    assert p_value(data(0), 1.1 * data(50)) <= 0.01


@pytest.mark.parametrize("name", STEPS)
def test_with_many_steps_every_sampler_draws_from_the_data(
    name: str, schedule: NoiseSchedule
) -> None:
    assert p_value(drawn(name, schedule, STEPS[name]), data(500)) > 0.05


def test_ddim_with_any_eta_draws_from_the_data(schedule: NoiseSchedule) -> None:
    assert p_value(drawn("ddim", schedule, 250, eta=0.5), data(500)) > 0.05


@pytest.mark.parametrize("name", STEPS)
def test_with_few_steps_none_does(name: str, schedule: NoiseSchedule) -> None:
    assert p_value(drawn(name, schedule, 5), data(500)) <= 0.01


def half_of_the_steps(schedule: NoiseSchedule) -> Tensor:
    """Asks at every time, but takes only every other step."""
    z, table = start(schedule), schedule.alphas_cumprod
    denoise = mixture_eps(schedule, POINTS, SPREAD)
    for i, t in enumerate(timesteps(schedule.T, 250, "trailing")):
        z_next = _move(predict(denoise, z, t, table[t]), table[max(t - 4, 0)])
        z = z if i % 2 else z_next
    return z


def no_fresh_noise(schedule: NoiseSchedule) -> Tensor:
    return drawn("ddpm", schedule, 500, noise=torch.zeros_like)


def a_time_too_late(schedule: NoiseSchedule) -> Tensor:
    """The denoiser is asked about a noisier z than it gets."""
    denoise = mixture_eps(schedule, POINTS, SPREAD)

    def late(z: Tensor, t: Tensor) -> Tensor:
        return denoise(z, (t + 80).clamp(max=999))

    *_, last = ddim(late, schedule, start(schedule), 250, spacing="trailing")
    return last.z


def narrow(schedule: NoiseSchedule) -> Tensor:
    denoise = mixture_eps(schedule, POINTS, SPREAD / 1.5)
    *_, last = heun(denoise, schedule, start(schedule), 50)
    return last.z


def one_mode_lost(schedule: NoiseSchedule) -> Tensor:
    *_, last = heun(mixture_eps(schedule, POINTS[:2], SPREAD), schedule, start(schedule), 50)
    return last.z


@pytest.mark.parametrize(
    "fault", [half_of_the_steps, no_fresh_noise, a_time_too_late, narrow, one_mode_lost]
)
def test_a_wrong_sampler_is_caught(
    fault: Callable[[NoiseSchedule], Tensor], schedule: NoiseSchedule
) -> None:
    assert p_value(fault(schedule), data(500)) <= 0.01
