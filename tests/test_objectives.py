"""Tables, objectives and weights against diffusers' and against the bound, computed directly."""

import math
import warnings
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from minildm import Conditioning, NoiseSchedule, ldm_loss
from minildm.diffusion import LatentDiffusionConfig, ScheduleConfig
from minildm.losses import ObjectiveConfig, time_weights
from minildm.schedule import OBJECTIVES

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from diffusers import DDIMScheduler
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
    from diffusers.training_utils import compute_snr

F64 = torch.float64
EACH_OBJECTIVE = pytest.mark.parametrize("objective", OBJECTIVES)
MAKERS = {
    "scaled_linear": NoiseSchedule.scaled_linear,
    "linear": NoiseSchedule.linear,
    "cosine": NoiseSchedule.cosine,
}
THEIRS = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}


def betas_of(schedule: NoiseSchedule) -> Tensor:
    table = schedule.alphas_cumprod
    return 1 - table / torch.cat([torch.ones(1, dtype=F64), table[:-1]])


# --- tables ---


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("T", [50, 1000])
def test_the_tables_are_theirs(kind: str, T: int) -> None:
    """Theirs are float32: the product of T factors of it is good to about T times 1e-7."""
    ends = {} if kind == "cosine" else {"b0": 0.001, "b1": 0.02}
    theirs = DDIMScheduler(T, 0.001, 0.02, beta_schedule=THEIRS[kind])
    ours = MAKERS[kind](T, **ends, dtype=F64)
    assert torch.allclose(betas_of(ours), theirs.betas.double(), rtol=1e-5, atol=1e-8)
    # Their last cosine factor, 1 - .999 in float32, is off by 1e-5 of itself.
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-4)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("T", [1, 2, 1000])
def test_a_float32_table_is_the_exact_one_rounded_once(kind: str, T: int) -> None:
    """As the official code's, whose products are float64: not of betas that are rounded."""
    assert torch.equal(
        MAKERS[kind](T).alphas_cumprod, MAKERS[kind](T, dtype=F64).alphas_cumprod.float()
    )


def test_the_angle_of_the_cosine_grows_evenly_until_the_last_steps() -> None:
    abar, first = NoiseSchedule.cosine(dtype=F64).alphas_cumprod, 0.008 / 1.008 * math.pi / 2
    strides = (abar.sqrt() * math.cos(first)).acos()[:-1].diff()
    assert torch.allclose(strides, strides.mean().expand(998), rtol=1e-6)
    assert betas_of(NoiseSchedule.cosine(dtype=F64)).max().item() == pytest.approx(0.999)
    assert betas_of(NoiseSchedule.cosine(max_beta=0.5, dtype=F64)).max() < 0.5 + 1e-12


@pytest.mark.parametrize("kind", MAKERS)
def test_zero_terminal_snr_is_theirs(kind: str) -> None:
    plain = MAKERS[kind](dtype=F64)
    zero = plain.zero_terminal_snr()
    betas = rescale_zero_terminal_snr(betas_of(plain))
    # Near its end the cosine has hardly any signal, and betas say it less well than abar.
    assert torch.allclose(zero.alphas_cumprod, (1 - betas).cumprod(0), rtol=1e-7, atol=1e-14)
    assert zero.alphas_cumprod[-1] == 0
    assert zero.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item())
    assert (zero.alphas_cumprod.diff() < 0).all()
    assert plain.alphas_cumprod[-1] > 0  # a copy: the old one stays
    assert zero.T == 1000


def test_the_whole_zero_snr_table_is_theirs() -> None:
    theirs = DDIMScheduler(1000, 0.0015, 0.0195, "scaled_linear", rescale_betas_zero_snr=True)
    ours = ScheduleConfig(zero_terminal_snr=True).build().alphas_cumprod
    assert torch.allclose(ours, theirs.alphas_cumprod, rtol=1e-4, atol=1e-8)
    assert ours.dtype == torch.float32
    assert ours[-1] == theirs.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_a_schedules_config_builds_its_kind(kind: str, zero_snr: bool) -> None:
    expected = MAKERS[kind](200) if kind == "cosine" else MAKERS[kind](200, 0.0015, 0.0195)
    expected = expected.zero_terminal_snr() if zero_snr else expected
    built = ScheduleConfig(T=200, kind=kind, zero_terminal_snr=zero_snr).build()
    assert torch.equal(built.alphas_cumprod, expected.alphas_cumprod)


