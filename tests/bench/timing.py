"""Times of rivals in turn, A B A B ..., so that a drift of the machine's speed hits them alike."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from minildm.demo import describe


class Pairs(NamedTuple):
    """Medians over pairs of runs of A and of B."""

    a: float  # seconds
    b: float
    ratio: float  # of a to b
    low: float  # the ratio's lower quartile
    high: float  # its upper quartile
    cpu_ratio: float  # the same of this process' own CPU time, which no other program adds to


def seconds(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """One run's time on the clock, until the device is done, and its CPU time."""
    start, cpu = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, time.process_time() - cpu


def interleaved(
    a: Callable[[], object], b: Callable[[], object], repeats: int, device: torch.device
) -> Pairs:
    """Time a and b in turn, `repeats` times each, after one pair that warms up."""
    pairs = [(seconds(a, device), seconds(b, device)) for _ in range(repeats + 1)][1:]
    ratios = [mine[0] / other[0] for mine, other in pairs]
    low, ratio, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    times = (statistics.median(run[0] for run in column) for column in zip(*pairs, strict=True))
    cpu_ratio = statistics.median(mine[1] / max(other[1], 1e-9) for mine, other in pairs)
    return Pairs(*times, ratio, low, high, cpu_ratio)


def machine(device: torch.device) -> dict[str, Any]:
    """What a time depends on, for the table: device, threads, versions, what else was running."""
    facts: dict[str, Any] = {
        "device": describe(device),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if hasattr(os, "getloadavg"):  # Windows has none; 1 is one busy core
        facts["load"] = [round(load, 1) for load in os.getloadavg()[:2]]
    return facts
