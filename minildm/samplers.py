"""From z_T ~ N(0, I) to z_0. A sampler is a generator: the caller decides what to keep.

    *_, last = ddim(denoise, schedule, z_T, steps=50)

`denoise(z, t)` returns eps_hat, or a Prediction; `noise` is a sampler's only randomness, so a
recorded sequence can be replayed; `edit(z, t) -> z` changes z between steps.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from minildm.schedule import NoiseSchedule
from minildm.types import Denoise, EditFn, Noise, Prediction, Step

Spacing = Literal["leading", "trailing", "linspace"]
SPACINGS = ("leading", "trailing", "linspace")


def timesteps(T: int, steps: int, spacing: Spacing = "leading") -> list[int]:
    """The `steps` indices that a sampler visits, descending; 1 <= steps <= T.

    leading: floor(i T / S) + 1, the official code's wherever S divides T (there S = T fails).
    trailing: from T - 1 in equal strides. linspace: from T - 1 to 0, both included.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps={steps} must lie in 1..T={T}")
    if spacing == "leading":
        times = [i * T // steps + (steps < T) for i in range(steps)][::-1]
        return [min(t, T - 1) for t in times]
    if spacing == "trailing":
        return [round((steps - i) * T / steps) - 1 for i in range(steps)]
    if spacing == "linspace":
        return [round((T - 1) * (1 - i / max(steps - 1, 1))) for i in range(steps)]
    raise ValueError(f"spacing={spacing!r} is not known; known: {', '.join(SPACINGS)}")


def _times(schedule: NoiseSchedule, steps: int, spacing: Spacing) -> list[int]:
    """`timesteps`; where z_T holds no signal at all, only those that surely begin at T - 1."""
    if schedule.alphas_cumprod[-1] == 0 and spacing != "trailing":
        raise ValueError(f"zero terminal SNR needs spacing='trailing', got {spacing!r}")
    return timesteps(schedule.T, steps, spacing)


def _abars(schedule: NoiseSchedule, times: list[int], spacing: Spacing) -> Tensor:
    """alphas_cumprod at the times, then at the last target: (steps + 1,).

    The official code ends at alphas_cumprod[0]; the other spacings end at the data, 1.
    """
    table = schedule.alphas_cumprod
    last = table[:1] if spacing == "leading" else table.new_ones(1)
    return torch.cat([table[times], last])


def predict(denoise: Denoise, z: Tensor, t: int, abar: Tensor) -> Prediction:
    """Ask the denoiser at one time for all samples; complete eps by the z0 that it implies.

    With abar = 0 eps says nothing of z0: a ValueError asks for a Prediction.
    """
    out = denoise(z, torch.full((len(z),), t, device=z.device))
    if isinstance(out, Prediction):
        return out
    if abar == 0:
        raise ValueError("at zero terminal SNR denoise must return a Prediction, got eps alone")
    return Prediction(out, (z - (1 - abar).sqrt() * out) / abar.sqrt())


@torch.no_grad()  # on a generator: off inside, untouched in the caller's loop
def ddim(
    denoise: Denoise,
    schedule: NoiseSchedule,
    z_T: Tensor,
    steps: int = 50,
    *,
    eta: float = 0.0,
    spacing: Spacing = "leading",
    noise: Noise = torch.randn_like,
    edit: EditFn | None = None,
) -> Iterator[Step]:
    """DDIM, Song et al. 2021, Eqs. 12 and 16 (their alpha is abar here): z_T -> z_0.

    eta = 0 is deterministic and draws no noise; eta = 1 with S = T has DDPM's variances.
    Raises ValueError for steps, eta or spacing out of range.
    """
    if eta < 0:
        raise ValueError(f"eta={eta} must not be negative")
    times, z = _times(schedule, steps, spacing), z_T
    abars = _abars(schedule, times, spacing)
    for t, abar, abar_prev in zip(times, abars[:-1], abars[1:], strict=True):
        if edit is not None:
            z = edit(z, torch.full((len(z),), t, device=z.device))
        eps_hat, z0_hat = predict(denoise, z, t, abar)
        sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).clamp(min=0).sqrt()
        z = abar_prev.sqrt() * z0_hat + (1 - abar_prev - sigma**2).clamp(min=0).sqrt() * eps_hat
        if eta > 0:
            z = z + sigma * noise(z)
        yield Step(t, z, z0_hat)


@torch.no_grad()
def ddpm(
    denoise: Denoise,
    schedule: NoiseSchedule,
    z_T: Tensor,
    steps: int | None = None,
    *,
    spacing: Spacing = "trailing",
    noise: Noise = torch.randn_like,
    edit: EditFn | None = None,
) -> Iterator[Step]:
    """Ancestral sampling, DDPM (Ho et al. 2020) Eqs. 6-7, Algorithm 2: z_T -> z_0.

    The mean is the posterior's given z0_hat, the variance its beta-tilde. Fewer than T steps
    (default: all T) use the same formulas on the visited times. No noise in the last step.
    """
    steps = schedule.T if steps is None else steps
    times, z = _times(schedule, steps, spacing), z_T
    table = schedule.alphas_cumprod
    abars = torch.cat([table[times], table.new_ones(1)])
    for t, abar, abar_prev in zip(times, abars[:-1], abars[1:], strict=True):
        _, z0_hat = predict(denoise, z, t, abar)
        alpha = abar / abar_prev  # of this step; 1 - alpha is its beta
        mean = abar_prev.sqrt() * (1 - alpha) * z0_hat + alpha.sqrt() * (1 - abar_prev) * z
        z = mean / (1 - abar)
        if abar_prev < 1:
            z = z + ((1 - abar_prev) / (1 - abar) * (1 - alpha)).sqrt() * noise(z)
        if edit is not None:
            z = edit(z, torch.full((len(z),), t, device=z.device))
        yield Step(t, z, z0_hat)


SAMPLERS = {"ddim": ddim, "ddpm": ddpm}
