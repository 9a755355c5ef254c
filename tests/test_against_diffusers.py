"""Element by element against diffusers, with random weights and replayed noise.

What differs there, and is set or handled here:
- The schedulers make their table in float32; ours is put in its place. `clip_sample` is on by
  default, which is wrong for latents.
- DDIM "leading" needs steps_offset=1 and set_alpha_to_one=False to be the official code's; each
  of its steps goes T // S back, so S must divide T.
- DDPM draws noise in the last step, too, where it weighs 1e-10 (a clamped variance).
"""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers_copy import (
    DTYPES,
    TOLERANCE,
    conditional,
    copy_unet,
    error,
    same_parameters,
    unconditional,
)
from torch import Tensor

from minildm import NoiseSchedule, UNet, UNetConfig, ddim, ddpm

with warnings.catch_warnings():
    # Deprecations inside diffusers and what it imports, none of which a test could mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    import diffusers
    from diffusers import DDIMScheduler, DDPMScheduler

UNET = UNetConfig(
    in_channels=3,
    out_channels=2,
    width=8,
    width_mult=(1, 2, 3),
    attn_levels=(1, 2),
    d_head=4,
    groups=4,
)


VARIANTS = {
    "convolutions resize": UNET,
    "residual blocks resize, the time scales": replace(
        UNET, attn_levels=(1,), resblock_updown=True, scale_shift=True
    ),
}


@DTYPES
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_unet_with_self_attention_is_theirs(
    variant: str, dtype: torch.dtype, shaken: Any, randn: Any
) -> None:
    config = VARIANTS[variant]
    ours, theirs = shaken(UNet(config)).to(dtype), unconditional(config).to(dtype)
    copy_unet(ours, theirs)
    assert same_parameters(ours, theirs)
    z, t = randn(3, 3, 8, 12, dtype=dtype), torch.tensor([0, 17, 999])
    assert error(ours.eval()(z, t), theirs.eval()(z, t).sample) < TOLERANCE[dtype]


@DTYPES
@torch.no_grad()
def test_the_unet_with_cross_attention_is_theirs(
    dtype: torch.dtype, shaken: Any, randn: Any
) -> None:
    config = replace(UNET, heads=2, d_head=None, d_cond=5, depth=2)
    ours, theirs = shaken(UNet(config)).to(dtype), conditional(config).to(dtype)
    copy_unet(ours, theirs)
    assert same_parameters(ours, theirs)
    z, t = randn(3, 3, 8, 12, dtype=dtype), torch.tensor([0, 17, 999])
    tokens = randn(3, 7, 5, seed=1, dtype=dtype)
    assert error(ours.eval()(z, t, tokens), theirs.eval()(z, t, tokens).sample) < TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize(("h", "w"), [(5, 7), (6, 9), (1, 3), (11, 4)])
@torch.no_grad()
def test_a_latent_whose_size_does_not_halve_is_treated_alike(
    h: int, w: int, dtype: torch.dtype, shaken: Any, randn: Any
) -> None:
    config = replace(UNET, heads=2, d_head=None, d_cond=5)
    ours, theirs = shaken(UNet(config)).to(dtype), conditional(config).to(dtype)
    copy_unet(ours, theirs)
    z, t = randn(2, 3, h, w, dtype=dtype), torch.tensor([3, 700])
    tokens = randn(2, 7, 5, seed=1, dtype=dtype)
    assert error(ours.eval()(z, t, tokens), theirs.eval()(z, t, tokens).sample) < TOLERANCE[dtype]


class Recorded:
    """Noise that is drawn once and then replayed from the start."""

    def __init__(self) -> None:
        self.draw, self.past = torch.Generator().manual_seed(1), []

    def __call__(self, like: Tensor) -> Tensor:
        self.past.append(torch.randn(like.shape, generator=self.draw, dtype=like.dtype))
        return self.past[-1]


def scheduler(kind: type, schedule: NoiseSchedule, **options: Any) -> Any:
    theirs = kind(
        num_train_timesteps=schedule.T,
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        **options,
    )
    table = schedule.alphas_cumprod
    assert error(theirs.alphas_cumprod.double(), table) < 1e-5  # the same, in float32
    theirs.alphas_cumprod = table
    if kind is DDIMScheduler and not options.get("set_alpha_to_one", True):
        theirs.final_alpha_cumprod = table[0]
    return theirs


def wavy(z: Tensor, t: Tensor) -> Tensor:
    """A denoiser that is neither linear nor the same at all times."""
    return torch.sin(3 * z) + 0.1 * torch.cos(t.to(z.dtype) / 100).view(-1, 1, 1, 1)


SPACINGS = {
    "leading": {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
    "trailing": {"timestep_spacing": "trailing", "set_alpha_to_one": True},
}


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 8, 50, 500])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_walks_their_path(spacing: str, steps: int, eta: float, randn: Any) -> None:
    schedule = NoiseSchedule.scaled_linear(dtype=torch.float64)
    theirs = scheduler(DDIMScheduler, schedule, **SPACINGS[spacing])
    theirs.set_timesteps(steps)
    z_T, noise = randn(2, 1, 2, 2, dtype=torch.float64), Recorded()
    path = list(ddim(wavy, schedule, z_T, steps, eta=eta, spacing=spacing, noise=noise))
    assert [step.t for step in path] == theirs.timesteps.tolist()
    z = z_T
    for i, step in enumerate(path):
        drawn = noise.past[i] if eta else None
        eps = wavy(z, theirs.timesteps[i].expand(len(z)))
        out = theirs.step(eps, int(theirs.timesteps[i]), z, eta=eta, variance_noise=drawn)
        z = out.prev_sample
        assert error(step.z, z) < 1e-8
        assert error(step.z0_hat, out.pred_original_sample) < 1e-8


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_ddpm_walks_their_path(steps: int, randn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = NoiseSchedule.scaled_linear(dtype=torch.float64)
    theirs = scheduler(DDPMScheduler, schedule, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    z_T, noise = randn(2, 1, 2, 2, dtype=torch.float64), Recorded()
    path = list(ddpm(wavy, schedule, z_T, steps, noise=noise))
    assert len(noise.past) == steps - 1
    assert [step.t for step in path] == theirs.timesteps.tolist()
    replayed = iter([*noise.past, torch.zeros_like(z_T)])
    module = diffusers.schedulers.scheduling_ddpm
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(replayed))
    z = z_T
    for step, t in zip(path, theirs.timesteps, strict=True):
        out = theirs.step(wavy(z, t.expand(len(z))), t, z)
        z = out.prev_sample
        assert error(step.z, z) < 1e-8
        assert error(step.z0_hat, out.pred_original_sample) < 1e-8


def test_noising_is_theirs(randn: Any) -> None:
    schedule = NoiseSchedule.scaled_linear(dtype=torch.float64)
    theirs = scheduler(DDPMScheduler, schedule)
    z0, eps = (randn(4, 2, 3, 3, seed=s, dtype=torch.float64) for s in (0, 1))
    t = torch.tensor([0, 1, 500, 999])
    z_t = schedule.q_sample(z0, t, eps)
    assert error(z_t, theirs.add_noise(z0, eps, t)) < 1e-12
    assert error(schedule.v_from(z0, t, eps), theirs.get_velocity(z0, eps, t)) < 1e-12
