"""From z_T ~ N(0, I) to z_0. A sampler is a generator: the caller decides what to keep.

    *_, last = ddim(denoise, schedule, z_T, steps=50)

`denoise(z, t)` returns eps_hat, or a Prediction; `noise` is a sampler's only randomness, so a
recorded sequence can be replayed (only `ddpm`, and `ddim` with eta > 0, draw from it);
`edit(z, t) -> z` changes z before each step, in `ddpm` after it.

All but `ddpm` follow the same flow: where eps stays constant on a step, z moves to
sqrt(abar') z0_hat + sqrt(1 - abar') eps_hat exactly. They differ in the eps or z0 that they take
for constant, and so in how fast the error falls with the number of steps.
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
    """alphas_cumprod at the times, then at the last target: (steps + 1,), on the CPU.

    The official code ends at alphas_cumprod[0]; the other spacings end at the data, 1. On the
    CPU, as a sampler looks at them: on a GPU each look would wait for all work in flight.
    """
    table = schedule.alphas_cumprod.cpu()
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


def _move(prediction: Prediction, abar_next: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
    """Along the flow to another noise level, where eps and z0 are constant on the way.

    sigma: the noise that the caller adds takes the place of as much of eps_hat.
    """
    noise_scale = (1 - abar_next - sigma**2).clamp(min=0).sqrt()
    return abar_next.sqrt() * prediction.z0 + noise_scale * prediction.eps


def _with_eps(z: Tensor, abar: Tensor, eps: Tensor) -> Prediction:
    """z seen with another eps."""
    return Prediction(eps, (z - (1 - abar).sqrt() * eps) / abar.sqrt())


def _edited(z: Tensor, t: int, edit: EditFn | None) -> Tensor:
    return z if edit is None else edit(z, torch.full((len(z),), t, device=z.device))


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
    if not eta >= 0:
        raise ValueError(f"eta={eta} must not be negative")
    times, z = _times(schedule, steps, spacing), z_T
    abars = _abars(schedule, times, spacing)
    for t, abar, abar_prev in zip(times, abars[:-1], abars[1:], strict=True):
        z = _edited(z, t, edit)
        prediction = predict(denoise, z, t, abar)
        sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).clamp(min=0).sqrt()
        z = _move(prediction, abar_prev, sigma)
        if eta > 0:
            z = z + sigma * noise(z)
        yield Step(t, z, prediction.z0)


@torch.no_grad()
def repaint(
    denoise: Denoise,
    schedule: NoiseSchedule,
    z_T: Tensor,
    steps: int = 50,
    *,
    edit: EditFn,
    again: int = 5,
    eta: float = 1.0,
    spacing: Spacing = "leading",
    noise: Noise = torch.randn_like,
) -> Iterator[Step]:
    """RePaint, Lugmayr et al. 2022, Alg. 1, with DDIM's steps: z_T -> z_0, edit = `keep_known`.

    Each step is taken `again` times; in between, the noise that it removed is put back, so that
    what the edit sets and what the network makes can come to fit. The network is asked
    again * steps times; again = 1 is `ddim`. Raises ValueError as that, and for again < 1.
    """
    if again < 1 or not eta >= 0:
        raise ValueError(f"need again >= 1 and eta >= 0, got again={again}, eta={eta}")
    times, z = _times(schedule, steps, spacing), z_T
    abars = _abars(schedule, times, spacing)
    for t, abar, abar_prev in zip(times, abars[:-1], abars[1:], strict=True):
        sigma = eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).clamp(min=0).sqrt()
        for left in reversed(range(again)):
            prediction = predict(denoise, _edited(z, t, edit), t, abar)
            z = _move(prediction, abar_prev, sigma)
            if eta > 0:
                z = z + sigma * noise(z)
            if left:  # q(z_t | z of the next time): it knows nothing of the data
                part = abar / abar_prev
                z = part.sqrt() * z + (1 - part).sqrt() * noise(z)
        yield Step(t, z, prediction.z0)


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
    abars = _abars(schedule, times, "trailing")  # to the data, whatever the spacing
    for t, abar, abar_prev in zip(times, abars[:-1], abars[1:], strict=True):
        _, z0_hat = predict(denoise, z, t, abar)
        alpha = abar / abar_prev  # of this step; 1 - alpha is its beta
        mean = abar_prev.sqrt() * (1 - alpha) * z0_hat + alpha.sqrt() * (1 - abar_prev) * z
        z = mean / (1 - abar)
        if abar_prev < 1:
            z = z + ((1 - abar_prev) / (1 - abar) * (1 - alpha)).sqrt() * noise(z)
        z = _edited(z, t, edit)
        yield Step(t, z, z0_hat)


ADAMS_BASHFORTH = {  # by the number of past steps; the present one's weight comes first
    1: (3 / 2, -1 / 2),
    2: (23 / 12, -16 / 12, 5 / 12),
    3: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


@torch.no_grad()
def plms(
    denoise: Denoise,
    schedule: NoiseSchedule,
    z_T: Tensor,
    steps: int = 50,
    *,
    spacing: Spacing = "leading",
    noise: Noise = torch.randn_like,
    edit: EditFn | None = None,
) -> Iterator[Step]:
    """Pseudo linear multistep, PNDM (Liu et al. 2022) Eq. 12: eps extrapolated from past steps.

    As in the official code the first step averages eps at its start and, after a trial step, at
    the next time (S + 1 calls); then Adams-Bashforth of order 2, 3, 4. At zero terminal SNR,
    where an average of eps fixes no z0, the first step is DDIM's. `noise` is not drawn from.
    """
    times, z = _times(schedule, steps, spacing), z_T
    abars = _abars(schedule, times, spacing)
    past: list[Tensor] = []  # eps_hat of the last three steps, the latest first
    for i, (t, abar, abar_prev) in enumerate(zip(times, abars[:-1], abars[1:], strict=True)):
        z = _edited(z, t, edit)
        now = prediction = predict(denoise, z, t, abar)
        if past:
            weights = ADAMS_BASHFORTH[len(past)]
            eps_hat = sum(w * e for w, e in zip(weights, [now.eps, *past], strict=True))
            prediction = _with_eps(z, abar, eps_hat)
        elif abar > 0:
            j = min(i + 1, steps - 1)
            trial = predict(denoise, _move(now, abar_prev), times[j], abars[j])
            prediction = _with_eps(z, abar, (now.eps + trial.eps) / 2)
        past = [now.eps, *past][:3]
        z = _move(prediction, abar_prev)
        yield Step(t, z, now.z0)


@torch.no_grad()
def dpm_solver_pp(
    denoise: Denoise,
    schedule: NoiseSchedule,
    z_T: Tensor,
    steps: int = 20,
    *,
    spacing: Spacing = "trailing",
    noise: Noise = torch.randn_like,
    edit: EditFn | None = None,
) -> Iterator[Step]:
    """DPM-Solver++(2M), Lu et al. 2022, Algorithm 2: z0 extrapolated from two steps.

    Second order in lambda = log(sqrt(abar) / sqrt(1 - abar)), one call a step. The first step,
    and a last one that ends at the data (lambda infinite), are first order, as DDIM's. `noise`
    is not drawn from.
    """
    times, z = _times(schedule, steps, spacing), z_T
    abars = _abars(schedule, times, spacing)
    lambdas = (abars.log() - (1 - abars).log()) / 2
    past: Tensor | None = None  # z0_hat of the step before
    for i, t in enumerate(times):
        z = _edited(z, t, edit)
        abar, abar_prev = abars[i], abars[i + 1]
        now = predict(denoise, z, t, abar)
        z0_hat = now.z0
        if past is not None and abar_prev < 1:
            r = (lambdas[i] - lambdas[i - 1]) / (lambdas[i + 1] - lambdas[i])
            z0_hat = now.z0 + (now.z0 - past) / (2 * r)
        past = now.z0
        # Where z0 is constant on the way, z keeps its share of the noise exactly.
        kept = ((1 - abar_prev) / (1 - abar)).sqrt()
        z = kept * z + (abar_prev.sqrt() - kept * abar.sqrt()) * z0_hat
        yield Step(t, z, now.z0)


@torch.no_grad()
def euler(
    denoise: Denoise,
    schedule: NoiseSchedule,
    z_T: Tensor,
    steps: int = 50,
    *,
    spacing: Spacing = "trailing",
    noise: Noise = torch.randn_like,
    edit: EditFn | None = None,
) -> Iterator[Step]:
    """Euler's method for dx / dsigma = eps, x = z / sqrt(abar), Karras et al. 2022, Eq. 4.

    sigma = sqrt(1 - abar) / sqrt(abar). In exact arithmetic DDIM with eta = 0: a straight step
    in x is a step of constant eps in z. `noise` is not drawn from.
    """
    times, z = _times(schedule, steps, spacing), z_T
    abars = _abars(schedule, times, spacing)
    for t, abar, abar_prev in zip(times, abars[:-1], abars[1:], strict=True):
        z = _edited(z, t, edit)
        now = predict(denoise, z, t, abar)
        z = _straight(z, now, now.eps, abar, abar_prev)
        yield Step(t, z, now.z0)


@torch.no_grad()
def heun(
    denoise: Denoise,
    schedule: NoiseSchedule,
    z_T: Tensor,
    steps: int = 25,
    *,
    spacing: Spacing = "trailing",
    noise: Noise = torch.randn_like,
    edit: EditFn | None = None,
) -> Iterator[Step]:
    """Heun's second-order method, Karras et al. 2022, Algorithm 1, on the times of `spacing`.

    Euler's step, then the same step again with the mean slope of its two ends: two calls a
    step, one where it ends at the data or begins without signal. `noise` is not drawn from.
    """
    times, z = _times(schedule, steps, spacing), z_T
    abars = _abars(schedule, times, spacing)
    # Where a step ends; leading ends at index 0, the others at the data, which has no time.
    ends = [*times[1:], 0]
    for t, end, abar, abar_prev in zip(times, ends, abars[:-1], abars[1:], strict=True):
        z = _edited(z, t, edit)
        now = predict(denoise, z, t, abar)
        trial = _straight(z, now, now.eps, abar, abar_prev)
        if abar > 0 and abar_prev < 1:
            there = predict(denoise, trial, end, abar_prev)
            z = _straight(z, now, (now.eps + there.eps) / 2, abar, abar_prev)
        else:
            z = trial
        yield Step(t, z, now.z0)


def _straight(z: Tensor, now: Prediction, slope: Tensor, abar: Tensor, abar_prev: Tensor) -> Tensor:
    """A straight step in x = z / sqrt(abar) from sigma to sigma'; x is infinite at abar = 0."""
    if abar == 0:
        return _move(now, abar_prev)
    sigma, sigma_prev = (((1 - a) / a).sqrt() for a in (abar, abar_prev))
    return abar_prev.sqrt() * (z / abar.sqrt() + (sigma_prev - sigma) * slope)


