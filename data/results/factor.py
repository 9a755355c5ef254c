"""The paper's Fig. 6, Fig. 7 and Tab. 6 on our data: `python data/results/factor.py runs/sweep-f`.

Carries out the sweep over the downsampling factor (`minildm sweep f`; what is finished is not done
again) and writes, here or into --out:

    fig6_factor.csv     every number over the training: f, seed, step, seconds, metric, value
    fig7_factor.csv     the last models with 5 to 50 steps of DDIM: quality beside pictures a second
    tab6_factor.csv     LDM-1 against LDM-4: throughput, time of an epoch, quality
    fig6_factor.png     the proxy-FID over steps, and over time
    fig6_samples.png    the same conditions drawn by each f at the end

Rows of a seed have the number of samples as n; rows "mean" are over seeds, low and high Student's
t interval of 95 %, n the seeds. seconds: steps times the step time measured alone.
`first stage` in fig7_factor.csv: real pictures, encoded and decoded, the best an f could give.
--finished runs nothing. --jobs: runs at once. Where a run is not finished nothing is written, as a
smaller table would take a whole one's place; --partial takes what there is.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from minildm import SWEEPS, Sweep, plots, run_sweep
from minildm.files import atomic_write, write_csv
from minildm.sweeps import collect, read_table
from minildm.sweeps.execution import results_of
from minildm.sweeps.measuring import asked_of
from minildm.sweeps.one_run import final_model, shown
from minildm.sweeps.report import figures, samples
from minildm.sweeps.running import folder_of
from minildm.sweeps.tables import MEAN, SPEED
from minildm.sweeps.timing import timing_path

HERE = Path(__file__).resolve().parent
FIG6 = (
    *("f", "seed", "step", "seconds", "images", "sampling"),
    *("metric", "value", "low", "high", "n", "device"),
)
FIG7 = ("f", "seed", "sampling", "pictures_per_second", *FIG6[6:])
TAB6 = ("f", "metric", "value", "low", "high", "n", "device")
SHOWN = 6  # samples of each f
ALONE = ("parameters", "step_seconds", "training_pictures_per_second", "epoch_seconds")
TWICE = f"{SPEED}_twice_the_size"
Row = dict[str, str]


def fig6(rows: Iterable[Row]) -> list[Row]:
    """What was measured over the training, always sampled alike."""
    return [row for row in rows if row["step"] and row["sampling"] == "plain"]


def fig7(rows: Sequence[Row], plain: str) -> list[Row]:
    """What was measured at the end, however sampled; plain: how the plain sampling is called."""
    last = max(int(row["step"]) for row in rows if row["step"])
    speed = {(r["f"], r["sampling"]): r["value"] for r in rows if r["metric"] == SPEED}
    found = []
    for row in rows:
        if row["step"] == str(last):
            sampling = plain if row["sampling"] == "plain" else row["sampling"]
            pictures = speed.get((row["f"], row["sampling"]), "")
            found.append({**row, "sampling": sampling, "pictures_per_second": pictures})
    return found


def tab6(rows: Sequence[Row]) -> list[Row]:
    """LDM-1 and LDM-4: what was timed alone, and the last model's quality over seeds."""
    last = max(int(row["step"]) for row in rows if row["step"])
    found = []
    for row in rows:
        timed = row["metric"] in (*ALONE, SPEED, TWICE) and row["sampling"] in ("", "plain")
        ends = row["step"] == str(last) and row["sampling"] == "plain" and row["seed"] == MEAN
        if row["f"] in ("1", "4") and (timed or ends):
            found.append(row)
    return found


def asked_first(sweep: Sweep, folder: Path) -> list[str]:
    """The classes of the first samples that are kept: the same ones for every f."""
    found = (run for run in sweep.runs() if shown(folder_of(folder, run)))
    run = next(found)
    model = final_model(run, folder_of(folder, run), "cpu")
    return asked_of(model, run.plan().experiment.data, run.samples, run.seed).y[:SHOWN]


def sample_grid(
    x: torch.Tensor, names: Sequence[str], heads: Sequence[str]
) -> plots.NotebookFigure:
    """A row of SHOWN samples for each f; heads: what they were asked to be."""
    some = torch.cat([part[:SHOWN] for part in x.split(len(x) // len(names))])
    figure = plots.class_grid(some, names, heads=heads)
    rows, columns = ", ".join(names), ", ".join(heads)
    figure.alt_text = f"Samples of class-conditional models on latents of {rows}: {columns}."
    return figure


def write_picture(path: Path, figure: plots.NotebookFigure) -> None:
    """A figure as PNG in 128 colours: a third of the bytes."""
    plots.save(figure, path)
    text = PngInfo()
    text.add_text("Description", figure.alt_text)
    with Image.open(path) as picture:
        palette = Image.Quantize.MAXCOVERAGE
        small = picture.convert("RGB").quantize(128, palette, 4, dither=Image.Dither.NONE)
    with atomic_write(path) as file:
        small.save(file, format="png", optimize=True, pnginfo=text)


def refuse_holes(sweep: Sweep, folder: Path, *, partial: bool) -> None:
    """SystemExit that names the runs without results and the levels without a step time.

    partial: these may miss, unless nothing is there.
    """
    runs = sweep.runs()
    missing = [run.name for run in runs if results_of(folder_of(folder, run), run) is None]
    if len(missing) == len(runs):
        raise SystemExit(f"{folder}: not one of the {len(runs)} runs is finished")
    untimed = {run.level for run in runs if not timing_path(folder, run).is_file()}
    missing += [f"the step time of f = {level}" for level in sweep.levels if level in untimed]
    if missing and not partial:
        names = ", ".join(missing)
        raise SystemExit(f"{folder}: {names} missing; nothing is written without --partial")


def main(argv: list[str] | None = None) -> None:
    """Run what is left to run; write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the sweep's folder")
    parser.add_argument("--out", type=Path, default=HERE, help="where the tables go")
    parser.add_argument("--jobs", type=int, help="runs at once")
    parser.add_argument("--finished", action="store_true", help="run nothing")
    parser.add_argument("--partial", action="store_true", help="write even if runs are missing")
    args = parser.parse_args(argv)
    sweep = SWEEPS["f"]
    if not args.finished:
        run_sweep(sweep, args.runs, jobs=args.jobs)
    refuse_holes(sweep, args.runs, partial=args.partial)
    rows = read_table(collect(sweep, args.runs)[0])
    write_csv(args.out / "fig6_factor.csv", FIG6, fig6(rows))
    write_csv(args.out / "fig7_factor.csv", FIG7, fig7(rows, "ddim 20"))
    write_csv(args.out / "tab6_factor.csv", TAB6, tab6(rows))
    write_picture(args.out / "fig6_factor.png", figures(sweep, rows)["proxy_fid_over_training"])
    if (grid := samples(sweep, args.runs)) is not None:
        grid = sample_grid(*grid, asked_first(sweep, args.runs))
        write_picture(args.out / "fig6_samples.png", grid)
    print(f"{len(rows)} numbers: {args.out / 'fig6_factor.csv'}")


if __name__ == "__main__":
    main()
