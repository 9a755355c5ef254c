"""Experiments by name: every first stage of the paper, and the small models of the lessons."""

from dataclasses import replace
from typing import Any, Literal

from minildm.autoencoder import AutoencoderConfig
from minildm.conditioning import ConditionerConfig
from minildm.experiments import (
    AutoencoderExperiment,
    DataConfig,
    JudgeExperiment,
    LatentDiffusionExperiment,
    TrainConfig,
)
from minildm.losses import ObjectiveConfig
from minildm.paper import FIRST_STAGES
from minildm.unet import UNetConfig

# Subgroups with a clear look of their own, from six groups: what a few minutes can learn.
CLEAR_SUBGROUPS = (
    "face-smiling",
    "face-concerned",
    "heart",
    "person",
    "person-role",
    "animal-mammal",
    "plant-flower",
    "food-fruit",
    "transport-ground",
    "place-building",
    "clothing",
    "book-paper",
)


def _small_first_stage(regularizer: Literal["kl", "vq"], f: int) -> AutoencoderExperiment:
    """A first stage that two cores train in minutes: one rung of the ladder over f.

    Latent channels as in the paper's Tab. 8 where both columns share them, 8 and 16 for the
    coarsest; a codebook that some thousand pictures can fill. Pixels enter 2x2 as channels.
    """
    vq = regularizer == "vq"
    model = AutoencoderConfig(
        regularizer=regularizer,
        codebook_size=1024 if vq else None,
        z_channels={2: 2, 4: 3, 8: 4, 16: 8, 32: 16}[f],
        width=32,
        width_mult={2: (1,), 4: (1, 2), 8: (1, 2, 4), 16: (1, 2, 4, 4), 32: (1, 2, 4, 4, 4)}[f],
        res_blocks=1,
        mid_attn=False,
        groups=8,
        patch=2,
        zero_init=True,
    )
    train = TrainConfig(steps=2500, batch_size=8, lr=3e-3, ema_decay=0.995, save_every=200)
    return AutoencoderExperiment(model=model, train=train, mse_weight=10.0, restart_dead=100 * vq)


LADDER = {
    f"emoji-{regularizer}-f{f}": _small_first_stage(regularizer, f)
    for regularizer in ("kl", "vq")
    for f in (2, 4, 8, 16, 32)
}
PIXELS = AutoencoderConfig(regularizer="identity", z_channels=3)  # f = 1: nothing to train

FACTOR_UNETS = {  # f: width, its multiples, levels with attention
    1: (32, (1, 1, 2, 2), (3,)),
    2: (32, (1, 1, 2, 2), (3,)),
    4: (24, (1, 2, 3), (1, 2)),
    8: (40, (1, 2), (1,)),
    16: (40, (1, 2), (1,)),
    32: (80, (1,), (0,)),
}


def _at_factor(f: int) -> LatentDiffusionExperiment:
    """A class-conditional model for latents of factor f: one line of the ablation over f.

    As in the paper's Tab. 13 and 14 all have nearly the same parameters, here 1.55 to 1.61 M: the
    coarser the latent, the fewer the levels and the wider. For pictures of 32 px and more. The
    learning rate stays constant, so that what is measured on the way is no unfinished decay.
    """
    c = PIXELS.z_channels if f == 1 else LADDER[f"emoji-kl-f{f}"].model.z_channels
    width, width_mult, attn_levels = FACTOR_UNETS[f]
    return LatentDiffusionExperiment(
        unet=replace(
            SMALL_UNET,
            in_channels=c,
            out_channels=c,
            width=width,
            width_mult=width_mult,
            attn_levels=attn_levels,
        ),
        conditioner=ConditionerConfig(kind="class", d_cond=128),
        data=DataConfig(size=32, subgroups=CLEAR_SUBGROUPS),
        train=TrainConfig(
            steps=2000, batch_size=16, lr=1e-3, decay="constant", ema_decay=0.995, save_every=250
        ),
        t_bias=2.0,
    )


SMALL_UNET = UNetConfig(  # of the shipped models that follow a text or a layout
    in_channels=3,
    out_channels=3,
    width=32,
    width_mult=(1, 2, 2),
    res_blocks=1,
    attn_levels=(1, 2),
    heads=4,
    d_head=None,
    d_cond=128,
    groups=8,
)

TASK_UNET = replace(SMALL_UNET, d_cond=None, attn_levels=(2,), width_mult=(1, 1, 2))


