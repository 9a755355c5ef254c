"""The paper's models as experiments: the nine released first stages, and the rest of Tab. 8.

Sizes, losses and the learning rate for each picture of a batch are the published
configurations'. Batch and steps are ours (there, batches differ and steps are not said), and so
are the data, which the repository has; the paper's are OpenImages: name a folder of your own.
"""

from minildm.autoencoder import AutoencoderConfig
from minildm.discriminator import DiscriminatorConfig
from minildm.experiments import AutoencoderExperiment, DataConfig, TrainConfig
from minildm.losses import AdversarialConfig

SIDE, BATCH = 256, 12
TRAIN = TrainConfig(
    steps=250_000,
    batch_size=BATCH,
    lr=4.5e-6 * BATCH,
    warmup_steps=0,
    decay="constant",
    betas=(0.5, 0.9),
    grad_clip=1e9,  # none
    ema_decay=0.0,  # the first stages keep no average
    save_every=1000,
    workers=2,
)
WIDTH_MULT = {2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 4, 4), 16: (1, 1, 2, 2, 4), 32: (1, 1, 2, 2, 4, 4)}


def _first_stage(
    model: AutoencoderConfig, *, weight: float, start: int, layers: int = 3
) -> AutoencoderExperiment:
    sums = model.regularizer == "kl"  # beside which the adaptive weight is cut: losses.py
    adversarial = AdversarialConfig(
        weight=weight,
        start=start,
        limit=1e4 / (3 * SIDE**2) if sums else 1e4,
        discriminator=DiscriminatorConfig(layers=layers),
    )
    return AutoencoderExperiment(
        model=model,
        train=TRAIN,
        data=DataConfig(kind="photos", size=SIDE),
        perceptual_weight=1.0,
        adversarial=adversarial,
    )


def _kl(f: int, c: int, attn_levels: tuple[int, ...] = ()) -> AutoencoderExperiment:
    model = AutoencoderConfig(z_channels=c, width_mult=WIDTH_MULT[f], attn_levels=attn_levels)
    return _first_stage(model, weight=0.5, start=50_001)


def _vq(
    f: int,
    c: int,
    codes: int,
    *,
    attn_levels: tuple[int, ...] = (),
    mid_attn: bool = True,
    weight: float = 0.75,
    start: int = 250_001,
    layers: int = 3,
) -> AutoencoderExperiment:
    model = AutoencoderConfig(
        regularizer="vq",
        codebook_size=codes,
        vq_legacy=True,
        z_channels=c,
        width_mult=(1, 2, 2, 4) if f == 8 else WIDTH_MULT[f],
        attn_levels=attn_levels,
        mid_attn=mid_attn,
    )
    return _first_stage(model, weight=weight, start=start, layers=layers)


RELEASED: dict[str, AutoencoderExperiment] = {
    "kl-f4": _kl(4, 3),
    "kl-f8": _kl(8, 4),
    "kl-f16": _kl(16, 16, (4,)),
    "kl-f32": _kl(32, 64, (4, 5)),
    "vq-f4": _vq(4, 3, 8192, start=0),
    "vq-f4-noattn": _vq(4, 3, 8192, mid_attn=False, start=11),
    "vq-f8": _vq(8, 4, 16384, attn_levels=(3,), weight=0.6, start=1, layers=2),
    "vq-f8-n256": _vq(8, 4, 256, attn_levels=(3,)),
    "vq-f16": _vq(16, 8, 16384, attn_levels=(4,), layers=2),
}

# Tab. 8 gives f, c and the codebook of these; the rest is that of their released neighbours.
UNRELEASED: dict[str, AutoencoderExperiment] = {
    "kl-f2": _kl(2, 2),
    "kl-f16-c8": _kl(16, 8, (4,)),
    "kl-f32-c16": _kl(32, 16, (4, 5)),
    "vq-f2": _vq(2, 2, 2048),
    "vq-f4-n256": _vq(4, 3, 256),
    "vq-f32": _vq(32, 16, 16384, attn_levels=(4, 5), layers=2),
}

FIRST_STAGES = RELEASED | UNRELEASED
