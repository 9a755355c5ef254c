"""Checks of the notebooks' exercises: `check("kl", my_kl)` says whether a function is right.

An answer is compared with the solution on a few inputs; where it equals what a typical mistake
gives, the hint for that mistake is the reply. A check never raises because of the answer.
"""

from importlib import import_module

from minildm.teaching.exercises.exercise import EXERCISES, Exercise, Result, problem_of

__all__ = ["EXERCISES", "Exercise", "Result", "check"]

for _part in ("part1", "part2", "part3", "part4"):
    import_module(f"{__name__}.{_part}")  # each adds its exercises to EXERCISES


def check(name: str, fn: object) -> Result:
    """Compare a student's function with the exercise's solution.

    Raises ValueError for a name that is not an exercise.
    """
    if name not in EXERCISES:
        raise ValueError(f"exercise={name!r} is not known; known: {', '.join(EXERCISES)}")
    if not callable(fn):
        return Result(False, f"pass the function itself; this is of type {type(fn).__name__}.")
    exercise = EXERCISES[name]
    for case in exercise.cases:
        if problem := problem_of(fn, exercise, case):
            return Result(False, problem)
    return Result(True, f"equal to the solution on {len(exercise.cases)} inputs.")
