"""What bounds the latent space: a KL penalty (KL-reg) or a codebook (VQ-reg), LDM Sec. 3.1."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from minildm.layers import Noise


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
    training with gradients, choices are counted over an epoch of `epoch_latents`, and a code that
    no latent chose for `restart_after` batches moves onto a random latent of the batch. Choices of
    a code before it moved, and in the batch it moved in, do not count, so restarts do not inflate
    the usage. Nothing waits for the device.
    (B, c, h, w) -> Quantized
    """

    counts: Tensor  # (K,) int64, choices in this epoch so far
    last_counts: Tensor  # (K,) int64, choices in the epoch before
    idle: Tensor  # (K,) int64, batches since a latent chose the code; -1: it has just moved

    def __init__(
        self, size: int, channels: int, *, commitment: float = 0.25, legacy: bool = False
    ) -> None:
        super().__init__()
        self.commitment, self.legacy = commitment, legacy
        self.epoch_latents: int | None = None  # None: one endless epoch
        self.restart_after: int | None = None  # None: never
        self.codebook = nn.Parameter(torch.empty(size, channels).uniform_(-1 / size, 1 / size))
        for name in ("counts", "last_counts", "idle"):
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64))

    def forward(self, z: Tensor) -> Quantized:
        place = "cpu" if z.is_meta else z.device.type
        with torch.autocast(place, enabled=False):  # distances need float32
            z = z.to(self.codebook.dtype)
            learning = self.training and torch.is_grad_enabled()
            if learning and self.restart_after:
                self._restart_dead(z)
            indices = self.nearest(z)
            codes = self.codes(indices)
            to_codes, to_latents = F.mse_loss(codes, z.detach()), F.mse_loss(z, codes.detach())
            if self.legacy:
                to_codes, to_latents = to_latents, to_codes
            if learning:
                self._count(indices)
            straight_through = z + (codes - z).detach()
            return Quantized(straight_through, to_codes + self.commitment * to_latents, indices)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Indices of the codes nearest to each latent pixel: (B, c, h, w) -> (B, h, w) int64."""
        wide = torch.promote_types(self.codebook.dtype, torch.float32)  # half: other codes
        codes, flat = self.codebook.to(wide), rearrange(z.to(wide), "b c h w -> (b h w) c")
        norms = codes.square().sum(1)  # |z|^2 is the same for all codes: left out
        rows = max(1, 2**24 // len(norms))  # a table of distances takes 64 MiB at most
        parts = [torch.addmm(norms, part, codes.T, alpha=-2).argmin(1) for part in flat.split(rows)]
        return rearrange(torch.cat(parts), "(b h w) -> b h w", b=len(z), h=z.shape[2])

    def codes(self, indices: Tensor) -> Tensor:
        """The codes with these indices: (B, h, w) int64 -> (B, c, h, w)."""
        return rearrange(F.embedding(indices, self.codebook), "b h w c -> b c h w")

    def usage(self) -> tuple[Tensor, Tensor]:
        """Share of the codes in use, and perplexity, over the last whole epoch of training.

        During the first epoch: over the part seen so far. Both are scalars on the device.
        """
        return code_usage(torch.where(self.last_counts.any(), self.last_counts, self.counts))

    def begin(self, *, place_all: bool) -> None:
        """Reset the counters; place_all: the first batch of training moves every code."""
        self.counts.zero_()
        self.last_counts.zero_()
        self.idle.fill_(2**40 if place_all else 0)

    @torch.no_grad()
    def _count(self, indices: Tensor) -> None:
        if self.epoch_latents is not None:
            over = self.counts.sum() >= self.epoch_latents
            self.last_counts.copy_(torch.where(over, self.counts, self.last_counts))
            self.counts.masked_fill_(over, 0)
        flat = indices.flatten()
        chosen = torch.zeros_like(self.counts).scatter_add_(0, flat, torch.ones_like(flat))
        self.counts += torch.where(self.idle < 0, 0, chosen)
        self.idle.copy_(torch.where(chosen > 0, 0, self.idle.clamp(min=0) + 1))

    @torch.no_grad()
    def _restart_dead(self, z: Tensor) -> None:
        dead = self.idle >= self.restart_after
        flat = rearrange(z, "b c h w -> (b h w) c")
        drawn = torch.randint(len(flat), (len(dead),), device=flat.device)
        self.codebook.copy_(torch.where(dead[:, None], flat[drawn], self.codebook))
        self.counts.masked_fill_(dead, 0)
        self.idle.masked_fill_(dead, -1)  # moved: this batch does not count


def code_usage(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Choices of each code (K,) -> the share of codes in use, and exp of the choices' entropy.

    The perplexity is K where all codes are chosen equally often, 1 where only one is.
    """
    share = counts.double() / counts.sum().clamp(min=1)
    return (counts > 0).double().mean(), torch.special.entr(share).sum().exp()
