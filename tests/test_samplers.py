"""Samplers against data whose denoiser and flow are known exactly, and against their contract."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from minildm import NoiseSchedule, Prediction, Step, ddim, ddpm
from minildm.samplers import SAMPLERS, SPACINGS, timesteps
from minildm.toy import gaussian_eps

F64 = torch.float64
EACH_SAMPLER = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
ALL_BUT_DDPM = [sampler for name, sampler in SAMPLERS.items() if name != "ddpm"]
EACH_SPACING = pytest.mark.parametrize("spacing", SPACINGS)


def schedule_of(T: int = 1000) -> NoiseSchedule:
    return NoiseSchedule.scaled_linear(T, dtype=F64)


def no_noise(like: Tensor) -> Tensor:
    raise AssertionError("noise was drawn")


class Replay:
    """Noise with a memory: first drawn, then, after `rewind`, the same again."""

    def __init__(self, seed: int = 1) -> None:
        self.draw, self.past, self.at = torch.Generator().manual_seed(seed), [], 0

    def __call__(self, like: Tensor) -> Tensor:
        if self.at == len(self.past):
            self.past.append(torch.randn(like.shape, generator=self.draw, dtype=like.dtype))
        self.at += 1
        return self.past[self.at - 1]

    def rewind(self) -> None:
        self.at = 0


# --- which times are visited ---


@pytest.mark.parametrize("T", [1, 7, 60])
@EACH_SPACING
def test_every_number_of_steps_visits_as_many_falling_times(spacing: str, T: int) -> None:
    for steps in range(1, T + 1):
        times = timesteps(T, steps, spacing)
        assert len(times) == steps
        assert all(a > b for a, b in pairwise(times)), (steps, times)
        assert 0 <= times[-1] <= times[0] < T
        if spacing != "leading":
            assert times[0] == T - 1


def test_leading_has_the_official_indices() -> None:
    assert timesteps(1000, 50) == list(range(981, 0, -20))
    for steps in (s for s in range(1, 1000) if 1000 % s == 0):
        official = [t + 1 for t in range(0, 1000, 1000 // steps)]
        assert timesteps(1000, steps, "leading") == official[::-1]


def test_leading_makes_the_step_counts_at_which_the_official_code_fails() -> None:
    assert timesteps(1000, 1000, "leading") == list(range(999, -1, -1))
    assert timesteps(1000, 30, "leading")[::-1] == [i * 1000 // 30 + 1 for i in range(30)]
    assert timesteps(1000, 600, "leading")[0] == 999


def test_trailing_and_linspace_are_the_published_indices() -> None:
    assert timesteps(1000, 4, "trailing") == [999, 749, 499, 249]
    assert timesteps(1000, 4, "linspace") == [999, 666, 333, 0]


@EACH_SAMPLER
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps=0 must lie in 1..T=10"),
        ({"steps": 11}, "steps=11"),
        ({"steps": 5, "spacing": "karras"}, "spacing='karras' is not known; known: leading"),
    ],
)
def test_impossible_steps_are_refused(sampler: Any, options: dict, said: str) -> None:
    schedule = schedule_of(10)
    with pytest.raises(ValueError, match=said):
        next(sampler(gaussian_eps(schedule, 0, 1), schedule, torch.zeros(1), **options))


@pytest.mark.parametrize("eta", [-0.1, float("nan")])
def test_an_impossible_eta_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=f"eta={eta} must not be negative"):
        next(ddim(gaussian_eps(schedule_of(), 0, 1), schedule_of(), torch.zeros(1), 5, eta=eta))


# --- where they end ---


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_ddim_reaches_a_single_point_exactly(steps: int, randn: Any) -> None:
    schedule, z_T = schedule_of(), randn(16, 1, 2, 2, dtype=F64)
    *_, last = ddim(gaussian_eps(schedule, 2.0, 0.0), schedule, z_T, steps, spacing="trailing")
    assert (last.z - 2.0).abs().max() < 1e-9


@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_ddpm_reaches_a_single_point_exactly(steps: int, randn: Any) -> None:
    schedule, z_T = schedule_of(), randn(16, 1, 2, 2, dtype=F64)
    *_, last = ddpm(gaussian_eps(schedule, 2.0, 0.0), schedule, z_T, steps, noise=Replay())
    assert (last.z - 2.0).abs().max() < 1e-9


def test_ddim_follows_the_exact_flow_of_a_gaussian_to_first_order(randn: Any) -> None:
    schedule, mu, s = schedule_of(), 2.0, 1.0
    z_T = randn(256, 1, 2, 2, dtype=F64)
    a, b = schedule.scales(torch.tensor([schedule.T - 1]))
    exact = mu + s * (z_T - a * mu) / ((a * s) ** 2 + b**2).sqrt()

    def error(steps: int) -> float:
        denoise = gaussian_eps(schedule, mu, s)
        *_, last = ddim(denoise, schedule, z_T, steps, spacing="trailing")
        return (last.z - exact).abs().max().item()

    assert 3 < error(50) / error(200) < 5  # four times the steps, about a quarter of the error
    assert error(1000) < 0.02


def test_ddpm_samples_have_the_mean_and_the_spread_of_the_data(randn: Any) -> None:
    schedule, mu, s, n = schedule_of(), -1.0, 0.5, 10_000
    z_T, noise = randn(n, 1, 1, 1, dtype=F64), Replay()
    *_, last = ddpm(gaussian_eps(schedule, mu, s), schedule, z_T, noise=noise)
    # Four standard errors of N = 10,000, and the percent that T = 1000 steps leave.
    assert abs(last.z.mean().item() - mu) < 4 * s / n**0.5 + 0.01 * s
    assert abs(last.z.std().item() - s) < 4 * s / (2 * n) ** 0.5 + 0.01 * s


@EACH_SAMPLER
@EACH_SPACING
@pytest.mark.parametrize("steps", [1, 10])
def test_one_step_and_all_steps_work(sampler: Any, spacing: str, steps: int, randn: Any) -> None:
    schedule, z_T = schedule_of(10), randn(3, 2, 1, 4, dtype=F64)
    denoise = gaussian_eps(schedule, 0.0, 1.0)
    path = list(sampler(denoise, schedule, z_T, steps, spacing=spacing, noise=Replay()))
    assert [step.t for step in path] == timesteps(10, steps, spacing)
    assert all(isinstance(step, Step) and step.z.isfinite().all() for step in path)
    assert all(step.z.shape == step.z0_hat.shape == z_T.shape for step in path)


def test_leading_ends_at_the_first_alpha_and_the_others_at_the_data(randn: Any) -> None:
    schedule, z_T = schedule_of(), randn(2, 1, 2, 2, dtype=F64)
    denoise, abar = gaussian_eps(schedule, 1.0, 0.7), schedule.alphas_cumprod[0]
    for spacing in SPACINGS:
        *_, before, last = ddim(denoise, schedule, z_T, 10, spacing=spacing)
        eps = denoise(before.z, torch.full((2,), last.t))
        residue = abar.sqrt() * last.z0_hat + (1 - abar).sqrt() * eps
        expected = residue if spacing == "leading" else last.z0_hat
        assert torch.allclose(last.z, expected, atol=1e-12)


def test_z0_hat_is_what_the_denoiser_implies(randn: Any) -> None:
    schedule, z = schedule_of(), randn(2, 1, 2, 2, dtype=F64)
    denoise = gaussian_eps(schedule, 1.0, 0.7)
    for step in ddim(denoise, schedule, z, 20):
        t = torch.full((2,), step.t)
        assert torch.allclose(step.z0_hat, schedule.z0_from_eps(z, t, denoise(z, t)))
        z = step.z


# --- randomness ---


def test_ddim_with_eta_one_and_all_steps_is_ddpm(randn: Any) -> None:
    schedule, z_T, noise = schedule_of(200), randn(4, 1, 2, 2, dtype=F64), Replay()
    denoise = gaussian_eps(schedule, 1.0, 0.5)
    ancestral = list(ddpm(denoise, schedule, z_T, noise=noise))
    noise.rewind()
    implicit = ddim(denoise, schedule, z_T, 200, eta=1.0, spacing="trailing", noise=noise)
    for one, other in zip(ancestral, implicit, strict=True):
        assert torch.allclose(one.z, other.z, atol=1e-9)


@pytest.mark.parametrize("sampler", ALL_BUT_DDPM)
@EACH_SPACING
def test_without_eta_no_noise_is_drawn(sampler: Any, spacing: str, randn: Any) -> None:
    schedule = schedule_of()
    denoise, z_T = gaussian_eps(schedule, 1.0, 0.5), randn(1, 1, 1, 1)
    assert len(list(sampler(denoise, schedule, z_T, 5, spacing=spacing, noise=no_noise))) == 5


def test_ddpm_draws_once_between_steps_and_not_at_the_end(randn: Any) -> None:
    schedule, noise = schedule_of(), Replay()
    list(ddpm(gaussian_eps(schedule, 0.0, 1.0), schedule, randn(1, 1, 1, 1), 5, noise=noise))
    assert len(noise.past) == 4


@EACH_SAMPLER
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_replayed_noise_gives_the_same_path(sampler: Any, eta: float, randn: Any) -> None:
    schedule, z_T, noise = schedule_of(), randn(2, 1, 2, 2), Replay()
    options = {"eta": eta} if sampler is ddim else {}
    draws = sampler is ddpm or (sampler is ddim and eta > 0)

    def path(own: Replay) -> Tensor:
        denoise = gaussian_eps(schedule, 1.0, 0.5)
        steps = sampler(denoise, schedule, z_T, 8, noise=own, **options)
        return torch.stack([step.z for step in steps])

    first = path(noise)
    noise.rewind()
    assert torch.equal(path(noise), first)
    assert torch.allclose(path(Replay(seed=2)), first) != draws
    assert bool(noise.past) == draws


@EACH_SAMPLER
def test_given_noise_is_all_the_randomness(sampler: Any, randn: Any) -> None:
    schedule, state = schedule_of(), torch.get_rng_state()
    denoise = gaussian_eps(schedule, 1.0, 0.5)
    list(sampler(denoise, schedule, randn(2, 1, 2, 2), 8, noise=Replay()))
    assert torch.equal(torch.get_rng_state(), state)


# --- the contract with the caller ---


@EACH_SAMPLER
def test_the_denoiser_gets_int64_times_and_the_start_is_left_alone(
    sampler: Any, randn: Any
) -> None:
    schedule, z_T, seen = schedule_of(), randn(3, 1, 2, 2, dtype=F64), []
    start = z_T.clone()

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        assert t.shape == (3,)
        seen.append(int(t[0]))
        return gaussian_eps(schedule, 1.0, 0.5)(z, t)

    path = list(sampler(denoise, schedule, z_T, 6, spacing="trailing", noise=Replay()))
    times = [step.t for step in path]
    again = {  # PLMS tries its first step; Heun looks again from where each but the last ends
        "plms": [times[0], times[1], *times[1:]],
        "heun": [times[0], *(t for t in times[1:] for _ in range(2))],
    }
    assert seen == again.get(sampler.__name__, times)
    assert torch.equal(z_T, start)


def test_heun_asks_at_index_0_where_leading_ends(randn: Any) -> None:
    schedule, seen = schedule_of(), []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return z

    list(SAMPLERS["heun"](denoise, schedule, randn(1, 1, 1, 1), 2, spacing="leading"))
    assert seen == [501, 1, 1, 0]


@EACH_SAMPLER
def test_no_gradient_inside_and_the_callers_mode_outside(sampler: Any, randn: Any) -> None:
    schedule, weight = schedule_of(), torch.ones((), dtype=F64, requires_grad=True)
    steps = sampler(lambda z, t: weight * z, schedule, randn(1, 1, 1, 1, dtype=F64), 3)
    for step in steps:
        assert not step.z.requires_grad
        assert torch.is_grad_enabled()


@EACH_SAMPLER
def test_a_consistent_prediction_changes_nothing(sampler: Any, randn: Any) -> None:
    schedule, z_T, noise = schedule_of(), randn(2, 1, 2, 2, dtype=F64), Replay()
    denoise = gaussian_eps(schedule, 1.0, 0.5)

    def both(z: Tensor, t: Tensor) -> Prediction:
        eps = denoise(z, t)
        return Prediction(eps, schedule.z0_from_eps(z, t, eps))

    first = [step.z for step in sampler(denoise, schedule, z_T, 5, noise=noise)]
    noise.rewind()
    second = [step.z for step in sampler(both, schedule, z_T, 5, noise=noise)]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(first, second, strict=True))


def events_with_edit(sampler: Any, start: Tensor) -> tuple[list[tuple], list[Step]]:
    schedule, events = schedule_of(), []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        events.append(("denoise", int(t[0]), z))
        return gaussian_eps(schedule, 1.0, 0.5)(z, t)

    def edit(z: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        events.append(("edit", int(t[0]), z))
        return z + 10.0

    path = list(sampler(denoise, schedule, start, 3, noise=Replay(), edit=edit))
    return events, path


@pytest.mark.parametrize("sampler", ALL_BUT_DDPM)
def test_all_but_ddpm_edit_before_each_step(sampler: Any, randn: Any) -> None:
    z_T = randn(2, 1, 2, 2, dtype=F64)
    events, path = events_with_edit(sampler, z_T)
    edits = [i for i, event in enumerate(events) if event[0] == "edit"]
    assert edits[0] == 0
    assert [events[i][1] for i in edits] == [step.t for step in path]
    for i, z in zip(edits, [z_T, path[0].z, path[1].z], strict=True):
        assert torch.equal(events[i][2], z)
        assert events[i + 1][:2] == ("denoise", events[i][1])
        assert torch.equal(events[i + 1][2], z + 10.0)


def test_ddpm_edits_after_each_step(randn: Any) -> None:
    z_T = randn(2, 1, 2, 2, dtype=F64)
    events, path = events_with_edit(ddpm, z_T)
    times = [step.t for step in path]
    assert [e[:2] for e in events] == [(w, t) for t in times for w in ("denoise", "edit")]
    assert torch.equal(events[0][2], z_T)
    for step, edited in zip(path, events[1::2], strict=True):
        assert torch.equal(step.z, edited[2] + 10.0)
    assert torch.equal(events[2][2], path[0].z)


# --- zero terminal SNR ---


@pytest.fixture
def zero_snr() -> NoiseSchedule:
    """A schedule whose last z_t holds no signal at all."""
    schedule = schedule_of()
    schedule.alphas_cumprod[-1] = 0.0
    return schedule


@EACH_SAMPLER
def test_at_zero_terminal_snr_eps_alone_is_refused(
    sampler: Any, zero_snr: NoiseSchedule, randn: Any
) -> None:
    with pytest.raises(ValueError, match="Prediction"):
        list(sampler(lambda z, t: z, zero_snr, randn(1, 1, 1, 1), 5, spacing="trailing"))


@EACH_SAMPLER
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_at_zero_terminal_snr_only_trailing_is_taken(
    sampler: Any, spacing: str, zero_snr: NoiseSchedule, randn: Any
) -> None:
    z_T = randn(1, 1, 1, 1)
    with pytest.raises(ValueError, match="trailing"):
        list(sampler(lambda z, t: Prediction(z, z), zero_snr, z_T, 5, spacing=spacing))


@EACH_SAMPLER
@pytest.mark.parametrize("steps", [1, 5, 1000])
def test_at_zero_terminal_snr_a_prediction_reaches_the_point(
    sampler: Any, steps: int, zero_snr: NoiseSchedule, randn: Any
) -> None:
    def denoise(z: Tensor, t: Tensor) -> Prediction:
        z0 = torch.full_like(z, 2.0)
        return Prediction(zero_snr.eps_from_z0(z, t, z0), z0)

    z_T, noise = randn(4, 1, 2, 2, dtype=F64), Replay()
    *_, last = sampler(denoise, zero_snr, z_T, steps, spacing="trailing", noise=noise)
    assert (last.z - 2.0).abs().max() < 1e-9
