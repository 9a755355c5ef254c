"""The published models in numbers: `python data/results/published.py`.

Builds every preset of `minildm.PUBLISHED` without memory for its weights (the meta device), and
writes, here or into --out:

    published.csv    a row a model: f, latent, parameters of each part, memory, multiply-adds,
                     and what the paper says of its training

`..._m` are millions of parameters. `weights_mib` is the memory of all weights in float32. A step
is one evaluation of the UNet on the latent of one picture of `side` pixels, `step_gmac` its
products in 1e9, counted by torch (guidance doubles it). `batch`, `train_steps` and `lr` are those
of the paper's Tables 12, 13 and 15, `v100_days` of Table 18; empty where it has none.
"""

import argparse
import csv
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minildm import PUBLISHED, Autoencoder, UNet
from minildm.conditioning import build_conditioner
from minildm.diffusion import LatentDiffusionConfig
from minildm.files import atomic_write

HERE = Path(__file__).resolve().parent
TABLE = "published.csv"
PARTS = ("first_stage_m", "unet_m", "conditioner_m")
COLUMNS = (
    *("model", "f", "latent", "side", "condition", *PARTS, "weights_mib", "step_gmac"),
    *("batch", "train_steps", "lr", "v100_days"),
)
CLIP_TEXT = 123_060_480  # of ViT-L/14's text encoder, whose weights are not part of the model
PAPER = {  # batch, steps, learning rate, V100-days
    "celeba256": (48, 410_000, 9.6e-5, 14.4),
    "ffhq256": (42, 635_000, 8.4e-5, 26),
    "lsun_churches256": (96, 500_000, 5e-5, None),
    "lsun_beds256": (48, 1_900_000, 9.6e-5, None),
    "cin256": (64, None, 6.4e-5, None),
    "cin256-v2": (1200, 178_000, 1e-4, 271),
    "txt2img-1p4B": (680, 390_000, 1e-4, None),
    "layout2img-openimages256": (24, 4_400_000, 4.8e-5, None),
    "bsr_sr": (64, 860_000, 6.4e-5, None),
    "inpainting_big": (128, 360_000, 1e-6, None),
    "semantic_synthesis256": (48, 360_000, 4.8e-5, None),
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the table")
    out = parser.parse_args().out
    rows = [row_of(name, config) for name, config in PUBLISHED.items()]
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    with atomic_write(out / TABLE) as file:
        file.write(text.getvalue().encode())
    print(text.getvalue())


def row_of(name: str, config: LatentDiffusionConfig) -> dict[str, Any]:
    """The row of one model."""
    with torch.device("meta"):
        first_stage, unet = Autoencoder(config.autoencoder), UNet(config.unet)
        reads = config.conditioner.encoder
        encoder = CLIP_TEXT if reads == "clip" else size(build_conditioner(config.conditioner))
    sizes = (size(first_stage), size(unet), encoder)
    side = config.image_size // first_stage.f
    latent = (config.autoencoder.z_channels, side, side)
    return {
        "model": name,
        "f": first_stage.f,
        "latent": "x".join(map(str, latent)),
        "side": config.image_size,
        "condition": condition_of(config),
        **{part: f"{n / 1e6:.2f}" for part, n in zip(PARTS, sizes, strict=True)},
        "weights_mib": round(4 * sum(sizes) / 2**20),
        "step_gmac": f"{products(unet, config, side) / 1e9:.1f}",
        **dict(zip(COLUMNS[-4:], PAPER.get(name, (None,) * 4), strict=True)),
    }


def condition_of(config: LatentDiffusionConfig) -> str:
    """What the model is given, in a word."""
    conditioner = config.conditioner
    return conditioner.concat if conditioner.concat != "none" else conditioner.kind


def size(module: nn.Module) -> int:
    """How many parameters."""
    return sum(p.numel() for p in module.parameters())


def products(unet: UNet, config: LatentDiffusionConfig, side: int) -> int:
    """Multiply-adds of one evaluation on one latent, with as many tokens as the condition has."""
    conditioner = config.conditioner
    tokens = {"none": None, "class": 1}.get(conditioner.kind, conditioner.length)
    with torch.device("meta"):
        z, t = torch.empty(1, config.unet.in_channels, side, side), torch.zeros(1).long()
        c = None if tokens is None else torch.empty(1, tokens, conditioner.d_cond)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(z, t, c)
    return counter.get_total_flops() // 2


if __name__ == "__main__":
    main()
