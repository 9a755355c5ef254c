"""Times of two rivals in turn, A B A B ..., so that a drift of the machine's speed hits both."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import nn

from minildm.training.loop import describe

Run = Callable[..., Any]
Rows = list[dict[str, Any]]


def seconds(run: Run, device: torch.device) -> float:
    """Time one run until the device has finished."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def timed(case: dict, run: Run, baseline: Run, pairs: int, device: torch.device) -> dict:
    """The case with median times, and median and quartiles of the ratio run / baseline, printed.

    One more pair comes first and is not counted: it loads kernels.
    """
    times = [(seconds(run, device), seconds(baseline, device)) for _ in range(pairs + 1)][1:]
    low, ratio, high = np.quantile([a / b for a, b in times], (0.25, 0.5, 0.75))
    own, other = (statistics.median(column) for column in zip(*times, strict=True))
    found = {"seconds": own, "baseline_seconds": other}
    found |= {"ratio": ratio, "ratio_low": low, "ratio_high": high}
    print(*case.values(), f"{own:.4g} s, ratio {ratio:.2f}", sep=", ", flush=True)
    return case | {name: float(f"{value:.4g}") for name, value in found.items()}


def training_step(net: nn.Module, loss: Run, *, bf16: bool = False) -> Run:
    """A step of AdamW on loss(*arguments); bf16: by autocast, the weights stay float32."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6)
    device = next(net.parameters()).device.type

    def step(*arguments: Any) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            value = loss(*arguments)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def machine(device: torch.device) -> dict[str, Any]:
    """What a time depends on; load 1 is one busy core."""
    return {
        "device": describe(device),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: version(name) for name in ("torch", "diffusers")},
        "load": [round(load, 1) for load in os.getloadavg()[:2]],
    }
