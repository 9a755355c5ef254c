"""What all formats share: names of tensors, filling a model with them, files that run no code."""

import json
import math
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from minildm.files import atomic_write
from minildm.layers import Downsample, ResBlock, SelfAttention2d, SpatialTransformer, Upsample
from minildm.training.checkpoint import CheckpointError, reading

TABLES = yaml.safe_load(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8"))
NAMES = TABLES["names"]
KINDS = {ResBlock: "resnets", SelfAttention2d: "attentions", SpatialTransformer: "transformers"}
KINDS |= {Downsample: "samplers", Upsample: "samplers"}


def views(model: nn.Module, names: Mapping[str, str], flat: int = 0) -> dict[str, Tensor]:
    """A model's tensors by their names, as views of ours: (heads, rows of a head, ...).

    names: pattern -> replacement, applied to our name one after the other as `re.sub` does;
    "a.{q,k,v}.weight" is three tensors, whose rows ours interleaves by heads. flat: how many
    trailing axes of size 1 theirs lack in self-attention, whose linear layers are 1x1
    convolutions here.
    """
    found = {}
    for ours, tensor in model.named_parameters():
        theirs, heads = [renamed(ours, names)], 1
        if several := re.fullmatch(r"(.*)\{(.*)\}(.*)", theirs[0]):
            theirs = [several[1] + part + several[3] for part in several[2].split(",")]
            heads = model.get_submodule(ours.rsplit(".", 2)[0]).heads
        if tensor.ndim == 4 and re.search(r"\.to_(qkv|out)\.weight$", ours):
            tensor = tensor[(..., *(0,) * flat)]
        parts = tensor.unflatten(0, (heads, len(theirs), -1)).unbind(1)
        found |= dict(zip(theirs, parts, strict=True))
    return found


def exported(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `views` in their shapes."""
    return {name: view.flatten(0, 1) for name, view in found.items()}


def numbered(model: nn.Module, reverse: str = "") -> dict[str, str]:
    """Names of blocks as other projects count them, by level and by type: "up.3.1." (stage 3 of
    all, block 1) -> "up.1.attentions.0.", for `views`; reverse: a list that they count backwards.
    """
    names, levels, blocks = {}, Counter(), Counter()
    for name, block in model.named_modules():
        if type(block) not in KINDS:
            continue
        resizes = isinstance(getattr(block, "resize", None), nn.AvgPool2d | nn.Upsample)
        kind = "samplers" if resizes else KINDS[type(block)]
        stages = re.sub(r"[.\d]+$", "", name)
        level = levels[stages]
        at = len(model.get_submodule(stages)) - 1 - level if stages == reverse else level
        names[rf"^{re.escape(name)}\."] = f"{stages}.{at}.{kind}.{blocks[stages, level, kind]}."
        blocks[stages, level, kind] += 1
        levels[stages] += kind == "samplers"  # each level ends with one
    return names


def renamed(name: str, names: Mapping[str, str]) -> str:
    """A name after all replacements."""
    for pattern, replacement in names.items():
        name = re.sub(pattern, replacement, name)
    return name


@torch.no_grad()
def fill(
    model: nn.Module,
    views_of: Callable[[Any], Mapping[str, Tensor]],
    tensors: Mapping[str, Any],
    factor: float = 1.0,
    shift: float = 0.0,
) -> None:
    """Give a model on the meta device its tensors, as float32 and in memory of their own.

    views_of: gives the model's `views`. factor, shift: of an autoencoder, whose latents are
    (z - shift) * factor. Trailing axes of size 1 may be missing. Of tensors on the meta device
    only names and shapes are checked. Raises ValueError for a factor that is not positive, and
    with the first ten tensors that are missing, unknown, of another shape, or not finite.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"the factor of the latents must be positive, got {factor}")
    wanted = {name: _shape(tensor) for name, tensor in exported(views_of(model)).items()}
    used = {k: v for k, v in tensors.items() if not re.fullmatch(TABLES["unused"], k)}
    given = {name: _shape(tensor) for name, tensor in used.items()}
    wrong = [
        f"{name}: file {given.get(name, 'nothing')}, model {wanted.get(name, 'nothing')}"
        for name in wanted | given
        if given.get(name) != wanted.get(name)
    ]
    if wrong:
        listed = "\n  ".join(wrong[:10])
        raise ValueError(f"{len(wrong)} tensors do not fit:\n  {listed}")
    on_meta = any(tensor.is_meta for tensor in used.values())
    model.to_empty(device="meta" if on_meta else "cpu")
    for name, view in views_of(model).items():
        view.copy_(used[name].reshape(view.shape))
    values = {"scale": 1 / factor, "shift": shift}
    for name, buffer in model.named_buffers():  # counters begin at 0
        buffer.fill_(values.get(name.rpartition(".")[2], 0))


def _shape(value: Any) -> Any:
    """The shape of a tensor of finite floats, short of axes of size 1 at its end; else a reason."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return f"{getattr(value, 'dtype', type(value).__name__)}, not floats"
    if not value.is_meta and not all(b.isfinite() for b in value.detach().float().aminmax()):
        return "values that are not finite"
    shape = tuple(value.shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def read_mapping(config: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """A mapping, or the one in a YAML or JSON file. Raises CheckpointError."""
    if isinstance(config, Mapping):
        return config
    with reading(config):
        text = Path(config).read_text(encoding="utf-8")
        content = json.loads(text) if Path(config).suffix == ".json" else yaml.safe_load(text)
        if not isinstance(content, Mapping):
            raise ValueError(f"a mapping is required, got {content!r:.80}")
    return content


class _Inert:
    """Takes the place of a class that a pickle names: accepts anything, does nothing."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class _InertDict:
    """The same of a dict: torch puts items only into a few types, of which this gives one."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


def _stand_ins(checkpoint: str | Path) -> list[tuple[type, str]]:
    """Inert classes for all that a pickle names, but for what only code needs."""
    names = TABLES["stand_ins"]  # torch cannot search its older format
    if zipfile.is_zipfile(checkpoint):
        names = {*get_unsafe_globals_in_checkpoint(checkpoint)} - {*TABLES["code"]}
    return [(_InertDict if n.lower().endswith("dict") else _Inert, n) for n in names]


def read_tensors(checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a `.safetensors`, a `.ckpt` or a mapping, by their names in the model.

    An enclosing `state_dict` or `model`, the prefixes of DataParallel and torch.compile, and what
    is no tensor are left out. Nothing in a pickle runs: other objects than tensors are inert.
    Raises CheckpointError, too for a pickle that names what only code needs.
    """
    if not isinstance(checkpoint, Mapping) and not Path(checkpoint).is_file():
        raise CheckpointError(f"{checkpoint} is missing")
    try:
        if isinstance(checkpoint, Mapping):
            content = checkpoint
        elif Path(checkpoint).suffix == ".safetensors":
            content = load_file(checkpoint)
        else:
            mapped = zipfile.is_zipfile(checkpoint)  # torch's older format cannot be memory-mapped
            with safe_globals(_stand_ins(checkpoint)):
                content = torch.load(checkpoint, "cpu", weights_only=True, mmap=mapped)
        for key in ("state_dict", "model", "state_dict"):
            content = content[key] if isinstance(content.get(key), Mapping) else content
        named = {re.sub(TABLES["wrappers"], "", str(name)): v for name, v in content.items()}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}
    except Exception as error:  # a broken pickle raises nearly anything
        # torch advises to run the pickle, before and after the reason
        reason = re.sub(TABLES["advice"], "", str(error))
        what = "is cut short, not a checkpoint, or would run code; nothing was run"
        raise CheckpointError(f"{checkpoint!s:.200} {what}: {reason}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically, as `.safetensors` or, in a `state_dict`, as a pickle."""
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_write(path) as file:
        if path.suffix == ".safetensors":
            file.write(save(kept, metadata={"format": "pt"}))
        else:
            torch.save({"state_dict": kept}, file)
