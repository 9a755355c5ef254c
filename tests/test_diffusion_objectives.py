"""The whole model with each objective: what it minimises, and that it samples alike."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minildm import (
    ConditionerConfig,
    Conditioning,
    LatentDiffusion,
    LatentDiffusionConfig,
    keep_known,
)
from minildm.diffusion import ScheduleConfig
from minildm.losses import ObjectiveConfig
from minildm.samplers import SAMPLERS
from minildm.schedule import OBJECTIVES
from minildm.toy import gaussian_eps

MU, SPREAD = 0.5, 0.7


@pytest.fixture
def plain_config(ldm_config: LatentDiffusionConfig) -> LatentDiffusionConfig:
    """Unconditional."""
    unet = replace(ldm_config.unet, d_cond=None)
    return replace(ldm_config, unet=unet, conditioner=ConditionerConfig())


def knowing(config: LatentDiffusionConfig, objective: Any, **schedule: Any) -> LatentDiffusion:
    """A model whose network is right about N(MU, SPREAD^2), whatever it has to say."""
    config = replace(
        config, objective=ObjectiveConfig(predict=objective), schedule=ScheduleConfig(**schedule)
    )
    model = LatentDiffusion(config).double().eval()
    table = model.schedule

    def network(z: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        eps = gaussian_eps(table, MU, SPREAD)(z, t)
        a, b = table.scales(t)
        z0 = (a * SPREAD**2 * z + b**2 * MU) / ((a * SPREAD) ** 2 + b**2)
        return {"eps": eps, "z0": z0, "v": a * eps - b * z0}[objective]

    model.network = network
    return model


# --- training ---


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("weighting", ["simple", "min_snr", "vlb"])
def test_the_loss_weighs_its_samples_by_their_times(
    weighting: Any, objective: Any, ldm_config: LatentDiffusionConfig, shaken: Any, randn: Any
) -> None:
    config = ObjectiveConfig(predict=objective, loss="l1", weighting=weighting)
    model = shaken(LatentDiffusion(replace(ldm_config, objective=config))).eval()
    batch = {"image": randn(4, 3, 16, 16).clamp(-1, 1), "label": torch.tensor([0, 1, 2, 0])}
    terms = model.loss(batch)
    weights = model.time_weights[terms["t"]]
    assert torch.allclose(terms["loss"], (weights * terms["per_sample"]).mean())
    if weighting == "simple":
        assert "simple" not in terms
        assert (weights == 1).all()
    else:
        assert torch.allclose(terms["simple"], terms["per_sample"].mean())
        assert not terms["simple"].requires_grad
    terms["loss"].backward()
    assert all(p.grad is not None for p in model.unet.parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_network_that_knows_all_but_the_noise_loses_what_is_unknown(
    objective: Any, plain_config: LatentDiffusionConfig, randn: Any
) -> None:
    """The least loss there is: the variance of the target given z_t, in closed form."""
    model = knowing(plain_config, objective)
    z = MU + SPREAD * randn(512, 2, 8, 8, dtype=torch.float64)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        terms = model.loss({"z": z})
    abar = model.schedule.alphas_cumprod[terms["t"]]
    of_z0 = SPREAD**2 * (1 - abar) / (abar * SPREAD**2 + 1 - abar)
    factor = {"eps": abar / (1 - abar), "z0": 1.0, "v": 1 / (1 - abar)}[objective]
    ratio = terms["per_sample"] / (factor * of_z0)
    assert (ratio - 1).abs().max() < 5.5 * (2 / 128) ** 0.5  # 128 squares of a normal number
    assert ratio.mean().item() == pytest.approx(1, abs=4 * (2 / 128 / 512) ** 0.5)


# --- sampling ---


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_knowledge_gives_the_same_pictures(
    sampler: str, plain_config: LatentDiffusionConfig
) -> None:
    ends = []
    for objective in OBJECTIVES:
        model = knowing(plain_config, objective)
        z_T = torch.zeros(3, 2, 8, 8, dtype=torch.float64)
        noise = torch.Generator().manual_seed(0)

        def draw(like: Tensor, noise: torch.Generator = noise) -> Tensor:
            return torch.randn(like.shape, generator=noise, dtype=torch.float64)

        *_, last = model.steps(n=3, sampler=sampler, steps=12, noise=draw)
        assert last.z.shape == z_T.shape
        ends.append(last.z)
    assert torch.allclose(ends[1], ends[0], atol=1e-4)  # the table is float32
    assert torch.allclose(ends[2], ends[0], atol=1e-4)


@pytest.mark.parametrize("objective", ["z0", "v"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_terminal_snr_samples_trailing_of_itself(
    sampler: str, objective: Any, plain_config: LatentDiffusionConfig
) -> None:
    """One step is then the mean of the data exactly: pure noise says nothing."""
    model = knowing(plain_config, objective, zero_terminal_snr=True)
    (first,) = model.steps(n=4, sampler=sampler, steps=1, seed=0)
    assert first.t == 999
    assert torch.allclose(first.z, torch.full_like(first.z, MU), atol=1e-6)
    *_, last = model.steps(n=64, sampler=sampler, steps=100, seed=0)
    assert last.z.mean().item() == pytest.approx(MU, abs=0.05)
    assert last.z.std().item() == pytest.approx(SPREAD, rel=0.1)
    with pytest.raises(ValueError, match="needs spacing='trailing', got 'linspace'"):
        model.sample(sampler=sampler, steps=5, spacing="linspace")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_predict_says_the_networks_answer_both_ways(
    objective: Any, ldm_config: LatentDiffusionConfig, shaken: Any, randn: Any
) -> None:
    config = replace(ldm_config, objective=ObjectiveConfig(predict=objective))
    model = shaken(LatentDiffusion(config)).eval()
    z, t = randn(2, 2, 8, 8), torch.tensor([100, 700])
    c = model.conditioner({"label": torch.tensor([0, 2])})
    said, (eps, z0) = model.network(z, t, c), model.predict(z, t, c)
    assert torch.equal(model.eps_theta(z, t, c), eps)
    assert torch.allclose(model.schedule.q_sample(z0, t, eps), z, atol=1e-4)
    if objective != "v":
        assert torch.equal(said, {"eps": eps, "z0": z0}[objective])
    assert torch.allclose(model.schedule.target(objective, z0, t, eps), said, atol=1e-4)


def test_guidance_acts_on_what_the_network_predicts(
    ldm_config: LatentDiffusionConfig, shaken: Any, randn: Any
) -> None:
    config = replace(ldm_config, objective=ObjectiveConfig(predict="v"))
    model = shaken(LatentDiffusion(config)).eval()
    first = next(model.steps(["red", "blue"], steps=10, seed=0, guidance_scale=3.0))
    (plain,) = (next(model.steps(["red", "blue"], steps=10, seed=0)),)
    null = next(model.steps(["red", "blue"], steps=10, seed=0, guidance_scale=0.0))
    assert torch.allclose(first.z0_hat, null.z0_hat + 3 * (plain.z0_hat - null.z0_hat), atol=1e-3)


def test_rescale_and_interval_reach_the_sampler(
    ldm_config: LatentDiffusionConfig, shaken: Any
) -> None:
    model = shaken(LatentDiffusion(ldm_config)).eval()

    def path(**options: Any) -> Tensor:
        return torch.stack([s.z for s in model.steps("red", steps=10, seed=0, **options)])

    plain, guided = path(), path(guidance_scale=4.0)
    assert not torch.allclose(path(guidance_scale=4.0, guidance_rescale=0.7), guided, atol=1e-3)
    late = path(guidance_scale=4.0, guidance_interval=(0, 500))  # the times 901, 801 .. 1
    assert torch.allclose(late[:5], plain[:5])
    assert not torch.allclose(late[5], plain[5], atol=1e-4)
    always = path(guidance_scale=4.0, guidance_interval=(0, 999))
    assert torch.equal(always, guided)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "plms"])
def test_an_edit_reaches_the_sampler(
    sampler: str, ldm_config: LatentDiffusionConfig, shaken: Any, randn: Any
) -> None:
    model = shaken(LatentDiffusion(ldm_config)).eval()
    known, mask = randn(1, 2, 8, 8), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    edit = keep_known(model.schedule, known, mask, noise=torch.zeros_like)
    seen: list[Tensor] = []

    def spied(z: Tensor, t: Tensor) -> Tensor:
        z = edit(z, t)
        abar = model.schedule.alphas_cumprod[t[0]]
        assert torch.allclose(z[..., :4], abar.sqrt() * known[..., :4])
        seen.append(z)
        return z

    assert model.sample("red", sampler=sampler, steps=4, seed=0, edit=spied).isfinite().all()
    assert len(seen) == 4


# --- what it refuses ---


@pytest.mark.parametrize("shape", [(2, 1, 4, 8), (3, 1, 8, 8), (2, 1, 8, 4)])
def test_a_picture_beside_z_of_another_shape_is_refused(
    shape: tuple, plain_config: LatentDiffusionConfig, randn: Any
) -> None:
    model = LatentDiffusion(plain_config)
    c = Conditioning(concat=randn(*shape))
    with pytest.raises(ValueError, match=r"beside z_t \(2, 2, 8, 8\) must have its B, h and w"):
        model.network(randn(2, 2, 8, 8), torch.tensor([1, 2]), c)


@pytest.mark.parametrize(
    ("tokens", "concat", "said"),
    [
        ((2, 1, 9), None, r"tokens must be \(2, M, 8\), got \(2, 1, 9\)"),
        ((3, 1, 8), None, r"tokens must be \(2, M, 8\), got \(3, 1, 8\)"),
        ((2, 8), None, r"tokens must be \(2, M, 8\), got \(2, 8\)"),
        (None, None, r"this UNet takes tokens \(B, M, 8\), got None"),
        ((2, 1, 8), (2, 1, 8, 8), r"z_t must be \(B, 2, h, w\), got \(2, 3, 8, 8\)"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(
    tokens: Any, concat: Any, said: str, ldm_config: LatentDiffusionConfig, randn: Any
) -> None:
    model = LatentDiffusion(ldm_config)
    given = (None if shape is None else randn(*shape) for shape in (tokens, concat))
    with pytest.raises(ValueError, match=said):
        model.predict(randn(2, 2, 8, 8), torch.tensor([1, 2]), Conditioning(*given))
