"""Fig. 7 over samplers: the command at its smallest, and what the committed table says."""

import csv
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import command_of

from minildm import pretrained
from minildm.samplers import SAMPLERS

RESULTS = Path(__file__).resolve().parent.parent / "data/results"
LIMITS = ("real pictures", "first stage")
METRICS = ("proxy_fid", "kid", "precision", "recall", "accuracy")
Row = dict[str, Any]


@pytest.fixture(scope="module")
def command() -> ModuleType:
    """data/results/samplers.py as a module."""
    return command_of("samplers")


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for key in ("value", "low", "high", "seconds", "guidance_scale"):
            row[key] = float(row[key] or "nan")
        for key in ("steps", "calls", "n"):
            row[key] = int(row[key] or 0)
    return rows


@pytest.fixture(scope="module")
def table() -> list[Row]:
    return read(RESULTS / "fig7_samplers.csv")


def find(
    table: list[Row],
    metric: str,
    sampler: str,
    steps: int,
    spacing: str = "trailing",
    guidance: float = 1.0,
) -> Row:
    wanted = (metric, sampler, steps, spacing, guidance)
    keys = ("metric", "sampler", "steps", "spacing", "guidance_scale")
    [row] = [row for row in table if tuple(row[key] for key in keys) == wanted]
    return row


def check_form(rows: list[Row], cells: list[Any], deterministic: tuple[str, ...]) -> None:
    """Every number once, for every cell and both limits; values in their intervals."""
    wanted = [(name, 0, "", metric) for name in LIMITS for metric in METRICS]
    for cell in cells:
        metrics = (*METRICS, *(["distance"] if cell.sampler in deterministic else []))
        wanted += [(cell.sampler, cell.steps, cell.spacing, metric) for metric in metrics]
    keys = ("sampler", "steps", "spacing", "metric")
    assert [tuple(row[key] for key in keys) for row in rows] == wanted
    for row in rows:
        assert math.isfinite(row["value"]) and row["low"] <= row["value"] <= row["high"], row
        assert bool(row["features"]) == (row["metric"] in METRICS[:-1]) and row["device"]
        if row["sampler"] in SAMPLERS:
            assert row["seconds"] > 0 and row["calls"] == calls(row), row


