"""Images of one's own, a captioned folder, through both stages."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_unet_config
from PIL import Image
from training.trainings import KL, LDM

from minildm import DataConfig, TextConfig, load_model

COLORS = ("red", "green", "blue")


def test_a_captioned_folder_trains_both_stages_and_may_be_moved(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for i, color in enumerate(COLORS * 4):
        (here / color).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), color).save(here / color / f"{i}.png")
        (here / color / f"{i}.txt").write_text(f"a {color} square")
    data = DataConfig(kind="folder", path=str(here), size=16)
    list(KL(tmp_path / "ae", KL.changed(data=data), data=None))
    text = TextConfig(d_cond=8, length=5, depth=1, heads=1, d_head=8)
    experiment = LDM.changed(conditioner=text, unet=tiny_unet_config(), data=data)
    options: dict[str, Any] = {"first_stage": tmp_path / "ae", "data": None}
    list(islice(LDM(tmp_path / "run", experiment, **options), 3))
    moved = replace(experiment, data=replace(data, path=str(here.rename(there))))
    assert [r.step for r in LDM(tmp_path / "run", moved, **options)] == list(range(1, 7))
    model = load_model(tmp_path / "run")
    assert len(model.sample(["a red square", "a blue square"], steps=2, seed=0)) == 2
    for i in range(3):
        (there / COLORS[i] / f"{i}.txt").write_text("a square of one colour")
    with pytest.raises(ValueError, match=r"has 5 tokens, at most 3; \d of \d+ are too long"):
        next(LDM(tmp_path / "new", moved, **options))  # before anything is encoded
