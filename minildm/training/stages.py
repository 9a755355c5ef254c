"""The trainings: stage 1, stage 2 and the classifiers.

Each is a generator of Records, those of an earlier run in its folder first:

for record in train_ldm(experiment, first_stage="runs/ae", run_dir="runs/ldm"):
    print(record.step, record.terms["loss"])
"""

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import StackDataset, default_collate

from minildm.compression.autoencoder import Autoencoder
from minildm.compression.loss import PatchDiscriminator, autoencoder_loss
from minildm.compression.perceptual import perceptual_distance
from minildm.conditioning import CaptionTokenizer, ConditionerConfig, HybridConfig, TextConfig
from minildm.data import transforms
from minildm.data.dataset import ImageDataset
from minildm.data.latents import encode_dataset, measure_scale
from minildm.diffusion.latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from minildm.files import fingerprint, progress
from minildm.layers import Batch, BatchRandom, seed_of
from minildm.training.checkpoint import AVERAGES, load_model, own_code, reader_of, save_model
from minildm.training.classifier import Classifier, ClassifierConfig, Segmenter, SegmenterConfig
from minildm.training.configs import (
    AutoencoderExperiment,
    ClassifierExperiment,
    Experiment,
    LatentDiffusionExperiment,
    differences,
    to_dict,
)
from minildm.training.loop import LossFn, Record, Training


def new_model(build: Callable, config: Any, seed: int, init: str | Path | None = None) -> Any:
    """A model whose weights depend on the seed, or come from the folder `init`.

    A diffusion model with another conditioner gives its UNet and autoencoder, as the paper does
    for some tasks; channels that are now concatenated to z_t begin with weights of zero, as in
    Stable Diffusion's inpainting. Raises ValueError if the model in `init` does not fit.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = build(config)
    if init is None:
        return model
    trained = load_model(init, build=build)
    if trained.config == config:
        model.load_state_dict(trained.state_dict())
        return model
    parts = {"unet", "autoencoder"} & vars(config).keys() or vars(config).keys()
    old, new = (
        {k: v for k, v in to_dict(c).items() if k in parts} for c in (trained.config, config)
    )
    further = 0
    if "unet" in old and "unet" in new:
        further = max(new["unet"]["in_channels"] - old["unet"]["in_channels"], 0)
        old["unet"]["in_channels"] += further
    if differ := differences(old, new):
        raise ValueError(f"init={str(init)!r} holds a model of another config ({differ})")
    for part in parts:
        state = getattr(trained, part).state_dict()
        if further and part == "unet":
            state["down.0.0.weight"] = F.pad(state["down.0.0.weight"], (0, 0, 0, 0, 0, further))
        getattr(model, part).load_state_dict(state)
    return model


def flipped(batch: Batch, flip: bool, rng: BatchRandom) -> Batch:
    """Mirror half of the samples, if `flip`."""
    x = batch["image"]
    return transforms.mirrored(batch, rng.rand(len(x), device=x.device) < 0.5 * flip)


def training_set(experiment: Experiment, data: ImageDataset | None) -> ImageDataset:
    """The given images, or the experiment's. Raises ValueError for another kind of data set."""
    if data is not None and not isinstance(data, ImageDataset):
        raise ValueError(f"data={data!r:.60} must be an ImageDataset: see minildm.wrap_dataset")
    return experiment.data.dataset("train") if data is None else data


def train_autoencoder(
    experiment: AutoencoderExperiment,
    data: ImageDataset | None = None,
    *,
    run_dir: str | Path,
    device: str | None = None,
    init: str | Path | None = None,
) -> Iterator[Record]:
    """Stage 1; leaves a model's folder in run_dir.

    data: default: the experiment's. init: the folder of a model to start from. After the last
    step the standard deviation of KL latents over the data is measured and saved as the
    autoencoder's `scale`. Raises ValueError for images or options that do not suit the model.
    """
    data = training_set(experiment, data)
    distance = perceptual_distance(experiment.perceptual) if experiment.perceptual_weight else None
    game, train, config = experiment.adversarial, experiment.train, experiment.model
    if distance is not None:
        experiment = replace(experiment, perceptual=distance.kind)
    model = new_model(Autoencoder, config, train.seed, init)
    critic = new_model(PatchDiscriminator, game, train.seed) if game else None
    run = Training(run_dir, experiment, device, data, init=init and fingerprint(model))
    if quantizer := model.decoder.quantizer:
        if (dead := experiment.restart_dead) and run.processes > 1:
            raise ValueError(f"restart_dead={dead} must be 0 with several processes")
        quantizer.restart_after = dead
        quantizer.counts.zero_()
        quantizer.idle.fill_(0 if init else 2**40)  # the first batch moves all codes that are new
    weights = ("kl_weight", "mse_weight", "codebook_weight", "perceptual_weight")
    options = {name: getattr(experiment, name) for name in weights} | {"discriminator": critic}
    options["perceptual"] = distance.to(run.device) if distance else None

    def loss(batch: Batch, step: int, rng: BatchRandom) -> dict[str, Tensor]:
        x = flipped(batch, train.flip, rng)["image"]
        return autoencoder_loss(model, x, step=step, noise=rng.randn_like, **options)

    run.info |= {"perceptual": distance.name} if distance else {}
    lr_factor = game.lr_factor if game else 1.0
    yield from run.optimise(model, loss, data, adversary=critic, adversary_lr=lr_factor)
    with run.accelerator.main_process_first():
        model.scale.fill_(measure_scale(model, data, run.config.precision))
    if run.accelerator.is_main_process:
        save_model(model, run_dir, info=run.info)  # with the averaged weights
    run.accelerator.wait_for_everyone()


