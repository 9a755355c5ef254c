"""Steering by a picture, and by a mask: closed forms, and the official order of things."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minildm import ConditionerConfig, LatentDiffusion, LatentDiffusionConfig, NoiseSchedule
from minildm.diffusion import ScheduleConfig
from minildm.guidance import image_guided, keep_known
from minildm.losses import ObjectiveConfig
from minildm.samplers import SAMPLERS, ddim, ddpm, heun
from minildm.toy import gaussian_eps
from minildm.types import Prediction

F64 = torch.float64
MU, SPREAD = 1.0, 0.7


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear(dtype=F64)


def half_square(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda z0: 0.5 * (z0 - y).square().sum(dim=(1, 2, 3))


# --- a picture ---


@pytest.mark.parametrize("as_prediction", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_guiding_adds_the_gradient_of_the_distance(
    scale: float, as_prediction: bool, schedule: NoiseSchedule, randn: Any
) -> None:
    """For a Gaussian z0_hat is linear in z_t, and its slope is known: appendix C, Eq. 16."""
    z, y = randn(4, 2, 1, 3, dtype=F64), randn(4, 2, 1, 3, seed=1, dtype=F64)
    t = torch.tensor([3, 200, 600, 990])
    plain = gaussian_eps(schedule, MU, SPREAD)

    def both(z: Tensor, t: Tensor) -> Prediction:
        return schedule.prediction("eps", plain(z, t), z, t)

    denoise = both if as_prediction else plain
    said = image_guided(denoise, schedule, half_square(y), scale)(z, t)
    abar = schedule.alphas_cumprod[t].view(4, 1, 1, 1)
    slope = abar.sqrt() * SPREAD**2 / (abar * SPREAD**2 + 1 - abar)  # of z0_hat in z_t
    expected = plain(z, t) + scale * (1 - abar).sqrt() * slope * (both(z, t).z0 - y)
    assert torch.allclose(said.eps, expected, rtol=1e-9)
    assert torch.allclose(said.z0, schedule.z0_from_eps(z, t, expected), rtol=1e-9)
    assert not said.eps.requires_grad
    assert not said.z0.requires_grad


@pytest.mark.parametrize("name", SAMPLERS)
def test_guided_samples_come_nearer_to_the_picture(
    name: str, schedule: NoiseSchedule, randn: Any
) -> None:
    y, z_T = torch.full((64, 1, 2, 2), 3.0, dtype=F64), randn(64, 1, 2, 2, dtype=F64)
    plain, ends = gaussian_eps(schedule, MU, SPREAD), []
    for scale in (0.0, 1.0, 3.0):
        denoise = image_guided(plain, schedule, half_square(y), scale)
        draw = torch.Generator().manual_seed(0)

        def noise(like: Tensor, draw: torch.Generator = draw) -> Tensor:
            return torch.randn(like.shape, generator=draw, dtype=like.dtype)

        *_, last = SAMPLERS[name](denoise, schedule, z_T, 50, noise=noise)
        ends.append((last.z - y).square().mean().item())
        assert not last.z.requires_grad
    assert ends[0] > 1.5 * ends[1] > 1.5 * ends[2]


def test_a_linear_tilt_moves_the_mean_and_no_more(schedule: NoiseSchedule, randn: Any) -> None:
    """distance = -z0 / SPREAD^2 in each value: the tilted Gaussian is N(MU + 1, SPREAD^2).

    There the guided score is exact: z0_hat is linear, so the gradient does not depend on z_t,
    and the product of a Gaussian and an exponential keeps its spread.
    """
    z_T = randn(4000, 1, 1, 1, dtype=F64)
    denoise = image_guided(
        gaussian_eps(schedule, MU, SPREAD), schedule, lambda z0: -z0.sum(dim=(1, 2, 3)) / SPREAD**2
    )
    *_, last = heun(denoise, schedule, z_T, 200)
    assert (last.z.mean() - z_T.mean() * SPREAD).item() == pytest.approx(MU + 1, abs=0.03)
    assert (last.z.std() / z_T.std()).item() == pytest.approx(SPREAD, abs=0.02)


def test_the_callers_gradients_stay_as_they_are(schedule: NoiseSchedule, randn: Any) -> None:
    weight = torch.ones((), dtype=F64, requires_grad=True)
    z = randn(2, 1, 2, 2, dtype=F64)

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        assert torch.is_grad_enabled()
        return weight * torch.tanh(z)

    steered = image_guided(denoise, schedule, half_square(z))
    for step in ddim(steered, schedule, z, 3):
        assert torch.is_grad_enabled()
        assert not step.z.requires_grad
    assert weight.grad is None
    with torch.no_grad():
        steered(z, torch.tensor([5, 5]))
        assert not torch.is_grad_enabled()
    assert not z.requires_grad


def test_without_any_signal_there_is_nothing_to_guide(randn: Any) -> None:
    schedule = NoiseSchedule.scaled_linear(dtype=F64).zero_terminal_snr()
    z, t = randn(2, 1, 2, 2, dtype=F64), torch.tensor([999, 500])

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        return schedule.prediction("v", torch.tanh(z), z, t)

    plain, said = denoise(z, t), image_guided(denoise, schedule, half_square(z))(z, t)
    assert torch.equal(said.eps[0], plain.eps[0])
    assert torch.equal(said.z0[0], plain.z0[0])
    assert not torch.allclose(said.z0[1], plain.z0[1])
    *_, last = ddim(
        image_guided(denoise, schedule, half_square(z)), schedule, z, 5, spacing="trailing"
    )
    assert last.z.isfinite().all()


@pytest.mark.parametrize("far", [lambda z: z.square().sum(), lambda z: z.square()])
def test_a_distance_is_one_number_a_sample(
    far: Callable[[Tensor], Tensor], schedule: NoiseSchedule, randn: Any
) -> None:
    denoise = image_guided(gaussian_eps(schedule, MU, SPREAD), schedule, far)
    with pytest.raises(ValueError, match=r"one number a sample, \(2,\), got"):
        denoise(randn(2, 1, 2, 2, dtype=F64), torch.tensor([5, 5]))


@pytest.mark.parametrize("objective", ["eps", "v"])
def test_a_model_is_guided_by_a_small_picture(
    objective: Any, ldm_config: LatentDiffusionConfig, shaken: Any, randn: Any
) -> None:
    """Appendix C's own case: T halves the decoded picture, an unconditional model is steered."""
    config = replace(
        ldm_config,
        unet=replace(ldm_config.unet, d_cond=None),
        conditioner=ConditionerConfig(),
        objective=ObjectiveConfig(predict=objective),
        schedule=ScheduleConfig(zero_terminal_snr=objective == "v"),
    )
    model = shaken(LatentDiffusion(config)).eval()
    y = randn(2, 3, 8, 8).clamp(-1, 1)

    def distance(z0: Tensor) -> Tensor:
        small = F.interpolate(model.autoencoder.decode(z0), size=(8, 8), mode="bicubic")
        return 0.5 * (small - y).square().sum(dim=(1, 2, 3))

    def end(scale: float) -> Tensor:
        def guide(denoise: Any) -> Any:
            return image_guided(denoise, model.schedule, distance, scale)

        *_, last = model.steps(n=2, steps=20, seed=0, guide=guide, spacing="trailing")
        return distance(last.z)

    assert (end(0.05) < end(0.0)).all()
    assert all(p.grad is None for p in model.parameters())


