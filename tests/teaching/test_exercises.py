"""The checks accept the solutions, name typical mistakes, and never raise because of an answer."""

import pytest
import torch

from minildm.teaching.exercises import EXERCISES, check, yours_or_solution

MISTAKES = [(name, hint) for name, e in EXERCISES.items() for hint in e.mistakes]


@pytest.mark.parametrize("name", EXERCISES)
def test_the_solution_is_right_and_no_answer_raises(name: str) -> None:
    def raises(*_: object) -> None:
        raise RuntimeError("as a student's function may")

    assert check(name, EXERCISES[name].solution).ok
    answers = (lambda *_: ..., lambda *_: None, lambda: 0, raises, lambda *_: "text", 3)
    assert not any(check(name, answer).ok for answer in answers)
    assert "nothing is written yet" in check(name, answers[0]).message
    right = lambda *args: EXERCISES[name].solution(*args)  # noqa: E731
    used = [yours_or_solution(name, fn) for fn in (right, answers[0])]
    assert used == [right, EXERCISES[name].solution]


@pytest.mark.parametrize(("name", "hint"), MISTAKES)
def test_a_typical_mistake_gets_its_hint(name: str, hint: str) -> None:
    found = check(name, EXERCISES[name].mistakes[hint])
    assert not found.ok
    assert found.message.startswith(hint)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda n, c, s: 2 * (n + s * (c - n)), "all values are 2 times the right ones"),
        (lambda n, c, s: c + s * (n - c), "eps_null and eps_c are swapped"),
        (lambda n, c, s: (n + s * (c - n))[0], "its shape is (3, 4, 4), expected (4, 3, 4, 4)"),
        (lambda n, c, s: n / 0 + c, "not finite"),
        (lambda n, c, s: n + s * (c - n) + torch.randn(1), "two calls return different values"),
        (lambda n, c, s: (n + s * (c - n)).sin(), "its value at [0, 0, 0, 0] is"),
    ],
)
def test_any_wrong_answer_is_described(wrong: object, said: str) -> None:
    found = check("guidance", wrong)
    assert not found.ok
    assert said in found.message
