"""What a level of a sweep may set, by dotted names; unknown names and other types are refused."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from minildm.autoencoder import Autoencoder, AutoencoderConfig
from minildm.checkpoints import (
    KINDS,
    from_dict,
    load_model,
    pretrained,
    read_card,
    shipped_names,
    to_dict,
)
from minildm.data.emoji import STYLES, read_emoji
from minildm.diffusion import LatentDiffusion, LatentDiffusionConfig
from minildm.experiments import AutoencoderExperiment, DataConfig, LatentDiffusionExperiment
from minildm.files import data_dir
from minildm.presets import PIXELS, PRESETS
from minildm.runs import flat
from minildm.sweeps.sampling import Drawn, Settings, is_number, sampling_of, unknown

Experiment = TypeVar("Experiment", AutoencoderExperiment, LatentDiffusionExperiment)

OWN = ("preset", "model", "first_stage", "trained_first_stage", "latent_std")
PATHS = ("model", "trained_first_stage", "data.path", "first_stage.data.path")
PIXELS_NAME = "pixels"  # the first stage of f = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the settings of a level come to.

    model: a trained model's folder or name, of which samples are drawn, and its config; nothing
    is trained then. first_stage: what to train once for all runs that name the same; or
    trained_first_stage, a folder or a shipped name; neither: pixels. latent_std: the standard
    deviation that the diffusion model sees in place of 1.
    """

    experiment: LatentDiffusionExperiment | None = None
    model: str | None = None
    config: LatentDiffusionConfig | None = None
    first_stage: AutoencoderExperiment | None = None
    trained_first_stage: str | None = None
    latent_std: float = 1.0
    sampling: dict[str, Any]

    @property
    def drawn(self) -> Drawn:
        """What says the schedule and the condition of the samples."""
        return self.experiment or self.config


def absolute(settings: Settings) -> dict[str, Any]:
    """Folders by their whole path, as words: runs may be carried out in another place than this.

    The name of a shipped model stays.
    """
    found = dict(settings)
    for key in PATHS:
        value = found.get(key)
        if isinstance(value, str | os.PathLike) and str(value):
            is_name = key in OWN and not Path(value).is_dir()
            found[key] = str(value) if is_name else str(Path(value).resolve())
    return found


def plan_of(settings: Settings, seed: int = 0, where: str = "settings") -> Plan:
    """Settings resolved; ValueError names the setting, what came and what is allowed."""
    own = {key: settings[key] for key in OWN if key in settings}
    parts: dict[str, dict[str, Any]] = {"first_stage.": {}, "sampling.": {}, "": {}}
    for key, value in settings.items():
        if key not in OWN:
            prefix = next(p for p in parts if key.startswith(p))
            parts[prefix][key.removeprefix(prefix)] = value
    if "model" in own:
        _refuse_training(own, {**parts["first_stage."], **parts[""]}, where)
        config = config_of("model", own["model"], ("latent-diffusion",), where)
        _check_measurable(config, f"{where}: model={own['model']!r}")
        sampling = sampling_of(parts["sampling."], where, config)
        return Plan(model=str(own["model"]), config=config, sampling=sampling)
    if "train.seed" in parts[""]:
        raise ValueError(f"{where}: train.seed is each run's own: name the sweep's seeds instead")
    preset = _preset(own.get("preset", "emoji-class"), LatentDiffusionExperiment, where)
    experiment = changed(preset, {**parts[""], "train.seed": seed}, where)
    latent_std = own.get("latent_std", 1.0)
    if not is_number(latent_std) or latent_std <= 0:
        raise ValueError(f"{where}: latent_std={latent_std!r} must be a positive number")
    first_stage, given = _first_stage(own, parts["first_stage."], experiment, where)
    _check_fit(experiment, first_stage, given, where)
    return Plan(
        experiment=experiment,
        first_stage=first_stage,
        trained_first_stage=given,
        latent_std=float(latent_std),
        sampling=sampling_of(parts["sampling."], where, experiment),
    )


