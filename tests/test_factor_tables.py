"""The tables over the downsampling factor: whole, and what the command makes of a sweep's."""

import csv
import itertools
from pathlib import Path

import pytest
import torch
from PIL import Image
from scripts import RESULTS, command_of

from minildm import PRESETS, SWEEPS
from minildm.files import write_csv, write_json
from minildm.intervals import mean_interval
from minildm.sweeps import read_table
from minildm.sweeps.timing import timing_path

FACTORS, STEPS = ("1", "2", "4", "8", "16", "32"), ("250", "500", "1000", "2000")
METRICS = ("proxy_fid", "kid", "precision", "recall", "accuracy")
FIG6, FIG7, TAB6 = (read_table(RESULTS / f"{n}_factor.csv") for n in ("fig6", "fig7", "tab6"))


def value(f: str, step: str, seed: str = "mean", metric: str = "proxy_fid") -> float:
    (row,) = [
        r for r in FIG6 if (r["f"], r["step"], r["seed"], r["metric"]) == (f, step, seed, metric)
    ]
    return float(row["value"])


def test_figure_6_has_every_cell_once() -> None:
    keys = [(r["f"], r["seed"], r["step"], r["metric"]) for r in FIG6]
    seeds = ("0", "1", "2", "mean")
    assert sorted(keys) == sorted(itertools.product(FACTORS, seeds, STEPS, METRICS))
    columns = {"f", "seed", "step", "seconds", "images", "metric", "value", "low", "high", "n"}
    assert columns | {"device", "sampling"} == {*FIG6[0]}


@pytest.mark.parametrize("table", [FIG6, FIG7], ids=["fig6", "fig7"])
def test_means_are_of_the_seeds_with_students_t(table: list[dict[str, str]]) -> None:
    same = ("f", "metric", "sampling") + (("step",) if "step" in table[0] else ())
    for mean in (row for row in table if row["seed"] == "mean"):
        seeds = [
            float(r["value"])
            for r in table
            if r["seed"] != "mean" and all(r[key] == mean[key] for key in same)
        ]
        found = mean_interval(seeds)
        assert len(seeds) == int(mean["n"]) >= 3
        for key in ("value", "low", "high"):
            assert float(mean[key]) == pytest.approx(getattr(found, key), rel=1e-4, abs=1e-5)


def test_seeds_say_their_samples() -> None:
    assert {row["n"] for row in FIG6 + FIG7 if row["seed"] != "mean"} == {"500"}
    assert all(int(row["images"]) == 16 * int(row["step"]) for row in FIG6)


def test_time_is_steps_times_one_step_time_for_each_factor() -> None:
    for f in FACTORS:
        per_step = [float(r["seconds"]) / int(r["step"]) for r in FIG6 if r["f"] == f]
        assert max(per_step) == pytest.approx(min(per_step), rel=1e-3)


def test_figure_7_has_all_samplings_and_the_first_stages_bound() -> None:
    samplings = {r["sampling"] for r in FIG7}
    assert samplings == {"ddim 5", "ddim 10", "ddim 20", "ddim 50", "first stage"}
    assert len(FIG7) == len(FACTORS) * 4 * len(samplings) * len(METRICS)
    for row in FIG7:
        assert bool(row["pictures_per_second"]) == (row["sampling"] != "first stage")


def test_more_steps_of_ddim_are_slower() -> None:
    for f in FACTORS:
        speed = {r["sampling"]: r["pictures_per_second"] for r in FIG7 if r["f"] == f}
        in_order = [float(speed[f"ddim {steps}"]) for steps in (5, 10, 20, 50)]
        assert in_order == sorted(in_order, reverse=True)


def test_table_6_sets_pixels_beside_four() -> None:
    found = {(r["f"], r["metric"]): float(r["value"]) for r in TAB6}
    metrics = ("training_pictures_per_second", "pictures_per_second", "epoch_seconds")
    for metric in (*metrics, "pictures_per_second_twice_the_size", "proxy_fid"):
        assert found["1", metric] > 0 < found["4", metric]
    assert found["1", "proxy_fid"] == value("1", "2000")


def test_the_papers_table_6_is_the_papers() -> None:
    pixels, *latent = read_table(RESULTS / "tab6_paper.csv")
    assert (pixels["model"], float(pixels["fid"])) == ("LDM-1", 24.74)
    gains = [float(r["training_pictures_per_second"]) / 0.11 for r in latent]
    assert min(gains) > 2.7  # "at least 2.7 times", Sec. 4.5
    assert min(24.74 / float(r["fid"]) for r in latent) > 1.5


def test_what_the_lesson_says_of_the_ends_holds_in_the_table() -> None:
    for step in STEPS[:3]:
        assert value("8", step) < value("4", step) < value("1", step)  # coarse learns first
    gained = {f: value(f, "500") / value(f, "2000") for f in FACTORS}
    assert gained["32"] < 1.1 < gained["1"]  # f = 32 stagnates, f = 1 still learns


def test_the_picture_shows_a_row_for_each_factor() -> None:
    with Image.open(RESULTS / "fig6_samples.png") as picture:
        assert picture.height > 0.9 * picture.width * len(FACTORS) / command_of("factor").SHOWN / 2
        assert "f = 32" in picture.info["Description"]
        data = PRESETS["emoji-class-f8"].data.dataset("train")
        rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        asked = [data.classes[i] for i in data.labels[rows[: command_of("factor").SHOWN]]]
        assert picture.info["Description"].endswith(f": {', '.join(asked)}.")


