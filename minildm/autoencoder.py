"""Stage 1, perceptual compression: E and D, KL- or VQ-regularised or none at all, LDM Sec. 3.1."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minildm.layers import Downsample, GroupNorm, ResBlock, SelfAttention2d, Upsample
from minildm.regularizers import DiagonalGaussian, VectorQuantizer
from minildm.types import Noise

_EPS = 1e-6  # of every GroupNorm in the official autoencoder; its UNet has 1e-5


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Shape of E and D. Level i works at H / 2**i with width * width_mult[i] channels.

    regularizer "identity" is pixel space, the paper's f = 1: z is the picture, nothing is
    learnt, and of the other fields only in_channels and z_channels (equal) have a meaning.
    """

    regularizer: Literal["kl", "vq", "identity"] = "kl"
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
    codebook_size: int | None = None  # VQ alone: how many codes
    commitment: float = 0.25  # VQ: beta
    vq_legacy: bool = False  # VQ: beta on the other term, as the released models were trained

    def __post_init__(self) -> None:
        if self.regularizer not in ("kl", "vq", "identity"):
            raise ValueError(
                f"regularizer={self.regularizer!r} is not known; known: 'kl', 'vq', 'identity'"
            )
        self._check_codebook()
        if self.hid_z_channels is not None and self.hid_z_channels < 1:
            raise ValueError(f"hid_z_channels={self.hid_z_channels} must be None or at least 1")
        if self.regularizer == "identity" and self.z_channels != self.in_channels:
            raise ValueError(
                f"z_channels={self.z_channels} must be in_channels={self.in_channels}: the latent "
                "of 'identity' is the picture"
            )
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

    def _check_codebook(self) -> None:
        size = self.codebook_size
        if self.regularizer == "vq" and (size is None or size < 1):
            raise ValueError(f"codebook_size={size} must be at least 1 where regularizer='vq'")
        if self.regularizer != "vq" and size is not None:
            raise ValueError(f"codebook_size={size} belongs to 'vq', not to {self.regularizer!r}")
        if not self.commitment >= 0:
            raise ValueError(f"commitment={self.commitment} must not be negative")

    @property
    def f(self) -> int:
        """The downsampling factor H / h."""
        if self.regularizer == "identity":
            return 1
        return self.patch * 2 ** (len(self.width_mult) - 1)

    @property
    def moment_channels(self) -> int:
        """Channels that E gives: mean and log-variance for KL, the latent itself otherwise."""
        return self.z_channels * (2 if self.regularizer == "kl" else 1)


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
    """(B, 3, H, W) -> (B, c', H/f, W/f). KL: c' = 2c, mean and log-variance; VQ: c' = c, z."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.width_mult]
        twice = config.moment_channels // config.z_channels
        hid_z = twice * (config.hid_z_channels or config.z_channels)
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
        self.norm_out = GroupNorm(config.groups, channels, eps=_EPS)
        self.conv_out = nn.Conv2d(channels, hid_z, 3, padding=1)
        self.to_moments = nn.Conv2d(hid_z, config.moment_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hid = self.conv_in(F.pixel_unshuffle(x, self.patch))  # (B, width, H/patch, W/patch)
        for level in self.levels:
            hid = level(hid)
        hid = self.middle(hid)  # (B, width * width_mult[-1], h, w)
        return self.to_moments(self.conv_out(F.silu(self.norm_out(hid))))


class Decoder(nn.Module):
    """(B, c, h, w) -> (B, 3, f h, f w); the adversarial weight is measured at `conv_out`.

    The codebook of VQ-reg is its first layer, so that the diffusion model works on what comes
    before quantisation (LDM Sec. 3.1); `render` is what follows it.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.width_mult]
        hid_z = config.hid_z_channels or config.z_channels
        self.quantizer: VectorQuantizer | None = None
        if config.codebook_size is not None:
            self.quantizer = VectorQuantizer(
                config.codebook_size,
                config.z_channels,
                commitment=config.commitment,
                legacy=config.vq_legacy,
            )
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
        self.norm_out = GroupNorm(config.groups, channels, eps=_EPS)
        self.patch = config.patch
        c_out = config.in_channels * config.patch**2
        self.conv_out = nn.Conv2d(channels, c_out, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.render(z if self.quantizer is None else self.quantizer(z).z)

    def render(self, z: Tensor) -> Tensor:
        """A latent, already quantised where there is a codebook -> pictures."""
        hid = self.middle(self.conv_in(self.from_z(z)))
        for level in self.levels:
            hid = level(hid)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(hid))), self.patch)


