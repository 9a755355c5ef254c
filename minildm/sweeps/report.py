"""The table of a sweep's finished runs, its figures, and a page that shows them."""

import html
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from minildm.evaluation.intervals import Measured, mean_interval
from minildm.files import atomic_write
from minildm.sweeps.run import DEFAULT, METRICS, RESULTS, shown
from minildm.sweeps.sweep import COLUMNS, Run, Sweep
from minildm.teaching import plots
from minildm.training.configs import from_dict

NOTEBOOK = "notebook.ipynb"
MEAN = "mean"  # in the column of seeds
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

    In the order of the levels, then of the seeds. Raises ValueError for a run of another sweep.
    """
    found, levels = [], list(sweep.levels)
    for path in folder.glob(f"runs/*/{RESULTS}"):
        results = json.loads(path.read_text(encoding="utf-8"))
        run = from_dict(Run, results["run"])
        if run.level not in levels or run != sweep.run(run.level, run.seed):
            raise ValueError(f"{path} is of another sweep or other settings: choose another folder")
        found.append((run, results))
    return sorted(found, key=lambda pair: (levels.index(pair[0].level), pair[0].seed))


def table_of(sweep: Sweep, folder: Path) -> pd.DataFrame:
    """Rows of all finished runs, and of means over seeds; the first column is the sweep's name.

    A row of a seed has the number of samples as n; a row "mean" has the number of seeds, and
    Student's t interval of 95 %.
    """
    rows, means = [], []
    for run, results in finished(sweep, folder):
        fixed = {sweep.name: run.level, "seed": str(run.seed), "device": results["device"]}
        rows += [{**fixed, **row} for row in results["rows"]]
    table = pd.DataFrame(rows, columns=[sweep.name, *COLUMNS])
    finite = table[table["value"].abs() < math.inf]
    for _, same in finite.groupby([sweep.name, "step", "sampling", "metric"], sort=False):
        if len(same) > 1:
            speeds = same[["seconds", "images_per_second"]].mean()
            interval = mean_interval(same["value"].tolist())._asdict()
            means.append({**same.iloc[0], **speeds, "seed": MEAN, **interval})
    return pd.DataFrame(rows + means, columns=table.columns)


def lines(table: pd.DataFrame, metric: str, x: str) -> dict[str, tuple[list[float], ...]]:
    """{"f = 4": (x, value, low, high, n)}, x one of AXES, for `plots.curves`, which leaves n out.

    Means over seeds; values without intervals where a level has a single seed. Against images per
    second, as in Fig. 7, a point for each sampling at the end.
    """
    name, found = table.columns[0], {}
    same = table[(table["metric"] == metric) & (table["value"].abs() < math.inf)]
    for level, rows in same.groupby(name, sort=False):
        rows = rows[rows["seed"] == MEAN] if MEAN in set(rows["seed"]) else rows
        end, speed = rows["step"] == rows["step"].max(), x == "images_per_second"
        points = rows[end if speed else rows["sampling"] == DEFAULT].dropna(subset=x)
        columns = points.sort_values(x)[[x, "value", "low", "high", "n"]]
        if len(columns):
            found[f"{name} = {level}"] = tuple(columns[part].tolist() for part in columns)
    return found


def at_the_end(table: pd.DataFrame, metric: str) -> dict[str, Measured]:
    """Each level's value at its last step: over n seeds, or of one seed's n samples."""
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
            found[f"{metric}_at_the_end"] = plots.bars(ends, xlabel=f"{axis} at the end")
    rows: dict[str, torch.Tensor] = {}  # the last samples of each level's first seed
    for run, _ in finished(sweep, folder):
        for name, x in reversed(shown(folder / "runs" / run.name).items()):
            if name.endswith(DEFAULT):
                rows.setdefault(f"{sweep.name} = {run.level}", x)
    if len({x.shape for x in rows.values()}) == 1:
        found["samples"] = plots.class_grid(torch.cat(list(rows.values())), list(rows))
    return found


def write_report(sweep: Sweep, folder: Path, failed: Mapping[str, str]) -> None:
    """Write table.csv, the figures and index.html of what is finished.

    failed: what went wrong, by the run's name. Raises ValueError for a folder without runs.
    """
    if not (folder / "runs").is_dir():
        raise ValueError(f"{folder} holds no sweep: it has no folder runs/")
    table = table_of(sweep, folder)
    with atomic_write(folder / "table.csv") as file:
        file.write(table.to_csv(index=False, float_format="%.6g").encode())
    ends = {axis: at_the_end(table, metric) for metric, axis in METRICS.items()}
    states = {run.name: failed.get(run.name, "not finished") for run in sweep.runs()}
    states |= {run.name: "finished" for run, _ in finished(sweep, folder)}
    items = ""
    for name, state in states.items():
        items += f'<li><a href="runs/{name}/{NOTEBOOK}">{name}</a>: {html.escape(state)}</li>\n'
    top = f"""<p>{html.escape(sweep.paper)}</p>
<p>{sweep.samples} samples each. N is the number of seeds, with Student's t interval of 95 %; of a
single seed, its number of samples.</p>
{pd.DataFrame(ends).dropna(axis=1).map(str).to_html()}
<p>All numbers: <a href="table.csv">table.csv</a>. Runs:</p>
<ul>{items}</ul>"""
    title = sweep.question or f"What does {sweep.name} do?"
    plots.save_page(folder, title, top, figures(sweep, folder, table))