@torch.no_grad()
def ddim_inversion(
    denoise: Denoise,
    schedule: NoiseSchedule,
    z_0: Tensor,
    steps: int = 50,
    *,
    spacing: Spacing = "leading",
) -> Iterator[Step]:
    """DDIM backwards, Song et al. 2021, Sec. 4.3: z_0 -> the z_T from which `ddim` returns to it.

    The same noise levels in rising order; eps is asked for at the lower end of each step, so the
    way back is exact in the limit of many steps. A Step's t is where the step starts; the level
    under the first time is asked for at t = 0. Needs some signal at T: else a ValueError.
    """
    times, z = _times(schedule, steps, spacing), z_0
    abars = _abars(schedule, times, spacing).flip(0)  # rising noise
    if abars[-1] == 0:
        raise ValueError("at zero terminal SNR z_T does not hold z_0: there is no inversion")
    starts = [0, *times[:0:-1]]
    for t, abar, abar_next in zip(starts, abars[:-1], abars[1:], strict=True):
        now = predict(denoise, z, t, abar)
        z = _move(now, abar_next)
        yield Step(t, z, now.z0)


def slerp(a: Tensor, b: Tensor, w: float) -> Tensor:
    """From a (w = 0) to b (w = 1) along the sphere, Song et al. 2021, Eq. 67: (B, c, h, w) each.

    A straight mixture of two Gaussian draws is too short, and looks grey when sampled from.
    """
    dims = tuple(range(1, a.ndim))
    norms = [x.square().sum(dims, keepdim=True).sqrt() for x in (a, b)]
    cos = ((a / norms[0]) * (b / norms[1])).sum(dims, keepdim=True).clamp(-1, 1)
    angle = cos.acos()
    mixed = (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)
    return torch.where(angle.sin() > 1e-6, mixed, (1 - w) * a + w * b)


SAMPLERS = {
    "ddim": ddim,
    "ddpm": ddpm,
    "plms": plms,
    "dpm_solver_pp": dpm_solver_pp,
    "euler": euler,
    "heun": heun,
}
