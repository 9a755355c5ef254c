"""What all formats share: filling a model by rules for names, and files that run no code."""

import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from einops import rearrange
from safetensors.torch import load_file, save
from torch import Tensor, nn

from minildm.files import atomic_write
from minildm.training.checkpoint import CheckpointError

PathLike = str | os.PathLike[str]
TABLES = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8"))
SHOWN = 10  # tensors listed in an error
_SEVERAL = re.compile(r"(.*)\{(.*)\}(.*)")


class Place(NamedTuple):
    """One of our tensors, and the tensors of another project that hold its values.

    Several tensors hold its rows: q, k, v, interleaved here by `heads`. `flat`: how many trailing
    axes of size 1 theirs lacks, as a linear layer does for a 1x1 convolution.
    """

    ours: str
    theirs: tuple[str, ...]
    flat: int = 0
    heads: int = 1

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Their tensors -> ours."""
        tensor = parts[0]
        if len(parts) > 1:
            tensor = rearrange(list(parts), "n (h d) ... -> (h n d) ...", h=self.heads)
        return tensor[(...,) + (None,) * self.flat]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Our tensor -> theirs, in the order of their names: the inverse of `join`."""
        tensor, n = tensor[(...,) + (0,) * self.flat], len(self.theirs)
        return list(rearrange(tensor, "(h n d) ... -> n (h d) ...", h=self.heads, n=n))


