"""The trainings: stage 1, stage 2, and the judge. Each is a generator of Records.

for record in train_ldm(experiment, data, first_stage="runs/ae", run_dir="runs/ldm"):
    print(record.step, record.terms["loss"])
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from tqdm.auto import tqdm

from minildm import draws, processes
from minildm.autoencoder import Autoencoder, check_pictures
from minildm.checkpoints import (
    fingerprint,
    load_model,
    read_card,
    reader_of,
    save_model,
    to_dict,
)
from minildm.data.alone import ObjectsAlone
from minildm.data.latents import LatentDataset, cached_moments
from minildm.data.variants import corrupted, mirrored, with_styles
from minildm.diffusion import LatentDiffusion
from minildm.discriminator import PatchDiscriminator
from minildm.ema import EMA
from minildm.experiments import (
    AutoencoderExperiment,
    JudgeExperiment,
    LatentDiffusionExperiment,
    TrainConfig,
)
from minildm.features import MIN_SIDE, perceptual_distance
from minildm.fidelity import evaluating
from minildm.files import path_between
from minildm.judge import Judge, JudgeConfig
from minildm.loop import LossFn, optimise, own_batch_size, pick_device, pick_precision
from minildm.losses import Perceptual, autoencoder_loss
from minildm.regularizers import DiagonalGaussian, VectorQuantizer
from minildm.runs import RunFolder
from minildm.segmenter import Segmenter, SegmenterConfig
from minildm.tasks import PAINTED, conditioned_on
from minildm.types import Batch, Record


def open_run(
    run_dir: str | Path, experiment: object, device: str | None, data: Dataset, **folders: Any
) -> tuple[RunFolder, torch.device, str]:
    """The run's folder, device and precision; a resumed run keeps the precision it began with.

    Other data, or another first stage or init than it began with, is another run: ValueError.
    So is a batch that the processes cannot share equally.
    """
    chosen = pick_device(device)
    processes.join(chosen)
    own_batch_size(experiment.train.batch_size)
    inputs = {"data": data.fingerprint[:16]}
    for name, folder in folders.items():
        inputs[name] = fingerprint(load_model(folder))[:16] if folder is not None else None
    kind = type(experiment).__name__
    run = RunFolder(run_dir, {kind: to_dict(experiment), "inputs": inputs})
    wanted = experiment.train.precision
    precision = run.fixed("precision", lambda: pick_precision(wanted, chosen))
    return run, chosen, precision


def random_flips(x: Tensor) -> Tensor:
    """Mirror each picture with probability one half: (B, 3, H, W) -> the same shape."""
    flip = draws.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    return torch.where(flip, x.flip(-1), x)


def new_model(
    build: type, config: object, seed: int, init: str | Path | None = None
) -> torch.nn.Module:
    """A model with initial weights that depend on the seed alone, or those of the folder `init`.

    Raises ValueError where the model in `init` is of another config.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = build(config)
    if init is not None:
        _take_weights(model, load_model(init), str(init))
        for module in model.modules():
            if isinstance(module, VectorQuantizer):
                module.forget()
    return model


def _take_weights(model: torch.nn.Module, trained: torch.nn.Module, init: str) -> None:
    """All weights of a model of the same config; for another task, all but tau_theta's.

    As the paper does for some of its tasks: the UNet knows the pictures already, tau_theta is new.
    """
    if trained.config == model.config:
        model.load_state_dict(trained.state_dict())
        return
    for part in ("unet", "autoencoder"):
        ours, theirs = (getattr(m.config, part, None) for m in (model, trained))
        if ours is None or ours != theirs:
            raise ValueError(f"init={init!r} holds a model of another kind or config")
    model.unet.load_state_dict(trained.unet.state_dict())
    model.autoencoder.load_state_dict(trained.autoencoder.state_dict())


