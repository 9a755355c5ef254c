"""What came after the paper: the command at its smallest, and what the committed table says."""

import csv
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import RESULTS, command_of

from minildm import EmojiDataset, NoiseSchedule

Table = dict[tuple[str, str, str], dict[str, str]]  # (variant, seed, metric) -> its row
STUDENT = 4.302653  # of two degrees of freedom, 95 %
SAMPLED = ("proxy_fid", "accuracy", "brightness", "spread")


@pytest.fixture(scope="module")
def command() -> ModuleType:
    """data/results/beyond.py as a module."""
    return command_of("beyond")


@pytest.fixture(scope="module")
def table() -> Table:
    return read(RESULTS / "beyond.csv")


def read(path: Path) -> Table:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = {(row["variant"], row["seed"], row["metric"]): row for row in rows}
    assert len(table) == len(rows)  # nothing twice
    return table


def metrics_of(variant: str, steps: tuple[int, ...], times: tuple[int, ...]) -> set[str]:
    if variant in ("real pictures", "first stage"):
        return set(SAMPLED)
    if variant.startswith("guid"):
        return {f"{name}_{steps[-1]}" for name in (*SAMPLED, "calls")}
    found = {f"{name}_{k}" for name in (*SAMPLED, "calls", "distance") for k in steps}
    found |= {f"z0_error_{t}" for t in times}
    return found | ({"bend"} if "flow" in variant else set())


def check_form(
    table: Table, command: ModuleType, trained: list[str], seeds: int, n: dict[str, int]
) -> None:
    """Every number once for each seed, and the mean over seeds with its interval.

    n: of how many things a metric is a mean, by its first word; "": of all others.
    """
    variants = [*trained, *(["guided", "guidance interval"] if "base" in trained else [])]
    wanted = {(name, "", m) for name in ("real pictures", "first stage") for m in SAMPLED}
    for variant in variants:
        for metric in metrics_of(variant, command.STEPS, command.TIMES):
            wanted |= {(variant, seed, metric) for seed in (*map(str, range(seeds)), "mean")}
    assert set(table) == wanted
    for (variant, seed, metric), row in table.items():
        assert list(row) == list(command.COLUMNS) and row["device"]
        if seed != "mean":
            assert not row["low"] and not row["high"]
            assert int(row["n"]) == n.get(metric.split("_")[0], n[""]), metric
            assert (seed == "") == (row["step"] == "")
            continue
        values = [float(table[variant, str(k), metric]["value"]) for k in range(seeds)]
        value, low, high = (float(row[key]) for key in ("value", "low", "high"))
        assert value == pytest.approx(statistics.mean(values), rel=1e-4, abs=1e-5)
        assert low <= value <= high and int(row["n"]) == seeds
        if seeds == 3:
            half = STUDENT * statistics.stdev(values) / 3**0.5
            assert (high - low) / 2 == pytest.approx(half, rel=1e-2, abs=1e-5)


