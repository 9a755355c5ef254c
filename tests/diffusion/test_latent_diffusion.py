"""The whole model: its loss, its samples, and what it leaves untouched."""

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from diffusion.references import F64
from helpers import CLASSES, randn, shaken, tiny_ldm_config
from torch import Tensor

from minildm.conditioning import ClassConfig, ConditionerConfig, HybridConfig, InpaintConfig
from minildm.diffusion import latent_diffusion
from minildm.diffusion.guidance import keep_known
from minildm.diffusion.latent_diffusion import LatentDiffusion, SamplingConfig, seeded_noise
from minildm.diffusion.objective import ObjectiveConfig, draw_t
from minildm.diffusion.samplers import SAMPLERS
from minildm.diffusion.schedule import ScheduleConfig
from minildm.layers import BatchRandom


def model_of(conditioner: ConditionerConfig | None = None, **changes: Any) -> LatentDiffusion:
    """All weights random: an untrained UNet returns 0."""
    return shaken(LatentDiffusion(tiny_ldm_config(conditioner, **changes))).eval()


@pytest.fixture
def model() -> LatentDiffusion:
    return model_of()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return {"image": randn(4, 3, 16, 16).clamp(-1, 1), "label": torch.tensor([0, 1, 2, 0])}


# --- training ---


def test_the_loss_draws_posterior_drop_t_and_eps_in_this_order(batch: dict) -> None:
    model = model_of(ClassConfig(classes=CLASSES, d_cond=8, p_uncond=0.5)).train()
    terms = model.loss(batch, BatchRandom(torch.Generator().manual_seed(5)))
    generator = torch.Generator().manual_seed(5)

    def draw(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator)

    z0 = model.autoencoder.encode(batch["image"], noise=draw)
    drop = torch.rand(4, generator=generator) < 0.5
    assert drop.any() and not drop.all()
    t, eps = draw_t(torch.rand(4, generator=generator), 1000), draw(z0)
    z_t, c = model.schedule.q_sample(z0, t, eps), model.conditioner(batch, drop=drop)
    expected = (eps - model.unet(z_t, t, c.tokens)).square().mean(dim=(1, 2, 3))
    assert torch.equal(terms["t"], t)
    assert torch.allclose(terms["per_sample"], expected)
    assert torch.allclose(terms["loss"], expected.mean())
    assert not terms["per_sample"].requires_grad


def test_the_first_stage_is_frozen_and_the_rest_learns(model: LatentDiffusion, batch: dict) -> None:
    model.train().loss(batch)["loss"].backward()
    assert not model.autoencoder.training
    for name, parameter in model.named_parameters():
        frozen = name.startswith("autoencoder")
        assert (parameter.grad is None) == frozen == (not parameter.requires_grad)


def test_the_loss_weights_samples_by_their_times(batch: dict) -> None:
    model = model_of(objective=ObjectiveConfig(predict="v", loss_weighting="min_snr"))
    terms = model.loss(batch)
    weights = model.time_weights[terms["t"]]
    assert torch.allclose(terms["loss"], (weights * terms["per_sample"]).mean())
    assert torch.allclose(terms["simple"], terms["per_sample"].mean())


def test_images_in_0_1_are_warned_of(model: LatentDiffusion) -> None:
    x, tau = torch.rand(2, 3, 16, 16), InpaintConfig().build()
    for read in (model.autoencoder.encode, lambda x: tau.read({"image": x, "mask": x[:, :1] > 0})):
        with pytest.warns(UserWarning, match=r"images in \[0, 1\] where \[-1, 1\] is"):
            read(x)
        read(2 * x - 1), read(x / 2 + 0.5)


# --- image i of a seed depends on (seed, i) alone ---


def test_each_row_of_seeded_noise_has_its_own_generator() -> None:
    whole, part = seeded_noise(7), seeded_noise(7, first=2)
    for shape in ((4, 2, 3, 3), (4, 5)):  # every call goes on in each row
        x = whole(torch.zeros(shape))
        assert torch.equal(part(torch.zeros(1, *shape[1:]))[0], x[2])
        assert len(x.flatten(1).unique(dim=0)) == 4
    assert not torch.equal(seeded_noise(None)(x), seeded_noise(None)(x))
    values = seeded_noise(1)(torch.zeros(1000, 20, dtype=F64)).flatten()
    assert scipy.stats.kstest(values.numpy(), "norm").pvalue > 0.01


@pytest.mark.parametrize("options", [{"sampler": name} for name in SAMPLERS] + [{"eta": 1.0}])
def test_another_batch_or_the_image_alone_is_the_same_image(
    options: dict, model: LatentDiffusion
) -> None:
    y, state = ["red", "blue", "green", "red", "blue"], torch.get_rng_state()
    options |= {"steps": 4, "seed": 3, "guidance_scale": 2.0}
    model.double()
    whole = model.sample(y, **options)
    assert torch.equal(model.sample(y, **options), whole)
    assert (model.sample(y, batch_size=2, **options) - whole).abs().max() < 1e-9
    assert (model.sample(y[3], first=3, **options)[0] - whole[3]).abs().max() < 1e-9
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(model.sample(y, **{**options, "seed": 4}), whole, atol=1e-2)


def test_dicts_and_unconditional_models_are_sampled_in_batches() -> None:
    y = {"image": randn(5, 3, 8, 8).clamp(-1, 1), "mask": (randn(5, 1, 8, 8) > 0).float()}
    hybrid = HybridConfig(tokens=ClassConfig(classes=CLASSES, d_cond=8), concat=InpaintConfig())
    words = ["red", "blue", "green", "red", "blue"]
    for conditioner, wish, side in (
        (InpaintConfig(), y, 8),  # the condition decides the size
        (hybrid, {**y, "y": words}, 8),
        (ConditionerConfig(), None, 16),
    ):
        model, options = model_of(conditioner), {"n": 5, "steps": 2, "seed": 0}
        whole, parts = (model.sample(wish, batch_size=b, **options) for b in (64, 2))
        assert whole.shape == (5, 3, side, side)
        assert (parts - whole).abs().max() < 1e-3


