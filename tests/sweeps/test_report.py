"""Tables and reports: of the committed tables, and of runs that only pretend to have run."""

import math
import shutil
from pathlib import Path

import pytest
from scipy import stats
from sweeps.tiny import pretend, tiny_sweep

from minildm import data_dir, read_table
from minildm.sweeps.report import at_the_end, lines, table_of, with_others, write_report

RESULTS = data_dir() / "results"
FIG6 = read_table(RESULTS / "fig6_factor.csv")


@pytest.mark.parametrize("name", ["fig6_factor", "fig7_factor", "tab6_factor", "tab6_paper"])
def test_the_committed_tables_load(name: str) -> None:
    table = read_table(RESULTS / f"{name}.csv")
    assert len(table) and table.notna().any().all()


def test_the_committed_curves_have_all_factors_and_steps() -> None:
    found = lines(FIG6, "proxy_fid", "step")
    assert list(found) == [f"f = {f}" for f in (1, 2, 4, 8, 16, 32)]
    assert all(line[0] == [250, 500, 1000, 2000] for line in found.values())
    seconds = lines(FIG6, "proxy_fid", "seconds")["f = 1"][0]
    assert seconds == pytest.approx([0.224228 * step for step in (250, 500, 1000, 2000)], rel=1e-3)
    ends = at_the_end(FIG6, "proxy_fid")
    for label, (_, value, low, high) in found.items():
        assert ends[label][:3] == (value[-1], low[-1], high[-1])
        assert ends[label].n == 3


def test_means_and_intervals_are_scipy_s(tmp_path: Path) -> None:
    sweep = tiny_sweep(seeds=(0, 1, 2))
    pretend(sweep, tmp_path, low0=3.0, low1=5.5, low2=4.1, high0=7.0)
    table = table_of(sweep, tmp_path)
    values = [13.0, 15.5, 14.1]
    low, high = stats.t.interval(0.95, 2, stats.tmean(values), stats.sem(values))
    ends = at_the_end(table, "proxy_fid")
    assert ends["rate = low"] == pytest.approx((stats.tmean(values), low, high, 3))
    assert ends["rate = high"][0::3] == (17.0, 20)  # one seed: its samples, no interval
    assert math.isnan(ends["rate = high"].low)
    speed = lines(table, "proxy_fid", "images_per_second")["rate = low"]
    assert (speed[0], speed[1][1]) == ([5.0, 10.0], pytest.approx(stats.tmean(values)))
    pretend(sweep, tmp_path, low1=math.inf)
    assert at_the_end(table_of(sweep, tmp_path), "proxy_fid")["rate = low"].n == 2


def test_a_report_collects_runs_copied_from_elsewhere(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    pretend(tiny_sweep(), here, low0=3.0)
    pretend(tiny_sweep(seeds=(4,)), there, low4=5.0, high4=6.0)
    shutil.copytree(there / "runs", here / "runs", dirs_exist_ok=True)
    table, page = write_report(tiny_sweep(), here, {"rate-high-seed0": "failed: <no memory>"})
    rows = read_table(table)
    assert list(rows.seed.unique()) == ["0", "4", "mean"]
    assert rows[rows.seed == "mean"].value.tolist() == [14.0, 9.0]
    text = page.read_text()
    assert "rate-high-seed0</a>: failed: &lt;no memory&gt;" in text
    assert text.count("</a>: finished") == 3
    for name in ("proxy_fid_curves.png", "proxy_fid_at_the_end.png"):
        assert f'src="{name}"' in text and (here / name).is_file()


def test_another_sweep_in_the_folder_is_refused_and_more_seeds_are_accepted(
    tmp_path: Path,
) -> None:
    pretend(tiny_sweep(), tmp_path, low0=3.0)
    assert with_others(tiny_sweep(seeds=(1, 2)), tmp_path).seeds == (0, 1, 2)
    said = r"another sweep \(experiment.train.steps: 4 there, 5 here\)"
    with pytest.raises(ValueError, match=said):
        write_report(tiny_sweep().changed({"train.steps": 5}), tmp_path)
    with pytest.raises(ValueError, match="samples: 20 there, 30 here"):
        with_others(tiny_sweep(samples=30), tmp_path)
    with pytest.raises(ValueError, match="level: low there, None here"):
        with_others(tiny_sweep(levels={"high": {}}), tmp_path)
