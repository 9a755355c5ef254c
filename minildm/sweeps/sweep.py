"""An ablation as data: what varies, what stays, how often, and how it is measured."""

import itertools
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from minildm.conditioning import look_up
from minildm.diffusion.latent_diffusion import SamplingConfig
from minildm.files import data_dir
from minildm.layers import check_fields
from minildm.training.checkpoint import find_model
from minildm.training.configs import (
    AutoencoderExperiment,
    LatentDiffusionExperiment,
    differences,
    flat,
    from_dict,
    override,
    to_dict,
)
from minildm.training.presets import PRESETS

COLUMNS = ("seed", "step", "seconds", "sampling", "images_per_second", "metric", "value")
COLUMNS += ("n", "real", "device")  # of the table, after the level
DEFINITION = "sweep.json"  # in a sweep's folder
OF_RUN = ("sampling.", "first_stage.", "latent_std")  # other settings are the experiment's


@dataclass(frozen=True, kw_only=True)
class Run:
    """One cell of a sweep: a level with a seed, resolved. `to_dict` and `from_dict` make it JSON.

    model: a trained model's folder or name, which is only sampled; else `experiment` is trained,
    on first_stage, on the trained one in first_stage_dir, or without either on pixels.
    latent_std: the standard deviation of the latents, instead of 1.
    """

    sweep: str
    level: str
    seed: int
    measure_at: tuple[int, ...] = ()
    samplings: dict = field(default_factory=dict)
    samples: int
    sampling: SamplingConfig = field(default_factory=partial(SamplingConfig, steps=20))
    model: str = ""
    experiment: LatentDiffusionExperiment | None = None
    first_stage: AutoencoderExperiment | None = None
    first_stage_dir: str = ""
    latent_std: float = 1.0

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.sweep}-{slug(self.level)}-seed{self.seed}"


def slug(text: str) -> str:
    """A text as part of a file's name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Levels of one factor, each with every seed; the name heads a column of the table.

    levels: what each sets, by label: dotted fields of the experiment ("unet.channels",
    "train.lr"), "preset", "first_stage" (a preset that is trained once for all runs, the folder
    of a trained one, or "pixels") and its fields ("first_stage.model.mid_attn"), "latent_std",
    and of SamplingConfig ("sampling.steps"); or "model", a trained model that is only sampled.
    shared: the same for all levels. measure_at: optimiser steps, in addition to the last one, at
    which samples are measured; at the end also with all `samplings` (label: options).
    Raises ValueError for an unknown or unfitting setting, with the level.
    """

    name: str
    levels: dict
    shared: dict = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    measure_at: tuple[int, ...] = ()
    samplings: dict = field(default_factory=dict)
    samples: int = 500
    question: str = ""
    paper: str = ""  # what the paper found, to compare with

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.]*", self.name) or self.name in COLUMNS:
            taken = ", ".join(COLUMNS)
            raise ValueError(f"name={self.name!r} must be a word of a-z, 0-9, _, .; not {taken}")
        names = [run.name for run in self.runs()]
        if not names or len(set(names)) < len(names):
            given = f"levels={list(self.levels)}, seeds={self.seeds}"
            raise ValueError(f"{self.name}: {given} must be different, and at least one each")
        check_fields(self, 20, 1e6, "samples")

    def runs(self) -> list[Run]:
        """Seed by seed, every level: a sweep that is stopped has whole rounds."""
        return [self.run(level, seed) for seed in self.seeds for level in self.levels]

    def run(self, level: str, seed: int) -> Run:
        """One run. Raises ValueError with the level, the setting and what is allowed."""
        try:
            run = Run(sweep=self.name, level=level, seed=seed, samples=self.samples)
            run = replace(run, measure_at=self.measure_at, samplings=self.samplings)
            run = _resolved(run, {**self.shared, **self.levels[level]})
            for options in self.samplings.values():
                override(run.sampling, options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.name}={level}: {error}") from error
        return run

    def changed(self, settings: Mapping[str, Any]) -> "Sweep":
        """The sweep with other shared settings.

        Raises ValueError for a setting that every level sets itself.
        """
        for key in settings:
            if all(key in level for level in self.levels.values()):
                raise ValueError(f"{self.name}: each level sets its own {key}")
        return replace(self, shared={**self.shared, **settings})


