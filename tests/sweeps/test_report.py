"""Tables and reports of runs that only pretend to have run."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from sweeps.tiny import pretend, tiny_sweep

from minildm import read_table
from minildm.sweeps.report import at_the_end, lines, table_of, write_report


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
    failed = {"rate-high-seed0": "failed: <no memory>"}
    write_report(tiny_sweep(), here, failed)
    rows = read_table(here / "table.csv")
    assert list(rows.seed.unique()) == ["0", "4", "mean"]
    assert rows[rows.seed == "mean"].value.tolist() == [14.0, 9.0]
    text = (here / "index.html").read_text()
    assert "rate-high-seed0</a>: failed: &lt;no memory&gt;" in text
    assert text.count("</a>: finished") == 3
    for name in ("proxy_fid_curves.png", "proxy_fid_at_the_end.png"):
        assert f'src="{name}"' in text and (here / name).is_file()


@pytest.mark.parametrize(
    "changes", [{"samples": 30}, {"levels": {"high": {}}}, {"levels": {"low": {"train.lr": 1.0}}}]
)
def test_another_sweep_in_the_folder_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    pretend(tiny_sweep(), tmp_path, low0=3.0)
    with pytest.raises(ValueError, match=r"low-seed0/results\.json is of another sweep"):
        write_report(tiny_sweep(**changes), tmp_path, {})
