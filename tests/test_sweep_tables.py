"""The tidy table of a sweep, its means over seeds, and the figures made of it."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from minildm import Sweep
from minildm.sweeps import read_table
from minildm.sweeps.doubts import doubts_of
from minildm.sweeps.one_run import shown
from minildm.sweeps.report import at_the_end, figures, samples, write_report
from minildm.sweeps.tables import COLUMNS, lines, speed_lines, write_table

SWEEP = Sweep(
    name="width",
    levels={"16": {"unet.width": 16}, "32": {"unet.width": 32}},
    measure_at=(100, 200),
    seeds=(0, 1, 2),
)
STUDENT_2 = 4.302652729911275  # the t of two degrees of freedom at 95 %
VALUES = {"16": (8.0, 9.0, 10.0), "32": (4.0, 4.0, 7.0)}  # at step 100; half of it at 200
TIMING = {
    level: {
        "level": level,
        "device": "cpu, 1 threads",
        "step_seconds": seconds,
        "step_quartiles": [seconds / 2, seconds * 2],
        "training_pictures_per_second": 16 / seconds,
        "epoch_seconds": 80 * seconds,
        "pictures_per_second": {"plain": 1 / seconds, "ddim 5": 4 / seconds},
        "pictures_per_second_twice_the_size": 0.25 / seconds,
        "parameters": 1000,
    }
    for level, seconds in (("16", 0.1), ("32", 0.5))
}


def results(
    levels: tuple[str, ...] = ("16", "32"),
    seeds: tuple[int, ...] = (0, 1, 2),
    metric: str = "proxy_fid",
    **odd: float,
) -> list:
    """odd: values in place of those of level 16, by seed."""
    found = []
    for run in SWEEP.runs(levels, seeds):
        value = VALUES[run.level][run.seed]
        value = odd.get(f"seed{run.seed}", value) if run.level == "16" else value
        fixed = {"metric": metric, "n": 500}
        rows = [
            {"step": step, "images": 16 * step, "sampling": sampling, "value": at, **fixed}
            for step, sampling, at in (
                (100, "plain", value), (200, "plain", value / 2), (200, "ddim 5", value * 2)
            )
        ]  # fmt: skip
        more = {"device": "cpu, 1 threads", "first_stage": "a", "precision": "fp32"}
        found.append({"run": run.as_dict(), "rows": rows, **more})
    return found


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, str]]:
    return write_table(tmp_path / "table.csv", SWEEP, results(), TIMING)


def test_every_row_has_the_columns_of_the_contract(tmp_path: Path, rows: list) -> None:
    with (tmp_path / "table.csv").open(newline="") as file:
        header, *body = list(csv.reader(file))
    assert header == ["width", *COLUMNS]
    assert {
        "seed",
        "step",
        "seconds",
        "images",
        "metric",
        "value",
        "low",
        "high",
        "n",
        "device",
    } < {*header}
    assert len(body) == len(rows) == len(read_table(tmp_path / "table.csv"))


def test_a_mean_has_the_t_interval_over_seeds(rows: list) -> None:
    (mean,) = [
        r for r in rows if (r["width"], r["seed"], r["step"]) == ("16", "mean", "100")
    ]  # fmt: skip
    half = STUDENT_2 * 1.0 / math.sqrt(3)  # 8, 9, 10: standard deviation 1
    numbers = [float(mean[key]) for key in ("value", "low", "high")]
    assert numbers == pytest.approx([9.0, 9.0 - half, 9.0 + half], rel=1e-4)
    assert mean["n"] == "3"


def test_seeds_have_no_interval_and_their_samples_as_n(rows: list) -> None:
    seeds = [row for row in rows if row["seed"] in ("0", "1", "2")]
    assert len(seeds) == 18
    assert all(row["n"] == "500" and not row["low"] for row in seeds)


def test_the_time_axis_is_steps_times_the_step_time_measured_alone(rows: list) -> None:
    for row in rows:
        if row["step"]:
            alone = TIMING[row["width"]]["step_seconds"]
            assert float(row["seconds"]) == pytest.approx(int(row["step"]) * alone)
            assert int(row["images"]) == 16 * int(row["step"])


def test_one_seed_has_no_mean(tmp_path: Path) -> None:
    rows = write_table(tmp_path / "table.csv", SWEEP, results(seeds=(1,)), {})
    assert not [row for row in rows if row["seed"] == "mean"]
    assert not any(row["seconds"] for row in rows)  # nothing was timed
    assert lines(rows, "width", "proxy_fid", "step")["width = 32"][1] == [4.0, 2.0]


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_mean_is_of_what_is_finite_and_says_what_is_not(tmp_path: Path, odd: float) -> None:
    found = results(seed1=odd)
    rows = write_table(tmp_path / "table.csv", SWEEP, found, TIMING)
    ends = at_the_end(rows, "width", "proxy_fid")
    assert (ends["width = 16"].value, ends["width = 16"].n) == (4.5, 2)  # 4 and 5
    said = "\n".join(doubts_of(SWEEP, found, TIMING))
    assert f"proxy_fid of width=16, seed 1, step 200, plain is {odd}" in said
    both = {f"seed{seed}": odd for seed in (0, 1, 2)}
    rows = write_table(tmp_path / "table.csv", SWEEP, results(**both), TIMING)
    assert list(at_the_end(rows, "width", "proxy_fid")) == ["width = 32"]
    assert figures(SWEEP, rows)


def test_runs_that_are_unlike_are_doubted() -> None:
    assert doubts_of(SWEEP, results(), TIMING) == []
    mixed = results()
    mixed[0] |= {"first_stage": "b"}
    mixed[1] |= {"precision": "bf16"}
    other = {**TIMING, "32": {**TIMING["32"], "device": "cuda, a card", "precision": "bf16"}}
    first, second, third = doubts_of(SWEEP, mixed, other)
    assert "with another device (cpu, 1 threads: 16; cuda, a card: 32)" in first
    assert second.startswith("runs of 16 have first stages with different weights")
    assert "more than one precision (fp32: 16, 32; bf16: 32)" in third
    [said] = doubts_of(SWEEP, results(), {"32": TIMING["32"]})
    assert said.startswith("no time was measured of 16")


def test_lines_are_in_order_with_intervals(rows: list) -> None:
    found = lines(rows, "width", "proxy_fid", "seconds")
    assert list(found) == ["width = 16", "width = 32"]
    x, value, low, high = found["width = 32"]
    assert x == [50.0, 100.0]
    assert value == [5.0, 2.5]
    assert low[0] < 5.0 < high[0]


def test_speed_is_set_against_the_end_of_the_training(rows: list) -> None:
    x, value, *_ = speed_lines(rows, "width", "proxy_fid")["width = 16"]
    assert x == [10.0, 40.0]  # pictures a second: plain, ddim 5
    assert value == [4.5, 18.0]


def test_the_end_is_the_last_step_over_seeds(rows: list) -> None:
    ends = at_the_end(rows, "width", "proxy_fid")
    assert {name: m.value for name, m in ends.items()} == {"width = 16": 4.5, "width = 32": 2.5}
    assert all(m.n == 3 for m in ends.values())


def test_figures_say_what_they_show(rows: list) -> None:
    found = figures(SWEEP, rows)
    assert {*found} == {
        "proxy_fid_over_training", "proxy_fid_at_the_end", "proxy_fid_over_speed"
    }  # fmt: skip
    training = found["proxy_fid_over_training"].alt_text
    assert "optimiser steps and seconds of training" in training
    assert "equal time width = 32 from 5 at 50 to 2.5 at 100" in training


def test_a_sweep_of_other_metrics_has_figures_too(tmp_path: Path) -> None:
    rows = write_table(tmp_path / "table.csv", SWEEP, results(metric="kid"), TIMING)
    assert {*figures(SWEEP, rows)} == {"kid_over_training", "kid_at_the_end", "kid_over_speed"}


def test_samples_are_the_last_ones_of_finished_runs(tmp_path: Path) -> None:
    for run, steps in ((SWEEP.runs(["16"])[0], (100, 200)), (SWEEP.runs(["32"])[0], (100,))):
        place = tmp_path / "runs" / run.name
        for step in reversed(steps):
            for name in ("plain", "ddim_5"):
                (place / "samples").mkdir(parents=True, exist_ok=True)
                x = torch.full((8, 3, 4, 4), step, dtype=torch.uint8)
                torch.save(x, place / f"samples/{step}-{name}.pt")
        assert list(shown(place)) == [f"{s}-{name}" for s in steps for name in ("ddim_5", "plain")]
        if len(steps) == 2:
            (place / "results.json").write_text("{}")
    x, labels = samples(SWEEP, tmp_path)
    assert labels == ["width = 16"]
    assert torch.allclose(x, torch.full((8, 3, 4, 4), 200 / 127.5 - 1))
    (place / "results.json").write_text("{}")
    assert samples(SWEEP, tmp_path)[1] == ["width = 16, step 200", "width = 32, step 100"]


def test_a_report_of_nothing_says_so(tmp_path: Path) -> None:
    page = write_report(tmp_path, SWEEP, write_table(tmp_path / "t.csv", SWEEP, [], {}), {})
    assert "No run is finished yet" in page.read_text()
    assert page.read_text().count("not begun") == 6


def test_a_report_shows_what_failed_and_where(tmp_path: Path) -> None:
    run = SWEEP.runs()[0]
    folder = tmp_path / "runs" / run.name
    folder.mkdir(parents=True)
    (folder / "error.txt").write_text("Traceback\nValueError: a <bad> thing\n")
    (folder / "notebook.ipynb").write_text("{}")
    page = write_report(tmp_path, SWEEP, write_table(tmp_path / "t.csv", SWEEP, [], {}), {})
    text = page.read_text()
    assert f'<a href="runs/{run.name}/notebook.ipynb">' in text
    assert "failed: ValueError: a &lt;bad&gt; thing" in text
    (folder / "notebook.ipynb").unlink()  # it ended before there was one
    page = write_report(tmp_path, SWEEP, [], {}, doubts=["not <sure>"])
    assert f'<a href="runs/{run.name}/error.txt">' in page.read_text()
    assert "<li>not &lt;sure&gt;</li>" in page.read_text()


def test_a_report_has_the_numbers_and_the_figures(tmp_path: Path, rows: list) -> None:
    page: Any = write_report(tmp_path, SWEEP, rows, TIMING).read_text()
    assert "(3 seeds)" in page
    assert 'src="proxy_fid_over_training.png" alt="proxy-FID' in page
    assert (tmp_path / "proxy_fid_over_training.png").is_file()