def test_the_command_sorts_a_sweeps_table_into_the_figures(tmp_path: Path) -> None:
    factor = command_of("factor")
    fixed = dict.fromkeys((*factor.FIG6, "sampling"), "1")
    rows = [
        {**fixed, "f": f, "seed": seed, "step": step, "sampling": sampling, "metric": metric}
        for f, seed, step, sampling, metric in (
            ("1", "0", "5", "plain", "kid"),
            ("1", "mean", "9", "plain", "kid"),
            ("1", "0", "9", "ddim 5", "kid"),
            ("1", "", "", "ddim 5", "pictures_per_second"),
            ("4", "", "", "", "step_seconds"),
            ("8", "", "", "", "step_seconds"),
        )
    ]
    assert [row["step"] for row in factor.fig6(rows)] == ["5", "9"]
    ends = factor.fig7(rows, "ddim 20")
    assert [(r["sampling"], r["pictures_per_second"]) for r in ends] == [
        ("ddim 20", ""), ("ddim 5", "1")
    ]  # fmt: skip
    assert [(r["f"], r["metric"]) for r in factor.tab6(rows)] == [
        ("1", "kid"), ("4", "step_seconds")
    ]  # fmt: skip
    write_csv(tmp_path / "t.csv", factor.FIG7, ends)
    with (tmp_path / "t.csv").open() as file:
        assert next(csv.reader(file)) == list(factor.FIG7)


def test_the_committed_tables_are_of_the_standard_sweep() -> None:
    sweep = SWEEPS["f"]
    assert (tuple(sweep.levels), tuple(map(str, sweep.measure_at))) == (FACTORS, STEPS)
    assert sweep.samples == 500


@pytest.fixture
def sweep_folder(tmp_path: Path) -> Path:
    """The standard sweep as if it were finished: the committed numbers in each run's results."""
    folder = tmp_path / "sweep"
    speeds = {r["f"]: float(r["seconds"]) / int(r["step"]) for r in FIG6}
    for run in SWEEPS["f"].runs():
        own = [r for r in FIG6 if (r["f"], r["seed"]) == (run.level, str(run.seed))]
        rows = [
            {"step": int(r["step"]), "images": int(r["images"]), "sampling": "plain"}
            | {"metric": r["metric"], "value": float(r["value"]), "n": int(r["n"])}
            for r in own
        ]
        results = {"run": run.as_dict(), "rows": rows, "device": "cpu"}
        write_json(folder / "runs" / run.name / "results.json", results)
        timing = {"level": run.level, "device": "cpu", "step_seconds": speeds[run.level]}
        timing |= {"pictures_per_second": {"plain": 8.0}}
        write_json(timing_path(folder, run), timing)
    return folder


def written(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


@pytest.mark.parametrize("arguments", [["--finished"], []], ids=["finished", "run"])
def test_a_missing_run_is_named_and_nothing_is_written(
    arguments: list[str], sweep_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor, out = command_of("factor"), tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(factor, "run_sweep", lambda *_, **__: None)  # the runs fail once more
    lost = [run for run in SWEEPS["f"].runs() if (run.level, run.seed) in {("4", 1), ("8", 2)}]
    for run in lost:
        (sweep_folder / "runs" / run.name / "results.json").unlink()
    call = [str(sweep_folder), "--out", str(out), *arguments]
    with pytest.raises(SystemExit, match=f"{lost[0].name}, {lost[1].name} missing.*--partial"):
        factor.main(call)
    assert written(out) == set()
    factor.main([*call, "--partial"])
    found = read_table(out / "fig6_factor.csv")
    assert len(found) == len(FIG6) - 2 * len(STEPS) * len(METRICS)
    assert {r["n"] for r in found if r["seed"] == "mean"} == {"2", "3"}


def test_a_level_without_a_time_is_named(sweep_folder: Path, tmp_path: Path) -> None:
    timing_path(sweep_folder, SWEEPS["f"].runs(["8"], [0])[0]).unlink()
    with pytest.raises(SystemExit, match="the step time of f = 8 missing"):
        command_of("factor").main([str(sweep_folder), "--out", str(tmp_path), "--finished"])


def test_a_whole_sweep_gives_the_committed_table_again(sweep_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command_of("factor").main([str(sweep_folder), "--out", str(out), "--finished"])
    numbers = ("f", "seed", "step", "metric", "value", "low", "high", "n")
    found = [[row[key] for key in numbers] for row in read_table(out / "fig6_factor.csv")]
    assert sorted(map(str, found)) == sorted(str([row[key] for key in numbers]) for row in FIG6)
    assert {"fig7_factor.csv", "tab6_factor.csv", "fig6_factor.png"} < written(out)


@pytest.mark.parametrize("partial", [[], ["--partial"]])
def test_where_nothing_is_finished_nothing_is_written(partial: list[str], tmp_path: Path) -> None:
    call = [str(tmp_path / "none"), "--out", str(tmp_path), "--finished", *partial]
    with pytest.raises(SystemExit, match="not one of the 18 runs is finished"):
        command_of("factor").main(call)
    assert not written(tmp_path)