def train_autoencoder(
    experiment: AutoencoderExperiment,
    data: Dataset | None = None,
    *,
    run_dir: str | Path,
    device: str | None = None,
    init: str | Path | None = None,
) -> Iterator[Record]:
    """Stage 1 on `data` (default: the experiment's); leaves a model's folder in run_dir.

    init: a model's folder to start from, to train it further.

    After the last step the standard deviation of KL latents over the training set is measured
    and saved as the autoencoder's `scale`. Raises ValueError for "identity": nothing to train.
    """
    if experiment.model.regularizer == "identity":
        raise ValueError("'identity' has nothing to train: save_model(Autoencoder(config), folder)")
    data = experiment.data.dataset("train") if data is None else data
    check_first_stage_data(experiment, data)
    model = new_model(Autoencoder, experiment.model, experiment.train.seed, init)
    run, place, precision = open_run(run_dir, experiment, device, data, init=init)
    info = _info(experiment.train, data)
    adversary, critic = experiment.adversarial, None
    if adversary is not None:
        critic = new_model(PatchDiscriminator, adversary.discriminator, experiment.train.seed)
    perceptual = None
    if experiment.perceptual_weight:
        # What "auto" finds may change between start and resume; the loss must not.
        kind = run.fixed("perceptual", lambda: perceptual_distance(experiment.perceptual).kind)
        perceptual = perceptual_distance(kind).to(place)
        info["perceptual"] = perceptual.name
    if model.decoder.quantizer is not None:
        pixels = data[0]["image"][0].numel()
        model.decoder.quantizer.epoch_latents = len(data) * pixels // model.f**2
        model.decoder.quantizer.restart_after = experiment.restart_dead or None
        if init is None:
            model.decoder.quantizer.restart_all()

    def save(ema: EMA) -> None:
        unfinished = {"unfinished": "its scale is not measured yet"}
        save_model(model, run_dir, ema=ema.shadow, info={**info, **unfinished})

    yield from optimise(
        model,
        first_stage_loss(experiment, model, perceptual, critic),
        data,
        experiment.train,
        run,
        device=place,
        precision=precision,
        save=save,
        adversary=critic,
        adversary_lr=adversary.lr_factor if adversary else 1.0,
    )
    model.scale.fill_(run.fixed("scale", lambda: measure_scale(model, data, precision)))
    processes.from_main(lambda: save_model(model, run_dir, info=info))  # with the EMA's weights


def check_first_stage_data(experiment: AutoencoderExperiment, data: Dataset) -> None:
    """ValueError where the pictures do not suit the model or a loss, before anything is done."""
    if len(data) == 0:
        raise ValueError("data holds no picture")
    x = data[0]["image"]
    check_pictures(x, "image")
    least = {"f": experiment.model.f}
    if experiment.perceptual_weight:
        least["the perceptual distance"] = MIN_SIDE
    if experiment.adversarial is not None:
        least["the discriminator"] = experiment.adversarial.discriminator.least_side
    short = {name: side for name, side in least.items() if min(x.shape[-2:]) < side}
    if short or x.shape[-2] % experiment.model.f or x.shape[-1] % experiment.model.f:
        raise ValueError(
            f"pictures of {x.shape[-2]} x {x.shape[-1]} do not suit: sides must be multiples of "
            f"f={experiment.model.f}" + "".join(f", at least {s} for {n}" for n, s in short.items())
        )


def first_stage_loss(
    experiment: AutoencoderExperiment,
    model: Autoencoder,
    perceptual: Perceptual | None,
    discriminator: PatchDiscriminator | None,
) -> LossFn:
    """`autoencoder_loss` with an experiment's weights, as the loop calls it."""

    def loss(batch: Batch, step: int) -> dict[str, Tensor]:
        x = random_flips(batch["image"]) if experiment.train.flip else batch["image"]
        return autoencoder_loss(
            model,
            x,
            kl_weight=experiment.kl_weight,
            mse_weight=experiment.mse_weight,
            codebook_weight=experiment.codebook_weight,
            perceptual=perceptual,
            perceptual_weight=experiment.perceptual_weight,
            discriminator=discriminator,
            adversarial=experiment.adversarial,
            step=step,
        )

    return loss


