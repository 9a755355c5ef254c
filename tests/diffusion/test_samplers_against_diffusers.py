"""Whole trajectories against diffusers' schedulers in float64, on the same table.

What differs, and is set here:
- DDIM "leading" needs steps_offset=1 and set_alpha_to_one=False to be the official code's; each
  of its steps goes T // S back, so S must divide T. `clip_sample` is wrong for latents.
- DDPM draws noise in the last step, too, where it weighs 1e-10 (a clamped variance).
- PNDM (skip_prk_steps, steps_offset=1) is PLMS as in the official code. Its first step is listed
  as two calls; with S = 1 it has no second call.
- Euler and Heun walk in x = z sqrt(1 + sigma^2); their tables of sigma are float32, hence 1e-5.
- "leading" ends at alphas_cumprod[0] as in the official code: theirs with "sigma_min", which Heun
  has not. DPM-Solver's own "leading" and "linspace" divide by S + 1: our times are given to it.
- DPM-Solver ends at first order when it has less than 15 steps; ours only where it ends at the
  data, as lower_order_final=False has it.
"""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusion.closed_forms import F64, Replay, error, scheduler, wavy
from helpers import randn
from torch import Tensor

from minildm.diffusion import NoiseSchedule
from minildm.diffusion.samplers import (
    SAMPLERS,
    ddim,
    ddpm,
    dpm_solver_pp,
    euler,
    heun,
    plms,
    timesteps,
)

