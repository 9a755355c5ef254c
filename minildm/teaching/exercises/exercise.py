"""An exercise: a solution, inputs, typical mistakes; and what can be said of any wrong answer."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-4  # relative to the largest value: float32 arithmetic in any order
UNWRITTEN = "nothing is written yet; put your line in place of the dots."

Fn = Callable[..., Any]


@dataclass(frozen=True)
class Result:
    """The verdict on an answer: `ok`, and a sentence that helps. A notebook cell shows both."""

    ok: bool
    message: str

    def __repr__(self) -> str:
        return f"{'✓ Right' if self.ok else '✗ Not yet'}: {self.message}"

    def __bool__(self) -> bool:
        return self.ok


class Exercise(NamedTuple):
    """`solution`, `cases` (tuples of arguments), `mistakes` (hint: the function that makes it).

    `probe` turns a function into what is compared, for instance its gradients.
    """

    solution: Fn
    cases: Sequence[tuple[Any, ...]]
    mistakes: Mapping[str, Fn] = {}
    probe: Callable[[Fn], Fn] = lambda fn: fn


EXERCISES: dict[str, Exercise] = {}


def draw(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """Normal numbers of each shape, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def rows(x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return x.view(-1, 1, 1, 1)


def problem_of(fn: Fn, exercise: Exercise, case: tuple[Any, ...]) -> str:
    """Say what is wrong with the answer to one case; empty if it is right."""
    args = [arg.clone() if isinstance(arg, Tensor) else arg for arg in case]
    try:
        with torch.random.fork_rng([]):
            answer = exercise.probe(fn)(*args)
    except Exception as error:  # whatever a student's function raises, in words
        unwritten = isinstance(error, NotImplementedError) or "ellipsis" in str(error)
        return UNWRITTEN if unwritten else f"it stopped with {error!r:.160}."
    if answer is Ellipsis or answer is None:
        return UNWRITTEN if answer is Ellipsis else "it returns None; is there a `return`?"
    expected = exercise.probe(exercise.solution)(*case)
    if isinstance(answer, Number) and expected.ndim == 0:
        answer = torch.tensor(answer)
    if not isinstance(answer, Tensor):
        return f"it must return a Tensor, and returns a {type(answer).__name__}."
    if answer.shape != expected.shape:
        return f"its shape is {tuple(answer.shape)}, expected {tuple(expected.shape)}."
    pairs = zip(case, args, strict=True)
    if any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in pairs):
        return "it changes one of its arguments in place; compute a new tensor instead."
    answer, expected = answer.detach().cpu().double(), expected.detach().double()
    if not answer.isfinite().all():
        return "some of its values are not finite: is there 0 / 0, log 0, or a root below 0?"
    if alike(answer, expected):
        return ""
    hints = (hint for hint, wrong in _wrong_answers(exercise, case) if alike(answer, wrong))
    hint = next(hints, _relation(answer, expected))
    return f"{hint} {_first_difference(answer, expected)}".strip()


def alike(answer: Tensor, expected: Tensor) -> bool:
    """Whether two answers are equal up to the rounding of float32."""
    if answer.shape != expected.shape:
        return False
    return bool((answer - expected).abs().max() <= _allowed(expected))


def _allowed(expected: Tensor) -> float:
    return TOLERANCE * max(1.0, expected.abs().max().item())


def _wrong_answers(exercise: Exercise, case: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
    """Hints, and the answers that earn them: the exercise's own, then those that fit any."""
    for hint, mistake in exercise.mistakes.items():
        yield hint, exercise.probe(mistake)(*case).detach().double()
    names = list(inspect.signature(exercise.solution).parameters)
    tensors = [i for i, arg in enumerate(case) if isinstance(arg, Tensor)]
    for i, j in combinations(tensors, 2):
        if len(names) == len(case) and case[i].shape == case[j].shape:
            other = list(case)
            other[i], other[j] = case[j], case[i]
            swapped = exercise.probe(exercise.solution)(*other).detach().double()
            yield f"{names[i]} and {names[j]} are swapped.", swapped
    for i in tensors:
        if len(names) == len(case):
            yield f"it returns {names[i]} unchanged.", case[i].detach().double()


def _relation(answer: Tensor, expected: Tensor) -> str:
    """What the answer is of the expected values, where that is simple; else nothing."""
    factor = (answer * expected).sum() / expected.square().sum().clamp(min=1e-12)
    if factor.abs() > 1e-6 and alike(answer / factor, expected):
        return f"all values are {factor.item():.4g} times the right ones."
    positive = expected.clamp(min=1e-12)
    related = {
        "squares": expected.square(),
        "square roots": positive.sqrt(),
        "logarithms": positive.log(),
        "exponentials": expected.clamp(max=50).exp(),
        "inverses": 1 / expected.where(expected != 0, 1e12),
    }
    found = (
        f"those are the {of} of the right values." for of, x in related.items() if alike(answer, x)
    )
    return next(found, "")


def _first_difference(answer: Tensor, expected: Tensor) -> str:
    index = tuple((answer - expected).abs().gt(_allowed(expected)).nonzero()[0].tolist())
    place = f"at {list(index)} " if index else ""
    return f"({place}it is {answer[index].item():.4g}, expected {expected[index].item():.4g})"
