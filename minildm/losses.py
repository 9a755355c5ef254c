"""What is minimised: stage 1 (LDM Sec. 3.1) and stage 2 (Sec. 3.2)."""

import torch
from einops import reduce
from torch import Tensor

from minildm.autoencoder import Autoencoder
from minildm.schedule import NoiseSchedule
from minildm.types import Conditioning, EpsTheta


def autoencoder_loss(
    autoencoder: Autoencoder, x: Tensor, *, kl_weight: float, mse_weight: float = 0.0
) -> dict[str, Tensor]:
    """L1 reconstruction (plus a weighted L2) and the KL penalty, each per image value.

    (B, 3, H, W) in [-1, 1] -> scalars `loss`, `rec_loss`, `mse`, `reg_loss`. The official
    weight of 1e-6 multiplies a KL sum beside a reconstruction sum; here both are divided by
    the number of values in an image, which leaves their ratio, so weights mean the same.
    """
    posterior = autoencoder.posterior(x)
    x_rec = autoencoder.decoder(posterior.sample())
    rec_loss, mse = (x - x_rec).abs().mean(), ((x - x_rec) ** 2).mean()
    reg_loss = posterior.kl().mean() / x[0].numel()
    loss = rec_loss + mse_weight * mse + kl_weight * reg_loss
    return {"loss": loss, "rec_loss": rec_loss, "mse": mse, "reg_loss": reg_loss}


def ldm_loss(
    eps_theta: EpsTheta,
    schedule: NoiseSchedule,
    z0: Tensor,
    c: Conditioning,
    t: Tensor,
    eps: Tensor,
) -> Tensor:
    """L_LDM, LDM Eq. 3: || eps - eps_theta(z_t, t, c) ||^2, mean over channels and pixels: (B,).

    Pure: the caller draws t and eps, then averages to train or scatters against t to diagnose.
    """
    eps_hat = eps_theta(schedule.q_sample(z0, t, eps), t, c)  # (B, c, h, w)
    return reduce((eps - eps_hat.float()) ** 2, "b c h w -> b", "mean")


def draw_t(schedule: NoiseSchedule, n: int, device: torch.device, t_bias: float = 1.0) -> Tensor:
    """Times for n samples, floor(T u^(1 / t_bias)) with u uniform: (n,) int64 in 0..T-1.

    t_bias = 1 is the paper's uniform draw. Above it the noisy end, where the layout of a picture
    is decided, comes up more often: density proportional to t^(t_bias - 1).
    """
    u = torch.rand(n, device=device)
    return (schedule.T * u ** (1.0 / t_bias)).long().clamp(max=schedule.T - 1)