pytestmark = pytest.mark.filterwarnings(  # inside diffusers
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
ENDS = {"leading": "sigma_min", "trailing": "zero", "linspace": "zero"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
TRAILING = {"timestep_spacing": "trailing"}


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear(dtype=F64)


CASES = {  # spacing, what is predicted, its name in diffusers, zero terminal SNR
    "leading": (LEADING, "eps", "epsilon", False),
    "trailing": (TRAILING, "eps", "epsilon", False),
    "v": (TRAILING, "v", "v_prediction", False),
    "z0": (TRAILING, "z0", "sample", False),
    "v, zero SNR": (TRAILING, "v", "v_prediction", True),
    "z0, zero SNR": (TRAILING, "z0", "sample", True),
}


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 8, 50, 500])
@pytest.mark.parametrize("case", CASES)
def test_ddim(case: str, steps: int, eta: float, schedule: NoiseSchedule) -> None:
    spacing, objective, name, zero_snr = CASES[case]
    schedule = schedule.zero_terminal_snr() if zero_snr else schedule
    options = {"prediction_type": name, "rescale_betas_zero_snr": zero_snr, "clip_sample": False}
    theirs = scheduler(DDIMScheduler, schedule, **options, **spacing)
    theirs.set_timesteps(steps)
    z, noise = randn(2, 1, 2, 2, dtype=F64), Replay()

    def denoise(z: Tensor, t: Tensor) -> Any:
        out = wavy(z, t)
        return out if case == "leading" else schedule.prediction(objective, out, z, t)

    options = {"eta": eta, "spacing": spacing["timestep_spacing"], "noise": noise}
    path = list(ddim(denoise, schedule, z, steps, **options))
    assert [step.t for step in path] == theirs.timesteps.tolist()
    for i, step in enumerate(path):
        drawn = noise.past[i] if eta else None
        out = theirs.step(wavy(z, torch.full((2,), step.t)), step.t, z, eta, variance_noise=drawn)
        z = out.prev_sample
        assert error(step.z, z) < 1e-8
        assert error(step.z0_hat, out.pred_original_sample) < 1e-8


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_ddpm(steps: int, schedule: NoiseSchedule, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = scheduler(DDPMScheduler, schedule, clip_sample=False, **TRAILING)
    theirs.set_timesteps(steps)
    noise, drawn = Replay(), Replay()
    replayed = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(replayed, lambda shape, **_: drawn(torch.empty(shape, dtype=F64)))
    z = randn(2, 1, 2, 2, dtype=F64)
    for step in ddpm(wavy, schedule, z, steps, noise=noise):
        z = theirs.step(wavy(z, torch.full((2,), step.t)), step.t, z).prev_sample
        assert error(step.z, z) < 1e-8


@pytest.mark.parametrize("steps", [2, 4, 10, 50, 500])
@pytest.mark.parametrize("spacing", [LEADING, TRAILING], ids=["leading", "trailing"])
def test_plms(spacing: dict, steps: int, schedule: NoiseSchedule) -> None:
    options = {"set_alpha_to_one": True, **spacing}
    theirs = scheduler(PNDMScheduler, schedule, skip_prk_steps=True, **options)
    theirs.set_timesteps(steps)
    z, name = randn(2, 1, 2, 2, dtype=F64), spacing["timestep_spacing"]
    path = list(plms(wavy, schedule, z, steps, spacing=name))
    first, second, *_ = times = theirs.timesteps.tolist()
    assert [step.t for step in path] == [first, second, *times[3:]]
    for i, t in enumerate(times):  # one call more than steps
        z = theirs.step(wavy(z, torch.full((2,), t)), t, z).prev_sample
        if i > 0:
            assert error(path[i - 1].z, z) < 1e-8


@pytest.mark.parametrize("steps", [1, 8, 50])
@pytest.mark.parametrize("spacing", ENDS)
def test_euler(spacing: Any, steps: int, schedule: NoiseSchedule) -> None:
    theirs = scheduler(EulerDiscreteScheduler, schedule, final_sigmas_type=ENDS[spacing])
    theirs.set_timesteps(timesteps=timesteps(1000, steps, spacing))
    z_T = randn(2, 1, 2, 2, dtype=F64)
    x = z_T * (1 + theirs.sigmas[0].double() ** 2).sqrt()
    for i, step in enumerate(euler(wavy, schedule, z_T, steps, spacing=spacing)):
        t = theirs.timesteps[i]
        z = theirs.scale_model_input(x, t)
        x = theirs.step(wavy(z, t.expand(2)), t, x).prev_sample
        assert error(step.z, x / (1 + theirs.sigmas[i + 1].double() ** 2).sqrt()) < 1e-5


@pytest.mark.parametrize("steps", [2, 8, 50])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_heun(spacing: Any, steps: int, schedule: NoiseSchedule) -> None:
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
def test_dpm_solver(spacing: Any, steps: int, schedule: NoiseSchedule) -> None:
    options = {"lower_order_final": False, "final_sigmas_type": ENDS[spacing]}
    theirs = scheduler(DPMSolverMultistepScheduler, schedule, **options)
    assert (theirs.config.algorithm_type, theirs.config.solver_order) == ("dpmsolver++", 2)
    theirs.set_timesteps(timesteps=timesteps(1000, steps, spacing))
    z_T = z = randn(2, 1, 2, 2, dtype=F64)
    for i, step in enumerate(dpm_solver_pp(wavy, schedule, z_T, steps, spacing=spacing)):
        t = theirs.timesteps[i]
        assert step.t == t
        z = theirs.step(wavy(z, t.expand(2)), t, z).prev_sample
        assert error(step.z, z) < 1e-5


@pytest.mark.parametrize("name", SAMPLERS)
def test_eps_z0_and_v_lead_to_the_same_end(name: str, schedule: NoiseSchedule) -> None:
    z_T, ends = randn(2, 1, 2, 2, dtype=F64), []
    for objective in ("eps", "z0", "v"):

        def denoise(z: Tensor, t: Tensor, objective: Any = objective) -> Any:
            eps = wavy(z, t)
            out = schedule.target(objective, schedule.z0_from_eps(z, t, eps), t, eps)
            return schedule.prediction(objective, out, z, t)

        *_, last = SAMPLERS[name](denoise, schedule, z_T, 10, noise=torch.cos)
        ends.append(last.z)
    assert error(ends[1], ends[0]) < 1e-8
    assert error(ends[2], ends[0]) < 1e-8
