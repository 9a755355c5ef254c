"""The latent diffusion models that were published with the paper, and Stable Diffusion v1.

By the names of their folders and files; sizes and schedules are those of their configurations.
Their weights are read by `interop.load_compvis`, which finds the same in the official files.
"""

from dataclasses import replace
from typing import Any

from minildm.diffusion import LatentDiffusionConfig, ScheduleConfig
from minildm.losses import ObjectiveConfig
from minildm.paper import RELEASED
from minildm.tau_theta import ConditionerConfig
from minildm.unet import UNetConfig

IMAGENET = tuple(map(str, range(1000)))  # the classes by number
L1 = ObjectiveConfig(loss="l1")
# The folder of CLIP's words, and for whom has no checkpoint, of its weights: name your own.
CLIP_FOLDER = "clip-vit-large-patch14"


def _model(
    first_stage: str,
    c: int,
    unet: dict[str, Any],
    conditioner: ConditionerConfig | None = None,
    *,
    ends: tuple[float, float] = (0.0015, 0.0195),
    side: int = 256,
    loss: ObjectiveConfig | None = None,
) -> LatentDiffusionConfig:
    """c: channels of the latent; of the UNet's, what is left is the condition's beside it."""
    conditioner = conditioner or ConditionerConfig()
    channels = {"in_channels": c + conditioner.concat_channels(c), "out_channels": c}
    d_cond = conditioner.d_cond if conditioner.kind != "none" else None
    return LatentDiffusionConfig(
        autoencoder=RELEASED[first_stage].model,
        unet=UNetConfig(**channels, d_cond=d_cond, **unet),
        conditioner=conditioner,
        schedule=ScheduleConfig(b0=ends[0], b1=ends[1]),
        objective=loss or ObjectiveConfig(),
        image_size=side,
    )


def _heads(n: int) -> dict[str, Any]:
    return {"heads": n, "d_head": None}


_FACES = {"width": 224, "width_mult": (1, 2, 3, 4), "attn_levels": (1, 2, 3)}
_CHURCHES = {"width": 192, "width_mult": (1, 2, 2, 4, 4), "attn_levels": (0, 1, 2, 3)}
_CLASSES_F8 = {"width": 256, "width_mult": (1, 2, 4), "attn_levels": (0, 1, 2)}
_WIDE = {"width": 192, "width_mult": (1, 2, 3, 5), "attn_levels": (1, 2, 3)}
_TEXT = {"width": 320, "width_mult": (1, 2, 4, 4), "attn_levels": (0, 1, 2), "checkpoint": True}
_LAYOUT = {"width": 128, "width_mult": (1, 2, 3, 4), "attn_levels": (1, 2, 3), "depth": 3}
_MAPS = {"width": 128, "width_mult": (1, 4, 8), "attn_levels": ()}
_SUPER = {"width": 160, "width_mult": (1, 2, 2, 4), "attn_levels": (3,)}
_HOLES = {"width": 256, "width_mult": (1, 2, 3, 4), "attn_levels": (1, 2, 3)}

_BERT = ConditionerConfig(kind="text", d_cond=1280, depth=32, vocab_size=30522, length=77)
_SEMANTIC = ConditionerConfig(concat="semantic", labels=tuple(map(str, range(182))), p_uncond=0.0)

_UNCONDITIONAL = _model("vq-f4", 3, _FACES)
_SYNTHESIS = _model("vq-f4", 3, _MAPS | _heads(8), _SEMANTIC, ends=(0.0015, 0.0205), loss=L1)

PUBLISHED: dict[str, LatentDiffusionConfig] = {
    "celeba256": _UNCONDITIONAL,
    "ffhq256": _UNCONDITIONAL,
    "lsun_beds256": _UNCONDITIONAL,
    "lsun_churches256": _model(
        "kl-f8",
        4,
        {**_CHURCHES, **_heads(8), "scale_shift": True, "resblock_updown": True},
        ends=(0.0015, 0.0155),
        loss=L1,
    ),
    "cin256": _model(
        "vq-f8",
        4,
        _CLASSES_F8,
        ConditionerConfig(kind="class", classes=IMAGENET, null_class=False, p_uncond=0.0),
    ),
    "cin256-v2": _model(
        "vq-f4", 3, _WIDE | _heads(1), ConditionerConfig(kind="class", classes=IMAGENET)
    ),
    "text2img256": _model("vq-f4", 3, _WIDE, replace(_BERT, d_cond=640)),
    "txt2img-1p4B": _model("kl-f8", 4, _TEXT | _heads(8), _BERT, ends=(0.00085, 0.012)),
    "layout2img-openimages256": _model(
        "vq-f4",
        3,
        _LAYOUT,
        ConditionerConfig(kind="ids", depth=16, vocab_size=8192, length=92, p_uncond=0.0),
        ends=(0.0015, 0.0205),
        loss=L1,
    ),
    "semantic_synthesis256": _SYNTHESIS,
    "semantic_synthesis512": replace(_SYNTHESIS, image_size=512),
    "bsr_sr": _model(
        "vq-f4",
        3,
        _SUPER,
        ConditionerConfig(concat="low_res", p_uncond=0.0),
        ends=(0.0015, 0.0155),
    ),
    "inpainting_big": _model(
        "vq-f4-noattn",
        3,
        {**_HOLES, **_heads(8), "resblock_updown": True},
        ConditionerConfig(concat="inpaint", p_uncond=0.0),
        ends=(0.0015, 0.0205),
        loss=L1,
    ),
    "stable-diffusion-v1": _model(
        "kl-f8",
        4,
        _TEXT | _heads(8),
        ConditionerConfig(
            kind="text", encoder="clip", encoder_path=CLIP_FOLDER, d_cond=768, length=77
        ),
        ends=(0.00085, 0.012),
        side=512,
    ),
}
