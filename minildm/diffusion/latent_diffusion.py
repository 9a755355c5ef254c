"""Stage 2: a diffusion model over the latents of a frozen autoencoder, LDM Fig. 3."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minildm.compression.autoencoder import Autoencoder, AutoencoderConfig
from minildm.conditioning import Conditioner, ConditionerConfig, Conditioning
from minildm.diffusion.guidance import guided
from minildm.diffusion.objective import ObjectiveConfig, draw_t, ldm_loss, time_weights
from minildm.diffusion.samplers import SAMPLERS, Denoise, EditFn, Spacing, Step
from minildm.diffusion.schedule import Prediction, ScheduleConfig
from minildm.diffusion.unet import UNet, UNetConfig
from minildm.layers import Batch, BatchRandom, Noise, seed_of


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a model is sampled from, unless `sample` is given other values."""

    sampler: str = "ddim"
    steps: int = 50
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r} is not known; known: {', '.join(SAMPLERS)}")
        if not 1 <= self.steps <= 10_000:
            raise ValueError(f"steps={self.steps} must lie in 1..10000")


@dataclass(frozen=True, kw_only=True)
class LatentDiffusionConfig:
    """A whole model: both stages, tau_theta, the schedule, and the image side it was made for."""

    autoencoder: AutoencoderConfig
    unet: UNetConfig
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    image_size: int = 64
    t_bias: float = 1.0  # of training's times: 1 as in the paper, above it more of the noisy end
    sampling: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if not self.t_bias > 0:
            raise ValueError(f"t_bias={self.t_bias} must be positive")
        if self.schedule.zero_terminal_snr and self.objective.predict == "eps":
            raise ValueError("objective.predict='eps' must be 'v' or 'z0' with zero_terminal_snr")
        c, f, unet = self.autoencoder.z_channels, self.autoencoder.f, self.unet
        wanted = (c + self.conditioner.concat_channels(c), c, self.conditioner.d_cond)
        if (unet.in_channels, unet.out_channels, unet.d_cond) != wanted:
            raise ValueError(
                f"unet.in_channels={unet.in_channels}, out_channels={unet.out_channels}, d_cond="
                f"{unet.d_cond} must be {wanted}, as autoencoder and conditioner have it"
            )
        for part in (self.conditioner, getattr(self.conditioner, "concat", None)):
            if 2 ** getattr(part, "stages", f.bit_length() - 1) != f:  # of a semantic map
                raise ValueError(f"stages={part.stages} must be log2 of f={f}")
        if not 1 <= self.image_size <= 10_000 or self.image_size % f:
            raise ValueError(f"image_size={self.image_size} must be a multiple of f={f}, <= 10000")


def seeded_noise(seed: int | None, first: int = 0) -> Noise:
    """Like torch.randn_like; row i has a generator of its own, seeded by (seed, first + i).

    So image i of a seed does not depend on the batch that it is sampled in, nor on the device:
    a CUDA generator would give other numbers than the CPU's. None: other numbers at each call.
    """
    base = torch.Generator().seed() if seed is None else seed
    rows: list[torch.Generator] = []

    def noise(like: Tensor) -> Tensor:
        for i in range(len(rows), len(like)):
            rows.append(torch.Generator().manual_seed(seed_of(base, first + i)))
        shape, own = like.shape[1:], rows[: len(like)]
        drawn = [torch.randn(shape, generator=row, device=row.device) for row in own]
        return torch.stack(drawn).to(like.device, like.dtype)

    return noise


