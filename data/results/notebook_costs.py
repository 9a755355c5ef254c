"""Time and memory of every notebook, on a quiet machine: `make times`.

Executes each from a fresh kernel, with one thread unless OMP_NUM_THREADS is set, and keeps in
notebook_costs.csv the clock's seconds, all processes' cpu_seconds, and peak_mib of the largest.
Then writes the tables of notebooks/COSTS.md and the notebooks' times; `--tables`: only that.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd

from minildm.teaching.notebook import SCALES

HERE = Path(__file__).resolve().parent
CSV, NOTEBOOKS = HERE / "notebook_costs.csv", HERE.parent.parent / "notebooks"
RUN = """
import json, resource, sys
from minildm import describe, pick_device
from minildm.teaching.notebook import run_notebook
path, out, scale = sys.argv[1:]
run_notebook(path, out + "/notebook.ipynb", {"scale": scale, "run_dir": out + "/run"})
used = resource.getrusage(resource.RUSAGE_CHILDREN)  # the kernel, and what it started
cost = {"cpu_seconds": round(used.ru_utime + used.ru_stime), "peak_mib": used.ru_maxrss // 1024}
print(json.dumps(cost | {"device": describe(pick_device())}))
"""
RATIO, MIB = "{ratio:.2f} [{ratio_low:.2f}, {ratio_high:.2f}]", "{mib:,.0f} MiB"
TABLES = {  # of each file: the format of a row's name, of a column's, and of a cell
    "notebook_costs": ("[{notebook}]({notebook}.ipynb)", "{scale}", "{time}, {gib:.1f} GiB"),
    "bench_first_stage": ("{model}, {precision}, {layout}", "{what}", RATIO),
    "bench_unet": ("{model}, {precision}, {layout}", "{what}", RATIO),
    "bench_options": ("{what}", "time / time without the option", RATIO),
    "bench_commands": ("{what}", "seconds", "{seconds:.1f} (import torch: {baseline_seconds:.1f})"),
    "decode_memory": ("{size} x {size} pixels", "attention: {attention}", MIB),
    "unet_memory": ("latent of {side} x {side}", "{what}", MIB),
}


def measure(name: str, scale: str) -> dict[str, Any]:
    """Execute a notebook once. Raises CalledProcessError if a cell fails."""
    start, threads = time.perf_counter(), os.environ.get("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", RUN, str(NOTEBOOKS / f"{name}.ipynb"), folder, scale]
        env = os.environ | {"OMP_NUM_THREADS": threads, "TQDM_DISABLE": "1"}
        found = json.loads(subprocess.check_output(command, env=env).splitlines()[-1])
    when = {"seconds": round(time.perf_counter() - start), "date": time.strftime("%Y-%m-%d")}
    return {"notebook": name, "scale": scale, "threads": threads, **found, **when}


def keep(path: Path, row: dict[str, Any]) -> None:
    """Put a row into the table in place of an older one of the same notebook and scale."""
    rows = [*pd.read_csv(path).to_dict("records"), row] if path.exists() else [row]
    newest = {(each["notebook"], SCALES.index(each["scale"])): each for each in rows}
    pd.DataFrame([newest[key] for key in sorted(newest)]).to_csv(path, index=False)


def spent(seconds: float) -> str:
    """Seconds, or minutes where they are many."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def with_times(first: str, rows: pd.DataFrame) -> str:
    """A notebook's first cell, with the processor time of its rows where it says what it takes."""
    cpu, smoke = (spent(rows.cpu_seconds[rows.scale == scale].item()) for scale in ("cpu", "smoke"))
    times = f'{cpu} of one CPU core at `scale = "cpu"`, {smoke} at `"smoke"`'
    return re.sub(r'[\d.]+ \w+ of one CPU core.*?at `"smoke"`', times, first)


def table(name: str, content: dict[str, Any]) -> str:
    """The Markdown of a file's rows, and on what they were measured."""
    cells: dict[str, dict[str, str]] = {}
    for row in content["rows"]:
        extra = {"mib": row.get("peak", 0) / 2**20, "gib": row.get("peak_mib", 0) / 1024}
        extra["time"] = spent(row.get("cpu_seconds", 0))
        title, column, cell = (text.format(**row, **extra) for text in TABLES[name])
        cells.setdefault(title, {})[column] = cell
    columns = list(dict.fromkeys(column for found in cells.values() for column in found))
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    lines += [[title, *(found.get(c, "") for c in columns)] for title, found in cells.items()]
    facts = [f"{key}: {value}" for key, value in content["machine"].items()]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", "; ".join(facts) + "."])


def with_tables(page: str) -> str:
    """The page with the text between each table's markers replaced."""
    for name in TABLES:
        contents = [json.loads(path.read_text()) for path in sorted(HERE.glob(f"{name}*.json"))]
        if name == CSV.stem:
            rows = pd.read_csv(CSV).to_dict("records")
            contents = [{"rows": rows, "machine": {"device": rows[0]["device"]}}]
        shown = "\n\n".join(table(name, content) for content in contents) or "Not measured yet."
        between = rf"(?<=<!-- {name} -->\n).*?(?=\n<!-- /{name} -->)"
        page = re.sub(between, lambda _, new=shown: new, page, flags=re.DOTALL)
    return page


def main(argv: list[str] | None = None) -> None:
    """Measure what is asked for, row by row, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", nargs="+", choices=SCALES, default=["smoke", "cpu"])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="notebooks, without .ipynb")
    parser.add_argument("--tables", action="store_true", help="measure nothing, only write")
    args, page = parser.parse_args(argv), NOTEBOOKS / "COSTS.md"
    found = sorted([*NOTEBOOKS.glob("*.ipynb"), *NOTEBOOKS.glob("assignments/*.ipynb")])
    names = args.only or [str(path.relative_to(NOTEBOOKS).with_suffix("")) for path in found]
    for name, scale in product(() if args.tables else names, args.scale):
        keep(CSV, row := measure(name, scale))
        print(*row.values(), sep=", ", flush=True)
    page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    for name, rows in pd.read_csv(CSV).groupby("notebook"):
        notebook = nbformat.read(path := NOTEBOOKS / f"{name}.ipynb", as_version=4)
        notebook.cells[0].source = with_times(notebook.cells[0].source, rows)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
