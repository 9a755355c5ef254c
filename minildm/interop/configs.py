"""Configs of the other projects <-> ours, by the templates in tables.yaml, each for both ways.

A template reads and writes named fields. Most are our config's own; the functions below derive the
others, such as lists of block types.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from typing import Any

import yaml

from minildm.compression.autoencoder import AutoencoderConfig
from minildm.diffusion.latent_diffusion import LatentDiffusionConfig
from minildm.diffusion.objective import ObjectiveConfig
from minildm.diffusion.schedule import ScheduleConfig
from minildm.diffusion.unet import UNetConfig
from minildm.interop.engine import TABLES
from minildm.training.checkpoint import CheckpointError
from minildm.training.configs import from_dict

Fields = dict[str, Any]
TEMPLATES = TABLES["configs"]
_MISSING = object()


def read_fields(
    template: Any, given: Any, *, strict: bool = True, fields: Fields | None = None
) -> Fields:
    """The fields in a foreign config, defaults included, added to `fields`.

    template: a name in tables.yaml, or one itself. strict: all keys must be known. Raises
    ValueError naming the first key that cannot be expressed.
    """
    template = TEMPLATES[template] if isinstance(template, str) else template
    fields = {} if fields is None else fields
    for key, value in given.items():
        known = key in template or key in TABLES["ignored"] or key[:1] == "_"
        if strict and not known and value not in (None, False):
            raise ValueError(f"{key}={value!r:.80} is not known")
    for key, entry in template.items():
        name, default, words = _entry(entry)
        value = given.get(key, default)
        if value is _MISSING or (name and value is None) or key in TABLES["ignored"]:
            continue
        if name is None and isinstance(entry, Mapping):
            read_fields(entry, value, strict=strict, fields=fields)
            continue
        value = list(value) if isinstance(value, tuple) else value
        ours = {theirs: mine for mine, theirs in words.items()}
        allowed = list(ours) if words else [value]
        if value in allowed:
            value = ours[value] if words else value
            allowed = [entry if name is None else fields.setdefault(name, value)]
        if value not in allowed:
            raise ValueError(f"{key}={value!r:.80} cannot be expressed, only {allowed}")
    return fields


def write_fields(template: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A foreign config of these fields. Raises ValueError naming one that cannot be expressed."""
    params = {}
    for key, entry in (TEMPLATES[template] if isinstance(template, str) else template).items():
        name, _, words = _entry(entry)
        value = fields.get(name, _MISSING) if name else entry
        if words and value not in words:
            raise ValueError(f"cannot express {name}={value!r}, only {list(words)}")
        value = words[value] if words else value
        if name is None and isinstance(entry, Mapping):
            value = write_fields(entry, fields)
        if value is not _MISSING:
            params[key] = list(value) if isinstance(value, tuple) else value
    return params


def _entry(entry: Any) -> tuple[str | None, Any, Mapping[Any, Any]]:
    """Of a template's entry: the field, None for a constant; their default; other words for it."""
    words: Mapping[Any, Any] = {}
    if isinstance(entry, Mapping) and str(next(iter(entry), ""))[:1] == "$":
        ((entry, words),) = entry.items()
    if not isinstance(entry, str) or entry[:1] != "$":
        return None, _MISSING, words
    name, has_default, default = entry[1:].partition(" = ")
    return name, yaml.safe_load(default) if has_default else _MISSING, words


def check_back(ours: Any, read: Any) -> None:
    """Raise ValueError naming a field of our config that comes back otherwise."""
    for name, value in vars(ours).items():
        found = getattr(read, name, None)
        if name in TABLES["free"] or value == found:
            continue
        if is_dataclass(value):
            check_back(value, found)
        else:
            raise ValueError(f"cannot express {name}={value!r}, only {found!r}")


