"""The table of a sweep's finished runs, its figures, and a page that shows them."""

import html
import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from minildm.evaluation.intervals import Measured, mean_interval
from minildm.files import atomic_write
from minildm.sweeps.run import DEFAULT, METRICS, RESULTS, SHARES, shown
from minildm.sweeps.sweep import COLUMNS, Run, Sweep, joined
from minildm.teaching import plots
from minildm.training.configs import from_dict

NOTEBOOK = "notebook.ipynb"
AXES = {  # what a metric is drawn against
    "step": "optimiser steps",
    "seconds": "seconds of training",
    "images_per_second": "images sampled per second",
}


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a sweep's table.csv; the columns of level, seed and sampling are text."""
    level = pd.read_csv(path, nrows=0).columns[0]
    return pd.read_csv(path, dtype={level: str, "seed": str, "sampling": str})


def finished(sweep: Sweep, folder: Path) -> list[tuple[Run, dict[str, Any]]]:
    """The finished runs in a folder and their results.json, those copied from elsewhere included.

    Only of this sweep, of any seed; in the order of the levels, then of the seeds.
    """
    found, levels = [], list(sweep.levels)
    for path in folder.glob(f"runs/*/{RESULTS}"):
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            run = from_dict(Run, results["run"])
        except (ValueError, KeyError, TypeError):  # damaged, or of another version: not counted
            continue
        own = run.level in levels and run == sweep.run(run.level, run.seed)
        if own and path.parent.name == run.name:
            found.append((run, results))
    return sorted(found, key=lambda pair: (levels.index(pair[0].level), pair[0].seed))


def table_of(sweep: Sweep, folder: Path) -> pd.DataFrame:
    """Rows of all finished runs; the first column is the sweep's name.

    n: how many samples, or objects in them; real: how many real images they are compared with.
    """
    rows = []
    for run, results in finished(sweep, folder):
        fixed = {sweep.name: run.level, "seed": str(run.seed), "device": results["device"]}
        rows += [{**fixed, **row} for row in results["rows"]]
    return pd.DataFrame(rows, columns=[sweep.name, *COLUMNS])


def means_of(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds of a table, with Student's t interval of 95 % (one seed: NaN)."""
    keys = [table.columns[0], "step", "sampling", "metric"]
    times = [name for name in AXES if name in table and name not in keys]
    rows, means = table[(table["seed"] != "mean") & (table["value"].abs() < math.inf)], []
    for key, same in rows.groupby(keys, sort=False):
        values = same["value"].tolist()
        mean, low, high, n = mean_interval(values) if len(values) > 1 else Measured(*values)
        if key[-1] in SHARES:
            low, high = max(low, 0.0), min(high, 1.0)
        means.append([*key, *same[times].mean(), mean, low, high, n])
    return pd.DataFrame(means, columns=[*keys, *times, "value", "low", "high", "seeds"])


def lines(table: pd.DataFrame, metric: str, x: str) -> dict[str, tuple[list[float], ...]]:
    """{"f = 4": (x, mean, low, high, seeds)}, x one of AXES, for `plots.curves`.

    Against images per second, as in Fig. 7, a point for each sampling at the end.
    """
    name, found = table.columns[0], {}
    for level, rows in means_of(table[table["metric"] == metric]).groupby(name, sort=False):
        end, speed = rows["step"] == rows["step"].max(), x == "images_per_second"
        points = rows[end if speed else rows["sampling"] == DEFAULT].dropna(subset=x)
        columns = points.sort_values(x)[[x, "value", "low", "high", "seeds"]]
        if len(columns):
            found[f"{name} = {level}"] = tuple(columns[part].tolist() for part in columns)
    return found


def at_the_end(table: pd.DataFrame, metric: str) -> dict[str, Measured]:
    """Each level's mean at its last step, over n seeds."""
    ends = lines(table, metric, "step").items()
    return {level: Measured(*(column[-1] for column in columns[1:])) for level, columns in ends}


def figures(sweep: Sweep, folder: Path, table: pd.DataFrame) -> dict[str, Any]:
    """Every figure that the finished runs allow, by file name without ending."""
    found: dict[str, Any] = {}
    for metric, axis in METRICS.items():
        panels = {label: lines(table, metric, x) for x, label in AXES.items()}
        panels = {k: v for k, v in panels.items() if any(len(line[0]) > 1 for line in v.values())}
        if panels:
            options = {"xlabel": list(panels), "ylabel": axis, "log": "x"}
            found[f"{metric}_curves"] = plots.curves(panels, **options)
        if ends := at_the_end(table, metric):
            found[f"{metric}_at_the_end"] = plots.bars(ends, xlabel=f"{axis} at the end, N seeds")
    rows: dict[str, torch.Tensor] = {}  # the last samples of each level's first seed
    for run, _ in finished(sweep, folder):
        for name, x in reversed(shown(folder / "runs" / run.name).items()):
            if name.endswith(DEFAULT):
                rows.setdefault(f"{sweep.name} = {run.level}", x)
    if len({x.shape for x in rows.values()}) == 1:
        found["samples"] = plots.class_grid(torch.cat(list(rows.values())), list(rows))
    return found


def write_report(sweep: Sweep, folder: Path, failed: Mapping[str, str]) -> int:
    """Write table.csv, means.csv, figures and index.html of the finished runs; returns how many.

    failed: what went wrong, by the run's name. Nothing is written where nothing is finished and
    nothing failed. Warns of other runs in the folder. Raises ValueError for one of another sweep.
    """
    sweep = joined(sweep, folder)
    states = {run.name: failed.get(run.name, "not finished") for run in sweep.runs()}
    states |= (done := {run.name: "finished" for run, _ in finished(sweep, folder)})
    for path in folder.glob("runs/*/"):
        if path.name not in states or (path.name not in done and (path / RESULTS).is_file()):
            why = "unfinished, or of another sweep or other settings"
            warnings.warn(f"{path} is not counted: {why}", stacklevel=2)
    if not done and not failed:
        warnings.warn(f"{folder}: no run of {sweep.name} is finished", stacklevel=2)
        return 0
    table = table_of(sweep, folder)
    for name, content in {"table": table, "means": means_of(table)}.items():
        with atomic_write(folder / f"{name}.csv") as file:
            file.write(content.to_csv(index=False, float_format="%.6g").encode())
    ends = {axis: at_the_end(table, metric) for metric, axis in METRICS.items()}
    items = ""
    for name, state in states.items():
        items += f'<li><a href="runs/{name}/{NOTEBOOK}">{name}</a>: {html.escape(state)}</li>\n'
    real = ", ".join(f"{n:.0f}" for n in table["real"].dropna().unique())
    top = f"""<p>{html.escape(sweep.paper)}</p>
<p>{sweep.samples} samples of each seed, compared with {real} real images. N is the number of seeds,
with Student's t interval of 95 % over them.</p>
{pd.DataFrame(ends).dropna(axis=1).map(str).to_html()}
<p>All numbers: <a href="table.csv">table.csv</a>. Their means over the seeds:
<a href="means.csv">means.csv</a>. Runs:</p>
<ul>{items}</ul>"""
    title = sweep.question or f"What does {sweep.name} do?"
    plots.save_page(folder, title, top, figures(sweep, folder, table))
    return len(done)