def _resolved(run: Run, settings: dict[str, Any]) -> Run:
    """The run with a level's settings; for a training, with its presets."""
    if model := settings.pop("model", ""):
        find_model(model)  # raises ValueError for an unknown one
        return override(replace(run, model=model), settings)
    preset = settings.pop("preset", "emoji-class-f4")
    stage = settings.pop("first_stage", "emoji-kl-f4")
    look_up(preset, list(PRESETS), "preset")
    if stage == "pixels" or Path(stage).is_dir():  # shared settings of others have no effect
        settings = {k: v for k, v in settings.items() if not k.startswith("first_stage.")}
        run = replace(run, first_stage_dir="" if stage == "pixels" else stage)
    else:
        look_up(stage, list(PRESETS), "first_stage")
        size = settings.get("data.size", PRESETS[preset].data.size)
        settings = {"first_stage.data.size": size, **settings}
        run = replace(run, first_stage=PRESETS[stage])
    named = {k if k.startswith(OF_RUN) else f"experiment.{k}": v for k, v in settings.items()}
    named["experiment.train.seed"] = run.seed
    run = override(replace(run, experiment=PRESETS[preset]), named)
    if run.first_stage:  # raises ValueError where they do not fit together
        run.experiment.model_config(run.first_stage.model)
    return run


def read_sweep(what: str | Path) -> Sweep:
    """Read a TOML file, a sweep's folder, or the standard sweep of that name in notebooks/sweeps.

    A file has the fields of Sweep, or in place of `levels` a `grid`: "unet.channels" = [16, 32]
    and "train.lr" = [1e-3, 5e-4] give four levels, such as "channels 16, lr 0.001". Its name is
    the key of a grid of one, else the file's. Raises ValueError with the file and what is wrong.
    """
    path, folder = Path(what), data_dir().parent / "notebooks/sweeps"
    if (path / DEFINITION).is_file():
        return from_dict(Sweep, json.loads((path / DEFINITION).read_text(encoding="utf-8")))
    if path.suffix != ".toml":
        look_up(str(what), sorted(known.stem for known in folder.glob("*.toml")), "sweep")
        path = folder / f"{what}.toml"
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        grid = {} if "levels" in content else flat(content.pop("grid"))
        levels = _crossed(grid) if grid else content["levels"]
        content["levels"] = {label: flat(settings) for label, settings in levels.items()}
        content["shared"] = flat(content.get("shared", {}))
        name = next(iter(grid)) if len(grid) == 1 else re.sub(r"\W", "_", path.stem.lower())
        return from_dict(Sweep, {"name": name, **content})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} requires levels (tables) or a grid (lists)") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def joined(sweep: Sweep, folder: Path) -> Sweep:
    """The sweep with the levels and seeds that its folder has. Raises ValueError for another's."""
    own = read_sweep(folder) if (folder / DEFINITION).is_file() else sweep
    seeds = tuple(sorted({*own.seeds, *sweep.seeds}))
    both = replace(sweep, levels={**own.levels, **sweep.levels}, seeds=seeds)
    for level in own.levels:
        if differ := differences(to_dict(own.run(level, 0)), to_dict(both.run(level, 0))):
            advice = f"choose another folder; `minildm sweep {folder}` continues that one"
            raise ValueError(f"{folder} holds another sweep ({level}: {differ}): {advice}")
    return both


def _crossed(grid: Mapping[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """A level for each combination of values."""
    levels = {}
    for values in itertools.product(*grid.values()):
        words = [f"{n.rpartition('.')[2]} {v}" for n, v in zip(grid, values, strict=True)]
        label = str(values[0]) if len(grid) == 1 else ", ".join(words)
        levels[label] = dict(zip(grid, values, strict=True))
    return levels
