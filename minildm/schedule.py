"""The forward process: how much signal and noise z_t holds, and eps <-> z0 <-> v."""

import copy
import math
from typing import Literal

import torch
from torch import Tensor, nn

from minildm.types import Prediction

Objective = Literal["eps", "z0", "v"]  # what a network predicts
OBJECTIVES = ("eps", "z0", "v")


class NoiseSchedule(nn.Module):
    """q(z_t | z_0) = N(sqrt(abar_t) z_0, (1 - abar_t) I), DDPM (Ho et al. 2020) Eq. 4.

    `alphas_cumprod` (T,) is abar; index 0 is the paper's t = 1. Raises ValueError for betas
    outside (0, 1), where a step would keep no signal or add no noise. dtype: the table's, if
    not the betas'.
    """

    alphas_cumprod: Tensor

    def __init__(self, betas: Tensor, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if betas.ndim != 1 or len(betas) == 0:
            raise ValueError(f"betas must be a vector of T >= 1 values, got {tuple(betas.shape)}")
        if not ((betas > 0) & (betas < 1)).all():
            low, high = betas.min(), betas.max()
            raise ValueError(f"betas must lie in (0, 1), got {low:.3g}..{high:.3g}")
        self.T = len(betas)
        # A product of T factors near 1: in float32 its error would grow with T.
        abar = torch.cumprod(1 - betas.double(), 0).to(dtype or betas.dtype)
        self.register_buffer("alphas_cumprod", abar, persistent=False)

    @classmethod
    def scaled_linear(
        cls,
        T: int = 1000,
        b0: float = 0.0015,
        b1: float = 0.0195,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> "NoiseSchedule":
        """sqrt(beta_t) linear in t: what the official code calls "linear", the LDM default."""
        return cls(_between(T, b0, b1, power=2), dtype=dtype)

    @classmethod
    def linear(
        cls,
        T: int = 1000,
        b0: float = 1e-4,
        b1: float = 0.02,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> "NoiseSchedule":
        """beta_t linear in t: DDPM's; the official code calls it "sqrt_linear"."""
        return cls(_between(T, b0, b1, power=1), dtype=dtype)

    @classmethod
    def cosine(
        cls,
        T: int = 1000,
        s: float = 0.008,
        max_beta: float = 0.999,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> "NoiseSchedule":
        """abar_t = cos^2 of an angle that grows evenly, Nichol & Dhariwal 2021, Eq. 17.

        s keeps the first steps from being too small, max_beta the last from erasing everything.
        """
        if T < 1 or not s >= 0 or not 0 < max_beta < 1:
            raise ValueError(
                f"need T >= 1, s >= 0 and max_beta in (0, 1), got T={T}, s={s}, max_beta={max_beta}"
            )
        angles = (torch.linspace(0, 1, T + 1, dtype=torch.float64) + s) / (1 + s) * math.pi / 2
        abar = angles.cos() ** 2
        return cls((1 - abar[1:] / abar[:-1]).clamp(max=max_beta), dtype=dtype)

    def zero_terminal_snr(self) -> "NoiseSchedule":
        """The same schedule, stretched until z_T holds no signal at all; the first step stays.

        Lin et al. 2024, Algorithm 1: sqrt(abar) is shifted to end at 0 and scaled. At T eps then
        says nothing of z0: train on z0 or v, sample with trailing spacing. ValueError if T = 1.
        """
        if self.T < 2:
            raise ValueError(f"zero terminal SNR needs T >= 2, got T={self.T}")
        root = self.alphas_cumprod.double().sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        stretched = copy.deepcopy(self)
        stretched.alphas_cumprod = (root**2).to(self.alphas_cumprod)
        return stretched

    def _abar(self, t: Tensor) -> Tensor:
        # On a GPU the check would wait for all work in flight; an index beyond fails there anyway.
        if t.device.type == "cpu" and t.numel() and not 0 <= int(t.min()) <= int(t.max()) < self.T:
            raise ValueError(f"t must lie in 0..{self.T - 1}, got {t.min()}..{t.max()}")
        return self.alphas_cumprod[t]

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) -> signal_scale sqrt(abar_t) and noise_scale sqrt(1 - abar_t), each (B, 1, 1, 1).

        This and all below raise ValueError for t outside 0..T-1 (on a CPU, where asking is free).
        """
        abar = self._abar(t).view(-1, 1, 1, 1)
        return abar.sqrt(), (1 - abar).sqrt()

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio abar_t / (1 - abar_t): (B,) -> (B,)."""
        abar = self._abar(t)
        return abar / (1 - abar)

    def q_sample(self, z0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Noise z0 to time t with the given eps: (B, c, h, w), (B,) -> (B, c, h, w)."""
        signal_scale, noise_scale = self.scales(t)
        return signal_scale * z0 + noise_scale * eps

    def z0_from_eps(self, z_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The z0 for which `q_sample(z0, t, eps)` is z_t; infinite where abar_t = 0."""
        signal_scale, noise_scale = self.scales(t)
        return (z_t - noise_scale * eps) / signal_scale

    def eps_from_z0(self, z_t: Tensor, t: Tensor, z0: Tensor) -> Tensor:
        """The eps for which `q_sample(z0, t, eps)` is z_t."""
        signal_scale, noise_scale = self.scales(t)
        return (z_t - signal_scale * z0) / noise_scale

    def v_from(self, z0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """v = sqrt(abar) eps - sqrt(1 - abar) z0 (Salimans & Ho 2022, Sec. 4)."""
        signal_scale, noise_scale = self.scales(t)
        return signal_scale * eps - noise_scale * z0

    def from_v(self, z_t: Tensor, t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """v at z_t -> (eps, z0): (z_t, v) is (z0, eps) turned by an angle."""
        signal_scale, noise_scale = self.scales(t)
        return noise_scale * z_t + signal_scale * v, signal_scale * z_t - noise_scale * v

    def target(self, objective: Objective, z0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What a network with that objective learns to return at q_sample(z0, t, eps)."""
        check_objective(objective)
        if objective == "v":
            return self.v_from(z0, t, eps)
        return eps if objective == "eps" else z0

    def prediction(self, objective: Objective, out: Tensor, z_t: Tensor, t: Tensor) -> Prediction:
        """What such a network returned at z_t, as eps and z0."""
        check_objective(objective)
        if objective == "v":
            return Prediction(*self.from_v(z_t, t, out))
        if objective == "z0":
            return Prediction(self.eps_from_z0(z_t, t, out), out)
        return Prediction(out, self.z0_from_eps(z_t, t, out))


def check_objective(objective: str) -> None:
    """ValueError for one that is not known."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective!r} is not known; known: {', '.join(OBJECTIVES)}")


def _between(T: int, b0: float, b1: float, *, power: int) -> Tensor:
    """T betas from b0 to b1, whose roots of that power are evenly spaced; float64."""
    if T < 1 or not 0 < b0 <= b1 < 1:
        raise ValueError(f"need T >= 1 and 0 < b0 <= b1 < 1, got T={T}, b0={b0}, b1={b1}")
    return torch.linspace(b0 ** (1 / power), b1 ** (1 / power), T, dtype=torch.float64) ** power
