"""Time and memory of every notebook: `python data/results/notebook_costs.py --scale smoke`.

Executes each notebook at that scale, in a temporary folder and from a fresh kernel, and adds a row
to notebook_costs.csv, here or in --out:

    notebook, scale, seconds (by the clock), cpu_seconds (of all its processes), peak_mib (of the
    largest of them), threads, device, date

One thread, unless OMP_NUM_THREADS says otherwise: cpu_seconds are then what a quiet core would
take, whatever else runs. A notebook that is in the table is left out, unless --again; --only names
some. The guide for instructors shows the table (`--guide` writes it there from the CSV alone).
"""

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from minildm.demo import describe
from minildm.files import atomic_write, write_csv
from minildm.loop import pick_device
from minildm.notebook import SCALES

HERE = Path(__file__).resolve().parent
NOTEBOOKS, TABLE = HERE.parent.parent / "notebooks", "notebook_costs.csv"
GUIDE = NOTEBOOKS / "INSTRUCTORS.md"
COLUMNS = (
    *("notebook", "scale", "seconds", "cpu_seconds", "peak_mib"),
    *("threads", "device", "date"),
)
BEGIN, END = "<!-- costs -->\n", "<!-- /costs -->"
RUN = """
import json, resource, sys
from minildm.notebook import run_notebook
path, out, scale = sys.argv[1:]
run_notebook(path, out + "/notebook.ipynb", {"scale": scale, "run_dir": out + "/run"})
used = resource.getrusage(resource.RUSAGE_CHILDREN)  # the kernel, and what it started
print(json.dumps({"cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss}))
"""
Row = dict[str, str]


def measure(notebook: Path, scale: str) -> Row:
    """One execution; RuntimeError with the last lines where it fails."""
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run(
            [sys.executable, "-c", RUN, str(notebook), folder, scale],
            env={**os.environ, "OMP_NUM_THREADS": threads, "TQDM_DISABLE": "1"},
            capture_output=True,
            text=True,
        )
    if ended.returncode:
        raise RuntimeError(f"{notebook.name} failed at {scale}: {ended.stderr[-500:]}")
    used = json.loads(ended.stdout.splitlines()[-1])
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    torch.set_num_threads(int(threads))
    numbers = {
        "seconds": f"{time.perf_counter() - began:.0f}",
        "cpu_seconds": f"{used['cpu']:.0f}",
        "peak_mib": f"{used['peak'] / unit:.0f}",
    }
    where = {"threads": threads, "device": describe(pick_device())}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"notebook": notebook.stem, "scale": scale, **numbers, **where, "date": today}


def read(path: Path) -> list[Row]:
    """The table so far."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def keep(path: Path, row: Row) -> list[Row]:
    """Put a row into the table, in place of an older one of the same notebook and scale."""
    key = (row["notebook"], row["scale"])
    rows = [old for old in read(path) if (old["notebook"], old["scale"]) != key]
    rows = sorted([*rows, row], key=lambda r: (r["notebook"], SCALES.index(r["scale"])))
    write_csv(path, COLUMNS, rows)
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: a line for each notebook, a column for each scale."""
    lines = ["| notebook | " + " | ".join(SCALES) + " |", "|---|" + "---|" * len(SCALES)]
    found = {(row["notebook"], row["scale"]): row for row in rows}
    for name in sorted({row["notebook"] for row in rows}):
        cells = [cell(found.get((name, scale))) for scale in SCALES]
        lines.append(f"| [{name}]({name}.ipynb) | {' | '.join(cells)} |")
    devices = ", ".join(sorted({row["device"] for row in rows}))
    told = f"Processor time, and the peak of memory; {devices}."
    return "\n".join([*lines, "", told.replace(" 1 threads", " one thread")]) + "\n"


def cell(row: Row | None) -> str:
    """As "3.1 min, 1.4 GiB"."""
    if row is None:
        return "not measured"
    seconds, peak = int(row["cpu_seconds"]), int(row["peak_mib"]) / 1024
    spent = f"{seconds} s" if seconds < 100 else f"{seconds / 60:.1f} min"
    return f"{spent}, {peak:.1f} GiB"


def with_table(guide: str, rows: list[Row]) -> str:
    """The guide's text with the table between its two markers made anew."""
    before, rest = guide.split(BEGIN)
    return before + BEGIN + table(rows) + END + rest.split(END)[1]


def main(argv: list[str] | None = None) -> None:
    """Measure what is asked for, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, default="smoke")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these notebooks alone")
    parser.add_argument("--again", action="store_true", help="those in the table, too")
    parser.add_argument("--out", type=Path, default=HERE, help="where the table goes")
    parser.add_argument("--guide", action="store_true", help="write the guide's table, no more")
    args = parser.parse_args(argv)
    path = args.out / TABLE
    if args.guide:
        text = with_table(GUIDE.read_text(encoding="utf-8"), read(path))
        with atomic_write(GUIDE) as file:
            file.write(text.encode())
        return
    known = {p.stem: p for p in sorted(NOTEBOOKS.glob("*.ipynb"))}
    unknown = sorted({*(args.only or ())} - known.keys())
    if unknown:
        raise SystemExit(f"--only {', '.join(unknown)}: not known; known: {', '.join(known)}")
    there = {row["notebook"] for row in read(path) if row["scale"] == args.scale}
    for name in args.only or known:
        if args.again or name not in there:
            row = measure(known[name], args.scale)
            keep(path, row)
            print(f"{name}, {args.scale}: {cell(row)}", flush=True)


if __name__ == "__main__":
    main()
