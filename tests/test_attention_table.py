"""The table of first stages with and without attention: how it is made, and what it says."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import command_of
from torch import Tensor

from minildm import PRESETS
from minildm.autoencoder import Autoencoder, AutoencoderConfig

RESULTS = Path(__file__).resolve().parent.parent / "data/results"


@pytest.fixture
def command() -> ModuleType:
    """data/results/inpainting.py as a module."""
    return command_of("inpainting")


def test_the_gain_is_paired_over_pictures(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each picture has a level of its own, which the difference does not see."""
    asked = []

    def measure(attends: bool, seed: int, steps: int, x: Tensor) -> tuple[Tensor, int]:
        asked.append((attends, seed, steps, tuple(x.shape)))
        level = 20 + 5 * torch.arange(len(x)).double()
        return level + 0.5 * attends + 0.1 * seed, 100 + attends

    monkeypatch.setattr(command, "measure", measure)
    table = command.table(steps=7, pictures=4, seeds=2)
    assert asked == [(a, s, 7, (4, 3, 64, 64)) for s in (0, 1) for a in (False, True)]
    gain = table["gain"]
    assert [gain[key] for key in ("value", "low", "high")] == pytest.approx([0.5] * 3)
    assert gain["n"] == 4
    assert [row["parameters"] for row in table["rows"]] == [100, 101, 100, 101]
    assert [row["kind"] for row in table["rows"][:2]] == ["without attention", "with attention"]


def parameters(config: AutoencoderConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Autoencoder(config).parameters())


def test_the_committed_table_is_of_these_presets() -> None:
    table = json.loads((RESULTS / "attention.json").read_text())
    config = PRESETS[table["preset"]].model
    for row in table["rows"]:
        attends = {"without attention": False, "with attention": True}[row["kind"]]
        wanted = AutoencoderConfig(**{**vars(config), "mid_attn": attends})
        assert row["parameters"] == parameters(wanted)
        assert row["psnr"]["low"] < row["psnr"]["value"] < row["psnr"]["high"]
    assert {row["kind"] for row in table["rows"]} == {"without attention", "with attention"}
    assert abs(table["gain"]["value"]) < 1 and table["gain"]["n"] == table["rows"][0]["psnr"]["n"]
