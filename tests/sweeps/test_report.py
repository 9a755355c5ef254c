"""Tables and reports of runs that only pretend to have run."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats
from sweeps.tiny import pretend, tiny_sweep
from typer.testing import CliRunner

from minildm import cli, data_dir, read_table
from minildm.files import write_json
from minildm.sweeps.report import at_the_end, lines, means_of, table_of, write_report
from minildm.sweeps.sweep import DEFINITION
from minildm.training.configs import to_dict


def test_means_and_intervals_are_scipy_s(tmp_path: Path) -> None:
    sweep = tiny_sweep(seeds=(0, 1, 2))
    pretend(sweep, tmp_path, low0=3.0, low1=5.5, low2=4.1, high0=7.0)
    table = table_of(sweep, tmp_path)
    values = [13.0, 15.5, 14.1]
    low, high = stats.t.interval(0.95, 2, stats.tmean(values), stats.sem(values))
    ends = at_the_end(table, "proxy_fid")
    assert ends["rate = low"] == pytest.approx((stats.tmean(values), low, high, 3))
    assert ends["rate = high"][0::3] == (17.0, 1)  # one seed: no interval
    assert math.isnan(ends["rate = high"].low)
    speed = lines(table, "proxy_fid", "images_per_second")["rate = low"]
    assert (speed[0], speed[1][1]) == ([5.0, 10.0], pytest.approx(stats.tmean(values)))
    pretend(sweep, tmp_path, low1=math.inf)
    assert at_the_end(table_of(sweep, tmp_path), "proxy_fid")["rate = low"].n == 2


def test_intervals_of_shares_are_shares_and_shipped_tables_are_read() -> None:
    fixed = {"rate": "a", "step": 4, "sampling": "default", "metric": "recall"}
    table = pd.DataFrame([{**fixed, "seed": f"{x}", "value": x} for x in (0.25, 0.75)])
    assert means_of(table).values.tolist() == [[*fixed.values(), 0.5, 0.0, 1.0, 2]]
    shipped = read_table(data_dir() / "results/fig6_factor.csv")  # with its means among the rows
    means = shipped[(shipped.f == "8") & (shipped.metric == "kid") & (shipped.seed == "mean")]
    _, *ours = lines(shipped, "kid", "step")["f = 8"]
    for name, column in zip(("value", "low", "high", "n"), ours, strict=True):
        assert column == pytest.approx(means[name].tolist(), rel=1e-3)


def test_a_report_collects_runs_copied_from_elsewhere(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    pretend(tiny_sweep(), here, low0=3.0)
    pretend(tiny_sweep(seeds=(4,)), there, low4=5.0, high4=6.0)
    shutil.copytree(there / "runs", here / "runs", dirs_exist_ok=True)
    failed = {"rate-high-seed0": "failed: <no memory>"}
    write_report(tiny_sweep(), here, failed)
    assert list(read_table(here / "table.csv").seed.unique()) == ["0", "4"]
    means = pd.read_csv(here / "means.csv")
    assert means[means.seeds == 2].value.tolist() == [14.0, 9.0]
    text = (here / "index.html").read_text()
    assert "rate-high-seed0</a>: failed: &lt;no memory&gt;" in text
    assert text.count("</a>: finished") == 3
    for name in ("proxy_fid_curves.png", "proxy_fid_at_the_end.png"):
        assert f'src="{name}"' in text and (here / name).is_file()


@pytest.mark.parametrize("changes", [{"samples": 30}, {"levels": {"low": {"train.lr": 1.0}}}])
def test_another_sweep_in_the_folder_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    """By its definition; the same sweep may have more levels and seeds."""
    pretend(tiny_sweep(), tmp_path, low0=3.0, high0=4.0)
    write_json(tmp_path / DEFINITION, to_dict(tiny_sweep()))
    with pytest.raises(
        ValueError, match=r"\(low: .* there, .* here\).* `minildm sweep .*` continues"
    ):
        write_report(tiny_sweep(**changes), tmp_path, {})
    assert write_report(tiny_sweep(seeds=(1,), levels={"new": {}}), tmp_path, {}) == 2


def test_a_report_reads_the_folder_s_definition_and_names_other_runs(tmp_path: Path) -> None:
    words = ["sweep", str(tmp_path), "--report"]
    pretend(tiny_sweep(samples=30), tmp_path, low0=3.0)
    write_json(tmp_path / "runs/rate-old-seed0/results.json", {"run": {"of": "another version"}})
    write_json(tmp_path / DEFINITION, to_dict(tiny_sweep()))
    with pytest.warns(UserWarning) as caught:
        assert CliRunner().invoke(cli.app, words).exit_code == 1
    said = "; ".join(sorted(str(warning.message) for warning in caught))
    assert re.search(r"low-seed0 is not counted.*old-seed0 is not.*no run of rate is fin", said)
    assert not (tmp_path / "table.csv").exists()
    pretend(tiny_sweep(), tmp_path, high0=3.0)
    with pytest.warns(UserWarning, match="not counted"):
        assert CliRunner().invoke(cli.app, ["sweep", "f", "--out", *words[1:]]).exit_code == 0
    assert read_table(tmp_path / "table.csv").rate.tolist() == ["high"] * 2
