"""`minildm evaluate` of models that are given a picture or a map, and of what has no judge."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minildm import PRESETS, LatentDiffusion, cli, pretrained, save_model
from minildm.data.scenes import BACKGROUNDS, OBJECTS
from minildm.files import data_dir
from minildm.segmenter import Segmenter, SegmenterConfig

FIRST_STAGE = data_dir() / "weights/emoji-kl-f4"
LABELS = (*BACKGROUNDS, *OBJECTS)


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """`evaluate(folder, ...)`: what the command writes with few steps, or its exit status."""

    def call(*arguments: Any) -> Any:
        out = tmp_path / "out.json"
        words = ["minildm", "evaluate", *map(str, arguments), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*words, "--steps", "1", "--out", str(out)])
        try:
            cli.main()
        except SystemExit as stop:
            if stop.code:
                return stop.code
        return json.loads(out.read_text())

    return call


@pytest.fixture
def untrained(tmp_path: Path, shaken: Callable) -> Callable[[str], Path]:
    """`untrained(preset)`: the folder of its model on the shipped first stage."""

    def save(preset: str) -> Path:
        first = pretrained("emoji-kl-f4")
        config = PRESETS[preset].model_config(first.config, labels=LABELS)
        model = LatentDiffusion(config)
        shaken(model.unet)
        model.autoencoder.load_state_dict(first.state_dict())
        save_model(model, tmp_path / preset, first_stage=str(FIRST_STAGE))
        return tmp_path / preset

    return save


@pytest.mark.parametrize(
    ("preset", "rival"), [("emoji-sr", "bicubic"), ("emoji-inpaint", "mean fill")]
)
def test_restored_pictures_are_measured_beside_their_rival(
    preset: str, rival: str, untrained: Callable, evaluate: Callable
) -> None:
    found = evaluate(untrained(preset), "--n", 24)
    assert {"model", rival} <= set(found)
    psnr = {name: found[name]["measured"]["psnr"] for name in ("model", rival)}
    assert psnr["model"]["n"] == 24 and psnr["model"]["value"] < psnr[rival]["value"]
    assert not found["model"]["settings"]["follows"]  # it has learned nothing


def test_maps_need_a_segmenter(
    untrained: Callable, evaluate: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = untrained("scenes-semantic")
    assert evaluate(model, "--n", 4) == 2
    assert "maps are judged by a segmenter" in capsys.readouterr().err
    save_model(Segmenter(SegmenterConfig(labels=LABELS, width=8)), tmp_path / "judge")
    found = evaluate(model, "--n", 4, "--judge", tmp_path / "judge")
    assert {"pixels", "pixels_real", "iou_shuffled"} <= set(found["measured"])
    alone = evaluate(tmp_path / "judge", "--n", 4)
    assert alone["measured"]["pixels"]["value"] == found["measured"]["pixels_real"]["value"]


def test_what_has_no_condition_has_no_judge(
    untrained: Callable, evaluate: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(untrained("emoji-uncond")) == 2
    assert "kind 'none' has nothing to judge it by" in capsys.readouterr().err