def test_noise_edit_and_guide_see_one_batch(model: LatentDiffusion) -> None:
    drawn, y = [], ["red", "blue", "green"]
    edit = keep_known(model.schedule, randn(3, 2, 8, 8), torch.ones(3, 1, 8, 8))
    noise = {"noise": lambda z: drawn.append(len(z)) or torch.randn_like(z)}
    model.sample(y, steps=2, batch_size=1, eta=1.0, **noise)
    assert drawn == [3, 3, 3]
    assert model.sample(y, steps=2, batch_size=1, edit=edit).shape == (3, 3, 16, 16)


# --- sampling ---


@pytest.mark.parametrize(("size", "sides"), [(8, (8, 8)), ((8, 16), (8, 16))])
def test_samples_are_the_last_step_decoded(size: Any, sides: Any, model: LatentDiffusion) -> None:
    options = {"steps": 2, "seed": 0, "size": size}
    x = model.sample([0, "blue"], **options)
    *_, last = model.steps(torch.tensor([0, 2]), **options)
    assert torch.equal(x, model.autoencoder.decode(last.z).clamp(-1, 1))
    assert x.shape == (2, 3, *sides) and not x.requires_grad


def test_the_models_card_decides_what_is_not_given() -> None:
    card = {"sampler": "heun", "steps": 3, "guidance_scale": 4.0, "spacing": "linspace"}
    model = model_of(sampling=SamplingConfig(**card))
    expected = model_of().sample("red", seed=0, **card)
    assert torch.equal(model.sample("red", seed=0, sampler=None), expected)
    assert not torch.allclose(model.sample("red", seed=0, guidance_scale=1.0), expected, atol=1e-4)
    without = ClassConfig(classes=CLASSES, d_cond=8, null_class=False, p_uncond=0.0)
    model = model_of(without, sampling=SamplingConfig(**card))  # no null condition: not guided
    expected = model.sample("red", seed=0, guidance_scale=1.0)
    assert torch.equal(model.sample("red", seed=0), expected)
    model = model_of(sampling=SamplingConfig(eta=1.0))  # for its own sampler alone
    for options in ({"sampler": "euler"}, {"sampler": SAMPLERS["heun"]}, {"eta": 1.0}):
        expected = model_of().sample("red", seed=0, steps=3, **options)
        assert torch.equal(model.sample("red", seed=0, steps=3, **options), expected)


def test_a_function_is_a_sampler(model: LatentDiffusion) -> None:
    def own(denoise: Any, schedule: Any, z_T: Tensor, steps: int, **options: Any) -> Any:
        yield from SAMPLERS["heun"](denoise, schedule, z_T, steps)

    one, other = (model.sample("red", seed=0, steps=3, sampler=s) for s in (own, "heun"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("has", [True, False])
def test_bf16_is_for_the_network_alone(
    has: bool, model: LatentDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_diffusion, "has_bf16", lambda device: has)
    options = {"steps": 4, "seed": np.int64(0), "guidance_scale": 2.0}
    x, half = (model.sample(["red"], n=2, precision=p, **options) for p in ("fp32", "bf16"))
    assert torch.equal(x, half) == (not has)
    assert half.dtype == torch.float32 and torch.allclose(x, half, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.double])
def test_a_model_of_another_precision_samples(dtype: torch.dtype, model: LatentDiffusion) -> None:
    options = {"steps": 4, "seed": 0}
    x, other = model.sample("red", **options), model.to(dtype).sample("red", **options)
    assert other.dtype == dtype and torch.allclose(x, other.float(), atol=0.1)


def test_zero_terminal_snr_samples_with_trailing_spacing() -> None:
    schedule, objective = ScheduleConfig(zero_terminal_snr=True), ObjectiveConfig(predict="v")
    model = model_of(schedule=schedule, objective=objective)
    first, *_, last = model.steps("red", sampler="plms", steps=4, seed=0)
    assert first.t == 999
    assert last.z.isfinite().all()


def test_guidance_acts_on_what_the_network_predicts() -> None:
    model = model_of(objective=ObjectiveConfig(predict="v"))
    null, conditional, guided = (
        next(model.steps(["red", "blue"], steps=10, seed=0, guidance_scale=s)).z0_hat
        for s in (0.0, 1.0, 3.0)
    )
    assert torch.allclose(guided, null + 3 * (conditional - null), atol=1e-3)
    late = {"guidance_scale": 3.0, "guidance_interval": (0, 500), "guidance_rescale": 0.5}
    path = list(model.steps(["red", "blue"], steps=2, seed=0, **late))  # at 501 and at 1
    before = list(model.steps(["red", "blue"], steps=2, seed=0))
    assert torch.equal(path[0].z, before[0].z)
    assert not torch.allclose(path[1].z, before[1].z, atol=1e-4)


@pytest.mark.parametrize("mode", [True, False])
def test_the_training_flag_comes_back(mode: bool, model: LatentDiffusion) -> None:
    def modes() -> list[bool]:
        return [part.training for part in (model, model.unet, model.conditioner, model.autoencoder)]

    steps = model.train(mode).steps("red", steps=5)
    next(steps)
    assert modes() == [False] * 4
    steps.close()  # after a part of the steps
    assert modes() == [mode, mode, mode, False]
