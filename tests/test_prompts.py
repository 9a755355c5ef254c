"""data/results/prompts.py: kinds of things, the sheet, the README's line."""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scripts import command_of
from torch import Tensor

from minildm import EmojiDataset, pretrained
from minildm.following import KINDS, Prompt, kind_following, kind_of
from minildm.intervals import Evaluation, Measured, ratio_interval, weighted_sum
from minildm.judge import JudgeConfig

RESULTS = Path(__file__).resolve().parent.parent / "data/results"
LABELS = ("food-fruit", "food-sweet", "animal-bird", "face-smiling", "heart")


@pytest.fixture(scope="module")
def command() -> ModuleType:
    """data/results/prompts.py as a module."""
    return command_of("prompts")


# --- kinds ---


class Reader(torch.nn.Module):
    """A judge that reads the label from a picture's first pixel."""

    config = JudgeConfig(labels=LABELS, groups=("all",), styles=("flat",))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"label": F.one_hot((10 * x[:, 0, 0, 0]).round().long(), len(LABELS)).float()}


def drawn(labels: list[str]) -> Tensor:
    """Pictures in which `Reader` sees these."""
    x = torch.zeros(len(labels), 3, 4, 4)
    x[:, 0, 0, 0] = torch.tensor([LABELS.index(label) for label in labels]) / 10
    return x


def test_kinds_are_subgroups_of_the_emoji_and_share_none() -> None:
    kinds = [kind_of(name) for name in EmojiDataset("val").classes]
    assert set(kinds) == {-1, *range(len(KINDS))}
    assert [kind_of(name) for name in LABELS] == [0, 0, 1, 2, -1]
    assert kind_of("place-other") == kind_of("") == kind_of(None) == -1


def test_another_subgroup_of_the_kind_is_right_and_no_kind_is_wrong() -> None:
    asked = [Prompt(f"{i}", "food-fruit") for i in range(6)] + [Prompt("bird", "animal-bird")] * 2
    seen = ["food-fruit", "food-sweet", "food-sweet", "heart", "face-smiling", "animal-bird"]
    seen += ["animal-bird", "heart"]
    shown = [Prompt("", label, subject=f"{i}") for i, label in enumerate(LABELS[:4] * 2)]
    real = drawn(["food-fruit", "heart", "animal-bird", "heart"] * 2)
    with pytest.raises(ValueError, match="clusters"):  # one caption alone tells nothing of birds
        kind_following(drawn(seen), asked, Reader(), real, shown)
    asked[-1] = Prompt("two birds", "animal-bird")
    found = kind_following(drawn(seen), asked, Reader(), real, shown)
    assert found["food"].value == 3 / 6 and found["animal"].value == 1 / 2
    assert found["food_real"].value == 2 / 4 and found["animal_real"].value == 1
    assert found["kind"].value == 4 / 8
    assert found["kind_real"].value == pytest.approx(6 / 8 * 2 / 4 + 2 / 8)  # not 4 of 6
    assert found["ratio"].value == pytest.approx(4 / 5)
    assert "face" not in found and found["kind_real"].n == 6


def test_styles_of_one_prompt_count_as_one_over_all() -> None:
    kinds = ["food-fruit", "animal-bird", "face-smiling"] * 8
    asked = [Prompt(f"{i} {s}", kind) for i, kind in enumerate(kinds) for s in range(5)]
    seen = [kind if i % 2 else "heart" for i, kind in enumerate(kinds) for _ in range(5)]
    shown = [Prompt("", kind, subject=f"{i}") for i, kind in enumerate(kinds)]
    real = (drawn(kinds), shown)
    apart = kind_following(drawn(seen), asked, Reader(), *real)["kind"]
    one = [p._replace(subject=p.caption.split()[0]) for p in asked]
    together = kind_following(drawn(seen), one, Reader(), *real)
    assert together["kind"].value == apart.value == 0.5
    assert together["kind"].high - together["kind"].low > 2 * (apart.high - apart.low)
    assert together["kind_shuffled"].value < 0.3 and together["ratio"].value == pytest.approx(0.5)


def test_a_kind_that_is_none_or_has_no_real_picture_is_refused() -> None:
    asked = [Prompt("a", "food-fruit"), Prompt("b", "heart")]
    real = (drawn(["food-fruit"] * 2), [Prompt("", "food-fruit", subject=c) for c in "ab"])
    with pytest.raises(ValueError, match="one of food, animal, face, vehicle, building"):
        kind_following(drawn(["heart"] * 2), asked, Reader(), *real)
    with pytest.raises(ValueError, match="all be in real"):
        kind_following(drawn(["heart"] * 2), [Prompt("a", "face-smiling")] * 2, Reader(), *real)
    with pytest.raises(ValueError, match="1, 2 pictures for 2, 2"):
        kind_following(drawn(["heart"]), asked, Reader(), *real)


# --- the intervals behind it ---


def test_a_ratios_interval_is_fiellers_where_bounds_are_symmetric() -> None:
    """Fieller: the r for which (a - r b)^2 = da^2 + r^2 db^2."""
    a, da, b, db = 0.6, 0.1, 0.8, 0.05
    found = ratio_interval(Measured(a, a - da, a + da, 50), Measured(b, b - db, b + db, 30))
    assert found.value == pytest.approx(a / b) and found.n == 50 and found.low < found.high
    for r in (found.low, found.high):
        assert (a - r * b) ** 2 == pytest.approx(da**2 + r**2 * db**2)


