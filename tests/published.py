"""What `tests/official` says of the published models, as configs and as tensors."""

import ast
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minildm import Autoencoder, UNet
from minildm.conditioning import Conditioner
from minildm.interop import compvis_autoencoder, compvis_conditioner, compvis_unet

OFFICIAL = Path(__file__).parent / "official"
CONFIGS = json.loads((OFFICIAL / "params.json").read_text())["configs"]
TENSORS = json.loads((OFFICIAL / "tensors.json").read_text())  # hash -> ["name (shape)", ...]
FIRST_STAGES = {c["path"]: c for c in CONFIGS if c["kind"].endswith(" first stage")}
RELEASED = {path.split("/")[2]: c for path, c in FIRST_STAGES.items() if path.startswith("models")}


def narrowed(size: int) -> int:
    """A quarter of all that is wide: the same network, small enough to run."""
    return size // 4 if size >= 64 else size


def same(size: int) -> int:
    return size


def official_config(stage: Mapping[str, Any], size: Callable[[int], int] = same) -> dict[str, Any]:
    """The parsed YAML of a first stage; `size` may change its widths."""
    shape = dict(stage["ddconfig"])
    shape |= {key: size(shape[key]) for key in ("ch", "z_channels")}
    params = {
        "monitor": "val/rec_loss",
        "embed_dim": size(stage["embed_dim"]),
        "ddconfig": shape,
        "lossconfig": stage["lossconfig"],
    }
    if stage["n_embed"] is not None:
        params["n_embed"] = size(stage["n_embed"])
    model = {
        "base_learning_rate": stage["base_learning_rate"],
        "target": stage["target"],
        "params": params,
    }
    return {"model": model}


def official_shapes(
    stage: Mapping[str, Any], size: Callable[[int], int] = same
) -> dict[str, tuple[int, ...]]:
    """The official names and shapes of a first stage's tensors."""
    listed = listed_shapes(stage["state_dict"]["keys_sha256"])
    return {name: tuple(map(size, shape)) for name, shape in listed.items()}


def listed_shapes(key: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes under a hash."""
    named = (line.split(" ", 1) for line in TENSORS[key])
    return {name: ast.literal_eval(shape) for name, shape in named}


def on_meta(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights that neither swell nor fade; the codes of a codebook lie apart."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=draw)
        if len(shape) == 1:
            tensors[name] = 0.5 + 0.3 * values
        elif "embedding" in name:
            tensors[name] = values
        else:
            tensors[name] = values / values[0].numel() ** 0.5
    return tensors


def tiny(**changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The smallest official VQ model: one level of 32 channels, no attention."""
    shape = {"double_z": False, "z_channels": 4, "resolution": 8, "in_channels": 3, "out_ch": 3}
    shape |= {"ch": 32, "ch_mult": [1], "num_res_blocks": 1, "attn_resolutions": []}
    params = {"embed_dim": 2, "n_embed": 8, "ddconfig": {**shape, "attn_type": "none"}}
    config = {"target": "ldm.models.autoencoder.VQModel", "params": params | changes}
    conv = {"conv1": (32, 32, 3, 3), "conv2": (32, 32, 3, 3), "norm1": (32,), "norm2": (32,)}
    blocks = ["encoder.down.0.block.0", "decoder.up.0.block.0", "decoder.up.0.block.1"]
    blocks += [f"{net}.mid.block_{i}" for net in ("encoder", "decoder") for i in (1, 2)]
    layers = {f"{block}.{name}": size for block in blocks for name, size in conv.items()}
    layers |= {
        "encoder.conv_in": (32, 3, 3, 3),
        "encoder.norm_out": (32,),
        "encoder.conv_out": (4, 32, 3, 3),
        "quant_conv": (2, 4, 1, 1),
        "post_quant_conv": (4, 2, 1, 1),
        "decoder.conv_in": (32, 4, 3, 3),
        "decoder.norm_out": (32,),
        "decoder.conv_out": (3, 32, 3, 3),
    }
    shapes = {f"{name}.weight": size for name, size in layers.items()}
    shapes |= {f"{name}.bias": size[:1] for name, size in layers.items()}
    return config, drawn(shapes | {"quantize.embedding.weight": (8, 2)})


def official_state(model: Autoencoder | UNet | Conditioner) -> dict[str, Tensor]:
    """A model's tensors by their official names."""
    state = model.state_dict()
    names = {Autoencoder: compvis_autoencoder, UNet: compvis_unet}
    return {
        name: part
        for place in names.get(type(model), compvis_conditioner).places(model.config)
        for name, part in zip(place.theirs, place.split(state[place.ours]), strict=True)
    }


def names_hash(tensors: Mapping[str, Tensor]) -> str:
    """The hash under which `tensors.json` lists names and shapes."""
    lines = sorted(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
