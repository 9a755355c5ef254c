"""`make bench` at its smallest, and that both rivals compute the same."""

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parent / "bench"
SMALL = {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}


@pytest.fixture(scope="module")
def rivals() -> ModuleType:
    """tests/bench/against_diffusers.py, which imports its neighbours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        return importlib.import_module("against_diffusers")


@pytest.mark.parametrize("model", ["KL", "VQ", "cross-attention", "self-attention"])
def test_both_rivals_compute_the_same(model: str, rivals: ModuleType) -> None:
    first_stage = model in ("KL", "VQ")
    config = rivals.MODELS["first_stage" if first_stage else "unet"][model]
    config = replace(config, **SMALL, **({} if first_stage else {"attn_levels": (1,)}))
    x = torch.randn(3, 3 if first_stage else 4, 8, 8)
    runs_of, steps = (rivals.first_stage_runs, ()) if first_stage else (rivals.unet_runs, (5,))
    compared = []
    for what, *runs in runs_of(*rivals.rivals(config), x, lambda net, loss: loss, *steps):
        found = []
        for run in runs:
            torch.manual_seed(0)  # both draw the same from the posterior
            with torch.no_grad():
                found.append(run())
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4 * float(found[0].abs().max()))
        compared.append(what)
    assert len(compared) == 3 and compared[0] == "training step"


def test_the_command_writes_its_tables(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "bench.py"), "unet", "commands", "--quick"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    tables = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(tables) == {"bench_unet", "bench_commands"}
    compared = tables["bench_unet"]["rows"]
    assert len(compared) == 2 * 2 * 3 and all(row["ratio"] > 0 for row in compared)
    assert done.stdout.count("target") == 2  # a verdict each for float32 and bfloat16
