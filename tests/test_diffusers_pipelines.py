"""Whole pipelines: the same pictures there and here, whoever made the model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers_tiny as tiny
import pytest
import torch
from diffusers_copy import AutoencoderKL, error
from diffusers_tiny import LDM, PIPELINES, PIXELS, SD, SR, TEXT, UNET

from minildm import (
    Autoencoder,
    AutoencoderConfig,
    ConditionerConfig,
    LatentDiffusion,
    LatentDiffusionConfig,
    ScheduleConfig,
    ddim,
    frozen_text,
    interop,
)
from minildm.interop.diffusers_folders import read_scheduler
from minildm.losses import ObjectiveConfig
from minildm.tokenizer import CaptionTokenizer

KL = AutoencoderConfig(z_channels=3, width=8, width_mult=(1, 2), res_blocks=1, groups=4)
VQ = replace(KL, regularizer="vq", codebook_size=12, hid_z_channels=5)
WORDS = CaptionTokenizer.trained_on(tiny.PROMPTS)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("name", PIPELINES)
def test_their_pipeline_gives_the_same_pictures_here(
    name: str, eta: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tiny.pipeline(name, tmp_path / "words")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = interop.load_diffusers(tmp_path / "theirs")
    truth = tiny.pictures_there(theirs, name, eta, monkeypatch)
    assert truth.std() > 0.1
    assert error(tiny.pictures_here(ours, name, eta), truth) < 1e-4


@pytest.mark.parametrize("name", PIPELINES)
def test_their_pipeline_saved_here_is_the_same(name: str, tmp_path: Path) -> None:
    theirs = tiny.pipeline(name, tmp_path / "words")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = interop.load_diffusers(tmp_path / "theirs")
    interop.save_diffusers(ours, tmp_path / "ours")
    there, here = tiny.tensors_in(tmp_path / "theirs"), tiny.tensors_in(tmp_path / "ours")
    assert there.keys() == here.keys()
    unused = [name for name in there if "to_logits" in name]  # the scores of next words
    assert all(torch.equal(there[k], here[k]) for k in there if k not in unused)
    assert len(unused) == (2 if name == TEXT else 0)
    again = interop.load_diffusers(tmp_path / "ours")
    moved = replace(ours.config.conditioner, encoder_path=again.config.conditioner.encoder_path)
    assert again.config == replace(ours.config, conditioner=moved)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())


def made_here(name: str, shaken: Any, clip: Path) -> LatentDiffusion:
    """A small model of ours for which diffusers has that pipeline."""
    tau, first_stage, unet, size = ConditionerConfig(p_uncond=0.0), KL, UNET, 8
    tokens = {"heads": 2, "d_head": None}
    if name == SR:
        tau = replace(tau, concat="low_res")
        first_stage, unet = VQ, replace(UNET, in_channels=6)
    elif name == PIXELS:
        first_stage = AutoencoderConfig(regularizer="identity", z_channels=3)
    elif name == TEXT:
        shape = {"d_cond": 12, "heads": 2, "d_head": 4, "length": 77, "vocab_size": len(WORDS)}
        tau = replace(tau, kind="text", **shape)
        first_stage, unet, size = replace(KL, width_mult=(1, 2, 2, 2)), replace(UNET, d_cond=12), 16
    elif name == SD:
        clip_of = {"encoder": "clip", "encoder_path": str(clip), "d_cond": 16, "length": 10}
        tau, unet = replace(tau, kind="text", **clip_of), replace(UNET, d_cond=16, **tokens)
    config = LatentDiffusionConfig(
        autoencoder=first_stage,
        unet=unet,
        conditioner=tau,
        schedule=ScheduleConfig(b0=0.001, b1=0.02, kind="linear"),
        objective=ObjectiveConfig(predict="v"),
        image_size=size,
    )
    model = shaken(LatentDiffusion(config)).eval()
    if name != PIXELS:
        model.autoencoder.scale.fill_(1.7)
        model.autoencoder.shift.fill_(0.4)
    if name == TEXT:
        model.conditioner.set_tokenizer(WORDS)
    return model


@pytest.mark.parametrize("name", PIPELINES)
def test_our_model_gives_the_same_pictures_there(
    name: str, tmp_path: Path, shaken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen_text.frozen_text.cache_clear()
    (tmp_path / "clip").mkdir()
    tiny.tiny_clip(tmp_path / "clip")
    ours = made_here(name, shaken, tmp_path / "clip")
    interop.save_diffusers(ours, tmp_path / "ours")
    theirs = tiny.read_pipeline(name, tmp_path / "ours")
    pictures = tiny.pictures_here(ours, name, 0.7)
    assert pictures.std() > 0.1
    assert error(tiny.pictures_there(theirs, name, 0.7, monkeypatch), pictures) < 1e-4
    again = interop.load_diffusers(tmp_path / "ours")
    assert error(tiny.pictures_here(again, name, 0.7), pictures) < 1e-4


def test_super_resolution_runs_on_a_kl_first_stage_too(
    tmp_path: Path, shaken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its pipeline names VQModel, and reads no scale."""
    config = replace(made_here(SR, shaken, tmp_path).config, autoencoder=KL)
    ours = shaken(LatentDiffusion(config)).eval()
    ours.autoencoder.scale.fill_(0.3)
    interop.save_diffusers(ours, tmp_path / "ours")
    theirs = tiny.read_pipeline(SR, tmp_path / "ours")
    truth = tiny.pictures_there(theirs, SR, 0.0, monkeypatch)
    assert error(tiny.pictures_here(ours, SR, 0.0), truth) < 1e-4
    x = tiny.randn(2, 3, 8, 8).clamp(-1, 1)
    with torch.no_grad():
        mean, std = (getattr(theirs.vqvae.encode(x).latent_dist, k) for k in ("mean", "std"))
        assert error(ours.autoencoder.encode(x, sample=False), mean) < 1e-5
        assert error(ours.autoencoder.posterior(x).logvar.div(2).exp() / 0.3, std) < 1e-5


