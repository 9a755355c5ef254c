"""An exercise: a solution, inputs, typical mistakes; and what can be said of any wrong answer."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minildm.files import write_json

TOLERANCE = 1e-4  # relative to the largest value: float32 arithmetic in any order
UNWRITTEN = "nothing is written yet; put your line in place of the dots."

Fn = Callable[..., Any]


class Result(NamedTuple):
    """The verdict on an answer: `ok`, and a sentence that helps. A notebook cell shows both."""

    ok: bool
    message: str
    name: str = ""  # of the exercise
    answer: Any = None  # the student's function; None: a measurement

    def __repr__(self) -> str:
        return f"{'✓ Right' if self.ok else '✗ Not yet'}: {self.message}"

    def __bool__(self) -> bool:
        return self.ok


class Points:
    """A student's points by stage, all of `most` or none, in a JSON file that each check updates.

    A measurement, a Result without an answer, counts if all stages before it are the student's.
    """

    def __init__(self, path: Path, **most: int) -> None:
        self.path, self.most = path, most
        self.found: dict[str, Result] = {}  # the last one of each stage

    def record(self, result: Result) -> Result:
        """Keep the points of the stage `result.name`; the message says how many."""
        name, stages = result.name, list(self.most)
        if not (result.answer or all(map(self.found.get, stages[: stages.index(name)]))):
            result = Result(False, "this counts when all stages before it are yours.", name)
        self.found[name] = result
        earned = {stage: n * bool(self.found.get(stage)) for stage, n in self.most.items()}
        total = {"earned": sum(earned.values()), "of": sum(self.most.values())}
        write_json(self.path, {**total, "stages": earned})
        said = f"{result.message} {earned[name]} of {self.most[name]} points."
        return result._replace(message=said)


class Exercise(NamedTuple):
    """`solution`, `cases` (tuples of arguments), `mistakes` (hint: a function that makes it)."""

    solution: Fn
    cases: Sequence[tuple[Any, ...]]
    mistakes: Mapping[str, Fn] = {}

    def outcome(self, fn: Fn, args: Sequence[Any]) -> list[Any]:
        """What fn returns, and the gradient of its sum for each argument that requires one."""
        out = fn(*args)
        leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
        if not isinstance(out, Tensor):
            return [out]
        total = out.sum() + sum(0 * leaf.sum() for leaf in leaves)  # so that each has a gradient
        found = [out, *(torch.autograd.grad(total, leaves) if leaves else ())]
        return [x.detach().cpu().double() for x in found]


def draw(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    """Normal numbers of each shape, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def problem_of(fn: Fn, exercise: Exercise, case: tuple[Any, ...]) -> str:
    """Say what is wrong with the answer to one case; empty if it is right."""
    copies = [[x.clone() if isinstance(x, Tensor) else x for x in case] for _ in range(2)]
    try:
        answers, again = (exercise.outcome(fn, args) for args in copies)
    except Exception as error:  # whatever a student's function raises, in words
        return UNWRITTEN if "ellipsis" in str(error) else f"it stopped with {error!r:.160}."
    if answers[0] is Ellipsis:
        return UNWRITTEN
    if not isinstance(answers[0], Tensor):
        return f"it must `return` a Tensor, and returns a {type(answers[0]).__name__}."
    expected = exercise.outcome(exercise.solution, case)
    if answers[0].shape != expected[0].shape:
        return f"its shape is {tuple(answers[0].shape)}, expected {tuple(expected[0].shape)}."
    wrong = [i for i, pair in enumerate(zip(answers, expected, strict=True)) if not _alike(*pair)]
    if not wrong:
        return ""
    typical = _wrong_answers(exercise, case, expected, answers[0])
    hint = next((hint for hint, values in typical if all(map(_alike, answers, values))), "")
    if not answers[0].isfinite().all():
        hint = "some values are not finite: is there 0 / 0, log 0, or a root below 0?"
    elif not all(map(_alike, again, answers)):
        hint = "two calls return different values: use the given random numbers, draw none."
    answer, right, what = answers[wrong[0]], expected[wrong[0]], "gradient" if wrong[0] else "value"
    index = tuple((~_close(answer, right)).nonzero()[0].tolist())  # the first that differs
    place = f"its {what} at {list(index)}" if index else f"its {what}"
    return f"{hint} ({place} is {answer[index]:.6g}, expected {right[index]:.6g})".strip()


def _close(answer: Tensor, expected: Tensor) -> Tensor:
    """Which values are equal but for the rounding of float32; NaN is none."""
    return (answer - expected).abs() <= TOLERANCE * max(1.0, expected.abs().max().item())


def _alike(answer: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have one shape and close values."""
    return answer.shape == expected.shape and bool(_close(answer, expected).all())


def _wrong_answers(
    exercise: Exercise, case: tuple[Any, ...], expected: list[Tensor], answer: Tensor
) -> Iterator[tuple[str, list[Tensor]]]:
    """Hints, and the values that earn them: the exercise's own, then those that fit any."""
    for hint, mistake in exercise.mistakes.items():
        yield hint, exercise.outcome(mistake, case)
    names = list(inspect.signature(exercise.solution).parameters)
    tensors = [i for i, arg in enumerate(case) if isinstance(arg, Tensor)]
    for i, j in combinations(tensors, 2):
        if case[i].shape == case[j].shape:
            other = list(case)
            other[i], other[j] = case[j], case[i]
            hint = f"{names[i]} and {names[j]} are swapped."
            yield hint, exercise.outcome(exercise.solution, other)
    factor = (answer * expected[0]).sum() / expected[0].square().sum().clamp(min=1e-12)
    if factor.abs() > 1e-6 and (factor - 1).abs() > 1e-3:  # else a small error, not a factor
        scaled = [factor * values for values in expected]
        yield f"all values are {factor.item():.4g} times the right ones.", scaled
