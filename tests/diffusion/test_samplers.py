"""Samplers: their times, the end at zero terminal SNR, calls of the denoiser, edits."""

from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from diffusion.references import COSINE, F64, SCHEDULE, ZERO_SNR
from helpers import randn
from torch import Tensor

from minildm.diffusion.samplers import SAMPLERS, Spacing, timesteps
from minildm.diffusion.schedule import Prediction
from minildm.teaching.toy import mixture_eps

EACH_SAMPLER = pytest.mark.parametrize("name", SAMPLERS)
MU, SPREAD = 2.0, 0.6
BEST = mixture_eps(SCHEDULE, torch.full((1, 1, 1, 1), MU), SPREAD)
Z_T = randn(3, 2, 1, 4, dtype=F64)


@pytest.mark.parametrize("T", [1, 7, 60])
@pytest.mark.parametrize("spacing", get_args(Spacing))
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


@pytest.mark.parametrize("name", ["ddim", "plms", "dpm_solver_pp", "euler", "heun"])
def test_the_flow_can_begin_with_hardly_any_signal(name: str) -> None:
    best = mixture_eps(COSINE, torch.full((1, 1, 1, 1), MU), SPREAD)
    *_, last = SAMPLERS[name](best, COSINE, Z_T, 25, spacing="trailing")
    assert (last.z - (MU + SPREAD * Z_T)).abs().max() < 0.3


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