# --- a mask ---


def half_mask() -> Tensor:
    mask = torch.zeros(1, 1, 2, 4, dtype=F64)
    mask[..., :2] = 1
    return mask


@pytest.mark.parametrize("sampler", [ddim, ddpm, heun])
def test_what_is_known_stays_and_the_rest_is_drawn(
    sampler: Any, schedule: NoiseSchedule, randn: Any
) -> None:
    known, z_T = randn(8, 2, 2, 4, dtype=F64), randn(8, 2, 2, 4, seed=1, dtype=F64)
    edit = keep_known(schedule, known, half_mask())
    denoise = gaussian_eps(schedule, MU, SPREAD)
    *_, last = sampler(denoise, schedule, z_T, 100, spacing="trailing", edit=edit)
    *_, free = sampler(denoise, schedule, z_T, 100, spacing="trailing")
    gap = (last.z - known).abs()
    assert gap[..., :2].mean() < 0.5 * gap[..., 2:].mean()
    if sampler is ddim:  # a denoiser without neighbours: the other half does not notice
        assert torch.allclose(last.z[..., 2:], free.z[..., 2:])


def test_the_blend_is_the_official_one(schedule: NoiseSchedule, randn: Any) -> None:
    known, z, eps = (randn(3, 2, 2, 4, seed=s, dtype=F64) for s in (0, 1, 2))
    t = torch.full((3,), 400)
    mask = half_mask()
    mask[..., 3] = 0.25  # a soft edge
    edited = keep_known(schedule, known, mask, noise=lambda like: eps)(z, t)
    abar = schedule.alphas_cumprod[400]
    noised = abar.sqrt() * known + (1 - abar).sqrt() * eps
    assert torch.allclose(edited[..., :2], noised[..., :2])
    assert torch.equal(edited[..., 2], z[..., 2])
    assert torch.allclose(edited[..., 3], 0.25 * noised[..., 3] + 0.75 * z[..., 3])