def train_ldm(
    experiment: LatentDiffusionExperiment,
    data: ImageDataset | None = None,
    *,
    first_stage: str | Path,
    run_dir: str | Path,
    device: str | None = None,
    init: str | Path | None = None,
    save_at: Collection[int] = (),
    build: Callable[[LatentDiffusionConfig], LatentDiffusion] = LatentDiffusion,
    loss: Callable[[LatentDiffusion, Batch, BatchRandom], dict[str, Tensor]] | None = None,
) -> Iterator[Record]:
    """Stage 2 on latents drawn from the posteriors of `data`, encoded once by `first_stage`.

    Leaves a model's folder, with averaged weights. init: a model's folder to start from. save_at:
    steps after which the model is saved, besides save_every. build: makes a model with parts of
    your own from its config. loss: in place of the model's. Raises ValueError for what cannot fit.
    """
    data = training_set(experiment, data)
    autoencoder = trained_first_stage(first_stage)
    if (side := data[0]["image"].shape[-1]) != experiment.data.size:
        raise ValueError(f"data has images of {side} px, data.size is {experiment.data.size}")
    train, given = experiment.train, experiment.data
    conditioner, tokenizer = completed(experiment.conditioner, data, given.style_words)
    config = experiment.model_config(autoencoder.config, conditioner)
    model = new_model(build, config, train.seed, init)
    if init is not None and fingerprint(model.autoencoder) != fingerprint(autoencoder):
        raise ValueError(f"init={str(init)!r} was trained on another first stage")
    model.autoencoder.load_state_dict(autoencoder.state_dict())
    read_captions(model, tokenizer, data)
    inputs = {"first_stage": fingerprint(autoencoder), "init": init and fingerprint(model)}
    inputs["code"] = own_code(build, loss or build, *map(type, model.modules()))
    run = Training(run_dir, experiment, device, data, **inputs)
    with run.accelerator.main_process_first():  # the others read the cache
        moments = encode_dataset(model.autoencoder.to(run.device), data, run.config.precision)
    task = getattr(conditioner, "concat", conditioner).kind

    def terms(batch: Batch, step: int, rng: BatchRandom) -> dict[str, Tensor]:
        if given.style_words:  # drawn where captions are, on the CPU
            host = torch.Generator().manual_seed(seed_of(train.seed, step - 1, 0))
            batch = transforms.with_styles(batch, given.style_words, rng._replace(generator=host))
        moments = batch["moments"]  # (B, 2, c', h, w): as drawn, and mirrored
        chosen = rng.rand(len(moments), device=moments.device) < 0.5 * train.flip
        own = torch.where(chosen[:, None, None, None], moments[:, 1], moments[:, 0])
        batch = transforms.mirrored(batch, chosen)
        inputs = transforms.task_inputs(batch, task, model.autoencoder.f, rng)
        z = model.autoencoder.latent(own, noise=rng.randn_like)
        return (loss or type(model).loss)(model, {**batch, **inputs, "z": z}, rng)

    latents, measure = latent_items(data, moments, task), dict
    if n := experiment.held_out:
        val = experiment.data.dataset("val")
        moments = encode_dataset(model.autoencoder, val, run.config.precision)
        measure = partial(loss_by_time, model, terms, latent_items(val, moments, task), n)
    place = Path(os.path.relpath(Path(first_stage).resolve(), Path(run_dir).resolve())).as_posix()
    yield from run.optimise(
        model, terms, latents, first_stage=place, save_at=save_at, measure=measure
    )


def trained_first_stage(folder: str | Path) -> Autoencoder:
    """Load an autoencoder. Raises ValueError if its training has not come to its end."""
    if (Path(folder) / AVERAGES).exists():  # stage 1 ends by putting them in place
        raise ValueError(f"first_stage={str(folder)!r} is not trained to its end: resume it")
    return load_model(folder, kind="autoencoder")


