"""Samplers: their times, order of convergence, randomness, edits; RePaint, inversion, slerp."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusion.references import F64, SCHEDULE, ZERO_SNR
from helpers import randn
from torch import Tensor

from minildm.diffusion.latent_diffusion import seeded_noise
from minildm.diffusion.samplers import (
    SAMPLERS,
    SPACINGS,
    ddim,
    ddim_inversion,
    repaint,
    slerp,
    timesteps,
)
from minildm.diffusion.schedule import Prediction
from minildm.teaching.toy import gaussian_eps

EACH_SAMPLER = pytest.mark.parametrize("name", SAMPLERS)
MU, SPREAD = 2.0, 0.6
BEST = gaussian_eps(SCHEDULE, MU, SPREAD)
Z_T = randn(3, 2, 1, 4, dtype=F64)


# --- times ---


@pytest.mark.parametrize("T", [1, 7, 60])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_visits_as_many_falling_times(spacing: Any, T: int) -> None:
    for steps in range(1, T + 1):
        times = timesteps(T, steps, spacing)
        assert len(times) == steps
        assert all(a > b for a, b in pairwise([T, *times, -1])), (steps, times)
        assert spacing == "leading" or times[0] == T - 1


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
@pytest.mark.parametrize("steps", [1, 5, 1000])
def test_at_zero_terminal_snr_a_prediction_reaches_the_point(name: str, steps: int) -> None:
    def denoise(z: Tensor, t: Tensor) -> Prediction:
        return ZERO_SNR.prediction("z0", torch.full_like(z, 2.0), z, t)

    *_, last = SAMPLERS[name](denoise, ZERO_SNR, Z_T, steps, spacing="trailing")
    assert (last.z - 2.0).abs().max() < 1e-9


# --- the contract with the caller ---


@EACH_SAMPLER
def test_the_denoiser_is_called_at_int64_times_without_gradients(name: str) -> None:
    start, weight, seen = Z_T.clone(), torch.ones((), dtype=F64, requires_grad=True), []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64 and t.shape == (3,)
        seen.append(int(t[0]))
        return weight * z

    for spacing, times, end in (("trailing", [999, 499], []), ("leading", [501, 1], [0])):
        seen.clear()
        for step in SAMPLERS[name](denoise, SCHEDULE, Z_T, 2, spacing=spacing):
            assert not step.z.requires_grad and torch.is_grad_enabled()
        a, b = times  # PLMS tries its first step; Heun calls again where each step ends
        assert seen == {"plms": [a, b, b], "heun": [a, b, b, *end]}.get(name, times)
    assert torch.equal(Z_T, start)


@EACH_SAMPLER
def test_all_but_ddpm_edit_before_each_step(name: str) -> None:
    called, edited = {}, {}

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        called[int(t[0])] = z  # the last call at a time starts a step
        return BEST(z, t)

    def edit(z: Tensor, t: Tensor) -> Tensor:
        edited[int(t[0])] = z
        return z + 10.0

    path = list(SAMPLERS[name](denoise, SCHEDULE, Z_T, 3, edit=edit))
    assert list(edited) == [step.t for step in path]
    for step, before in zip(path, [Z_T, path[0].z, path[1].z], strict=True):
        if name == "ddpm":
            assert torch.equal(called[step.t], before)
            assert torch.equal(step.z, edited[step.t] + 10.0)
        else:
            assert torch.equal(edited[step.t], before)
            assert torch.equal(called[step.t], before + 10.0)


# --- what is made of them ---


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_repaint_takes_each_step_again(eta: float) -> None:
    """Twice: a step of DDIM, noise back to the same time, and the step again."""
    step = next(repaint(BEST, SCHEDULE, Z_T, 4, again=2, eta=eta, noise=seeded_noise(1)))
    noise = seeded_noise(1)
    options = {"eta": eta, "noise": noise}
    once = next(ddim(BEST, SCHEDULE, Z_T, 4, **options)).z
    part = SCHEDULE.alphas_cumprod[751] / SCHEDULE.alphas_cumprod[501]
    back = part.sqrt() * once + (1 - part).sqrt() * noise(once)
    assert step.t == 751
    assert torch.equal(step.z, next(ddim(BEST, SCHEDULE, back, 4, **options)).z)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_inversion_ends_where_ddim_starts(steps: int, spacing: Any) -> None:
    """With a constant eps both ways are exact, whatever the steps."""
    eps, seen = randn(3, 2, 1, 4, seed=1, dtype=F64), []

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return eps

    *_, up = ddim_inversion(denoise, SCHEDULE, Z_T, steps, spacing=spacing)
    assert seen == [0, *timesteps(1000, steps, spacing)[:0:-1]]
    *_, down = ddim(denoise, SCHEDULE, up.z, steps, spacing=spacing)
    assert torch.allclose(down.z, Z_T, atol=1e-10)


def test_slerp_stays_on_the_sphere_and_turns_evenly() -> None:
    a, b = (randn(3, 2, 4, 4, seed=s, dtype=F64) for s in (1, 2))
    a, b = (7 * x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (a, b))
    points = torch.stack([slerp(a, b, w / 8).flatten(1) for w in range(9)])  # (9, 3, 32)
    assert torch.allclose(points[[0, -1]], torch.stack([a, b]).flatten(2))
    assert torch.allclose(points.norm(dim=2), torch.full((9, 3), 7.0, dtype=F64))
    angles = torch.acos((points[:-1] * points[1:]).sum(dim=2) / 49)
    assert torch.allclose(angles, angles[0].expand(8, 3), atol=1e-9)
    assert torch.allclose(slerp(a, 3 * a, 0.5), 2 * a)  # parallel: straight
    assert slerp(a, -a, 0.5).isfinite().all()
