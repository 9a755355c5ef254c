"""What is minimised: stage 1 (LDM Sec. 3.1, appendix G) and stage 2 (Sec. 3.2)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

from minildm import draws, processes
from minildm.autoencoder import Autoencoder, check_pictures
from minildm.discriminator import DiscriminatorConfig
from minildm.schedule import OBJECTIVES, NoiseSchedule, Objective
from minildm.types import Conditioning, EpsTheta

Perceptual = Callable[[Tensor, Tensor], Tensor]  # two (B, 3, H, W) -> (B,)


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """When and how the discriminator takes part.

    limit: the official code cuts the adaptive weight at 1e4, its VQ stages beside means over an
    image's values, as here, its KL stages beside sums: in our units theirs is 1e4 / (3 H W),
    .05 at 256 pixels, and binds nearly always.
    """

    weight: float = 0.5  # of the adversarial term, times the adaptive weight
    kind: Literal["hinge", "vanilla"] = "hinge"
    limit: float = 1e4  # of the adaptive weight
    start: int = 1  # the first step with a discriminator (counted from 1)
    ramp: int = 0  # steps from 0 to the full weight; not the paper's: spares reconstructions
    lr_factor: float = 1.0  # the discriminator's learning rate, as a part of the autoencoder's
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        if self.kind not in ("hinge", "vanilla"):
            raise ValueError(f"kind={self.kind!r} is not known; known: 'hinge', 'vanilla'")
        for name in ("weight", "limit", "start", "ramp"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not self.lr_factor > 0:
            raise ValueError(f"lr_factor={self.lr_factor} must be positive")

    def weight_at(self, step: int) -> float:
        """The term's weight at step 1, 2, ...: 0 before the start, then up the ramp."""
        if step < self.start:
            return 0.0
        return self.weight * min(1.0, (step - self.start + 1) / max(self.ramp, 1))


def autoencoder_loss(
    autoencoder: Autoencoder,
    x: Tensor,
    *,
    kl_weight: float,
    mse_weight: float = 0.0,
    codebook_weight: float = 1.0,
    perceptual: Perceptual | None = None,
    perceptual_weight: float = 1.0,
    discriminator: nn.Module | None = None,
    adversarial: AdversarialConfig | None = None,
    step: int = 1,
) -> dict[str, Tensor]:
    """L1 (+ weighted L2 + perceptual + adversarial) and the regulariser, each logged alone.

    (B, 3, H, W) in [-1, 1] -> scalars: `loss`, for the autoencoder; `rec_loss`, `mse`,
    `reg_loss` (KL, or codebook and commitment); `perceptual`; for VQ `code_usage` and
    `perplexity`; with a discriminator `adversarial_terms`, among them `disc_loss`, which is
    minimised by its own optimiser and reaches none of the autoencoder's weights.

    All terms are means over an image's values. The official KL stages sum both the
    reconstruction and the KL instead: their ratio is the same, so weights mean the same, but
    for the adaptive weight's bound: see `AdversarialConfig`. Without gradients the adversarial
    terms are left out of the loss. Raises ValueError for pictures that are not finite or leave
    [-1, 1], and for `adversarial` without a discriminator.
    """
    check_pictures(x, "image")
    if adversarial is not None and discriminator is None:
        raise ValueError(f"adversarial={adversarial} needs a discriminator, got None")
    x_rec, regular = reconstruct_and_regularise(autoencoder, x)
    rec_loss, mse = (x - x_rec).abs().mean(), ((x - x_rec) ** 2).mean()
    fidelity = rec_loss + mse_weight * mse
    terms = {"rec_loss": rec_loss, "mse": mse}
    if perceptual is not None:
        terms["perceptual"] = perceptual(x, x_rec).mean()
        fidelity = fidelity + perceptual_weight * terms["perceptual"]
    terms |= regular
    kl = autoencoder.config.regularizer == "kl"
    loss = fidelity + (kl_weight if kl else codebook_weight) * regular["reg_loss"]
    if discriminator is not None:
        last = autoencoder.decoder.conv_out.weight
        adversarial = adversarial or AdversarialConfig()
        game = adversarial_terms(discriminator, x, x_rec, fidelity, last, adversarial, step)
        loss = loss + game["adv_weight"] * game["adv_loss"]
        terms |= game
    return {"loss": loss, **terms}


