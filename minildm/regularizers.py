"""What bounds the latent space: the small KL penalty of the paper's KL-reg autoencoders."""

from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor

from minildm.types import Noise


class DiagonalGaussian(NamedTuple):
    """q(z | x) = N(mean, exp(logvar)), the encoder's answer before rescaling; LDM Sec. 3.1."""

    mean: Tensor  # (B, c, h, w)
    logvar: Tensor  # (B, c, h, w), in [-30, 20]

    @classmethod
    def from_moments(cls, moments: Tensor) -> "DiagonalGaussian":
        """(B, 2c, h, w), mean then log-variance; clamped, as exp overflows past the bounds."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, noise: Noise = torch.randn_like) -> Tensor:
        """mean + std * noise(mean): (B, c, h, w)."""
        return self.mean + (0.5 * self.logvar).exp() * noise(self.mean)

    def mode(self) -> Tensor:
        """The likeliest latent, the mean: (B, c, h, w)."""
        return self.mean

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) in nats, summed over a latent: (B,)."""
        terms = 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar)
        return reduce(terms, "b c h w -> b", "sum")
