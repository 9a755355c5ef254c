"""`make bench` at its smallest, so that it cannot rot; what it measured, as the README shows it."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCH, RESULTS = ROOT / "tests/bench", ROOT / "data/results"
MIB = 2**20
CPU = torch.device("cpu")
TINY = {"width": 8, "width_mult": (1, 2), "groups": 4}
SMALL = {"KL": TINY, "VQ": {**TINY, "codebook_size": 8}}


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """tests/bench/bench.py, whose neighbours are found beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        return load(BENCH / "bench.py")


def results(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def test_pairs_are_run_in_turn_and_their_ratios_sorted_out(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    took = iter([9.0, 9.0, 1.0, 2.0, 6.0, 2.0, 3.0, 2.0, 2.0, 2.0, 4.0, 2.0])  # a, b, a, b, ...
    order = []

    def seconds(run: object, device: object) -> tuple[float, float]:
        order.append(run)
        wall = next(took)
        return wall, wall / 2

    monkeypatch.setattr(sys.modules["timing"], "seconds", seconds)
    pairs = bench.interleaved("a", "b", 5, CPU)
    assert order == ["a", "b"] * 6
    assert pairs == (3.0, 2.0, 1.5, 1.0, 2.0, 1.5)  # the first pair warms up: not counted


def test_the_shipped_models_are_timed(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.shipped(CPU, repeats=1, batch=1)
    rows = [line for line in capsys.readouterr().out.splitlines() if "time ratio" in line]
    assert [row.split("  ")[0] for row in rows] == [
        "encode",
        "decode",
        "one step of sampling",
        "training step, diffusion",
        "training step, first stage",
    ]


def test_the_first_stage_is_timed_against_diffusers(bench: ModuleType) -> None:
    stage = bench.first_stage
    configs = {name: replace(stage.CONFIGS[name], **small) for name, small in SMALL.items()}
    table = stage.compare(CPU, repeats=1, configs=configs, batch=(1, 3, 16, 16))
    assert len(table["rows"]) == 2 * 3 * 3
    assert all(row["ratio"] > 0 and row["cpu_ratio"] >= 0 for row in table["rows"])
    assert table["target"] == 1.05
    assert table.keys() == results("bench_first_stage.json").keys()


@pytest.mark.parametrize("half", [False, True], ids=("float32", "bfloat16"))
def test_both_contestants_compute_the_same(half: bool, bench: ModuleType) -> None:
    stage = bench.first_stage
    ours, theirs = stage.rivals(replace(stage.KL, **SMALL["KL"]))
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    runs = list(stage.contests(ours, theirs, stage.SETTINGS[1], x, half))
    decoded = [run() for run in runs[-1][1:]]
    dtype = torch.bfloat16 if half else torch.float32
    assert all(x_rec.dtype == dtype for x_rec in decoded)
    assert all(x_rec.is_contiguous(memory_format=torch.channels_last) for x_rec in decoded)
    assert stage.error(*(x_rec.float() for x_rec in decoded)) < (0.05 if half else 1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_their_loss_is_ours(name: str, bench: ModuleType) -> None:
    stage = bench.first_stage
    ours, theirs = stage.rivals(replace(stage.CONFIGS[name], **SMALL[name]))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.manual_seed(0)  # the same draw from both posteriors
    loss = stage.autoencoder_loss(ours, x, kl_weight=stage.KL_WEIGHT)["loss"]
    torch.manual_seed(0)
    assert stage.their_loss(theirs, x).item() == pytest.approx(loss.item(), rel=1e-5)


SMALL_UNET = {"width": 8, "width_mult": (1, 2), "groups": 4, "res_blocks": 1, "attn_levels": (1,)}
HEADS = {"cross-attention": {"heads": 2}, "self-attention": {"d_head": 8}}


@pytest.fixture
def unets(bench: ModuleType) -> dict:
    return {k: replace(v, **SMALL_UNET, **HEADS[k]) for k, v in bench.unet.CONFIGS.items()}


def test_the_unet_is_timed_against_diffusers(bench: ModuleType, unets: dict) -> None:
    batch, committed = (2, 4, 8, 8), results("bench_unet.json")
    one = bench.unet.SETTINGS[:1]
    table = bench.unet.compare(CPU, repeats=1, configs=unets, settings=one, batch=batch, steps=2)
    assert len(table["rows"]) == 2 * 3 * 3
    assert len(committed["rows"]) == 3 * len(table["rows"])
    assert table.keys() == committed.keys()
    assert [c["target"] for c in table["contests"]] == [1.05, 0.9, 0.9]
    assert table["rows"][0].keys() == committed["rows"][0].keys()


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("half", [False, True], ids=("float32", "bfloat16"))
def test_both_unets_compute_the_same(name: str, half: bool, bench: ModuleType, unets: dict) -> None:
    unet = bench.unet
    ours, theirs = unet.rivals(unets[name])
    given = unet.Inputs.random(unets[name], (3, 4, 8, 12), CPU)
    rounds = list(
        unet.contests(ours, theirs, unet.SETTINGS[1], unet.CONTESTS["cpu"][half], given, 5)
    )
    assert [what for what, _, _ in rounds] == ["forward", "training step", "5 steps of DDIM"]
    (_, *forward), (_, *training), (_, *sampling) = rounds
    for a, b in (forward, sampling):
        mine, other = a(), b()
        other = getattr(other, "sample", other)
        assert len(mine) == (3 if a is forward[0] else unet.SAMPLES)
        assert unet.error(mine.float(), other.float()) < (0.05 if half else 1e-4)
    before = [net.conv_out.weight.detach().clone() for net in (ours, theirs)]
    for step in training:
        step()
    for net, old in zip((ours, theirs), before, strict=True):
        assert (net.conv_out.weight.detach() - old).abs().max().item() == pytest.approx(
            1e-6, rel=0.05
        )  # lr


def test_the_median_of_a_contest_counts_like_with_like_alone(bench: ModuleType) -> None:
    unet = bench.unet
    contest = unet.CONTESTS["cpu"][1]
    ratios = [(0.7, True), (0.8, True), (0.99, True), (0.1, False), (0.2, False)]
    rows = [{"contest": "bfloat16", "ratio": r, "counted": c} for r, c in ratios]
    rows.append({"contest": "float32", "ratio": 0.1, "counted": True})
    assert unet.medians(rows, (contest,))[0]["ratio"] == 0.8


def test_options_are_timed_and_what_cannot_be_is_said(
    bench: ModuleType, unets: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: torch.nn.Module) -> None:
        def fails(*args: object) -> None:
            raise RuntimeError("no compiler\nmore")

        self.forward = fails

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    config, options = unets["cross-attention"], bench.options
    table = options.table(CPU, repeats=1, config=config, batch=(2, 4, 8, 8))
    rows = {row["name"]: row for row in table["rows"]}
    assert list(rows) == [option.name for option in options.OPTIONS]
    assert rows["compile"]["missing"] == "compiling failed, RuntimeError: no compiler"
    assert rows["TF32"]["missing"] == "CUDA alone has TF32"
    assert all(row["ratio"] > 0 for row in rows.values() if "missing" not in row)
    assert sum("missing" in row for row in rows.values()) == 3
    assert "not measured: CUDA" in options.line(rows["TF32"])


def test_memory_of_the_unet_is_that_of_its_activations(bench: ModuleType) -> None:
    memory = bench.unet_memory
    script = Path(memory.__file__)
    peak = memory.in_own_process(memory.Case(side=32, what="training"), script)["peak"]
    assert 20 * MIB < peak < 400 * MIB  # its weights and moments alone would be 366


def test_checkpointing_saves_memory_as_committed() -> None:
    peak = {(r["side"], r["what"]): r["peak"] for r in results("unet_memory.json")["rows"]}
    for side in (64, 128):
        assert peak[side, "checkpoint"] < 0.5 * peak[side, "training"]
        assert peak[side, "forward"] < peak[side, "checkpoint"]
    assert peak[128, "training"] == pytest.approx(4 * peak[64, "training"], rel=0.2)  # pixels


def test_the_committed_unet_met_its_targets_on_a_cpu() -> None:
    table = results("bench_unet.json")
    assert table["machine"]["device"].startswith("cpu")
    assert table["parameters"]["cross-attention"] == 23_970_948
    assert {c["name"]: c["ratio"] <= c["target"] for c in table["contests"]} == {
        "float32": True,
        "bfloat16": True,
        "bfloat16, theirs float32": True,
    }


def test_memory_is_measured_in_a_process_of_its_own(bench: ModuleType) -> None:
    """What the parent holds is not counted; what a convolution reads and writes is."""
    memory = bench.memory
    ballast = torch.ones(400 * MIB // 4)
    case = memory.Case(size=128, attention="fused")
    peak = memory.in_own_process(case)["peak"]
    assert 2 * 4 * case.width * case.size**2 < peak < ballast.nbytes


def test_the_table_of_memory_says_what_was_not_measured(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory = bench.memory
    monkeypatch.setattr(memory, "in_own_process", lambda case: {"peak": 3 * MIB, "seconds": 1.0})
    table = memory.table(32, sizes=(64, 1024))
    assert [row["peak"] for row in table["rows"]] == [3 * MIB] * 5 + [None]
    assert "the matrix alone is 16,384 MiB" in memory.line(table["rows"][-1])
    memory.keep(table, tmp_path)
    assert json.loads((tmp_path / "decode_memory.json").read_text()) == table
    assert "an N x N matrix, computed 1024 px, N = 65,536 16" in memory.figure(table).alt_text


def test_fused_attention_takes_no_more_memory_than_none() -> None:
    """As committed: the layer is no reason to leave attention out, an explicit softmax is."""
    table = results("decode_memory.json")
    peak = {(row["size"], row["attention"]): row["peak"] for row in table["rows"]}
    assert {size for size, _ in peak} == {256, 512, 1024}
    for size in (256, 512, 1024):
        assert peak[size, "fused"] < 1.15 * peak[size, "none"]
    assert peak[512, "explicit"] - peak[512, "fused"] > 1024 * MIB  # 4 N^2


def test_the_committed_times_met_the_target_for_a_cpu() -> None:
    table = results("bench_first_stage.json")
    assert table["machine"]["device"].startswith("cpu")
    assert table["parameters"]["KL"] == 13_859_495
    assert table["ratio"] <= table["target"] == 1.05


def test_the_readme_shows_the_committed_costs() -> None:
    readme = (ROOT / "README.md").read_text()
    assert load(RESULTS / "cost.py").with_tables(readme) == readme