def test_impossible_tables_are_refused() -> None:
    for options in ({"T": 0}, {"s": -0.1}, {"s": float("nan")}, {"max_beta": 1.0}):
        with pytest.raises(ValueError, match="need T >= 1, s >= 0 and max_beta in"):
            NoiseSchedule.cosine(**options)
    with pytest.raises(ValueError, match="zero terminal SNR needs T >= 2, got T=1"):
        NoiseSchedule.scaled_linear(1).zero_terminal_snr()


@pytest.mark.parametrize("wrong", [-1, 1000, 5000])
def test_times_off_the_table_are_refused(wrong: int, randn: Any) -> None:
    schedule, z = NoiseSchedule.scaled_linear(), randn(2, 1, 2, 2)
    t = torch.tensor([5, wrong])
    for ask in (
        lambda: schedule.scales(t),
        lambda: schedule.snr(t),
        lambda: schedule.q_sample(z, t, z),
        lambda: schedule.prediction("v", z, z, t),
    ):
        with pytest.raises(ValueError, match=r"t must lie in 0\.\.999, got"):
            ask()


# --- objectives ---


@EACH_OBJECTIVE
def test_what_is_learned_is_what_is_read_back(objective: Any, randn: Any) -> None:
    schedule, t = NoiseSchedule.scaled_linear(dtype=F64), torch.arange(1000)
    z0, eps = (randn(1000, 1, 2, 3, seed=s, dtype=F64) for s in (0, 1))
    said = schedule.target(objective, z0, t, eps)
    back = schedule.prediction(objective, said, schedule.q_sample(z0, t, eps), t)
    assert (back.eps - eps).abs().max() < 1e-10
    assert (back.z0 - z0).abs().max() < 1e-10


def test_v_and_z0_say_all_at_zero_terminal_snr(randn: Any) -> None:
    schedule, t = NoiseSchedule.scaled_linear(dtype=F64).zero_terminal_snr(), torch.tensor([999])
    z0, eps = (randn(1, 1, 2, 3, seed=s, dtype=F64) for s in (0, 1))
    assert torch.equal(schedule.q_sample(z0, t, eps), eps)
    assert torch.equal(schedule.target("v", z0, t, eps), -z0)
    for objective in ("v", "z0"):
        said = schedule.target(objective, z0, t, eps)
        back = schedule.prediction(objective, said, eps, t)
        assert torch.equal(back.z0, z0)
        assert torch.equal(back.eps, eps)


def test_an_unknown_objective_is_refused_wherever_it_is_named(randn: Any) -> None:
    schedule, t, z = NoiseSchedule.scaled_linear(), torch.tensor([5]), randn(1, 1, 2, 2)
    said = "objective='x0' is not known; known: eps, z0, v"
    with pytest.raises(ValueError, match=said):
        schedule.target("x0", z, t, z)
    with pytest.raises(ValueError, match=said):
        schedule.prediction("x0", z, z, t)


@EACH_OBJECTIVE
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_ldm_loss_measures_the_error_of_what_is_predicted(
    loss: Any, objective: Any, randn: Any
) -> None:
    schedule, t = NoiseSchedule.scaled_linear(dtype=F64), torch.tensor([0, 500, 999])
    z0, eps, wrong = (randn(3, 2, 4, 5, seed=s, dtype=F64) for s in (0, 1, 2))
    config = ObjectiveConfig(predict=objective, loss=loss, weighting="min_snr")  # not weighed here

    def network(z_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        abar = schedule.alphas_cumprod[t].view(3, 1, 1, 1)
        v = abar.sqrt() * eps - (1 - abar).sqrt() * z0
        return {"eps": eps, "z0": z0, "v": v}[objective] + wrong

    losses = ldm_loss(network, schedule, z0, Conditioning(), t, eps, config)
    expected = wrong.abs() if loss == "l1" else wrong.square()
    assert torch.allclose(losses, expected.mean(dim=(1, 2, 3)), rtol=1e-9)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"predict": "x0"}, "predict='x0' is not known; known: 'eps', 'z0', 'v'"),
        ({"loss": "huber"}, "loss='huber' is not known; known: 'l2', 'l1'"),
        ({"weighting": "p2"}, "weighting='p2' is not known; known: 'simple', 'min_snr', 'vlb'"),
        ({"gamma": 0.0}, "gamma=0.0 must be positive"),
        ({"gamma": float("nan")}, "gamma=nan must be positive"),
    ],
)
def test_impossible_objectives_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ObjectiveConfig(**wrong)