def changed(experiment: Experiment, changes: Settings, where: str) -> Experiment:
    """The experiment with other values at dotted names; ValueError for a name it has not."""
    content = to_dict(experiment)
    known = flat(content)
    for key, value in changes.items():
        if key not in known:
            raise unknown(where, key, known)
        _check_type(where, key, known[key], value)
        *way, last = key.split(".")
        place = content
        for part in way:
            place = place[part]
        place[last] = value
    try:
        return from_dict(type(experiment), content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def _check_type(where: str, key: str, old: Any, new: Any) -> None:
    """A number for a number, a word for a word; a field that is None takes anything."""

    def sort(value: Any) -> type:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float
        return list if isinstance(value, tuple | list) else type(value)

    if old is not None and new is not None and sort(old) is not sort(new):
        raise ValueError(f"{where}: {key}={new!r} must be a {sort(old).__name__} like {old!r}")
    if isinstance(old, int) and isinstance(new, float):
        raise ValueError(f"{where}: {key}={new!r} must be a whole number like {old!r}")


def _preset(name: Any, kind: type, where: str) -> Any:
    known = [key for key, experiment in PRESETS.items() if isinstance(experiment, kind)]
    if name not in known:
        raise unknown(f"{where}: preset", str(name), known)
    return PRESETS[name]


def _first_stage(
    own: Settings, changes: Settings, experiment: LatentDiffusionExperiment, where: str
) -> tuple[AutoencoderExperiment | None, str | None]:
    """What to train, on pictures of the diffusion model's size unless that is said otherwise; or
    what is trained; neither: pixels.
    """
    given = own.get("trained_first_stage")
    name = own.get("first_stage", None if given is not None else "emoji-kl-f4")
    if given is not None and (name or changes):
        raise ValueError(f"{where}: give first_stage, to train, or trained_first_stage, not both")
    if name is None or name == PIXELS_NAME:
        # What other levels' first stages share says nothing of pixels.
        return None, None if given is None else str(given)
    where = f"{where}: first_stage"
    preset = _preset(name, AutoencoderExperiment, where)
    return changed(preset, {"data.size": experiment.data.size, **changes}, where), None


def _check_fit(
    experiment: LatentDiffusionExperiment,
    first_stage: AutoencoderExperiment | None,
    given: str | None,
    where: str,
) -> None:
    """ValueError where the UNet is not made for the first stage's latents, or data lack a name."""
    config = first_stage.model if first_stage else PIXELS
    if given is not None:
        kinds = ("autoencoder", "latent-diffusion")
        found = config_of("trained_first_stage", given, kinds, where)
        config = found if isinstance(found, AutoencoderConfig) else found.autoencoder
    try:  # the names are the data's, and do not change what fits
        experiment.model_config(config, ("a", "b"), vocab_size=2, labels=("a", "b"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    _check_names(experiment.data, where)
    if first_stage is not None:
        _check_names(first_stage.data, f"{where}: first_stage")


def _check_names(data: DataConfig, where: str) -> None:
    """ValueError for subgroups and styles that the data have not, or that are named twice."""
    known: dict[str, Sequence[str]] = {}
    if data.kind in ("emoji", "scenes"):
        known["styles"] = STYLES
    if data.kind == "emoji" and data.subgroups:
        known["subgroups"] = emoji_subgroups()
    for field, names in known.items():
        asked = getattr(data, field)
        for name in asked:
            if name not in names:
                raise unknown(f"{where}: data.{field}", str(name), names)
        if len(set(asked)) < len(asked):
            raise ValueError(f"{where}: data.{field}={list(asked)} must name nothing twice")


def emoji_subgroups() -> list[str]:
    """Those of all groups."""
    return [name for names in read_emoji().groups.values() for name in names]


def _check_measurable(config: LatentDiffusionConfig, where: str) -> None:
    """ValueError for a model of classes that no pictures here are of."""
    conditioner = config.conditioner
    others = set(conditioner.classes) - {*emoji_subgroups()} if conditioner.kind == "class" else ()
    if others:
        raise ValueError(
            f"{where} knows classes that are no subgroups of the emoji, such as "
            f"{min(others)!r}: there are no pictures to measure it by"
        )


def _refuse_training(own: Settings, changes: Settings, where: str) -> None:
    extra = sorted([*(own.keys() - {"model"}), *changes])
    if extra:
        raise ValueError(
            f"{where}: model={own['model']!r} is trained already, so {', '.join(extra)} would "
            "change nothing; only sampling. settings go with it"
        )


def config_of(key: str, name: Any, kinds: Sequence[str], where: str) -> Any:
    """The config of the model that setting `key` names, a folder or a shipped name; no weights.

    ValueError for what is none, not finished, or of none of those kinds.
    """
    weights = data_dir() / "weights"
    fitting = [n for n in shipped_names() if read_card(weights / n)["kind"] in kinds]
    folder = Path(str(name))
    if not folder.is_dir():
        if name not in shipped_names():
            raise unknown(f"{where}: {key}", str(name), [*fitting, "a model's folder"])
        folder = weights / name
    try:
        card = read_card(folder)
        if card["kind"] not in kinds:
            raise ValueError(
                f"it is of kind {card['kind']!r}, and must be {' or '.join(kinds)}, as "
                f"{', '.join(fitting)}"
            )
        if "unfinished" in card.get("info", ()):
            raise ValueError("it is still in training")
        return from_dict(KINDS[card["kind"]][0], card["config"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {key}={str(name)!r}: {error}") from error


def trained(name: str) -> Autoencoder | LatentDiffusion:
    """A model's folder, or the name of one that ships."""
    return load_model(name) if Path(name).is_dir() else pretrained(name)
