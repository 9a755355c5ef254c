"""The noise schedule: its tables, the forward process, and eps <-> z0 <-> v."""

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusion.closed_forms import F64
from helpers import randn
from torch import Tensor

from minildm.diffusion.schedule import OBJECTIVES, NoiseSchedule, ScheduleConfig

MAKERS = {kind: getattr(NoiseSchedule, kind) for kind in ("scaled_linear", "linear", "cosine")}
THEIRS = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear(dtype=F64)


def betas_of(schedule: NoiseSchedule) -> Tensor:
    table = schedule.alphas_cumprod
    return 1 - table / torch.cat([torch.ones(1, dtype=F64), table[:-1]])


# --- tables ---


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("T", [50, 1000])
def test_tables_equal_those_of_diffusers(kind: str, T: int) -> None:
    """Theirs are float32: the product of T factors of it is good to about T times 1e-7."""
    ends = {} if kind == "cosine" else {"beta_start": 0.001, "beta_end": 0.02}
    theirs = DDIMScheduler(T, 0.001, 0.02, beta_schedule=THEIRS[kind])
    ours = MAKERS[kind](T, **ends, dtype=F64)
    assert torch.allclose(betas_of(ours), theirs.betas.double(), rtol=1e-5, atol=1e-8)
    # Their last cosine factor, 1 - .999 in float32, has a relative error of 1e-5.
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-4)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("T", [1, 2, 1000])
def test_a_float32_table_is_the_float64_table_rounded_once(kind: str, T: int) -> None:
    exact = MAKERS[kind](T, dtype=F64).alphas_cumprod
    assert torch.equal(MAKERS[kind](T).alphas_cumprod, exact.float())


@pytest.mark.parametrize("kind", MAKERS)
def test_zero_terminal_snr_equals_that_of_diffusers(kind: str) -> None:
    before = MAKERS[kind](dtype=F64)
    zero = before.zero_terminal_snr()
    betas = rescale_zero_terminal_snr(betas_of(before))
    assert torch.allclose(zero.alphas_cumprod, (1 - betas).cumprod(0), rtol=1e-7, atol=1e-14)
    assert zero.alphas_cumprod[-1] == 0
    assert zero.alphas_cumprod[0].item() == pytest.approx(before.alphas_cumprod[0].item())
    assert before.alphas_cumprod[-1] > 0  # a copy: the old one stays


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_config_builds_its_schedule_even_on_the_meta_device(kind: str, zero_snr: bool) -> None:
    expected = MAKERS[kind](200) if kind == "cosine" else MAKERS[kind](200, 0.0015, 0.0195)
    expected = expected.zero_terminal_snr() if zero_snr else expected
    with torch.device("meta"):
        built = ScheduleConfig(T=200, kind=kind, zero_terminal_snr=zero_snr).build()
    assert torch.equal(built.alphas_cumprod, expected.alphas_cumprod)
    assert not built.state_dict()  # the table is rebuilt, not saved


# --- the forward process and its inverses ---


def test_q_sample_mixes_each_sample_at_its_own_time(schedule: NoiseSchedule) -> None:
    z0, eps = (randn(3, 2, 4, 5, seed=s, dtype=F64) for s in (0, 1))
    t = torch.tensor([999, 0, 500])
    z_t = schedule.q_sample(z0, t, eps)
    for i, abar in enumerate(schedule.alphas_cumprod[t].tolist()):
        expected = math.sqrt(abar) * z0[i] + math.sqrt(1 - abar) * eps[i]
        assert torch.allclose(z_t[i], expected, rtol=0, atol=1e-12)
    abar = schedule.alphas_cumprod[t]
    assert torch.allclose(schedule.snr(t), abar / (1 - abar))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_targets_convert_back_to_eps_and_z0(
    zero_snr: bool, objective: Any, schedule: NoiseSchedule
) -> None:
    schedule, t = schedule.zero_terminal_snr() if zero_snr else schedule, torch.arange(1000)
    t = t[:-1] if zero_snr and objective == "eps" else t  # at T eps says nothing of z0
    z0, eps = (randn(len(t), 1, 2, 3, seed=s, dtype=F64) for s in (0, 1))
    out = schedule.target(objective, z0, t, eps)
    back = schedule.prediction(objective, out, schedule.q_sample(z0, t, eps), t)
    assert (back.eps - eps).abs().max() < 1e-9
    assert (back.z0 - z0).abs().max() < 1e-9


# --- what is refused ---


@pytest.mark.parametrize(
    "betas", [[0.1, 0.0], [0.1, 1.0], [-0.1], [float("nan")], [], [[0.1, 0.1]]]
)
def test_betas_outside_0_1_are_refused(betas: list) -> None:
    with pytest.raises(ValueError, match="betas must"):
        NoiseSchedule(torch.tensor(betas))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"T": 0}, r"T=0 must lie in 1\.\.10000"),
        ({"T": 10**9}, r"T=1000000000 must lie in 1\.\.10000"),
        ({"T": 1, "zero_terminal_snr": True}, r"T=1 must lie in 2\.\.10000"),
        ({"beta_start": 0.0}, r"beta_start=0\.0, .* 0 < beta_start <= beta_end < 1"),
        ({"beta_end": 1.0}, r"beta_end=1\.0"),
        ({"beta_start": 0.5, "beta_end": 0.1}, r"beta_start=0\.5, beta_end=0\.1"),
        ({"beta_start": float("nan")}, "beta_start=nan"),
        ({"kind": "quadratic"}, "kind='quadratic' is not known; known: scaled_linear, linear"),
    ],
)
def test_impossible_schedules_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**wrong)
