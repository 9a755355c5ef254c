"""Stage 2: a diffusion model over the latents of a frozen autoencoder, LDM Fig. 3."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minildm.autoencoder import Autoencoder, AutoencoderConfig
from minildm.conditioning import ConditionerConfig, build_conditioner
from minildm.guidance import conditioned, guided
from minildm.losses import draw_t, ldm_loss
from minildm.samplers import SAMPLERS
from minildm.schedule import NoiseSchedule
from minildm.types import Batch, Conditioning, Denoise, Noise, Step
from minildm.unet import UNet, UNetConfig


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The scaled-linear schedule of the paper."""

    T: int = 1000
    b0: float = 0.0015
    b1: float = 0.0195

    def __post_init__(self) -> None:
        if self.T < 1 or not 0 < self.b0 <= self.b1 < 1:
            raise ValueError(f"need T >= 1 and 0 < b0 <= b1 < 1, got {self}")


@dataclass(frozen=True, kw_only=True)
class LatentDiffusionConfig:
    """A whole model: both stages, tau_theta, the schedule, and the image side it was made for."""

    autoencoder: AutoencoderConfig
    unet: UNetConfig
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    image_size: int = 64
    t_bias: float = 1.0  # how training draws t: 1 as in the paper, above it more of the noisy end

    def __post_init__(self) -> None:
        if not self.t_bias > 0:
            raise ValueError(f"t_bias={self.t_bias} must be positive")
        c, unet = self.autoencoder.z_channels, self.unet
        if (unet.in_channels, unet.out_channels) != (c, c):
            raise ValueError(
                f"the autoencoder's z_channels={c} must be the UNet's in_channels="
                f"{unet.in_channels} and out_channels={unet.out_channels}"
            )
        d_cond = self.conditioner.d_cond if self.conditioner.kind != "none" else None
        if unet.d_cond != d_cond:
            raise ValueError(f"unet.d_cond={unet.d_cond} must be the conditioner's, {d_cond}")
        factor = self.autoencoder.f * 2 ** (len(unet.width_mult) - 1)
        if self.image_size < 1 or self.image_size % factor:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of {factor}: f = "
                f"{self.autoencoder.f} times 2 for each of the UNet's downsamplings"
            )


def seeded_noise(seed: int | None) -> Noise:
    """Like torch.randn_like, from a generator of its own; the same on every device.

    It draws on the CPU: a CUDA generator would give other numbers for the same seed.
    """
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float32)
        return drawn.to(like.device, like.dtype)

    return noise


class LatentDiffusion(nn.Module):
    """The autoencoder (frozen), the UNet, tau_theta and the schedule as one model."""

    def __init__(self, config: LatentDiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = Autoencoder(config.autoencoder).requires_grad_(False)
        self.unet = UNet(config.unet)
        self.conditioner = build_conditioner(config.conditioner)
        schedule = config.schedule
        self.schedule = NoiseSchedule.scaled_linear(schedule.T, schedule.b0, schedule.b1)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.schedule.alphas_cumprod.device

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """As of any module; the frozen autoencoder stays in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def eps_theta(self, z_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """The UNet with its condition, concatenated to z_t or through cross-attention."""
        if c.concat is not None:
            z_t = torch.cat([z_t, c.concat], dim=1)
        return self.unet(z_t, t, c.tokens)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """`loss` (a scalar to minimise) and `per_sample` (B,) with its `t` (B,), for plots.

        The batch holds `image` (B, 3, H, W), or already `z` (B, c, h, w), and what tau_theta
        asks for.
        """
        if "z" in batch:
            z0 = batch["z"]
        else:
            with torch.no_grad():
                z0 = self.autoencoder.encode(batch["image"])
        c = self.conditioner(batch, self.autoencoder.encode)
        t = draw_t(self.schedule, len(z0), z0.device, self.config.t_bias)
        eps = torch.randn_like(z0)
        per_sample = ldm_loss(self.eps_theta, self.schedule, z0, c, t, eps)
        return {"loss": per_sample.mean(), "per_sample": per_sample.detach(), "t": t}

    def steps(
        self,
        y: object = None,
        *,
        n: int | None = None,
        size: int | tuple[int, int] | None = None,
        sampler: str = "ddim",
        steps: int = 50,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        seed: int | None = None,
        noise: Noise | None = None,
    ) -> Iterator[Step]:
        """Sample, yielding every Step: latents (B, c, h, w). The arguments are `sample`'s."""
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler={sampler!r} is not known; known: {', '.join(SAMPLERS)}")
        if seed is not None and noise is not None:
            raise ValueError("give seed or noise, not both: noise is all the randomness there is")
        if n is not None and n < 1:
            raise ValueError(f"n={n} must be at least 1")
        noise = noise or seeded_noise(seed)
        y_batch = self.conditioner.batch_from(y, n or 1)
        count = len(y_batch["label"]) if y_batch else (n or 1)
        if not count or n not in (None, count):
            raise ValueError(f"n={n}, but y names {count} samples")
        z_T = noise(torch.zeros(count, *self._latent_shape(size), device=self.device))
        if eta and sampler != "ddim":
            raise ValueError(f"eta={eta} belongs to the sampler 'ddim', not to {sampler!r}")
        options = {"eta": eta} if sampler == "ddim" else {}
        was_training = self.training
        self.eval()  # no condition is dropped when sampling
        try:
            with torch.no_grad():
                denoise = self._denoise(y_batch, count, guidance_scale)
            yield from SAMPLERS[sampler](denoise, self.schedule, z_T, steps, noise=noise, **options)
        finally:
            self.train(was_training)

    def _denoise(self, y_batch: Batch, n: int, guidance_scale: float) -> Denoise:
        c, c_null = self.conditioner(y_batch, self.autoencoder.encode), self.conditioner.null(n)
        if c.tokens is None and c.concat is None:
            if guidance_scale != 1.0:
                raise ValueError(f"guidance_scale={guidance_scale}: nothing to guide towards")
            return conditioned(self.eps_theta, c)
        return guided(self.eps_theta, c, c_null, guidance_scale)

    def _latent_shape(self, size: int | tuple[int, int] | None) -> tuple[int, int, int]:
        size = self.config.image_size if size is None else size
        height, width = (size, size) if isinstance(size, int) else size
        f = self.autoencoder.f
        if height < 1 or width < 1 or height % f or width % f:
            raise ValueError(f"size={size} must be positive multiples of f={f}")
        return (self.config.autoencoder.z_channels, height // f, width // f)

    @torch.no_grad()
    def sample(
        self,
        y: object = None,
        *,
        n: int | None = None,
        size: int | tuple[int, int] | None = None,
        sampler: str = "ddim",
        steps: int = 50,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        seed: int | None = None,
        noise: Noise | None = None,
    ) -> Tensor:
        """Pictures for the conditions y: (B, 3, H, W) in [-1, 1].

        y: class names or labels, None for an unconditional model, which makes `n` pictures.
        size: their side, or (H, W), if not the trained one. sampler: "ddim" (with steps and
        eta) or "ddpm". guidance_scale: 1 is the plain conditional. seed: an int for the same
        pictures again; or noise, a function like torch.randn_like. ValueErrors name what is
        wrong.
        """
        *_, last = self.steps(
            y,
            n=n,
            size=size,
            sampler=sampler,
            steps=steps,
            eta=eta,
            guidance_scale=guidance_scale,
            seed=seed,
            noise=noise,
        )
        return self.autoencoder.decode(last.z).clamp(-1.0, 1.0)
