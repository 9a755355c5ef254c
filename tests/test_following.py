"""Judging what was asked for, on samples of known truth: the pictures themselves, shuffled, one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minildm import EmojiDataset
from minildm.following import (
    Prompt,
    dealt_anew,
    emoji_prompts,
    sample_conditions,
    share,
    text_against_guidance,
    text_following,
)
from minildm.judge import JudgeConfig

LABELS, GROUPS, STYLES = ("a0", "a1", "b0", "b1"), ("a", "b"), ("flat", "round", "thin")
N = 120


class Reader(torch.nn.Module):
    """A judge that reads label and style from a picture's first two pixels."""

    config = JudgeConfig(labels=LABELS, groups=GROUPS, styles=STYLES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        label, style = (10 * x[:, 0, 0, :2]).round().long().unbind(1)
        numbers = {"label": (label, 4), "group": (label // 2, 2), "style": (style, 3)}
        return {name: F.one_hot(*number).float() for name, number in numbers.items()}


def drawn(labels: list[int], styles: list[int]) -> Tensor:
    """Pictures in which `Reader` sees these."""
    x = torch.zeros(len(labels), 3, 4, 4)
    x[:, 0, 0, :2] = torch.tensor([labels, styles]).T / 10
    return x


def prompts(n: int = N) -> tuple[list[Prompt], Tensor]:
    """n prompts, each of a subject of its own, half with a style; and pictures that fit them."""
    draw = torch.Generator().manual_seed(n)
    labels = torch.randint(4, (n,), generator=draw).tolist()
    styles = torch.randint(3, (n,), generator=draw).tolist()
    asked = [
        Prompt(f"thing {i}", LABELS[label], GROUPS[label // 2], STYLES[style] if i % 2 else None)
        for i, (label, style) in enumerate(zip(labels, styles, strict=True))
    ]
    return asked, drawn(labels, styles)


def test_pictures_of_the_prompts_follow_and_shuffled_ones_do_not() -> None:
    asked, x = prompts()
    found = text_following(x, asked, Reader(), real=x)
    for question, chance, n in (("label", 1 / 4, N), ("group", 1 / 2, N), ("style", 1 / 3, N / 2)):
        assert found[question].value == found[f"{question}_real"].value == 1
        assert found[question].n == found[f"{question}_shuffled"].n == n
        assert found[question].low < 1  # N right answers prove no certainty
        assert found[f"{question}_shuffled"].low < chance < found[f"{question}_shuffled"].high
    assert found.settings["follows"] == {"label": True, "group": True, "style": True}


def test_a_model_that_ignores_its_prompts_scores_at_chance() -> None:
    asked, x = prompts()
    found = text_following(x[dealt_anew(N, seed=5)], asked, Reader(), real=x)
    assert not any(found.settings["follows"].values())
    assert found["group"].value < 0.7 and found["group_real"].value == 1


def test_always_the_same_picture_is_exactly_at_chance() -> None:
    asked, x = prompts()
    found = text_following(x[:1].expand(N, -1, -1, -1), asked, Reader())
    for question in ("label", "group", "style"):
        assert found[question] == found[f"{question}_shuffled"]
    assert not any(found.settings["follows"].values())
    assert not any(name.endswith("_real") for name in found)


def test_a_half_that_follows_is_half_way() -> None:
    asked, x = prompts()
    x = torch.cat([x[: N // 2], x[:1].expand(N // 2, -1, -1, -1)])
    found = text_following(x, asked, Reader())
    rest = [p.label == asked[0].label for p in asked[N // 2 :]]
    assert found["label"].value == pytest.approx((N / 2 + sum(rest)) / N)


def test_prompts_of_one_subject_count_as_one() -> None:
    asked, x = prompts()
    wrong = torch.cat([x[: N // 2], (x[N // 2 :] + 0.1) % 0.2])
    apart = text_following(wrong, asked, Reader())["group"]
    together = [p._replace(subject=str(i // 12)) for i, p in enumerate(asked)]
    joined = text_following(wrong, together, Reader())["group"]
    assert joined.value == apart.value
    assert joined.high - joined.low > 1.5 * (apart.high - apart.low)


def test_prompts_of_emoji_ask_for_what_their_pictures_are() -> None:
    val = EmojiDataset("val", 32)
    asked, real = emoji_prompts(val, 20, styled=True, seed=3)
    plain, same = emoji_prompts(val, 20, seed=3)
    assert torch.equal(real, same) and real.shape == (20, 3, 32, 32)
    assert len({prompt.subject for prompt in asked}) > 10
    for prompt, other, x in zip(asked, plain, real, strict=True):
        assert prompt.caption == f"{other.caption}, {prompt.style} style" and other.style is None
        rows = [i for i in range(len(val)) if val.hexcodes[i] == prompt.subject]
        i = next(i for i in rows if val.styles[val.style_ids[i]] == prompt.style)
        assert torch.equal(val[i]["image"], x)
        assert prompt[1:3] == (val.classes[val.labels[i]], val.groups[val.group_ids[i]])
    with pytest.raises(ValueError, match=r"n=1 must lie in 2\.\."):
        emoji_prompts(val, 1)


class FakeModel:
    """Follows its captions, "thing i", where guidance is above 2; else deals pictures anew."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.sizes = x, []
        self.conditioner = SimpleNamespace(
            tokenizer=SimpleNamespace(unknown=lambda text: [text] if text.endswith("7") else [])
        )

    def sample(self, y: list[str], *, noise: Any, guidance_scale: float, steps: int) -> Tensor:
        assert noise(torch.zeros(2)).shape == (2,) and steps == 4
        self.sizes.append(len(y))
        rows = torch.tensor([int(caption.split()[1]) for caption in y])
        return self.x[rows if guidance_scale > 2 else dealt_anew(N, seed=2)[rows]]


def test_against_guidance_each_scale_is_judged() -> None:
    asked, x = prompts()
    model = FakeModel(x)
    found = text_against_guidance(model, asked, Reader(), (1.0, 3.0), real=x, steps=4, batch=50)
    assert model.sizes == [50, 50, 20] * 2
    assert found[3.0]["label"].value == 1 and found[3.0].settings["follows"]["label"]
    assert not found[1.0].settings["follows"]["label"]
    assert found[1.0].settings["guidance_scale"] == 1.0
    assert found[1.0].settings["unknown"] == 12  # of 120: 7, 17, ...


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"label": "a2"}, "label='a2' is not known; did you mean"),
        ({"style": "oil"}, "style='oil' is not known"),
    ],
)
def test_what_the_judge_does_not_know_is_refused(change: dict, said: str) -> None:
    asked, x = prompts()
    with pytest.raises(ValueError, match=said):
        text_following(x, [asked[0]._replace(**change), *asked[1:]], Reader())


def test_numbers_must_agree_and_something_be_asked() -> None:
    asked, x = prompts()
    with pytest.raises(ValueError, match="120 prompts need as many pictures, got 119"):
        text_following(x[1:], asked, Reader())
    with pytest.raises(ValueError, match="120 prompts need as many pictures, got 120, 3"):
        text_following(x, asked, Reader(), real=x[:3])
    with pytest.raises(ValueError, match="no prompt asks for"):
        text_following(x[:2], [Prompt("a"), Prompt("b")], Reader())


@pytest.mark.parametrize("n", [2, 3, 50])
def test_dealt_anew_leaves_nothing_in_its_place(n: int) -> None:
    for seed in range(20):
        order = dealt_anew(n, seed)
        assert sorted(order.tolist()) == list(range(n))
        assert not (order == torch.arange(n)).any()


def test_a_shares_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Clusters of six, alike in two thirds: Wilson's alone would cover far less often."""
    draw, covered = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        common = torch.rand(40, 1, generator=draw) < 0.3
        own = torch.rand(40, 6, generator=draw) < 0.3
        alike = torch.rand(40, 6, generator=draw) < 2 / 3
        right = torch.where(alike, common, own).flatten()
        found = share(right, torch.arange(240) // 6)
        covered += found.low <= 0.3 <= found.high
    assert covered > 0.91 * 300


def test_the_same_noise_begins_a_longer_list(randn: Any) -> None:
    seen: list[Tensor] = []

    def sample(y: list[str], noise: Any) -> Tensor:
        seen.append(noise(torch.zeros(len(y), 3, 8, 8)))
        return seen[-1]

    model = SimpleNamespace(sample=sample)
    longer = sample_conditions(model, ["a"] * 7, seed=1, batch=4)
    shorter = sample_conditions(model, ["a"] * 4, seed=1, batch=4)
    assert len(longer) == 7 and torch.equal(longer[:4], shorter)
