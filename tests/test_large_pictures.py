"""data/results/large_pictures.py: what differs between its trainings, and what it measures."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from scripts import command_of

import minildm
from minildm.intervals import Evaluation
from minildm.restoring import LABELS
from minildm.segmenter import Segmenter, SegmenterConfig

RESULTS = Path(__file__).resolve().parent.parent / "data/results"


@pytest.fixture(scope="module")
def command() -> ModuleType:
    """data/results/large_pictures.py as a module."""
    return command_of("large_pictures")


def test_a_sky_is_even_where_only_rows_differ(command: ModuleType) -> None:
    maps = torch.full((3, 64, 64), 3)
    maps[:, :32] = 1
    x = torch.linspace(-1, 1, 64)[:, None].expand(3, 3, 64, 64).clone()  # a gradient downwards
    x[1, :, :32, 32:] += 0.2  # two halves: 0.1 off the mean
    x[2, :, 32:, 32:] += 0.9  # the ground does not count
    assert torch.allclose(command.sky_spread(x, maps), torch.tensor([0.0, 0.1, 0.0]), atol=1e-5)


def test_grain_counts_little_and_objects_in_the_sky_not_at_all(command: ModuleType) -> None:
    generator, maps = torch.Generator().manual_seed(0), torch.zeros(1, 64, 64, dtype=torch.int64)
    noise = 0.8 * torch.randn(1, 3, 64, 64, generator=generator)
    assert command.sky_spread(noise, maps) < 0.8 / 6  # cells of 8 x 8: an eighth
    maps[:, 8:16, 8:24] = 50
    x = torch.where(maps == 50, 1.0, 0.0)[:, None].repeat(1, 3, 1, 1)
    assert float(command.sky_spread(x, maps)) == 0
    assert command.sky_spread(x, torch.full((1, 64, 64), 3)).isnan()  # no sky


def test_both_trainings_differ_in_the_scale_alone(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "BATCH", 2)
    monkeypatch.setattr(command, "SCENES", 4)
    judge = Segmenter(SegmenterConfig(labels=LABELS, width=8))
    minildm.save_model(judge, tmp_path / "judge")
    asked = {"--out": tmp_path, "--steps": 2, "--small": 2, "--wide": 2, "--calls": 1}
    asked |= {"--segmenter": tmp_path / "judge", "--device": "cpu"}
    command.main([str(tmp_path / "runs"), *(str(part) for pair in asked.items() for part in pair)])
    right, unscaled = (minildm.load_model(tmp_path / f"runs/{k}") for k in ("right", "unscaled"))
    assert float(right.autoencoder.scale) > 5 and float(unscaled.autoencoder.scale) == 1
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    z, large = (m.autoencoder.encode(x, sample=False) for m in (right, unscaled))
    assert torch.allclose(large, z * right.autoencoder.scale, rtol=1e-4, atol=1e-4)
    found = Evaluation.from_dict(json.loads((tmp_path / "large_pictures.json").read_text()))
    names = {f"{who}, {side} px" for who in ("right", "unscaled", "real") for side in (64, 256)}
    numbers = ("pixels", "iou", "pixels_shuffled", "sky_spread")
    assert set(found) == {f"{name}, {number}" for name in names for number in numbers}
    assert all(m.n == 2 for m in (found[key] for key in found))
    with Image.open(tmp_path / "large_pictures.png") as picture:
        assert picture.width > 3 * 256 and "scale right" in picture.info["Description"]
