"""The whole model: its loss, its samples, what it refuses, and what it leaves untouched."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minildm import ConditionerConfig, LatentDiffusion, LatentDiffusionConfig
from minildm.diffusion import ScheduleConfig, seeded_noise
from minildm.samplers import SAMPLERS


@pytest.fixture
def model(ldm_config: LatentDiffusionConfig, shaken: Any) -> LatentDiffusion:
    """All its weights at random: an untrained UNet answers 0 to whatever it is asked."""
    return shaken(LatentDiffusion(ldm_config)).eval()


@pytest.fixture
def plain(ldm_config: LatentDiffusionConfig, shaken: Any) -> LatentDiffusion:
    """Unconditional."""
    unet = replace(ldm_config.unet, d_cond=None)
    config = replace(ldm_config, unet=unet, conditioner=ConditionerConfig())
    return shaken(LatentDiffusion(config)).eval()


@pytest.fixture
def batch(randn: Any) -> dict[str, Tensor]:
    return {"image": randn(4, 3, 16, 16).clamp(-1, 1), "label": torch.tensor([0, 1, 2, 0])}


# --- training ---


def test_an_untrained_model_loses_the_mean_square_of_the_noise(
    ldm_config: LatentDiffusionConfig, batch: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, drawn, draw = LatentDiffusion(ldm_config), [], torch.randn_like

    def recorded(like: Tensor) -> Tensor:
        drawn.append(draw(like))
        return drawn[-1]

    z = model.autoencoder.encode(batch["image"], sample=False)
    monkeypatch.setattr(torch, "randn_like", recorded)
    terms = model.loss({"z": z, "label": batch["label"]})
    (eps,) = drawn
    assert torch.allclose(terms["per_sample"], eps.square().mean(dim=(1, 2, 3)))
    assert torch.allclose(terms["loss"], eps.square().mean())


def test_the_loss_is_the_mean_of_its_samples_at_their_times(
    model: LatentDiffusion, batch: dict
) -> None:
    terms = model.loss(batch)
    assert terms["loss"].ndim == 0
    assert terms["loss"].requires_grad
    assert terms["per_sample"].shape == terms["t"].shape == (4,)
    assert not terms["per_sample"].requires_grad
    assert torch.allclose(terms["per_sample"].mean(), terms["loss"])
    assert ((terms["t"] >= 0) & (terms["t"] < model.schedule.T)).all()


def test_the_first_stage_is_frozen_and_the_rest_learns(model: LatentDiffusion, batch: dict) -> None:
    model.train().loss(batch)["loss"].backward()
    assert not model.autoencoder.training
    assert not any(p.requires_grad for p in model.autoencoder.parameters())
    for part in (model.unet, model.conditioner):
        assert all(p.grad is not None for p in part.parameters())


def test_images_and_their_latents_cost_the_same(
    model: LatentDiffusion, batch: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.full_like(like, 0.5))
    monkeypatch.setattr("minildm.diffusion.draw_t", lambda *_: torch.tensor([0, 9, 500, 999]))
    with torch.no_grad():  # q(z | x) as narrow as it gets: a draw is the mean
        model.autoencoder.encoder.to_moments.weight[2:] = 0
        model.autoencoder.encoder.to_moments.bias[2:] = -30
    z = model.autoencoder.encode(batch["image"], sample=False)
    from_z = model.loss({"z": z, "label": batch["label"]})["per_sample"]
    assert torch.allclose(model.loss(batch)["per_sample"], from_z)


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
def test_sample_shapes(y: object, options: dict, shape: tuple, model: LatentDiffusion) -> None:
    x = model.sample(y, steps=2, seed=0, **options)
    assert x.shape == shape
    assert x.dtype == torch.float32
    assert x.min() >= -1
    assert x.max() <= 1
    assert not x.requires_grad


@pytest.mark.parametrize(("n", "count"), [(None, 1), (1, 1), (3, 3)])
def test_an_unconditional_model_makes_n(n: int | None, count: int, plain: LatentDiffusion) -> None:
    assert plain.sample(n=n, steps=2, seed=0).shape == (count, 3, 16, 16)


@pytest.mark.parametrize(
    "options", [{"sampler": "ddim", "eta": 1.0}, *({"sampler": name} for name in SAMPLERS)]
)
def test_the_same_seed_gives_the_same_pictures(options: dict, model: LatentDiffusion) -> None:
    def pictures(seed: int) -> Tensor:
        return model.sample(["red", "blue"], steps=3, seed=seed, **options)

    state = torch.get_rng_state()
    first = pictures(7)
    assert torch.equal(pictures(7), first)
    assert not torch.allclose(pictures(8), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_seed_pictures_differ_and_the_callers_state_stays(model: LatentDiffusion) -> None:
    state = torch.get_rng_state()
    first = model.sample("red", steps=2)
    assert not torch.equal(model.sample("red", steps=2), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_recorded_noise_gives_the_pictures_of_its_seed(model: LatentDiffusion) -> None:
    by_seed = model.sample("red", steps=3, eta=1.0, seed=3)
    assert torch.equal(model.sample("red", steps=3, eta=1.0, noise=seeded_noise(3)), by_seed)


def test_a_sample_is_its_last_step_decoded(model: LatentDiffusion) -> None:
    steps = list(model.steps(["red"], steps=4, seed=0))
    assert len(steps) == 4
    assert all(step.z.shape == (1, 2, 8, 8) for step in steps)
    x = model.autoencoder.decode(steps[-1].z).clamp(-1, 1)
    assert torch.equal(model.sample(["red"], steps=4, seed=0), x)


def test_a_model_without_a_null_samples_but_is_not_guided(
    ldm_config: LatentDiffusionConfig, shaken: Any
) -> None:
    classes = replace(ldm_config.conditioner, null_class=False, p_uncond=0.0)
    model = shaken(LatentDiffusion(replace(ldm_config, conditioner=classes))).eval()
    assert model.sample(["red", "blue"], steps=2, seed=0).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"null_class=False: .* guidance_scale must be 1"):
        model.sample(["red"], steps=2, guidance_scale=2.0)


def test_condition_and_guidance_change_the_picture(model: LatentDiffusion) -> None:
    def latent(y: str, guidance_scale: float = 1.0) -> Tensor:
        *_, last = model.steps(y, steps=3, seed=0, guidance_scale=guidance_scale)
        return last.z

    assert not torch.allclose(latent("red"), latent("blue"), atol=1e-4)
    assert not torch.allclose(latent("red"), latent("red", 4.0), atol=1e-4)
    assert torch.allclose(latent("red", 0.0), latent("blue", 0.0), atol=1e-5)


def test_sampling_never_drops_the_condition(ldm_config: LatentDiffusionConfig, shaken: Any) -> None:
    always = replace(ldm_config.conditioner, p_uncond=0.999)
    model = shaken(LatentDiffusion(replace(ldm_config, conditioner=always)))
    asleep = model.eval().sample(["red", "blue"], steps=2, seed=0)
    assert torch.equal(model.train().sample(["red", "blue"], steps=2, seed=0), asleep)


# --- what it leaves as it was ---


def modes(model: LatentDiffusion) -> list[bool]:
    return [part.training for part in (model, model.unet, model.conditioner, model.autoencoder)]


@pytest.mark.parametrize("mode", [True, False])
def test_the_training_flag_comes_back_after_a_sample(mode: bool, model: LatentDiffusion) -> None:
    model.train(mode)
    model.sample("red", steps=2, guidance_scale=2.0)
    assert modes(model) == [mode, mode, mode, False]


@pytest.mark.parametrize("mode", [True, False])
def test_the_training_flag_comes_back_after_a_part_of_the_steps(
    mode: bool, model: LatentDiffusion
) -> None:
    model.train(mode)
    steps = model.steps("red", steps=5)
    next(steps)
    assert modes(model) == [False] * 4
    steps.close()
    assert modes(model) == [mode, mode, mode, False]


@pytest.mark.parametrize("wrong", [{"y": [7]}, {"y": "red", "steps": 0}, {"y": "red", "eta": -1}])
def test_the_training_flag_comes_back_after_an_error(wrong: dict, model: LatentDiffusion) -> None:
    model.train()
    with pytest.raises(ValueError, match=r"label|steps|eta"):
        model.sample(**wrong)
    assert modes(model) == [True, True, True, False]


# --- what it refuses ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"y": None, "n": 2}, "y is None"),
        ({"y": "purple"}, "class='purple' is not known"),
        ({"y": ["red", "blue"], "n": 3}, "n=3, but y names 2"),
        ({"y": []}, "y names 0 samples"),
        ({"y": torch.tensor([5])}, "label must lie in 0..2"),
        ({"y": "red", "sampler": "karras"}, "sampler='karras' is not known; known: ddim, ddpm, pl"),
        ({"y": "red", "spacing": "even"}, "spacing='even' is not known; known: leading, trailing"),
        ({"y": "red", "steps": 0}, "steps=0 must lie in 1..T=1000"),
        ({"y": "red", "guidance_scale": 2.0, "guidance_rescale": 1.5}, "rescale=1.5 must lie"),
        ({"y": "red", "guidance_scale": 2.0, "guidance_interval": (9, 3)}, r"interval=\(9, 3\)"),
        ({"y": "red", "steps": 1001}, "steps=1001"),
        ({"y": "red", "size": 15}, "size=15 must be positive multiples of f=2"),
        ({"y": "red", "size": (16, 0)}, r"size=\(16, 0\)"),
        ({"y": "red", "seed": 1, "noise": torch.randn_like}, "seed or noise, not both"),
    ],
)
def test_impossible_wishes_are_refused(options: dict, said: str, model: LatentDiffusion) -> None:
    with pytest.raises(ValueError, match=said):
        model.sample(**{"steps": 2, **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"y": "red"}, "unconditional"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0: nothing to guide towards"),
        ({"n": 0}, "n=0"),
        ({"n": -1}, "n=-1"),
    ],
)
def test_impossible_wishes_of_an_unconditional_model_are_refused(
    options: dict, said: str, plain: LatentDiffusion
) -> None:
    with pytest.raises(ValueError, match=said):
        plain.sample(steps=2, **options)


def test_parts_that_do_not_fit_are_refused(ldm_config: LatentDiffusionConfig) -> None:
    unet, tau = ldm_config.unet, ldm_config.conditioner
    for changes, said in (
        ({"unet": replace(unet, in_channels=4)}, "z_channels=2 must be the UNet's in_channels=4"),
        ({"unet": replace(unet, out_channels=4)}, "out_channels=4"),
        ({"unet": replace(unet, d_cond=None)}, "unet.d_cond=None must be the conditioner's, 8"),
        ({"conditioner": replace(tau, d_cond=9)}, "unet.d_cond=8 must be the conditioner's, 9"),
        ({"conditioner": ConditionerConfig()}, "unet.d_cond=8 must be the conditioner's, None"),
        ({"image_size": 17}, "image_size=17 must be a positive multiple of f=2"),
        ({"image_size": 0}, "image_size=0"),
        ({"t_bias": 0.0}, "t_bias=0.0 must be positive"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(ldm_config, **changes)


def test_the_schedule_is_the_configs(ldm_config: LatentDiffusionConfig) -> None:
    model = LatentDiffusion(replace(ldm_config, schedule=ScheduleConfig(T=10, b0=0.1, b1=0.2)))
    assert model.schedule.T == 10
    assert model.schedule.alphas_cumprod[0].item() == pytest.approx(0.9)
    assert model.sample("red", steps=10, seed=0).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"T": 0}, "T=0 must be at least 1"),
        ({"T": 1, "zero_terminal_snr": True}, "T=1 must be at least 2"),
        ({"b0": 0.0}, r"need 0 < b0 <= b1 < 1, got b0=0\.0"),
        ({"b1": 1.0}, r"b1=1\.0"),
        ({"b0": 0.5, "b1": 0.1}, r"b0=0\.5, b1=0\.1"),
        ({"b0": float("nan")}, "b0=nan"),
        ({"kind": "quadratic"}, "kind='quadratic' is not known; known: 'scaled_linear', 'linear'"),
        ({"kind": "cosine", "b0": 1e-4}, r"kind='cosine' has no ends, got b0=0\.0001"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_when_it_is_configured(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ScheduleConfig(**wrong)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "ddim"])
def test_only_ddim_has_eta(sampler: str, model: LatentDiffusion) -> None:
    said = rf"eta=0\.5 belongs to the sampler 'ddim', not to '{sampler}'"
    with pytest.raises(ValueError, match=said):
        model.sample("red", sampler=sampler, steps=2, eta=0.5)
