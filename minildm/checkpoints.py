"""One folder per model: `config.json`, `model.safetensors`, `ema.safetensors`; with text also
`tokenizer.json`.

A diffusion model's folder holds no autoencoder: it names the folder of the first stage that it
shares, relative to its own, and the hash of its weights.
"""

import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from minildm.autoencoder import Autoencoder, AutoencoderConfig
from minildm.conditioning import TextConditioner
from minildm.diffusion import LatentDiffusion, LatentDiffusionConfig
from minildm.files import atomic_write, data_dir, write_json
from minildm.judge import Judge, JudgeConfig
from minildm.segmenter import Segmenter, SegmenterConfig
from minildm.tokenizer import CaptionTokenizer

Config = TypeVar("Config")
Model = Autoencoder | LatentDiffusion | Judge | Segmenter

FORMAT = 1
KINDS: dict[str, tuple[type, type]] = {
    "autoencoder": (AutoencoderConfig, Autoencoder),
    "latent-diffusion": (LatentDiffusionConfig, LatentDiffusion),
    "judge": (JudgeConfig, Judge),
    "segmenter": (SegmenterConfig, Segmenter),
}


class CheckpointError(ValueError):
    """A checkpoint folder that is missing, cut short, or of another model; names the file."""


def to_dict(config: Any) -> dict[str, Any]:
    """A frozen dataclass, nested ones included, as what JSON can hold."""
    return json.loads(json.dumps(asdict(config)))


def from_dict(cls: type[Config], content: Mapping[str, Any]) -> Config:
    """The dataclass that `to_dict` came from, validated; ValueError names unknown fields."""
    hints = typing.get_type_hints(cls)
    unknown = set(content) - {f.name for f in fields(cls)}
    if unknown:
        raise ValueError(f"{cls.__name__} has no {sorted(unknown)}; it has {sorted(hints)}")
    return cls(**{name: _revive(hints[name], value) for name, value in content.items()})


