"""From z_T ~ N(0, I) to z_0. A sampler is a generator: the caller decides what to keep.

    *_, last = ddim(denoise, schedule, z_T, steps=50)

Each is the same loop (`_sampler`) around a rule that moves z along one step. `noise` is the only
randomness, so a recorded sequence can be replayed; `edit(z, t) -> z` changes z before each step, in
`ddpm` after it. All but `ddpm` follow one flow: while eps is constant, z moves exactly to
sqrt(abar') z0_hat + sqrt(1 - abar') eps_hat. They differ in what they take for constant on a step.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minildm.diffusion.schedule import NoiseSchedule, Prediction
from minildm.layers import Noise

Spacing = Literal["leading", "trailing", "linspace"]
Denoise = Callable[[Tensor, Tensor], Tensor | Prediction]  # (z_t, t) -> eps_hat, condition bound
EditFn = Callable[[Tensor, Tensor], Tensor]  # (z_t, t) -> z_t, between sampling steps
NO_SIGNAL = 1e-5  # abar below it, as where the cosine schedule ends: slopes in sigma mean nothing


class Step(NamedTuple):
    """One step of a sampler."""

    t: int  # where this step started
    z: Tensor  # (B, c, h, w) after the step
    z0_hat: Tensor  # (B, c, h, w) clean latent predicted at t


class Now(NamedTuple):
    """What a rule knows at the start of a step from noise level abar to abar_next."""

    t: int
    abar: Tensor  # (), on the CPU: comparing it on a GPU would wait for all work in flight
    t_next: int | None  # None: the last step
    abar_next: Tensor
    z: Tensor
    eps: Tensor
    z0: Tensor
    predict: Callable[[Tensor, int], Prediction]  # (z, t): one call of the network
    noise: Noise


Rule = Callable[..., Tensor]  # (now, past: the latest first, **options) -> z at abar_next


def timesteps(T: int, steps: int, spacing: Spacing = "leading") -> list[int]:
    """The `steps` indices that a sampler visits, descending.

    leading: floor(i T / S) + 1, the official code's wherever S divides T. trailing: from T - 1 in
    equal strides. linspace: from T - 1 to 0. Raises ValueError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps={steps} must lie in 1..T={T}")
    return {
        "leading": [min(i * T // steps + (steps < T), T - 1) for i in reversed(range(steps))],
        "trailing": [round((steps - i) * T / steps) - 1 for i in range(steps)],
        "linspace": [round((T - 1) * (1 - i / max(steps - 1, 1))) for i in range(steps)],
    }[spacing]


def _z0(abar: Tensor, z: Tensor, eps: Tensor) -> Tensor:
    """The z0 that makes z with this eps at the noise level abar; infinite where abar = 0."""
    return (z - (1 - abar).sqrt() * eps) / abar.sqrt()


def _move(now: Now | Prediction, abar_next: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
    """Follow the flow with constant eps and z0; noise that the caller adds replaces some eps."""
    noise_scale = (1 - abar_next - sigma**2).clamp(min=0).sqrt()
    return abar_next.sqrt() * now.z0 + noise_scale * now.eps


def _sampler(
    default_steps: int, default_spacing: Spacing, rule: Rule, *, ancestral: bool = False
) -> Callable[..., Iterator[Step]]:
    """The sampler of a rule; ancestral: it ends at the data, and edits come after the step."""

    @torch.no_grad()  # on a generator: off inside, untouched in the caller's loop
    def sampler(
        denoise: Denoise,
        schedule: NoiseSchedule,
        z_T: Tensor,
        steps: int = default_steps,
        *,
        spacing: Spacing = default_spacing,
        noise: Noise = torch.randn_like,
        edit: EditFn | None = None,
        **options: float,
    ) -> Iterator[Step]:
        def predict(z: Tensor, t: int) -> Prediction:
            out, abar = denoise(z, torch.full((len(z),), t, device=z.device)), table[t]
            return out if isinstance(out, Prediction) else Prediction(out, _z0(abar, z, out))

        z, past, table = z_T, [], schedule.alphas_cumprod.cpu()
        # The end is the data, abar = 1; with leading alphas_cumprod[0], as in the official code.
        end = table[0] if spacing == "leading" and not ancestral else table.new_ones(())
        levels = [*((t, table[t]) for t in timesteps(schedule.T, steps, spacing)), (None, end)]
        for (t, abar), (t_next, abar_next) in pairwise(levels):
            times = torch.full((len(z),), t, device=z.device)
            z = edit(z, times) if edit and not ancestral else z
            now = Now(t, abar, t_next, abar_next, z, *predict(z, t), predict, noise)
            z = rule(now, past, **options)
            z = edit(z, times) if edit and ancestral else z
            past = [now, *past][:3]
            yield Step(t, z, now.z0)

    sampler.__name__, sampler.__doc__ = rule.__name__, rule.__doc__
    return sampler


@partial(_sampler, 50, "leading")
def ddim(now: Now, past: list[Now], eta: float = 0.0) -> Tensor:
    """DDIM, Song et al. 2021, Eqs. 12 and 16 (their alpha is abar here): z_T -> z_0.

    eta = 0 is deterministic and draws no noise; eta = 1 with S = T has DDPM's variances.
    """
    abar, abar_next = now.abar, now.abar_next
    sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)).clamp(min=0).sqrt()
    z = _move(now, abar_next, sigma)
    return z + sigma * now.noise(z) if eta > 0 else z


@partial(_sampler, 1000, "trailing", ancestral=True)
def ddpm(now: Now, past: list[Now]) -> Tensor:
    """Ancestral sampling, DDPM (Ho et al. 2020) Eqs. 6-7, Algorithm 2: z_T -> z_0.

    The mean is the posterior's given z0_hat, the variance its beta-tilde. Fewer than T steps use
    the same formulas on the visited times. In the last step that variance is 0.
    """
    abar, abar_next = now.abar, now.abar_next
    alpha = abar / abar_next  # of this step; 1 - alpha is its beta
    mean = abar_next.sqrt() * (1 - alpha) * now.z0 + alpha.sqrt() * (1 - abar_next) * now.z
    std = ((1 - abar_next) / (1 - abar) * (1 - alpha)).sqrt()
    return mean / (1 - abar) + std * now.noise(now.z)


ADAMS_BASHFORTH = {  # by the number of past steps; the present one's weight comes first
    1: (3 / 2, -1 / 2),
    2: (23 / 12, -16 / 12, 5 / 12),
    3: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@partial(_sampler, 50, "leading")
def plms(now: Now, past: list[Now]) -> Tensor:
    """Pseudo linear multistep, PNDM (Liu et al. 2022) Eq. 12: eps extrapolated from past steps.

    As in the official code the first step averages eps at its two ends (S + 1 calls); then
    Adams-Bashforth of order 2, 3, 4. Where z_T has no signal the first step is DDIM's.
    """
    if past:
        weights, known = ADAMS_BASHFORTH[len(past)], [now.eps, *(seen.eps for seen in past)]
        eps_hat = sum(w * eps for w, eps in zip(weights, known, strict=True))
    elif now.abar < NO_SIGNAL:
        return _move(now, now.abar_next)
    else:
        following = now.t if now.t_next is None else now.t_next
        trial = now.predict(_move(now, now.abar_next), following)
        eps_hat = (now.eps + trial.eps) / 2
    return _move(Prediction(eps_hat, _z0(now.abar, now.z, eps_hat)), now.abar_next)


@partial(_sampler, 20, "trailing")
def dpm_solver_pp(now: Now, past: list[Now]) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, Algorithm 2: z0 extrapolated from two steps.

    Second order in lambda = log(sqrt(abar) / sqrt(1 - abar)), one call a step. The first step,
    and a last one that ends at the data (lambda infinite), are first order, as DDIM's.
    """
    abar, abar_next, z0_hat = now.abar, now.abar_next, now.z0
    if past and abar_next < 1:
        abars = torch.stack([past[0].abar, abar, abar_next])
        before, here, there = (abars.log() - (1 - abars).log()) / 2
        r = (here - before) / (there - here)
        z0_hat = now.z0 + (now.z0 - past[0].z0) / (2 * r)
    # Where z0 is constant on the way, z keeps its share of the noise exactly.
    kept = ((1 - abar_next) / (1 - abar)).sqrt()
    return kept * now.z + (abar_next.sqrt() - kept * abar.sqrt()) * z0_hat


def _straight(now: Now, slope: Tensor) -> Tensor:
    """A straight step in x = z / sqrt(abar) from sigma to sigma'; x is infinite at abar = 0."""
    if now.abar < NO_SIGNAL:
        return _move(now, now.abar_next)
    sigma, sigma_next = (((1 - a) / a).sqrt() for a in (now.abar, now.abar_next))
    return now.abar_next.sqrt() * (now.z / now.abar.sqrt() + (sigma_next - sigma) * slope)


@partial(_sampler, 50, "trailing")
def euler(now: Now, past: list[Now]) -> Tensor:
    """Euler's method for dx / dsigma = eps, x = z / sqrt(abar), Karras et al. 2022, Eq. 4.

    In exact arithmetic DDIM with eta = 0: a straight step in x has constant eps in z.
    """
    return _straight(now, now.eps)


@partial(_sampler, 25, "trailing")
def heun(now: Now, past: list[Now]) -> Tensor:
    """Heun's second-order method, Karras et al. 2022, Algorithm 1, on the times of `spacing`.

    Euler's step, then again with the mean slope of its two ends: two calls a step, one where it
    ends at the data or begins without signal.
    """
    trial = _straight(now, now.eps)
    if now.abar < NO_SIGNAL or now.abar_next == 1:
        return trial
    there = now.predict(trial, now.t_next or 0)  # leading ends at index 0
    return _straight(now, (now.eps + there.eps) / 2)


SAMPLERS = {one.__name__: one for one in (ddim, ddpm, plms, dpm_solver_pp, euler, heun)}
