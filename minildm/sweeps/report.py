"""A sweep's figures, and a page that shows them with the table of its ends and every notebook."""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minildm import plots
from minildm.files import atomic_write
from minildm.intervals import Measured
from minildm.report import STYLE
from minildm.sweeps.execution import ERROR, NOTEBOOK, SPEC, last_line
from minildm.sweeps.one_run import RESULTS, shown
from minildm.sweeps.sweep import Run, Sweep
from minildm.sweeps.tables import MEAN, Row, lines, speed_lines

NAMES = {  # of metrics, as axes say them
    "proxy_fid": "proxy-FID (lower is better)",
    "kid": "KID (lower is better)",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "asked group named by the judge",
    "objects": "objects seen in their boxes",
    "psnr": "PSNR, dB",
}
SPEEDS = (
    *("parameters", "step_seconds", "training_pictures_per_second", "epoch_seconds"),
    *("pictures_per_second", "pictures_per_second_twice_the_size"),
)


def figures(sweep: Sweep, rows: Sequence[Row]) -> dict[str, Any]:
    """Every figure that the rows allow, by file name without ending."""
    metrics = [m for m in NAMES if any(row["metric"] == m for row in rows)]
    main = [m for m in metrics if m not in ("kid", "precision", "recall")] or metrics[:1]
    found: dict[str, Any] = {}
    for metric in main:
        over = {x: lines(rows, sweep.name, metric, x) for x in ("step", "seconds")}
        if any(len(line[0]) > 1 for line in over["step"].values()):
            panels = {"equal steps": over["step"], "equal time": over["seconds"]}
            panels = {title: drawn for title, drawn in panels.items() if drawn}
            labels = ["optimiser steps", "seconds of training"][: len(panels)]
            found[f"{metric}_over_training"] = plots.curves(
                panels, xlabel=labels, ylabel=NAMES[metric], log="x"
            )
        ends = at_the_end(rows, sweep.name, metric)
        if ends:
            title = f"at the end, by {sweep.name}"
            found[f"{metric}_at_the_end"] = plots.bars(ends, xlabel=NAMES[metric], title=title)
        fast = speed_lines(rows, sweep.name, metric)
        if any(len(line[0]) > 1 for line in fast.values()) or len(fast) > 1:
            title = f"{NAMES[metric]}, by speed"
            found[f"{metric}_over_speed"] = plots.curves(
                {title: fast}, xlabel="pictures a second", ylabel=NAMES[metric], log="x"
            )
    return found


def at_the_end(rows: Sequence[Row], name: str, metric: str) -> dict[str, Measured]:
    """Each level's last value, with the plain sampling: over n seeds, or of one, n its samples."""
    found: dict[str, Measured] = {}
    plain = [r for r in rows if (r["metric"], r["sampling"]) == (metric, "plain") and r["n"]]
    for label, (steps, value, low, high) in lines(rows, name, metric, "step").items():
        here = (label.partition(" = ")[2], f"{steps[-1]:.0f}")
        last = [r for r in plain if (r[name], r["step"]) == here]
        several = [r for r in last if r["seed"] == MEAN]
        n = int((several or last)[0]["n"])  # seeds; of one seed alone, its samples
        found[label] = Measured(value[-1], low[-1], high[-1], n)
    return found


def samples(sweep: Sweep, folder: Path) -> tuple[torch.Tensor, list[str]] | None:
    """The last samples of the first finished seed of each level: (L * 8, 3, H, W), labels.

    These name the step where it is not the same for all.
    """
    found: dict[str, tuple[str, torch.Tensor]] = {}
    for run in sweep.runs():
        place = folder / "runs" / run.name
        if run.level not in found and (place / RESULTS).is_file():
            plain = [item for item in shown(place).items() if item[0].partition("-")[2] == "plain"]
            if plain:
                found[run.level] = plain[-1]
    if not found or len({x.shape for _, x in found.values()}) > 1:
        return None
    steps = {level: int(name.partition("-")[0]) for level, (name, _) in found.items()}
    unlike = len({*steps.values()}) > 1  # 0: trained before
    labels = [f"{sweep.name} = {k}" + f", step {n}" * (unlike and n > 0) for k, n in steps.items()]
    return torch.cat([x for _, x in found.values()]), labels