def test_ratios_at_the_edge() -> None:
    whole = Measured(0.8, 0.7, 0.9, 30)
    none = ratio_interval(Measured(0.0, 0.0, 0.1, 50), whole)
    assert (none.value, none.low) == (0, 0) and 0.1 / 0.8 < none.high < 0.1 / 0.7
    unsure = ratio_interval(whole, Measured(0.2, 0.0, 0.5, 3))
    assert unsure.value == pytest.approx(4) and math.isnan(unsure.low)
    with pytest.raises(ValueError, match="b > 0"):
        ratio_interval(whole, Measured(0.0, 0.0, 0.1, 3))


def test_intervals_of_sums_and_ratios_hold_the_truth_as_often_as_they_say() -> None:
    draw, held = torch.Generator().manual_seed(0), torch.zeros(2)
    for _ in range(1000):
        a, b, c = (
            Measured(m := t + s * float(torch.randn((), generator=draw)), m - 2 * s, m + 2 * s, 9)
            for t, s in ((0.5, 0.05), (0.7, 0.03), (0.4, 0.04))
        )
        both = weighted_sum([b, c], [0.75, 0.25])
        ratio = ratio_interval(a, both)
        held += torch.tensor(
            [both.low < 0.625 < both.high, ratio.low < 0.5 / 0.625 < ratio.high]
        ).float()
    assert ((held > 930) & (held < 975)).all()  # two standard errors: 95.4 %


def test_weights_must_be_positive_and_one_each() -> None:
    part = Measured(0.5, 0.4, 0.7, 8)
    assert weighted_sum([part], [2.0]) == pytest.approx((1.0, 0.8, 1.4, 8))
    for weights in ([], [1.0, 1.0], [0.0]):
        with pytest.raises(ValueError, match="must be positive, one for each part"):
            weighted_sum([part], weights)


# --- the command ---


def test_the_prompts_are_captions_of_training_from_every_kind(command: ModuleType) -> None:
    train = EmojiDataset("train", unpaired=8)
    known = dict(zip(train.captions, train.labels.tolist(), strict=True))
    assert {c: train.classes[known[c]] for c in command.PROMPTS} == command.PROMPTS
    assert {"a red apple", "a dog face"} < command.PROMPTS.keys() and len(command.PROMPTS) == 12
    assert min(Counter(kind_of(label) for label in command.PROMPTS.values()).values()) >= 2
    assert set(map(kind_of, command.PROMPTS.values())) == set(range(len(KINDS)))


def test_the_command_at_its_smallest(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a model that draws the right thing in the right style, from the training set."""
    train = EmojiDataset("train", 64)
    of = {
        (caption, train.styles[style]): i
        for i, (caption, style) in enumerate(
            zip(train.captions, train.style_ids.tolist(), strict=True)
        )
    }
    rows = {p.caption: of.get((p.subject, p.style), 0) for p in command.asked_for(1)}
    seen: list[str] = []

    def sample(y: list[str], **options: object) -> Tensor:
        assert options["steps"] == 2 and options["guidance_scale"] == 3.0
        seen.extend(y)
        return torch.stack([train[rows[caption]]["image"] for caption in y])

    model = torch.nn.Linear(1, 1)  # its weights have a fingerprint
    model.sample, model.config = sample, SimpleNamespace(image_size=64)
    monkeypatch.setattr(command, "load_model", lambda folder: model)
    readme = command.README.read_text()
    arguments = ["--n", "2", "--steps", "2", "--out", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["prompts.py", str(tmp_path), *arguments])
    command.main()
    assert len(seen) == 120 and seen[:60] == seen[60:]
    assert seen[0] == "a red apple, noto style" and seen[9] == "a hamburger, blob style"
    results = json.loads((tmp_path / "prompts.json").read_text())
    found = Evaluation.from_dict(results)
    assert found["ratio"].value > 1 and found["kind"].value > 0.9  # the judge was trained on them
    assert found["kind_shuffled"].value < 0.4 and found["kind"].n == 120
    assert results["settings"]["follows"] == {"kind": True}
    assert command.README.read_text() == readme  # only the committed sheet is the README's
    with Image.open(tmp_path / "prompts.png") as sheet:
        assert sheet.width > 5 * 128 and sheet.height > 12 * 128
        assert "a red apple, a hamburger" in sheet.info["Description"]


def test_the_readme_shows_the_committed_sheet(command: ModuleType) -> None:
    readme = command.README.read_text()
    results = json.loads((RESULTS / "prompts.json").read_text())
    assert command.with_line(readme, results) == readme
    assert results["prompts"] == command.PROMPTS and results["settings"]["n"] >= 8
    assert results["measured"]["ratio"]["value"] >= results["goal"] == 0.8
    assert "data/results/prompts.png" in readme and (RESULTS / "prompts.png").is_file()


def test_the_real_pictures_are_held_out_and_of_the_kinds(command: ModuleType) -> None:
    x, shown = command.real_pictures(32)
    assert x.shape == (len(shown), 3, 32, 32) and len(shown) > 150
    assert {kind_of(p.label) for p in shown} == set(range(len(KINDS)))
    assert {p.subject for p in shown}.isdisjoint(EmojiDataset("train", 32).hexcodes)
    assert set(pretrained("emoji-judge").config.labels) >= {p.label for p in shown}
