"""The loss of stage 1, LDM Sec. 3.1, appendix G: reconstruction, regulariser, and a GAN's terms."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minildm.compression.autoencoder import Autoencoder
from minildm.compression.quantizer import code_usage
from minildm.layers import Noise, at_least_float32, check_fields


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig:
    """The discriminator, and when and how it takes part.

    limit: the official bound is 1e4. Its VQ stages take means over an image's values, as here;
    its KL stages sum: in our units 1e4 / (3 H W), .05 at 256 pixels, nearly always reached.
    """

    weight: float = 0.5  # of the adversarial term, times the adaptive weight
    limit: float = 1e4  # of the adaptive weight
    start: int = 1  # the first step with a discriminator (counted from 1)
    ramp: int = 0  # steps from 0 to the full weight; not the paper's: protects reconstructions
    lr_factor: float = 1.0  # the discriminator's learning rate relative to the autoencoder's
    disc_channels: int = 64  # of the discriminator's first layer
    disc_layers: int = 3  # of the discriminator; three see 70 pixels, two 34, one 16

    def __post_init__(self) -> None:
        check_fields(self, 0, math.inf, "weight", "limit", "start", "ramp", "lr_factor")
        check_fields(self, 1, 1024, "disc_channels")
        check_fields(self, 1, 10, "disc_layers")


class PatchDiscriminator(nn.Module):
    """Give each patch a logit, above 0 where it looks real.

    Isola et al. 2017 (pix2pix), with their batch norm and first weights, as in the official code.
    (B, 3, H, W) -> (B, 1, H / 2**layers - 2, W / 2**layers - 2)
    """

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        self.config, layers = config, config.disc_layers
        widths = [config.disc_channels * min(2**i, 8) for i in range(layers + 1)]
        net: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1)]
        for i, (c_in, c_out) in enumerate(pairwise(widths), 1):
            stride = 2 if i < layers else 1
            net += [nn.LeakyReLU(0.2), nn.Conv2d(c_in, c_out, 4, stride, 1, bias=False)]
            net += [nn.BatchNorm2d(c_out)]
        self.net = nn.Sequential(*net, nn.LeakyReLU(0.2), nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.net:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def autoencoder_loss(
    autoencoder: Autoencoder,
    x: Tensor,
    *,
    kl_weight: float,
    mse_weight: float = 0.0,
    codebook_weight: float = 1.0,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    perceptual_weight: float = 1.0,
    discriminator: PatchDiscriminator | None = None,
    step: int = 1,
    noise: Noise = torch.randn_like,
) -> dict[str, Tensor]:
    """L1 (+ weighted L2 + perceptual + adversarial) and the regulariser, each reported alone.

    (B, 3, H, W) in [-1, 1] -> scalars: `loss`, for the autoencoder; `rec_loss`, `mse`,
    `reg_loss` (KL, or codebook and commitment); `perceptual`; for VQ `code_usage` and
    `perplexity`; with a discriminator the `adversarial_terms`, among them `disc_loss`, which
    the discriminator minimises. All are means over an image's values. The official KL stages sum
    both reconstruction and KL: the ratio, and so the weights' meaning, is the same.
    """
    quantizer, decoder = autoencoder.decoder.quantizer, autoencoder.decoder
    if quantizer is None:
        posterior = autoencoder.posterior(x)
        x_rec = decoder(posterior.sample(noise))
        reg_weight, regular = kl_weight, {"reg_loss": posterior.kl().mean() / x[0].numel()}
    else:
        z, codebook_loss, _ = quantizer(autoencoder.moments(x))
        x_rec, (usage, perplexity) = decoder.render(z), code_usage(quantizer.counts)
        reg_weight, regular = codebook_weight, {"reg_loss": codebook_loss}
        regular |= {"code_usage": usage, "perplexity": perplexity}
    rec_loss, mse = (x - x_rec).abs().mean(), ((x - x_rec) ** 2).mean()
    fidelity, terms = rec_loss + mse_weight * mse, {"rec_loss": rec_loss, "mse": mse}
    if perceptual is not None:
        terms["perceptual"] = perceptual(x, x_rec).mean()
        fidelity = fidelity + perceptual_weight * terms["perceptual"]
    loss, terms = fidelity + reg_weight * regular["reg_loss"], terms | regular
    if discriminator is not None:
        terms |= adversarial_terms(discriminator, x, x_rec, fidelity, decoder.conv_out.weight, step)
        loss = loss + terms["adv_weight"] * terms["adv_loss"]
    return {"loss": loss, **terms}


def adversarial_terms(
    critic: PatchDiscriminator, x: Tensor, x_rec: Tensor, fidelity: Tensor, last: Tensor, step: int
) -> dict[str, Tensor]:
    """The terms of both players at one step, LDM appendix G, Eq. 25; all scalars.

    `adv_loss` = -mean D(x_rec), for the autoencoder, with its weight `adv_weight`; `disc_loss`;
    mean logits `logits_real` and `logits_fake`. All are 0 before the start. fidelity: the
    reconstruction terms; last: the decoder's last weight. The official code computes the
    reconstructions again for D, after the autoencoder's step.
    """
    config = critic.config
    if step < config.start:
        names = ("adv_loss", "adv_weight", "disc_loss", "logits_real", "logits_fake")
        return dict.fromkeys(names, fidelity.new_zeros(()))
    critic.requires_grad_(False)  # the autoencoder's turn: no gradient for D
    adv_loss = -at_least_float32(critic(x_rec)).mean()
    adaptive = adaptive_weight(fidelity, adv_loss, last, config.limit)
    ramp = min(1.0, (step - config.start + 1) / max(config.ramp, 1))
    critic.requires_grad_(True)  # the discriminator's turn: none for the autoencoder
    real, fake = (at_least_float32(critic(y)) for y in (x, x_rec.detach()))
    return {
        "adv_loss": adv_loss,
        "adv_weight": config.weight * ramp * adaptive,
        "disc_loss": discriminator_loss(real, fake),
        "logits_real": real.mean().detach(),
        "logits_fake": fake.mean().detach(),
    }


def adaptive_weight(fidelity: Tensor, adv_loss: Tensor, last: Tensor, limit: float = 1e4) -> Tensor:
    """|grad fidelity| / (|grad adv_loss| + 1e-4) at the decoder's last weight, in [0, limit].

    Esser et al. 2021 (taming transformers), Eq. 7. The norms are taken in float32, as squares of
    half-precision gradients underflow; no gradient flows through the weight.
    """
    grads = (torch.autograd.grad(y, last, retain_graph=True)[0] for y in (fidelity, adv_loss))
    of_fidelity, of_adv = (at_least_float32(grad).norm() for grad in grads)
    return (of_fidelity / (of_adv + 1e-4)).clamp(0.0, limit).detach()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The hinge loss of D (Lim & Ye 2017), of its logits on real and on reconstructed images."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
