"""What `minildm sweep` does with its options; the command line itself is read in `cli`."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minildm.sweeps.running import DEFINITION, claim, collect
from minildm.sweeps.sampling import is_whole
from minildm.sweeps.standard import SWEEPS
from minildm.sweeps.sweep import Sweep, read_sweep


def asked_sweep(
    what: str,
    changes: Iterable[str] = (),
    *,
    seeds: int | None = None,
    samples: int | None = None,
    measure_at: Iterable[str] = (),
) -> Sweep:
    """The standard sweep of that name, or a TOML file's, as the options change it.

    changes: as "train.steps=500", for all levels. seeds: how many, from 0. measure_at: steps, as
    "250" or "250,500"; if none are given and the changes set train.steps, those of the sweep
    that still come. ValueError names the option.
    """
    sweep = SWEEPS[what] if what in SWEEPS else _of_file(what)
    settings, steps = dict(map(setting, changes)), tuple(_steps(measure_at))
    fields: dict[str, Any] = {"shared": sweep.shared_with(settings)}
    if steps:
        fields["measure_at"] = steps
    elif is_whole(last := settings.get("train.steps"), 1):
        fields["measure_at"] = tuple(step for step in sweep.measure_at if step <= last)
    fields |= {} if seeds is None else {"seeds": tuple(range(seeds))}
    fields |= {} if samples is None else {"samples": samples}
    return replace(sweep, **fields)


def report_again(sweep: Sweep, folder: Path, **where: Any) -> tuple[Path, Path]:
    """`collect`, with its options; ValueError for a folder that holds no sweep."""
    if not (folder / DEFINITION).is_file() and not (folder / "runs").is_dir():
        raise ValueError(f"--out {folder} holds no sweep: neither {DEFINITION} nor runs/")
    return collect(claim(sweep, folder), folder, **where)


def _of_file(path: str) -> Sweep:
    if not Path(path).is_file():
        raise ValueError(f"sweep={path!r} is no TOML file, nor one of {', '.join(SWEEPS)}")
    return read_sweep(path)


def setting(text: str) -> tuple[str, Any]:
    """What --set says: a number, a list or a truth value as in TOML, else a word."""
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ValueError(f"--set {text!r} must be NAME=VALUE, as in train.steps=500")
    try:
        found = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value
    if isinstance(found, Mapping):
        raise ValueError(f"--set {text!r} must give one value, as in train.steps=500")
    return name, found


def _steps(texts: Iterable[str]) -> Iterable[int]:
    for text in texts:
        for word in text.split(","):
            if not word.strip().isdecimal():
                raise ValueError(f"--measure-at {text!r} must be steps, as in 250,500")
            yield int(word)