def reconstruct_and_regularise(
    autoencoder: Autoencoder, x: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures (B, 3, H, W) -> D(E(x)) with a drawn or quantised latent, and `reg_loss`."""
    quantizer = getattr(autoencoder.decoder, "quantizer", None)
    if quantizer is None:
        posterior = autoencoder.posterior(x)
        reg_loss = posterior.kl().mean() / x[0].numel()
        return autoencoder.decoder(posterior.sample(draws.randn_like)), {"reg_loss": reg_loss}
    quantized = quantizer(autoencoder.moments(x))
    usage, perplexity = quantizer.usage()
    terms = {"reg_loss": quantized.loss, "code_usage": usage, "perplexity": perplexity}
    return autoencoder.decoder.render(quantized.z), terms


def adversarial_terms(
    discriminator: nn.Module,
    x: Tensor,
    x_rec: Tensor,
    fidelity: Tensor,
    last: Tensor,
    config: AdversarialConfig,
    step: int,
) -> dict[str, Tensor]:
    """The two sides of the game at one step, LDM appendix G, Eq. 25; all scalars.

    `adv_loss` = -mean D(x_rec), for the autoencoder, with its weight `adv_weight` (adaptive
    times the schedule's); `disc_loss`; mean logits `logits_real` and `logits_fake`. All are 0
    before the start. fidelity: the reconstruction terms; last: the decoder's last weight.

    The critic learns from the same reconstructions as the autoencoder; the official code makes
    them anew after the autoencoder's step, at the cost of another pass.
    """
    names = ("adv_loss", "adv_weight", "disc_loss", "logits_real", "logits_fake")
    weight = config.weight_at(step)
    if step < config.start:
        return dict.fromkeys(names, fidelity.new_zeros(()))
    discriminator.requires_grad_(False)  # the autoencoder's turn: no gradient for the critic
    try:
        adv_loss = -at_least_float32(discriminator(x_rec)).mean()
    finally:
        discriminator.requires_grad_(True)
    adv_weight = adv_loss.new_zeros(())
    if fidelity.requires_grad:
        adv_weight = weight * adaptive_weight(fidelity, adv_loss, last, config.limit)
    # The critic's turn: none for the autoencoder.
    real, fake = (at_least_float32(discriminator(y)) for y in (x, x_rec.detach()))
    disc_loss = discriminator_loss(real, fake, config.kind)
    means = real.mean().detach(), fake.mean().detach()
    return dict(zip(names, (adv_loss, adv_weight, disc_loss, *means), strict=True))


def adaptive_weight(fidelity: Tensor, adv_loss: Tensor, last: Tensor, limit: float = 1e4) -> Tensor:
    """|grad fidelity| / (|grad adv_loss| + 1e-4) at the decoder's last weight, in [0, limit].

    Esser et al. 2021 (taming transformers), Eq. 7: both terms then push equally hard. The
    norms are taken in float32, as squares of half-precision gradients underflow; no gradient
    flows through the weight.
    """
    norms = [
        processes.mean(
            at_least_float32(torch.autograd.grad(term, last, retain_graph=True)[0])
        ).norm()
        for term in (fidelity, adv_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, limit).detach()


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision -> float32; float32 and float64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "hinge") -> Tensor:
    """Logits on real and on reconstructed pictures -> what D minimises, a scalar.

    hinge: (mean relu(1 - real) + mean relu(1 + fake)) / 2; vanilla: the same with softplus(-real)
    and softplus(fake), the cross-entropy of Goodfellow et al. 2014.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    if kind != "vanilla":
        raise ValueError(f"kind={kind!r} is not known; known: 'hinge', 'vanilla'")
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the UNet predicts, how its error counts, and how much at which time."""

    predict: Objective = "eps"
    loss: Literal["l2", "l1"] = "l2"
    weighting: Literal["simple", "min_snr", "vlb"] = "simple"  # see time_weights
    gamma: float = 5.0  # of min_snr

    def __post_init__(self) -> None:
        for name, known in (
            ("predict", OBJECTIVES),
            ("loss", ("l2", "l1")),
            ("weighting", ("simple", "min_snr", "vlb")),
        ):
            if getattr(self, name) not in known:
                listed = ", ".join(map(repr, known))
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; known: {listed}")
        if not self.gamma > 0:
            raise ValueError(f"gamma={self.gamma} must be positive")


def ldm_loss(
    eps_theta: EpsTheta,
    schedule: NoiseSchedule,
    z0: Tensor,
    c: Conditioning,
    t: Tensor,
    eps: Tensor,
    objective: ObjectiveConfig | None = None,
) -> Tensor:
    """L_LDM, LDM Eq. 3: || eps - eps_theta(z_t, t, c) ||^2, mean over channels and pixels: (B,).

    With an objective the same for z0 or v, or |.| in place of the square; unweighted. Pure: the
    caller draws t and eps, then averages to train or scatters against t to diagnose.
    """
    objective = objective or ObjectiveConfig()
    target = schedule.target(objective.predict, z0, t, eps)
    out = eps_theta(schedule.q_sample(z0, t, eps), t, c)  # (B, c, h, w)
    error = target - at_least_float32(out)
    error = error.abs() if objective.loss == "l1" else error**2
    return reduce(error, "b c h w -> b", "mean")


def time_weights(schedule: NoiseSchedule, objective: ObjectiveConfig) -> Tensor:
    """The factor of each time's loss: (T,), in the schedule's dtype.

    simple: 1, DDPM Eq. 14. min_snr: a z0 error counts min(SNR, gamma) times, Hang et al. 2023,
    Eq. 4. vlb: (SNR(t - 1) - SNR(t)) / 2, so that the weighted squared error summed over times
    and dimensions is the variational bound's (DDPM Eq. 12, in nats; Kingma et al. 2021, Eq.
    13); its first entry, which would be infinite, repeats the second, as in the official code.
    An eps error is the z0 error times SNR, a v error the z0 error over 1 - abar. At zero
    terminal SNR min_snr gives the last time, where sampling begins, no weight at all.
    """
    abar = schedule.alphas_cumprod.double()
    snr = abar / (1 - abar)
    if objective.weighting == "simple":
        return torch.ones_like(schedule.alphas_cumprod)
    if objective.weighting == "min_snr":
        of_z0 = snr.clamp(max=objective.gamma)
    else:
        if schedule.T < 2:
            raise ValueError(f"weighting='vlb' needs T >= 2, got T={schedule.T}")
        of_z0 = torch.cat([snr[:1], (snr[:-1] - snr[1:]) / 2])
    factor = {"eps": 1 / snr, "z0": torch.ones_like(snr), "v": 1 - abar}[objective.predict]
    weights = of_z0 * factor
    if objective.weighting == "vlb":
        weights[0] = weights[1]
    return weights.to(schedule.alphas_cumprod.dtype)


def draw_t(schedule: NoiseSchedule, n: int, device: torch.device, t_bias: float = 1.0) -> Tensor:
    """Times for n samples, floor(T u^(1 / t_bias)) with u uniform: (n,) int64 in 0..T-1.

    t_bias = 1 is the paper's uniform draw. Above it the noisy end, where the layout of a picture
    is decided, comes up more often: density proportional to t^(t_bias - 1).
    """
    u = draws.rand(n, device=device)
    return (schedule.T * u ** (1.0 / t_bias)).long().clamp(max=schedule.T - 1)
