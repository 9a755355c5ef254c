"""Numbers equal diffusers', element by element, with random weights and replayed noise.

Our models are saved for diffusers and theirs read by us: a tensor in a wrong place would show.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randn, shaken, tiny_autoencoder_config, tiny_unet_config
from interop import diffusers_models as tiny
from interop import official_models as official
from interop.diffusers_models import DDIM, DDPM, INPAINT, LDM, STABLE, change_json, error, quiet

from minildm import interop
from minildm.compression.autoencoder import Autoencoder
from minildm.conditioning import IdsConfig
from minildm.diffusion.unet import UNet
from minildm.interop.diffusers import PIPELINES

with quiet():
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
    )

KL = tiny_autoencoder_config(z_channels=3, mid_attn=True)
VQ = replace(KL, regularizer="vq", codebook_size=32, hid_z_channels=5, vq_legacy=True)
AUTOENCODERS = {
    "kl, attention": replace(KL, channel_mult=(1, 2, 2), attn_levels=(1,), num_res_blocks=2),
    "kl, no attention": replace(KL, mid_attn=False),
    "vq": VQ,
    "vq, one level": replace(VQ, channel_mult=(1,), attn_levels=(0,), mid_attn=False),
}
UNET = replace(tiny_unet_config(), in_channels=3, out_channels=3, d_cond=None)
UNET = replace(UNET, channel_mult=(1, 2, 3), attn_levels=(0, 2), d_head=8, num_res_blocks=2)
ACROSS = replace(UNET, d_cond=5, depth=2, heads=2, d_head=None)
UNETS = {
    "self-attention": UNET,
    "one residual block, no level attends": replace(UNET, attn_levels=(), num_res_blocks=1),
    "resblock_updown, scale_shift": replace(UNET, resblock_updown=True, scale_shift=True),
    "cross-attention": ACROSS,
    "cross-attention, heads by width": replace(ACROSS, heads=None, d_head=4),
    "cross-attention, scale_shift": replace(ACROSS, scale_shift=True, attn_levels=(1,)),
}


def theirs_of(ours: Any, folder: Path) -> Any:
    """diffusers' model of ours."""
    interop.save_diffusers(ours, folder)
    return tiny.read(folder).eval()


@pytest.mark.parametrize("name", AUTOENCODERS)
@torch.no_grad()
def test_a_first_stage_equals_theirs(name: str, tmp_path: Path) -> None:
    config = AUTOENCODERS[name]
    ours = shaken(Autoencoder(config)).eval()
    ours.scale.fill_(1.7)
    ours.shift.fill_(-0.6 if config.regularizer == "kl" else 0)
    theirs = theirs_of(ours, tmp_path / "theirs").double()
    again, ours = interop.load_diffusers(tmp_path / "theirs").double(), ours.double()
    assert official.same(again.state_dict(), ours.state_dict())
    x, encode = randn(2, 3, 16, 24, dtype=torch.float64).clamp(-1, 1), theirs.encode
    if config.regularizer == "kl":
        moments, posterior = encode(x).latent_dist, ours.posterior(x)
        z = moments.mean
        assert error(posterior.logvar, moments.logvar) < 1e-10
        assert error(posterior.kl(), moments.kl()) < 1e-10
        noise = randn(*z.shape, seed=3, dtype=torch.float64)
        drawn = ours.encode(x, noise=lambda _: noise) * ours.scale + ours.shift
        assert error(drawn, z + moments.std * noise) < 1e-10
    else:
        z = encode(x).latents
        codes, loss, (_, _, indices) = theirs.quantize(z)
        quantized = ours.decoder.quantizer(z)
        assert torch.equal(quantized.indices.flatten(), indices)
        assert error(quantized.z, codes) < 1e-10 and error(quantized.loss, loss) < 1e-10
    scaled = (z - ours.shift) * theirs.config.scaling_factor
    assert error(ours.encode(x, sample=False), scaled) < 1e-7  # a float32 factor
    z = randn(2, 3, 8, 6, dtype=torch.float64)
    assert error(ours.decoder(z), theirs.decode(z).sample) < 1e-10


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_equals_theirs(name: str, tmp_path: Path) -> None:
    config = UNETS[name]
    ours = shaken(UNet(config)).eval()
    theirs, ours = theirs_of(ours, tmp_path / "theirs").double(), ours.double()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    tokens = [randn(2, 7, 5, seed=1, dtype=torch.float64)] if config.d_cond else []
    z = randn(2, 3, 8, 12, dtype=torch.float64).requires_grad_()
    t = torch.tensor([3, 700])
    out, truth = ours(z, t, *tokens), theirs(z, t, *tokens).sample
    assert error(out, truth) < 1e-10
    gradients = [torch.autograd.grad(y.square().sum(), z)[0] for y in (out, truth)]
    assert error(*gradients) < 1e-9


