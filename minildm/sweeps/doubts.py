"""What a reader of a sweep's report should doubt: results that are not of the same kind."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    known = {name: {found.get(name) for found in timing.values()} - {None} for name in HARDWARE}
    unlike = [name for name, values in known.items() if len(values) > 1]
    if unlike:
        said = {
            level: ", ".join(str(found[name]) for name in unlike if found.get(name) is not None)
            for level, found in timing.items()
        }
        yield (
            f"levels were timed with another {' and '.join(unlike)} ({_listed(said.items())}), so "
            "equal time compares unlike things; delete timing/ to measure all levels anew"
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
    known = [(f["run"]["level"], f["precision"]) for f in results if f.get("precision")]
    if len({precision for _, precision in known}) > 1:
        yield f"runs were trained in more than one precision ({_listed(known)})"


def _not_finite(results: Sequence[Found]) -> Iterator[str]:
    for found in results:
        run = found["run"]
        for row in found["rows"]:
            if not math.isfinite(row["value"]):
                yield (
                    f"{row['metric']} of {run['sweep']}={run['level']}, seed {run['seed']}, step "
                    f"{row['step']}, {row['sampling']} is {row['value']}: no mean has it in"
                )


def _listed(pairs: Iterable[tuple[str, str]]) -> str:
    """(level, what it has) as "fp32: 16, 32; bf16: 32"."""
    levels: dict[str, dict[str, None]] = {}
    for level, has in pairs:
        levels.setdefault(has, {})[level] = None
    return "; ".join(f"{has}: {', '.join(names)}" for has, names in levels.items())
