"""The official code's files: a YAML config, and weights that are read without running anything."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from minildm.checkpoints import CheckpointError

PathLike = str | os.PathLike[str]
ConfigLike = PathLike | Mapping[str, Any]
CheckpointLike = PathLike | Mapping[str, Tensor]

_ZIP = b"PK\x03\x04"  # how torch.save's files begin; its older ones cannot be memory-mapped
_MISSING = object()


class _Inert:
    """In the place of a class that a pickle names: takes anything, does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# What Lightning's callbacks leave in official checkpoints beside the weights.
STAND_INS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)


class Section:
    """A mapping in a config, read key by key; errors say where it stands."""

    def __init__(self, content: object, where: str) -> None:
        if not isinstance(content, Mapping):
            raise ValueError(f"{where} must be a mapping, got {content!r:.80}")
        self.content, self.where = content, where
        self._asked: set[str] = set()

    def integer(self, key: str, default: object = _MISSING) -> int:
        """A whole number of at least 1."""
        value = self._get(key, default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{self.where}: {key}={value!r} must be a whole number >= 1")
        return value

    def integers(self, key: str, default: object = _MISSING) -> tuple[int, ...]:
        """A list of whole numbers."""
        value = self._get(key, default)
        lists = isinstance(value, Sequence) and not isinstance(value, str)
        if not lists or any(type(n) is not int for n in value):
            raise ValueError(f"{self.where}: {key}={value!r} must be a list of whole numbers")
        return tuple(value)

    def names(self, key: str, allowed: Collection[str]) -> tuple[str, ...]:
        """A list of some of the allowed names."""
        value = self._get(key, _MISSING)
        lists = isinstance(value, Sequence) and not isinstance(value, str)
        if not lists or any(name not in allowed for name in value):
            listed = ", ".join(allowed)
            raise ValueError(f"{self.where}: {key}={value!r} must be a list of some of {listed}")
        return tuple(value)

    def number(self, key: str, default: object = _MISSING) -> float:
        """A number."""
        value = self._get(key, default)
        if type(value) not in (int, float):
            raise ValueError(f"{self.where}: {key}={value!r} must be a number")
        return float(value)

    def choice(self, key: str, allowed: Sequence[object], default: object = _MISSING) -> Any:
        """One of the values that we can express."""
        value = self._get(key, default)
        if not any(value == other and type(value) is type(other) for other in allowed):
            listed = ", ".join(repr(other) for other in allowed)
            raise ValueError(f"{self.where}: {key}={value!r} cannot be expressed, only {listed}")
        return value

    def given(self, key: str, nothing: object) -> bool:
        """Whether a key holds more than what stands for nothing."""
        return self._get(key, nothing) != nothing

    def section(self, key: str) -> "Section":
        """A mapping within."""
        return Section(self._get(key, _MISSING), f"{self.where}.{key}")

    def split(self) -> tuple[str, "Section"]:
        """What this builds: its target and its parameters. ValueError where it names none."""
        target = self.content.get("target")
        if not isinstance(target, str):
            raise ValueError(f"{self.where} names no target: {sorted(map(str, self.content))}")
        return target, Section(self.content.get("params", {}), f"{self.where}.params")

    def mark(self, key: str) -> None:
        """This key was read, from `content` itself."""
        self._asked.add(key)

    def check_all_read(self, unused: Collection[str] = ()) -> None:
        """ValueError names the first key that nobody asked for; `unused` ones are left."""
        known = self._asked.union(unused)
        for key, value in self.content.items():
            if key not in known:
                listed = ", ".join(sorted(known))
                raise ValueError(f"{self.where}: {key}={value!r:.80} is not known; known: {listed}")

    def _get(self, key: str, default: object) -> Any:
        self._asked.add(key)
        value = self.content.get(key, default)
        if value is _MISSING:
            raise ValueError(f"{self.where} lacks {key!r}")
        return value


def read_config(config: ConfigLike) -> tuple[str, Section]:
    """The target and the parameters of an official YAML, a path or the parsed mapping.

    The whole file, with its `model`, or what stands below that. Raises ValueError, with the
    file's name, where it is no such config.
    """
    where, content = "config", config
    if not isinstance(config, Mapping):
        where = str(config)
        try:
            content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"{where} is not readable as YAML: {error}") from error
    if isinstance(content, Mapping) and "model" in content:
        where, content = f"{where}: model", content["model"]
    return Section(content, where).split()


class Tensors(NamedTuple):
    """What a checkpoint holds."""

    named: Mapping[str, Any]
    source: str  # for errors
    ours: bool  # read by us: may be taken as they are; else they belong to the caller


def read_tensors(checkpoint: CheckpointLike) -> Tensors:
    """The tensors of a `.safetensors`, of a `.ckpt` or of a mapping, without a `state_dict` round.

    Files are mapped into memory, read as they are used. A pickle that names anything beside
    tensors and a few inert stand-ins is refused, and nothing in it runs. Raises CheckpointError.
    """
    source = "checkpoint"
    content: object = checkpoint
    if not isinstance(checkpoint, Mapping):
        source = str(checkpoint)
        content = _read_file(Path(checkpoint))
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source} holds no tensors by name but a {type(content).__name__}")
    return Tensors(content, source, ours=not isinstance(checkpoint, Mapping))


def _read_file(path: Path) -> object:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is cut short or no safetensors file: {error}") from error
    with path.open("rb") as file:
        mapped = file.read(len(_ZIP)) == _ZIP
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in STAND_INS]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a broken pickle raises nearly anything
        # The library's first line may advise to run it; what was wrong is said further down.
        lines = str(error).splitlines() or [""]
        said = [line for line in lines if "WeightsUnpickler error: " in line or "GLOBAL" in line]
        reason = (said or lines)[0].rpartition("WeightsUnpickler error: ")[2]
        reason = reason.partition(" Please use")[0]  # that advice is how to run it
        raise CheckpointError(
            f"{path} is cut short, no checkpoint, or would run code; nothing was run: {reason}"
        ) from error
