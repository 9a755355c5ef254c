"""The tidy table of a sweep: a row for each number of each run, and for each mean over seeds."""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minildm.files import write_csv
from minildm.intervals import Measured, mean_interval
from minildm.sweeps.sweep import COLUMNS, Sweep

MEAN = "mean"  # in place of a seed
SPEED = "pictures_per_second"
Row = dict[str, str]


def write_table(
    path: Path,
    sweep: Sweep,
    results: Iterable[Mapping[str, Any]],
    timing: Mapping[str, Mapping[str, Any]],
) -> list[Row]:
    """The table of finished runs (their results.json), as CSV; its rows.

    The first column is called after the sweep. A row of a seed has the number of samples as n and
    no interval; a row "mean" is over seeds, low and high Student's t interval of 95 %, n the
    seeds. seconds: the step's, by the step time measured before the runs (`timing` by level).
    Metrics of timing are rows without a seed.
    """
    rows = [row for result in results for row in _rows(sweep, result, timing)]
    rows += means(sweep.name, rows)
    rows += [row for level in sweep.levels for row in _speeds(sweep, timing.get(level, {}))]
    order = {label: i for i, label in enumerate(sweep.levels)}
    rows.sort(key=lambda row: order[row[sweep.name]])
    rows = [{column: row.get(column, "") for column in (sweep.name, *COLUMNS)} for row in rows]
    write_csv(path, (sweep.name, *COLUMNS), rows)
    return rows


def read_table(path: str | Path) -> list[Row]:
    """The rows of a sweep's table, as text."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _rows(sweep: Sweep, result: Mapping[str, Any], timing: Mapping[str, Any]) -> Iterable[Row]:
    run, level = result["run"], result["run"]["level"]
    step_seconds = timing.get(level, {}).get("step_seconds", math.nan)
    for row in result["rows"]:
        yield {
            sweep.name: level,
            "seed": str(run["seed"]),
            "step": str(row["step"]),
            "seconds": number(row["step"] * step_seconds),
            "images": str(row["images"]),
            "sampling": row["sampling"],
            "metric": row["metric"],
            "value": number(row["value"]),
            "n": str(row["n"]),
            "device": result["device"],
        }


def means(name: str, rows: Sequence[Row]) -> list[Row]:
    """A row for each number that two seeds or more have: its mean, and the interval over seeds.

    Of seeds whose value is finite; n says how many.
    """
    cells = defaultdict(list)
    for row in rows:
        cells[tuple(row[key] for key in (name, "step", "sampling", "metric"))].append(row)
    found = []
    for same in cells.values():
        if len(same) > 1:
            over = _over([float(row["value"] or "nan") for row in same])
            numbers = {key: number(getattr(over, key)) for key in ("value", "low", "high")}
            devices = ", ".join(dict.fromkeys(row["device"] for row in same))
            found.append({**same[0], "seed": MEAN, **numbers, "n": str(over.n), "device": devices})
    return found


def _over(values: Sequence[float]) -> Measured:
    """The mean of those that are finite, and how many they are."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) > 1:
        return mean_interval(finite)
    return Measured(finite[0] if finite else math.nan, math.nan, math.nan, len(finite))


def _speeds(sweep: Sweep, timing: Mapping[str, Any]) -> Iterable[Row]:
    """What was timed, as rows: a step, an epoch, pictures a second, parameters."""
    if not timing:
        return
    fixed = {sweep.name: timing["level"], "device": timing["device"]}
    quartiles = timing.get("step_quartiles", (math.nan, math.nan))
    for metric in ("step_seconds", "training_pictures_per_second", "epoch_seconds", "parameters"):
        if metric in timing:
            bounds = quartiles if metric == "step_seconds" else (math.nan, math.nan)
            low_high = dict(zip(("low", "high"), map(number, bounds), strict=True))
            yield {**fixed, "metric": metric, "value": number(timing[metric]), **low_high}
    for sampling, value in timing["pictures_per_second"].items():
        yield {**fixed, "sampling": sampling, "metric": SPEED, "value": number(value)}
    if (twice := timing.get(f"{SPEED}_twice_the_size")) is not None:
        metric = f"{SPEED}_twice_the_size"
        yield {**fixed, "sampling": "plain", "metric": metric, "value": number(twice)}


def number(value: float) -> str:
    """Six digits; nothing for NaN."""
    return "" if math.isnan(value) else f"{value:.6g}"


def lines(
    rows: Sequence[Row], name: str, metric: str, x: str, sampling: str = "plain"
) -> dict[str, tuple[list[float], ...]]:
    """Means over seeds for `plots.curves`: {"f = 4": (x, value, low, high)}, x "step" or "seconds".

    Where there is one seed alone, its values, without intervals. What is not finite is left out.
    """
    same = [r for r in rows if (r["metric"], r["sampling"]) == (metric, sampling) and r[x]]
    same = [row for row in same if math.isfinite(float(row["value"] or "nan"))]
    averaged = {row[name] for row in same if row["seed"] == MEAN}
    found: dict[str, list[tuple[float, ...]]] = {}
    for row in same:
        if (row["seed"] == MEAN) == (row[name] in averaged):
            texts = (row[x], row["value"], row["low"], row["high"])
            numbers = tuple(float(text) if text else math.nan for text in texts)
            found.setdefault(f"{name} = {row[name]}", []).append(numbers)
    return {label: _columns(points) for label, points in found.items()}


def speed_lines(rows: Sequence[Row], name: str, metric: str) -> dict[str, tuple[list[float], ...]]:
    """The same at the last step against pictures a second: a point for each sampling."""
    speed = {
        (row[name], row["sampling"]): float(row["value"]) for row in rows if row["metric"] == SPEED
    }
    found: dict[str, list[tuple[float, ...]]] = {}
    for (level, sampling), pictures in speed.items():
        points = lines(rows, name, metric, "step", sampling).get(f"{name} = {level}")
        if points is not None:
            last = tuple(column[-1] for column in points[1:])
            found.setdefault(f"{name} = {level}", []).append((pictures, *last))
    return {label: _columns(points) for label, points in found.items()}


def _columns(points: Sequence[tuple[float, ...]]) -> tuple[list[float], ...]:
    """Points in the order of x, as (x, value, low, high)."""
    return tuple(map(list, zip(*sorted(points), strict=True)))
