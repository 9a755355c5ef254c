"""What the models cost in time: `make bench`, half an hour on a CPU.

Parts: first_stage and unet, against diffusers with the same weights; commands, from start to end.
Writes data/results/*.json (on a GPU *_cuda.json) and the tables of notebooks/COSTS.md. A missed
target does not fail the command: on a busy machine the load would decide.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from against_diffusers import MODELS, Rows, Run, compare, timed

from minildm import pick_device
from minildm.files import write_json
from minildm.training.loop import describe

RESULTS = Path(__file__).resolve().parents[2] / "data/results"
TARGETS = {"float32": (1.03, 1.06), "bfloat16": (0.88, torch.inf)}  # of the median, of every ratio
COMMANDS = {  # the arguments of Python
    "import minildm": "-c|import minildm",
    "import minildm and its models": "-c|from minildm import pretrained, train_ldm",
    "minildm sample emoji-text": "-m|minildm|sample|emoji-text|a red apple|--device|cpu",
}


def commands(device: torch.device, pairs: int, quick: bool) -> dict[str, Rows]:
    """The time of each command; the baseline is `import torch`."""

    def run(arguments: str) -> Run:
        command, quiet = [sys.executable, *arguments.split("|")], {"capture_output": True}
        return partial(subprocess.run, command, check=True, cwd=tempfile.gettempdir(), **quiet)

    chosen, baseline = list(COMMANDS.items())[: 1 if quick else None], run("-c|import torch")
    rows = [timed({"what": name}, run(own), baseline, pairs, device) for name, own in chosen]
    return {"bench_commands": rows}


PARTS = {part: partial(compare, part) for part in MODELS} | {"commands": commands}


def verdicts(rows: Rows) -> list[str]:
    """Whether the ratios to diffusers meet their targets: a sentence a precision."""
    said = []
    for precision, (median, most) in TARGETS.items():
        ratios = [row["ratio"] for row in rows if row.get("precision") == precision]
        if ratios:
            middle, last = statistics.median(ratios), max(ratios)
            met = "met" if middle <= median and last <= most else "missed"
            found = f"{len(ratios)} ratios, median {middle:.3f}, largest {last:.3f}"
            said.append(f"{precision}: {found}; target {median} and {most}: {met}")
    return said


def machine(device: torch.device) -> dict[str, Any]:
    """What a time depends on; load 1 is one busy core."""
    return {
        "device": describe(device),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: version(name) for name in ("torch", "diffusers")},
        "load": [round(load, 1) for load in os.getloadavg()[:2]],
    }


def main() -> None:
    """Run the parts that the command line names, else all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny models; requires --out")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON files")
    args = parser.parse_args()
    if set(args.parts) - set(PARTS) or (args.quick and args.out == RESULTS):
        parser.error(f"parts: {', '.join(PARTS)}; --quick requires another --out")
    device, all_rows = pick_device(), []
    suffix, pairs = "_cuda" if device.type == "cuda" else "", 1 if args.quick else 11
    for part in args.parts or PARTS:
        for name, rows in PARTS[part](device, pairs, args.quick).items():
            content = {"machine": machine(device), "pairs": pairs, "rows": rows}
            write_json(args.out / f"{name}{suffix}.json", content)
            all_rows += rows
    print(*verdicts(all_rows), sep="\n")
    if args.out == RESULTS:
        subprocess.run([sys.executable, RESULTS / "notebook_costs.py", "--tables"], check=True)


if __name__ == "__main__":
    main()