def read_captions(
    model: LatentDiffusion, tokenizer: CaptionTokenizer | None, data: ImageDataset
) -> None:
    """Give the model its tokenizer. Raises ValueError naming the captions that are too long."""
    if tokenizer is not None:
        reader_of(model).set_tokenizer(tokenizer)
    reader = getattr(model.conditioner, "tokens", model.conditioner)
    if read := getattr(reader, "tokenizer", None):
        read(data.captions, reader.config.length)


@torch.no_grad()
def loss_by_time(
    model: LatentDiffusion, terms: LossFn, items: StackDataset, n: int
) -> dict[str, float]:
    """The loss of n items by tenths of T: "held_out_0", with the least noise, to "held_out_9".

    Items and noise are the same at each call; no condition is dropped.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(items), generator=generator)[:n]
    batch = default_collate([items[i] for i in chosen.tolist()])
    batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    model.eval()
    found = terms(batch, 1, BatchRandom(torch.Generator(model.device).manual_seed(0)))
    tenth = 10 * found["t"] // model.schedule.T
    losses = {i: found["per_sample"][tenth == i].mean().item() for i in tenth.unique().tolist()}
    model.train()
    return {f"held_out_{i}": loss for i, loss in losses.items()}


def latent_items(data: ImageDataset, moments: Tensor, task: str) -> StackDataset:
    """The items of `data` with `moments` (2, c', h, w) in place of the image.

    Also `styled`, the caption with the style, and what the task's conditioner is made of.
    """
    pairs = zip(data.captions, data.style_ids.tolist(), strict=True)
    styled = [transforms.style_caption(caption, data.styles[i]) for caption, i in pairs]
    columns = {**data.columns, "styled": styled, "moments": moments}
    if task in ("low_res", "inpaint"):
        columns["image"] = data.images
    if task == "semantic":
        columns["semantic"] = data.maps
    return StackDataset(**columns)


def completed(
    conditioner: ConditionerConfig, data: ImageDataset, style_words: float = 0.0
) -> tuple[ConditionerConfig, CaptionTokenizer | None]:
    """The config with the data's names or the size of its vocabulary, and its tokenizer.

    Raises ValueError for data without boxes or maps.
    """
    if isinstance(conditioner, HybridConfig):
        tokens, tokenizer = completed(conditioner.tokens, data, style_words)
        concat, _ = completed(conditioner.concat, data)
        return replace(conditioner, tokens=tokens, concat=concat), tokenizer
    if isinstance(conditioner, TextConfig):
        styles = [transforms.style_caption("", style) for style in data.styles if style_words]
        tokenizer = CaptionTokenizer.trained_on([*data.captions, *styles])
        return replace(conditioner, vocab_size=len(tokenizer)), tokenizer
    for field, source in conditioner.names.items():
        if not hasattr(data, source):
            kind = conditioner.kind
            raise ValueError(f"conditioner.kind={kind!r} requires scenes, got {data.name!r}")
        conditioner = replace(conditioner, **{field: tuple(getattr(data, source))})
    return conditioner, None


def train_classifier(
    experiment: ClassifierExperiment,
    data: ImageDataset | None = None,
    *,
    run_dir: str | Path,
    device: str | None = None,
    init: str | Path | None = None,
) -> Iterator[Record]:
    """Train a Classifier, or, on scenes, a Segmenter of their maps; see the others."""
    data = training_set(experiment, data)
    if hasattr(data, "semantic_classes"):
        build, config = Segmenter, SegmenterConfig(labels=data.semantic_classes)
    else:
        names = {"labels": data.classes, "groups": data.groups, "styles": data.styles}
        build, config = Classifier, ClassifierConfig(**names)
    config = replace(config, channels=experiment.channels)
    model = new_model(build, config, experiment.train.seed, init)
    run = Training(run_dir, experiment, device, data, init=init and fingerprint(model))

    def loss(batch: Batch, _step: int, rng: BatchRandom) -> dict[str, Tensor]:
        return model.loss(flipped(batch, experiment.train.flip, rng), rng)

    yield from run.optimise(model, loss, data)


def finish(records: Iterator[Record], total: int, what: str) -> list[Record]:
    """Run a training of `total` steps to its end, behind a progress bar with the loss."""
    found, others = [], int(os.environ.get("RANK", "0")) > 0
    with progress(total=total, desc=what, unit="step", disable=others, delay=0.1) as bar:
        for record in records:  # the bar comes later than an error in the input
            bar.update(record.step - bar.n)
            bar.set_postfix(loss=f"{record.terms['loss']:.4f}", refresh=False)
            found.append(record)
    return found
