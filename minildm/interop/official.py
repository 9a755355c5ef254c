"""The published models by name: from their official files where they are, else small and drawn."""

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from minildm.diffusion import LatentDiffusion, LatentDiffusionConfig
from minildm.interop.compvis import load_compvis
from minildm.interop.compvis_saving import save_compvis
from minildm.published import PUBLISHED

_SERVER = "https://ommer-lab.com/files/latent-diffusion/"


class Files(NamedTuple):
    """Where a model's files are published, and where the official code expects them."""

    url: str
    checkpoint: str  # in the folder of the official repository, with config.yaml beside it
    config: str = "config.yaml"


def _ldm(name: str, url: str, checkpoint: str = "model.ckpt", config: str = "") -> Files:
    folder = f"models/ldm/{name}"
    return Files(_SERVER + url, f"{folder}/{checkpoint}", config or f"{folder}/config.yaml")


FILES: dict[str, Files] = {
    "celeba256": _ldm("celeba256", "celeba.zip"),
    "ffhq256": _ldm("ffhq256", "ffhq.zip"),
    "lsun_beds256": _ldm("lsun_beds256", "lsun_bedrooms.zip"),
    "lsun_churches256": _ldm("lsun_churches256", "lsun_churches.zip"),
    "cin256": _ldm("cin256", "cin.zip"),
    "cin256-v2": _ldm(
        "cin256-v2",
        "nitro/cin/model.ckpt",
        config="configs/latent-diffusion/cin256-v2.yaml",
    ),
    "text2img256": _ldm("text2img256", "text2img.zip"),
    "txt2img-1p4B": _ldm(
        "text2img-large",
        "nitro/txt2img-f8-large/model.ckpt",
        config="configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    ),
    "layout2img-openimages256": _ldm("layout2img-openimages256", "layout2img_model.zip"),
    "semantic_synthesis256": _ldm("semantic_synthesis256", "semantic_synthesis256.zip"),
    "semantic_synthesis512": _ldm("semantic_synthesis512", "semantic_synthesis.zip"),
    "bsr_sr": _ldm("bsr_sr", "sr_bsr.zip"),
    "inpainting_big": _ldm("inpainting_big", "inpainting_big.zip", "last.ckpt"),
}


class Found(NamedTuple):
    """A model, and whether its weights are the published ones; `said` says so in a sentence."""

    model: LatentDiffusion
    real: bool
    said: str


def official_model(
    name: str, folder: str | os.PathLike[str] | None = None, *, seed: int = 0
) -> Found:
    """A published model from the official repository's `folder`, or a small stand-in.

    Where the folder or the checkpoint in it is missing, a model of the same blocks with `small`
    sizes and drawn weights takes its place: written and read again as official files, it goes
    the same way. Raises ValueError for an unknown name, and as `load_compvis`.
    """
    if name not in FILES:
        raise ValueError(f"name={name!r} is not known; known: {', '.join(FILES)}")
    files = FILES[name]
    if folder is not None and (Path(folder) / files.checkpoint).is_file():
        root = Path(folder)
        model = load_compvis(root / files.config, root / files.checkpoint)
        return Found(model, True, f"{name}: the published weights, {files.checkpoint}")
    where = "no folder was named" if folder is None else f"{files.checkpoint} is not in {folder}"
    return Found(
        stand_in(name, seed=seed),
        False,
        f"{name}: {where}; a small model with drawn weights stands in. The published ones are at "
        f"{files.url}",
    )


def stand_in(name: str, *, seed: int = 0) -> LatentDiffusion:
    """`small` of a published model with weights drawn, by way of official files."""
    with torch.random.fork_rng([]), tempfile.TemporaryDirectory() as place:
        torch.manual_seed(seed)
        model = LatentDiffusion(small(PUBLISHED[name]))
        for parameter in model.parameters():  # zeros at the start would draw nothing
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        path = Path(place) / "model.ckpt"
        save_compvis(model, path)
        return load_compvis(path.with_suffix(".yaml"), path)


def small(config: LatentDiffusionConfig) -> LatentDiffusionConfig:
    """The same blocks, a few channels wide: a model that runs anywhere in a second."""
    autoencoder = replace(config.autoencoder, width=32, res_blocks=1)
    conditioner, d_cond = config.conditioner, config.unet.d_cond
    if d_cond is not None:
        conditioner, d_cond = replace(conditioner, d_cond=32, depth=1), 32
    unet = replace(config.unet, width=32, res_blocks=1, d_cond=d_cond, checkpoint=False)
    side = 16 * 2 ** (len(autoencoder.width_mult) - 1)  # latents of 16 x 16
    return replace(
        config, autoencoder=autoencoder, unet=unet, conditioner=conditioner, image_size=side
    )
