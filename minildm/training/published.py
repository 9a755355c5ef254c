"""The paper's models, from published.yaml: first stages as experiments, whole models as configs."""

from pathlib import Path
from typing import Any

import yaml

from minildm.diffusion.latent_diffusion import LatentDiffusionConfig
from minildm.training.configs import (
    AutoencoderExperiment,
    ClassifierExperiment,
    LatentDiffusionExperiment,
    from_dict,
)

Experiment = AutoencoderExperiment | LatentDiffusionExperiment | ClassifierExperiment


def read_yaml(name: str) -> dict[str, Any]:
    """The tables of a file in this folder, without the fragments, whose names begin with a dot."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    tables = yaml.load((Path(__file__).parent / name).read_text(), loader)
    return {key: table for key, table in tables.items() if not key.startswith(".")}


def experiment_of(table: dict[str, Any]) -> Experiment:
    """The experiment that a table describes; its fields say of which kind it is."""
    if "unet" in table:
        return from_dict(LatentDiffusionExperiment, table)
    return from_dict(AutoencoderExperiment if "model" in table else ClassifierExperiment, table)


def _model(table: dict[str, Any]) -> LatentDiffusionConfig:
    """A whole model; a number in place of names stands for "0", "1", ..."""
    conditioner = {
        field: [str(i) for i in range(value)] if field in ("classes", "labels") else value
        for field, value in table.get("conditioner", {}).items()
    }
    return from_dict(LatentDiffusionConfig, {**table, "conditioner": conditioner})


_TABLES = read_yaml("published.yaml")
RELEASED = {name: experiment_of(table) for name, table in _TABLES["released"].items()}
UNRELEASED = {name: experiment_of(table) for name, table in _TABLES["unreleased"].items()}
FIRST_STAGES = RELEASED | UNRELEASED  # Tab. 8
PUBLISHED = {name: _model(table) for name, table in _TABLES["published"].items()}
