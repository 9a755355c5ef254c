"""Folders of models: `config.json`, `model.safetensors`, `ema.safetensors`, `tokenizer.json`.

A diffusion model's folder names that of its first stage.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minildm.compression.autoencoder import Autoencoder, AutoencoderConfig
from minildm.conditioning import CaptionTokenizer, TextConditioner, look_up
from minildm.diffusion.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from minildm.files import atomic_write, data_dir, fingerprint, write_json
from minildm.training.classifier import Classifier, ClassifierConfig, Segmenter, SegmenterConfig
from minildm.training.configs import from_dict, to_dict

Model = Autoencoder | LatentDiffusion | Classifier | Segmenter
FORMAT, AVERAGES = 2, "ema.safetensors"
KINDS: dict[str, tuple[type, type]] = {
    "autoencoder": (AutoencoderConfig, Autoencoder),
    "latent-diffusion": (LatentDiffusionConfig, LatentDiffusion),
    "classifier": (ClassifierConfig, Classifier),
    "segmenter": (SegmenterConfig, Segmenter),
}


class CheckpointError(ValueError):
    """A folder is missing, damaged, or of another model; the message names it."""


@contextmanager
def reading(where: object) -> Iterator[None]:
    """Bad content, whatever it raises, becomes a CheckpointError that begins with `where`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # torch, safetensors, YAML and our configs raise all kinds
        said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        said = "\n".join(said.splitlines()[:11])
        raise CheckpointError(f"{where}: {said}") from error


