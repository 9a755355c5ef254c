"""What each option of a training costs or gains: a training step of our UNet, beside the plain one.

Plain: float32, as built, eager. Each option's model has the same weights; the two run in turn.
"""

import copy
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from first_stage import Run, rounded, stepper
from timing import interleaved, machine
from torch import Tensor
from unet import CROSS, Inputs, awake

from minildm import UNet, UNetConfig


@dataclass(frozen=True)
class Option:
    """What is switched on, all else as it was."""

    name: str
    channels_last: bool = False
    bf16: bool = False
    compile: bool = False
    checkpoint: bool = False
    tf32: bool = False


OPTIONS = (
    Option("channels_last", channels_last=True),
    Option("bf16", bf16=True),
    Option("bf16, channels_last", bf16=True, channels_last=True),
    Option("gradient checkpointing", checkpoint=True),
    Option("TF32", tf32=True),
    Option("compile", compile=True),
    Option("compile, bf16", compile=True, bf16=True),
)
PLAIN = Option("plain")


def training_step(net: UNet, option: Option, given: Inputs) -> Run:
    """One step of a copy of `net` with that option."""
    net = copy.deepcopy(net).train()
    net.config = replace(net.config, checkpoint=option.checkpoint)
    layout = torch.channels_last if option.channels_last else torch.contiguous_format
    net.to(given.z_t.device, memory_format=layout)
    given = given.like(layout)
    if option.compile:
        net.compile()

    def loss() -> Tensor:
        return F.mse_loss(net(given.z_t, given.t, *given.tokens).float(), given.eps)

    step = stepper(net, loss, option.bf16)
    if not option.tf32:
        return step

    def with_tf32() -> None:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        try:
            step()
        finally:
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False

    return with_tf32


def measure(net: UNet, option: Option, given: Inputs, repeats: int) -> dict[str, Any]:
    """The option's row: times, or why there are none. A compiler may fail in many ways."""
    device = given.z_t.device
    if option.tf32 and device.type != "cuda":
        return {"missing": "CUDA alone has TF32"}
    run = training_step(net, option, given)
    try:
        start = time.perf_counter()
        run()
        first = round(time.perf_counter() - start, 2)
    except Exception as failed:
        if not option.compile:
            raise
        reason = str(failed).strip().partition("\n")[0]
        return {"missing": f"compiling failed, {type(failed).__name__}: {reason[:200]}"}
    plain = training_step(net, PLAIN, given)
    return {"first_step_seconds": first} | rounded(interleaved(run, plain, repeats, device))


def table(
    device: torch.device,
    *,
    repeats: int = 7,
    config: UNetConfig = CROSS,
    batch: tuple[int, ...] | None = None,
    options: tuple[Option, ...] = OPTIONS,
) -> dict[str, Any]:
    """Time all options and print them; the table, for JSON."""
    batch = batch or ((16, 4, 64, 64) if device.type == "cuda" else (8, 4, 16, 16))
    print(f"\noptions of a training, UNet with cross-attention, latents {batch}, beside plain")
    net, given = awake(UNet(config)), Inputs.random(config, batch, device)
    torch.backends.cudnn.allow_tf32 = False  # plain is plain, on CUDA too
    rows = []
    for option in options:
        rows.append(asdict(option) | measure(net, option, given, repeats))
        print(line(rows[-1]), flush=True)
    return {
        "command": "python tests/bench/bench.py options --out data/results",
        "machine": machine(device),
        "latents": list(batch),
        "repeats": repeats,
        "rows": rows,
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table as text."""
    if "missing" in row:
        return f"{row['name']:24} not measured: {row['missing']}"
    times = f"{row['ours_seconds'] * 1e3:6.0f} ms, plain {row['theirs_seconds'] * 1e3:6.0f} ms"
    ratio = f"ratio {row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
    return f"{row['name']:24} {times}  {ratio}, first step {row['first_step_seconds']:.1f} s"