def _revive(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(hint, types.UnionType):
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if is_dataclass(hint):
        return from_dict(hint, value)
    if typing.get_origin(hint) is tuple:
        return tuple(value)
    return value


def fingerprint(module: nn.Module) -> str:
    """sha256 over names, shapes and float32 values of a module's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().float().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def kind_of(model: Model) -> str:
    """The name under which a model's class stands in `config.json`."""
    for kind, (_, cls) in KINDS.items():
        if type(model) is cls:
            return kind
    raise TypeError(f"model must be one of {sorted(KINDS)}, got {type(model).__name__}")


def own_tensors(model: Model) -> dict[str, Tensor]:
    """What a folder of this model holds: its tensors without those of a shared first stage."""
    state = model.state_dict()
    if isinstance(model, LatentDiffusion):
        return {k: v for k, v in state.items() if not k.startswith("autoencoder.")}
    return state


def save_model(
    model: Model,
    folder: str | Path,
    *,
    ema: Mapping[str, Tensor] | None = None,
    first_stage: str | None = None,
    half: bool = False,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's folder; each file appears whole or not at all.

    first_stage: for a diffusion model the folder of its autoencoder, relative to `folder`.
    ema: averaged parameters by name; written beside, and what `load_model` prefers. Without
    them those of an earlier save go: they would be preferred to the new weights. half:
    store float16. info: whatever should be remembered, such as data and steps.
    """
    folder, kind = Path(folder), kind_of(model)
    card = {"format": FORMAT, "kind": kind, "config": to_dict(model.config), "info": info or {}}
    if kind == "latent-diffusion":
        if first_stage is None:
            raise ValueError("a diffusion model's folder must name its first_stage's")
        card["first_stage"] = {"path": first_stage, "sha256": fingerprint(model.autoencoder)}
    tensors = own_tensors(model)
    if tokenizer := tokenizer_of(model):
        tokenizer.save(folder / "tokenizer.json")
    _write_tensors(folder / "model.safetensors", tensors, half)
    if ema is not None:
        _write_tensors(
            folder / "ema.safetensors", {k: v for k, v in ema.items() if k in tensors}, half
        )
    else:
        (folder / "ema.safetensors").unlink(missing_ok=True)  # averages of other weights
    write_json(folder / "config.json", card)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], half: bool) -> None:
    kept = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    if half:
        kept = {k: v.half() if v.is_floating_point() else v for k, v in kept.items()}
    with atomic_write(path) as file:
        file.write(save(kept))


def load_model(folder: str | Path, *, ema: bool = True, kind: str | None = None) -> Model:
    """Read a model's folder, on the CPU, in float32, in evaluation mode.

    ema: take the averaged weights where the folder has them. kind: what it must be, of KINDS. A
    CheckpointError names the file that is missing, cut short, or of another model, with the
    first ten tensors that do not fit.
    """
    folder = Path(folder)
    card = read_card(folder)
    if kind is not None and card["kind"] != kind:
        raise CheckpointError(f"{folder} holds a model of kind {card['kind']!r}, not {kind!r}")
    config_class, model_class = KINDS[card["kind"]]
    try:
        with torch.random.fork_rng([]):  # first weights are drawn, only to be replaced
            model = model_class(from_dict(config_class, card["config"]))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from error
    tensors = _read_tensors(folder / "model.safetensors")
    if ema and (folder / "ema.safetensors").exists():
        tensors |= _read_tensors(folder / "ema.safetensors")
    _fill(model, tensors, folder / "model.safetensors")
    if card["kind"] == "latent-diffusion":
        _load_first_stage(model, folder, card)
        _load_tokenizer(model, folder / "tokenizer.json")
    return model.eval()


def read_card(folder: str | Path) -> dict[str, Any]:
    """A folder's `config.json`, checked as far as its format and kind."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is no model's folder: it has no config.json")
    try:
        card = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}") from error
    card = card if isinstance(card, dict) else {}
    if card.get("format") != FORMAT or card.get("kind") not in KINDS:
        raise CheckpointError(
            f"{path} says format {card.get('format')!r}, kind {card.get('kind')!r}; this version "
            f"reads format {FORMAT} of {sorted(KINDS)}"
        )
    for part in ("config", "first_stage") if card["kind"] == "latent-diffusion" else ("config",):
        if not isinstance(card.get(part), dict):
            raise CheckpointError(f"{path} lacks its {part!r}")
    return card


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        return {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is cut short or no safetensors file: {error}") from error


def _fill(model: Model, tensors: Mapping[str, Tensor], path: Path) -> None:
    want = {k: tuple(v.shape) for k, v in own_tensors(model).items()}
    have = {k: tuple(v.shape) for k, v in tensors.items()}
    wrong = [
        f"{k}: file {have.get(k, 'nothing')}, model {want.get(k, 'nothing')}"
        for k in sorted(want.keys() | have.keys())
        if want.get(k) != have.get(k)
    ]
    if wrong:
        listed = "\n  ".join(wrong[:10])
        raise CheckpointError(f"{path}: {len(wrong)} tensors do not fit, such as\n  {listed}")
    model.load_state_dict(dict(tensors), strict=False)


def _load_first_stage(model: LatentDiffusion, folder: Path, card: Mapping[str, Any]) -> None:
    reference = card["first_stage"]
    stage = load_model(folder / reference["path"], kind="autoencoder")
    found = fingerprint(stage)
    if found != reference["sha256"]:
        raise CheckpointError(
            f"{folder} was trained on another first stage than {folder / reference['path']}: "
            f"hash {reference['sha256'][:12]}, found {found[:12]}"
        )
    model.autoencoder.load_state_dict(stage.state_dict())


def tokenizer_of(model: Model) -> CaptionTokenizer | None:
    """What turns captions into numbers, where the model has learned to read."""
    reader = reader_of(model)
    return reader.tokenizer if reader else None


def reader_of(model: Model) -> TextConditioner | None:
    """The part that reads captions, also beside a picture; None where none was trained."""
    conditioner = getattr(model, "conditioner", None)
    reader = getattr(conditioner, "tokens", conditioner)
    return reader if isinstance(reader, TextConditioner) else None


def _load_tokenizer(model: LatentDiffusion, path: Path) -> None:
    reader = reader_of(model)
    if reader is None:
        return
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        reader.set_tokenizer(CaptionTokenizer.load(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def shipped_names() -> list[str]:
    """The names that `pretrained` knows."""
    return sorted(p.parent.name for p in (data_dir() / "weights").glob("*/config.json"))


def pretrained(name: str) -> Model:
    """A model that ships in `data/weights`; ValueError lists their names."""
    if name not in shipped_names():
        known = ", ".join(shipped_names())
        raise ValueError(f"pretrained model {name!r} is not known; known: {known}")
    return load_model(data_dir() / "weights" / name)
