"""Tiny models and pipelines of diffusers with random weights, run there and here."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from helpers import randn, shaken, tiny_clip
from torch import Tensor, nn
from transformers import BertTokenizerFast, CLIPTextModel, CLIPTokenizer

with warnings.catch_warnings():  # deprecations inside diffusers
    warnings.simplefilter("ignore")
    import diffusers
    from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as text2im

from minildm.interop.diffusers import DDIM, DDPM, INPAINT, LDM, STABLE, SUPER, TEXT

CARDS = ("model_index.json", "config.json")
STEPS, PROMPTS = 5, ["a red dog", "a dog"]
SMALL = randn(2, 3, 4, 6, seed=3).clamp(-1, 1)
GUIDANCE = {TEXT: 3.0, STABLE: 3.0, INPAINT: 3.0}
HOLED = {"image": randn(2, 3, 16, 16).clamp(-1, 1), "mask": torch.eye(16).expand(2, 1, 16, 16)}
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog", "##s", ",")


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def first_stage(kind: str = "VQModel", levels: int = 2, **changes: Any) -> nn.Module:
    """Three latent channels, attention in the last level, f = 2 ** (levels - 1)."""
    plain, last = ("",) * (levels - 1), ("Attn",)
    shape = {
        "block_out_channels": (8, *(16,) * (levels - 1)),
        "down_block_types": [f"{a}DownEncoderBlock2D" for a in plain + last],
        "up_block_types": [f"{a}UpDecoderBlock2D" for a in last + plain],
        "latent_channels": 3,
        "norm_num_groups": 4,
    }
    shape |= {"num_vq_embeddings": 12} if kind == "VQModel" else {}
    return shaken(getattr(diffusers, kind)(**shape | changes)).eval()


def unet(side: int = 4, **changes: Any) -> nn.Module:
    """Two levels, attention in the second; with cross_attention_dim cross-attention."""
    across = "cross_attention_dim" in changes
    shape = {
        "sample_size": side,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", f"{'Cross' * across}AttnDownBlock2D"),
        "up_block_types": (f"{'Cross' * across}AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2 if across else 4,
    }
    shape |= {} if across else {"attn_norm_num_groups": 4, "flip_sin_to_cos": True, "freq_shift": 0}
    kind = diffusers.UNet2DConditionModel if across else diffusers.UNet2DModel
    return shaken(kind(**shape | changes), seed=1).eval()


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
    words = CLIPTokenizer.from_pretrained(tiny_clip(folder))
    words.model_max_length = 10
    parts = {"text_encoder": CLIPTextModel.from_pretrained(folder).eval(), "tokenizer": words}
    nothing = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    return parts | nothing | {"requires_safety_checker": False}


def pipeline(name: str, folder: Path) -> Any:
    """A tiny random one; `folder` is for the files of its words."""
    folder.mkdir()
    parts = {
        LDM: lambda: {
            "vqvae": first_stage(scaling_factor=0.5, vq_embed_dim=2),
            "unet": unet(in_channels=2, out_channels=2),
        },
        SUPER: lambda: {"vqvae": first_stage(), "unet": unet(in_channels=6)},
        TEXT: lambda: {
            "vqvae": first_stage("AutoencoderKL", levels=4, layers_per_block=2, scaling_factor=0.4),
            "unet": unet(side=2, cross_attention_dim=12),
            **bert(folder),
        },
        STABLE: lambda: {
            "vae": first_stage("AutoencoderKL", levels=3),
            "unet": unet(cross_attention_dim=16),
            **clip(folder),
        },
        INPAINT: lambda: {
            "vae": first_stage("AutoencoderKL", levels=3, latent_channels=4),
            "unet": unet(cross_attention_dim=16, in_channels=9, out_channels=4),
            **clip(folder),
        },
        DDIM: lambda: {"unet": unet(), "scheduler": scheduler(clip_sample=True)},
        DDPM: lambda: {"unet": unet(), "scheduler": diffusers.DDPMScheduler(STEPS)},
    }
    made = {"scheduler": scheduler()} | parts[name]()
    if name == INPAINT:  # they draw the latent of the given image
        made["vae"].quant_conv.weight.data[4:], made["vae"].quant_conv.bias.data[4:] = 0, -30
    with quiet():
        return getattr(diffusers, name)(**made)


def read(folder: Path) -> Any:
    """A saved model or pipeline, by diffusers."""
    card = next(path for path in map(folder.joinpath, CARDS) if path.is_file())
    kind = json.loads(card.read_text())["_class_name"]
    with quiet():
        return getattr(diffusers, kind).from_pretrained(folder)


@torch.no_grad()
def sampled_there(pipe: Any, name: str, eta: float) -> Tensor:
    """Two images of theirs: (2, 3, H, W) in [-1, 1]; all noise is torch's next."""
    torch.manual_seed(5)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": STEPS, "eta": eta, "output_type": "np"}
    if name in (LDM, DDIM, DDPM):
        options["batch_size"] = 2
    elif name == SUPER:
        options["image"] = SMALL
    else:
        options |= {"prompt": PROMPTS, "guidance_scale": GUIDANCE[name]}
    if name == INPAINT:
        options |= {"image": HOLED["image"], "mask_image": 1 - HOLED["mask"]}
    if name == DDPM:
        del options["eta"]
    with quiet():
        return 2 * torch.as_tensor(pipe(**options).images).permute(0, 3, 1, 2) - 1


def sampled_here(model: Any, name: str, eta: float) -> Tensor:
    """The same of ours."""
    torch.manual_seed(5)
    y = {TEXT: PROMPTS, STABLE: PROMPTS, SUPER: SMALL, INPAINT: {**HOLED, "y": PROMPTS}}.get(name)
    options = {"steps": STEPS, "eta": eta, "guidance_scale": GUIDANCE.get(name, 1.0)}
    options = {} if name == DDPM else options  # its own
    return model.sample(y, n=2, **options, noise=torch.randn_like)


def change_json(path: Path, **changes: Any) -> None:
    """Set entries of a JSON file; `...` removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
