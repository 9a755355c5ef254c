"""Element by element against diffusers, with random weights and replayed noise.

What differs there, and is set or handled here:
- q, k, v are three linear layers, one after the other; ours is one 1x1 convolution that keeps
  q, k and v of a head beside each other.
- `attention_head_dim` of UNet2DConditionModel is the *number* of heads, of UNet2DModel their width.
- The timestep embedding starts with the sines unless `flip_sin_to_cos`.
- The schedulers make their table in float32; ours is put in its place. `clip_sample` is on by
  default, which is wrong for latents.
- DDIM "leading" needs steps_offset=1 and set_alpha_to_one=False to be the official code's; each
  of its steps goes T // S back, so S must divide T.
- DDPM draws noise in the last step, too, where it weighs 1e-10 (a clamped variance).
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from minildm import Autoencoder, AutoencoderConfig, NoiseSchedule, UNet, UNetConfig, ddim, ddpm
from minildm.layers import Downsample, ResBlock, SelfAttention2d, SpatialTransformer, Upsample

with warnings.catch_warnings():
    # Deprecations inside diffusers and what it imports, none of which a test could mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    import diffusers
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        DDPMScheduler,
        UNet2DConditionModel,
        UNet2DModel,
    )

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # of the output's largest value
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=("float32", "float64"))
AE = AutoencoderConfig(
    z_channels=3, hid_z_channels=3, width=8, width_mult=(1, 2, 2), attn_levels=(1,), groups=4
)
UNET = UNetConfig(
    in_channels=3,
    out_channels=2,
    width=8,
    width_mult=(1, 2, 3),
    attn_levels=(1, 2),
    d_head=4,
    groups=4,
)


def pieces(module: nn.Module, kinds: tuple[type, ...]) -> list[nn.Module]:
    """The module's blocks of these kinds in the order in which they run."""
    if isinstance(module, kinds):
        return [module]
    return [piece for child in module.children() for piece in pieces(child, kinds)]


OURS = (ResBlock, SelfAttention2d, SpatialTransformer, Downsample, Upsample)


def their_pieces(module: nn.Module) -> Iterator[nn.Module]:
    """The same of one of their blocks: each residual block before its attention."""
    attentions = list(getattr(module, "attentions", None) or [])
    resnets = list(module.resnets)
    if "Mid" in type(module).__name__:
        yield from (resnets[0], *attentions, resnets[1])
    else:
        for i, resnet in enumerate(resnets):
            yield from (resnet, *attentions[i : i + 1])
    for name in ("downsamplers", "upsamplers"):
        yield from getattr(module, name, None) or []


def their_blocks(net: nn.Module, order: str) -> list[nn.Module]:
    blocks = [b for name in order.split() for b in _listed(getattr(net, name))]
    return [piece for block in blocks for piece in their_pieces(block)]


