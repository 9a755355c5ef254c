"""What bounds the latent space: a KL penalty (KL-reg) or a codebook (VQ-reg), LDM Sec. 3.1."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from minildm.layers import Noise, at_least_float32


class DiagonalGaussian(NamedTuple):
    """q(z | x) = N(mean, exp(logvar)), the encoder's output before normalisation."""

    mean: Tensor  # (B, c, h, w)
    logvar: Tensor  # (B, c, h, w), in [-30, 20]

    @classmethod
    def from_moments(cls, moments: Tensor) -> "DiagonalGaussian":
        """Split (B, 2c, h, w) into mean and log-variance; clamped, as exp overflows outside."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, noise: Noise = torch.randn_like) -> Tensor:
        """mean + std * noise(mean): (B, c, h, w)."""
        return self.mean + (0.5 * self.logvar).exp() * noise(self.mean)

    def mode(self) -> Tensor:
        """The most likely latent, the mean: (B, c, h, w)."""
        return self.mean

    def kl(self) -> Tensor:
        """KL(q || N(0, I)) in nats, summed over a latent: (B,)."""
        terms = 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar)
        return reduce(terms, "b c h w -> b", "sum")


class Quantized(NamedTuple):
    """The output of a codebook."""

    z: Tensor  # (B, c, h, w), the nearest codes; their gradient passes straight through to z
    loss: Tensor  # scalar, pulls codes to latents and latents to codes
    indices: Tensor  # (B, h, w) int64, which codes


class VectorQuantizer(nn.Module):
    """Replace each latent pixel by its nearest code, van den Oord et al. 2017 (VQ-VAE).

    commitment: beta, the weight of |z - sg[code]|^2 relative to |sg[z] - code|^2. legacy: beta
    multiplies the other term, as in the released first stages: other gradients, same value. In
    training with gradients, choices are counted, and a code that no latent chose for
    `restart_after` batches moves onto a random latent of the batch; its count begins again after
    that batch, so that restarts do not inflate the usage. Nothing waits for the device.
    (B, c, h, w) -> Quantized
    """

    counts: Tensor  # (K,) int64, choices; halved when they reach 100 a code, so that old ones fade
    idle: Tensor  # (K,) int64, batches since a latent chose the code

    def __init__(
        self, size: int, channels: int, *, commitment: float = 0.25, legacy: bool = False
    ) -> None:
        super().__init__()
        self.commitment, self.legacy = commitment, legacy
        self.restart_after: int | None = None  # None: never
        self.codebook = nn.Parameter(torch.empty(size, channels).uniform_(-1 / size, 1 / size))
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("idle", torch.zeros(size, dtype=torch.int64))

    def forward(self, z: Tensor) -> Quantized:
        place = "cpu" if z.is_meta else z.device.type
        with torch.autocast(place, enabled=False):  # distances need float32
            z = z.to(self.codebook.dtype)
            learning = self.training and torch.is_grad_enabled()
            indices = self._nearest_in_training(z) if learning else self.nearest(z)
            codes = self.codes(indices)
            to_codes, to_latents = F.mse_loss(codes, z.detach()), F.mse_loss(z, codes.detach())
            if self.legacy:
                to_codes, to_latents = to_latents, to_codes
            straight_through = z + (codes - z).detach()
            return Quantized(straight_through, to_codes + self.commitment * to_latents, indices)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Indices of the codes nearest to each latent pixel: (B, c, h, w) -> (B, h, w) int64."""
        codes = at_least_float32(self.codebook)  # half precision would choose others
        flat = rearrange(z.to(codes.dtype), "b c h w -> (b h w) c")
        norms = codes.square().sum(1)  # |z|^2 is the same for all codes: left out
        rows = max(1, 2**24 // len(norms))  # a table of distances takes 64 MiB at most
        parts = [torch.addmm(norms, part, codes.T, alpha=-2).argmin(1) for part in flat.split(rows)]
        return rearrange(torch.cat(parts), "(b h w) -> b h w", b=len(z), h=z.shape[2])

    def codes(self, indices: Tensor) -> Tensor:
        """The codes with these indices: (B, h, w) int64 -> (B, c, h, w)."""
        return rearrange(F.embedding(indices, self.codebook), "b h w c -> b c h w")

    @torch.no_grad()
    def _nearest_in_training(self, z: Tensor) -> Tensor:
        moved = torch.zeros_like(self.idle, dtype=torch.bool)
        if self.restart_after:
            moved = self.idle >= self.restart_after
            latents = rearrange(z, "b c h w -> (b h w) c")
            drawn = latents[torch.randint(len(latents), (len(moved),), device=z.device)]
            self.codebook.copy_(torch.where(moved[:, None], drawn, self.codebook))
        indices = self.nearest(z)
        ones = torch.ones_like(indices).flatten()
        chosen = torch.zeros_like(self.counts).scatter_add_(0, indices.flatten(), ones)
        self.counts //= torch.where(self.counts.sum() < 100 * len(self.counts), 1, 2)
        self.counts.add_(chosen).masked_fill_(moved, 0)
        self.idle.masked_fill_(moved, 0).add_(1).masked_fill_(chosen > 0, 0)
        return indices


def code_usage(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Choices of each code (K,) -> the share of codes in use, and exp of the choices' entropy.

    The perplexity is K where all codes are chosen equally often, 1 where only one is.
    """
    share = counts.double() / counts.sum().clamp(min=1)
    return (counts > 0).double().mean(), torch.special.entr(share).sum().exp()
