"""The command line with models of text and of layouts: drawing, measuring, bad input."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from minildm import (
    Autoencoder,
    ConditionerConfig,
    EmojiDataset,
    LatentDiffusion,
    LatentDiffusionConfig,
    cli,
    plots,
    save_model,
)
from minildm.data.emoji import STYLES
from minildm.data.scenes import OBJECTS
from minildm.data.variants import style_caption
from minildm.tokenizer import CaptionTokenizer

LAYOUT = {"classes": ["dog", "house"], "boxes": [[0.1, 0.5, 0.4, 0.9], [0.5, 0.2, 0.95, 0.8]]}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`run("sample", ...)`: `minildm sample ...` in this process, on the CPU; its exit status."""

    def call(*arguments: Any) -> int:
        words = ["minildm", *map(str, arguments), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", words)
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return call


@pytest.fixture
def saved(
    ldm_config: LatentDiffusionConfig, autoencoder: Autoencoder, tmp_path: Path, shaken: Callable
) -> Callable[..., Path]:
    """`saved(kind=...)`: the folder of a tiny model of 32 x 32 pictures."""

    def save(tokenizer: CaptionTokenizer | None = None, **conditioner: Any) -> Path:
        conditioner = ConditionerConfig(d_cond=8, depth=1, heads=2, d_head=4, **conditioner)
        model = LatentDiffusion(replace(ldm_config, conditioner=conditioner, image_size=32))
        model = shaken(model)
        if tokenizer is not None:
            model.conditioner.set_tokenizer(tokenizer)
        model.autoencoder.load_state_dict(autoencoder.state_dict())
        save_model(autoencoder, tmp_path / "first-stage")
        save_model(model, tmp_path / conditioner.kind, first_stage="../first-stage")
        return tmp_path / conditioner.kind

    return save


@pytest.fixture
def text(saved: Callable[..., Path]) -> Path:
    captions = [*EmojiDataset("all", 32).captions, *(style_caption("", s) for s in STYLES)]
    tokenizer = CaptionTokenizer.trained_on(captions)
    return saved(tokenizer, kind="text", vocab_size=len(tokenizer))


@pytest.fixture
def layouts(saved: Callable[..., Path]) -> Path:
    return saved(kind="layout", classes=OBJECTS)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The pictures that go into the sheet."""
    seen, grid = [], plots.image_grid
    monkeypatch.setattr(plots, "image_grid", lambda x, *a, **k: seen.append(x) or grid(x, *a, **k))
    return seen


def test_sample_draws_prompts(
    run: Callable, text: Path, drawn: list, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.png"
    arguments = ["a red apple", "a dog, noto style", "--n", 2, "--steps", 2, "--out", out]
    assert run("sample", text, *arguments) == 0
    said = capsys.readouterr()
    assert "4 pictures" in said.out and not said.err
    with Image.open(out) as picture:
        assert "a red apple, a dog, noto style" in picture.info["Description"]
    y = ["a red apple", "a red apple", "a dog, noto style", "a dog, noto style"]
    expected = cli.load_model(text).sample(y, steps=2, guidance_scale=3.0, seed=0)
    assert torch.equal(drawn[0], expected)


def test_sample_names_words_that_it_does_not_know_in_one_line(
    run: Callable, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sample", text, "a blurry quokka", "--steps", 1, "--out", tmp_path / "x.png") == 0
    line = "minildm: this model does not know 'blurry', 'quokka': read as [UNK]\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("several", [False, True])
def test_sample_draws_layouts_of_a_file(
    run: Callable, layouts: Path, drawn: list, tmp_path: Path, several: bool
) -> None:
    path, out = tmp_path / "layout.json", tmp_path / "x.png"
    path.write_text(json.dumps([LAYOUT, {k: v[:1] for k, v in LAYOUT.items()}][: 1 + several]))
    if not several:
        path.write_text(json.dumps(LAYOUT))
    assert run("sample", layouts, "--layout", path, "--steps", 2, "--n", 2, "--out", out) == 0
    row = list(zip(LAYOUT["classes"], LAYOUT["boxes"], strict=True))
    y = [row, row, *([row[:1]] * 2 if several else [])]
    expected = cli.load_model(layouts).sample(y, steps=2, guidance_scale=3.0, seed=0)
    assert torch.equal(drawn[0], expected)
    with Image.open(out) as picture:
        assert "dog, house" in picture.info["Description"]


def test_a_prompt_that_is_too_long_is_refused(
    run: Callable, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sample", text, "a dog " * 30, "--out", tmp_path / "x.png") == 2
    assert "has 60 tokens, must be at most 22" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"classes": ["dog"], "boxes": [[0.1, 0.5, 1.4, 0.9]]}, "rising, in [0, 1]"),
        ({"classes": ["dog"], "boxes": [[0.1, 0.9, 0.4, 0.5]]}, "rising, in [0, 1]"),
        ({"classes": ["dog"], "boxes": [[0.1, float("nan"), 0.4, 0.5]]}, "rising, in [0, 1]"),
        ({"classes": ["dgo"], "boxes": [[0.1, 0.5, 0.4, 0.9]]}, "did you mean 'dog'"),
        ({"classes": ["dog"], "boxes": [[0.1, 0.5, 0.4]]}, "must have four numbers"),
        ({"classes": ["dog"] * 5, "boxes": [[0.1, 0.5, 0.4, 0.9]] * 5}, "K <= 4"),
        ({"classes": ["dog", "cat"], "boxes": [[0.1, 0.5, 0.4, 0.9]]}, "is no layout"),
        ({"classes": ["dog"]}, "is no layout, KeyError('boxes')"),
        ({"classes": [], "boxes": []}, "without boxes"),
        ([], "without boxes"),
        ("dog", "is no layout"),
        ({"classes": ["dog"], "boxes": ["left"]}, "is no layout"),
    ],
)
def test_a_bad_layout_ends_in_one_line(
    content: Any,
    said: str,
    run: Callable,
    layouts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "layout.json"
    path.write_text(json.dumps(content))
    assert run("sample", layouts, "--layout", path, "--out", tmp_path / "x.png") == 2
    message = capsys.readouterr().err
    assert said in message and len(message.strip().splitlines()) == 1
    assert not (tmp_path / "x.png").exists()


def test_layouts_are_for_models_of_layouts_and_nothing_else(
    run: Callable, layouts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, broken = tmp_path / "layout.json", tmp_path / "broken.json"
    path.write_text(json.dumps(LAYOUT))
    broken.write_text('{"classes": ["dog"')
    wrong = {
        ("emoji-class", "--layout", path): "follows classes: give their names",
        (layouts,): "follows layouts: give --layout",
        (layouts, "dog", "--layout", path): "follows layouts: give --layout, and no names",
        (layouts, "--layout", broken): "broken.json is no layout, JSONDecodeError",
        (layouts, "--layout", tmp_path / "none.json"): "none.json",
    }
    for arguments, said in wrong.items():
        assert run("sample", *arguments, "--out", tmp_path / "x.png") == 2
        message = capsys.readouterr().err
        assert said in message and len(message.strip().splitlines()) == 1


def test_evaluate_asks_whether_samples_follow_their_captions(
    run: Callable, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "text.json"
    scales = ["--guidance-scale", 1, "--guidance-scale", 3]
    assert run("evaluate", text, "--n", 24, "--steps", 1, *scales, "--out", out) == 0
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found
    asked = {f"{kind}, guidance {s}" for kind in ("plain", "styled") for s in (1, 3)}
    assert asked < found.keys()
    plain, styled = found["plain, guidance 1"], found["styled, guidance 3"]
    questions = {"label", "group"}
    for suffix in ("", "_real", "_shuffled"):
        assert {f"{q}{suffix}" for q in questions} <= plain["measured"].keys()
        assert styled["measured"][f"style{suffix}"]["n"] == 24
    assert "style" not in plain["measured"]
    assert styled["measured"]["style_real"]["low"] > styled["measured"]["style"]["value"]
    assert styled["settings"]["follows"]["style"] is False  # it was never trained
    assert styled["settings"]["guidance_scale"] == 3 and styled["settings"]["unknown"] == 0
    assert styled["style"].endswith("(N=24)") and found["seed"] == 0


def test_evaluate_asks_whether_objects_are_in_their_boxes(
    run: Callable, layouts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "layout.json"
    assert run("evaluate", layouts, "--n", 8, "--steps", 1, "--out", out) == 0
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found
    measured = found["guidance 3"]["measured"]
    for name in ("objects", "filled", "empty", "found", "iou"):
        assert {name, f"{name}_real", f"{name}_shuffled"} <= measured.keys()
    assert measured["objects_real"]["low"] > measured["objects"]["high"]  # it was never trained
    assert not any(found["guidance 3"]["settings"]["follows"].values())


def test_evaluate_takes_the_judge_that_is_named(
    run: Callable, layouts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("evaluate", layouts, "--judge", "emoji-kl-f4") == 2
    assert "judge='emoji-kl-f4' is not a judge" in capsys.readouterr().err
    assert run("evaluate", layouts, "--judge", "emoji-judge", "--n", 2, "--steps", 1) == 2
    assert "must be one of crops of scenes" in capsys.readouterr().err


def test_the_help_shows_what_a_layout_is(
    run: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    assert run("sample", "--help") == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)  # without colours
    assert '{"classes": ["dog"], "boxes": [[0.1, 0.5, 0.4, 0.9]]}' in shown
