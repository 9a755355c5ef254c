"""One plain sentence for a wrong config, and for a wrong argument of `sample`."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import tiny_ldm_config, tiny_unet_config

from minildm.compression.autoencoder import AutoencoderConfig
from minildm.conditioning import ConditionerConfig, FrozenTextConfig, InpaintConfig, LowResConfig
from minildm.diffusion.latent_diffusion import LatentDiffusion, SamplingConfig
from minildm.diffusion.objective import ObjectiveConfig
from minildm.diffusion.schedule import ScheduleConfig
from minildm.training.configs import DataConfig

SCHEDULE, UNET, MODEL = ScheduleConfig(), tiny_unet_config(), tiny_ldm_config()
NONE, SAMPLING = ConditionerConfig(), SamplingConfig()
LOW_RES = {"low_res": torch.zeros(1, 3, 4, 8)}


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (SCHEDULE, {"T": 1, "zero_terminal_snr": True}, r"T=1 must lie in 2\.\.10000"),
        (SCHEDULE, {"beta_start": float("nan")}, "beta_start=nan must lie in"),
        (ObjectiveConfig(), {"snr_gamma": 0.0}, "snr_gamma=0.0 must lie"),
        (UNET, {"channels": 10**9}, "channels=1000000000"),
        (UNET, {"channel_mult": (1,) * 11}, "must hold 1 to 10 factors"),
        (UNET, {"attn_levels": (3,)}, r"attn_levels=\(3,\) must lie in 0\.\.1"),
        (UNET, {"heads": 2}, "heads=2, d_head=4: one of them"),
        (MODEL, {"conditioner": NONE}, r"d_cond=8 must be \(2, 2, None\)"),
        (MODEL, {"conditioner": InpaintConfig()}, r"in_channels=2, .* must be \(5, 2, None\)"),
        (MODEL, {"image_size": 18}, "image_size=18 must be a multiple of 4"),
        (MODEL, {"schedule": ScheduleConfig(zero_terminal_snr=True)}, "predict='eps' must be"),
        (SAMPLING, {"sampler": "ddmp"}, "sampler='ddmp' must be one of 'ddim', 'ddpm', 'plms'"),
    ],
)
def test_impossible_configs_are_refused(config: Any, wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **wrong)


@pytest.mark.parametrize(
    ("config", "field", "words"),
    [
        (AutoencoderConfig, "regularizer", "'kl', 'vq', 'identity'"),
        (FrozenTextConfig, "encoder", "'minilm', 'clip', 'bert'"),
        (ScheduleConfig, "kind", "'scaled_linear', 'linear', 'cosine', 'flow'"),
        (ObjectiveConfig, "predict", "'eps', 'z0', 'v'"),
        (ObjectiveConfig, "loss_weighting", "'simple', 'min_snr', 'vlb'"),
        (SamplingConfig, "spacing", "'leading', 'trailing', 'linspace'"),
        (DataConfig, "kind", "'emoji', 'scenes', 'crops', 'photos', 'mixed', 'folder'"),
    ],
)
def test_a_wrong_word_is_refused_by_each_config(config: type, field: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"{field}='huber' must be one of {words}"):
        config(**{field: "huber"})


@pytest.mark.parametrize(
    ("conditioner", "options", "message"),
    [
        (None, {"y": "purple"}, "class='purple' is not known"),
        (None, {"y": ["red", "blue"], "n": 3}, "n=3 must be the number of samples .*, 2"),
        (None, {"y": "red", "n": 0}, "n=0 must be"),
        (None, {"y": "red", "precision": "fp16"}, "precision='fp16' is not known; did you mean"),
        (None, {"y": "red", "steps": 1001}, r"steps=1001 must lie in 1\.\.T=1000"),
        (None, {"y": "red", "size": 10}, "image_size=10 must be a multiple of 4"),
        (LowResConfig(), {"y": LOW_RES, "size": 8}, r"size=\(8, 8\) must be \(8, 16\)"),
        (NONE, {"y": "red"}, "unconditional"),
        (NONE, {"guidance_scale": 2.0}, "kind='none' has no null condition"),
    ],
)
def test_impossible_samples_are_refused(conditioner: Any, options: dict, message: str) -> None:
    model = LatentDiffusion(tiny_ldm_config(conditioner)).train()
    with pytest.raises(ValueError, match=message):
        model.sample(**{"steps": 2, **options})
    assert model.training
