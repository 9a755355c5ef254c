"""The published models by name: from their official files if these exist, else small stand-ins."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from minildm.conditioning import look_up
from minildm.diffusion.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from minildm.interop.compvis import load_compvis, save_compvis
from minildm.interop.weights import TABLES, PathLike
from minildm.training.presets import PUBLISHED


class Files(NamedTuple):
    """Where a model's files are published, and where the official repository expects them."""

    url: str
    checkpoint: str
    config: str


FILES: dict[str, Files] = {name: Files(*files) for name, files in TABLES["files"].items()}


def official_model(
    name: str, folder: PathLike | None = None, *, seed: int = 0
) -> tuple[LatentDiffusion, bool, str]:
    """A published model from the official repository's `folder`, or a small stand-in; whether its
    weights are the published ones; and a sentence that says so.

    Raises ValueError for an unknown name, and as `load_compvis`.
    """
    look_up(name, list(FILES), "name")
    files, root = FILES[name], Path(folder or "")
    if folder is not None and (root / files.checkpoint).is_file():
        model = load_compvis(root / files.config, root / files.checkpoint)
        return model, True, f"{name}: the published weights, {files.checkpoint}"
    where = f"{files.checkpoint} is not in {folder}" if folder else "no folder was given"
    said = f"{name}: {where}; a small model with random weights replaces the one at {files.url}"
    return stand_in(name, seed=seed), False, said


def stand_in(name: str, *, seed: int = 0) -> LatentDiffusion:
    """A small model of the same blocks with random weights, written and read as official files."""
    config = PUBLISHED[name]
    autoencoder = replace(config.autoencoder, channels=32, num_res_blocks=1)
    unet, conditioner = replace(config.unet, channels=32, num_res_blocks=1), config.conditioner
    if unet.d_cond is not None:
        depth = {"depth": 1} if hasattr(conditioner, "depth") else {}
        conditioner, unet = replace(conditioner, d_cond=32, **depth), replace(unet, d_cond=32)
    parts = {"autoencoder": autoencoder, "unet": unet, "conditioner": conditioner}
    small: LatentDiffusionConfig = replace(config, **parts, image_size=16 * autoencoder.f)
    with torch.random.fork_rng([]), tempfile.TemporaryDirectory() as place:
        torch.manual_seed(seed)
        model = LatentDiffusion(small)
        for parameter in model.parameters():  # zeros at the start would give empty samples
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        path = Path(place) / "model.ckpt"
        save_compvis(model, path)
        return load_compvis(path.with_suffix(".yaml"), path)
