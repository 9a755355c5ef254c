"""Peak memory of decoding an image and of the UNet, each case in a process of its own.

What a process once held, its allocator may keep. `python tests/bench/memory.py CASE`, as JSON.
"""

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import Rows, Run, training_step
from torch.nn.attention import SDPBackend, sdpa_kernel

from minildm import Autoencoder, UNet, UNetConfig
from minildm.training.published import RELEASED

CROSS = UNetConfig(channels=64, heads=8, d_head=None, d_cond=64)
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
KINDS = ("forward", "training step", "training step, checkpointing")
CASES: dict[str, Rows] = {
    "decode_memory": [
        {"size": size, "attention": attention}
        for size in (256, 512, 1024)
        for attention in ("none", "fused", "explicit")
        if (size, attention) != (1024, "explicit")  # whose N x N matrix takes 16 GiB
    ],
    "unet_memory": [{"side": side, "what": what} for side in (16, 32, 64, 128) for what in KINDS],
}


def peaks(device: torch.device, pairs: int, quick: bool) -> dict[str, Rows]:
    """The cases with their peaks in bytes above the model, or above AdamW's state."""
    found: dict[str, Rows] = {}
    for name, cases in list(CASES.items())[int(quick) :]:
        for case in cases[: 2 if quick else None]:
            command = [sys.executable, __file__, json.dumps(case)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.setdefault(name, []).append(case | {"peak": int(done.stdout.split()[-1])})
            print(*found[name][-1].values(), sep=", ", flush=True)
    return found


def run_of(case: dict[str, Any], device: torch.device) -> Run:
    """A function of a side: decodes an image by kl-f4, or runs the UNet on a latent; float32."""
    if "attention" in case:
        config = replace(RELEASED["kl-f4"].model, mid_attn=case["attention"] != "none")
        model = Autoencoder(config).to(device).eval()
        kernels = [SDPBackend.MATH] if case["attention"] == "explicit" else FUSED
        decode = sdpa_kernel(kernels)(model.decode)
        return lambda side: decode(torch.randn(1, 3, side // 4, side // 4, device=device))
    net = UNet(replace(CROSS, checkpoint="checkpointing" in case["what"])).to(device)

    def loss(side: int) -> Any:
        z_t, tokens = (torch.randn(1, *s, device=device) for s in ((4, side, side), (16, 64)))
        return F.mse_loss(net(z_t, torch.zeros(1, device=device), tokens), z_t)

    return loss if case["what"] == "forward" else training_step(net, loss)


def held(which: str) -> int:
    """Bytes of memory, "current" or "peak"; on a GPU: of its memory."""
    if torch.cuda.is_available():
        return torch.cuda.memory_stats()[f"allocated_bytes.all.{which}"]
    key, status = {"current": "VmRSS:", "peak": "VmHWM:"}[which], Path("/proc/self/status")
    [line] = [line for line in status.read_text().splitlines() if line.startswith(key)]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    case = json.loads(sys.argv[1])
    run = run_of(case, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    run(8)  # loads libraries, starts threads, makes the optimiser's state
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # resets the peak of main memory, where a container allows it
        Path("/proc/self/clear_refs").write_text("5")
    before = held("current")
    with torch.set_grad_enabled("training" in case.get("what", "")):
        run(next(iter(case.values())))
    print(held("peak") - before)
