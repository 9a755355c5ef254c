"""An ablation as data: what varies, what stays, how often, and how it is measured."""

import itertools
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from minildm.runs import flat
from minildm.sweeps.measuring import check_metrics
from minildm.sweeps.settings import Plan, Settings, plan_of, sampling_of, unknown


@dataclass(frozen=True, kw_only=True)
class Run:
    """One cell of a sweep: a level with a seed. It fits into JSON, and so into a notebook."""

    sweep: str
    level: str
    seed: int
    settings: dict[str, Any]
    measure_at: tuple[int, ...]
    samplings: dict[str, dict[str, Any]]
    samples: int
    metrics: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.sweep}-{slug(self.level)}-seed{self.seed}"

    def plan(self) -> Plan:
        """What is to be trained and drawn."""
        return plan_of(self.settings, self.seed, f"{self.sweep}={self.level}")

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Run":
        """The inverse of `as_dict`."""
        tuples = {name: tuple(content[name]) for name in ("measure_at", "metrics")}
        return cls(**{**content, **tuples})


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Levels of one factor, each with every seed.

    levels: by their labels, what each sets: dotted fields of the experiment ("unet.width",
    "objective.predict", "train.lr"), "preset", "first_stage" (a preset that is trained once for
    all runs, or "pixels") and its fields ("first_stage.model.mid_attn"), "trained_first_stage",
    "latent_std", "sampling.steps" and the like; or "model", one that is trained already.
    shared: the same for all levels. seeds: of weights, order, noise and samples.
    measure_at: optimiser steps, with the plain sampling of the level; the last one is always
    measured, and there with all `samplings` (label -> options) too. samples: how many pictures
    each is measured on. metrics: none named, all that apply.
    ValueErrors name the level and the setting.
    """

    name: str
    levels: dict[str, dict[str, Any]]
    shared: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    measure_at: tuple[int, ...] = ()
    samplings: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: int = 500
    metrics: tuple[str, ...] = ()
    question: str = ""
    paper: str = ""  # what the paper found, to set the result beside

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"name={self.name!r} must be a word like 'unet_width', of a-z, 0-9, _")
        if not isinstance(self.levels, Mapping) or not isinstance(self.shared, Mapping):
            raise ValueError(
                f"{self.name}: levels={self.levels!r}, shared={self.shared!r} must be tables"
            )
        wrong = {k: v for k, v in self.levels.items() if not isinstance(v, Mapping)}
        if wrong:
            raise ValueError(f"{self.name}: levels={wrong} must be tables of settings")
        levels = {str(label): flat(level) for label, level in self.levels.items()}
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "shared", flat(self.shared))
        if not self.levels:
            raise ValueError(f"{self.name}: levels must name at least one")
        if len({slug(label) for label in self.levels}) < len(self.levels):
            raise ValueError(f"{self.name}: levels {list(self.levels)} are not told apart by names")
        seeds = self.seeds
        if not seeds or len({*seeds}) < len(seeds) or not all(_is_whole(s, 0) for s in seeds):
            raise ValueError(f"{self.name}: seeds={seeds} must be different whole numbers")
        for label in self.levels:
            self._check(label)

    def _check(self, label: str) -> None:
        where, settings = f"{self.name}={label}", self.settings(label)
        plan = plan_of(settings, 0, where)
        for name, options in self.samplings.items():
            sampling_of(options, f"{where}: samplings[{name!r}]")
        last = plan.experiment.train.steps if plan.experiment else 0
        if not all(_is_whole(step, 1) and step <= last for step in self.measure_at):
            raise ValueError(f"{where}: measure_at={self.measure_at} must lie in 1..{last}")
        check_metrics(self.metrics, plan, self.samples, where)

    def settings(self, label: str) -> dict[str, Any]:
        """All that a level sets, with what is shared."""
        if label not in self.levels:
            raise unknown(f"{self.name}: level", label, self.levels)
        return {**self.shared, **self.levels[label]}

    def runs(
        self, levels: Sequence[str] | None = None, seeds: Sequence[int] | None = None
    ) -> list[Run]:
        """Seed by seed, every level: so that a sweep that is stopped has whole rounds."""
        for seed in seeds or ():
            if seed not in self.seeds:
                raise unknown(f"{self.name}: seed", str(seed), map(str, self.seeds))
        pairs = itertools.product(seeds or self.seeds, levels or self.levels)
        return [
            Run(
                sweep=self.name,
                level=label,
                seed=seed,
                settings=self.settings(label),
                measure_at=self.measure_at,
                samplings=self.samplings,
                samples=self.samples,
                metrics=self.metrics,
            )
            for seed, label in pairs
        ]

    def changed(self, **settings: Any) -> "Sweep":
        """The same with other shared settings; a level's own still go before them."""
        return replace(self, shared={**self.shared, **settings})

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Sweep":
        """From `as_dict`, or a TOML's content, where `grid` may stand for `levels`.

        grid: {"unet.width": [16, 32], "train.lr": [1e-3, 5e-4]} are four levels, "width 16, lr
        0.001" and so on. ValueError for what it does not know.
        """
        content = dict(content)
        if ("grid" in content) == ("levels" in content):
            raise ValueError(f"a sweep needs levels, or a grid, and not both: {sorted(content)}")
        if "grid" in content:
            content["levels"] = dict(grid(content.pop("grid")))
        known = [f.name for f in fields(cls)]
        for name in content:
            if name not in known:
                raise unknown("a sweep", name, [*known, "grid"])
        tuples = {
            name: tuple(content[name])
            for name in ("seeds", "measure_at", "metrics")
            if name in content
        }
        return cls(**{**content, **tuples})


def grid(axes: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, Settings]]:
    """Every combination of values: a label, and what it sets."""
    axes = flat(axes)
    wrong = {name: values for name, values in axes.items() if not isinstance(values, list)}
    if wrong or not axes:
        raise ValueError(f"grid must give a list of values for each name, got {wrong or axes}")
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        words = [f"{name.rpartition('.')[2]} {value}" for name, value in settings.items()]
        yield (str(values[0]) if len(values) == 1 else ", ".join(words)), settings


def read_sweep(path: str | Path) -> Sweep:
    """A sweep from a TOML file; ValueError names the file and what is wrong."""
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return Sweep.from_dict({"name": re.sub(r"\W", "_", path.stem.lower()), **content})
    except (ValueError, TypeError) as error:  # a TOMLDecodeError is a ValueError
        raise ValueError(f"{path}: {error}") from error


def slug(label: str) -> str:
    """A label as part of a folder's name."""
    return re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-") or "level"


def _is_whole(number: Any, least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= least
