"""Peak memory of decoding by the size of the picture, with and without attention.

The decoder of the released kl-f4, which has one attention layer, over all latent pixels, and the
same without that layer; narrowed, unless `width` is the paper's 128. Each number comes from a
process of its own: what a process has once held, its allocator may keep.

    python tests/bench/memory.py '{"size": 512, "attention": "fused", "width": 32}'
"""

import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timing import machine
from torch.nn.attention import SDPBackend, sdpa_kernel

from minildm import plots
from minildm.autoencoder import Autoencoder
from minildm.files import write_json
from minildm.paper import RELEASED

SIZES = (256, 512, 1024)
KINDS = {
    "none": "no attention",
    "fused": "fused attention",
    "explicit": "explicit softmax",
}
MIB, GIB = 2**20, 2**30
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
LARGEST_MATRIX = 1024 * MIB  # a larger N x N matrix is computed, not measured


@dataclass(frozen=True, kw_only=True)
class Case:
    """One decoding: a picture of size x size pixels."""

    size: int
    attention: str = "none"  # a key of KINDS
    width: int = 32  # the released models have 128

    @property
    def tokens(self) -> int:
        """N, the latent pixels that attend to each other at f = 4."""
        return (self.size // 4) ** 2

    @property
    def matrix(self) -> int:
        """Bytes of softmax(q k^T) in float32, where it is written out: 4 N^2."""
        return 4 * self.tokens**2


def held(key: str) -> int:
    """Bytes of main memory: "VmRSS", held now; "VmHWM", the most that this process ever held.

    The kernel's own page is read where there is one: `ru_maxrss` begins with what the parent held.
    """
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith(f"{key}:")]
        return int(line.split()[1]) * 1024
    import resource  # macOS counts bytes; Windows has none of it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak(device: torch.device) -> None:
    """Let the peak begin anew, where that is possible: on CUDA, and by proc(5) on Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (refs := Path("/proc/self/clear_refs")).exists():
        with suppress(OSError):  # not every container may
            refs.write_text("5")


@torch.no_grad()
def measure(case: Case) -> dict[str, Any]:
    """Decode once, here: peak bytes above the loaded model, and seconds."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    attends = case.attention != "none"
    config = replace(RELEASED["kl-f4"].model, width=case.width, mid_attn=attends)
    model = Autoencoder(config).to(device).eval()
    z = torch.randn(1, 3, case.size // 4, case.size // 4, device=device)
    with sdpa_kernel([SDPBackend.MATH] if case.attention == "explicit" else FUSED):
        model.decode(z[..., :4, :4])  # libraries are loaded now, threads are started
        forget_peak(device)
        before = torch.cuda.memory_allocated(device) if cuda else held("VmRSS")
        start = time.perf_counter()
        x_rec = model.decode(z)
        peak = torch.cuda.max_memory_allocated(device) if cuda else held("VmHWM")
    seconds = time.perf_counter() - start
    assert x_rec.shape == (1, 3, case.size, case.size)
    return {"peak": peak - before, "seconds": round(seconds, 2), "device": device.type}


def in_own_process(case: Any, script: Path = Path(__file__)) -> dict[str, Any]:
    """`measure` of the script in a fresh Python; case: its dataclass."""
    command = [sys.executable, str(script), json.dumps(asdict(case))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{script.name} failed for {case}: exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def table(width: int = 32, sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """Measure all cases and print them; the table, for JSON. An explicit N x N may be too large."""
    print(f"\npeak memory of decoding one picture, float32, above the model; kl-f4, width {width}")
    rows = []
    for size in sizes:
        for attention in KINDS:
            case = Case(size=size, attention=attention, width=width)
            row = {"size": size, "attention": attention, "tokens": case.tokens}
            row["matrix"] = case.matrix
            skipped = attention == "explicit" and case.matrix > LARGEST_MATRIX
            rows.append(row | ({"peak": None} if skipped else in_own_process(case)))
            print(line(rows[-1]), flush=True)
    return {
        "command": f"python tests/bench/bench.py memory --width {width} --out data/results",
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "model": "kl-f4",
        "width": width,
        "rows": rows,
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table as text."""
    what = f"{row['size']:5} px, N = {row['tokens']:6,}, {KINDS[row['attention']]:16}"
    if row["peak"] is None:
        return f"{what} not measured: the matrix alone is {row['matrix'] / MIB:,.0f} MiB"
    return f"{what} {row['peak'] / MIB:7,.0f} MiB, {row['seconds']:.1f} s"


def figure(table: dict[str, Any]) -> plots.NotebookFigure:
    """Bars for `table`, and what an N x N matrix of weights takes, computed."""
    names = {row["size"]: f"{row['size']} px, N = {row['tokens']:,}" for row in table["rows"]}
    bars: dict[str, dict[str, float]] = {name: {} for name in KINDS.values()}
    for row in table["rows"]:
        if row["peak"] is not None:
            bars[KINDS[row["attention"]]][names[row["size"]]] = row["peak"] / GIB
    bars["an N x N matrix, computed"] = {
        names[row["size"]]: row["matrix"] / GIB for row in table["rows"]
    }
    title = f"Peak memory of decoding one picture: f = 4, width {table['width']}, float32"
    return plots.bars(bars, xlabel="GiB above the loaded model", title=title)


def keep(table: dict[str, Any], folder: Path) -> None:
    """Write decode_memory.json and decode_memory.png."""
    write_json(folder / "decode_memory.json", table)
    plots.save(figure(table), folder / "decode_memory.png")


def main() -> None:
    """Measure the case that the command line spells as JSON; print what came as JSON."""
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))


if __name__ == "__main__":
    main()
