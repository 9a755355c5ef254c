"""From one project's files to another's: official checkpoints, diffusers folders, our own."""

from pathlib import Path
from typing import Any, Literal

from minildm.autoencoder import Autoencoder
from minildm.checkpoints import load_model, pretrained, save_model
from minildm.diffusion import LatentDiffusion
from minildm.files import new_folder
from minildm.frozen_text import frozen_text
from minildm.interop.compvis import load_compvis
from minildm.interop.compvis_saving import save_compvis
from minildm.interop.diffusers_files import read_mapping
from minildm.interop.diffusers_folders import load_diffusers, save_diffusers

Form = Literal["minildm", "diffusers", "compvis"]
FORMS = ("minildm", "diffusers", "compvis")
FIRST_STAGE = "first_stage"  # the autoencoder's folder within a converted model's


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    config: str | Path | None = None,
    clip: str | Path | None = None,
) -> tuple[str, str]:
    """Read a model from `source` and write it to `target`; the two forms, of FORMS.

    source: an official `.ckpt` or `.safetensors` with its YAML (`config`; without it the one of
    the same name, or config.yaml, beside it); a diffusers folder; a model's folder of ours, or
    the name of a shipped one. to: what to write; "minildm" for what others made. A folder of ours
    has its autoencoder in `first_stage`; an official target is a `.ckpt` or `.safetensors`.
    clip: see `load_compvis`. Raises FileExistsError where the target is there already,
    ValueError for what cannot be read or expressed; nothing is left then.
    """
    form, model = _read(source, config, clip)
    to = to or ("minildm" if form != "minildm" else None)
    if to not in FORMS or to == form:
        allowed = ", ".join(name for name in FORMS if name != form)
        raise ValueError(f"to={to!r}: {source} is {form}'s; it can become {allowed}")
    if to == "diffusers":
        save_diffusers(model, target)
    elif to == "compvis":
        if Path(target).exists():
            raise FileExistsError(f"{target} is there already, and kept: name another file")
        save_compvis(model, target)
    else:
        _save_ours(model, target)
    return form, to


def _read(source: str | Path, config: str | Path | None, clip: str | Path | None) -> Any:
    path = Path(source)
    if path.is_file():
        return "compvis", load_compvis(config or _config_beside(path), path, clip=clip)
    for name, value in (("config", config), ("clip", clip)):
        if value is not None:
            raise ValueError(f"{name}={str(value)!r} belongs to an official file; got {source}")
    if not path.is_dir():
        return "minildm", pretrained(str(source))
    card = path / "config.json"
    if card.is_file() and "format" in read_mapping(card):
        return "minildm", load_model(path)
    return "diffusers", load_diffusers(path)


def _config_beside(path: Path) -> Path:
    for beside in (path.with_suffix(".yaml"), path.parent / "config.yaml"):
        if beside.is_file():
            return beside
    raise ValueError(
        f"{path} has no {path.stem}.yaml or config.yaml beside it: name the official YAML (config)"
    )


def _save_ours(model: Any, target: str | Path) -> None:
    if not isinstance(model, Autoencoder | LatentDiffusion):
        raise ValueError(
            f"a {type(model).__name__} alone has no folder of ours; a whole model or a first "
            "stage has"
        )
    if isinstance(model, LatentDiffusion) and model.config.conditioner.encoder == "clip":
        # Our folders do not hold it: it must be whole where the config says that it is.
        frozen_text("clip", model.config.conditioner.encoder_path)
    with new_folder(target) as folder:
        if isinstance(model, Autoencoder):
            save_model(model, folder)
        else:
            save_model(model.autoencoder, folder / FIRST_STAGE)
            save_model(model, folder, first_stage=FIRST_STAGE)
