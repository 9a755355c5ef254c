"""data/results/super_resolution.py: the regression's recipe, and the table at its smallest."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scripts import command_of
from torch import Tensor

from minildm.experiments import as_regression
from minildm.intervals import Evaluation
from minildm.presets import PRESETS
from minildm.restoring import plain

RESULTS = Path(__file__).resolve().parent.parent / "data/results"


@pytest.fixture
def command() -> ModuleType:
    """data/results/super_resolution.py as a module."""
    return command_of("super_resolution")


def test_the_regression_is_the_presets_network_asked_at_once(command: ModuleType) -> None:
    experiment = command.regression_experiment(7)
    ours = as_regression(PRESETS["emoji-sr"])
    assert experiment.train.steps == 7 and experiment.train.lr == ours.train.lr
    assert (experiment.unet, experiment.objective) == (ours.unet, ours.objective)
    assert experiment.t_bias == ours.t_bias and experiment.data == ours.data


def test_the_command_at_its_smallest(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rivals whose order is known; what is measured once is not made again."""
    made = []

    def rivals(given: dict[str, Tensor], *_: Any) -> dict[str, Any]:
        def noisy() -> Tensor:
            made.append("noisy")
            x = plain(given)
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            return (x + 0.3 * noise).clamp(-1, 1)

        return {"bicubic": lambda: plain(given), "noisy": noisy}

    monkeypatch.setattr(command, "rivals", rivals)
    run = tmp_path / "run"
    arguments = [str(run), "--out", str(tmp_path), "--pictures", "24", "--untrained"]
    for _ in range(2):
        command.main([*arguments, "--device", "cpu"])
    table = json.loads((tmp_path / command.TABLE).read_text())
    found = {name: Evaluation.from_dict(row) for name, row in table["rows"].items()}
    assert set(found) == {"bicubic", "noisy", "first stage"} and made == ["noisy"]
    assert table["regression_steps"] == 0 and found["bicubic"]["psnr"].n == 24
    for key in ("psnr", "ssim", "kept"):
        values = [found[name][key].value for name in ("noisy", "bicubic", "first stage")]
        assert values == sorted(values)
    for key in ("perceptual", "proxy_r_fid"):
        assert found["first stage"][key].value < found["noisy"][key].value
    assert all(row["seconds"] >= 0 for row in table["rows"].values())
    assert len(list((run / "measured").iterdir())) == 3


def test_each_way_of_guiding_has_its_row(command: ModuleType) -> None:
    given = {"low_res": torch.zeros(2, 3, 16, 16)}
    asked = command.rivals(given, 2, torch.device("cpu"), None)
    assert {"bicubic", "concatenation", "concatenation, guided"} < set(asked)
    assert sum(name.startswith("unconditional, guided") for name in asked) == 2
    assert asked["concatenation"]().shape == (2, 3, 64, 64)
    assert "regression" not in asked
