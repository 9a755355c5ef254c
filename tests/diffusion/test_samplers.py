"""Samplers: which times they visit, where they end, what they draw, and when they edit."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusion.closed_forms import F64, Replay, gaussian_eps
from helpers import randn
from torch import Tensor

from minildm.diffusion import NoiseSchedule, Prediction, Step
from minildm.diffusion.samplers import SAMPLERS, SPACINGS, ddim, ddpm, repaint, timesteps

EACH_SAMPLER = pytest.mark.parametrize("name", SAMPLERS)


def schedule_of(T: int = 1000) -> NoiseSchedule:
    return NoiseSchedule.scaled_linear(T, dtype=F64)


# --- which times are visited ---


@pytest.mark.parametrize("T", [1, 7, 60])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_visits_as_many_falling_times(spacing: Any, T: int) -> None:
    for steps in range(1, T + 1):
        times = timesteps(T, steps, spacing)
        assert len(times) == steps
        assert all(a > b for a, b in pairwise(times)), (steps, times)
        assert 0 <= times[-1] <= times[0] < T
        if spacing != "leading":
            assert times[0] == T - 1


def test_the_times_are_the_official_and_the_published_ones() -> None:
    for steps in (s for s in range(1, 1000) if 1000 % s == 0):
        official = [t + 1 for t in range(0, 1000, 1000 // steps)]
        assert timesteps(1000, steps, "leading") == official[::-1]
    # Where the official code fails:
    assert timesteps(1000, 1000, "leading") == list(range(999, -1, -1))
    assert timesteps(1000, 30, "leading")[::-1] == [i * 1000 // 30 + 1 for i in range(30)]
    assert timesteps(1000, 4, "trailing") == [999, 749, 499, 249]
    assert timesteps(1000, 4, "linspace") == [999, 666, 333, 0]


@EACH_SAMPLER
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must lie in 1..T=10"),
        ({"steps": 11}, "steps=11"),
        ({"steps": 5, "spacing": "karras"}, "spacing='karras' is not known; known: leading"),
        ({"steps": 5, "again": 0}, "again=0 must be at least 1"),
    ],
)
def test_impossible_steps_are_refused(name: str, options: dict, message: str) -> None:
    schedule = schedule_of(10)
    with pytest.raises(ValueError, match=message):
        next(SAMPLERS[name](gaussian_eps(schedule, 0, 1), schedule, torch.zeros(1), **options))


# --- where they end ---


@pytest.mark.parametrize("sampler", [ddim, ddpm])
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_a_single_point_is_reached_exactly(steps: int, sampler: Any) -> None:
    schedule, z_T = schedule_of(), randn(16, 1, 2, 2, dtype=F64)
    denoise = gaussian_eps(schedule, 2.0, 0.0)
    *_, last = sampler(denoise, schedule, z_T, steps, spacing="trailing", noise=Replay())
    assert (last.z - 2.0).abs().max() < 1e-9


@EACH_SAMPLER
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 10])
def test_one_step_and_all_steps_work(name: str, spacing: str, steps: int) -> None:
    schedule, z_T = schedule_of(10), randn(3, 2, 1, 4, dtype=F64)
    denoise = gaussian_eps(schedule, 0.0, 1.0)
    path = list(SAMPLERS[name](denoise, schedule, z_T, steps, spacing=spacing, noise=Replay()))
    assert [step.t for step in path] == timesteps(10, steps, spacing)
    assert all(isinstance(step, Step) and step.z.isfinite().all() for step in path)
    assert all(step.z.shape == step.z0_hat.shape == z_T.shape for step in path)


# --- randomness ---


def test_ddim_with_eta_one_and_all_steps_is_ddpm() -> None:
    schedule, z_T, noise = schedule_of(200), randn(4, 1, 2, 2, dtype=F64), Replay()
    denoise = gaussian_eps(schedule, 1.0, 0.5)
    ancestral = list(ddpm(denoise, schedule, z_T, noise=noise))
    options = {"eta": 1.0, "spacing": "trailing", "noise": noise.rewind()}
    for one, other in zip(ancestral, ddim(denoise, schedule, z_T, 200, **options), strict=True):
        assert torch.allclose(one.z, other.z, atol=1e-9)


@EACH_SAMPLER
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_the_given_noise_is_all_the_randomness(name: str, eta: float) -> None:
    schedule, z_T, noise = schedule_of(), randn(2, 1, 2, 2), Replay()
    options = {"eta": eta} if name == "ddim" else {}

    def path(own: Replay) -> Tensor:
        denoise = gaussian_eps(schedule, 1.0, 0.5)
        steps = SAMPLERS[name](denoise, schedule, z_T, 8, noise=own, **options)
        return torch.stack([step.z for step in steps])

    state, first = torch.get_rng_state(), path(noise)
    draws = {"ddpm": 7, "ddim": 8 if eta else 0}.get(name, 0)  # ddpm: none in the last step
    assert len(noise.past) == draws
    assert torch.equal(path(noise.rewind()), first)
    assert torch.allclose(path(Replay(seed=2)), first) == (not draws)
    assert torch.equal(torch.get_rng_state(), state)


# --- the contract with the caller ---


@EACH_SAMPLER
def test_the_denoiser_is_called_at_int64_times_without_gradients(name: str) -> None:
    schedule, z_T, seen = schedule_of(), randn(3, 1, 2, 2, dtype=F64), []
    start, weight = z_T.clone(), torch.ones((), dtype=F64, requires_grad=True)

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        assert t.shape == (3,)
        seen.append(int(t[0]))
        return weight * z

    times = []
    for step in SAMPLERS[name](denoise, schedule, z_T, 6, spacing="trailing", noise=Replay()):
        assert not step.z.requires_grad
        assert torch.is_grad_enabled()
        times.append(step.t)
    several = {  # PLMS tries its first step; Heun calls again where each step but the last ends
        "plms": [times[0], times[1], *times[1:]],
        "heun": [times[0], *(t for t in times[1:] for _ in range(2))],
    }
    assert seen == several.get(name, times)
    assert torch.equal(z_T, start)


def test_heun_calls_at_index_0_where_leading_ends() -> None:
    seen: list[int] = []
    sampler, z_T = SAMPLERS["heun"], randn(1, 1, 1, 1)
    list(
        sampler(lambda z, t: seen.append(int(t[0])) or z, schedule_of(), z_T, 2, spacing="leading")
    )
    assert seen == [501, 1, 1, 0]


@EACH_SAMPLER
def test_all_but_ddpm_edit_before_each_step(name: str) -> None:
    schedule, z_T, events = schedule_of(), randn(2, 1, 2, 2, dtype=F64), []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        events.append(("denoise", int(t[0]), z))
        return gaussian_eps(schedule, 1.0, 0.5)(z, t)

    def edit(z: Tensor, t: Tensor) -> Tensor:
        events.append(("edit", int(t[0]), z))
        return z + 10.0

    path = list(SAMPLERS[name](denoise, schedule, z_T, 3, noise=Replay(), edit=edit))
    edits = [i for i, event in enumerate(events) if event[0] == "edit"]
    assert [events[i][1] for i in edits] == [step.t for step in path]
    for i, before, step in zip(edits, [z_T, path[0].z, path[1].z], path, strict=True):
        if name == "ddpm":
            assert torch.equal(step.z, events[i][2] + 10.0)
        else:
            assert torch.equal(events[i][2], before)
            assert torch.equal(events[i + 1][2], before + 10.0)
    assert edits[0] == (name == "ddpm")


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_repaint_takes_each_step_again(eta: float) -> None:
    schedule, z_T, seen = schedule_of(), randn(2, 1, 2, 2, dtype=F64), []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return z

    steps = list(repaint(denoise, schedule, z_T, 4, again=3, eta=eta, noise=Replay()))
    assert [step.t for step in steps] == [751, 501, 251, 1]
    assert seen == [t for t in (751, 501, 251, 1) for _ in range(3)]
    first, second, renoise = Replay(), Replay(2), randn(2, 1, 2, 2, seed=9, dtype=F64)
    noises = iter([first, renoise, second] if eta else [renoise])
    once = next(ddim(denoise, schedule, z_T, 4, eta=eta, noise=first)).z
    part = schedule.alphas_cumprod[751] / schedule.alphas_cumprod[501]
    back = part.sqrt() * once + (1 - part).sqrt() * renoise
    twice = next(ddim(denoise, schedule, back, 4, eta=eta, noise=second)).z

    def noise(like: Tensor) -> Tensor:
        drawn = next(noises)
        return drawn if isinstance(drawn, Tensor) else drawn.rewind()(like)

    step = next(repaint(denoise, schedule, z_T, 4, again=2, eta=eta, noise=noise))
    assert torch.equal(step.z, twice)


# --- zero terminal SNR ---


@EACH_SAMPLER
@pytest.mark.parametrize("steps", [1, 5, 1000])
def test_at_zero_terminal_snr_a_prediction_reaches_the_point(name: str, steps: int) -> None:
    schedule = schedule_of().zero_terminal_snr()

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        z0 = torch.full_like(z, 2.0)
        return Prediction(schedule.eps_from_z0(z, t, z0), z0)

    z_T, options = randn(4, 1, 2, 2, dtype=F64), {"spacing": "trailing", "noise": Replay()}
    *_, last = SAMPLERS[name](denoise, schedule, z_T, steps, **options)
    assert (last.z - 2.0).abs().max() < 1e-9


@EACH_SAMPLER
def test_at_zero_terminal_snr_eps_alone_and_other_spacings_are_refused(name: str) -> None:
    schedule, z_T, sampler = schedule_of().zero_terminal_snr(), randn(1, 1, 1, 1), SAMPLERS[name]
    with pytest.raises(ValueError, match="must return a Prediction"):
        list(sampler(lambda z, t: z, schedule, z_T, 5, spacing="trailing"))
    for spacing in ("leading", "linspace"):
        with pytest.raises(ValueError, match="needs spacing='trailing'"):
            list(sampler(lambda z, t: Prediction(z, z), schedule, z_T, 5, spacing=spacing))
