"""The judge: it learns what is plain to see, softens only what is drawn, and counts hits."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minildm.judge import QUESTIONS, Judge, JudgeConfig, correct, soften

CONFIG = JudgeConfig(labels=("dark", "light", "grey"), groups=("a", "b"), styles=("s",), width=8)


def dark_and_light(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy pictures with a dark or a light square on white, and which it is."""
    draw = torch.Generator().manual_seed(seed)
    label = torch.arange(n) % 2
    x = torch.ones(n, 3, 16, 16)
    x[:, :, 4:12, 4:12] = (label.float() - 0.9).view(-1, 1, 1, 1)
    return x + 0.05 * torch.randn(x.shape, generator=draw), label


def test_it_learns_two_plain_classes() -> None:
    x, label = dark_and_light(32, seed=0)
    batch = {"image": x, "label": label, "group": label, "style": torch.zeros(32).long()}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        judge = Judge(CONFIG)
        optimizer = torch.optim.Adam(judge.parameters(), lr=3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            terms = judge.loss(batch)
            terms["loss"].backward()
            optimizer.step()
    judge.eval()
    x, label = dark_and_light(300, seed=1)  # more than correct() takes at once
    assert correct(judge, x, label, "label").float().mean() > 0.98
    assert correct(judge, x, label).float().mean() > 0.98  # "group" by default
    assert correct(judge, x, 1 - label).float().mean() < 0.02


def test_the_loss_is_the_sum_of_its_questions(randn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minildm.judge.soften", lambda x: x)
    judge = Judge(CONFIG).eval()
    x, truth = randn(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
    batch = {"image": x, "label": truth, "group": truth, "style": torch.zeros(4).long()}
    terms, logits = judge.loss(batch), judge(x)
    assert set(terms) == {"loss", *QUESTIONS}
    for question in QUESTIONS:
        logp = F.log_softmax(logits[question], dim=1)
        picked = logp.gather(1, batch[question][:, None])[:, 0]
        expected = -(0.9 * picked + 0.1 * logp.mean(dim=1)).mean()
        assert torch.allclose(terms[question], expected, atol=1e-6)
    assert torch.allclose(terms["loss"], sum(terms[q] for q in QUESTIONS))


@pytest.mark.parametrize(("batch", "h", "w"), [(1, 16, 16), (3, 32, 16)])
def test_one_logit_for_each_answer(batch: int, h: int, w: int) -> None:
    logits = Judge(CONFIG)(torch.zeros(batch, 3, h, w))
    shapes = {question: tuple(value.shape) for question, value in logits.items()}
    assert shapes == {"label": (batch, 3), "group": (batch, 2), "style": (batch, 1)}


class Fixed(torch.nn.Module):
    """Says label 1 of every picture."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = torch.tensor([0.0, 2.0, 1.0]).expand(len(x), 3)
        return {"label": logits, "group": logits[:, :1]}


def test_correct_is_the_best_answer_being_true() -> None:
    x, truth = torch.zeros(4, 3, 8, 8), torch.tensor([1, 0, 2, 1])
    hits = correct(Fixed(), x, truth, "label")
    assert hits.dtype == torch.bool
    assert hits.tolist() == [True, False, False, True]
    assert correct(Fixed(), x, truth).tolist() == [False, True, False, False]


def test_an_unknown_question_is_refused() -> None:
    with pytest.raises(ValueError, match="question='colour' is not known; known: label, group"):
        correct(Fixed(), torch.zeros(1, 3, 8, 8), torch.zeros(1), "colour")


# --- soften ---


def seeded(function: Callable[[Tensor], Tensor], x: Tensor, seed: int = 0) -> Tensor:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return function(x)


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (5, 3, 8, 24)])
def test_softening_keeps_shape_and_argument(shape: tuple[int, ...], randn: Any) -> None:
    x = randn(*shape)
    before = x.clone()
    soft = seeded(soften, x)
    assert soft.shape == x.shape
    assert torch.equal(x, before)
    assert not torch.allclose(soft, x)


def test_white_stays_white_but_for_a_little_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    white = torch.ones(50, 3, 32, 32)
    noisy = seeded(soften, white) - 1.0
    # 0.1 U times normal: a standard deviation of 0.1 / sqrt(3) over all pictures
    assert abs(noisy.mean().item()) < 5 * 0.058 / noisy.numel() ** 0.5
    assert noisy.std().item() == pytest.approx(0.058, abs=0.015)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    assert torch.allclose(seeded(soften, white), white, atol=1e-6)


def test_what_moves_out_is_replaced_by_white(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    black = torch.full((200, 3, 16, 16), -1.0)
    soft = seeded(soften, black)
    assert soft.min() >= -1 - 1e-5
    assert soft.max() <= 1 + 1e-5
    assert soft.max() > 0.9  # some were shifted or shrunk
    assert (soft[:, :, 8, 8] + 1).abs().max() < 1e-5  # none left the middle


def test_each_picture_is_softened_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    x, _ = dark_and_light(1, seed=0)
    soft = seeded(soften, x.expand(8, -1, -1, -1))
    assert len({tuple(picture.flatten()[:400].tolist()) for picture in soft}) == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"width": 12}, "width=12 must be a multiple of 8"), ({"groups": ()}, "at least one class")],
)
def test_impossible_configs_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(CONFIG, **changes)
