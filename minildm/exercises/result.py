"""What a check answers, and how it tries a learner's function without ever raising."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-4  # of float32 arithmetic, in whatever order it is done
UNWRITTEN = "nothing is written yet; put your line in place of the dots."


@dataclass(frozen=True)
class Result:
    """The verdict on an answer: `ok`, and a sentence that helps. A notebook cell shows both."""

    ok: bool
    message: str

    def __repr__(self) -> str:
        return f"{'✓ Right' if self.ok else '✗ Not yet'}: {self.message}"

    def __bool__(self) -> bool:
        return self.ok


class Trial(NamedTuple):
    """One call: its arguments, the right answer, and what each typical mistake would give."""

    args: tuple[Any, ...]
    expected: Tensor
    mistakes: Mapping[str, Tensor] = {}  # the sentence to say -> the wrong answer
    otherwise: str = ""  # what to say when no known mistake fits


def check_function(fn: object, trials: Sequence[Trial], praise: str) -> Result:
    """Try `fn` on each trial in turn; the first that fails says why. It never raises."""
    if not callable(fn):
        return Result(False, f"hand over the function itself; this is of type {type(fn).__name__}.")
    for trial in trials:
        try:
            problem = _problem(fn, trial)
        except Exception as error:  # an answer so odd that it can't even be compared
            problem = f"what it returned could not be compared: {_said(error)}."
        if problem:
            return Result(False, problem)
    return Result(True, praise)


def _problem(fn: Callable[..., Any], trial: Trial) -> str:
    """What is wrong with the answer to one trial; empty if it is right."""
    args = [arg.clone() if isinstance(arg, Tensor) else arg for arg in trial.args]
    try:
        with torch.random.fork_rng([]):
            answer = fn(*args)
    except NotImplementedError:
        return UNWRITTEN
    except (Exception, SystemExit) as error:
        return f"it stopped with {_said(error)}."
    if answer is Ellipsis or answer is NotImplemented:
        return UNWRITTEN
    if answer is None:
        return "it returns None; is there a `return` before the result?"
    if trial.expected.ndim == 0 and isinstance(answer, Number) and not isinstance(answer, bool):
        wide = torch.complex128 if isinstance(answer, complex) else torch.float64
        answer = torch.tensor(answer, dtype=wide)  # a number says as much as a scalar tensor
    if not isinstance(answer, Tensor):
        return f"it must return a Tensor, and returns one of type {type(answer).__name__}."
    if answer.shape != trial.expected.shape:
        return f"its shape is {tuple(answer.shape)}, expected {tuple(trial.expected.shape)}."
    for arg, kept in zip(trial.args, args, strict=True):
        if isinstance(arg, Tensor) and not torch.equal(arg, kept):
            return "it changes one of its arguments in place; compute a new tensor instead."
    if not answer.isfinite().all():
        return "some of its values are not finite; is there a root of something negative?"
    if answer.is_complex():
        return "its values are complex; the right ones are real: take .real."
    if _alike(answer, trial.expected):
        return ""
    named = (why for why, wrong in trial.mistakes.items() if _alike(answer, wrong))
    return next(named, trial.otherwise or "its values are not those of the equation.")


def _alike(answer: Tensor, wanted: Tensor) -> bool:
    difference = answer.detach().cpu().double() - wanted.double()
    return difference.abs().max().item() <= TOLERANCE * max(1.0, wanted.abs().max().item())


def _said(error: BaseException) -> str:
    """An error in one line, cut where it gets long."""
    text = " ".join(str(error).split())
    text = f"{text[:120]} …" if len(text) > 120 else text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
