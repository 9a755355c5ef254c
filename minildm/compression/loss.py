"""The loss of stage 1, LDM Sec. 3.1 and appendix G: reconstruction, regulariser, adversary."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minildm.compression.autoencoder import Autoencoder
from minildm.compression.discriminator import DiscriminatorConfig
from minildm.layers import Noise, at_least_float32, check_fields


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """When and how the discriminator takes part.

    limit: the official bound is 1e4. Its VQ stages take means over an image's values, as here;
    its KL stages sum: in our units 1e4 / (3 H W), .05 at 256 pixels, nearly always reached.
    """

    weight: float = 0.5  # of the adversarial term, times the adaptive weight
    kind: Literal["hinge", "vanilla"] = "hinge"
    limit: float = 1e4  # of the adaptive weight
    start: int = 1  # the first step with a discriminator (counted from 1)
    ramp: int = 0  # steps from 0 to the full weight; not the paper's: protects reconstructions
    lr_factor: float = 1.0  # the discriminator's learning rate relative to the autoencoder's
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        if self.kind not in ("hinge", "vanilla"):
            raise ValueError(f"kind={self.kind!r} must be 'hinge' or 'vanilla'")
        check_fields(self, 0, math.inf, "weight", "limit", "start", "ramp", "lr_factor")

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
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    perceptual_weight: float = 1.0,
    discriminator: nn.Module | None = None,
    adversarial: AdversarialConfig | None = None,
    step: int = 1,
    noise: Noise = torch.randn_like,
) -> dict[str, Tensor]:
    """L1 (+ weighted L2 + perceptual + adversarial) and the regulariser, each reported alone.

    (B, 3, H, W) in [-1, 1] -> scalars: `loss`, for the autoencoder; `rec_loss`, `mse`,
    `reg_loss` (KL, or codebook and commitment); `perceptual`; for VQ `code_usage` and
    `perplexity`; with a discriminator the `adversarial_terms`, among them `disc_loss`, which its
    own optimiser minimises. All are means over an image's values. The official KL stages sum
    both reconstruction and KL: the ratio, and so the weights' meaning, is the same.
    """
    x_rec, regular = reconstruct_and_regularise(autoencoder, x, noise)
    rec_loss, mse = (x - x_rec).abs().mean(), ((x - x_rec) ** 2).mean()
    fidelity = rec_loss + mse_weight * mse
    terms = {"rec_loss": rec_loss, "mse": mse}
    if perceptual is not None:
        terms["perceptual"] = perceptual(x, x_rec).mean()
        fidelity = fidelity + perceptual_weight * terms["perceptual"]
    terms |= regular
    reg_weight = kl_weight if autoencoder.config.regularizer == "kl" else codebook_weight
    loss = fidelity + reg_weight * regular["reg_loss"]
    if discriminator is not None:
        last = autoencoder.decoder.conv_out.weight
        config = adversarial or AdversarialConfig()
        game = adversarial_terms(discriminator, x, x_rec, fidelity, last, config, step)
        loss = loss + game["adv_weight"] * game["adv_loss"]
        terms |= game
    return {"loss": loss, **terms}


def reconstruct_and_regularise(
    autoencoder: Autoencoder, x: Tensor, noise: Noise = torch.randn_like
) -> tuple[Tensor, dict[str, Tensor]]:
    """Images (B, 3, H, W) -> D(E(x)) with a sampled or quantised latent, and `reg_loss`."""
    quantizer = autoencoder.decoder.quantizer
    if quantizer is None:
        posterior = autoencoder.posterior(x)
        reg_loss = posterior.kl().mean() / x[0].numel()
        return autoencoder.decoder(posterior.sample(noise)), {"reg_loss": reg_loss}
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
    """The terms of both players at one step, LDM appendix G, Eq. 25; all scalars.

    `adv_loss` = -mean D(x_rec), for the autoencoder, with its weight `adv_weight` (0 without
    gradients); `disc_loss`; mean logits `logits_real` and `logits_fake`. All are 0 before the
    start. fidelity: the reconstruction terms; last: the decoder's last weight. The official code
    computes the reconstructions again for D, after the autoencoder's step.
    """
    names = ("adv_loss", "adv_weight", "disc_loss", "logits_real", "logits_fake")
    if step < config.start:
        return dict.fromkeys(names, fidelity.new_zeros(()))
    discriminator.requires_grad_(False)  # the autoencoder's turn: no gradient for D
    adv_loss = -at_least_float32(discriminator(x_rec)).mean()
    discriminator.requires_grad_(True)
    adv_weight = adv_loss.new_zeros(())
    if fidelity.requires_grad:
        adaptive = adaptive_weight(fidelity, adv_loss, last, config.limit)
        adv_weight = config.weight_at(step) * adaptive
    # The discriminator's turn: no gradient for the autoencoder.
    real, fake = (at_least_float32(discriminator(y)) for y in (x, x_rec.detach()))
    disc_loss = discriminator_loss(real, fake, config.kind)
    means = real.mean().detach(), fake.mean().detach()
    return dict(zip(names, (adv_loss, adv_weight, disc_loss, *means), strict=True))


def adaptive_weight(fidelity: Tensor, adv_loss: Tensor, last: Tensor, limit: float = 1e4) -> Tensor:
    """|grad fidelity| / (|grad adv_loss| + 1e-4) at the decoder's last weight, in [0, limit].

    Esser et al. 2021 (taming transformers), Eq. 7. The norms are taken in float32, as squares of
    half-precision gradients underflow; no gradient flows through the weight.
    """
    grads = (torch.autograd.grad(y, last, retain_graph=True)[0] for y in (fidelity, adv_loss))
    of_fidelity, of_adv = (at_least_float32(grad).norm() for grad in grads)
    return (of_fidelity / (of_adv + 1e-4)).clamp(0.0, limit).detach()


def discriminator_loss(real: Tensor, fake: Tensor, kind: str = "hinge") -> Tensor:
    """Logits on real and on reconstructed images -> what D minimises, a scalar.

    hinge: (mean relu(1 - real) + mean relu(1 + fake)) / 2; vanilla: the same with softplus(-real)
    and softplus(fake), the cross-entropy of Goodfellow et al. 2014.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