def train_ldm(
    experiment: LatentDiffusionExperiment,
    data: Dataset | None = None,
    *,
    first_stage: str | Path,
    run_dir: str | Path,
    device: str | None = None,
    init: str | Path | None = None,
    save_at: Collection[int] = (),
) -> Iterator[Record]:
    """Stage 2 on the latents of `data`, encoded once by the autoencoder in `first_stage`.

    The latent cache holds the posterior's moments; each step draws from them. Leaves a model's
    folder in run_dir with the EMA weights beside the model's own. Where the experiment says
    `alone_steps` and there is no `init`, the run in run_dir/alone, whose records come first, is
    what it starts from. save_at: steps after which the folder is saved, besides save_every.
    """
    data = experiment.data.dataset("train") if data is None else data
    if experiment.alone_steps and init is None:
        before, init = experiment.on_objects_alone(), Path(run_dir) / "alone"
        where = {"first_stage": first_stage, "run_dir": init, "device": device}
        yield from train_ldm(before, ObjectsAlone(data), **where)
    autoencoder = finished_first_stage(first_stage)
    side = data[0]["image"].shape[-1] if len(data) else experiment.data.size
    if side != experiment.data.size:
        raise ValueError(
            f"data has pictures of {side} px, the experiment data.size={experiment.data.size}"
        )
    config, tokenizer = conditioned_on(experiment, autoencoder.config, data)
    model = new_model(LatentDiffusion, config, experiment.train.seed, init)
    if tokenizer is not None:
        reader_of(model).set_tokenizer(tokenizer)
    if init is not None and fingerprint(model.autoencoder) != fingerprint(autoencoder):
        raise ValueError(f"init={str(init)!r} was trained on another first stage")
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    run, place, precision = open_run(
        run_dir, experiment, device, data, first_stage=first_stage, init=init
    )
    moments = processes.main_first(lambda: encode_dataset(autoencoder.to(place), data, precision))
    concat, given = experiment.conditioner.concat, experiment.data
    latents = LatentDataset(data, moments, PAINTED[concat])

    def loss(batch: Batch, _step: int) -> dict[str, Tensor]:
        moments = batch["moments"]  # (B, 2, c', h, w): as drawn, and mirrored
        side = draws.randint(2, len(moments), device=moments.device) * experiment.train.flip
        chosen = moments[torch.arange(len(moments)), side]
        batch = mirrored(batch, side == 1)
        batch = with_styles(batch, data.styles, given.style_words)
        batch = corrupted(batch, concat, autoencoder.f, given.degradation, given.masks)
        z = model.autoencoder.latent(chosen, noise=draws.randn_like)
        return model.loss({**batch, "z": z})

    reference = path_between(run_dir, first_stage)

    def save(ema: EMA) -> None:
        info = _info(experiment.train, data)
        save_model(model, run_dir, ema=ema.shadow, first_stage=reference, info=info)

    where = {"device": place, "precision": precision, "save": save, "save_at": save_at}
    yield from optimise(model, loss, latents, experiment.train, run, **where)


def finished_first_stage(folder: str | Path) -> Autoencoder:
    """The autoencoder in a folder; ValueError where its training has not come to its end."""
    autoencoder = load_model(folder, kind="autoencoder")
    if "unfinished" in read_card(folder)["info"]:
        raise ValueError(
            f"first_stage={str(folder)!r} is still in training, its scale not measured; the "
            "command that began it goes on with it"
        )
    return autoencoder


def train_judge(
    experiment: JudgeExperiment,
    data: Dataset | None = None,
    *,
    run_dir: str | Path,
    device: str | None = None,
    init: str | Path | None = None,
) -> Iterator[Record]:
    """A classifier of label, group and style on pictures of the training split, or on crops.

    Or a segmenter, where the experiment says `maps`.
    """
    data = experiment.dataset("train") if data is None else data
    build, config = judge_of(experiment, data)
    model = new_model(build, config, experiment.train.seed, init)
    run, place, precision = open_run(run_dir, experiment, device, data, init=init)

    def loss(batch: Batch, _step: int) -> dict[str, Tensor]:
        side = draws.rand(len(batch["image"]), device=batch["image"].device) < 0.5
        return model.loss(mirrored(batch, side & experiment.train.flip))

    def save(ema: EMA) -> None:
        save_model(model, run_dir, ema=ema.shadow, info=_info(experiment.train, data))

    yield from optimise(
        model, loss, data, experiment.train, run, device=place, precision=precision, save=save
    )


