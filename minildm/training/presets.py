"""Experiments by name: the paper's first stages, and the small models of presets.yaml."""

from minildm.compression.autoencoder import AutoencoderConfig
from minildm.training.configs import AutoencoderExperiment
from minildm.training.published import FIRST_STAGES, Experiment, experiment_of, read_yaml

_SMALL = {name: experiment_of(table) for name, table in read_yaml("presets.yaml").items()}
PRESETS: dict[str, Experiment] = FIRST_STAGES | _SMALL
PIXELS = AutoencoderConfig(regularizer="identity", z_channels=3)  # f = 1: nothing to train
LADDER = {  # first stages of f = 2, 4, ..., 32
    name: experiment
    for name, experiment in _SMALL.items()
    if isinstance(experiment, AutoencoderExperiment) and not name.endswith("-gpu")
}
_AT_FACTOR = {f: PRESETS[f"emoji-class-f{f}"].unet for f in (1, 2, 4, 8, 16, 32)}
FACTOR_UNETS = {f: (u.channels, u.channel_mult, u.attn_levels) for f, u in _AT_FACTOR.items()}
CLEAR_SUBGROUPS = PRESETS["emoji-class"].data.subgroups
SMALL_UNET = PRESETS["emoji-text"].unet
