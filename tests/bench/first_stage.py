"""Encode, decode and a training step of the first stage against diffusers' of the same size.

Both have the same weights, inputs, precision and memory format; both minimise L1 + 1e-6 KL (VQ:
+ codebook and commitment), with AdamW.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timing import Pairs, interleaved, machine
from torch import Tensor, nn

from minildm.autoencoder import Autoencoder, AutoencoderConfig
from minildm.losses import autoencoder_loss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests/, for the next line

from diffusers_copy import AutoencoderKL, VQModel, copy_autoencoder, error, same_parameters

TARGETS = {"cpu": 1.05, "cuda": 0.8}  # of the ratio: our time to theirs
KL_WEIGHT = 1e-6
KL = AutoencoderConfig(width=64, width_mult=(1, 2, 4))
CONFIGS = {"KL": KL, "VQ": replace(KL, regularizer="vq", codebook_size=8192, vq_legacy=True)}

Run = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """How the two rivals lay out their weights and pictures."""

    name: str
    ours_last: bool  # channels_last
    theirs_last: bool
    counted: bool = True  # like with like


SETTINGS = (
    Setting("as built", False, False),
    Setting("channels_last", True, True),
    Setting("each as it trains", True, False, counted=False),  # minildm's loop sets channels_last
)


def rivals(config: AutoencoderConfig) -> tuple[Autoencoder, AutoencoderKL | VQModel]:
    """Our first stage and theirs, with the same weights and the same answer."""
    levels = len(config.width_mult)
    shape = {
        "block_out_channels": [config.width * m for m in config.width_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": config.res_blocks,
        "latent_channels": config.z_channels,
        "norm_num_groups": config.groups,
    }
    ours = Autoencoder(config)
    if config.regularizer == "vq":
        codes = {"num_vq_embeddings": config.codebook_size, "vq_embed_dim": config.z_channels}
        theirs = VQModel(**shape, **codes)
    else:
        theirs = AutoencoderKL(**shape)
    copy_autoencoder(ours, theirs)
    z = torch.randn(1, config.z_channels, 4, 4)
    given = {"force_not_quantize": True} if config.regularizer == "vq" else {}  # codes may tie
    with torch.no_grad():
        assert error(ours.decoder.render(z), theirs.decode(z, **given).sample) < 1e-5
    assert same_parameters(ours, theirs)
    return ours, theirs


def their_loss(theirs: AutoencoderKL | VQModel, x: Tensor) -> Tensor:
    """What `autoencoder_loss` gives, by diffusers' means."""
    if isinstance(theirs, VQModel):
        decoded = theirs.decode(theirs.encode(x).latents)
        return (x - decoded.sample).abs().mean() + decoded.commit_loss.mean()
    posterior = theirs.encode(x).latent_dist
    x_rec = theirs.decode(posterior.sample()).sample
    return (x - x_rec).abs().mean() + KL_WEIGHT * posterior.kl().mean() / x[0].numel()


