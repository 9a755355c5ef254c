"""The forward process: how much signal and noise z_t holds, and eps <-> z0 <-> v."""

import copy
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from minildm.layers import check_fields, check_words

Objective = Literal["eps", "z0", "v"]  # what a network predicts


class Prediction(NamedTuple):
    """What a denoiser says of z_t, both ways; required where eps alone does not determine z0."""

    eps: Tensor  # (B, c, h, w)
    z0: Tensor  # (B, c, h, w)


class NoiseSchedule(nn.Module):
    """q(z_t | z_0) = N(sqrt(abar_t) z_0, (1 - abar_t) I), DDPM (Ho et al. 2020) Eq. 4.

    betas: (T,) in (0, 1). `alphas_cumprod` (T,) is abar, in their dtype; index 0 is the paper's
    t = 1.
    """

    alphas_cumprod: Tensor

    def __init__(self, betas: Tensor) -> None:
        super().__init__()
        self.T = len(betas)
        # A product of T factors near 1: in float32 its error would grow with T.
        abar = torch.cumprod(1 - betas.double(), 0).to(betas.dtype)
        self.register_buffer("alphas_cumprod", abar, persistent=False)

    @classmethod
    def scaled_linear(
        cls,
        T: int = 1000,
        beta_start: float = 0.0015,
        beta_end: float = 0.0195,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """sqrt(beta_t) linear in t: what the official code calls "linear", the LDM default."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64)
        return cls(roots**2).to(dtype)

    @classmethod
    def linear(cls, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Self:
        """beta_t linear in t: DDPM's; the official code calls it "sqrt_linear"."""
        return cls(torch.linspace(beta_start, beta_end, T, dtype=torch.float64)).float()

    @classmethod
    def cosine(cls, T: int = 1000) -> Self:
        """abar_t = cos^2 of an angle that grows evenly, Nichol & Dhariwal 2021, Eq. 17.

        Their s = 0.008 keeps the first steps from being too small; a beta is at most 0.999.
        """
        angles = (torch.linspace(0, 1, T + 1, dtype=torch.float64) + 0.008) / 1.008 * math.pi / 2
        abar = angles.cos() ** 2
        return cls((1 - abar[1:] / abar[:-1]).clamp(max=0.999)).float()

    @classmethod
    def flow(cls, T: int = 1000) -> Self:
        """z_t is (1 - tau) z_0 + tau eps, scaled to variance 1: rectified flow (Liu et al. 2023).

        tau_t = (t + 1) / (T + 1). To scale z changes neither the flow nor what a step of DDIM does;
        the velocity's error |eps - z_0 - u|^2 is v's times 1 / ((1 - tau)^2 + tau^2), 1 to 2.
        """
        tau = torch.arange(1, T + 1, dtype=torch.float64) / (T + 1)
        abar = (1 - tau) ** 2 / ((1 - tau) ** 2 + tau**2)
        return cls(1 - abar / torch.cat([tau.new_ones(1), abar[:-1]])).float()

    def zero_terminal_snr(self) -> Self:
        """The same schedule, stretched until z_T holds no signal; T >= 2.

        Lin et al. 2024, Algorithm 1: sqrt(abar) is shifted to end at 0 and scaled; the first step
        stays. At T eps says nothing of z0: predict z0 or v, sample with trailing spacing.
        """
        root = self.alphas_cumprod.double().sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        stretched = copy.deepcopy(self)
        stretched.alphas_cumprod = (root**2).to(self.alphas_cumprod)
        return stretched

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) -> signal_scale sqrt(abar_t) and noise_scale sqrt(1 - abar_t), each (B, 1, 1, 1)."""
        abar = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio abar_t / (1 - abar_t): (B,) -> (B,)."""
        abar = self.alphas_cumprod[t]
        return abar / (1 - abar)

    def q_sample(self, z0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Noise z0 to time t with the given eps: (B, c, h, w), (B,) -> (B, c, h, w)."""
        signal_scale, noise_scale = self.scales(t)
        return signal_scale * z0 + noise_scale * eps

    def target(self, objective: Objective, z0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What a network with this objective learns to return at q_sample(z0, t, eps).

        v = sqrt(abar) eps - sqrt(1 - abar) z0 (Salimans & Ho 2022, Sec. 4).
        """
        signal_scale, noise_scale = self.scales(t)
        return {"eps": eps, "z0": z0, "v": signal_scale * eps - noise_scale * z0}[objective]

    def prediction(self, objective: Objective, out: Tensor, z_t: Tensor, t: Tensor) -> Prediction:
        """The output of a network with this objective at z_t, as eps and z0."""
        signal_scale, noise_scale = self.scales(t)
        if objective == "v":  # (z_t, v) is (z0, eps) rotated by an angle
            return Prediction(
                noise_scale * z_t + signal_scale * out, signal_scale * z_t - noise_scale * out
            )
        if objective == "z0":
            return Prediction((z_t - signal_scale * out) / noise_scale, out)
        return Prediction(out, (z_t - noise_scale * out) / signal_scale)  # infinite at abar_t = 0


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """A noise schedule; "scaled_linear" with these ends is the paper's."""

    T: int = 1000
    beta_start: float = 0.0015  # both ends are ignored for "cosine", "flow"
    beta_end: float = 0.0195
    kind: Literal["scaled_linear", "linear", "cosine", "flow"] = "scaled_linear"
    zero_terminal_snr: bool = False  # see NoiseSchedule.zero_terminal_snr

    def __post_init__(self) -> None:
        check_words(self)
        check_fields(self, 2 if self.zero_terminal_snr else 1, 10_000, "T")
        check_fields(self, 1e-12, 0.999999, "beta_start")
        check_fields(self, self.beta_start, 0.999999, "beta_end")

    def build(self) -> NoiseSchedule:
        """The schedule, in float32; on the CPU even where a model is built on the meta device."""
        with torch.device("cpu"):
            ends = () if self.kind in ("cosine", "flow") else (self.beta_start, self.beta_end)
            schedule = getattr(NoiseSchedule, self.kind)(self.T, *ends)
            return schedule.zero_terminal_snr() if self.zero_terminal_snr else schedule