def _listed(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def copy(source: nn.Module, target: nn.Module) -> None:
    """One layer's weights; 1x1 convolutions and linear layers hold the same numbers."""
    for name in ("weight", "bias"):
        value, into = getattr(source, name), getattr(target, name)
        assert (value is None) == (into is None)
        if into is not None:
            into.data.copy_(value.reshape(into.shape))


def copy_res(ours: ResBlock, theirs: nn.Module) -> None:
    pairs = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
    if ours.to_emb is not None:
        pairs["to_emb"] = "time_emb_proj"
    if not isinstance(ours.skip, nn.Identity):
        pairs["skip"] = "conv_shortcut"
    assert (theirs.conv_shortcut is not None) == ("skip" in pairs)
    for mine, name in pairs.items():
        copy(getattr(ours, mine), getattr(theirs, name))


def copy_attention(ours: SelfAttention2d, theirs: nn.Module) -> None:
    copy(ours.norm, theirs.group_norm)
    copy(ours.to_out, theirs.to_out[0])
    for name in ("weight", "bias"):
        rows = getattr(ours.to_qkv, name).data
        rows = rearrange(rows, "(head qkv d) ... -> qkv (head d) ...", head=ours.heads, qkv=3)
        for part, layer in zip(rows, (theirs.to_q, theirs.to_k, theirs.to_v), strict=True):
            into = getattr(layer, name)
            into.data.copy_(part.reshape(into.shape))


def copy_transformer(ours: SpatialTransformer, theirs: nn.Module) -> None:
    for name in ("norm", "proj_in", "proj_out"):
        copy(getattr(ours, name), getattr(theirs, name))
    for mine, block in zip(ours.blocks, theirs.transformer_blocks, strict=True):
        for name in ("norm1", "norm2", "norm3"):
            copy(getattr(mine, name), getattr(block, name))
        for attn, name in ((mine.self_attn, "attn1"), (mine.cross_attn, "attn2")):
            for layer in ("to_q", "to_k", "to_v"):
                copy(getattr(attn, layer), getattr(getattr(block, name), layer))
            copy(attn.to_out, getattr(block, name).to_out[0])
        copy(mine.ff[0].proj, block.ff.net[0].proj)
        copy(mine.ff[2], block.ff.net[2])


def copy_blocks(ours: list[nn.Module], theirs: list[nn.Module]) -> None:
    for mine, block in zip(ours, theirs, strict=True):
        if isinstance(mine, ResBlock):
            copy_res(mine, block)
        elif isinstance(mine, SelfAttention2d):
            copy_attention(mine, block)
        elif isinstance(mine, SpatialTransformer):
            copy_transformer(mine, block)
        else:
            copy(mine.conv, block.conv)


def copy_autoencoder(ours: Autoencoder, theirs: AutoencoderKL) -> None:
    for mine, net, order in (
        (ours.encoder, theirs.encoder, "down_blocks mid_block"),
        (ours.decoder, theirs.decoder, "mid_block up_blocks"),
    ):
        copy_blocks(pieces(mine, OURS), their_blocks(net, order))
        copy(mine.conv_in, net.conv_in)
        copy(mine.norm_out, net.conv_norm_out)
        copy(mine.conv_out, net.conv_out)
    copy(ours.encoder.to_moments, theirs.quant_conv)
    copy(ours.decoder.from_z, theirs.post_quant_conv)


def copy_unet(ours: UNet, theirs: nn.Module) -> None:
    copy_blocks(pieces(ours, OURS), their_blocks(theirs, "down_blocks mid_block up_blocks"))
    copy(ours.time_mlp[0], theirs.time_embedding.linear_1)
    copy(ours.time_mlp[2], theirs.time_embedding.linear_2)
    copy(ours.down[0][0], theirs.conv_in)
    copy(ours.norm_out, theirs.conv_norm_out)
    copy(ours.conv_out, theirs.conv_out)


def same_parameters(ours: nn.Module, theirs: nn.Module) -> bool:
    return sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def autoencoders(dtype: torch.dtype, shaken: Any) -> tuple[Autoencoder, AutoencoderKL]:
    ours = shaken(Autoencoder(AE)).to(dtype)
    attends = [i in AE.attn_levels for i in range(len(AE.width_mult))]
    theirs = AutoencoderKL(
        block_out_channels=[AE.width * m for m in AE.width_mult],
        down_block_types=["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        up_block_types=["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in attends[::-1]],
        layers_per_block=AE.res_blocks,
        latent_channels=AE.z_channels,
        norm_num_groups=AE.groups,
    ).to(dtype)
    copy_autoencoder(ours, theirs)
    assert same_parameters(ours, theirs)
    return ours.eval(), theirs.eval()


@DTYPES
@torch.no_grad()
def test_the_encoder_is_theirs(dtype: torch.dtype, shaken: Any, randn: Any) -> None:
    ours, theirs = autoencoders(dtype, shaken)
    x = randn(2, 3, 16, 24, dtype=dtype)
    moments = theirs.encode(x).latent_dist
    posterior = ours.posterior(x)
    assert error(posterior.mean, moments.mean) < TOLERANCE[dtype]
    assert error(posterior.logvar, moments.logvar) < TOLERANCE[dtype]
    assert error(posterior.kl(), moments.kl()) < TOLERANCE[dtype]


@DTYPES
@torch.no_grad()
def test_the_decoder_is_theirs(dtype: torch.dtype, shaken: Any, randn: Any) -> None:
    ours, theirs = autoencoders(dtype, shaken)
    z = randn(2, 3, 4, 6, dtype=dtype)
    assert error(ours.decode(z), theirs.decode(z).sample) < TOLERANCE[dtype]


@torch.no_grad()
def test_scale_is_one_over_their_scaling_factor(shaken: Any, randn: Any) -> None:
    ours, theirs = autoencoders(torch.float64, shaken)
    theirs.config.scaling_factor = 0.18215
    ours.scale.fill_(1 / 0.18215)
    x = randn(1, 3, 8, 8, dtype=torch.float64)
    z = theirs.encode(x).latent_dist.mean * theirs.config.scaling_factor
    assert error(ours.encode(x, sample=False), z) < 1e-10
    assert error(ours.decode(z), theirs.decode(z / 0.18215).sample) < 1e-10


def unconditional(config: UNetConfig) -> UNet2DModel:
    attends = [i in config.attn_levels for i in range(len(config.width_mult))]
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    plain = plain if config.resblock_updown else ("DownBlock2D", "UpBlock2D")
    resample = "resnet" if config.resblock_updown else "conv"
    return UNet2DModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=[config.width * m for m in config.width_mult],
        down_block_types=["AttnDownBlock2D" if a else plain[0] for a in attends],
        up_block_types=["AttnUpBlock2D" if a else plain[1] for a in attends[::-1]],
        layers_per_block=config.res_blocks,
        attention_head_dim=config.d_head,
        norm_num_groups=config.groups,
        attn_norm_num_groups=config.groups,
        downsample_type=resample,
        upsample_type=resample,
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
        flip_sin_to_cos=True,
        freq_shift=0,
    )


