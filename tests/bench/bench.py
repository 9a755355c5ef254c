"""How fast the shipped models train and sample here: `make bench`.

Each row times two precisions in turn, A B A B ..., so that a drift of the machine's speed hits
both; the ratio is the median over pairs.
"""

import statistics
import time
from collections.abc import Callable

import torch

from minildm import LatentDiffusion, pretrained
from minildm.demo import describe
from minildm.loop import pick_device
from minildm.losses import autoencoder_loss

REPEATS = 7


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """One run's time, until the device is done."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(name: str, count: int, run: Callable[[], object], device: torch.device) -> None:
    """Print pictures a second in float32 and bfloat16, and the ratio of the times."""
    pairs = []
    for repeat in range(REPEATS + 1):
        pair = []
        for enabled in (False, True):
            with torch.autocast(device.type, torch.bfloat16, enabled=enabled):
                pair.append(seconds(run, device))
        if repeat:  # the first pair warms up
            pairs.append(pair)
    fp32, bf16 = (count / statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    print(f"{name:34} {fp32:8.0f}/s fp32 {bf16:8.0f}/s bf16   time ratio {ratio:.2f}", flush=True)


def main() -> None:
    """Time encode, decode, both training steps, and one step of sampling."""
    device = pick_device()
    model: LatentDiffusion = pretrained("emoji-class").to(device)
    model.to(memory_format=torch.channels_last)
    autoencoder = model.autoencoder
    x = torch.rand(64, 3, 64, 64, device=device) * 2 - 1
    z = torch.randn(64, 3, 16, 16, device=device)
    label = torch.arange(64, device=device) % len(model.config.conditioner.classes)
    t = torch.full((64,), 500, device=device)
    print(f"on {describe(device)}, batches of 64, medians of {REPEATS} runs")

    with torch.no_grad():
        compare("encode", 64, lambda: autoencoder.encode(x), device)
        compare("decode", 64, lambda: autoencoder.decode(z), device)
        tokens = model.conditioner({"label": label})
        compare("one step of sampling", 64, lambda: model.eps_theta(z, t, tokens), device)
    model.train()
    batch = {"z": z, "label": label}
    compare("training step, diffusion", 64, lambda: model.loss(batch)["loss"].backward(), device)
    autoencoder.requires_grad_(True)
    compare(
        "training step, first stage",
        64,
        lambda: autoencoder_loss(autoencoder, x, kl_weight=1e-6)["loss"].backward(),
        device,
    )


if __name__ == "__main__":
    main()
