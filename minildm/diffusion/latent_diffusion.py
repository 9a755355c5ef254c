"""Stage 2: a diffusion model over the latents of a frozen autoencoder, LDM Fig. 3."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minildm.compression.autoencoder import Autoencoder, AutoencoderConfig
from minildm.conditioning import Conditioner, ConditionerConfig, Conditioning, look_up
from minildm.diffusion.guidance import guided
from minildm.diffusion.objective import ObjectiveConfig, draw_t, ldm_loss, time_weights
from minildm.diffusion.samplers import SAMPLERS, Denoise, EditFn, Spacing, Step
from minildm.diffusion.schedule import Prediction, ScheduleConfig
from minildm.diffusion.unet import UNet, UNetConfig
from minildm.layers import Batch, BatchRandom, Noise, check_fields, check_words, has_bf16, seed_of


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a model is sampled from, unless `sample` is given other values."""

    sampler: Literal["ddim", "ddpm", "plms", "dpm_solver_pp", "euler", "heun"] = "ddim"
    steps: int = 50
    guidance_scale: float = 1.0  # 1: the plain conditional
    guidance_rescale: float = 0.0  # this and guidance_interval: see `guided`
    guidance_interval: tuple[int, int] | None = None
    eta: float = 0.0  # of ddim: how much of DDPM's noise
    spacing: Spacing | None = None  # of the times, see `timesteps`; None: the sampler's own
    clip_z0: bool = False  # keep z0_hat in [-1, 1]; for pixels, and ddim, ddpm or dpm_solver_pp

    def __post_init__(self) -> None:
        check_words(self)
        check_fields(self, 1, 10_000, "steps")
        check_fields(self, 0, 1, "guidance_rescale", "eta")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """Stage 2 without its first stage: what a model and the experiment that trains it share."""

    unet: UNetConfig
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    t_bias: float = 1.0  # of training's times: 1 as in the paper, above it more of the noisy end
    sampling: SamplingConfig = field(default_factory=SamplingConfig)  # how to sample by default


@dataclass(frozen=True, kw_only=True)
class LatentDiffusionConfig(DiffusionConfig):
    """A whole model: both stages, and the image side it was made for."""

    autoencoder: AutoencoderConfig
    image_size: int = 64

    def __post_init__(self) -> None:
        check_fields(self, 1e-12, 1e12, "t_bias")
        check_fields(self, 1, 10_000, "image_size")
        if self.schedule.zero_terminal_snr and self.objective.predict == "eps":
            raise ValueError("objective.predict='eps' must be 'v' or 'z0' with zero_terminal_snr")
        if self.sampling.clip_z0 and self.autoencoder.regularizer != "identity":
            raise ValueError("sampling.clip_z0=True requires pixels, regularizer='identity'")
        c, unet = self.autoencoder.z_channels, self.unet
        wanted = (c + self.conditioner.concat_channels(c), c, self.conditioner.d_cond)
        if (unet.in_channels, unet.out_channels, unet.d_cond) != wanted:
            raise ValueError(
                f"unet.in_channels={unet.in_channels}, out_channels={unet.out_channels}, d_cond="
                f"{unet.d_cond} must be {wanted}, as autoencoder and conditioner have it"
            )
        unit = self.autoencoder.f * 2 ** (len(self.unet.channel_mult) - 1)  # the UNet halves, too
        if self.image_size % unit:
            raise ValueError(f"image_size={self.image_size} must be a multiple of {unit}")


def seeded_noise(seed: int | None, first: int = 0) -> Noise:
    """Like torch.randn_like; row i has its own generator, seeded by (seed, first + i).

    So image i of a seed does not depend on the batch that it is sampled in, nor on the device:
    a CUDA generator would give other numbers than the CPU's. None: other numbers at each call.
    """
    base = torch.Generator().seed() if seed is None else seed
    row = cache(lambda i: torch.Generator().manual_seed(seed_of(base, first + i)))

    def noise(like: Tensor) -> Tensor:
        shape = like.shape[1:]
        drawn = [torch.randn(shape, generator=row(i), device="cpu") for i in range(len(like))]
        return torch.stack(drawn).to(like.device, like.dtype)

    return noise


