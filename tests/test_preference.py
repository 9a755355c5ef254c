"""The preference panel: driven by its buttons, as a front end would, and read from its file."""

import base64
import csv
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from minildm.intervals import proportion_interval
from minildm.preference import COLUMNS, SIDES, PreferencePanel

N = 12
NAMES = ("model", "bicubic")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run/votes.csv"


def tones(start: float) -> Tensor:
    """N pictures of one tone each, all different."""
    tone = start + torch.arange(N) / 40
    return tone.view(N, 1, 1, 1).expand(N, 3, 8, 8).clone()


FIRST, SECOND = tones(-1.0), tones(0.2)


def panel_at(path: Path, **options: Any) -> PreferencePanel:
    return PreferencePanel(FIRST, SECOND, path, **({"names": NAMES, "seed": 3} | options))


def seen(panel: PreferencePanel) -> tuple[float, float]:
    """The tones on the screen, left and right, read from the pictures that are shown."""
    found = []
    for side in SIDES:
        source = re.search(r'base64,([^"]+)"', panel.frames[side].value)[1]
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(source))))
        found.append(float(pixels.mean()) / 127.5 - 1)
    return found[0], found[1]


def lines(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_click_is_a_vote_for_what_is_on_that_side(path: Path) -> None:
    """Always the darker one, which is the model's: on whichever side it is."""
    panel, sides = panel_at(path), []
    while panel.current is not None:
        dark, light = FIRST[panel.current, 0, 0, 0], SECOND[panel.current, 0, 0, 0]
        tone = seen(panel)
        assert sorted(tone) == pytest.approx([float(dark), float(light)], abs=0.01)
        assert panel.shown[0][0, 0, 0] == pytest.approx(tone[0], abs=0.01)
        sides.append(SIDES[int(tone[0] > tone[1])])
        panel.buttons[sides[-1]].click()
    assert set(sides) == set(SIDES) and len(sides) == N
    assert [row["chosen"] for row in lines(path)] == ["model"] * N
    assert panel.share() == proportion_interval(N, N)
    assert [SIDES[row["right"] == "model"] for row in lines(path)] == sides
    assert all(button.disabled for button in panel.buttons.values())
    assert "model was preferred in" in panel.said.value and "(N=12)" in panel.said.value


def test_one_who_always_clicks_left_prefers_nothing(tmp_path: Path) -> None:
    chosen = 0
    for seed in range(40):
        panel = panel_at(tmp_path / f"{seed}.csv", seed=seed)
        for _ in range(4):
            panel.buttons["left"].click()
        chosen += sum(vote == "model" for vote in panel.votes().values())
    assert abs(chosen - 80) < 4 * (160 * 0.25) ** 0.5


def test_the_order_follows_the_seed(tmp_path: Path) -> None:
    orders = [panel_at(tmp_path / "votes.csv", seed=seed).order for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == list(range(N))


def test_a_study_goes_on_where_it_was(path: Path) -> None:
    panel = panel_at(path)
    for _ in range(5):
        panel.buttons["right"].click()
    before, asked = path.read_bytes(), panel.current
    again = panel_at(path)
    assert again.current == asked not in again.votes() and len(again.votes()) == 5
    assert "5 of 12 pairs" in again.said.value and repr(again) == "PreferencePanel(5 of 12 pairs)"
    again.buttons["left"].click()
    assert path.read_bytes().startswith(before) and len(lines(path)) == 6
    assert sorted(p.name for p in path.parent.iterdir()) == ["votes.csv"]


def test_two_windows_do_not_count_a_pair_twice(path: Path) -> None:
    one, other = panel_at(path), panel_at(path)
    one.buttons["left"].click()
    other.buttons["right"].click()  # the pair that it still shows has a vote
    assert len(lines(path)) == 1 and other.current == one.current


def test_nothing_on_the_screen_names_the_pictures(path: Path) -> None:
    panel = panel_at(path, question="Which is <the> real one?")
    data, metadata = panel._repr_mimebundle_()
    texts = [panel.asked.value, panel.said.value, data["text/plain"], metadata["image/png"]["alt"]]
    texts += [re.sub('base64,[^"]+', "", frame.value) for frame in panel.frames.values()]
    assert not any(name in text for name in NAMES for text in texts)
    assert "Which is &lt;the&gt; real one?" in panel.asked.value
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.box.model_id
    assert Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).size[0] > 256


def test_at_the_end_there_is_no_picture(path: Path) -> None:
    panel = panel_at(path)
    while panel.current is not None:
        panel.vote("left")
    data, metadata = panel._repr_mimebundle_()
    assert "image/png" not in data and not metadata and panel.frames["left"].value == ""
    for ask in (lambda: panel.vote("left"), lambda: panel.shown):
        with pytest.raises(ValueError, match="each pair has its vote"):
            ask()
    assert panel_at(path).current is None


@pytest.mark.parametrize(
    "other", [{"seed": 4}, {"question": "Which is real?"}, {"names": ("model", "regression")}]
)
def test_votes_of_another_study_are_refused(path: Path, other: dict[str, Any]) -> None:
    panel_at(path).vote("left")
    with pytest.raises(ValueError, match=r"votes\.csv holds votes of another study"):
        panel_at(path, **other)
    with pytest.raises(ValueError, match="another study"):
        PreferencePanel(SECOND, FIRST, path, names=NAMES, seed=3)


@pytest.mark.parametrize("pair", ["99", "x", ""])
def test_a_damaged_file_is_refused(path: Path, pair: str) -> None:
    panel = panel_at(path)
    panel.vote("left")
    with path.open("a") as file:
        file.write(f"{pair},model,bicubic,model,{panel.study}\n")
    with pytest.raises(ValueError, match=r"votes\.csv is damaged"):
        panel_at(path)
    path.write_text(",".join(COLUMNS) + "\n0,model\n")
    with pytest.raises(ValueError, match="or is damaged"):
        panel_at(path)


@pytest.mark.parametrize(
    ("first", "second", "options", "said"),
    [
        (FIRST, SECOND[:3], {}, "must be pairs, got 12 and 3"),
        (FIRST[:0], SECOND[:0], {}, "must be pairs, got 0 and 0"),
        (FIRST, SECOND[..., :4], {}, r"second must be pictures \(N, 3, 8, 8\)"),
        (FIRST, SECOND * 9, {}, "second"),
        (FIRST, SECOND, {"names": ("a", "a")}, "must be two different ones"),
    ],
)
def test_bad_pairs_are_refused(
    first: Tensor, second: Tensor, options: dict, said: str, path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        PreferencePanel(first, second, path, **options)


def test_without_votes_there_is_no_share(path: Path) -> None:
    panel = panel_at(path)
    with pytest.raises(ValueError, match="no vote yet"):
        panel.share()
    with pytest.raises(ValueError, match="side='up' must be left or right"):
        panel.vote("up")
