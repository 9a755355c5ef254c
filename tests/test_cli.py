"""The command line: each command once, small; bad input ends in one sentence."""

import json
from pathlib import Path

import pytest
from PIL import Image

from minildm import cli, load_model

TINY = ["--steps", "2", "--batch-size", "2", "--set", "data.size=32"]


def run(*words: object) -> int:
    """The exit status of `minildm WORDS`."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("sys.argv", ["minildm", *map(str, words)])
        cli.main()
    return stop.value.code or 0


def test_both_stages_train_are_sampled_and_evaluated(tmp_path: Path) -> None:
    ae, ldm = tmp_path / "ae", tmp_path / "ldm"
    subgroups = ["--set", 'data.subgroups=["food-fruit"]']
    assert run("train", "emoji-kl-f8", "--run-dir", ae, *TINY, *subgroups) == 0
    changed = ["--set", "train.warmup_steps=1", "--set", "objective.predict=v", *subgroups]
    first = ["--first-stage", ae, "--run-dir", ldm]
    assert run("train", "emoji-class-f8", *first, *TINY, *changed) == 0
    assert load_model(ldm).config.objective.predict == "v"
    png = tmp_path / "samples.png"
    words = ["food-fruit", "--n", 3, "--steps", 2, "--out", png]
    assert run("sample", ldm, *words) == 0
    with Image.open(png) as image:
        assert image.size[0] > 3 * 32
    numbers = tmp_path / "numbers.json"
    assert run("evaluate", ldm, "--per-class", 2, "--steps", 2, "--out", numbers) == 0
    results = json.loads(numbers.read_text())
    assert results["model"] == str(ldm)
    assert json.dumps(results).count('"n":') >= 2


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("emoji-class", ["person", "food-fruit"]),
        ("emoji-text", ["a red apple"]),
        ("emoji-inpaint", ["--n", "2"]),
        ("emoji-sr", ["--n", "2"]),
        ("scenes-semantic", ["--n", "2"]),
        ("scenes-layout", ["--layout", "LAYOUT", "--n", "2"]),
    ],
)
def test_each_shipped_model_is_sampled_by_one_command(
    model: str, words: list[str], tmp_path: Path
) -> None:
    out, layout = tmp_path / "x.png", tmp_path / "layout.json"
    layout.write_text('{"classes": ["dog"], "boxes": [[0.1, 0.5, 0.4, 0.9]]}')
    words = [layout if word == "LAYOUT" else word for word in words]
    assert run("sample", model, *words, "--steps", 1, "--out", out) == 0
    assert out.stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "emoji-clas", "--run-dir", "x"], "preset='emoji-clas' is not known"),
        (["train", "emoji-class", "--run-dir", "x"], "requires --first-stage"),
        (["train", "emoji-kl-f4", "--run-dir", "x", "--set", "modl.patch=1"], "modl"),
        (["train", "emoji-kl-f4", "--run-dir", "x", "--set", "train.lr"], "NAME=VALUE"),
        (["train", "emoji-kl-f4", "--run-dir", "x", "--set", "model.channels=1000000000"], "10"),
        (["train", "emoji-kl-f4", "--run-dir", "x", "--folder", "nowhere"], "nowhere"),
        (["train", "emoji-kl-f4", "--run-dir", "x", "--device", "cuda:7"], "cuda:7"),
        (["sample", "emoji-clas"], "emoji-class"),
        (["sample", "emoji-kl-f4"], "not 'latent-diffusion'"),
        (["sample", "emoji-class", "frut"], "frut"),
        (["sample", "emoji-class"], "None"),
        (["sample", "scenes-layout", "--layout", "LAYOUT"], "is not a layout"),
        (["evaluate", "nothing"], "nothing"),
        (["convert", "nothing", "x"], "nothing"),
        (["demo", "--scale", "huge"], "huge"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = tmp_path / "layout.json"
    layout.write_text('{"boxes": 3}')
    paths = {"x": tmp_path / "x", "LAYOUT": layout}
    assert run(*(paths.get(word, word) for word in words)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("minildm: ") and "\n" not in error
    assert said in error
