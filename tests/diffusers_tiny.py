"""Tiny models and pipelines of diffusers with drawn weights, and runs of a pipeline there and here.

All noise is drawn in order from one generator on both sides, so that it is the same.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randn, shaken
from diffusers_copy import AutoencoderKL, VQModel, conditional, unconditional
from safetensors.torch import load_file
from tiny_clip import tiny_clip
from torch import Tensor, nn
from transformers import BertTokenizerFast, CLIPTextModel, CLIPTokenizer

from minildm import LatentDiffusion, UNetConfig

with warnings.catch_warnings():
    # Deprecations inside diffusers and what it imports, none of which a test could mend.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    import diffusers
    from diffusers.pipelines.ddim import pipeline_ddim
    from diffusers.pipelines.deprecated.latent_diffusion_uncond import (
        pipeline_latent_diffusion_uncond as uncond,
    )
    from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as text2im
    from diffusers.pipelines.latent_diffusion import (
        pipeline_latent_diffusion_superresolution as super_resolution,
    )
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion as stable
    from diffusers.schedulers import scheduling_ddim

LDM, SR, TEXT, SD, PIXELS = PIPELINES = (
    "LDMPipeline",
    "LDMSuperResolutionPipeline",
    "LDMTextToImagePipeline",
    "StableDiffusionPipeline",
    "DDIMPipeline",
)
DRAWING = (uncond, super_resolution, text2im, stable, pipeline_ddim, scheduling_ddim)
STEPS, PROMPTS = 5, ["a red dog", "a dog"]
UNET = UNetConfig(
    in_channels=3,
    out_channels=3,
    width=8,
    width_mult=(1, 2),
    res_blocks=1,
    attn_levels=(1,),
    d_head=4,
    groups=4,
)
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog", "##s", ",")


@contextmanager
def quiet() -> Iterator[None]:
    """Without deprecations inside diffusers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def first_stage(kind: type = VQModel, levels: int = 2, **changes: Any) -> nn.Module:
    """Three latent channels, attention in the last level, f = 2 ** (levels - 1)."""
    plain, last = levels - 1, ("Attn",)
    shape = {
        "block_out_channels": (8, *(16,) * plain),
        "down_block_types": [f"{a}DownEncoderBlock2D" for a in ("",) * plain + last],
        "up_block_types": [f"{a}UpDecoderBlock2D" for a in last + ("",) * plain],
        "latent_channels": 3,
        "norm_num_groups": 4,
    }
    shape |= {"num_vq_embeddings": 12} if kind is VQModel else {}
    return shaken(kind(**shape | changes)).eval()


def unet(config: UNetConfig = UNET, side: int = 4) -> nn.Module:
    """One of diffusers', for latents of that side."""
    model = unconditional(config) if config.d_cond is None else conditional(config)
    model.register_to_config(sample_size=side)
    return shaken(model, seed=1).eval()


def scheduler(**changes: Any) -> Any:
    """Steps as the official code's."""
    shape = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
    shape |= {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}
    return diffusers.DDIMScheduler(**shape | changes)


def bert(folder: Path) -> dict[str, Any]:
    """A small LDMBert and the words it reads."""
    shape = {"vocab_size": len(WORDS), "d_model": 12, "encoder_layers": 2, "encoder_ffn_dim": 48}
    shape |= {"encoder_attention_heads": 2, "head_dim": 4}
    model = shaken(text2im.LDMBertModel(text2im.LDMBertConfig(**shape)), seed=2).eval()
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return {"bert": model, "tokenizer": BertTokenizerFast(str(folder / "vocab.txt"))}


def clip(folder: Path) -> dict[str, Any]:
    """A small CLIP and the words it reads."""
    tiny_clip(folder)
    words = CLIPTokenizer.from_pretrained(folder)
    words.model_max_length = 10
    model = CLIPTextModel.from_pretrained(folder).eval()
    nothing = ("safety_checker", "feature_extractor", "image_encoder")
    parts = {"text_encoder": model, "tokenizer": words, "requires_safety_checker": False}
    return parts | dict.fromkeys(nothing)


def pipeline(name: str, folder: Path) -> Any:
    """A tiny random one; `folder` is for its words' files."""
    folder.mkdir()
    if name == LDM:
        parts = {"vqvae": first_stage(scaling_factor=0.5), "unet": unet()}
    elif name == PIXELS:
        parts = {"unet": unet()}
    elif name == SR:
        parts = {
            "vqvae": first_stage(),
            "unet": unet(UNetConfig(**vars(UNET) | {"in_channels": 6})),
        }
    elif name == TEXT:
        across = UNetConfig(**vars(UNET) | {"d_cond": 12, "heads": 2, "d_head": None})
        vae = first_stage(AutoencoderKL, levels=4, scaling_factor=0.4)
        parts = {"vqvae": vae, "unet": unet(across, side=2), **bert(folder)}
    else:
        across = UNetConfig(**vars(UNET) | {"d_cond": 16, "heads": 2, "d_head": None})
        vae = first_stage(AutoencoderKL, levels=3)
        parts = {"vae": vae, "unet": unet(across), **clip(folder)}
    with quiet():
        return getattr(diffusers, name)(**parts, scheduler=scheduler())


def read_pipeline(name: str, folder: Path) -> Any:
    """By diffusers."""
    with quiet():
        return getattr(diffusers, name).from_pretrained(folder)


def small_picture() -> Tensor:
    """Two in low resolution."""
    return randn(2, 3, 4, 6, seed=3).clamp(-1, 1)


def guided_by(name: str) -> float:
    return 3.0 if name in (TEXT, SD) else 1.0


@torch.no_grad()
def pictures_there(pipe: Any, name: str, eta: float, patch: pytest.MonkeyPatch) -> Tensor:
    """Two pictures of theirs: (2, 3, H, W) in [-1, 1]."""
    draw = torch.Generator().manual_seed(5)

    def randn_tensor(shape: tuple[int, ...], **_: Any) -> Tensor:
        return torch.randn(shape, generator=draw)

    for module in DRAWING:
        patch.setattr(module, "randn_tensor", randn_tensor)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "eta": eta, "output_type": "np"}
    if name in (LDM, PIXELS):
        options["batch_size"] = 2
    elif name == SR:
        options["image"] = small_picture()
    else:
        options |= {"prompt": PROMPTS, "guidance_scale": guided_by(name)}
    with quiet():
        x = torch.as_tensor(pipe(**options).images)
    return 2 * x.permute(0, 3, 1, 2) - 1


def pictures_here(model: LatentDiffusion, name: str, eta: float) -> Tensor:
    """The same of ours."""
    draw = torch.Generator().manual_seed(5)
    y = {LDM: None, PIXELS: None, SR: small_picture()}.get(name, PROMPTS)
    return model.sample(
        y,
        n=2,
        steps=STEPS,
        eta=eta,
        guidance_scale=guided_by(name),
        noise=lambda like: torch.randn(like.shape, generator=draw),
    )


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors below a folder, by file and name."""
    return {
        f"{path.relative_to(folder)}: {name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def change_json(path: Path, **changes: Any) -> None:
    """Entries of a JSON file set, or taken away where the value is `...`."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