# --- official tensors, brought into diffusers' models by diffusers' own conversion ---


@pytest.mark.parametrize("heads", [{}, {"heads": 4, "d_head": None}], ids=("width", "number"))
@torch.no_grad()
def test_an_official_unet_computes_what_diffusers_computes(
    heads: dict[str, Any], tmp_path: Path
) -> None:
    ours = shaken(UNet(replace(official.UNET, d_cond=5, depth=2, **heads))).eval()
    theirs = shaken(theirs_of(ours, tmp_path / "theirs"), seed=7)
    tensors = official.saved(ours, tmp_path)[1]
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    theirs.load_state_dict(convert_ldm_unet_checkpoint(whole, dict(theirs.config)))
    z, t, tokens = randn(2, 3, 8, 16), torch.tensor([3, 900]), randn(2, 7, 5, seed=1)
    assert error(ours(z, t, tokens), theirs(z, t, tokens).sample) < 1e-5


@pytest.mark.parametrize("vq", [{}, {"regularizer": "vq", "codebook_size": 32, "vq_legacy": True}])
@torch.no_grad()
def test_an_official_first_stage_computes_what_diffusers_computes(
    vq: dict[str, Any], tmp_path: Path
) -> None:
    levels = {"channel_mult": (1, 2, 2), "num_res_blocks": 2}
    ours = shaken(Autoencoder(replace(official.KL, **levels, **vq))).eval()
    theirs = shaken(theirs_of(ours, tmp_path / "theirs"), seed=7)
    tensors = official.saved(ours, tmp_path)[1]
    state = convert_ldm_vae_checkpoint(dict(tensors), dict(theirs.config))
    if vq:
        state["quantize.embedding.weight"] = tensors["quantize.embedding.weight"]
    theirs.load_state_dict(state)
    x, z = randn(1, 3, 8, 16).clamp(-1, 1), randn(1, 3, 2, 4)
    encoded = theirs.encode(x)
    truth = encoded.latents if vq else encoded.latent_dist.mean
    assert error(ours.encode(x, sample=False), truth) < 1e-5
    assert error(ours.decode(z), theirs.decode(z).sample) < 1e-5


def test_each_official_attention_and_feed_forward_is_after_its_norm(tmp_path: Path) -> None:
    """They alternate in one list."""
    ours = shaken(IdsConfig(d_cond=12, vocab_size=40, length=7).build())
    tensors = official.saved(ours, tmp_path)[1]
    for i, block in enumerate(ours.network.blocks):
        attention, mlp = (f"transformer.attn_layers.layers.{2 * i + k}" for k in (0, 1))
        assert torch.equal(tensors[f"{attention}.0.weight"], block.norm1.weight)
        assert torch.equal(tensors[f"{mlp}.0.weight"], block.norm2.weight)
        assert torch.equal(tensors[f"{attention}.1.to_q.weight"], block.attn.to_q.weight)


# --- whole pipelines ---


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_gives_the_same_images_there_and_here(name: str, tmp_path: Path) -> None:
    theirs = tiny.pipeline(name, tmp_path / "words")
    theirs.save_pretrained(tmp_path / "theirs")
    if name == STABLE:  # whose pipeline turns it off
        change_json(tmp_path / "theirs/scheduler/scheduler_config.json", clip_sample=True)
    ours = interop.load_diffusers(tmp_path / "theirs")
    eta = 0.7 if name != INPAINT else 0.0  # it draws other noise on the way
    images = tiny.sampled_here(ours, name, eta)
    assert images.std() > 0.1
    assert error(tiny.sampled_there(theirs, name, eta), images) < 1e-4
    interop.save_diffusers(ours, tmp_path / "ours")
    again = tiny.read(tmp_path / "ours")
    assert type(again).__name__ == (DDIM if name == DDPM else name)
    if name != DDPM:
        assert error(tiny.sampled_there(again, name, eta), images) < 1e-4
    assert interop.load_diffusers(tmp_path / "ours/unet").config == ours.unet.config


@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "linear", "num_train_timesteps": 50, "prediction_type": "sample"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    ids=str,
)
def test_a_schedule_is_read_and_written(changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = tiny.pipeline(LDM, tmp_path / "words")
    theirs.scheduler = tiny.scheduler(**changes)
    theirs.save_pretrained(tmp_path / "theirs")
    model = interop.load_diffusers(tmp_path / "theirs")
    assert (model.config.objective.predict == "v") == ("rescale_betas_zero_snr" in changes)
    assert error(model.schedule.alphas_cumprod, theirs.scheduler.alphas_cumprod) < 1e-5
    interop.save_diffusers(model, tmp_path / "ours")
    read = tiny.read(tmp_path / "ours").scheduler
    for key, value in changes.items():
        assert read.config[key] == value
    assert torch.equal(read.alphas_cumprod, theirs.scheduler.alphas_cumprod)