class Rules(NamedTuple):
    """How another project names and shapes a model's parameters, for loading and for saving.

    names: pattern -> replacement, applied to our name one after the other as `re.sub` does;
    "a.{q,k,v}.weight" is three tensors. flat: pattern of our 1x1 convolutions that lack so many
    axes there. heads: how many q, k and v of so many channels have.
    """

    names: Mapping[str, Any]
    flat: tuple[str, int] = ("$.", 0)
    heads: Callable[[int], int] = lambda channels: 1

    def places(self, model: nn.Module, ours: str = "", theirs: str = "") -> list[Place]:
        """The place of every parameter; `ours` and `theirs` are prefixes within a whole model."""
        found = []
        for name, parameter in model.named_parameters():
            parts, heads = [renamed(name, self.names)], 1
            if several := _SEVERAL.fullmatch(parts[0]):
                parts = [several[1] + part + several[3] for part in several[2].split(",")]
                heads = self.heads(len(parameter) // len(parts))
            flat = self.flat[1] if parameter.ndim == 4 and re.search(self.flat[0], name) else 0
            found.append(Place(ours + name, tuple(theirs + part for part in parts), flat, heads))
        return found


def renamed(name: str, names: Mapping[str, Any]) -> str:
    """A name after all replacements."""
    for pattern, replacement in names.items():
        name = re.sub(pattern, replacement, name)
    return name


def exported(model: nn.Module, places: Sequence[Place]) -> dict[str, Tensor]:
    """A model's tensors by their names."""
    state = model.state_dict()
    return {
        name: part
        for place in places
        for name, part in zip(place.theirs, place.split(state[place.ours]), strict=True)
    }


def on_meta(build: Callable[[], Any]) -> Any:
    """A model whose tensors take no memory, for `fill`."""
    with torch.device("meta"):
        return build()


class Tensors(dict[str, Any]):
    """The content of a checkpoint."""

    source = "checkpoint"  # for errors

    def part(self, prefix: str) -> "Tensors":
        """The tensors whose names begin so, without it."""
        found = Tensors({k[len(prefix) :]: v for k, v in self.items() if k.startswith(prefix)})
        found.source = self.source
        return found


def fill(
    model: nn.Module,
    places: Sequence[Place],
    tensors: Tensors,
    unused: str = "$.",
    **buffers: float,
) -> None:
    """Give a model on the meta device its tensors, in float32, without copying a file's.

    unused: pattern of their names that inference does not need. buffers: ours that no foreign file
    holds; counters become zeros. Raises CheckpointError with the first ten tensors that are
    missing, unknown, of another shape, or not finite.
    """
    meta = model.state_dict()
    wanted = {name: tuple(part.shape) for name, part in exported(model, places).items()}
    given = {k: _shape(v) for k, v in tensors.items() if k in wanted or not re.fullmatch(unused, k)}
    wrong = [
        f"{name}: file {given.get(name, 'nothing')}, model {wanted.get(name, 'nothing')}"
        for name in [*wanted, *(name for name in given if name not in wanted)]
        if given.get(name) != wanted.get(name)
    ]
    if wrong:
        listed = "\n  ".join(wrong[:SHOWN])
        raise CheckpointError(f"{tensors.source}: {len(wrong)} tensors do not fit:\n  {listed}")
    state = {}
    for name in dict(model.named_buffers()).keys() & meta.keys():
        value = float(buffers.get(name.rpartition(".")[2], 0.0))
        state[name] = torch.full(meta[name].shape, value, dtype=meta[name].dtype)
    for place in places:
        joined = place.join([tensors[name].detach() for name in place.theirs])
        state[place.ours] = joined.to(torch.float32).contiguous()
    model.load_state_dict(state, strict=True, assign=True)


def _shape(value: Any) -> Any:
    """The shape of a tensor of finite floats, or what it is instead."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return f"{getattr(value, 'dtype', type(value).__name__)}, not floats"
    if not value.is_meta and not all(b.isfinite() for b in value.detach().float().aminmax()):
        return "values that are not finite"
    return tuple(value.shape)


class _Inert:
    """Takes the place of a class that a pickle names: accepts anything, does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def read_tensors(checkpoint: PathLike | Mapping[str, Tensor]) -> Tensors:
    """The tensors of a `.safetensors`, a `.ckpt` or a mapping, without an enclosing `state_dict`.

    Files are mapped into memory, a mapping's tensors are copied. A pickle that names anything but
    tensors and a few inert stand-ins is refused, and nothing in it runs. Raises CheckpointError.
    """
    from_file = not isinstance(checkpoint, Mapping)
    content: Any = _read_file(Path(checkpoint)) if from_file else checkpoint
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{checkpoint} must hold tensors by name, not {type(content)}")
    copied = {
        k: v.clone() if isinstance(v, Tensor) and not from_file else v for k, v in content.items()
    }
    tensors = Tensors({str(name): value for name, value in copied.items()})
    tensors.source = str(checkpoint) if from_file else "checkpoint"
    return tensors


def _read_file(path: Path) -> object:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # torch's older format cannot be memory-mapped
        with torch.serialization.safe_globals([(_Inert, name) for name in TABLES["stand_ins"]]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a broken pickle raises nearly anything
        # torch's first line advises to run the pickle; the reason is in a later one.
        lines = [line for line in str(error).splitlines() if "WeightsUnpickler error: " in line]
        reason = "".join(lines[:1] or str(error).splitlines()[:1]).partition(" Please use")[0]
        raise CheckpointError(
            f"{path} is cut short, not a checkpoint, or would run code; nothing was run: {reason}"
        ) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically, as `.safetensors` or, in a `state_dict`, as a pickle."""
    own = torch.contiguous_format  # each with its own memory
    kept = {k: v.detach().cpu().clone(memory_format=own) for k, v in tensors.items()}
    with atomic_write(path) as file:
        if path.suffix == ".safetensors":
            file.write(save(kept, metadata={"format": "pt"}))
            return
        try:
            torch.save({"state_dict": kept}, file)
        except RuntimeError as error:  # torch hides that the disk is full
            raise error.__context__ or error from None


def read_mapping(config: PathLike | Mapping[str, Any]) -> Mapping[str, Any]:
    """A mapping, or the one in a YAML or JSON file. Raises CheckpointError."""
    if isinstance(config, Mapping):
        return config
    try:
        text = Path(config).read_text(encoding="utf-8")
        content = json.loads(text) if Path(config).suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{config} cannot be read: {error}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{config} must hold a mapping, got {content!r:.80}")
    return content
