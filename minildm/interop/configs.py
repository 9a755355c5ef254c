"""Configs of the other projects <-> ours, by the templates in tables.yaml, each for both ways.

A template says which key holds which field: one of our config's, or one derived here of several.
"""

from collections.abc import Mapping
from typing import Any

from minildm.compression.autoencoder import AutoencoderConfig
from minildm.conditioning import InpaintConfig
from minildm.diffusion.latent_diffusion import LatentDiffusionConfig, SamplingConfig
from minildm.diffusion.objective import ObjectiveConfig
from minildm.diffusion.schedule import ScheduleConfig
from minildm.diffusion.unet import UNetConfig
from minildm.interop.weights import TABLES
from minildm.training.configs import flat, from_dict, to_dict

Fields = dict[str, Any]
EMPTY: Fields = {"sets": {}, "fields": {}, "defaults": {}, "words": {}, "fixed": {}}
STABLE_INPAINT = InpaintConfig(stable=True)
TEMPLATES = {name: EMPTY | template for name, template in TABLES["configs"].items()}


def read_fields(name: str, given: Mapping[str, Any], *, strict: bool = True) -> Fields:
    """The fields in a foreign config, defaults included, by a template of tables.yaml.

    strict: all keys must be known. Raises ValueError naming the first key that cannot be expressed.
    """
    template, ignored = TEMPLATES[name], TABLES["ignored"]
    given = {**given, **given.get("ddconfig", {})}  # of official first stages
    known = {*template["fields"], *template["fixed"], *ignored, "ddconfig"}
    for key, value in given.items():
        if strict and key not in known and key[:1] != "_" and value not in (None, False):
            raise ValueError(f"{key}={value!r:.80} is not known")
        if key not in ignored and value != template["fixed"].get(key, value):
            only = template["fixed"][key]
            raise ValueError(f"{key}={value!r:.80} cannot be expressed, only {only!r}")
    fields: Fields = dict(template["sets"])
    for key, field in template["fields"].items():
        value = given.get(key, template["defaults"].get(key))
        if value is None or key in ignored:
            continue
        ours = {theirs: word for word, theirs in template["words"].get(key, {}).items()}
        allowed = list(ours) or [fields.get(field, value)]
        if value not in allowed:
            raise ValueError(f"{key}={value!r:.80} cannot be expressed, only {allowed}")
        fields[field] = ours[value] if ours else value
    return fields


def write_fields(name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """A foreign config of these fields. Raises ValueError naming one that cannot be expressed."""
    template = TEMPLATES[name]
    params = {key: fields[field] for key, field in template["fields"].items() if field in fields}
    for key in params.keys() & template["words"].keys():
        words = template["words"][key]
        if params[key] not in words:
            raise ValueError(f"cannot express {key}={params[key]!r}, only {list(words)}")
        params[key] = words[params[key]]
    params = {k: v for k, v in params.items() if v is not None} | template["fixed"]
    return {k: list(v) if isinstance(v, tuple) else v for k, v in params.items()}


def check_same(ours: Any, found: Any) -> None:
    """Raise ValueError naming the fields of our config that another one expresses otherwise."""
    own, others = flat(to_dict(ours)), flat(to_dict(found))
    own = {k: v for k, v in own.items() if not {*TABLES["free"]} & {*k.split(".")}}
    wrong = [f"{k}={v!r}, only {others[k]!r}" for k, v in own.items() if v != others.get(k, v)]
    if wrong:
        hint = ": train with --set model.patch=1" if "patch=" in str(wrong) else ""
        raise ValueError(f"cannot express {'; '.join(wrong)}{hint}")


def chosen(cls: type, fields: Fields) -> Any:
    """Our config of those of the fields that it has."""
    return from_dict(cls, {k: v for k, v in fields.items() if k in cls.__dataclass_fields__})


def config_of(fields: Fields) -> AutoencoderConfig | UNetConfig:
    """Our config of a first stage or a UNet in either project."""
    if "widths" in fields:  # diffusers
        widths = fields["widths"]
        fields = fields | {"channels": widths[0], "channel_mult": [c // widths[0] for c in widths]}
        attends = ["Attn" in name for name in fields["down"]]
    elif "factors" in fields:  # an official UNet
        attends = [2**i in fields["factors"] for i in range(len(fields["channel_mult"]))]
    else:  # sides of the feature maps that attend, at the training's resolution
        sides = fields["attn_sides"] if fields["mid_attn"] else []
        attends = [fields["side"] // 2**i in sides for i in range(len(fields["channel_mult"]))]
    fields = fields | {"attn_levels": [i for i, attend in enumerate(attends) if attend]}
    if "hid_z" in fields:
        z = fields.get("z_channels", fields["hid_z"])
        hid = None if fields["hid_z"] == z else fields["hid_z"]
        return chosen(AutoencoderConfig, fields | {"z_channels": z, "hid_z_channels": hid})
    heads, d_head = fields.get("heads", 1), fields.get("d_head", -1)  # -1: none
    if isinstance(heads, list):  # of diffusers, at each level
        found = {c / n for c, n in zip(fields["widths"], heads, strict=True)}
        d_head = int(found.pop()) if len(found) == 1 else -1
    heads, d_head = (heads, None) if d_head == -1 else (None, d_head)
    return chosen(UNetConfig, fields | {"heads": heads, "d_head": d_head})


def fields_of(config: AutoencoderConfig | UNetConfig, side: int = 64) -> Fields:
    """All fields of a first stage or a UNet; side: of the images, or of the latents."""
    widths = [config.channels * m for m in config.channel_mult]
    attends = [i in config.attn_levels for i in range(len(widths))]
    if isinstance(config, AutoencoderConfig):
        down = [f"{'Attn' * a}DownEncoderBlock2D" for a in attends]
        sides = [side // 2**i for i in config.attn_levels]
        more = {"hid_z": config.hid_z_channels or config.z_channels, "attn_sides": sides}
    else:
        across = config.d_cond is not None
        resnet = config.resblock_updown and not across
        plain = "ResnetDownsampleBlock2D" if resnet else "DownBlock2D"
        down = [f"{'Cross' * across}AttnDownBlock2D" if a else plain for a in attends]
        more = {
            "channels": widths[0],  # the official code has no others in its last convolution
            "channel_mult": [c // widths[0] for c in widths],
            "factors": [2**i for i in config.attn_levels],
            "across": across,
        }
    up = [name.replace("Down", "Up").replace("Encoder", "Decoder") for name in reversed(down)]
    return vars(config) | more | {"side": side, "widths": widths, "down": down, "up": up}


def whole(fields: Fields, parts: Mapping[str, Any]) -> LatentDiffusionConfig:
    """Our config of a whole model of these parts; `side`: of its latents."""
    others = {"schedule": ScheduleConfig, "objective": ObjectiveConfig, "sampling": SamplingConfig}
    others = {name: chosen(cls, fields) for name, cls in others.items()}
    size = fields["side"] * parts["autoencoder"].f
    return LatentDiffusionConfig(**parts, **others, image_size=size)