def test_one_known_latent_serves_a_batch_and_each_mask_its_sample(
    schedule: NoiseSchedule, randn: Any
) -> None:
    known, z, t = randn(1, 2, 2, 4, dtype=F64), randn(3, 2, 2, 4, dtype=F64), torch.full((3,), 9)
    one = keep_known(schedule, known, half_mask(), noise=torch.zeros_like)(z, t)
    assert torch.equal(one[..., 2:], z[..., 2:])
    assert torch.allclose(one[..., :2], (schedule.scales(t)[0] * known).expand(3, 2, 2, 4)[..., :2])
    masks = torch.stack([half_mask()[0], 1 - half_mask()[0], 0 * half_mask()[0]])
    own = keep_known(schedule, known.expand(3, 2, 2, 4), masks, noise=torch.zeros_like)(z, t)
    assert torch.equal(own[2], z[2])
    assert torch.equal(own[1, ..., :2], z[1, ..., :2])
    assert not torch.allclose(own[1, ..., 2:], z[1, ..., 2:])


@pytest.mark.parametrize(
    ("shape", "value", "said"),
    [
        ((2, 1, 4, 4), 1.0, r"mask must be \(B, 1, h, w\) as z_known \(2, 3, 2, 4\), got \(2, 1"),
        ((2, 2, 2, 4), 1.0, r"got \(2, 2, 2, 4\)"),
        ((3, 1, 2, 4), 1.0, r"got \(3, 1, 2, 4\)"),
        ((2, 4), 1.0, r"got \(2, 4\)"),
        ((2, 1, 2, 4), 1.5, r"mask must lie in \[0, 1\], got 1\.5\.\.1\.5"),
        ((2, 1, 2, 4), -1.0, "got -1..-1"),
        ((2, 1, 2, 4), float("nan"), "got nan"),
    ],
)
def test_an_impossible_mask_is_refused(
    shape: tuple, value: float, said: str, schedule: NoiseSchedule, randn: Any
) -> None:
    with pytest.raises(ValueError, match=said):
        keep_known(schedule, randn(2, 3, 2, 4), torch.full(shape, value))


@pytest.mark.parametrize("shape", [(3, 3, 2, 4), (2, 3, 4, 4), (2, 4, 2, 4)])
def test_a_known_latent_of_another_shape_is_refused(
    shape: tuple, schedule: NoiseSchedule, randn: Any
) -> None:
    known = randn(2, 3, 2, 4)
    edit = keep_known(schedule, known, torch.ones(1, 1, 2, 4))
    with pytest.raises(ValueError, match=r"z_known must be \(B, c, h, w\) as z"):
        edit(randn(*shape), torch.full((shape[0],), 5))
