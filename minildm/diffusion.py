"""Stage 2: a diffusion model over the latents of a frozen autoencoder, LDM Fig. 3."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn

from minildm import draws
from minildm.autoencoder import Autoencoder, AutoencoderConfig
from minildm.conditioning import Conditioner, ConditionerConfig, build_conditioner
from minildm.guidance import conditioned, guided
from minildm.losses import ObjectiveConfig, draw_t, ldm_loss, time_weights
from minildm.samplers import SAMPLERS, Spacing
from minildm.schedule import NoiseSchedule
from minildm.types import Batch, Conditioning, Denoise, EditFn, Noise, Prediction, Step
from minildm.unet import UNet, UNetConfig


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """A noise schedule; "scaled_linear" with these ends is the paper's.

    The ends b0 and b1 belong to "scaled_linear" and "linear"; "cosine" has none to choose.
    """

    T: int = 1000
    b0: float = 0.0015
    b1: float = 0.0195
    kind: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    zero_terminal_snr: bool = False  # see NoiseSchedule.zero_terminal_snr

    def __post_init__(self) -> None:
        kinds = ("scaled_linear", "linear", "cosine")
        if self.kind not in kinds:
            listed = ", ".join(map(repr, kinds))
            raise ValueError(f"kind={self.kind!r} is not known; known: {listed}")
        if not 0 < self.b0 <= self.b1 < 1:
            raise ValueError(f"need 0 < b0 <= b1 < 1, got b0={self.b0}, b1={self.b1}")
        least = 2 if self.zero_terminal_snr else 1
        if least > self.T:
            raise ValueError(f"T={self.T} must be at least {least}")
        if self.kind == "cosine" and (self.b0, self.b1) != (0.0015, 0.0195):
            raise ValueError(f"kind='cosine' has no ends, got b0={self.b0}, b1={self.b1}")

    def build(self) -> NoiseSchedule:
        """The schedule, in float32."""
        if self.kind == "cosine":
            schedule = NoiseSchedule.cosine(self.T)
        else:
            schedule = getattr(NoiseSchedule, self.kind)(self.T, self.b0, self.b1)
        return schedule.zero_terminal_snr() if self.zero_terminal_snr else schedule


@dataclass(frozen=True, kw_only=True)
class LatentDiffusionConfig:
    """A whole model: both stages, tau_theta, the schedule, and the image side it was made for."""

    autoencoder: AutoencoderConfig
    unet: UNetConfig
    conditioner: ConditionerConfig = field(default_factory=ConditionerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    image_size: int = 64
    t_bias: float = 1.0  # how training draws t: 1 as in the paper, above it more of the noisy end

    def __post_init__(self) -> None:
        if not self.t_bias > 0:
            raise ValueError(f"t_bias={self.t_bias} must be positive")
        if self.schedule.zero_terminal_snr and self.objective.predict == "eps":
            raise ValueError(
                "zero_terminal_snr=True needs objective.predict 'v' or 'z0', got 'eps': where z_T "
                "holds no signal, eps says nothing of z0"
            )
        self._check_channels()
        d_cond = self.conditioner.d_cond if self.conditioner.kind != "none" else None
        if self.unet.d_cond != d_cond:
            raise ValueError(f"unet.d_cond={self.unet.d_cond} must be the conditioner's, {d_cond}")
        f, conditioner = self.autoencoder.f, self.conditioner
        if conditioner.concat == "semantic" and 2**conditioner.stages != f:
            raise ValueError(f"stages={conditioner.stages} must be log2 of f={f}")
        if self.image_size < 1 or self.image_size % f:
            raise ValueError(f"image_size={self.image_size} must be a positive multiple of f={f}")

    def _check_channels(self) -> None:
        c, unet = self.autoencoder.z_channels, self.unet
        beside = self.conditioner.concat_channels(c)
        if (unet.in_channels, unet.out_channels) != (c + beside, c):
            plus = f" and {beside} of the condition beside it" if beside else ""
            raise ValueError(
                f"the autoencoder's z_channels={c}{plus} must be the UNet's in_channels="
                f"{unet.in_channels}, and {c} its out_channels={unet.out_channels}"
            )


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments of `steps` and `sample`."""

    n: int | None
    size: int | tuple[int, int] | None
    sampler: str
    steps: int
    eta: float
    spacing: Spacing | None
    guidance_scale: float
    guidance_rescale: float
    guidance_interval: tuple[int, int] | None
    guide: Callable[[Denoise], Denoise] | None
    edit: EditFn | None
    seed: int | None
    noise: Noise | None


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

    def __init__(
        self,
        config: LatentDiffusionConfig,
        *,
        autoencoder: Autoencoder | None = None,
        unet: UNet | None = None,
        conditioner: Conditioner | None = None,
    ) -> None:
        """Parts that are given must be of the config; the others are made of it."""
        super().__init__()
        self.config = config
        self.autoencoder = autoencoder or Autoencoder(config.autoencoder)
        self.autoencoder.requires_grad_(False)
        self.unet = unet or UNet(config.unet)
        self.conditioner = conditioner or build_conditioner(config.conditioner)
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

        It returns what `config.objective.predict` names: eps, z0 or v, (B, c, h, w).
        """
        if c.concat is not None:
            if (len(c.concat), *c.concat.shape[2:]) != (len(z_t), *z_t.shape[2:]):
                raise ValueError(
                    f"the condition beside z_t {tuple(z_t.shape)} must have its B, h and w, got "
                    f"{tuple(c.concat.shape)}"
                )
            z_t = torch.cat([z_t, c.concat], dim=1)
        return self.unet(z_t, t, c.tokens)

    def predict(self, z_t: Tensor, t: Tensor, c: Conditioning) -> Prediction:
        """The network's answer as eps and z0, whatever its objective."""
        out = self.network(z_t, t, c)
        return self.schedule.prediction(self.config.objective.predict, out, z_t, t)

    def eps_theta(self, z_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """eps_hat: (B, c, h, w), (B,) int64, the condition -> (B, c, h, w)."""
        return self.predict(z_t, t, c).eps

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """`loss` (a scalar to minimise) and `per_sample` (B,) with its `t` (B,), for plots.

        The batch holds `image` (B, 3, H, W), or already `z` (B, c, h, w), and what tau_theta
        asks for. `per_sample` is unweighted; where the objective weighs times, its mean is
        the term `simple`.
        """
        if "z" in batch:
            z0 = batch["z"]
        else:
            with torch.no_grad():
                z0 = self.autoencoder.encode(batch["image"], noise=draws.randn_like)
        c, objective = self.conditioner(batch, self._encode_condition), self.config.objective
        t = draw_t(self.schedule, len(z0), z0.device, self.config.t_bias)
        eps = draws.randn_like(z0)
        per_sample = ldm_loss(self.network, self.schedule, z0, c, t, eps, objective)
        terms = {"loss": (self.time_weights[t] * per_sample).mean()}
        if objective.weighting != "simple":
            terms["simple"] = per_sample.detach().mean()
        return {**terms, "per_sample": per_sample.detach(), "t": t}

    def _encode_condition(self, x: Tensor) -> Tensor:
        """The latent of a picture that is a condition: the posterior's mean."""
        with torch.no_grad():
            return self.autoencoder.encode(x, sample=False)

    def steps(
        self,
        y: object = None,
        *,
        n: int | None = None,
        size: int | tuple[int, int] | None = None,
        sampler: str = "ddim",
        steps: int = 50,
        eta: float = 0.0,
        spacing: Spacing | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[int, int] | None = None,
        guide: Callable[[Denoise], Denoise] | None = None,
        edit: EditFn | None = None,
        seed: int | None = None,
        noise: Noise | None = None,
    ) -> Iterator[Step]:
        """Sample, yielding every Step: latents (B, c, h, w). The arguments are `sample`'s."""
        if seed is not None and noise is not None:
            raise ValueError("give seed or noise, not both: noise is all the randomness there is")
        if n is not None and n < 1:
            raise ValueError(f"n={n} must be at least 1")
        noise = noise or seeded_noise(seed)
        options = self._sampler_options(sampler, eta, spacing)
        y_batch = self.conditioner.batch_from(y, n or 1)
        count = len(next(iter(y_batch.values()))) if y_batch else (n or 1)
        if not count or n not in (None, count):
            raise ValueError(f"n={n}, but y names {count} samples")
        guidance = {"rescale": guidance_rescale, "interval": guidance_interval}
        was_training = self.training
        self.eval()  # no condition is dropped when sampling
        try:
            with torch.no_grad():
                c = self.conditioner(y_batch, self._encode_condition)
                denoise = self._denoise(c, count, guidance_scale, guidance)
            shape = self._latent_shape(size, None if c.concat is None else c.concat.shape[2:])
            z_T = noise(torch.zeros(count, *shape, device=self.device))
            denoise = guide(denoise) if guide else denoise
            options |= {"steps": steps, "noise": noise, "edit": edit}
            yield from SAMPLERS[sampler](denoise, self.schedule, z_T, **options)
        finally:
            self.train(was_training)

    def _sampler_options(self, sampler: str, eta: float, spacing: Spacing | None) -> dict[str, Any]:
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler={sampler!r} is not known; known: {', '.join(SAMPLERS)}")
        if eta and sampler != "ddim":
            raise ValueError(f"eta={eta} belongs to the sampler 'ddim', not to {sampler!r}")
        if spacing is None and self.config.schedule.zero_terminal_snr:
            spacing = "trailing"  # the only one that begins where the training ends
        options = {"spacing": spacing} if spacing else {}
        return options | ({"eta": eta} if sampler == "ddim" else {})

    def _denoise(
        self, c: Conditioning, n: int, guidance_scale: float, guidance: dict[str, Any]
    ) -> Denoise:
        if c.tokens is None and c.concat is None:
            if guidance_scale != 1.0:
                raise ValueError(f"guidance_scale={guidance_scale}: nothing to guide towards")
            network = conditioned(self.network, c)
        else:
            c_null = c  # some have no null, and need none where nothing is guided
            if guidance_scale != 1.0:
                c_null = self.conditioner.null(n)._replace(concat=c.concat)
            network = guided(self.network, c, c_null, guidance_scale, **guidance)
        objective = self.config.objective.predict
        if objective == "eps":
            return network
        return lambda z, t: self.schedule.prediction(objective, network(z, t), z, t)

    def _latent_shape(
        self, size: int | tuple[int, int] | None, given: torch.Size | None
    ) -> tuple[int, int, int]:
        """given: (h, w) of a condition beside z_t, which decides where `size` does not."""
        f, c = self.autoencoder.f, self.config.autoencoder.z_channels
        if size is None:
            side = self.config.image_size // f
            return (c, *(given or (side, side)))
        height, width = (size, size) if isinstance(size, int) else size
        if height < 1 or width < 1 or height % f or width % f:
            raise ValueError(f"size={size} must be positive multiples of f={f}")
        if given is not None and (height // f, width // f) != tuple(given):
            fitting = tuple(f * side for side in given)
            raise ValueError(f"size={size}, but the condition beside z_t is for {fitting}")
        return (c, height // f, width // f)

    @torch.no_grad()
    def sample(self, y: object = None, **options: Unpack[SamplingOptions]) -> Tensor:
        """Pictures for the conditions y: (B, 3, H, W) in [-1, 1].

        y: class names or labels, captions, layouts, pictures: what the conditioner's batch_from
        takes; None for an unconditional model, which makes `n` pictures. size: their side, or
        (H, W), if not the trained one; a condition beside z_t decides it, and may be of any size.
        sampler: "ddim" (eta: how much of DDPM's noise), "ddpm", "plms", "dpm_solver_pp", "euler"
        or "heun", with `steps` at the times of `spacing` (leading, trailing or linspace).
        guidance_scale: 1 is the plain conditional; guidance_rescale, guidance_interval: see
        `guided`. guide: wraps the denoiser, as `image_guided` does. edit: changes z between
        steps, as `keep_known` does. seed: an int for the same pictures again; or noise, a
        function like torch.randn_like.
        ValueErrors name what is wrong.
        """
        *_, last = self.steps(y, **options)
        return self.autoencoder.decode(last.z).clamp(-1.0, 1.0)