class Conditions(NamedTuple):
    """What the conditioner read from the user's y, and how many samples it describes."""

    batch: Batch
    n: int

    def rows(self, first: int, end: int) -> "Conditions":
        """Those of samples first..end - 1."""
        end = min(end, self.n)
        return Conditions({key: rows[first:end] for key, rows in self.batch.items()}, end - first)


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
        return self.unet(z_t, t, c.tokens)

    def predict(self, z_t: Tensor, t: Tensor, c: Conditioning) -> Prediction:
        """The network's output as eps and z0, whatever its objective."""
        out = self.network(z_t, t, c)
        return self.schedule.prediction(self.config.objective.predict, out, z_t, t)

    def eps_theta(self, z_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """eps_hat: (B, c, h, w), (B,) int64, the condition -> (B, c, h, w)."""
        return self.predict(z_t, t, c).eps

    def loss(
        self, batch: Batch, generator: torch.Generator | None = None, rank: int = 0, world: int = 1
    ) -> dict[str, Tensor]:
        """`loss` (a scalar to minimise) and `per_sample` (B,) with its `t` (B,), for plots.

        The batch holds `image` (B, 3, H, W), or its latent `z` (B, c, h, w), and what tau_theta
        reads. `per_sample` is unweighted; where the objective weights times, its mean is `simple`.
        Random numbers: see `BatchRandom`. In evaluation mode no condition is dropped.
        """
        random, objective = BatchRandom(generator, rank, world), self.config.objective
        if "z" in batch:
            z0 = batch["z"]
        else:
            with torch.no_grad():
                z0 = self.autoencoder.encode(batch["image"], noise=random.randn_like)
        n, drop = len(z0), None
        if self.training and self.config.conditioner.p_uncond:
            drop = random.rand(n, device=z0.device) < self.config.conditioner.p_uncond
        c = self.conditioner(batch, self._encode_condition, drop)
        t = draw_t(random.rand(n, device=z0.device), self.schedule.T, self.config.t_bias)
        eps = random.randn_like(z0)
        per_sample = ldm_loss(self.network, self.schedule, z0, c, t, eps, objective)
        terms = {"loss": (self.time_weights[t] * per_sample).mean()}
        if objective.loss_weighting != "simple":
            terms["simple"] = per_sample.detach().mean()
        return {**terms, "per_sample": per_sample.detach(), "t": t}

    def _encode_condition(self, x: Tensor) -> Tensor:
        """The latent of an image that is a condition: the posterior's mean."""
        with torch.no_grad():
            return self.autoencoder.encode(x, sample=False)

    def steps(
        self,
        y: object = None,
        *,
        n: int | None = None,
        size: int | tuple[int, int] | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        eta: float = 0.0,
        spacing: Spacing | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[int, int] | None = None,
        guide: Callable[[Denoise], Denoise] | None = None,
        edit: EditFn | None = None,
        seed: int | None = None,
        first: int = 0,
        noise: Noise | None = None,
    ) -> Iterator[Step]:
        """Sample in one batch, yielding every Step: latents (B, c, h, w); arguments: `sample`."""
        if seed is not None and noise is not None:
            raise ValueError("give seed or noise, not both: noise is all the randomness there is")
        if guidance_scale is None and not self.config.conditioner.has_null:
            guidance_scale = 1.0
        given = {"sampler": sampler, "steps": steps, "guidance_scale": guidance_scale}
        given = {key: value for key, value in given.items() if value is not None}
        how, (batch, n) = replace(self.config.sampling, **given), self._conditions(y, n)
        options = self._sampler_options(how.sampler, eta, spacing)
        noise = noise or seeded_noise(seed, first)
        guidance = {"rescale": guidance_rescale, "interval": guidance_interval}
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                c = self.conditioner(batch, self._encode_condition)
                denoise = self._denoise(c, n, how.guidance_scale, **guidance)
            denoise = guide(denoise) if guide else denoise
            shape = self._latent_shape(size, c.concat)
            z_T = noise(self.schedule.alphas_cumprod.new_zeros(n, *shape))
            options |= {"steps": how.steps, "noise": noise, "edit": edit}
            yield from SAMPLERS[how.sampler](denoise, self.schedule, z_T, **options)
        finally:
            self.train(was_training)

    def _conditions(self, y: object, n: int | None) -> Conditions:
        """y as the conditioner's batch; its number of rows, or n if it has none."""
        if isinstance(y, Conditions):
            return y
        if n is not None and n < 1:
            raise ValueError(f"n={n} must be at least 1")
        batch = self.conditioner.batch_from(y, n or 1)
        count = len(next(iter(batch.values()))) if batch else (n or 1)
        if not count or n not in (None, count):
            raise ValueError(f"n={n} must be the number of samples that y describes, {count} >= 1")
        return Conditions(batch, count)

    def _sampler_options(self, sampler: str, eta: float, spacing: Spacing | None) -> dict[str, Any]:
        if eta and sampler != "ddim":
            raise ValueError(f"eta={eta} must be 0 for {sampler!r}; it is an option of 'ddim'")
        if spacing is None and self.config.schedule.zero_terminal_snr:
            spacing = "trailing"  # the only one that begins where the training ends
        given = {"eta": eta, "spacing": spacing}
        return {key: value for key, value in given.items() if value}  # else the sampler's own

    def _denoise(self, c: Conditioning, n: int, guidance_scale: float, **guidance: Any) -> Denoise:
        """The network with its condition and guidance: (z_t, t) -> eps_hat, or a Prediction."""
        c_null = c
        if guidance_scale != 1.0:
            if not self.config.conditioner.has_null:
                raise ValueError(f"{guidance_scale=} must be 1: the model has no null condition")
            c_null = self.conditioner.null(n)._replace(concat=c.concat)
        network = guided(self.network, c, c_null, guidance_scale, **guidance)
        objective = self.config.objective.predict
        if objective == "eps":
            return network
        return lambda z, t: self.schedule.prediction(objective, network(z, t), z, t)

    def _latent_shape(
        self, size: int | tuple[int, int] | None, concat: Tensor | None
    ) -> tuple[int, int, int]:
        """(c, h, w) of z_T, whose h and w are those of a concatenated condition."""
        f, side = self.autoencoder.f, self.config.image_size
        given = None if concat is None else tuple(f * s for s in concat.shape[2:])
        height, width = (size, size) if isinstance(size, int) else size or given or (side, side)
        if min(height, width) < 1 or height % f or width % f:
            raise ValueError(f"size={size} must be positive multiples of f={f}")
        if given not in (None, (height, width)):
            raise ValueError(f"size={size} must be {given}, as the condition is")
        return self.config.autoencoder.z_channels, height // f, width // f

    @torch.no_grad()
    def sample(
        self,
        y: object = None,
        *,
        n: int | None = None,
        batch_size: int = 64,
        first: int = 0,
        **options: Any,
    ) -> Tensor:
        """Images for the conditions y: (B, 3, H, W) in [-1, 1], on the model's device.

        y: class names or labels, captions, layouts, images: what the conditioner's batch_from
        reads; None for an unconditional model, which makes `n` images. batch_size: how many at
        once; with noise, edit or guide, all. seed: image i depends on (seed, first + i) alone.

        Options (of `steps`): size: the image's side or (H, W), if not the trained one; a
        concatenated condition decides it. sampler: "ddim" (eta: how much of DDPM's noise),
        "ddpm", "plms", "dpm_solver_pp", "euler" or "heun", with `steps` at the times of
        `spacing` (leading, trailing, linspace). guidance_scale: 1 is the plain conditional;
        guidance_rescale, guidance_interval: see `guided`. None: what `config.sampling` says.
        guide: wraps the denoiser, as `image_guided` does. edit: changes z between steps, as
        `keep_known` does. noise: a function like torch.randn_like, in place of seed.
        Raises ValueError for values outside their range.
        """
        conditions, images = self._conditions(y, n), []
        whole = any(options.get(name) is not None for name in ("noise", "edit", "guide"))
        batch_size = conditions.n if whole else batch_size
        for i in range(0, conditions.n, batch_size):
            part = conditions.rows(i, i + batch_size)
            *_, last = self.steps(part, first=first + i, **options)
            images.append(self.autoencoder.decode(last.z).clamp(-1.0, 1.0))
        return torch.cat(images)
