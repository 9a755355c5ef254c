"""What stage 2 minimises, LDM Sec. 3.2: the error of eps (z0, v) at a random time t."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from einops import reduce
from torch import Tensor

from minildm.conditioning import Conditioning
from minildm.diffusion.schedule import NoiseSchedule, Objective
from minildm.layers import at_least_float32, check_fields, check_words

EpsTheta = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (z_t, t, c) -> eps_hat (z0, v)


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the UNet predicts, how its error is measured, and the weight of each time."""

    predict: Objective = "eps"
    loss: Literal["l2", "l1"] = "l2"
    loss_weighting: Literal["simple", "min_snr", "vlb"] = "simple"  # see time_weights
    snr_gamma: float = 5.0  # of min_snr

    def __post_init__(self) -> None:
        check_words(self)
        check_fields(self, 1e-12, 1e12, "snr_gamma")


def ldm_loss(
    eps_theta: EpsTheta,
    schedule: NoiseSchedule,
    z0: Tensor,
    c: Conditioning,
    t: Tensor,
    eps: Tensor,
    objective: ObjectiveConfig = ObjectiveConfig(),
) -> Tensor:
    """L_LDM, LDM Eq. 3: || eps - eps_theta(z_t, t, c) ||^2, mean over channels and pixels: (B,).

    With an objective the same for z0 or v, or |.| in place of the square; unweighted. Pure: the
    caller draws t and eps, then averages to train or scatters against t to diagnose.
    """
    z_t = schedule.q_sample(z0, t, eps)
    target = schedule.target(objective.predict, z0, t, eps)  # eps, unless z0 or v is predicted
    out = eps_theta(z_t, t, c)  # (B, c, h, w)
    error = target - at_least_float32(out)
    error = error.abs() if objective.loss == "l1" else error**2
    return reduce(error, "b c h w -> b", "mean")


def time_weights(schedule: NoiseSchedule, objective: ObjectiveConfig) -> Tensor:
    """The factor of each time's loss: (T,), in the schedule's dtype.

    simple: 1, DDPM Eq. 14. min_snr: a z0 error counts min(SNR, gamma) times, Hang et al. 2023,
    Eq. 4. vlb, T >= 2: (SNR(t - 1) - SNR(t)) / 2, so that the weighted squared error summed over
    times and dimensions is the variational bound's (DDPM Eq. 12, in nats; Kingma et al. 2021, Eq.
    13); the first entry repeats the second, as in the official code. An eps error is the z0 error
    times SNR, a v error the z0 error over 1 - abar.
    """
    abar = schedule.alphas_cumprod.double()
    snr = abar / (1 - abar)
    if objective.loss_weighting == "simple":
        return torch.ones_like(schedule.alphas_cumprod)
    if objective.loss_weighting == "min_snr":
        of_z0 = snr.clamp(max=objective.snr_gamma)
    else:
        of_z0 = torch.cat([snr[:1], (snr[:-1] - snr[1:]) / 2])
    factor = {"eps": 1 / snr, "z0": torch.ones_like(snr), "v": 1 - abar}[objective.predict]
    weights = of_z0 * factor
    if objective.loss_weighting == "vlb":
        weights[0] = weights[1]
    return weights.to(schedule.alphas_cumprod.dtype)


def draw_t(u: Tensor, T: int, t_bias: float = 1.0) -> Tensor:
    """Times floor(T u^(1 / t_bias)) from u uniform in [0, 1): (B,) -> (B,) int64 in 0..T-1.

    t_bias = 1 is the paper's uniform distribution. Above it the noisy end, where the layout of an
    image is decided, comes up more often: density proportional to t^(t_bias - 1).
    """
    return (T * u ** (1.0 / t_bias)).long().clamp(max=T - 1)