class LatentDiffusion(nn.Module):
    """The autoencoder (frozen), the UNet, tau_theta and the schedule as one model."""

    time_weights: Tensor  # (T,)

    def __init__(
        self,
        config: LatentDiffusionConfig,
        *,
        autoencoder: Autoencoder | None = None,
        unet: UNet | None = None,
        conditioner: Conditioner | None = None,
    ) -> None:
        """Parts that are given must be of the config; the others are made from it."""
        super().__init__()
        self.config = config
        self.autoencoder = autoencoder or Autoencoder(config.autoencoder)
        self.autoencoder.requires_grad_(False)
        self.unet = unet or UNet(config.unet)
        self.conditioner = conditioner or config.conditioner.build()
        self.schedule = config.schedule.build()
        weights = time_weights(self.schedule, config.objective)
        self.register_buffer("time_weights", weights, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.schedule.alphas_cumprod.device

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """As of any module; the frozen autoencoder stays in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def network(self, z_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """The UNet with its condition, concatenated to z_t or through cross-attention.

        Returns what `config.objective.predict` names: eps, z0 or v, (B, c, h, w).
        """
        if c.concat is not None:
            z_t = torch.cat([z_t, c.concat], dim=1)
        return self.unet(z_t, t, c.tokens).to(z_t.dtype)  # autocast: guidance in float32

    def predict(self, z_t: Tensor, t: Tensor, c: Conditioning) -> Prediction:
        """The network's output as eps and z0, whatever its objective."""
        out = self.network(z_t, t, c)
        return self.schedule.prediction(self.config.objective.predict, out, z_t, t)

    def eps_theta(self, z_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """eps_hat: (B, c, h, w), (B,) int64, the condition -> (B, c, h, w)."""
        return self.predict(z_t, t, c).eps

    def loss(self, batch: Batch, rng: BatchRandom | None = None) -> dict[str, Tensor]:
        """`loss` (a scalar to minimise) and `per_sample` (B,) with its `t` (B,), for plots.

        The batch holds `image` (B, 3, H, W), or its latent `z` (B, c, h, w), and what tau_theta
        reads. `per_sample` is unweighted; where the objective weights times, its mean is `simple`.
        In evaluation mode no condition is dropped.
        """
        rng, objective = rng or BatchRandom(), self.config.objective
        z0, drop, p_uncond = batch.get("z"), None, self.config.conditioner.p_uncond
        if z0 is None:
            z0 = self.autoencoder.encode(batch["image"], noise=rng.randn_like)
        if self.training and p_uncond:
            drop = rng.rand(len(z0), device=z0.device) < p_uncond
        c = self.conditioner(batch, self.autoencoder.encode, drop)
        t = draw_t(rng.rand(len(z0), device=z0.device), self.schedule.T, self.config.t_bias)
        eps = rng.randn_like(z0)
        per_sample = ldm_loss(self.network, self.schedule, z0, c, t, eps, objective)
        terms = {"loss": (self.time_weights[t] * per_sample).mean()}
        if objective.loss_weighting != "simple":
            terms["simple"] = per_sample.detach().mean()
        return {**terms, "per_sample": per_sample.detach(), "t": t}

    def steps(self, y: object = None, *, n: int | None = None, **options: Any) -> Iterator[Step]:
        """Sample in one batch, yielding every Step: latents (B, c, h, w); arguments: `sample`."""
        return self._steps(*self._read(y, n), **options)

    @torch.no_grad()
    def sample(
        self, y: object = None, *, n: int | None = None, batch_size: int = 64, **options: Any
    ) -> Tensor:
        """Images for the conditions y: (B, 3, H, W) in [-1, 1], on the model's device.

        y: class names or labels, captions, layouts, images: what the conditioner's batch_from
        reads; None for an unconditional model, which makes `n` images. batch_size: how many at
        once; with noise, edit or guide, all. Options: the fields of SamplingConfig, where not
        given those of `config.sampling` (eta, if no sampler is given); and seed, first (0): image
        i depends on (seed, first + i) alone; size: the image's side or (H, W), if not the trained
        one, unless a concatenated condition decides it; guide: wraps the denoiser, as
        `image_guided`; edit: changes z between steps, as `keep_known` does; noise: like
        torch.randn_like, in place of seed; precision: "bf16" where the device has it, faster, or
        "fp32"; sampler: also a function like those in SAMPLERS. ValueError for other values.
        """
        (batch, n), first, images = self._read(y, n), options.pop("first", 0), []
        if any(options.get(name) is not None for name in ("noise", "edit", "guide")):
            batch_size = n
        kind = self.device.type
        with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind)):  # keeps cast weights
            for i in range(0, n, batch_size):
                part = {key: rows[i : i + batch_size] for key, rows in batch.items()}
                *_, last = self._steps(part, min(batch_size, n - i), first=first + i, **options)
                images.append(self.autoencoder.decode(last.z).clamp(-1.0, 1.0))
        return torch.cat(images)

    def _read(self, y: object, n: int | None) -> tuple[Batch, int]:
        """y as the conditioner reads it, and the number of its rows (n if it has none)."""
        batch = self.conditioner.batch_from(y, n or 1)
        count = len(next(iter(batch.values()))) if batch else (n or 1)
        if count < 1 or n not in (None, count):
            raise ValueError(f"n={n} must be the number of samples that y describes, {count} >= 1")
        return batch, count

    @torch.no_grad()
    def _steps(
        self,
        batch: Batch,
        n: int,
        *,
        size: int | tuple[int, int] | None = None,
        seed: int | None = None,
        first: int = 0,
        noise: Noise | None = None,
        guide: Callable[[Denoise], Denoise] | None = None,
        edit: EditFn | None = None,
        precision: str = "fp32",
        **sampling: Any,
    ) -> Iterator[Step]:
        """`steps`, for a batch of n conditions that the conditioner has read."""
        how, noise = self._sampling(**sampling), noise or seeded_noise(seed, first)
        was_training = self.training
        self.eval()
        try:
            c = self.conditioner(batch, self.autoencoder.encode)
            denoise = self._denoise(c, n, how, precision)
            denoise = guide(denoise) if guide else denoise
            shape = n, self.config.autoencoder.z_channels, *self._latent_size(size, c.concat)
            z_T = noise(self.schedule.alphas_cumprod.new_zeros(shape))
            options = {"steps": how.steps, "eta": how.eta, "spacing": how.spacing}
            options = {name: value for name, value in options.items() if value}  # else its own
            sampler = own if callable(own := sampling.get("sampler")) else SAMPLERS[how.sampler]
            yield from sampler(denoise, self.schedule, z_T, noise=noise, edit=edit, **options)
        finally:
            self.train(was_training)

    def _sampling(self, **given: Any) -> SamplingConfig:
        """The model's own SamplingConfig with the given values; None: not given."""
        own = {} if self.config.conditioner.null_batch else {"guidance_scale": 1.0}
        if self.config.schedule.zero_terminal_snr and not self.config.sampling.spacing:
            own["spacing"] = "trailing"  # begins where the training ends, at T - 1
        if given.get("sampler"):
            own["eta"] = 0.0  # the card's is for its own sampler
        own |= {name: v for name, v in given.items() if v is not None and not callable(v)}
        return replace(self.config.sampling, **own)

    def _denoise(self, c: Conditioning, n: int, how: SamplingConfig, precision: str) -> Denoise:
        """The network with its condition and guidance: (z_t, t) -> Prediction."""
        scale, objective = how.guidance_scale, self.config.objective.predict
        c_null = c if scale == 1.0 else self.conditioner.null(n)._replace(concat=c.concat)
        options = {"rescale": how.guidance_rescale, "interval": how.guidance_interval}
        network = self.network
        look_up(precision, ("fp32", "bf16"), "precision")
        if precision == "bf16" and has_bf16(self.device):
            network = torch.autocast(self.device.type, torch.bfloat16)(network)
        network = guided(network, c, c_null, scale, **options)

        def denoise(z: Tensor, t: Tensor) -> Prediction:
            found = self.schedule.prediction(objective, network(z, t), z, t)
            return found._replace(z0=found.z0.clamp(-1.0, 1.0)) if how.clip_z0 else found

        return denoise

    def _latent_size(
        self, size: int | tuple[int, int] | None, concat: Tensor | None
    ) -> tuple[int, int]:
        """(h, w): a concatenated condition's, or those of images with this side or (H, W)."""
        f, trained = self.autoencoder.f, self.config.image_size
        own = (trained, trained) if concat is None else (f * concat.shape[2], f * concat.shape[3])
        sides = (2 * (size,) if isinstance(size, int) else size) or own
        for side in sides:
            replace(self.config, image_size=side)  # refuses one that the model cannot have
        if concat is not None and sides != own:
            raise ValueError(f"size={sides} must be {own}, as the condition has it")
        return sides[0] // f, sides[1] // f
