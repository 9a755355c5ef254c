"""Peak memory of the UNet by the size of the latent: forward, and a training step.

One latent, float32, 16 tokens. Training is counted above weights, gradients and AdamW's moments,
which do not grow with the latent. Each number comes from a process of its own, as in memory.py.

    python tests/bench/unet_memory.py '{"side": 64, "what": "training"}'
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from memory import GIB, MIB, forget_peak, held, in_own_process
from timing import machine

from minildm import UNet, UNetConfig, plots
from minildm.files import write_json

CONFIG = UNetConfig(width=64, heads=8, d_head=None, d_cond=64)  # that of unet.py
SIDES = (16, 32, 64, 128)
KINDS = {
    "forward": "forward",
    "training": "training step",
    "checkpoint": "training step, gradient checkpointing",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One latent of side x side, and a key of KINDS."""

    side: int
    what: str = "forward"


def measure(case: Case) -> dict[str, Any]:
    """Run once, here: peak bytes above what is held before, and seconds."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    net = UNet(replace(CONFIG, checkpoint=case.what == "checkpoint")).to(device)
    optimizer = torch.optim.AdamW(net.parameters())
    tokens = torch.randn(1, 16, CONFIG.d_cond, device=device)
    t = torch.zeros(1, dtype=torch.int64, device=device)

    def run(side: int) -> None:
        z_t = torch.randn(1, CONFIG.in_channels, side, side, device=device)
        with torch.set_grad_enabled(case.what != "forward"):
            loss = F.mse_loss(net(z_t, t, tokens), z_t)
        if case.what != "forward":
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # gradients stay: they are there before, too

    run(8)  # libraries are loaded now, threads are started, the moments are there
    forget_peak(device)
    before = torch.cuda.memory_allocated(device) if cuda else held("VmRSS")
    start = time.perf_counter()
    run(case.side)
    peak = torch.cuda.max_memory_allocated(device) if cuda else held("VmHWM")
    seconds = round(time.perf_counter() - start, 2)
    return {"peak": peak - before, "seconds": seconds, "device": device.type}


def table(sides: tuple[int, ...] = SIDES) -> dict[str, Any]:
    """Measure all cases and print them; the table, for JSON."""
    print("\npeak memory of the UNet, one latent, float32, above model and optimiser")
    rows = []
    for side in sides:
        for what in KINDS:
            found = in_own_process(Case(side=side, what=what), Path(__file__))
            rows.append({"side": side, "what": what} | found)
            print(line(rows[-1]), flush=True)
    return {
        "command": "python tests/bench/bench.py unet_memory --out data/results",
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "parameters": sum(p.numel() for p in UNet(CONFIG).parameters()),
        "rows": rows,
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table as text."""
    what = f"{row['side']:4} x {row['side']:<4} {KINDS[row['what']]:38}"
    return f"{what} {row['peak'] / MIB:7,.0f} MiB, {row['seconds']:.1f} s"


def figure(table: dict[str, Any]) -> plots.NotebookFigure:
    """Bars for `table`."""
    bars: dict[str, dict[str, float]] = {name: {} for name in KINDS.values()}
    for row in table["rows"]:
        bars[KINDS[row["what"]]][f"{row['side']} x {row['side']}"] = row["peak"] / GIB
    title = f"Peak memory of a UNet of {table['parameters'] / 1e6:.0f} M by latent size, float32"
    return plots.bars(bars, xlabel="GiB above model and optimiser", title=title)


def keep(table: dict[str, Any], folder: Path) -> None:
    """Write unet_memory.json and unet_memory.png."""
    write_json(folder / "unet_memory.json", table)
    plots.save(figure(table), folder / "unet_memory.png")


def main() -> None:
    """Measure the case that the command line spells as JSON; print what came as JSON."""
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