def task(concat: str, beside: int, **data: Any) -> LatentDiffusionExperiment:
    """A small model with a picture of so many channels beside z_t."""
    return LatentDiffusionExperiment(
        unet=replace(TASK_UNET, in_channels=3 + beside),
        conditioner=ConditionerConfig(concat=concat, p_uncond=0.0),
        data=DataConfig(**data),
        train=TrainConfig(steps=6000, lr=1.2e-3, ema_decay=0.999, save_every=200),
    )


PRESETS: dict[str, AutoencoderExperiment | LatentDiffusionExperiment | JudgeExperiment] = {
    **FIRST_STAGES,
    **LADDER,
    "emoji-class": LatentDiffusionExperiment(
        unet=UNetConfig(
            in_channels=3,
            out_channels=3,
            width=32,
            width_mult=(1, 2, 3),
            res_blocks=1,
            attn_levels=(2,),
            heads=4,
            d_head=None,
            d_cond=128,
            groups=8,
        ),
        conditioner=ConditionerConfig(kind="class", d_cond=128),
        data=DataConfig(subgroups=CLEAR_SUBGROUPS),
        train=TrainConfig(steps=1150, lr=1.2e-3, ema_decay=0.997, save_every=50),
        t_bias=2.0,
    ),
    **{f"emoji-class-f{f}": _at_factor(f) for f in FACTOR_UNETS},
    "emoji-uncond": LatentDiffusionExperiment(
        unet=UNetConfig(
            in_channels=3,
            out_channels=3,
            width=32,
            width_mult=(1, 2, 3),
            res_blocks=1,
            attn_levels=(2,),
            heads=4,
            d_head=None,
            groups=8,
        ),
        data=DataConfig(subgroups=CLEAR_SUBGROUPS),
        train=TrainConfig(steps=1150, lr=1.2e-3, ema_decay=0.997, save_every=50),
        t_bias=2.0,
    ),
    "emoji-text": LatentDiffusionExperiment(
        unet=SMALL_UNET,
        conditioner=ConditionerConfig(kind="text", d_cond=128, depth=2, heads=4, d_head=32),
        data=DataConfig(style_words=0.5, unpaired=8),
        train=TrainConfig(steps=12_000, lr=1.2e-3, ema_decay=0.999, save_every=200),
        t_bias=2.0,
    ),
    "scenes-layout": LatentDiffusionExperiment(
        unet=SMALL_UNET,
        conditioner=ConditionerConfig(
            kind="layout", d_cond=128, depth=2, heads=4, d_head=32, grid=16
        ),
        data=DataConfig(kind="scenes"),
        train=TrainConfig(steps=7_000, lr=1.2e-3, ema_decay=0.999, save_every=200),
        objective=ObjectiveConfig(predict="v"),
        t_bias=2.0,
        alone_steps=1500,
    ),
    "emoji-sr": task("low_res", 3),
    "emoji-inpaint": task("inpaint", 4),
    "scenes-semantic": task("semantic", 3, kind="scenes"),
    "emoji-kl-f4-gpu": AutoencoderExperiment(
        model=AutoencoderConfig(z_channels=3, width=64, width_mult=(1, 2, 4)),
        train=TrainConfig(steps=12_000, batch_size=64, lr=4e-4, ema_decay=0.999, save_every=500),
        mse_weight=10.0,
    ),
    "emoji-class-gpu": LatentDiffusionExperiment(
        unet=UNetConfig(
            in_channels=3,
            out_channels=3,
            width=128,
            width_mult=(1, 2, 3),
            attn_levels=(1, 2),
            d_cond=256,
            dropout=0.1,
        ),
        conditioner=ConditionerConfig(kind="class", d_cond=256),
        data=DataConfig(subgroups=CLEAR_SUBGROUPS),
        train=TrainConfig(steps=20_000, batch_size=256, lr=3e-4, save_every=500),
        t_bias=2.0,
    ),
    "emoji-judge": JudgeExperiment(
        train=TrainConfig(steps=2500, lr=2e-3, weight_decay=0.05, ema_decay=0.998),
    ),
    "scenes-judge": JudgeExperiment(
        train=TrainConfig(steps=4000, lr=2e-3, weight_decay=0.05, ema_decay=0.998),
        data=DataConfig(kind="scenes"),
        width=16,
        crops=True,
    ),
    "scenes-segmenter": JudgeExperiment(
        train=TrainConfig(steps=2000, batch_size=32, lr=2e-3, ema_decay=0.998),
        data=DataConfig(kind="scenes"),
        width=16,
        maps=True,
    ),
}
