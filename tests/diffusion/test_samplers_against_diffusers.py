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
from diffusion.references import F64, SCHEDULE, ZERO_SNR, error, scheduler, wavy
from helpers import randn
from torch import Tensor

from minildm.diffusion.latent_diffusion import seeded_noise
from minildm.diffusion.samplers import ddim, ddpm, dpm_solver_pp, euler, heun, plms, timesteps

pytestmark = pytest.mark.filterwarnings(  # inside diffusers
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
ENDS = {"leading": "sigma_min", "trailing": "zero", "linspace": "zero"}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
TRAILING = {"timestep_spacing": "trailing"}
Z_T = randn(2, 1, 2, 2, dtype=F64)


def called(z: Tensor, t: Any) -> Tensor:
    """The denoiser at one time for both samples."""
    return wavy(z, torch.as_tensor(t).expand(2))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 8, 50, 500])
@pytest.mark.parametrize(
    ("spacing", "objective", "zero_snr"),
    [
        (LEADING, "eps", False),
        (TRAILING, "eps", False),
        (TRAILING, "v", False),
        (TRAILING, "v", True),
        (TRAILING, "z0", True),
    ],
)
def test_ddim(spacing: dict, objective: Any, zero_snr: bool, steps: int, eta: float) -> None:
    schedule = ZERO_SNR if zero_snr else SCHEDULE
    name = {"eps": "epsilon", "v": "v_prediction", "z0": "sample"}[objective]
    options = {"prediction_type": name, "rescale_betas_zero_snr": zero_snr, "clip_sample": False}
    theirs = scheduler(DDIMScheduler, schedule, **options, **spacing)
    theirs.set_timesteps(steps)
    z, noise = Z_T, seeded_noise(1)

    def denoise(z: Tensor, t: Tensor) -> Any:
        out = wavy(z, t)
        return out if objective == "eps" else schedule.prediction(objective, out, z, t)

    options = {"eta": eta, "spacing": spacing["timestep_spacing"], "noise": seeded_noise(1)}
    path = list(ddim(denoise, schedule, z, steps, **options))
    assert [step.t for step in path] == theirs.timesteps.tolist()
    for step in path:
        drawn = noise(z) if eta else None
        out = theirs.step(called(z, step.t), step.t, z, eta, variance_noise=drawn)
        z = out.prev_sample
        assert error(step.z, z) < 1e-8
        assert error(step.z0_hat, out.pred_original_sample) < 1e-8


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_ddpm(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = scheduler(DDPMScheduler, clip_sample=False, **TRAILING)
    theirs.set_timesteps(steps)
    noise, z = seeded_noise(1), Z_T
    replayed = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
    monkeypatch.setattr(replayed, lambda shape, **_: noise(torch.empty(shape, dtype=F64)))
    for step in ddpm(wavy, SCHEDULE, z, steps, noise=seeded_noise(1)):
        z = theirs.step(called(z, step.t), step.t, z).prev_sample
        assert error(step.z, z) < 1e-8


@pytest.mark.parametrize("steps", [2, 4, 10, 50, 500])
@pytest.mark.parametrize("spacing", [LEADING, TRAILING], ids=["leading", "trailing"])
def test_plms(spacing: dict, steps: int) -> None:
    options = {"set_alpha_to_one": True, **spacing}
    theirs = scheduler(PNDMScheduler, skip_prk_steps=True, **options)
    theirs.set_timesteps(steps)
    z, path = Z_T, list(plms(wavy, SCHEDULE, Z_T, steps, spacing=spacing["timestep_spacing"]))
    first, second, *_ = times = theirs.timesteps.tolist()
    assert [step.t for step in path] == [first, second, *times[3:]]
    for i, t in enumerate(times):  # one call more than steps
        z = theirs.step(called(z, t), t, z).prev_sample
        assert i == 0 or error(path[i - 1].z, z) < 1e-8


@pytest.mark.parametrize("steps", [2, 8, 50])
@pytest.mark.parametrize(
    ("sampler", "spacing"), [*((euler, s) for s in ENDS), (heun, "trailing"), (heun, "linspace")]
)
def test_euler_and_heun(sampler: Any, spacing: Any, steps: int) -> None:
    if sampler is euler:
        theirs = scheduler(EulerDiscreteScheduler, final_sigmas_type=ENDS[spacing])
    else:
        theirs = scheduler(HeunDiscreteScheduler)
    theirs.set_timesteps(timesteps=timesteps(1000, steps, spacing))
    scales = (1 + theirs.sigmas.double() ** 2).sqrt()
    x, last = Z_T * scales[0], len(theirs.timesteps) - 1
    ours = sampler(wavy, SCHEDULE, Z_T, steps, spacing=spacing)
    for i, t in enumerate(theirs.timesteps):
        z = theirs.scale_model_input(x, t)
        x = theirs.step(called(z, t), t, x).prev_sample
        if sampler is euler or i % 2 or i == last:  # Heun: both halves, or the last step's only one
            assert error(next(ours).z, x / scales[i + 1]) < 1e-5
    assert next(ours, None) is None


@pytest.mark.parametrize("steps", [1, 8, 50])
@pytest.mark.parametrize("spacing", ENDS)
def test_dpm_solver(spacing: Any, steps: int) -> None:
    options = {"lower_order_final": False, "final_sigmas_type": ENDS[spacing]}
    theirs = scheduler(DPMSolverMultistepScheduler, **options)
    assert (theirs.config.algorithm_type, theirs.config.solver_order) == ("dpmsolver++", 2)
    theirs.set_timesteps(timesteps=timesteps(1000, steps, spacing))
    z, path = Z_T, dpm_solver_pp(wavy, SCHEDULE, Z_T, steps, spacing=spacing)
    for t, step in zip(theirs.timesteps, path, strict=True):
        z = theirs.step(called(z, t), t, z).prev_sample
        assert error(step.z, z) < 1e-5
