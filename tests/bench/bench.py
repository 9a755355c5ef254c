"""What the models cost here in time and memory: `make bench`.

    python tests/bench/bench.py [shipped] [first_stage] [unet] ... [--out data/results]

`shipped`: the shipped models, float32 against bfloat16. `first_stage`, `unet`: against
diffusers'. `options`: what channels-last, bf16, compiling and the like change for a training
step. `memory`: the peak of decoding, with and without attention; `unet_memory`: that of the UNet.
Nothing fails where a target is missed: a busy machine would decide it. With --out the tables
(JSON) and the figures are kept.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import first_stage
import memory
import options
import torch
import unet
import unet_memory
from timing import interleaved

from minildm import LatentDiffusion, pretrained
from minildm.demo import describe
from minildm.files import write_json
from minildm.loop import pick_device
from minildm.losses import autoencoder_loss

PARTS = ("shipped", "first_stage", "unet", "options", "memory", "unet_memory")


def precisions(
    name: str, count: int, run: Callable[[], object], device: torch.device, repeats: int
) -> None:
    """Print pictures a second in float32 and bfloat16, and the ratio of the times."""

    def under(half: bool) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            run()

    pairs = interleaved(lambda: under(True), lambda: under(False), repeats, device)
    rates = f"{count / pairs.b:8.0f}/s fp32 {count / pairs.a:8.0f}/s bf16"
    print(f"{name:34} {rates}   time ratio {pairs.ratio:.2f}", flush=True)


def shipped(device: torch.device, *, repeats: int = 7, batch: int = 64) -> None:
    """Time encode, decode, one step of sampling, and both training steps."""
    model: LatentDiffusion = pretrained("emoji-class").to(device)
    model.to(memory_format=torch.channels_last)
    autoencoder = model.autoencoder
    x = torch.rand(batch, 3, 64, 64, device=device) * 2 - 1
    z = torch.randn(batch, 3, 16, 16, device=device)
    label = torch.arange(batch, device=device) % len(model.config.conditioner.classes)
    t = torch.full((batch,), 500, device=device)
    print(f"shipped models, batches of {batch}, medians of {repeats} pairs of runs")

    def show(name: str, run: Callable[[], object]) -> None:
        precisions(name, batch, run, device, repeats)

    with torch.no_grad():
        show("encode", lambda: autoencoder.encode(x))
        show("decode", lambda: autoencoder.decode(z))
        tokens = model.conditioner({"label": label})
        show("one step of sampling", lambda: model.eps_theta(z, t, tokens))
    model.train()
    data = {"z": z, "label": label}
    show("training step, diffusion", lambda: model.loss(data)["loss"].backward())
    autoencoder.requires_grad_(True)
    show(
        "training step, first stage",
        lambda: autoencoder_loss(autoencoder, x, kl_weight=1e-6)["loss"].backward(),
    )


def main() -> None:
    """Run the parts that the command line names, else all."""
    parser = argparse.ArgumentParser(description="Time and memory; see this file's first lines.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--out", type=Path, help="folder for JSON and figure, as data/results")
    parser.add_argument("--repeats", type=int, default=11, help="pairs of runs, against diffusers")
    parser.add_argument("--width", type=int, default=32, help="memory: 128 is the paper's")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(PARTS)}")
    parts, device = args.parts or PARTS, pick_device()
    print(f"on {describe(device)}, torch {torch.__version__}")
    if "shipped" in parts:
        shipped(device)
    if "first_stage" in parts:
        table = first_stage.compare(device, repeats=args.repeats)
        if args.out:
            write_json(args.out / "bench_first_stage.json", table)
    if "unet" in parts:
        table = unet.compare(device, repeats=args.repeats)
        if args.out:
            write_json(args.out / "bench_unet.json", table)
    if "options" in parts:
        table = options.table(device)
        if args.out:
            write_json(args.out / "bench_options.json", table)
    if "memory" in parts:
        table = memory.table(args.width)
        if args.out:
            memory.keep(table, args.out)
    if "unet_memory" in parts:
        table = unet_memory.table()
        if args.out:
            unet_memory.keep(table, args.out)


if __name__ == "__main__":
    main()
