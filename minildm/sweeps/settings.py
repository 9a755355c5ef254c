"""What a level of a sweep may set, by dotted names; unknown names and other types are refused."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from minildm.autoencoder import Autoencoder
from minildm.checkpoints import from_dict, load_model, pretrained, shipped_names, to_dict
from minildm.diffusion import LatentDiffusion
from minildm.experiments import AutoencoderExperiment, LatentDiffusionExperiment
from minildm.presets import PIXELS, PRESETS
from minildm.runs import flat
from minildm.samplers import SAMPLERS

Settings = Mapping[str, Any]  # "unet.width" -> 32
Experiment = TypeVar("Experiment", AutoencoderExperiment, LatentDiffusionExperiment)

SAMPLING = {  # what `sampling.` takes, and what it is if not said: plain DDIM, 20 steps
    "sampler": "ddim",
    "steps": 20,
    "eta": 0.0,
    "spacing": None,
    "guidance_scale": 1.0,
    "guidance_rescale": 0.0,
    "guidance_interval": None,
}
OWN = ("preset", "model", "first_stage", "trained_first_stage", "latent_std")
PIXELS_NAME = "pixels"  # the first stage of f = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the settings of a level come to.

    model: a trained model's folder or name, of which samples are drawn; nothing is trained then.
    first_stage: what to train once for all runs that name the same; or trained_first_stage, a
    folder or a shipped name; neither: pixels. latent_std: the standard deviation that the
    diffusion model sees in place of 1.
    """

    experiment: LatentDiffusionExperiment | None
    model: str | None
    first_stage: AutoencoderExperiment | None
    trained_first_stage: str | None
    latent_std: float
    sampling: dict[str, Any]


def unknown(what: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is not there, with the likeliest one that is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{what}: {name!r} is not known{meant} Known: {', '.join(known)}")


def plan_of(settings: Settings, seed: int = 0, where: str = "settings") -> Plan:
    """Settings resolved; ValueError names the setting, what came and what is allowed."""
    own = {key: settings[key] for key in OWN if key in settings}
    parts: dict[str, dict[str, Any]] = {"first_stage.": {}, "sampling.": {}, "": {}}
    for key, value in settings.items():
        if key not in OWN:
            prefix = next(p for p in parts if key.startswith(p))
            parts[prefix][key.removeprefix(prefix)] = value
    sampling = sampling_of(parts["sampling."], where)
    if "model" in own:
        _refuse_training(own, {**parts["first_stage."], **parts[""]}, where)
        return Plan(
            experiment=None,
            model=str(own["model"]),
            first_stage=None,
            trained_first_stage=None,
            latent_std=1.0,
            sampling=sampling,
        )
    preset = _preset(own.get("preset", "emoji-class"), LatentDiffusionExperiment, where)
    experiment = changed(preset, {**parts[""], "train.seed": seed}, where)
    given = own.get("trained_first_stage")
    name = own.get("first_stage", None if given else "emoji-kl-f4")
    if given and (name or parts["first_stage."]):
        raise ValueError(f"{where}: give first_stage, to train, or trained_first_stage, not both")
    latent_std = own.get("latent_std", 1.0)
    if isinstance(latent_std, bool) or not isinstance(latent_std, int | float) or latent_std <= 0:
        raise ValueError(f"{where}: latent_std={latent_std!r} must be a positive number")
    plan = Plan(
        experiment=experiment,
        model=None,
        first_stage=_first_stage(name, parts["first_stage."], experiment, where),
        trained_first_stage=given,
        latent_std=float(latent_std),
        sampling=sampling,
    )
    _check_fit(plan, where)
    return plan


def sampling_of(options: Settings, where: str) -> dict[str, Any]:
    """Options of a sampling with the defaults filled in."""
    for name in options:
        if name not in SAMPLING:
            raise unknown(f"{where}: sampling", name, SAMPLING)
    found = SAMPLING | dict(options)
    if found["sampler"] not in SAMPLERS:
        raise unknown(f"{where}: sampling.sampler", str(found["sampler"]), SAMPLERS)
    if not isinstance(found["steps"], int) or found["steps"] < 1:
        raise ValueError(f"{where}: sampling.steps={found['steps']!r} must be at least 1")
    if found["guidance_interval"] is not None:
        found["guidance_interval"] = tuple(found["guidance_interval"])
    return found


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
    name: str | None, changes: Settings, experiment: LatentDiffusionExperiment, where: str
) -> AutoencoderExperiment | None:
    """The preset, on pictures of the diffusion model's size unless that is said otherwise."""
    if name is None or name == PIXELS_NAME:
        return None  # what other levels' first stages share says nothing of pixels
    preset = _preset(name, AutoencoderExperiment, f"{where}: first_stage")
    return changed(preset, {"data.size": experiment.data.size, **changes}, f"{where}: first_stage")


def _check_fit(plan: Plan, where: str) -> None:
    """ValueError where the UNet is not made for the first stage's latents."""
    config = plan.first_stage.model if plan.first_stage else PIXELS
    if plan.trained_first_stage is not None:
        first = trained(plan.trained_first_stage)
        config = first.config if isinstance(first, Autoencoder) else first.config.autoencoder
    try:  # the names are the data's, and do not change what fits
        plan.experiment.model_config(config, ("a", "b"), vocab_size=2, labels=("a", "b"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _refuse_training(own: Settings, changes: Settings, where: str) -> None:
    extra = sorted([*(own.keys() - {"model"}), *changes])
    if extra:
        raise ValueError(
            f"{where}: model={own['model']!r} is trained already, so {', '.join(extra)} would "
            "change nothing; only sampling. settings go with it"
        )
    if own["model"] not in shipped_names() and not Path(str(own["model"])).is_dir():
        raise unknown(f"{where}: model", str(own["model"]), shipped_names())


def trained(name: str) -> Autoencoder | LatentDiffusion:
    """A model's folder, or the name of one that ships."""
    return load_model(name) if Path(name).is_dir() else pretrained(name)
