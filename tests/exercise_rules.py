"""What holds of every exercise's checks. A module of tests imports these, and names two tables:

CHECKS, and WRONG: mistake -> (check, wrong answer, what must be said of it). conftest.py hands
their entries over.
"""

from collections.abc import Callable
from typing import Any

import torch

Check = Callable[..., Any]


def test_a_mistake_is_named(mistake: tuple[Check, Any, str]) -> None:
    check, fn, said = mistake
    verdict = check(fn)
    assert not verdict.ok and said in verdict.message, verdict


def test_no_answer_makes_a_check_raise(check: Check, odd: tuple[object, str]) -> None:
    verdict = check(odd[0])
    assert verdict.ok is False and "\n" not in verdict.message and len(verdict.message) < 200


def test_a_check_leaves_the_random_state_alone(check: Check) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check(lambda *_: torch.randn(8))
    assert torch.equal(torch.get_rng_state(), before)
