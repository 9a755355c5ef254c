"""How a level's samples are drawn: the options of `sampling.`, checked before anything runs."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minildm.diffusion import LatentDiffusionConfig
from minildm.experiments import LatentDiffusionExperiment
from minildm.samplers import SAMPLERS, SPACINGS
from minildm.tau_theta import ConditionerConfig

Settings = Mapping[str, Any]  # "unet.width" -> 32
Drawn = LatentDiffusionExperiment | LatentDiffusionConfig  # of what samples are drawn from

SAMPLING = {  # what `sampling.` takes, and what it is if not said: plain DDIM, 20 steps
    "sampler": "ddim",
    "steps": 20,
    "eta": 0.0,
    "spacing": None,
    "guidance_scale": 1.0,
    "guidance_rescale": 0.0,
    "guidance_interval": None,
}


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not there, with the likeliest one that is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else "."
    return ValueError(f"{what}: {name!r} is not known{meant} Known: {', '.join(known)}")


def is_whole(number: Any, least: int) -> bool:
    """Whether it is an int, and at least that."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= least


def is_number(value: Any) -> bool:
    """Whether it is an int or a float, and finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def sampling_of(options: Settings, where: str, drawn: Drawn | None = None) -> dict[str, Any]:
    """Options of a sampling with the defaults filled in.

    ValueError for what no sampler takes, and where it is known of what is drawn, for what that
    does not take.
    """
    for name in options:
        if name not in SAMPLING:
            raise unknown(f"{where}: sampling", name, SAMPLING)
    found = SAMPLING | dict(options)
    for name, known in (("sampler", SAMPLERS), ("spacing", SPACINGS)):
        if str(found[name]) not in known and (name, found[name]) != ("spacing", None):
            raise unknown(f"{where}: sampling.{name}", str(found[name]), known)
    _check_numbers(found, where)
    if found["guidance_interval"] is not None:
        found["guidance_interval"] = tuple(found["guidance_interval"])
    if found["eta"] and found["sampler"] != "ddim":
        raise ValueError(
            f"{where}: sampling.eta={found['eta']} belongs to the sampler 'ddim', not to "
            f"{found['sampler']!r}"
        )
    if drawn is not None:
        _check_drawn(found, drawn, where)
    return found


def _check_numbers(found: Settings, where: str) -> None:
    """ValueError for an option of a sampling that is not of its type, or out of range."""
    interval, rescale = found["guidance_interval"], found["guidance_rescale"]
    two = isinstance(interval, Sequence) and len(interval) == 2
    right = {
        "steps": (is_whole(found["steps"], 1), "a whole number, at least 1"),
        "eta": (is_number(found["eta"]) and found["eta"] >= 0, "a number, at least 0"),
        "guidance_scale": (is_number(found["guidance_scale"]), "a number"),
        "guidance_rescale": (is_number(rescale) and 0 <= rescale <= 1, "a number in [0, 1]"),
        "guidance_interval": (
            interval is None
            or (two and all(is_whole(t, 0) for t in interval) and interval[0] <= interval[1]),
            "two whole numbers [first, last], 0 <= first <= last",
        ),
    }
    for name, (is_right, needed) in right.items():
        if not is_right:
            raise ValueError(f"{where}: sampling.{name}={found[name]!r} must be {needed}")


def _check_drawn(found: Settings, drawn: Drawn, where: str) -> None:
    """ValueError for an option that the schedule or the condition does not allow."""
    steps, scale, schedule = found["steps"], found["guidance_scale"], drawn.schedule
    if steps > schedule.T:
        raise ValueError(f"{where}: sampling.steps={steps} must be at most T={schedule.T}")
    if schedule.zero_terminal_snr and found["spacing"] not in (None, "trailing"):
        raise ValueError(
            f"{where}: sampling.spacing={found['spacing']!r} must be 'trailing' with "
            "schedule.zero_terminal_snr"
        )
    if scale != 1 and not _has_null(drawn.conditioner):
        raise ValueError(
            f"{where}: sampling.guidance_scale={scale} must be 1: the model knows no 'no "
            "condition' to guide away from"
        )


def _has_null(conditioner: ConditionerConfig) -> bool:
    if conditioner.kind in ("none", "class"):
        return conditioner.kind == "class" and conditioner.null_class
    return conditioner.kind != "ids" or conditioner.null_id is not None