class Autoencoder(nn.Module):
    """E and D. Callers only ever see normalised latents z = (posterior - shift) / scale.

    `scale` is the standard deviation of a KL latent over the training set, measured once and
    saved with the weights; the official scale_factor is 1 / scale (LDM appendix G). VQ latents
    and pixels are left as they are: scale 1.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        identity = config.regularizer == "identity"
        self.encoder: nn.Module = nn.Identity() if identity else Encoder(config)
        self.decoder: nn.Module = nn.Identity() if identity else Decoder(config)
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @property
    def f(self) -> int:
        """The downsampling factor H / h."""
        return self.config.f

    def moments(self, x: Tensor) -> Tensor:
        """What E says of pictures, before normalisation: (B, 3, H, W) -> (B, c', H/f, W/f).

        KL: c' = 2c, mean and log-variance; VQ: c' = c, the latent before quantisation. Raises
        ValueError when f does not divide H and W, or the channels differ.
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
        return moments

    def posterior(self, x: Tensor) -> DiagonalGaussian:
        """q(z | x) before normalisation: (B, 3, H, W) in [-1, 1] -> moments (B, c, h, w).

        Raises ValueError as `moments`, and where there is none: only KL has a posterior.
        """
        if self.config.regularizer != "kl":
            raise ValueError(f"regularizer={self.config.regularizer!r} has no posterior: encode")
        return DiagonalGaussian.from_moments(self.moments(x))

    def latent(
        self, moments: Tensor, *, sample: bool = True, noise: Noise = torch.randn_like
    ) -> Tensor:
        """Moments (B, c', h, w) -> normalised z (B, c, h, w); a draw or the mean for KL."""
        if self.config.regularizer != "kl":
            return self.normalize(moments)
        posterior = DiagonalGaussian.from_moments(moments)
        return self.normalize(posterior.sample(noise) if sample else posterior.mode())

    def encode(self, x: Tensor, *, sample: bool = True, noise: Noise = torch.randn_like) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> normalised z (B, c, H/f, W/f): a draw, or the mean.

        VQ: the latent before quantisation, whatever `sample`. Raises ValueError as `moments`,
        and for pictures that are not finite or leave [-1, 1].
        """
        check_pictures(x)
        return self.latent(self.moments(x), sample=sample, noise=noise)

    def normalize(self, z: Tensor) -> Tensor:
        """The encoder's own latent -> one of unit variance over the training set."""
        return (z - self.shift) / self.scale

    def decode(self, z: Tensor) -> Tensor:
        """Normalised z (B, c, h, w) -> x (B, 3, f h, f w), about [-1, 1], not clipped.

        Raises ValueError for a latent of other channels.
        """
        return self.decoder(self._own(z))

    def code_indices(self, z: Tensor) -> Tensor:
        """Which codes the decoder takes for z: (B, c, h, w) -> (B, h, w) int64; VQ alone."""
        if self.config.regularizer != "vq":
            raise ValueError(f"regularizer={self.config.regularizer!r} has no codes, 'vq' has")
        return self.decoder.quantizer.nearest(self._own(z))

    def _own(self, z: Tensor) -> Tensor:
        """A normalised latent, checked -> the decoder's own."""
        if z.ndim != 4 or z.shape[1] != self.config.z_channels:
            want = self.config.z_channels
            raise ValueError(f"z must be (B, {want}, h, w), got {tuple(z.shape)}")
        return z * self.scale + self.shift


def check_pictures(x: Tensor, name: str = "x") -> None:
    """ValueError unless there are values, floats, all finite and in [-1, 1]."""
    if not x.is_floating_point() or not x.numel():
        raise ValueError(f"{name} must be floats in [-1, 1], got {x.dtype} {tuple(x.shape)}")
    if x.is_meta or torch.compiler.is_compiling():
        return
    low, high = (bound.item() for bound in x.detach().aminmax())
    if not (-math.inf < low and high < math.inf):
        raise ValueError(f"{name} holds values that are not finite: NaN or infinite")
    if low < -1.001 or high > 1.001:
        raise ValueError(
            f"{name} must lie in [-1, 1], got {low:.4g} to {high:.4g}; bytes become that by "
            "x / 127.5 - 1"
        )