def stepper(net: nn.Module, loss: Callable[[], Tensor], half: bool) -> Run:
    """A training step; half: in bfloat16 by autocast, the weights stay float32."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6)
    device = next(net.parameters()).device.type

    def step() -> None:
        with torch.autocast(device, torch.bfloat16) if half else nullcontext():
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def contests(
    ours: Autoencoder, theirs: AutoencoderKL | VQModel, setting: Setting, x: Tensor, half: bool
) -> Iterator[tuple[str, Run, Run]]:
    """(what, our run, theirs), for pictures x: encode and decode, then the training step."""
    mine, other = (
        torch.channels_last if last else torch.contiguous_format
        for last in (setting.ours_last, setting.theirs_last)
    )
    ours.to(x.device, memory_format=mine)
    theirs.to(x.device, memory_format=other)
    x_ours, x_theirs = x.contiguous(memory_format=mine), x.contiguous(memory_format=other)

    yield (
        "training step",
        stepper(ours, lambda: autoencoder_loss(ours, x_ours, kl_weight=KL_WEIGHT)["loss"], half),
        stepper(theirs, lambda: their_loss(theirs, x_theirs), half),
    )
    if half:  # for use, the weights themselves are half precision
        ours, theirs = ours.bfloat16(), theirs.bfloat16()
        x_ours, x_theirs = x_ours.bfloat16(), x_theirs.bfloat16()
    ours.zero_grad()
    theirs.zero_grad()
    sides = [side // ours.f for side in x.shape[2:]]
    z = torch.randn(len(x), ours.config.z_channels, *sides, device=x.device, dtype=x_ours.dtype)
    z_ours, z_theirs = z.contiguous(memory_format=mine), z.contiguous(memory_format=other)

    def encode() -> Tensor:
        encoded = theirs.encode(x_theirs)
        return encoded.latents if isinstance(theirs, VQModel) else encoded.latent_dist.sample()

    no_grad = torch.no_grad()
    yield "encode", no_grad(lambda: ours.encode(x_ours)), no_grad(encode)
    yield (
        "decode",
        no_grad(lambda: ours.decode(z_ours)),
        no_grad(lambda: theirs.decode(z_theirs).sample),
    )


def compare(
    device: torch.device,
    *,
    repeats: int = 11,
    configs: dict[str, AutoencoderConfig] = CONFIGS,
    settings: tuple[Setting, ...] = SETTINGS,
    batch: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Time all rows and print them; the table, for JSON.

    A CPU is timed in float32; CUDA in bfloat16, with pictures of the paper's size.
    """
    import diffusers

    half = device.type == "cuda"
    batch = batch or ((16, 3, 256, 256) if half else (4, 3, 64, 64))
    target, dtype = TARGETS.get(device.type), "bfloat16" if half else "float32"
    print(f"\nfirst stage against diffusers {diffusers.__version__}, {dtype}, pictures {batch}")
    print(f"medians over {repeats} pairs of runs in turn, half as many for training")
    rows = []
    for name, config in configs.items():
        for setting in settings:
            ours, theirs = rivals(config)
            x = torch.rand(batch, device=device) * 2 - 1
            for what, a, b in contests(ours, theirs, setting, x, half):
                n = -(-repeats // 2) if "training" in what else repeats  # it takes longer
                row = {"model": name, "setting": setting.name, "what": what, "pairs": n}
                row["counted"] = setting.counted
                rows.append(row | rounded(interleaved(a, b, n, device)))
                print(line(rows[-1], target), flush=True)
    ratio = statistics.median(row["ratio"] for row in rows if row["counted"])
    print(f"median of the rows of like with like: {ratio:.2f}, {verdict(ratio, target)}")
    return {
        "command": "python tests/bench/bench.py first_stage --out data/results",
        "machine": machine(device) | {"diffusers": diffusers.__version__},
        "dtype": dtype,
        "pictures": list(batch),
        "parameters": {
            name: sum(p.numel() for p in Autoencoder(config).parameters())
            for name, config in configs.items()
        },
        "settings": [asdict(setting) for setting in settings],
        "repeats": repeats,
        "target": target,
        "ratio": ratio,
        "rows": rows,
    }


def rounded(pairs: Pairs) -> dict[str, float]:
    """For JSON, with the digits that mean something."""
    names = ("ours_seconds", "theirs_seconds", "ratio", "ratio_low", "ratio_high", "cpu_ratio")
    return {name: float(f"{value:.4g}") for name, value in zip(names, pairs, strict=True)}


def verdict(ratio: float, target: float | None) -> str:
    """In words; nothing fails here, as a busy machine would decide it."""
    if target is None:
        return "no target for this device"
    return f"{'ok' if ratio <= target else 'over'} (target {target})"


def line(row: dict[str, Any], target: float | None) -> str:
    """One row of the table as text."""
    times = f"{row['ours_seconds'] * 1e3:8.1f} ms, theirs {row['theirs_seconds'] * 1e3:8.1f} ms"
    ratio = f"ratio {row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
    ratio += f" (CPU time {row['cpu_ratio']:.2f})"
    said = verdict(row["ratio"], target) if row["counted"] else "(not like with like)"
    return f"{row['model']} {row['setting']:18} {row['what']:14} ours {times}  {ratio} {said}"
