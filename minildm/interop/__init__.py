"""Official and diffusers weights, in and out: each tensor finds its place, or an error names it."""

from pathlib import Path
from typing import Any

from minildm.compression.autoencoder import Autoencoder
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.files import new_folder
from minildm.interop.compvis import load_compvis, save_compvis
from minildm.interop.diffusers import load_diffusers, save_diffusers
from minildm.interop.weights import read_mapping
from minildm.training.checkpoint import find_model, load_model, save_model

__all__ = ["convert", "load_compvis", "load_diffusers", "save_compvis", "save_diffusers"]


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str = "minildm",
    config: str | Path | None = None,
    clip: str | Path | None = None,
) -> tuple[str, str]:
    """Read a model from `source`, write it to the new `target`; return both forms.

    source: an official `.ckpt` or `.safetensors`; a diffusers folder; a folder of ours, or the
    name of a shipped model. to: a form of SAVE; an official target is a file as above. config: of
    an official source; by default the YAML of its name, or config.yaml, next to it. clip: see
    `load_compvis`. Raises FileExistsError if the target exists, ValueError for what cannot be
    read or expressed; nothing is left then.
    """
    path, target = Path(source), Path(target)
    card = path / "config.json"
    if path.is_file():
        near = (path.with_suffix(".yaml"), path.with_name("config.yaml"))
        found = config or next((p for p in near if p.is_file()), near[0])
        form, model = "compvis", load_compvis(found, path, clip=clip)
    elif not path.is_dir() or (card.is_file() and "format" in read_mapping(card)):
        form, model = "minildm", load_model(find_model(source))
    else:
        form, model = "diffusers", load_diffusers(path)
    if to not in SAVE or to == form:
        allowed = ", ".join(name for name in SAVE if name != form)
        raise ValueError(f"to={to!r} must be one of {allowed}: {source} is a {form} model")
    if not isinstance(model, Autoencoder | LatentDiffusion) and "minildm" in (form, to):
        raise ValueError(f"{source} is a {type(model).__name__}, which {to} files cannot hold")
    if target.exists():
        raise FileExistsError(f"{target} already exists: choose a new name")
    SAVE[to](model, target)
    return form, to


def _save_ours(model: Any, target: Path) -> None:
    with new_folder(target) as folder:
        if isinstance(model, LatentDiffusion):
            text = getattr(model.config.conditioner, "tokens", model.config.conditioner)
            if text.kind == "frozen_text":
                text.build()  # its own folder stays and must be complete
            save_model(model.autoencoder, folder / "first_stage")
        save_model(model, folder, first_stage="first_stage")


SAVE = {"minildm": _save_ours, "diffusers": save_diffusers, "compvis": save_compvis}
