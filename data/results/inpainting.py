"""The first stage with and without attention: `python data/results/inpainting.py`.

Trains emoji-kl-f4, as the preset has it but for the number of steps, with and without the
attention in the middle of E and D, each from several seeds, and writes attention.json beside
this file: PSNR on validation emoji, picture by picture, and the number of parameters. The two
kinds of a seed see the same pictures in the same order. --steps, --pictures, --seeds and --out
are for a quick try.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minildm import PRESETS, EmojiDataset, load_model, train_autoencoder
from minildm.demo import describe
from minildm.fidelity import psnr
from minildm.files import write_json
from minildm.intervals import mean_interval
from minildm.loop import pick_device
from minildm.metrics import reconstruct

HERE = Path(__file__).resolve().parent
KINDS = {"without attention": False, "with attention": True}


def measure(attends: bool, seed: int, steps: int, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Train one: PSNR of each picture (N,), and its number of parameters."""
    preset = PRESETS["emoji-kl-f4"]
    experiment = replace(
        preset,
        model=replace(preset.model, mid_attn=attends),
        train=replace(preset.train, steps=steps, save_every=steps, seed=seed),
    )
    with tempfile.TemporaryDirectory() as folder:
        for _ in train_autoencoder(experiment, run_dir=folder):
            pass
        model = load_model(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    return psnr(x, reconstruct(model, x)), count


def table(steps: int, pictures: int, seeds: int) -> dict[str, Any]:
    """What is kept: each kind and seed, and the paired difference over pictures of all seeds."""
    val = EmojiDataset("val", PRESETS["emoji-kl-f4"].data.size)
    lot = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))[:pictures]
    x = val.images[lot].float() / 127.5 - 1
    found: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
    rows = []
    for seed in range(seeds):
        for kind, attends in KINDS.items():
            values, count = measure(attends, seed, steps, x)
            found[kind].append(values)
            row = {"kind": kind, "seed": seed, "parameters": count}
            rows.append(row | {"psnr": mean_interval(values)._asdict()})
            print(f"{kind}, seed {seed}: {mean_interval(values)}")
    with_attention, without = (torch.stack(found[kind]) for kind in reversed(KINDS))
    gain = mean_interval((with_attention - without).mean(0))
    said = {"preset": "emoji-kl-f4", "steps": steps, "device": describe(pick_device(None))}
    return {**said, "rows": rows, "gain": gain._asdict()}


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "attention.json", table(args.steps, args.pictures, args.seeds))


if __name__ == "__main__":
    main()