def write_report(
    folder: Path,
    sweep: Sweep,
    rows: Sequence[Row],
    timing: Mapping[str, Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]] = (),
    doubts: Sequence[str] = (),
) -> Path:
    """Draw the figures into `folder` and write `index.html` beside them; it needs no network.

    results: of the finished runs; doubts: sentences that stand above all else.
    """
    drawn = figures(sweep, rows)
    if (grid := samples(sweep, folder)) is not None:
        drawn["samples"] = plots.class_grid(*grid)
    for name, figure in drawn.items():
        plots.save(figure, folder / f"{name}.png")
    pictures = "\n".join(
        f'<figure><img src="{name}.png" alt="{html.escape(figure.alt_text)}">'
        f"<figcaption>{html.escape(name.replace('_', ' '))}</figcaption></figure>"
        for name, figure in drawn.items()
    )
    paper = f"<p>The paper: {html.escape(sweep.paper)}</p>" if sweep.paper else ""
    seeds = ", ".join(map(str, sweep.seeds))
    samples_said = f"{sweep.samples} samples each; intervals of 95 % over seeds"
    warned = "".join(f"<li>{html.escape(doubt)}</li>" for doubt in doubts)
    warned = f"<p><b>To be doubted:</b></p>\n<ul>{warned}</ul>" if doubts else ""
    precisions = ", ".join(dict.fromkeys(r["precision"] for r in results if r.get("precision")))
    trained = f" Trained in {precisions}." if precisions else ""
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{sweep.name}</title><style>{STYLE}</style>
<h1>{html.escape(sweep.question or f"What does {sweep.name} do?")}</h1>
{paper}
<p>{samples_said}, of which there are {len(sweep.seeds)}: {seeds}.{trained}</p>
{warned}
{_ends(sweep, rows)}
{_speeds(timing)}
{pictures}
<h2>Runs</h2>
{_runs(sweep, folder, results)}
<p>All numbers: <a href="table.csv">table.csv</a>. What was asked:
<a href="sweep.json">sweep.json</a>.</p>
</html>
"""
    path = folder / "index.html"
    with atomic_write(path) as file:
        file.write(page.encode())
    return path


def _ends(sweep: Sweep, rows: Sequence[Row]) -> str:
    """The table of what each level came to."""
    metrics = [m for m in NAMES if any(row["metric"] == m for row in rows)]
    if not metrics:
        return "<p>No run is finished yet.</p>"
    columns = {metric: at_the_end(rows, sweep.name, metric) for metric in metrics}
    cells = [["", *(NAMES[m] for m in metrics)]]
    for label in dict.fromkeys(label for column in columns.values() for label in column):
        cells.append([label, *(_text(columns[m].get(label)) for m in metrics)])
    return _table(cells)


def _text(found: Measured | None) -> str:
    if found is None:
        return ""
    seeds = " (one seed)" if math.isnan(found.low) else f" ({found.n} seeds)"
    return " ".join(part for part in found.digits() if part) + seeds


def _speeds(timing: Mapping[str, Mapping[str, Any]]) -> str:
    """What was measured before the runs."""
    if not timing:
        return ""
    cells = [["measured before the runs", *(name.replace("_", " ") for name in SPEEDS), "device"]]
    for level, found in timing.items():
        plain = found["pictures_per_second"]["plain"]
        numbers = [{**found, "pictures_per_second": plain}.get(name, math.nan) for name in SPEEDS]
        texts = ["" if math.isnan(n) else f"{n:,.0f}" if n >= 1e3 else f"{n:.3g}" for n in numbers]
        cells.append([level, *texts, found["device"]])
    note = (
        "One level after the other; runs of other processes that share the folder may have gone "
        "on meanwhile."
    )
    return f"{_table(cells)}\n<p>{note}</p>"


def _table(cells: Sequence[Sequence[str]]) -> str:
    lines = []
    for i, row in enumerate(cells):
        tag = "td" if i else "th"
        inside = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        lines.append(f"<tr>{inside}</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _runs(sweep: Sweep, folder: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """Each run's state, with a link to its notebook, and what a failed one said last."""
    devices = {Run.from_dict(found["run"]).name: found["device"] for found in results}
    items = []
    for run in sweep.runs():
        place = folder / "runs" / run.name
        state = f"finished, {devices[run.name]}" if run.name in devices else _state(place)
        shown_by = NOTEBOOK
        if not (place / NOTEBOOK).is_file():  # it ended before papermill wrote anything
            shown_by = ERROR if (place / ERROR).is_file() else ""
        name = html.escape(run.name)
        if shown_by:
            name = f'<a href="runs/{name}/{shown_by}">{name}</a>'
        items.append(f"<li>{name}: {html.escape(state)}</li>")
    return "<ul>\n" + "\n".join(items) + "\n</ul>"


def _state(place: Path) -> str:
    """Of a run whose results are not in the table."""
    if (place / RESULTS).is_file():
        return "left out"
    if (place / ERROR).is_file():
        said = last_line((place / ERROR).read_text(encoding="utf-8", errors="replace"))
        return f"failed: {said}" if said else "failed"
    return "begun" if (place / SPEC).is_file() else "not begun"
