"""The checks of notebook 04: right answers pass, typical mistakes are named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exercise_rules import (  # noqa: F401
    test_a_check_leaves_the_random_state_alone,
    test_no_answer_makes_a_check_raise,
)
from torch import Tensor

from minildm.exercises import adversarial
from minildm.losses import adaptive_weight, discriminator_loss

Fn = Callable[..., Any]
CHECKS = (adversarial.check_critic_loss, adversarial.check_adaptive_weight)
EPS = 1e-4


def packages_own(rec: Tensor, adv: Tensor) -> Tensor:
    """`losses.adaptive_weight` on two terms with those gradients; it wants a weight."""
    last = torch.zeros_like(rec, requires_grad=True)
    return adaptive_weight((last * rec.detach()).sum(), (last * adv.detach()).sum(), last)


def by_hand(rec: Tensor, adv: Tensor) -> Tensor:
    norms = [g.double().square().sum().sqrt() for g in (rec, adv)]
    return torch.clamp(norms[0] / (norms[1] + EPS), max=1e4).detach()


RIGHT: list[tuple[Fn, Fn]] = [
    (CHECKS[0], discriminator_loss),
    (CHECKS[0], lambda r, f: 0.5 * ((1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean())),
    (CHECKS[0], lambda r, f: torch.cat([1 - r, 1 + f]).relu().mean()),
    (CHECKS[1], packages_own),
    (CHECKS[1], by_hand),
]


@pytest.mark.parametrize(("check", "fn"), RIGHT)
def test_a_right_answer_passes_however_it_is_written(check: Fn, fn: Fn) -> None:
    verdict = check(fn)
    assert verdict.ok and "Right" in repr(verdict), verdict


def half(of_real: Tensor, of_fake: Tensor) -> Tensor:
    return 0.5 * (of_real.mean() + of_fake.mean())


WRONG_LOSS: dict[str, tuple[Fn, str]] = {
    "no half": (lambda r, f: 2 * discriminator_loss(r, f), "one half"),
    "swapped": (lambda r, f: half(F.relu(1 + r), F.relu(1 - f)), "both signs, are swapped"),
    "real's sign": (lambda r, f: half(F.relu(1 + r), F.relu(1 + f)), "sign on real"),
    "fake's sign": (lambda r, f: half(F.relu(1 - r), F.relu(1 - f)), "sign on fake"),
    "no relu": (lambda r, f: half(1 - r, 1 + f), "relu is missing"),
    "mean first": (lambda r, f: half(F.relu(1 - r.mean()), F.relu(1 + f.mean())), "before the"),
    "no margin": (lambda r, f: half(F.relu(-r), F.relu(f)), "margin of 1"),
    "turned inside": (lambda r, f: half(F.relu(r - 1), F.relu(-1 - f)), "turned round"),
    "sum": (lambda r, f: 0.5 * (F.relu(1 - r).sum() + F.relu(1 + f).sum()), "sums over"),
    "vanilla": (lambda r, f: discriminator_loss(r, f, "vanilla"), "vanilla"),
    "arguments": (lambda r, f: discriminator_loss(f, r), "are swapped"),
    "real alone": (lambda r, f: 0.5 * F.relu(1 - r).mean(), "reconstructions is missing"),
    "fake alone": (lambda r, f: 0.5 * F.relu(1 + f).mean(), "real pictures is missing"),
    "generator": (lambda r, f: -f.mean(), "autoencoder's side"),
    "negative": (lambda r, f: -discriminator_loss(r, f), "sign is turned round"),
    "absolute": (lambda r, f: half((1 - r).abs(), (1 + f).abs()), "not those of the equation"),
    "a floor": (lambda r, f: discriminator_loss(r, f).clamp(min=0.1), "must pay 0"),
    "map": (lambda r, f: 0.5 * (F.relu(1 - r) + F.relu(1 + f)), "shape is"),
    "in place": (lambda r, f: half(r.neg_().add_(1).relu(), F.relu(1 + f)), "in place"),
}
WRONG_WEIGHT: dict[str, tuple[Fn, str]] = {
    "upside down": (lambda a, b: (b.norm() / (a.norm() + EPS)).detach(), "upside down"),
    "no eps": (lambda a, b: (a.norm() / b.norm()).clamp(max=1e4).detach(), "add 1e-4 to"),
    "eps outside": (lambda a, b: (a.norm() / b.norm() + EPS).detach(), "add 1e-4 to"),
    "eps twice": (lambda a, b: ((a.norm() + EPS) / (b.norm() + EPS)).detach(), "above as well"),
    "squares": (lambda a, b: (a**2).sum() / ((b**2).sum() + EPS), "squared norms"),
    "absolute": (lambda a, b: a.abs().sum() / (b.abs().sum() + EPS), "sum of the absolute"),
    "mean": (lambda a, b: a.abs().mean() / (b.abs().mean() + EPS), "mean of the absolute"),
    "one": (lambda a, b: a.norm().detach(), "grad_rec alone"),
    "values": (lambda a, b: (a / (b + EPS)).norm(), "value by value"),
    "no clamp": (lambda a, b: (a.norm() / (b.norm() + EPS)).detach(), "clamped to 1e4"),
    "no eps at 0": (
        lambda a, b: a.norm() / (b.norm() + EPS) if b.norm() > 0 else a.norm() / b.norm(),
        "divides by 0",
    ),
    "flows": (lambda a, b: (a.norm() / (b.norm() + EPS)).clamp(max=1e4), "must be detached"),
    "shape": (lambda a, b: (a.norm() / (b.norm() + EPS))[None], "shape is"),
    "other": (lambda a, b: 3 * by_hand(a, b), "not those of the equation"),
}


@pytest.mark.parametrize("mistake", WRONG_LOSS)
def test_a_mistake_in_the_critics_loss_is_named(mistake: str) -> None:
    fn, said = WRONG_LOSS[mistake]
    verdict = adversarial.check_critic_loss(fn)
    assert not verdict.ok and said in verdict.message, verdict


@pytest.mark.parametrize("mistake", WRONG_WEIGHT)
def test_a_mistake_in_the_adaptive_weight_is_named(mistake: str) -> None:
    fn, said = WRONG_WEIGHT[mistake]
    verdict = adversarial.check_adaptive_weight(fn)
    assert not verdict.ok and said in verdict.message, verdict
