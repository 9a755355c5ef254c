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
from minildm.sweeps.measuring import METRICS, check_metrics, metrics_of
from minildm.sweeps.sampling import Settings, is_whole, sampling_of, unknown
from minildm.sweeps.settings import Plan, absolute, plan_of

COLUMNS = (  # of the table; its first is called after the sweep
    *("seed", "step", "seconds", "images", "sampling", "metric"),
    *("value", "low", "high", "n", "device"),
)
TAKEN = ("plain", "first stage")  # by what is measured of every run, beside its samplings
TABLES, LISTS = ("levels", "shared", "samplings"), ("seeds", "measure_at", "metrics")


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
    "latent_std", "sampling.steps" and the like; or "model", one that is trained already. Folders
    may be Paths, and are kept by their whole path. shared: the same for all levels. seeds: of
    weights, order, noise and samples. measure_at: optimiser steps, with the plain sampling of the
    level; the last one is always measured, and there with all `samplings` (label -> options) too.
    samples: how many pictures each is measured on. metrics: none named, all that apply. name: it
    heads a column of the table. All is checked here, against data/ too: ValueErrors name the level
    and the setting.
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
        self._check_name()
        self._check_types()
        levels = {str(label): absolute(flat(level)) for label, level in self.levels.items()}
        samplings = {str(label): dict(options) for label, options in self.samplings.items()}
        if len({slug(label) for label in levels}) < len(self.levels):
            raise ValueError(f"{self.name}: levels {list(self.levels)} are not told apart by names")
        object.__setattr__(self, "levels", levels)
        object.__setattr__(self, "shared", absolute(flat(self.shared)))
        object.__setattr__(self, "samplings", samplings)
        if not self.levels:
            raise ValueError(f"{self.name}: levels must name at least one")
        self._check_samplings()
        seeds = self.seeds
        if not seeds or not all(is_whole(s, 0) for s in seeds) or len({*seeds}) < len(seeds):
            raise ValueError(f"{self.name}: seeds={seeds} must be different whole numbers")
        for label in self.levels:
            self._check(label)

    def _check_name(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"name={self.name!r} must be a word like 'unet_width', of a-z, 0-9, _")
        if self.name in COLUMNS:
            raise ValueError(
                f"name={self.name!r} is taken, as are all columns of the table: "
                f"{', '.join(COLUMNS)}"
            )

    def _check_types(self) -> None:
        """ValueError for a field of another type; lists become tuples."""

        def refuse(name: str, value: Any, needed: str) -> None:
            raise ValueError(f"{self.name}: {name}={value!r} must be {needed}")

        for name in ("question", "paper"):
            if not isinstance(getattr(self, name), str):
                refuse(name, getattr(self, name), "a text")
        for name in TABLES:
            if not isinstance(getattr(self, name), Mapping):
                refuse(name, getattr(self, name), "a table")
        for name in ("levels", "samplings"):
            for label, content in getattr(self, name).items():
                if not isinstance(content, Mapping):
                    refuse(f"{name}[{label!r}]", content, "a table of settings")
        for name in LISTS:
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                refuse(name, value, "a list")
            object.__setattr__(self, name, tuple(value))
        if not is_whole(self.samples, 1):
            refuse("samples", self.samples, "a whole number, at least 1")
        for name in self.metrics:
            if not isinstance(name, str):
                refuse("metrics", list(self.metrics), "a list of names")

    def _check_samplings(self) -> None:
        """ValueError for labels that would not be names of files, different everywhere."""
        labels = list(self.samplings)
        for label in labels:
            if not re.fullmatch(r"\w[\w .,=+()%-]*", label):
                raise ValueError(
                    f"{self.name}: samplings[{label!r}] is to be the name of a file, and must be "
                    "of letters, digits, spaces and _.,=+()%-"
                )
            if slug(label) in map(slug, TAKEN):
                raise ValueError(
                    f"{self.name}: samplings[{label!r}] is taken, as are {', '.join(TAKEN)}"
                )
        if len({*map(slug, labels)}) < len(labels):
            raise ValueError(f"{self.name}: samplings {labels} are not told apart by names")

    def _check(self, label: str) -> None:
        where, settings = f"{self.name}={label}", self.settings(label)
        plan = plan_of(settings, 0, where)
        for name, options in self.samplings.items():
            both = {**plan.sampling, **options}
            sampling_of(both, f"{where}: samplings[{name!r}]", plan.drawn)
        self._check_steps(plan, where)
        _check_model_metrics(self.metrics, plan, where)
        check_metrics(self.metrics, plan, self.samples, where)

    def _check_steps(self, plan: Plan, where: str) -> None:
        """ValueError for steps to measure at that are none, and steps that nobody would count."""
        steps = self.measure_at
        if plan.experiment is None:
            if steps:
                raise ValueError(f"{where}: measure_at={steps} must be empty: nothing is trained")
            return
        last, alone = plan.experiment.train.steps, plan.experiment.alone_steps
        if not all(is_whole(step, 1) and step <= last for step in steps):
            raise ValueError(f"{where}: measure_at={steps} must lie in 1..{last}")
        if alone:
            raise ValueError(
                f"{where}: alone_steps={alone} must be 0: the table's steps, pictures and seconds "
                "would not count them"
            )

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
        """The same with other shared settings; ValueError for one that would change nothing."""
        return replace(self, shared=self.shared_with(settings))

    def shared_with(self, settings: Settings) -> dict[str, Any]:
        """What is shared, with more; a level's own still go before them.

        ValueError for a setting that every level has of its own.
        """
        settings = flat(settings)
        for key, value in settings.items():
            if all(key in level for level in self.levels.values()):
                raise ValueError(
                    f"{self.name}: {key}={value!r} for all levels would change nothing: each "
                    f"level sets its own {key}"
                )
        return {**self.shared, **settings}

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
        return cls(**content)


def grid(axes: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, Settings]]:
    """Every combination of values: a label, and what it sets."""
    if not isinstance(axes, Mapping):
        raise ValueError(f"grid={axes!r} must be a table of lists")
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


def _check_model_metrics(asked: Sequence[str], plan: Plan, where: str) -> None:
    """ValueError for metrics that say nothing of the trained model that a level names."""
    if plan.config is None:
        return
    conditioner = plan.config.conditioner
    scenes = conditioner.kind == "layout" or conditioner.concat == "semantic"
    data = "scenes" if scenes else "emoji"
    applies = metrics_of(conditioner.kind, conditioner.concat, data)
    for name in asked:
        if name in METRICS and name not in applies:
            raise ValueError(
                f"{where}: metrics={name!r} says nothing of model={plan.model!r}; "
                f"{', '.join(applies)} do"
            )
