"""What bounds the latent space: a KL penalty (KL-reg) or a codebook (VQ-reg), LDM Sec. 3.1."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from minildm import processes
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


class Quantized(NamedTuple):
    """What a codebook makes of a latent."""

    z: Tensor  # (B, c, h, w), the nearest codes; their gradient passes straight through to z
    loss: Tensor  # scalar, pulls codes to latents and latents to codes
    indices: Tensor  # (B, h, w) int64, which codes


class VectorQuantizer(nn.Module):
    """Each latent pixel becomes its nearest code, van den Oord et al. 2017 (VQ-VAE).

    commitment: beta, the weight of |z - sg[code]|^2 beside |sg[z] - code|^2. legacy: beta
    multiplies the other term, as in the released first stages; the value is the same, the
    gradients are not. In training, choices are counted over an epoch of `epoch_latents`, and a
    code that no latent chose for `restart_after` batches moves onto a latent drawn by lot.
    Without it many codes may never be chosen. What a code was chosen for before it moved, and in
    the batch that holds the latent it moved to, counts for nothing: usage is not what the remedy
    itself does. Without gradients nothing is counted or moved, whatever the mode. Several processes
    that train together count and draw over all their latents.

    (B, c, h, w) -> Quantized
    """

    counts: Tensor  # (K,) int64, choices in this epoch so far
    last_counts: Tensor  # (K,) int64, choices in the epoch before
    idle: Tensor  # (K,) int64, batches since a latent chose the code; -1: it has just moved

    def __init__(
        self, size: int, channels: int, *, commitment: float = 0.25, legacy: bool = False
    ) -> None:
        super().__init__()
        if size < 1 or channels < 1:
            raise ValueError(f"size={size} and channels={channels} must be at least 1")
        self.commitment, self.legacy = commitment, legacy
        self.epoch_latents: int | None = None  # None: one epoch without end
        self.restart_after: int | None = None  # None: never
        self.codebook = nn.Parameter(torch.empty(size, channels).uniform_(-1 / size, 1 / size))
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("last_counts", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("idle", torch.zeros(size, dtype=torch.int64))

    def forward(self, z: Tensor) -> Quantized:
        place = "cpu" if z.is_meta else z.device.type
        with torch.autocast(place, enabled=False):  # distances want float32
            z = z.to(self.codebook.dtype)
            learning = self.training and torch.is_grad_enabled()
            if learning and self.restart_after is not None:
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
        """The codes behind indices: (B, h, w) int64 -> (B, c, h, w)."""
        return rearrange(F.embedding(indices, self.codebook), "b h w c -> b c h w")

    def usage(self) -> tuple[Tensor, Tensor]:
        """Share of the codes in use, and perplexity, over the last whole epoch of training.

        Before the first one ends, over what was seen of it. A batch's own numbers mislead: few
        pictures never use many codes.
        """
        return code_usage(self.last_counts if self.last_counts.any() else self.counts)

    def restart_all(self) -> None:
        """Let the next batch of training place every code, if `restart_after` is set at all."""
        self.idle.fill_(2**40)

    def forget(self) -> None:
        """Begin to count anew, as for another training of a trained codebook."""
        for counted in (self.counts, self.last_counts, self.idle):
            counted.zero_()

    @torch.no_grad()
    def _count(self, indices: Tensor) -> None:
        if self.epoch_latents is not None and self.counts.sum() >= self.epoch_latents:
            self.last_counts.copy_(self.counts)
            self.counts.zero_()
        chosen = processes.gathered(indices).flatten().bincount(minlength=len(self.counts))
        self.counts += torch.where(self.idle < 0, 0, chosen)
        self.idle = torch.where(chosen > 0, 0, self.idle.clamp(min=0) + 1)

    @torch.no_grad()
    def _restart_dead(self, z: Tensor) -> None:
        dead = self.idle >= self.restart_after
        flat = rearrange(processes.gathered(z), "b c h w -> (b h w) c")
        lot = torch.randint(len(flat), (len(dead),), device=flat.device)
        self.codebook.copy_(torch.where(dead[:, None], flat[lot], self.codebook))
        self.counts.masked_fill_(dead, 0)
        self.idle.masked_fill_(dead, -1)  # moved: this batch does not count


def code_usage(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Choices of each code (K,) -> the share of codes in use, and exp of the choices' entropy.

    The perplexity is K where all codes are chosen alike, 1 where only one is.
    """
    share = counts.double() / counts.sum().clamp(min=1)
    return (counts > 0).double().mean(), torch.special.entr(share).sum().exp()
