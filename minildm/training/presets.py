"""Experiments by name: the paper's first stages and small models; the paper's whole models."""

from pathlib import Path
from typing import Any

import yaml

from minildm.compression.autoencoder import AutoencoderConfig
from minildm.diffusion.latent_diffusion import LatentDiffusionConfig
from minildm.training.configs import (
    AutoencoderExperiment,
    ClassifierExperiment,
    Experiment,
    LatentDiffusionExperiment,
    from_dict,
)


def _read(name: str) -> dict[str, Any]:
    """The tables of a YAML file, without the fragments, whose names begin with a dot."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    tables = yaml.load((Path(__file__).parent / name).read_text(), loader)
    return {key: table for key, table in tables.items() if not key.startswith(".")}


def _experiment(table: dict[str, Any]) -> Experiment:
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


_PAPER = _read("published.yaml")
RELEASED = {name: _experiment(table) for name, table in _PAPER["released"].items()}
FIRST_STAGES = RELEASED | {n: _experiment(t) for n, t in _PAPER["unreleased"].items()}  # Tab. 8
PUBLISHED = {name: _model(table) for name, table in _PAPER["published"].items()}
PRESETS = FIRST_STAGES | {n: _experiment(t) for n, t in _read("presets.yaml").items()}

PIXELS = AutoencoderConfig(regularizer="identity", z_channels=3)  # f = 1: nothing to train
CLEAR_SUBGROUPS = PRESETS["emoji-class"].data.subgroups