def test_eps_is_no_objective_at_zero_terminal_snr(ldm_config: LatentDiffusionConfig) -> None:
    schedule = ScheduleConfig(zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"needs objective\.predict 'v' or 'z0', got 'eps'"):
        replace(ldm_config, schedule=schedule)
    for objective in ("v", "z0"):
        replace(ldm_config, schedule=schedule, objective=ObjectiveConfig(predict=objective))


# --- weights ---


@EACH_OBJECTIVE
def test_simple_weighs_all_times_alike(objective: Any) -> None:
    weights = time_weights(NoiseSchedule.scaled_linear(), ObjectiveConfig(predict=objective))
    assert torch.equal(weights, torch.ones(1000))


@EACH_OBJECTIVE
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_their_formula(gamma: float, objective: Any) -> None:
    schedule = NoiseSchedule.scaled_linear(dtype=F64)
    table = SimpleNamespace(alphas_cumprod=schedule.alphas_cumprod.float())
    snr = compute_snr(table, torch.arange(1000)).double()
    cut = torch.minimum(snr, torch.full_like(snr, gamma))
    expected = {"eps": cut / snr, "v": cut / (snr + 1), "z0": cut}[objective]
    config = ObjectiveConfig(predict=objective, weighting="min_snr", gamma=gamma)
    assert torch.allclose(time_weights(schedule, config), expected, rtol=1e-3)


def kl_of_means(mean: Tensor, other: Tensor, variance: Tensor) -> Tensor:
    """KL between two Gaussians of one variance, summed over dimensions: (T,)."""
    one, two = (torch.distributions.Normal(m, variance.sqrt().view(-1, 1)) for m in (mean, other))
    return torch.distributions.kl_divergence(one, two).sum(dim=1)


@EACH_OBJECTIVE
def test_the_bounds_weights_are_those_of_the_kl(objective: Any, randn: Any) -> None:
    """q(z_{t-1} | z_t, z_0) against p with a network's z_0, DDPM Eqs. 5-7, for all t > 1."""
    schedule, t = NoiseSchedule.scaled_linear(dtype=F64), torch.arange(1, 1000)
    z0, eps, wrong = (randn(999, 6, seed=s, dtype=F64) for s in (0, 1, 2))
    abar, prev = (schedule.alphas_cumprod[i].view(-1, 1) for i in (t, t - 1))
    z_t, beta = abar.sqrt() * z0 + (1 - abar).sqrt() * eps, 1 - abar / prev
    said = {"eps": eps, "z0": z0, "v": abar.sqrt() * eps - (1 - abar).sqrt() * z0}
    out = said[objective] + 0.1 * wrong
    z0_hat = {
        "eps": (z_t - (1 - abar).sqrt() * out) / abar.sqrt(),
        "z0": out,
        "v": abar.sqrt() * z_t - (1 - abar).sqrt() * out,
    }[objective]

    def mean(z0: Tensor) -> Tensor:
        scale = prev.sqrt() * beta / (1 - abar)
        return scale * z0 + (1 - beta).sqrt() * (1 - prev) / (1 - abar) * z_t

    variance = (1 - prev) / (1 - abar) * beta
    bound = kl_of_means(mean(z0), mean(z0_hat), variance)
    weights = time_weights(schedule, ObjectiveConfig(predict=objective, weighting="vlb"))
    squared = (out - said[objective]).square().sum(dim=1)
    assert torch.allclose(weights[1:] * squared, bound, rtol=1e-6)
    assert weights[0] == weights[1]  # no KL there; as the official code has it


def test_the_bound_needs_two_times() -> None:
    with pytest.raises(ValueError, match="weighting='vlb' needs T >= 2, got T=1"):
        time_weights(NoiseSchedule.scaled_linear(1), ObjectiveConfig(weighting="vlb"))


@pytest.mark.parametrize("weighting", ["min_snr", "vlb"])
@pytest.mark.parametrize("objective", ["z0", "v"])
def test_weights_are_finite_at_zero_terminal_snr(objective: Any, weighting: Any) -> None:
    schedule = NoiseSchedule.scaled_linear().zero_terminal_snr()
    config = ObjectiveConfig(predict=objective, weighting=weighting)
    weights = time_weights(schedule, config)
    assert weights.isfinite().all()
    assert (weights >= 0).all()
    # z_T says nothing of z_0: min-SNR does not count it, the bound still does.
    assert (weights[-1] == 0) == (weighting == "min_snr")