def own_code(*things: Any) -> dict[str, str]:
    """The classes and functions that a user wrote, each with a hash of its source and state."""
    found = {}
    for thing in things:
        if thing.__module__.partition(".")[0] not in ("minildm", "torch"):
            owner = getattr(thing, "__self__", thing)  # of a bound method
            state = [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
            state += getattr(owner, "__dict__", {}).values()
            source = [repr(thing), "" if isinstance(thing, type) else repr(state)]
            for part in (thing, type(owner), getattr(thing, "func", None), *state):
                with suppress(OSError, TypeError):  # typed at a prompt; no function
                    source.append(inspect.getsource(part))
            name, *source = (re.sub(r" at 0x\w+", "", text) for text in source)
            found[name] = hashlib.sha256(repr(source).encode()).hexdigest()[:12]
    return found


def _unwrapped(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that they had before torch.compile or DataParallel wrapped a part."""
    for path, part in model.named_modules():
        if isinstance(part, nn.DataParallel):
            tensors = {k.replace(f"{path}.module.", f"{path}."): v for k, v in tensors.items()}
    return {name.replace("_orig_mod.", ""): v for name, v in tensors.items()}


def save_model(
    model: Model,
    folder: str | Path,
    *,
    ema: Mapping[str, Tensor] | None = None,
    first_stage: str | None = None,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's folder; each file atomically.

    ema: averaged parameters by name, which `load_model` prefers. first_stage: required for a
    diffusion model: the folder of its autoencoder, relative to `folder`. info: what else the
    card should hold, such as data and steps.
    """
    folder, kind = Path(folder), *(k for k, (_, cls) in KINDS.items() if isinstance(model, cls))
    card = {"format": FORMAT, "kind": kind, "config": to_dict(model.config), "info": info or {}}
    card["own"] = list(own_code(*map(type, model.modules())))
    tensors = _unwrapped(model, model.state_dict())
    if isinstance(model, LatentDiffusion):
        if first_stage is None:
            raise ValueError("first_stage=None must be the folder of the model's autoencoder")
        card["first_stage"] = {"path": first_stage, "sha256": fingerprint(model.autoencoder)}
        tensors = {k: v for k, v in tensors.items() if not k.startswith("autoencoder.")}
        if reader := reader_of(model):
            reader.tokenizer.save(folder / "tokenizer.json")
    files = {"model": tensors}
    if ema is not None:
        files["ema"] = {k: v for k, v in _unwrapped(model, ema).items() if k in tensors}
    for name, content in files.items():
        kept = {k: v.detach().cpu().contiguous() for k, v in content.items()}
        with atomic_write(folder / f"{name}.safetensors") as file:
            file.write(save(kept))
    if ema is None:
        (folder / AVERAGES).unlink(missing_ok=True)  # averages of earlier weights
    write_json(folder / "config.json", card)


def load_model(
    folder: str | Path, *, ema: bool = True, kind: str | None = None, build: Callable | None = None
) -> Model:
    """Read a model's folder: on the CPU, in float32, in evaluation mode.

    ema: use the averaged weights if there are any. kind: the required one of KINDS. build: makes a
    model with classes of your own from its config, since no file decides which code runs. Config
    and shapes are checked before any weight is allocated. Raises CheckpointError for files that
    are missing, damaged, or do not fit together.
    """
    folder, card = Path(folder), read_card(folder)
    if kind not in (None, card["kind"]):
        raise CheckpointError(f"{folder} holds a model of kind {card['kind']!r}, not {kind!r}")
    with reading(f"{folder} cannot be loaded"):
        tensors = _read_tensors(folder / "model.safetensors")
        if ema and (folder / AVERAGES).exists():
            tensors |= _read_tensors(folder / AVERAGES)
        model = _built(folder, card, build)
        if isinstance(model, LatentDiffusion):
            stage = model.autoencoder.state_dict()
            tensors |= {f"autoencoder.{name}": tensor for name, tensor in stage.items()}
        model.load_state_dict(tensors, strict=True, assign=True)
        if reader := reader_of(model):
            reader.set_tokenizer(CaptionTokenizer.load(folder / "tokenizer.json"))
    return model.eval()


def read_card(folder: str | Path) -> dict[str, Any]:
    """Read a folder's `config.json`. Raises CheckpointError for another format or kind."""
    path = Path(folder) / "config.json"
    with reading(f"{folder} has no readable config.json"):
        card = json.loads(path.read_text())
        written, kind = card.get("format"), card.get("kind")
    if written != FORMAT or kind not in list(KINDS):
        got = f"format {written!r:.40}, kind {kind!r:.40}"
        raise CheckpointError(f"{path} has {got}; known: format {FORMAT} of {', '.join(KINDS)}")
    return card


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, floating point ones as float32."""
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: tensor {name!r} has values that are not finite")
    return tensors


class _NoInit(TorchFunctionMode):
    """Leaves out torch.nn.init: on the meta device it imports the compiler, for two seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor")
        return func(*args, **(kwargs or {}))


def on_meta(build: Callable[..., Any], *args: Any, **parts: Any) -> Any:
    """A module whose tensors take no memory, but for a frozen encoder's and the given parts'."""
    with torch.device("meta"), _NoInit():
        return build(*args, **parts)


def _built(folder: Path, card: Mapping[str, Any], build: Callable | None) -> Model:
    """The card's model on the meta device; a diffusion model with its first stage and schedules."""
    config_class, model_class = KINDS[card["kind"]]
    if (own := card.get("own")) and build is None:
        raise ValueError(f"it has classes of your own, {', '.join(own)}: give build=")
    config = from_dict(config_class, card["config"])
    if model_class is not LatentDiffusion:
        return build(config) if own else on_meta(model_class, config)
    reference = card["first_stage"]
    stage = load_model(folder / reference["path"], kind="autoencoder")
    if stage.config != config.autoencoder or fingerprint(stage) != reference["sha256"]:
        raise ValueError(f"first_stage={reference['path']!r} is not the one that it was trained on")
    if not own:
        return on_meta(LatentDiffusion, config, autoencoder=stage)
    with torch.random.fork_rng([]):
        model = build(config)
    model.autoencoder.load_state_dict(stage.state_dict())
    return model


def reader_of(model: Model) -> TextConditioner | None:
    """The trained conditioner that reads captions, within a hybrid too; None without one."""
    conditioner = getattr(model, "conditioner", model)
    reader = getattr(conditioner, "tokens", conditioner)
    return reader if isinstance(reader, TextConditioner) else None


def find_model(name: str | Path) -> Path:
    """The folder of a shipped model, or `name` itself where it is a folder.

    Raises ValueError with the nearest names.
    """
    weights = data_dir() / "weights"
    shipped = sorted(path.parent.name for path in weights.glob("*/config.json"))
    if Path(name).is_dir() and str(name) not in shipped:
        return Path(name)
    look_up(str(name), shipped, "model")
    return weights / name


def pretrained(name: str) -> Model:
    """Load a model from `data/weights`. Raises ValueError with the known names."""
    return load_model(find_model(name))