def calls(row: Row) -> int:
    """What a picture costs, by what the samplers' own pages say; a guided call is two."""
    steps = row["steps"]
    each = {"plms": steps + 1, "heun": 2 * steps - (row["spacing"] != "leading")}
    return each.get(row["sampler"], steps) * (1 if row["guidance_scale"] == 1 else 2)


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Two tables alike: real pictures are measured anew, and sums may round in another order."""
    return len(one) == len(other) and all(
        a.keys() == b.keys()
        and all(
            a[key] == b[key] or a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-3, nan_ok=True)
            for key in a
        )
        for a, b in zip(one, other, strict=True)
    )


def small(tmp_path: Path, **changes: str) -> list[str]:
    options = {"--pictures": "24", "--reference": "40", "--steps": "2", "--device": "cpu"} | changes
    argv = [str(tmp_path / "runs"), "--out", str(tmp_path)]
    return argv + [part for pair in options.items() for part in pair] + ["--sampler"]


def test_the_command_samples_measures_and_does_nothing_twice(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        command.main([*small(tmp_path), "ddim", "ddpm"])
        rows = read(tmp_path / command.TABLE)
        args = command.arguments([*small(tmp_path), "ddim", "ddpm"])
        check_form(rows, list(command.cells(args)), command.DETERMINISTIC)
        files = sorted((tmp_path / "runs").glob("**/*.safetensors"))
        before = {path: path.stat().st_mtime_ns for path in files}
        assert len(before) == 4 + 2  # DDIM in both spacings, DDPM, DDIM guided; the flow's ends
        command.main([*small(tmp_path), "ddim", "ddpm"])
        assert same(read(tmp_path / command.TABLE), rows)
        assert {path: path.stat().st_mtime_ns for path in before} == before
        command.main([*small(tmp_path, **{"--pictures": "30"}), "ddim"])  # another lot: anew
        [asked, not_asked] = (
            tmp_path / f"runs/{k}-2-trailing-1.safetensors" for k in ("ddim", "ddpm")
        )
        assert asked.stat().st_mtime_ns > before[asked]
        assert not_asked.stat().st_mtime_ns == before[not_asked]
        assert {row["n"] for row in read(tmp_path / command.TABLE)} >= {30}
        assert "numbers:" in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)


def test_all_samplers_begin_at_the_same_noise(command: ModuleType) -> None:
    z_T = torch.randn(2, 3, 4, 4)
    noise = command.starting_at(z_T, 7)
    assert torch.equal(noise(z_T), z_T)
    again = command.starting_at(z_T + 1, 7)
    again(z_T)
    assert torch.equal(noise(z_T), again(z_T)) and not torch.equal(noise(z_T), z_T)


def test_the_committed_table_is_whole(command: ModuleType, table: list[Row]) -> None:
    args = command.arguments(["runs"])
    check_form(table, list(command.cells(args)), command.DETERMINISTIC)
    model = pretrained("emoji-class")
    assert {row["reference"] for row in table if row["sampler"] in SAMPLERS} == {"1721", ""}
    assert len(model.config.conditioner.classes) == 12
    for row in table:
        assert row["n"] in {args.pictures, command.EXACT_N, 1721, 1721 - args.pictures}, row


FLOW = [("ddim", "trailing"), ("dpm_solver_pp", "trailing"), ("heun", "trailing")]
FLOW += [("ddim", "leading"), ("plms", "leading")]


@pytest.mark.parametrize(("sampler", "spacing"), FLOW)
def test_more_steps_come_nearer_to_the_end_of_the_flow(
    sampler: str, spacing: str, table: list[Row]
) -> None:
    grid = sorted({row["steps"] for row in table if row["sampler"] == sampler})
    found = [find(table, "distance", sampler, steps, spacing)["value"] for steps in grid]
    assert found == sorted(found, reverse=True) and found[0] > 10 * found[-1]


@pytest.mark.parametrize("steps", [5, 10, 20, 50, 100])
def test_the_second_order_method_is_nearer_at_equal_calls(steps: int, table: list[Row]) -> None:
    better, ddim = (find(table, "distance", name, steps) for name in ("dpm_solver_pp", "ddim"))
    assert better["high"] < ddim["low"]


def test_heuns_second_calls_do_not_pay_at_twenty(table: list[Row]) -> None:
    multistep, heun = (
        find(table, "distance", *which) for which in (("dpm_solver_pp", 20), ("heun", 10))
    )
    assert multistep["calls"] == heun["calls"] + 1 and multistep["high"] < heun["low"]


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver_pp"])
def test_quality_is_best_with_few_steps_but_not_the_fewest(sampler: str, table: list[Row]) -> None:
    two, ten, hundred = (find(table, "proxy_fid", sampler, steps) for steps in (2, 10, 100))
    assert ten["high"] < two["low"] and ten["high"] < hundred["low"]
    assert hundred["seconds"] > 6 * ten["seconds"]


@pytest.mark.parametrize("steps", [2, 5, 10, 20, 50])
def test_ending_at_the_data_draws_better_pictures(steps: int, table: list[Row]) -> None:
    trailing, leading = (
        find(table, "proxy_fid", "ddim", steps, spacing) for spacing in ("trailing", "leading")
    )
    assert trailing["high"] < leading["low"]


def test_the_spacing_that_is_nearer_depends_on_the_steps(table: list[Row]) -> None:
    for steps, nearer, farther in (
        (2, "trailing", "leading"),
        (20, "leading", "trailing"),
        (100, "trailing", "leading"),
    ):
        a, b = (find(table, "distance", "ddim", steps, spacing) for spacing in (nearer, farther))
        assert a["high"] < b["low"], steps


@pytest.mark.parametrize("steps", [50, 100])
def test_noise_on_the_way_helps_this_network(steps: int, table: list[Row]) -> None:
    ddpm, ddim = (find(table, "kid", name, steps) for name in ("ddpm", "ddim"))
    assert ddpm["high"] < ddim["low"]


def test_three_calls_are_too_few_to_average_slopes(table: list[Row]) -> None:
    for sampler, spacing in (("heun", "trailing"), ("plms", "leading")):
        lost = find(table, "proxy_fid", sampler, 2, spacing)
        assert lost["low"] > find(table, "proxy_fid", "ddim", 2)["high"]


@pytest.mark.parametrize("metric", [*METRICS, "distance"])
@pytest.mark.parametrize("steps", [5, 20])
def test_euler_is_ddim(metric: str, steps: int, table: list[Row]) -> None:
    euler, ddim = (find(table, metric, name, steps) for name in ("euler", "ddim"))
    assert euler["value"] == pytest.approx(ddim["value"], rel=1e-3)


def test_nothing_drawn_is_nearer_to_the_pictures_than_pictures_are(table: list[Row]) -> None:
    real, coded, *drawn = (row for row in table if row["metric"] == "proxy_fid")
    assert (real["sampler"], coded["sampler"]) == LIMITS and real["high"] < coded["low"]
    assert all(row["low"] > coded["high"] for row in drawn)


@pytest.mark.parametrize("steps", [5, 20, 50])
def test_guidance_makes_the_class_clearer(steps: int, table: list[Row]) -> None:
    plain, guided = (find(table, "accuracy", "ddim", steps, guidance=g) for g in (1.0, 3.0))
    assert guided["low"] > plain["high"] and guided["calls"] == 2 * plain["calls"]
