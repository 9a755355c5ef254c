"""Tiny configs, models and images that many tests share."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minildm.compression.autoencoder import AutoencoderConfig
from minildm.conditioning import ClassConfig, ConditionerConfig
from minildm.data.dataset import ImageDataset
from minildm.diffusion.latent_diffusion import LatentDiffusionConfig
from minildm.diffusion.unet import UNetConfig

CLASSES = ("red", "green", "blue")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shaken(module: nn.Module, seed: int = 0) -> Any:
    """The module with all weights redrawn, so that zero-initialised layers take part too."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 0.3 if parameter.ndim == 1 else 1.0 / parameter[0].numel() ** 0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=draw))
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return module


class TinyImages(ImageDataset):
    """Squares of one colour on white: label i has its colour in channel i."""

    def __init__(self, n: int = 12, size: int = 16) -> None:
        draw = torch.Generator().manual_seed(n)
        labels = torch.arange(n) % 3
        images = torch.full((n, 3, size, size), 255, dtype=torch.uint8)
        for image, label in zip(images, labels, strict=True):
            x, y = torch.randint(1, size // 2, (2,), generator=draw).tolist()
            side = int(torch.randint(size // 4, size // 2, (), generator=draw))
            image[:, y : y + side, x : x + side] = 0
            image[label, y : y + side, x : x + side] = 255
        super().__init__(
            images,
            name="tiny",
            labels=labels,
            classes=CLASSES,
            groups=("warm", "cold"),
            styles=("flat",),
            columns={"group": (labels > 0).long()},
        )


def tiny_autoencoder_config(**changes: Any) -> AutoencoderConfig:
    """f = 2, two latent channels."""
    config = AutoencoderConfig(
        z_channels=2, channels=8, channel_mult=(1, 2), num_res_blocks=1, groups=4, mid_attn=False
    )
    return replace(config, **changes)


def tiny_unet_config(**changes: Any) -> UNetConfig:
    """Two levels, tokens of width 8."""
    config = UNetConfig(
        in_channels=2,
        out_channels=2,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attn_levels=(1,),
        d_head=4,
        d_cond=8,
        groups=4,
    )
    return replace(config, **changes)


def tiny_ldm_config(
    conditioner: ConditionerConfig | None = None, **changes: Any
) -> LatentDiffusionConfig:
    """For 16 x 16 images; conditional on three classes unless another conditioner is given."""
    conditioner = conditioner or ClassConfig(classes=CLASSES, d_cond=8)
    unet = tiny_unet_config(
        in_channels=2 + conditioner.concat_channels(2), d_cond=conditioner.d_cond
    )
    config = LatentDiffusionConfig(
        autoencoder=tiny_autoencoder_config(), unet=unet, conditioner=conditioner, image_size=16
    )
    return replace(config, **changes)


def tiny_clip(folder: Path) -> Path:
    """Write a CLIP of width 16 that reads ten tokens, with its vocabulary, as OpenAI's is."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = [*"abdeorp", *(f"{letter}</w>" for letter in "abdegorp")]
    words = [*letters, "re", "red</w>", "do", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\nd o\n")
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "projection_dim": 8}
    text = shape | {"vocab_size": len(words), "max_position_embeddings": 10}
    text |= {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    images = shape | {"image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=images, projection_dim=8))
    shaken(model.text_model, seed=4)
    model.save_pretrained(folder)
    return folder