@contextmanager
def reading(where: object) -> Iterator[None]:
    """Errors of a wrong config become a ValueError that begins with `where`."""
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:
        raise ValueError(f"{where} lacks {error}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise ValueError(f"{where}: {error}") from error


# --- first stages and UNets ---


def autoencoder_of(fields: Fields) -> AutoencoderConfig:
    """Our config of a first stage in either project."""
    vq, hid = "codebook_size" in fields, fields.get("hid_z")
    z = fields.get("z_channels", fields.get("vq_embed_dim", hid))
    fields = fields | {"regularizer": "vq" if vq else "kl", "vq_legacy": vq, "z_channels": z}
    fields["hid_z_channels"] = None if hid == z else hid
    if "side" in fields:  # sides of the feature maps that attend, at the training's resolution
        side, n = fields["side"], len(fields["channel_mult"])
        levels = [i for i in range(n) if side // 2**i in fields["attn_sides"]]
        fields["attn_levels"] = levels if fields["mid_attn"] else []
    return _built(AutoencoderConfig, fields)


def unet_of(fields: Fields) -> UNetConfig:
    """Our config of a UNet in either project."""
    across, number, width = "d_cond" in fields, None, fields.get("width", fields.get("head_dim"))
    if "factors" in fields:  # the official code
        mult, number = fields["channel_mult"], fields["number"]
        if mult[0] != 1 or across != fields["across"]:  # its last convolution has model_channels
            raise ValueError(
                f"channel_mult={mult} must begin with 1, and context_dim be given if and only if "
                f"use_spatial_transformer={fields['across']}"
            )
        levels = [i for i in range(len(mult)) if 2**i in fields["factors"]]
        fields = fields | {"attn_levels": levels}
        number, width = (number, None) if width == -1 else (None, width)
    elif across:  # "attention_head_dim" is the number of heads
        number, widths = _single(width), fields["widths"]
        width = widths[-1] // number[-1] if isinstance(number, list) else None
        if width and [c // width for c in widths] != number:
            raise ValueError(f"attention_head_dim={number} cannot be expressed for {widths}")
        number = None if width else number
        fields = fields | {"depth": _single(fields["depth"])}
    elif not width:
        number = 1
    return _built(UNetConfig, fields | {"heads": number, "d_head": width})


def _single(value: Any) -> Any:
    """The value that a list has at every level, or the list."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def _built(cls: type, fields: Fields) -> Any:
    down, up, widths = (fields.get(name) for name in ("down", "up", "widths"))
    if widths:
        fields |= {"channels": widths[0], "channel_mult": [c // widths[0] for c in widths]}
        fields["attn_levels"] = [i for i, name in enumerate(down) if "Attn" in name]
    own = {name: value for name, value in fields.items() if name in cls.__dataclass_fields__}
    config = from_dict(cls, own)
    if widths and (down, up, widths) != (*(written := _blocks(config)).values(),):
        found = f"block_out_channels={widths}, down_block_types={down}, up_block_types={up}"
        raise ValueError(f"{found} cannot be expressed, only {[*written.values()]}")
    return config


def _blocks(config: AutoencoderConfig | UNetConfig) -> Fields:
    attends = [i in config.attn_levels for i in range(len(config.channel_mult))]
    if isinstance(config, AutoencoderConfig):
        down = [f"{'Attn' * a}DownEncoderBlock2D" for a in attends]
    else:
        across = config.d_cond is not None
        resnet = config.resblock_updown and not across
        plain = "ResnetDownsampleBlock2D" if resnet else "DownBlock2D"
        attending = "CrossAttnDownBlock2D" if across else "AttnDownBlock2D"
        down = [attending if a else plain for a in attends]
    up = [name.replace("Down", "Up").replace("Encoder", "Decoder") for name in reversed(down)]
    return {"down": down, "up": up, "widths": [config.channels * m for m in config.channel_mult]}


def fields_of(config: AutoencoderConfig | UNetConfig, side: int) -> Fields:
    """All fields of a first stage or a UNet; side: of the images, or of the latents."""
    fields = vars(config) | _blocks(config) | {"side": side}
    if isinstance(config, AutoencoderConfig):
        fields |= {"hid_z": config.hid_z_channels or config.z_channels}
        fields |= {"vq_embed_dim": config.z_channels}
        return fields | {"attn_sides": [side // 2**i for i in config.attn_levels]}
    widths, across = fields["widths"], config.d_cond is not None
    numbers = config.heads or [max(1, c // config.d_head) for c in widths]
    return fields | {
        "factors": [2**i for i in config.attn_levels],
        "across": across,
        "number": config.heads or -1,
        "width": config.d_head or -1,
        "head_dim": numbers if across else widths[-1] // config.heads_of(widths[-1]),
    }


def write_part(name: str, config: AutoencoderConfig | UNetConfig, side: int) -> dict[str, Any]:
    """The foreign config. Raises ValueError naming a field that would come back otherwise."""
    params = write_fields(name, fields_of(config, side))
    fields = read_fields(name, params)
    if isinstance(config, AutoencoderConfig):
        check_back(config, autoencoder_of(fields))
        return params
    read = unet_of(fields)
    channels = [config.channels * config.channel_mult[i] for i in (*config.attn_levels, -1)]
    if all(read.heads_of(c) == config.heads_of(c) for c in channels):  # said otherwise
        read = replace(read, heads=config.heads, d_head=config.d_head)
    check_back(config, read)
    return params


# --- schedules ---


def timing_of(fields: Fields) -> tuple[ScheduleConfig, ObjectiveConfig]:
    """The noise schedule, and what the UNet predicts."""
    ends = () if fields["schedule"] == "cosine" else ("beta_start", "beta_end")
    found = {k: fields[k] for k in ("T", "zero_terminal_snr", *ends) if k in fields}
    schedule = from_dict(ScheduleConfig, found | {"kind": fields["schedule"]})
    objective = {name: fields[name] for name in ("predict", "loss") if name in fields}
    return schedule, from_dict(ObjectiveConfig, objective)


def timing_fields(config: LatentDiffusionConfig) -> Fields:
    """The inverse of `timing_of`."""
    return vars(config.schedule) | vars(config.objective) | {"schedule": config.schedule.kind}
