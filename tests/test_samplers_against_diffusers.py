"""Whole trajectories of the other samplers against diffusers' schedulers, on the same table.

DDIM and DDPM that predict eps are in test_against_diffusers.py. What differs, and is set here:
- PNDM (skip_prk_steps, steps_offset=1) is PLMS as in the official code. Its first step is listed
  as two calls; with S = 1 it has no second call and is DDIM, where the official code and ours
  average two predictions at the same time.
- Euler and Heun walk in x = z sqrt(1 + sigma^2); their tables of sigma are float32, hence 1e-5.
- "leading" ends at alphas_cumprod[0] as in the official code: theirs with "sigma_min", which Heun
  has not. DPM-Solver's own "leading" and "linspace" divide by S + 1: our times are given to it.
- DPM-Solver ends at first order when it has less than 15 steps; ours only where it ends at the
  data, as lower_order_final=False has it.
- With rescale_betas_zero_snr their DDIM takes a noised end for granted: trailing, v or z0.
"""

import warnings
from typing import Any

import pytest
import torch
from diffusers_copy import error
from torch import Tensor

from minildm import NoiseSchedule, ddim
from minildm.samplers import SAMPLERS, dpm_solver_pp, euler, heun, plms, timesteps

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from diffusers import (
        DDIMScheduler,
        DPMSolverMultistepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        PNDMScheduler,
    )

pytestmark = pytest.mark.filterwarnings(  # inside diffusers, which a test could not mend
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
F64 = torch.float64
ENDS = {"leading": "sigma_min", "trailing": "zero", "linspace": "zero"}


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear(dtype=F64)


def scheduler(kind: type, schedule: NoiseSchedule, **options: Any) -> Any:
    theirs = kind(
        num_train_timesteps=schedule.T,
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        **options,
    )
    table = schedule.alphas_cumprod
    assert error(theirs.alphas_cumprod.double(), table) < 1e-5  # the same, in float32
    theirs.alphas_cumprod = table
    return theirs


def wavy(z: Tensor, t: Tensor) -> Tensor:
    """A denoiser that is neither linear nor the same at all times."""
    return torch.sin(2 * z) + 0.1 * torch.cos(t.to(z.dtype) / 100).view(-1, 1, 1, 1)


# --- PLMS ---


@pytest.mark.parametrize("steps", [2, 4, 10, 50, 500])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_plms_walks_the_path_of_pndm(
    spacing: str, steps: int, schedule: NoiseSchedule, randn: Any
) -> None:
    leading = spacing == "leading"
    theirs = scheduler(
        PNDMScheduler,
        schedule,
        skip_prk_steps=True,
        set_alpha_to_one=not leading,
        steps_offset=int(leading),
        timestep_spacing=spacing,
    )
    if leading:
        theirs.final_alpha_cumprod = schedule.alphas_cumprod[0]
    theirs.set_timesteps(steps)
    z_T = z = randn(2, 1, 2, 2, dtype=F64)
    path = list(plms(wavy, schedule, z_T, steps, spacing=spacing))
    first, second, *_ = times = theirs.timesteps.tolist()
    assert [step.t for step in path] == [first, second, *times[3:]]
    for i, t in enumerate(times):  # one call more than steps
        z = theirs.step(wavy(z, torch.full((2,), t)), t, z).prev_sample
        if i > 0:
            assert error(path[i - 1].z, z) < 1e-8


def plms_by_hand(table: list[float], times: list[int], z: Tensor) -> Tensor:
    """The official description, step by step: times fall, the last target is table[0]."""

    def moved(z: Tensor, eps: Tensor, i: int) -> Tensor:
        a = table[times[i]]
        a_prev = table[times[i + 1]] if i + 1 < len(times) else table[0]
        z0_hat = (z - (1 - a) ** 0.5 * eps) / a**0.5
        return a_prev**0.5 * z0_hat + (1 - a_prev) ** 0.5 * eps

    def asked(z: Tensor, i: int) -> Tensor:
        return wavy(z, torch.full((len(z),), times[min(i, len(times) - 1)]))

    old: list[Tensor] = []
    for i in range(len(times)):
        e = asked(z, i)
        if len(old) == 0:
            e_prime = (e + asked(moved(z, e, i), i + 1)) / 2
        elif len(old) == 1:
            e_prime = (3 * e - old[-1]) / 2
        elif len(old) == 2:
            e_prime = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            e_prime = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        z = moved(z, e_prime, i)
        old = [*old, e][-3:]
    return z


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 20])
def test_plms_is_the_official_description(steps: int, schedule: NoiseSchedule, randn: Any) -> None:
    z_T = randn(2, 1, 2, 2, dtype=F64)
    expected = plms_by_hand(schedule.alphas_cumprod.tolist(), timesteps(1000, steps), z_T)
    *_, last = plms(wavy, schedule, z_T, steps)
    assert error(last.z, expected) < 1e-10


# --- Euler, Heun, DPM-Solver++ ---


@pytest.mark.parametrize("steps", [1, 8, 50])
@pytest.mark.parametrize("spacing", ENDS)
def test_euler_walks_their_path(
    spacing: str, steps: int, schedule: NoiseSchedule, randn: Any
) -> None:
    theirs = scheduler(EulerDiscreteScheduler, schedule, final_sigmas_type=ENDS[spacing])
    theirs.set_timesteps(timesteps=timesteps(1000, steps, spacing))
    z_T = randn(2, 1, 2, 2, dtype=F64)
    x = z_T * (1 + theirs.sigmas[0].double() ** 2).sqrt()
    for i, step in enumerate(euler(wavy, schedule, z_T, steps, spacing=spacing)):
        t = theirs.timesteps[i]
        assert step.t == t
        z = theirs.scale_model_input(x, t)
        x = theirs.step(wavy(z, t.expand(2)), t, x).prev_sample
        assert error(step.z, x / (1 + theirs.sigmas[i + 1].double() ** 2).sqrt()) < 1e-5


