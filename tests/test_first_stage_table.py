"""Tab. 8 on our data: the command at its smallest, and what the committed table says."""

import csv
import math
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from scripts import command_of

from minildm import PRESETS
from minildm.autoencoder import Autoencoder
from minildm.experiments import AutoencoderExperiment
from minildm.presets import LADDER, PIXELS

RESULTS = Path(__file__).resolve().parent.parent / "data/results"
RUNGS = ("emoji-kl-f8", "emoji-vq-f4")
METRICS = ("psnr", "ssim", "perceptual", "proxy_r_fid", "kid", "precision", "recall", "compression")
OF_CODES = ("bits_per_pixel", "code_usage", "perplexity")
FS = (2, 4, 8, 16, 32)
Row = dict[str, Any]


@pytest.fixture(scope="module")
def command() -> ModuleType:
    """data/results/first_stages.py as a module."""
    return command_of("first_stages")


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for key in ("value", "low", "high"):
            row[key] = float(row[key] or "nan")
        for key in ("f", "c", "n", "clusters", "parameters"):
            row[key] = int(row[key])
    return rows


@pytest.fixture(scope="module")
def table() -> list[Row]:
    return read(RESULTS / "tab8_first_stage.csv")


def find(table: list[Row], model: str, data: str, metric: str) -> Row:
    [row] = [r for r in table if (r["model"], r["data"], r["metric"]) == (model, data, metric)]
    return row


def check_form(rows: list[Row], names: tuple[str, ...]) -> None:
    """Every number once, for every model and both kinds of pictures; values in their intervals."""
    wanted = [
        (name, data, metric)
        for name in ("pixels", *names)
        for data in ("emoji", "photos")
        for metric in (*METRICS, *(OF_CODES if "-vq-" in name else ()))
    ]
    assert [(r["model"], r["data"], r["metric"]) for r in rows] == wanted
    for row in rows:
        assert math.isnan(row["low"]) == math.isnan(row["high"])
        assert not row["low"] > row["value"] and not row["high"] < row["value"], row
        on_features = row["metric"] in ("perceptual", "proxy_r_fid", "kid", "precision", "recall")
        assert bool(row["features"]) == on_features and row["device"]
        assert 2 <= row["clusters"] <= row["n"]
    exact = {row["metric"]: row["value"] for row in rows if row["model"] == "pixels"}
    assert exact["psnr"] == math.inf and exact["perceptual"] == 0 and exact["compression"] == 1


def test_the_command_trains_measures_and_does_nothing_twice(
    command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(tmp_path / "runs"), "--out", str(tmp_path), "--only", *RUNGS, "--steps", "2"]
    argv += ["--size", "32", "--subgroup", "food-fruit", "--pictures", "48", "--device", "cpu"]
    command.main(argv)
    rows = read(tmp_path / command.TABLE)
    check_form(rows, RUNGS)
    assert {row["steps"] for row in rows} == {"", "2"} and {row["images"] for row in rows} == {
        "",
        "16",
    }
    with Image.open(tmp_path / command.PICTURE) as picture:
        assert "KL, f = 8, VQ, f = 4" in picture.info["Description"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/measured.json")}
    assert len(before) == 3
    first = (tmp_path / command.TABLE).read_bytes()
    command.main([*argv, "--finished"])
    assert (tmp_path / command.TABLE).read_bytes() == first
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "3 first stages" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds another run .*steps: 2 there, 3 asked"):
        command.main([*argv[:-8], "--steps", "3", *argv[-8:]])


def test_an_unknown_rung_is_refused(command: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"emoji-kl-f3: not known; known: emoji-kl-f2"):
        command.main([str(tmp_path), "--only", "emoji-kl-f3"])


def test_an_unfinished_rung_is_not_measured(command: ModuleType, tmp_path: Path) -> None:
    assert not command.is_finished(tmp_path / "nothing")


def test_the_committed_table_is_whole(table: list[Row]) -> None:
    check_form(table, tuple(LADDER))
    n = {data: {row["n"] for row in table if row["data"] == data} for data in ("emoji", "photos")}
    assert n == {"emoji": {600}, "photos": {88}}


@pytest.mark.parametrize("name", LADDER)
def test_the_committed_rows_are_of_the_presets(name: str, table: list[Row]) -> None:
    preset, rows = PRESETS[name], [row for row in table if row["model"] == name]
    model, train = preset.model, preset.train
    parameters = sum(p.numel() for p in Autoencoder(model).parameters())
    seen = train.steps * train.batch_size * train.accumulate
    for row in rows:
        assert (row["regularizer"], row["f"], row["c"]) == (
            model.regularizer,
            model.f,
            model.z_channels,
        )
        assert (row["codes"], row["parameters"]) == (str(model.codebook_size or ""), parameters)
        assert (row["steps"], row["images"], row["seed"]) == (
            str(train.steps),
            str(seen),
            str(train.seed),
        )
        assert float(row["seconds"]) > 0
    found = {row["metric"]: row["value"] for row in rows}
    assert found["compression"] == pytest.approx(3 * model.f**2 / model.z_channels)
    if model.codebook_size:
        bits = math.log2(model.codebook_size) / model.f**2
        assert found["bits_per_pixel"] == pytest.approx(bits, rel=1e-4)
        assert 1 <= found["perplexity"] <= found["code_usage"] * model.codebook_size


@pytest.mark.parametrize("regularizer", ["kl", "vq"])
def test_every_step_up_the_ladder_costs_quality(regularizer: str, table: list[Row]) -> None:
    """What notebook 05 asserts."""
    for metric, sign in (("psnr", 1), ("ssim", 1), ("perceptual", -1), ("proxy_r_fid", -1)):
        rows = [find(table, f"emoji-{regularizer}-f{f}", "emoji", metric) for f in FS]
        values = [sign * row["value"] for row in rows]
        assert values == sorted(values, reverse=True), metric
    for finer, coarser in pairwise(FS):
        a, b = (find(table, f"emoji-{regularizer}-f{f}", "emoji", "psnr") for f in (finer, coarser))
        assert a["low"] > b["high"]


def test_the_picture_is_small_and_has_a_text() -> None:
    path = RESULTS / "tab8_reconstructions.png"
    assert path.stat().st_size < 150_000
    with Image.open(path) as picture:
        text = picture.info["Description"]
    assert all(f"{kind}, f = {f}" in text for kind in ("KL", "VQ") for f in FS)


def test_the_papers_rows_are_presets_of_the_paper() -> None:
    """Each row's f, c and codebook belong to one of the paper's first stages, and each has one."""
    with (RESULTS / "tab8_paper.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(r["regularizer"], int(r["f"]), int(r["c"]), r["codes"], r["attention"]) for r in rows}
    sizes = {
        (
            m.regularizer,
            m.f,
            m.z_channels,
            str(m.codebook_size or ""),
            "yes" if m.mid_attn else "no",
        )
        for name, preset in PRESETS.items()
        if isinstance(preset, AutoencoderExperiment)
        if name not in LADDER and "emoji" not in name
        for m in [preset.model]
    }
    assert len(found) == len(rows) == 15 and found == sizes
    for row in rows:
        assert "Tab. 8" in row["source"]
        assert 0 < float(row["ssim"]) < 1 and float(row["r_fid"]) > 0 and float(row["psim"]) > 0
    assert PIXELS.f == 1