def conditional(config: UNetConfig) -> UNet2DConditionModel:
    attends = [i in config.attn_levels for i in range(len(config.width_mult))]
    return UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=[config.width * m for m in config.width_mult],
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
        layers_per_block=config.res_blocks,
        attention_head_dim=config.heads,
        transformer_layers_per_block=config.depth,
        cross_attention_dim=config.d_cond,
        norm_num_groups=config.groups,
    )


VARIANTS = {
    "convolutions resize": UNET,
    "residual blocks resize, the time scales": replace(
        UNET, attn_levels=(1,), resblock_updown=True, scale_shift=True
    ),
}


@DTYPES
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_unet_with_self_attention_is_theirs(
    variant: str, dtype: torch.dtype, shaken: Any, randn: Any
) -> None:
    config = VARIANTS[variant]
    ours, theirs = shaken(UNet(config)).to(dtype), unconditional(config).to(dtype)
    copy_unet(ours, theirs)
    assert same_parameters(ours, theirs)
    z, t = randn(3, 3, 8, 12, dtype=dtype), torch.tensor([0, 17, 999])
    assert error(ours.eval()(z, t), theirs.eval()(z, t).sample) < TOLERANCE[dtype]


@DTYPES
@torch.no_grad()
def test_the_unet_with_cross_attention_is_theirs(
    dtype: torch.dtype, shaken: Any, randn: Any
) -> None:
    config = replace(UNET, heads=2, d_head=None, d_cond=5, depth=2)
    ours, theirs = shaken(UNet(config)).to(dtype), conditional(config).to(dtype)
    copy_unet(ours, theirs)
    assert same_parameters(ours, theirs)
    z, t = randn(3, 3, 8, 12, dtype=dtype), torch.tensor([0, 17, 999])
    tokens = randn(3, 7, 5, seed=1, dtype=dtype)
    assert error(ours.eval()(z, t, tokens), theirs.eval()(z, t, tokens).sample) < TOLERANCE[dtype]