@pytest.mark.parametrize("steps", [2, 8, 50])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_heun_walks_their_path(
    spacing: str, steps: int, schedule: NoiseSchedule, randn: Any
) -> None:
    theirs = scheduler(HeunDiscreteScheduler, schedule)
    theirs.set_timesteps(timesteps=timesteps(1000, steps, spacing))
    z_T = randn(2, 1, 2, 2, dtype=F64)
    x = z_T * (1 + theirs.sigmas[0].double() ** 2).sqrt()
    ours = heun(wavy, schedule, z_T, steps, spacing=spacing)
    for i, t in enumerate(theirs.timesteps):
        z = theirs.scale_model_input(x, t)
        x = theirs.step(wavy(z, t.expand(2)), t, x).prev_sample
        if i % 2 or i == len(theirs.timesteps) - 1:  # both halves, or the last step's only one
            sigma = theirs.sigmas[i + 1].double()
            assert error(next(ours).z, x / (1 + sigma**2).sqrt()) < 1e-5
    assert next(ours, None) is None


@pytest.mark.parametrize("steps", [1, 8, 50])
@pytest.mark.parametrize("spacing", ENDS)
def test_dpm_solver_walks_their_path(
    spacing: str, steps: int, schedule: NoiseSchedule, randn: Any
) -> None:
    theirs = scheduler(
        DPMSolverMultistepScheduler,
        schedule,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=False,
        final_sigmas_type=ENDS[spacing],
    )
    theirs.set_timesteps(timesteps=timesteps(1000, steps, spacing))
    z_T = z = randn(2, 1, 2, 2, dtype=F64)
    for i, step in enumerate(dpm_solver_pp(wavy, schedule, z_T, steps, spacing=spacing)):
        t = theirs.timesteps[i]
        assert step.t == t
        z = theirs.step(wavy(z, t.expand(2)), t, z).prev_sample
        assert error(step.z, z) < 1e-5


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("steps", [1, 4, 10, 28, 1000])
def test_our_times_are_theirs_where_theirs_are_whole(kind: type, steps: int) -> None:
    """Their linspace rounds to no index: the same only where S - 1 divides T - 1."""
    schedule = NoiseSchedule.scaled_linear(dtype=F64)
    for spacing in ("trailing", "linspace") if steps > 1 else ("trailing",):
        theirs = scheduler(kind, schedule, timestep_spacing=spacing)
        theirs.set_timesteps(steps)
        times = sorted(set(theirs.timesteps.tolist()), reverse=True)  # Heun lists them twice
        assert times == pytest.approx(timesteps(1000, steps, spacing), abs=1e-3)


# --- v and z0 ---


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 8, 500])
@pytest.mark.parametrize(("objective", "name"), [("v", "v_prediction"), ("z0", "sample")])
@pytest.mark.parametrize("zero_snr", [True, False])
def test_ddim_of_other_objectives_walks_their_path(
    zero_snr: bool, objective: Any, name: str, steps: int, eta: float, randn: Any
) -> None:
    schedule = NoiseSchedule.scaled_linear(dtype=F64)
    schedule = schedule.zero_terminal_snr() if zero_snr else schedule
    theirs = scheduler(
        DDIMScheduler,
        schedule,
        prediction_type=name,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    theirs.set_timesteps(steps)
    past: list[Tensor] = []

    def noise(like: Tensor) -> Tensor:
        past.append(randn(*like.shape, seed=len(past) + 1, dtype=like.dtype))
        return past[-1]

    def denoise(z: Tensor, t: Tensor) -> Any:
        return schedule.prediction(objective, wavy(z, t), z, t)

    z_T = z = randn(2, 1, 2, 2, dtype=F64)
    path = ddim(denoise, schedule, z_T, steps, eta=eta, spacing="trailing", noise=noise)
    for i, step in enumerate(path):
        t = theirs.timesteps[i]
        drawn = past[i] if eta else None
        out = theirs.step(wavy(z, t.expand(2)), int(t), z, eta=eta, variance_noise=drawn)
        z = out.prev_sample
        assert error(step.z, z) < 1e-8
        assert error(step.z0_hat, out.pred_original_sample) < 1e-8
    assert i == steps - 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_every_objective_alike(
    name: str, schedule: NoiseSchedule, randn: Any
) -> None:
    """The same knowledge, said as eps, z0 or v, leads to the same place."""
    z_T, ends = randn(2, 1, 2, 2, dtype=F64), []
    for objective in ("eps", "z0", "v"):

        def denoise(z: Tensor, t: Tensor, objective: Any = objective) -> Any:
            eps = wavy(z, t)
            said = schedule.target(objective, schedule.z0_from_eps(z, t, eps), t, eps)
            return schedule.prediction(objective, said, z, t)

        *_, last = SAMPLERS[name](denoise, schedule, z_T, 10, noise=lambda z: torch.cos(z))
        ends.append(last.z)
    assert error(ends[1], ends[0]) < 1e-8
    assert error(ends[2], ends[0]) < 1e-8
