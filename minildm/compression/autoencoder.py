"""Stage 1, perceptual compression: E and D, KL- or VQ-regularised or none at all, LDM Sec. 3.1."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minildm.compression.quantizer import DiagonalGaussian, VectorQuantizer
from minildm.layers import (
    Downsample,
    GroupNorm,
    Noise,
    ResBlock,
    SelfAttention2d,
    Upsample,
    check_fields,
    check_words,
    fast_layout,
    warn_of_range,
)

_EPS = 1e-6  # of every GroupNorm in the official autoencoder; its UNet has 1e-5


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Shape of E and D. Level i works at H / 2**i with channels * channel_mult[i] channels.

    regularizer "identity" is pixel space, the paper's f = 1: z is the image, nothing is learnt;
    of the other fields only in_channels and z_channels (equal) matter.
    """

    regularizer: Literal["kl", "vq", "identity"] = "kl"
    in_channels: int = 3
    z_channels: int = 4  # c, channels of the latent
    hid_z_channels: int | None = None  # channels before the 1x1 convolution to z; None: c
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)  # f = patch * 2 ** (len - 1)
    num_res_blocks: int = 2  # per level of E; D has one more
    attn_levels: tuple[int, ...] = ()  # indices into channel_mult
    mid_attn: bool = True  # attention between the two middle blocks
    groups: int = 32  # of each norm; must divide the channels of each level
    dropout: float = 0.0
    patch: int = 1  # pixels per side that enter as channels; > 1 is not the paper's, but fast
    zero_init: bool = False  # residual blocks begin as their skip; not the paper's: learns faster
    codebook_size: int | None = None  # VQ only: how many codes
    commitment: float = 0.25  # VQ: beta
    vq_legacy: bool = False  # VQ: beta on the other term, as the released models were trained

    def __post_init__(self) -> None:
        check_words(self)
        if (self.regularizer == "vq") != (self.codebook_size is not None):
            given = f"codebook_size={self.codebook_size}, regularizer={self.regularizer!r}"
            raise ValueError(f"{given}: 'vq' requires a codebook, the others have none")
        check_fields(self, 1, 2**20, "codebook_size")
        check_fields(self, 1, 4096, "in_channels", "z_channels", "hid_z_channels", "channels")
        check_fields(self, 1, 100, "groups", "num_res_blocks", "patch", "channel_mult")
        if not 1 <= len(self.channel_mult) <= 10:
            raise ValueError(f"channel_mult={self.channel_mult} must hold 1 to 10 factors")
        check_fields(self, 0, len(self.channel_mult) - 1, "attn_levels")

    @property
    def f(self) -> int:
        """The downsampling factor H / h."""
        if self.regularizer == "identity":
            return 1
        return self.patch * 2 ** (len(self.channel_mult) - 1)


