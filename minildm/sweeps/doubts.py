"""What a reader of a sweep's report should doubt: results that are not of the same kind."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minildm.sweeps.sweep import Sweep

Found = Mapping[str, Any]  # a results.json
HARDWARE = ("device", "threads", "machine", "precision")  # of a timing


def doubts_of(
    sweep: Sweep, results: Sequence[Found], timing: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Sentences about finished runs (their results.json) and the levels' times."""
    return [
        *_untimed(sweep, results, timing),
        *_timed_differently(timing),
        *_first_stages(results),
        *_precisions(results),
        *_not_finite(results),
    ]


def _untimed(
    sweep: Sweep, results: Sequence[Found], timing: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    there = {found["run"]["level"] for found in results}
    if missing := [level for level in sweep.levels if level in there - timing.keys()]:
        yield (
            f"no time was measured of {', '.join(missing)}: their rows have no seconds, and the "
            "view of equal time lacks them"
        )


def _timed_differently(timing: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name in HARDWARE:
        values = _levels_by((level, found.get(name)) for level, found in timing.items())
        if len(values) > 1:
            yield (
                f"seconds were measured on more than one {name} ({_listed(values)}), so equal time "
                "compares unlike things; delete timing/ to measure all levels anew"
            )


def _first_stages(results: Sequence[Found]) -> Iterator[str]:
    for level in dict.fromkeys(found["run"]["level"] for found in results):
        same = [found for found in results if found["run"]["level"] == level]
        if len({found.get("first_stage") for found in same}) > 1:
            yield (
                f"runs of {level} have first stages with different weights: what differs between "
                "them is not the diffusion model's seed alone"
            )


def _precisions(results: Sequence[Found]) -> Iterator[str]:
    values: dict[Any, list[str]] = {}
    for found in results:
        if found.get("precision"):
            values.setdefault(found["precision"], []).append(str(found["run"]["level"]))
    if len(values) > 1:
        listed = {name: list(dict.fromkeys(levels)) for name, levels in values.items()}
        yield f"runs were trained in more than one precision ({_listed(listed)})"


def _not_finite(results: Sequence[Found]) -> Iterator[str]:
    for found in results:
        run = found["run"]
        for row in found["rows"]:
            if not math.isfinite(row["value"]):
                yield (
                    f"{row['metric']} of {run['sweep']}={run['level']}, seed {run['seed']}, step "
                    f"{row['step']}, {row['sampling']} is {row['value']}: no mean has it in"
                )


def _levels_by(pairs: Iterator[tuple[str, Any]]) -> dict[Any, list[str]]:
    values: dict[Any, list[str]] = {}
    for level, value in pairs:
        values.setdefault(value, []).append(level)
    return values


def _listed(values: Mapping[Any, Sequence[str]]) -> str:
    return "; ".join(f"{value}: {', '.join(levels)}" for value, levels in values.items())