@pytest.fixture
def small(command: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The command at its smallest; it sets the number of threads."""
    sizes = {"STEPS": (2, 3), "FINE": 4, "EXACT_N": 4, "TIMES": (20, 999), "PAIR_STEPS": 2}
    for name, value in (sizes | {"CLASSES": ("heart", "time")}).items():
        monkeypatch.setattr(command, name, value)
    threads = torch.get_num_threads()
    yield command
    torch.set_num_threads(threads)


def test_the_command_trains_measures_and_does_nothing_twice(
    small: ModuleType, tmp_path: Path
) -> None:
    trained = ["base", "zero terminal SNR", "reflow"]
    argv = [str(tmp_path / "runs"), "--out", str(tmp_path), "--device", "cpu", "--steps", "2"]
    argv += ["--pictures", "20", "--seeds", "2", "--variants", *trained]
    small.main(argv)
    table = read(tmp_path / small.TABLE)
    held = len(EmojiDataset("val", 32, subgroups=small.CLASSES))
    check_form(table, small, trained, 2, {"": 20, "distance": 4, "bend": 4, "z0": held})
    assert table["reflow", "0", "bend"]["step"] == "1"  # half as long
    calls = {way: table[way, "0", "calls_3"]["value"] for way in ("base", "guided")}
    assert calls == {"base": "3", "guided": "6"}
    assert 3 < float(table["guidance interval", "0", "calls_3"]["value"]) < 6
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").glob("*/training/*")}
    assert len(before) == 2 * 2 * 4  # run.json and state.pt; the flow that reflow begins with
    small.main(argv)
    assert read(tmp_path / small.TABLE) == table
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_folder_with_another_training_is_refused(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [str(tmp_path), "--steps", "2", "--pictures", "20", "--variants", "reflow"]
    setting = small.prepared(small.arguments(argv), torch.device("cpu"))[0]
    small.one_run("reflow", 0, setting)
    fewer = setting._replace(args=small.arguments([*argv, "--pictures", "16"]))
    with pytest.raises(ValueError, match=r"reflow-0 .*pairs.count: 80 there, 64 asked"):
        small.one_run("reflow", 0, fewer)
    longer = setting._replace(args=small.arguments([*argv, "--steps", "3"]))
    with pytest.raises(ValueError, match=r"flow-0 .*steps: 2 there, 3 asked"):
        small.one_run("flow", 0, longer)
    with monkeypatch.context() as patch:
        patch.setitem(small.VARIANTS, "flow", small.VARIANTS["min-SNR"])
        with pytest.raises(ValueError, match=r"weighting: simple there, min_snr asked"):
            small.one_run("reflow", 0, setting)  # it begins with the flow
    setting.autoencoder.scale.mul_(2)
    with pytest.raises(ValueError, match=r"first_stage: [0-9a-f]{64} there"):
        small.one_run("flow", 0, setting)


def test_variants_differ_from_the_base_in_what_they_say(command: ModuleType) -> None:
    made = {name: command.experiment_of(name, 1, 40) for name in command.VARIANTS}
    base = made["base"]
    assert base.objective.predict == "eps" and base.objective.weighting == "simple"
    assert made["v"].objective.predict == made["zero terminal SNR"].objective.predict == "v"
    assert made["min-SNR"].objective.weighting == "min_snr"
    ends = {name: one.schedule.build().alphas_cumprod[-1] for name, one in made.items()}
    assert [name for name, end in ends.items() if end == 0] == ["zero terminal SNR"]
    assert made["reflow"].train.steps == 20 and base.train.steps == 40
    for one in made.values():
        assert (one.unet, one.data, one.t_bias) == (base.unet, base.data, 1.0)
        assert one.train.lr == base.train.lr and one.train.seed == 1


def test_the_guided_interval_is_that_of_its_paper(command: ModuleType) -> None:
    snr = NoiseSchedule.scaled_linear().snr(torch.tensor([130, 131, 646, 647]))
    inside = [command.SIGMAS[0] <= s <= command.SIGMAS[1] for s in (snr**-0.5).tolist()]
    assert inside == [False, True, True, False]


def test_the_committed_table_is_whole(command: ModuleType, table: Table) -> None:
    n = {"": 200, "distance": command.EXACT_N, "bend": command.EXACT_N}
    n["z0"] = len(EmojiDataset("val", 32, subgroups=command.CLASSES))
    check_form(table, command, list(command.VARIANTS), 3, n)
    trained = [row for row in table.values() if row["step"]]
    assert {row["step"] for row in trained} == {"500", "250"}


def always_less(table: Table, one: tuple[str, str], other: tuple[str, str]) -> bool:
    """With every seed; each named by variant and metric."""
    pairs = [[table[v, str(k), m] for v, m in (one, other)] for k in range(3)]
    return all(float(a["value"]) < float(b["value"]) for a, b in pairs)


def test_what_the_weights_say_shows_in_the_errors(table: Table) -> None:
    for variant in ("v", "zero terminal SNR", "flow"):
        assert always_less(table, (variant, "z0_error_999"), ("base", "z0_error_999"))
    assert always_less(table, ("base", "z0_error_100"), ("v", "z0_error_100"))
    assert always_less(table, ("flow", "z0_error_100"), ("v", "z0_error_100"))


def test_few_steps_are_for_v_and_for_flows(table: Table) -> None:
    for variant in ("v", "zero terminal SNR", "flow", "reflow"):
        high = float(table[variant, "mean", "proxy_fid_2"]["high"])
        assert high < float(table["base", "mean", "proxy_fid_2"]["low"])
    for steps in (2, 5):
        metric = f"proxy_fid_{steps}"
        assert always_less(table, ("flow", metric), ("base", metric))
        flow, v = (float(table[name, "mean", metric]["value"]) for name in ("flow", "v"))
        assert flow < v
    for metric in ("bend", "distance_2", "distance_20"):
        assert always_less(table, ("reflow", metric), ("flow", metric))


def test_guidance_finds_the_class_and_the_interval_saves_calls(table: Table) -> None:
    for way in ("guided", "guidance interval"):
        assert always_less(table, ("base", "accuracy_20"), (way, "accuracy_20"))
    assert always_less(table, ("guidance interval", "calls_20"), ("guided", "calls_20"))
