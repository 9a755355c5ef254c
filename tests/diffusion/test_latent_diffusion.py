"""The whole model: its loss, its samples, what it refuses, and what it leaves untouched."""

from dataclasses import replace
from typing import Any

import pytest
import scipy.stats
import torch
from diffusion.closed_forms import F64, Replay
from helpers import CLASSES, randn, shaken, tiny_ldm_config
from torch import Tensor

from minildm.conditioning import (
    ClassConfig,
    ConditionerConfig,
    HybridConfig,
    InpaintConfig,
    SemanticConfig,
)
from minildm.diffusion.guidance import keep_known
from minildm.diffusion.latent_diffusion import LatentDiffusion, SamplingConfig, seeded_noise
from minildm.diffusion.objective import ObjectiveConfig, draw_t
from minildm.diffusion.samplers import SAMPLERS
from minildm.diffusion.schedule import OBJECTIVES, ScheduleConfig

NONE = ConditionerConfig()
SEMANTIC = SemanticConfig(labels=("a", "b"), stages=2)


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


def test_the_loss_draws_posterior_drop_t_and_eps_in_this_order(
    batch: dict,
) -> None:
    model = model_of(ClassConfig(classes=CLASSES, d_cond=8, p_uncond=0.5)).train()
    terms = model.loss(batch, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    z0 = model.autoencoder.encode(
        batch["image"], noise=lambda x: torch.randn(x.shape, generator=generator)
    )
    drop = torch.rand(4, generator=generator) < 0.5
    assert drop.any() and not drop.all()
    t = draw_t(torch.rand(4, generator=generator), 1000)
    eps = torch.randn(z0.shape, generator=generator)
    z_t, c = model.schedule.q_sample(z0, t, eps), model.conditioner(batch, drop=drop)
    expected = (eps - model.unet(z_t, t, c.tokens)).square().mean(dim=(1, 2, 3))
    assert torch.equal(terms["t"], t)
    assert torch.allclose(terms["per_sample"], expected)
    assert torch.allclose(terms["loss"], expected.mean())
    assert not terms["per_sample"].requires_grad


def test_two_ranks_see_their_rows_of_one_batch(model: LatentDiffusion, batch: dict) -> None:
    def per_sample(rows: slice, *part: int) -> Tensor:
        own = {key: value[rows].double() for key, value in batch.items()}
        own["label"] = own["label"].long()
        return model.loss(own, torch.Generator().manual_seed(5), *part)["per_sample"]

    model.double().train()
    parts = [per_sample(slice(2 * rank, 2 * rank + 2), rank, 2) for rank in (0, 1)]
    assert torch.allclose(torch.cat(parts), per_sample(slice(None)), rtol=1e-9)


def test_the_first_stage_is_frozen_and_the_rest_learns(model: LatentDiffusion, batch: dict) -> None:
    model.train().loss(batch)["loss"].backward()
    assert not model.autoencoder.training
    assert not any(p.requires_grad for p in model.autoencoder.parameters())
    assert all(
        p.grad is not None for p in (*model.unet.parameters(), *model.conditioner.parameters())
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("loss_weighting", ["simple", "min_snr", "vlb"])
def test_the_loss_weights_samples_by_their_times(
    loss_weighting: Any, objective: Any, batch: dict
) -> None:
    config = ObjectiveConfig(predict=objective, loss="l1", loss_weighting=loss_weighting)
    model = model_of(objective=config)
    terms = model.loss(batch)
    weights = model.time_weights[terms["t"]]
    assert torch.allclose(terms["loss"], (weights * terms["per_sample"]).mean())
    assert ("simple" in terms) == (loss_weighting != "simple")
    if "simple" in terms:
        assert torch.allclose(terms["simple"], terms["per_sample"].mean())


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
    whole = model.sample(y, **options)
    assert torch.equal(model.sample(y, **options), whole)
    for other in (
        model.sample(y, batch_size=2, **options),
        model.sample(y, batch_size=1, **options),
    ):
        assert (other - whole).abs().max() < 1e-3
    for i in range(5):
        assert (model.sample(y[i], first=i, **options)[0] - whole[i]).abs().max() < 1e-3
    assert torch.equal(torch.get_rng_state(), state)
    model.double()
    alone = model.sample(y[3], first=3, **options)[0]
    assert (alone - model.sample(y, **options)[3]).abs().max() < 1e-9
    assert not torch.allclose(model.sample(y, **{**options, "seed": 4}).float(), whole, atol=1e-2)


def test_dicts_and_unconditional_models_are_sampled_in_batches() -> None:
    y = {"image": randn(5, 3, 16, 16).clamp(-1, 1), "mask": (randn(5, 1, 16, 16) > 0).float()}
    hybrid = HybridConfig(tokens=ClassConfig(classes=CLASSES, d_cond=8), concat=InpaintConfig())
    words = ["red", "blue", "green", "red", "blue"]
    for conditioner, wish in ((InpaintConfig(), y), (hybrid, {**y, "y": words}), (NONE, None)):
        model, options = model_of(conditioner), {"n": 5, "steps": 2, "seed": 0}
        whole, parts = (model.sample(wish, batch_size=b, **options) for b in (64, 2))
        assert whole.shape == (5, 3, 16, 16)
        assert (parts - whole).abs().max() < 1e-3


def test_noise_edit_and_guide_see_one_batch(model: LatentDiffusion) -> None:
    noise, y = Replay(), ["red", "blue", "green"]
    edit = keep_known(model.schedule, randn(3, 2, 8, 8), torch.ones(3, 1, 8, 8))
    model.sample(y, steps=2, batch_size=1, eta=1.0, noise=noise)
    assert [len(drawn) for drawn in noise.past] == [3, 3, 3]
    assert model.sample(y, steps=2, batch_size=1, edit=edit).shape == (3, 3, 16, 16)


# --- sampling ---


@pytest.mark.parametrize(
    ("y", "options", "shape"),
    [
        ("red", {}, (1, 3, 16, 16)),
        (["red", "blue", "red"], {}, (3, 3, 16, 16)),
        ([0, "blue"], {"n": 2, "size": 8}, (2, 3, 8, 8)),
        (torch.tensor([2]), {"size": (8, 16)}, (1, 3, 8, 16)),
    ],
)
def test_samples_are_the_last_step_decoded(
    y: object, options: dict, shape: tuple, model: LatentDiffusion
) -> None:
    x, steps = (
        model.sample(y, steps=2, seed=0, **options),
        model.steps(y, steps=2, seed=0, **options),
    )
    *_, last = steps
    assert torch.equal(x, model.autoencoder.decode(last.z).clamp(-1, 1))
    assert x.shape == shape
    assert not x.requires_grad


def test_the_models_card_decides_what_is_not_given() -> None:
    card = SamplingConfig(sampler="heun", steps=3, guidance_scale=4.0)
    options = {"sampler": "heun", "steps": 3, "seed": 0}
    model = model_of(sampling=card)
    expected = model.sample("red", guidance_scale=4.0, **options)
    assert torch.equal(model.sample("red", seed=0), expected)
    assert not torch.allclose(model.sample("red", seed=0, guidance_scale=1.0), expected, atol=1e-4)
    without = ClassConfig(classes=CLASSES, d_cond=8, null_class=False, p_uncond=0.0)
    model = model_of(without, sampling=card)  # no null condition: not guided
    expected = model.sample("red", guidance_scale=1.0, **options)
    assert torch.equal(model.sample("red", seed=0), expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objective", ["z0", "v"])
def test_zero_terminal_snr_samples_with_trailing_spacing(sampler: str, objective: Any) -> None:
    schedule = ScheduleConfig(zero_terminal_snr=True)
    model = model_of(schedule=schedule, objective=ObjectiveConfig(predict=objective))
    first, *_, last = model.steps("red", sampler=sampler, steps=4, seed=0)
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


# --- what it leaves as it was, and what it refuses ---


@pytest.mark.parametrize("mode", [True, False])
def test_the_training_flag_comes_back(mode: bool, model: LatentDiffusion) -> None:
    def modes() -> list[bool]:
        return [part.training for part in (model, model.unet, model.conditioner, model.autoencoder)]

    model.train(mode).sample("red", steps=2, guidance_scale=2.0)
    assert modes() == [mode, mode, mode, False]
    steps = model.steps("red", steps=5)
    next(steps)
    assert modes() == [False] * 4
    steps.close()  # after a part of the steps
    assert modes() == [mode, mode, mode, False]
    with pytest.raises(ValueError, match=r"steps=1001 must lie in 1\.\.T=1000"):
        model.sample("red", steps=1001)
    assert modes() == [mode, mode, mode, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"y": "purple"}, "class='purple' is not known"),
        ({"y": ["red", "blue"], "n": 3}, "n=3 must be the number of samples that y describes, 2"),
        ({"y": []}, "n=None must be .* 0 >= 1"),
        ({"y": "red", "n": 0}, "n=0 must be at least 1"),
        ({"y": "red", "sampler": "karras"}, "sampler='karras' is not known; known: ddim, ddpm, pl"),
        ({"y": "red", "sampler": "heun", "eta": 0.5}, "eta=0.5 must be 0 for 'heun'"),
        ({"y": "red", "spacing": "even"}, "spacing='even' is not known; known: leading, trailing"),
        ({"y": "red", "steps": 0}, "steps=0 must lie in"),
        ({"y": "red", "guidance_scale": 2.0, "guidance_rescale": 1.5}, "rescale=1.5 must lie"),
        ({"y": "red", "size": 15}, "size=15 must be positive multiples of f=2"),
        ({"y": "red", "size": (16, 0)}, r"size=\(16, 0\)"),
        ({"y": "red", "eta": -1.0}, "eta=-1.0 must not be negative"),
        ({"y": "red", "seed": 1, "noise": torch.randn_like}, "seed or noise, not both"),
    ],
)
def test_impossible_samples_are_refused(
    options: dict, message: str, model: LatentDiffusion
) -> None:
    with pytest.raises(ValueError, match=message):
        model.sample(**{"steps": 2, **options})


def test_what_an_unconditional_or_spatial_model_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="unconditional"):
        model_of(NONE).sample("red")
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 must be 1"):
        model_of(NONE).sample(guidance_scale=2.0)
    y = {"image": torch.zeros(3, 8, 8), "mask": torch.ones(1, 8, 8)}
    with pytest.raises(ValueError, match=r"size=16 must be \(8, 8\), as the condition is"):
        model_of(InpaintConfig()).sample(y, size=16, steps=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioner": NONE}, r"d_cond=8 must be \(2, 2, None\)"),
        ({"conditioner": InpaintConfig()}, r"unet.in_channels=2, .* must be \(5, 2, None\)"),
        ({"conditioner": SEMANTIC}, "stages=2 must be log2 of f=2"),
        ({"image_size": 17}, "image_size=17 must be a multiple of f=2"),
        ({"image_size": 10**9}, "image_size=1000000000"),
        ({"t_bias": 0.0}, "t_bias=0.0 must be positive"),
        ({"schedule": ScheduleConfig(zero_terminal_snr=True)}, "predict='eps' must be 'v' or 'z0'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        if changes.get("conditioner") is SEMANTIC:
            tiny_ldm_config(SEMANTIC)
        replace(tiny_ldm_config(), **changes)
