"""A part of a diffusers folder, in and out: its `config.json` and its weights."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from minildm.checkpoints import CheckpointError
from minildm.files import atomic_write, write_json
from minildm.interop.reading import Section, Tensors, read_tensors

VERSION = "0.42.1"  # of diffusers, whose names and defaults these are
WEIGHTS = "diffusion_pytorch_model"

# Attention in the folders of diffusers' first year.
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(rf"(.*attentions\.\d+)\.({'|'.join(_OLD)})\.(weight|bias)")


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; CheckpointError names one that is missing or broken."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold an object, not a {type(content).__name__}")
    return content


def read_config(path: Path) -> tuple[str, Section]:
    """The class that a config names, and its parameters without diffusers' notes (`_...`)."""
    content = read_mapping(path)
    kind = content.get("_class_name")
    if not isinstance(kind, str):
        raise CheckpointError(f"{path} names no _class_name: {', '.join(content)}")
    return kind, Section({k: v for k, v in content.items() if k[:1] != "_"}, str(path))


def read_weights(folder: Path, stem: str = WEIGHTS) -> Tensors:
    """A part's tensors, by today's names; safetensors before pickles, float16 last."""
    ends = ("safetensors", "bin", "fp16.safetensors", "fp16.bin")
    paths = [folder / f"{name}.{end}" for end in ends for name in _stems(stem, end)]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} holds no weights: {paths[0].name} is missing")
    tensors = read_tensors(found)
    return tensors._replace(named={_today(str(k)): v for k, v in tensors.named.items()})


def _stems(stem: str, end: str) -> tuple[str, ...]:
    return (stem, f"pytorch_{stem}") if stem == "model" and end.endswith("bin") else (stem,)


def _today(name: str) -> str:
    old = _OLD_NAME.fullmatch(name)
    return f"{old[1]}.{_OLD[old[2]]}.{old[3]}" if old else name


def write_part(folder: Path, kind: str, config: Mapping[str, Any], tensors: Mapping) -> None:
    """A part's folder: its config, and its tensors as a safetensors file."""
    card = {"_class_name": kind, "_diffusers_version": VERSION, **config}
    write_json(folder / "config.json", card)
    write_weights(folder / f"{WEIGHTS}.safetensors", tensors)


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Tensors as they are, on the CPU."""
    kept = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with atomic_write(path) as file:
        file.write(save(kept, metadata={"format": "pt"}))