def judge_of(
    experiment: JudgeExperiment, data: Dataset
) -> tuple[type, JudgeConfig | SegmenterConfig]:
    """The class of a judge and its config, with what the data know of classes."""
    if experiment.maps:
        config = SegmenterConfig(labels=tuple(data.semantic_classes), width=experiment.width)
        return Segmenter, config
    return Judge, JudgeConfig(
        labels=tuple(data.classes),
        groups=tuple(data.groups),
        styles=tuple(data.styles),
        width=experiment.width,
    )


def _info(train: TrainConfig, data: Dataset) -> dict[str, object]:
    return {"data": data.name, "pictures": len(data), "train": to_dict(train)}


@torch.no_grad()
def encode_dataset(autoencoder: Autoencoder, data: Dataset, precision: str) -> Tensor:
    """Moments of every picture and of its mirror image: (N, 2, c', h, w) float32 on the CPU.

    Kept on disk under the data's fingerprint, the encoder's hash and the precision. Raises
    ValueError for pictures that are not finite, leave [-1, 1], or have sides f does not divide.
    """

    def compute() -> Tensor:
        place = autoencoder.scale.device
        mixed = torch.autocast(
            place.type,
            torch.float16 if precision == "fp16" else torch.bfloat16,
            enabled=precision != "fp32",
        )
        parts = []
        for start in tqdm(range(0, len(data), 128), "encode", delay=2, unit="batch"):
            stop = min(start + 128, len(data))
            x = default_collate([data[i]["image"] for i in range(start, stop)]).to(place)
            check_pictures(x, f"data: pictures {start} to {stop - 1}")
            with mixed, evaluating(autoencoder):  # no dropout
                both = [autoencoder.moments(side).float() for side in (x, x.flip(-1))]
            parts.append(torch.stack(both, dim=1).cpu())  # (B, 2, c', h, w)
        return torch.cat(parts)

    return cached_moments(
        f"{data.fingerprint}-{fingerprint(autoencoder.encoder)}-{precision}", compute
    )


def measure_scale(autoencoder: Autoencoder, data: Dataset, precision: str = "fp32") -> float:
    """Standard deviation of a draw from the posteriors over the training set; 1 unless KL.

    LDM appendix G estimates it on the first batch; this is the same over all pictures, in
    closed form: the variance of the means, plus the mean of the variances.
    """
    if autoencoder.config.regularizer != "kl":
        return 1.0  # as in the paper, where VQ latents came out with a variance near one (App. G)
    moments = encode_dataset(autoencoder, data, precision).flatten(0, 1)
    mean, logvar = DiagonalGaussian.from_moments(moments.double())
    return (mean.var() + logvar.exp().mean()).sqrt().item()


def with_steps(experiment: object, steps: int, **changes: object) -> object:
    """The same experiment, trained for another number of steps (and other TrainConfig fields)."""
    return replace(experiment, train=replace(experiment.train, steps=steps, **changes))


def progress(records: Iterator[Record], total: int, what: str) -> Iterator[Record]:
    """A progress bar with the loss around a training; the records pass through."""
    bar = None
    for record in records:
        if bar is None:  # only now: bad input should end in its message alone
            shown = {"desc": what, "unit": "step", "disable": not processes.is_main()}
            bar = tqdm(total=total, initial=record.step - 1, **shown)
        bar.update(1)
        bar.set_postfix(loss=f"{record.terms['loss']:.4f}", refresh=False)
        yield record
    if bar is not None:
        bar.close()
