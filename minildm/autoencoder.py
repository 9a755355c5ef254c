"""Stage 1, perceptual compression: E and D of the KL-regularised autoencoder, LDM Sec. 3.1."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minildm.layers import Downsample, ResBlock, SelfAttention2d, Upsample
from minildm.regularizers import DiagonalGaussian
from minildm.types import Noise

_EPS = 1e-6  # of every GroupNorm in the official autoencoder; its UNet has 1e-5


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Shape of E and D. Level i works at H / 2**i with width * width_mult[i] channels."""

    regularizer: Literal["kl"] = "kl"
    in_channels: int = 3
    z_channels: int = 4  # c, channels of the latent
    hid_z_channels: int | None = None  # channels before the 1x1 convolution to z; None: c
    width: int = 128
    width_mult: tuple[int, ...] = (1, 2, 4, 4)  # f = patch * 2 ** (len - 1)
    res_blocks: int = 2  # per level of E; D has one more
    attn_levels: tuple[int, ...] = ()  # indices into width_mult
    mid_attn: bool = True  # attention between the two middle blocks
    groups: int = 32
    dropout: float = 0.0
    patch: int = 1  # pixels per side that enter as channels; > 1 is not the paper's, but quick
    zero_init: bool = False  # residual blocks begin as their skip; not the paper's: learns faster

    def __post_init__(self) -> None:
        if self.regularizer != "kl":
            raise ValueError(f"regularizer={self.regularizer!r} is not known; known: 'kl'")
        for name in ("in_channels", "z_channels", "width", "res_blocks", "groups", "patch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.width_mult or min(self.width_mult) < 1:
            raise ValueError(f"width_mult={self.width_mult} must hold at least one factor >= 1")
        bad = [m for m in (1, *self.width_mult) if self.width * m % self.groups]
        if bad:
            raise ValueError(
                f"width={self.width} times width_mult={bad} is no multiple of groups={self.groups}"
            )
        if not set(self.attn_levels) <= set(range(len(self.width_mult))):
            raise ValueError(f"attn_levels={self.attn_levels} outside width_mult={self.width_mult}")

    @property
    def f(self) -> int:
        """The downsampling factor H / h."""
        return self.patch * 2 ** (len(self.width_mult) - 1)


def _block(config: AutoencoderConfig, c_in: int, c_out: int) -> ResBlock:
    return ResBlock(
        c_in,
        c_out,
        groups=config.groups,
        eps=_EPS,
        dropout=config.dropout,
        zero_out=config.zero_init,
    )


def _attention(config: AutoencoderConfig, channels: int) -> SelfAttention2d:
    return SelfAttention2d(channels, heads=1, groups=config.groups, eps=_EPS, zero_out=False)


def _middle(config: AutoencoderConfig, channels: int) -> nn.Sequential:
    blocks: list[nn.Module] = [_block(config, channels, channels)]
    if config.mid_attn:
        blocks.append(_attention(config, channels))
    return nn.Sequential(*blocks, _block(config, channels, channels))


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, 2c, H/f, W/f), the mean and log-variance of q(z | x)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.width_mult]
        hid_z = 2 * (config.hid_z_channels or config.z_channels)
        self.patch = config.patch
        c_in = config.in_channels * config.patch**2
        self.conv_in = nn.Conv2d(c_in, config.width, 3, padding=1)
        self.levels = nn.ModuleList()
        channels = config.width
        for i, width in enumerate(widths):
            level = nn.Sequential()
            for _ in range(config.res_blocks):
                level.append(_block(config, channels, width))
                if i in config.attn_levels:
                    level.append(_attention(config, width))
                channels = width
            if i < len(widths) - 1:
                level.append(Downsample(width, pad_all_sides=False))
            self.levels.append(level)
        self.middle = _middle(config, channels)
        self.norm_out = nn.GroupNorm(config.groups, channels, eps=_EPS)
        self.conv_out = nn.Conv2d(channels, hid_z, 3, padding=1)
        self.to_moments = nn.Conv2d(hid_z, 2 * config.z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hid = self.conv_in(F.pixel_unshuffle(x, self.patch))  # (B, width, H/patch, W/patch)
        for level in self.levels:
            hid = level(hid)
        hid = self.middle(hid)  # (B, width * width_mult[-1], h, w)
        return self.to_moments(self.conv_out(F.silu(self.norm_out(hid))))


class Decoder(nn.Module):
    """(B, c, h, w) -> (B, 3, f h, f w); the last tensor of the adversarial weight is `conv_out`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.width_mult]
        hid_z = config.hid_z_channels or config.z_channels
        self.from_z = nn.Conv2d(config.z_channels, hid_z, 1)
        self.conv_in = nn.Conv2d(hid_z, widths[-1], 3, padding=1)
        self.middle = _middle(config, widths[-1])
        self.levels = nn.ModuleList()  # from the coarsest to full resolution
        channels = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            level = nn.Sequential()
            for _ in range(config.res_blocks + 1):
                level.append(_block(config, channels, width))
                if i in config.attn_levels:
                    level.append(_attention(config, width))
                channels = width
            if i > 0:
                level.append(Upsample(width))
            self.levels.append(level)
        self.norm_out = nn.GroupNorm(config.groups, channels, eps=_EPS)
        self.patch = config.patch
        c_out = config.in_channels * config.patch**2
        self.conv_out = nn.Conv2d(channels, c_out, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        hid = self.middle(self.conv_in(self.from_z(z)))
        for level in self.levels:
            hid = level(hid)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(hid))), self.patch)


class Autoencoder(nn.Module):
    """E and D. Callers only ever see normalised latents z = (posterior - shift) / scale.

    `scale` is the latents' standard deviation over the training set, measured once and saved
    with the weights; the official scale_factor is 1 / scale (LDM appendix G).
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @property
    def f(self) -> int:
        """The downsampling factor H / h."""
        return self.config.f

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """q(z | x) before normalisation: (B, 3, H, W) in [-1, 1] -> moments (B, c, h, w).

        Raises ValueError when f does not divide H and W, or the channels differ.
        """
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            want = self.config.in_channels
            raise ValueError(f"x must be (B, {want}, H, W), got {tuple(x.shape)}")
        if x.shape[2] % self.f or x.shape[3] % self.f:
            h, w = x.shape[2:]
            raise ValueError(f"x is {h} x {w} pixels; both sides must be multiples of f={self.f}")
        moments = self.encoder(x)
        if moments.dtype != x.dtype:  # autocast: exp and the KL sum want more than half precision
            moments = moments.float()
        return DiagonalGaussian.from_moments(moments)

    def encode(self, x: Tensor, *, sample: bool = True, noise: Noise = torch.randn_like) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> normalised z (B, c, H/f, W/f): a draw, or the mean."""
        posterior = self.posterior(x)
        return self.normalize(posterior.sample(noise) if sample else posterior.mode())

    def normalize(self, z: Tensor) -> Tensor:
        """The encoder's own latent -> one of unit variance over the training set."""
        return (z - self.shift) / self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Normalised z (B, c, h, w) -> x (B, 3, f h, f w), about [-1, 1], not clipped."""
        return self.decoder(z * self.scale + self.shift)