SCHEDULES = {
    "the paper's": {},
    "linear": {"beta_schedule": "linear", "num_train_timesteps": 50},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "no signal at T": {"rescale_betas_zero_snr": True, "prediction_type": "sample"},
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_their_schedule_is_ours(case: str, tmp_path: Path) -> None:
    theirs = tiny.scheduler(**SCHEDULES[case])
    theirs.save_pretrained(tmp_path)
    ours, objective = read_scheduler(tmp_path / "scheduler_config.json")
    assert (objective.predict == "z0") == (case == "no signal at T")
    table = ours.build().alphas_cumprod
    assert table.shape == theirs.alphas_cumprod.shape
    assert error(table, theirs.alphas_cumprod) < 1e-5


def test_a_scale_that_super_resolution_does_not_read_is_not_read_here(tmp_path: Path) -> None:
    theirs = tiny.pipeline(SR, tmp_path / "words")
    assert theirs.vqvae.config.scaling_factor == 0.18215  # its default; the pipeline ignores it
    theirs.save_pretrained(tmp_path / "theirs")
    assert interop.load_diffusers(tmp_path / "theirs").autoencoder.scale == 1
    alone = interop.load_diffusers(tmp_path / "theirs/vqvae")
    assert alone.scale.item() == pytest.approx(1 / 0.18215)


def test_the_last_times_come_first_where_z_T_holds_no_signal(
    tmp_path: Path, shaken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = made_here(LDM, shaken, tmp_path).config
    stretched = replace(config.schedule, zero_terminal_snr=True)
    ours = shaken(LatentDiffusion(replace(config, schedule=stretched))).eval()
    interop.save_diffusers(ours, tmp_path / "ours")
    theirs = tiny.read_pipeline(LDM, tmp_path / "ours")
    truth = tiny.pictures_there(theirs, LDM, 0.0, monkeypatch)
    assert error(tiny.pictures_here(ours, LDM, 0.0), truth) < 1e-4
    assert interop.load_diffusers(tmp_path / "ours").config.schedule == stretched


WITHOUT_PIPELINE = {
    "classes": {"kind": "class", "classes": ("a", "b"), "d_cond": 12},
    "captions": {"kind": "text", "d_cond": 12, "length": 9, "vocab_size": len(WORDS)},
    "tokens": {"kind": "ids", "d_cond": 12, "length": 3, "vocab_size": 5, "p_uncond": 0.0},
    "layouts": {"kind": "layout", "classes": ("a", "b"), "d_cond": 12, "grid": 4},
    "holes": {"concat": "inpaint", "p_uncond": 0.0},
    "maps": {"concat": "semantic", "labels": ("a", "b"), "stages": 1},
}


@pytest.mark.parametrize("case", WITHOUT_PIPELINE)
@torch.no_grad()
def test_without_a_pipeline_each_model_runs_there_by_itself(
    case: str, tmp_path: Path, shaken: Any, randn: Any
) -> None:
    tau = ConditionerConfig(**WITHOUT_PIPELINE[case])
    d_cond = None if tau.kind == "none" else 12
    unet = replace(UNET, in_channels=3 + tau.concat_channels(3), d_cond=d_cond)
    config = LatentDiffusionConfig(autoencoder=KL, unet=unet, conditioner=tau, image_size=8)
    ours = shaken(LatentDiffusion(config)).eval()
    ours.autoencoder.scale.fill_(0.6)
    if tau.kind == "text":
        ours.conditioner.set_tokenizer(WORDS)
    interop.save_diffusers(ours, tmp_path / "ours")
    assert not (tmp_path / "ours/model_index.json").exists()
    again = interop.load_diffusers(tmp_path / "ours")
    assert again.config == replace(config, image_size=8)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in ours.state_dict().items())
    kind = tiny.diffusers.UNet2DConditionModel if d_cond else tiny.diffusers.UNet2DModel
    with tiny.quiet():
        network = kind.from_pretrained(tmp_path / "ours/unet").eval()
        vae = AutoencoderKL.from_pretrained(tmp_path / "ours/vae").eval()
        steps = tiny.diffusers.DDIMScheduler.from_pretrained(tmp_path / "ours/scheduler")
    z, beside = randn(2, 3, 4, 4), randn(2, unet.in_channels - 3, 4, 4, seed=1)
    tokens = {"encoder_hidden_states": randn(2, 3, 12, seed=2)} if d_cond else {}
    c = ours.conditioner.null(2) if tau.kind in ("class", "text", "layout") else None
    if c is not None:
        tokens["encoder_hidden_states"] = c.tokens
        assert torch.equal(again.conditioner.null(2).tokens, c.tokens)
    steps.set_timesteps(tiny.STEPS)
    theirs = z
    for t in steps.timesteps:
        eps = network(torch.cat([theirs, beside], 1), t, **tokens).sample
        theirs = steps.step(eps, t, theirs).prev_sample

    def denoise(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return ours.unet(torch.cat([z, beside], 1), t, tokens.get("encoder_hidden_states"))

    *_, last = ddim(denoise, ours.schedule, z, tiny.STEPS)
    assert error(theirs, last.z) < 1e-4
    pictures = vae.decode(theirs / vae.config.scaling_factor).sample
    assert error(pictures, ours.autoencoder.decode(last.z)) < 1e-4


def test_the_parts_of_a_model_are_taken_as_they_are(shaken: Any) -> None:
    first = Autoencoder(KL)
    config = LatentDiffusionConfig(autoencoder=KL, unet=UNET, image_size=8)
    drawn = LatentDiffusion(config)
    parts = {"unet": drawn.unet, "conditioner": drawn.conditioner}
    model = LatentDiffusion(config, autoencoder=first, **parts)
    assert model.autoencoder is first
    assert model.unet is drawn.unet
    assert not any(p.requires_grad for p in first.parameters())
