"""Where a sweep finds what it needs: data/, the folders of models, a folder of its own."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minildm import SWEEPS, Run, Sweep
from minildm.files import data_dir, write_json
from minildm.sweeps.running import claim


def test_without_data_there_is_help_and_no_traceback() -> None:
    words = ["-m", "minildm", "sweep", "--help"]
    away = {**os.environ, "MINILDM_DATA": "/nonexistent", "COLUMNS": "200"}
    told = subprocess.run([sys.executable, *words], env=away, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "conditioning; or a TOML file" in " ".join(told.stdout.split())


def test_a_standard_sweep_asks_for_data_when_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINILDM_DATA", "/nonexistent")
    assert len(SWEEPS) == 9 and "sampler" in SWEEPS and "g" not in SWEEPS
    with pytest.raises(FileNotFoundError, match="no data folder at /nonexistent"):
        SWEEPS["sampler"]


def card_at(folder: Path, name: str, **changes: Any) -> Path:
    """A folder that looks like a shipped model's, as far as its config tells."""
    card = json.loads((data_dir() / "weights" / name / "config.json").read_text())
    write_json(folder / "config.json", card | changes)
    return folder


@pytest.mark.parametrize("kind", [str, Path])
def test_folders_are_kept_by_their_whole_path(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card_at(tmp_path / "runs/ae", "emoji-kl-f4")
    card_at(tmp_path / "runs/ldm", "emoji-class")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    folder = {"data.kind": "folder", "data.path": kind("pictures"), "data.subgroups": []}
    first = {"first_stage": {"data": {"kind": "folder", "path": kind("pictures")}}}
    levels = {
        "first": {"trained_first_stage": kind("runs/ae")},
        "whole": {"model": kind("runs/ldm")},
        "shipped": {"model": "emoji-class"},
        "data": {**folder, **first},
    }
    sweep = Sweep(name="x", levels=levels)
    monkeypatch.chdir("elsewhere")
    runs = {run.level: Run.from_dict(run.as_dict()) for run in sweep.runs(seeds=[0])}
    plans = {level: run.plan() for level, run in runs.items()}
    assert plans["first"].trained_first_stage == str(tmp_path / "runs/ae")
    assert plans["whole"].model == str(tmp_path / "runs/ldm")
    assert plans["shipped"].model == "emoji-class"
    assert plans["data"].experiment.data.path == str(tmp_path / "pictures")
    assert plans["data"].first_stage.data.path == str(tmp_path / "pictures")
    assert Sweep.from_dict(sweep.as_dict()) == sweep


def test_models_that_are_not_ready_or_of_other_pictures_are_refused(tmp_path: Path) -> None:
    config = json.loads((data_dir() / "weights/emoji-class/config.json").read_text())["config"]
    config["conditioner"]["classes"] = ["heart", "cats"]
    cats = card_at(tmp_path / "cats", "emoji-class", config=config)
    early = card_at(tmp_path / "early", "emoji-kl-f4", info={"unfinished": "its scale"})
    odd = card_at(tmp_path / "odd", "emoji-class", config={"unet": {}})
    for level, said in (
        ({"model": cats}, "no subgroups of the emoji, such as 'cats'"),
        ({"trained_first_stage": early}, f"trained_first_stage='{early}': it is still in training"),
        ({"model": odd}, f"model='{odd}': "),
    ):
        with pytest.raises(ValueError, match=r"^x=bad: ") as caught:
            Sweep(name="x", levels={"bad": level})
        assert said in str(caught.value)


def test_a_folder_s_sweep_is_known_by_all_that_it_does(tmp_path: Path) -> None:
    sweep = Sweep(name="x", levels={"base": {}, "wide": {"unet.width": 48}})
    claim(sweep, tmp_path)
    kept = (tmp_path / "sweep.json").read_text()
    other = replace(sweep, levels={"other": {}, "third": {}, "wide": {"unet.width": 48}})
    with pytest.raises(ValueError, match="holds another sweep") as caught:
        claim(other, tmp_path)
    for said in ("levels.base: {} there, nothing asked", "levels.third: nothing there, {} asked"):
        assert said in str(caught.value)
    for change in ({"shared": {"unet.width": 16}}, {"samplings": {"few": {}}}, {"samples": 400}):
        with pytest.raises(ValueError, match="holds another sweep"):
            claim(replace(sweep, **change), tmp_path)
    assert (tmp_path / "sweep.json").read_text() == kept
    told = replace(sweep, question="What now?", paper="Tab. 1", seeds=(7,))
    assert claim(told, tmp_path) == replace(told, seeds=(0, 1, 2, 7))


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "x"}', '{"name": "x", "levels": {"a": 1}}'])
def test_a_definition_that_is_none_is_refused_by_its_path(text: str, tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        claim(Sweep(name="x", levels={"base": {}}), tmp_path)
    assert str(tmp_path / "sweep.json") in str(caught.value)