class Recorded:
    """Noise that is drawn once and then replayed from the start."""

    def __init__(self) -> None:
        self.draw, self.past = torch.Generator().manual_seed(1), []

    def __call__(self, like: Tensor) -> Tensor:
        self.past.append(torch.randn(like.shape, generator=self.draw, dtype=like.dtype))
        return self.past[-1]


def scheduler(kind: type, schedule: NoiseSchedule, **options: Any) -> Any:
    theirs = kind(
        num_train_timesteps=schedule.T,
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        **options,
    )
    table = schedule.alphas_cumprod
    assert error(theirs.alphas_cumprod.double(), table) < 1e-5  # the same, in float32
    theirs.alphas_cumprod = table
    if kind is DDIMScheduler and not options.get("set_alpha_to_one", True):
        theirs.final_alpha_cumprod = table[0]
    return theirs


def wavy(z: Tensor, t: Tensor) -> Tensor:
    """A denoiser that is neither linear nor the same at all times."""
    return torch.sin(3 * z) + 0.1 * torch.cos(t.to(z.dtype) / 100).view(-1, 1, 1, 1)


SPACINGS = {
    "leading": {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
    "trailing": {"timestep_spacing": "trailing", "set_alpha_to_one": True},
}


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 8, 50, 500])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_walks_their_path(spacing: str, steps: int, eta: float, randn: Any) -> None:
    schedule = NoiseSchedule.scaled_linear(dtype=torch.float64)
    theirs = scheduler(DDIMScheduler, schedule, **SPACINGS[spacing])
    theirs.set_timesteps(steps)
    z_T, noise = randn(2, 1, 2, 2, dtype=torch.float64), Recorded()
    path = list(ddim(wavy, schedule, z_T, steps, eta=eta, spacing=spacing, noise=noise))
    assert [step.t for step in path] == theirs.timesteps.tolist()
    z = z_T
    for i, step in enumerate(path):
        drawn = noise.past[i] if eta else None
        eps = wavy(z, theirs.timesteps[i].expand(len(z)))
        out = theirs.step(eps, int(theirs.timesteps[i]), z, eta=eta, variance_noise=drawn)
        z = out.prev_sample
        assert error(step.z, z) < 1e-8
        assert error(step.z0_hat, out.pred_original_sample) < 1e-8


@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_ddpm_walks_their_path(steps: int, randn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = NoiseSchedule.scaled_linear(dtype=torch.float64)
    theirs = scheduler(DDPMScheduler, schedule, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    z_T, noise = randn(2, 1, 2, 2, dtype=torch.float64), Recorded()
    path = list(ddpm(wavy, schedule, z_T, steps, noise=noise))
    assert len(noise.past) == steps - 1
    assert [step.t for step in path] == theirs.timesteps.tolist()
    replayed = iter([*noise.past, torch.zeros_like(z_T)])
    module = diffusers.schedulers.scheduling_ddpm
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(replayed))
    z = z_T
    for step, t in zip(path, theirs.timesteps, strict=True):
        out = theirs.step(wavy(z, t.expand(len(z))), t, z)
        z = out.prev_sample
        assert error(step.z, z) < 1e-8
        assert error(step.z0_hat, out.pred_original_sample) < 1e-8


def test_noising_is_theirs(randn: Any) -> None:
    schedule = NoiseSchedule.scaled_linear(dtype=torch.float64)
    theirs = scheduler(DDPMScheduler, schedule)
    z0, eps = (randn(4, 2, 3, 3, seed=s, dtype=torch.float64) for s in (0, 1))
    t = torch.tensor([0, 1, 500, 999])
    z_t = schedule.q_sample(z0, t, eps)
    assert error(z_t, theirs.add_noise(z0, eps, t)) < 1e-12
    assert error(schedule.v_from(z0, t, eps), theirs.get_velocity(z0, eps, t)) < 1e-12