def _blocks(config: AutoencoderConfig, c_in: int, c_out: int, attend: list[bool]) -> nn.Sequential:
    """One residual block for each item of `attend`, with self-attention after it where true."""
    shared, blocks = {"groups": config.groups, "eps": _EPS}, nn.Sequential()
    options = {"dropout": config.dropout, "zero_out": config.zero_init, **shared}
    for attends in attend:
        blocks.append(ResBlock(c_in, c_out, **options))
        if attends:
            blocks.append(SelfAttention2d(c_out, heads=1, zero_out=False, **shared))
        c_in = c_out
    return blocks


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, c', H/f, W/f). KL: c' = 2c, mean and log-variance; VQ: c' = c, z."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        twice = 2 if config.regularizer == "kl" else 1
        hid_z = twice * (config.hid_z_channels or config.z_channels)
        self.patch = config.patch
        channels, last = config.channels, len(config.channel_mult) - 1
        self.conv_in = nn.Conv2d(config.in_channels * config.patch**2, channels, 3, padding=1)
        self.levels = nn.ModuleList()
        for i, mult in enumerate(config.channel_mult):
            c_in, channels, n = channels, config.channels * mult, config.num_res_blocks
            level = _blocks(config, c_in, channels, [i in config.attn_levels] * n)
            if i < last:
                level.append(Downsample(channels, pad_all_sides=False))
            self.levels.append(level)
        self.middle = _blocks(config, channels, channels, [config.mid_attn, False])
        self.norm_out = GroupNorm(config.groups, channels, eps=_EPS)
        self.conv_out = nn.Conv2d(channels, hid_z, 3, padding=1)
        self.to_moments = nn.Conv2d(hid_z, twice * config.z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(x, self.patch)  # (B, 3 patch^2, H/patch, W/patch)
        hid = self.conv_in(fast_layout(x))
        for level in self.levels:
            hid = level(hid)
        hid = self.middle(hid)  # (B, C * channel_mult[-1], h, w)
        return self.to_moments(self.conv_out(F.silu(self.norm_out(hid))))


class Decoder(nn.Module):
    """(B, c, h, w) -> (B, 3, f h, f w); the adversarial weight is measured at `conv_out`.

    The codebook of VQ-reg is its first layer, so that the diffusion model works on the latent
    before quantisation (LDM Sec. 3.1); `render` is what follows the codebook.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.quantizer: VectorQuantizer | None = None
        if config.codebook_size is not None:
            options = {"commitment": config.commitment, "legacy": config.vq_legacy}
            self.quantizer = VectorQuantizer(config.codebook_size, config.z_channels, **options)
        hid_z = config.hid_z_channels or config.z_channels
        self.from_z = nn.Conv2d(config.z_channels, hid_z, 1)
        channels = config.channels * config.channel_mult[-1]
        self.conv_in = nn.Conv2d(hid_z, channels, 3, padding=1)
        self.middle = _blocks(config, channels, channels, [config.mid_attn, False])
        self.levels = nn.ModuleList()  # from the coarsest to full resolution
        for i, mult in reversed(list(enumerate(config.channel_mult))):
            c_in, channels, n = channels, config.channels * mult, config.num_res_blocks + 1
            level = _blocks(config, c_in, channels, [i in config.attn_levels] * n)
            if i > 0:
                level.append(Upsample(channels))
            self.levels.append(level)
        self.norm_out = GroupNorm(config.groups, channels, eps=_EPS)
        self.patch = config.patch
        self.conv_out = nn.Conv2d(channels, config.in_channels * config.patch**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.render(z if self.quantizer is None else self.quantizer(z).z)

    def render(self, z: Tensor) -> Tensor:
        """A latent, already quantised where there is a codebook -> images."""
        hid = self.middle(self.conv_in(self.from_z(fast_layout(z))))
        for level in self.levels:
            hid = level(hid)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(hid))), self.patch)


class Autoencoder(nn.Module):
    """E and D. Callers only ever see normalised latents z = (posterior - shift) / scale.

    `scale` is the standard deviation of a KL latent over the training set, measured once and
    saved with the weights; the official scale_factor is 1 / scale (LDM appendix G). VQ latents
    and pixels are not changed: scale 1.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config, self.f = config, config.f
        identity = config.regularizer == "identity"
        self.encoder: nn.Module = nn.Identity() if identity else Encoder(config)
        self.decoder: nn.Module = nn.Identity() if identity else Decoder(config)
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def moments(self, x: Tensor) -> Tensor:
        """What E gives, before normalisation: (B, 3, H, W) -> (B, c', H/f, W/f), see `Encoder`.

        Raises ValueError if f does not divide H and W.
        """
        h, w = x.shape[-2:]
        if h % self.f or w % self.f:
            raise ValueError(f"x is {h} x {w} pixels; both sides must be multiples of f={self.f}")
        return self.encoder(x).to(x.dtype)  # autocast: exp and the KL sum need float32

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """q(z | x) before normalisation: (B, 3, H, W) in [-1, 1] -> two (B, c, h, w).

        Raises ValueError as `moments` does, and if the regulariser is not KL.
        """
        if self.config.regularizer != "kl":
            raise ValueError(f"regularizer={self.config.regularizer!r} has no posterior, only 'kl'")
        return DiagonalGaussian.from_moments(self.moments(x))

    def latent(
        self, moments: Tensor, *, sample: bool = True, noise: Noise = torch.randn_like
    ) -> Tensor:
        """Moments (B, c', h, w) -> normalised z (B, c, h, w); for KL a draw or the mean."""
        z = moments
        if self.config.regularizer == "kl":
            posterior = DiagonalGaussian.from_moments(moments)
            z = posterior.sample(noise) if sample else posterior.mode()
        return (z - self.shift) / self.scale

    def encode(self, x: Tensor, *, sample: bool = True, noise: Noise = torch.randn_like) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> normalised z (B, c, H/f, W/f): a draw, or the mean.

        VQ: the latent before quantisation. Raises ValueError as `moments`; warns of [0, 1].
        """
        warn_of_range(x)
        return self.latent(self.moments(x), sample=sample, noise=noise)

    def decode(self, z: Tensor) -> Tensor:
        """Normalised z (B, c, h, w) -> x (B, 3, f h, f w), about [-1, 1], not clipped."""
        return self.decoder(z * self.scale + self.shift)
