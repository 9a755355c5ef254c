"""data/weights/ship.py: a run's folder becomes a shipped model, under a name that is new."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from minildm import load_model, pretrained, save_model

WEIGHTS = Path(__file__).resolve().parent.parent / "data/weights"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder of weights with the first stage alone."""
    folder = tmp_path / "weights"
    shutil.copytree(WEIGHTS / "emoji-kl-f4", folder / "emoji-kl-f4")
    shutil.copy(WEIGHTS / "ship.py", folder)
    return folder


def ship(weights: Path, run_dir: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ship.py", str(run_dir), name])
    runpy.run_path(str(weights / "ship.py"), run_name="__main__")


def test_a_new_name_gets_half_precision_and_the_shared_first_stage(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pretrained("emoji-class")
    info = {"data": "emoji-train"}
    save_model(model, tmp_path / "run", first_stage="../weights/emoji-kl-f4", info=info)
    ship(weights, tmp_path / "run", "emoji-new", monkeypatch)
    shipped = load_model(weights / "emoji-new")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.half().float(), shipped.state_dict()[name].half().float()), name
    parameters = sum(p.numel() for p in model.unet.parameters())
    assert (weights / "emoji-new/model.safetensors").stat().st_size < 2.2 * parameters + 20_000


def test_another_first_stage_is_refused(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pretrained("emoji-class")
    model.autoencoder.scale.mul_(2)
    save_model(model.autoencoder, tmp_path / "first-stage")
    save_model(model, tmp_path / "run", first_stage="../first-stage")
    with pytest.raises(SystemExit, match="another first stage"):
        ship(weights, tmp_path / "run", "emoji-new", monkeypatch)
    assert not (weights / "emoji-new").exists()
