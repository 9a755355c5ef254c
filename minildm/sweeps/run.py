"""One run of a sweep: train, and measure at the requested steps.

notebooks/sweeps/one_run.ipynb calls `train` and `measure_at_end`. A run's folder holds
`first_stage/`, `model/` (the training), `measured.json`, `samples/`, and at the end
`results.json`. Killed at any moment, the same calls continue.
"""

import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minildm.compression.autoencoder import Autoencoder
from minildm.data.dataset import ImageDataset
from minildm.data.scenes import crop
from minildm.data.transforms import enlarge, shrink
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.evaluation.distribution import (
    OfflineFeatures,
    extract_features,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from minildm.evaluation.following import accuracy, held_out
from minildm.evaluation.image_metrics import psnr, reconstruct
from minildm.evaluation.restoration import pasted
from minildm.files import atomic_write, write_json
from minildm.sweeps.sweep import Run, Sampling, slug
from minildm.training.checkpoint import (
    find_model,
    load_model,
    pretrained,
    read_card,
    read_log,
    save_model,
    saved_step,
)
from minildm.training.configs import DataConfig, override, to_dict
from minildm.training.loop import Record, describe, pick_device
from minildm.training.presets import PIXELS
from minildm.training.stages import train_autoencoder, train_ldm

RESULTS = "results.json"
TIMED = 100  # records of a training from which the time of a step is taken
DEFAULT = "default"  # the label of a level's own sampling
BOUND = "first stage"  # real images through the first stage: the best that samples can be
REFERENCE = 2000  # real images at most
CLASSIFIERS = {  # who tells whether samples follow, and by which answer
    "accuracy": ("emoji-classifier", "group"),
    "objects": ("scenes-classifier", "label"),
}
SHOWN = 8  # samples of each measurement that are kept
METRICS = {  # name: its axis
    "proxy_fid": "proxy-FID ↓",
    "kid": "KID ↓",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "requested group recognised by the classifier",
    "objects": "objects recognised in their boxes",
    "psnr": "PSNR to the true image, dB",
}


class Conditions(NamedTuple):
    """What samples are conditioned on, and the truth to compare with by `metric`."""

    y: Any  # as `sample` takes it; None for an unconditional model
    metric: str | None = None
    truth: Any = None  # groups (N,), layouts, or images (N, 3, H, W)
    rows: Tensor | None = None  # (N,) rows of the training images whose conditions these are


def data_of(model: LatentDiffusion, config: DataConfig | None, split: str) -> ImageDataset:
    """The images that a model was trained on; for a shipped one, those of its condition."""
    conditioner, size = model.config.conditioner, model.config.image_size
    if config is None:
        scenes = conditioner.kind in ("layout", "semantic")
        subgroups = conditioner.classes if conditioner.kind == "class" else ()
        config = DataConfig(kind="scenes" if scenes else "emoji", size=size, subgroups=subgroups)
    return config.dataset(split)


def conditions_of(
    model: LatentDiffusion, config: DataConfig | None, n: int, seed: int
) -> Conditions:
    """Draw n conditions: in the training set's proportions; layouts and images of validation."""
    kind, draw = model.config.conditioner.kind, torch.Generator().manual_seed(seed)
    if kind in ("layout", "semantic"):
        y, layouts, _ = held_out(model, n, seed)
        return Conditions(y, "objects", layouts)
    if kind in ("low_res", "inpaint"):
        data = data_of(model, config, "val")
        y, _, x = held_out(model, min(n, len(data)), seed, data)
        return Conditions(y, "psnr", x)
    data = data_of(model, config, "train")
    rounds = range(-(-n // len(data)))  # each row as often as the others, up to one
    rows = torch.cat([torch.randperm(len(data), generator=draw) for _ in rounds])[:n]
    if kind == "none":
        return Conditions(None, rows=rows)
    classes = kind == "class"
    y = [data.classes[data.labels[i]] if classes else data.captions[i] for i in rows.tolist()]
    known = data.name.startswith("emoji")  # to the classifier
    return Conditions(y, *(("accuracy", data.group_ids[rows]) if known else (None, None)), rows)


class Measurements:
    """What was measured of a run so far: `measured.json` and `samples/` in its folder.

    The real images are those of the training split, as in the paper's appendix E. The Fréchet
    distance is on the 112 features of a middle block, since a few hundred samples are too few for
    the covariance of the head's 1,280; the other distances are on the head.
    """

    def __init__(self, run: Run, folder: Path) -> None:
        path = folder / "measured.json"
        self.run, self.folder = run, folder
        self.rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        self.real: list[Tensor] = []  # features of real images by both networks, (N, D)

    def add(
        self, model: LatentDiffusion, step: int, name: str, sampling: Sampling | None = None
    ) -> None:
        """Measure samples, or reconstructions of real images, unless that was done before."""
        if any((row["step"], row["sampling"]) == (step, name) for row in self.rows):
            return
        if not self.real:
            self._prepare(model)
        run, y, rows = self.run, self.conditions.y, self.conditions.rows
        train = run.experiment.train if run.experiment else None
        images = step * train.batch_size * train.accumulate if train else 0
        fixed = {"step": step, "images": images, "sampling": name}
        began = time.perf_counter()
        if sampling is not None:  # from the same noise at every step
            n = run.samples if y is None else None
            x = model.sample(y, n=n, seed=run.seed, **asdict(sampling)).cpu()
            fixed["images_per_second"] = len(x) / (time.perf_counter() - began)
            x = pasted(x, y) if isinstance(y, dict) else x
        elif rows is not None:
            x = reconstruct(model.autoencoder, self._images(rows))
        else:
            return
        numbers = self._numbers(x).items()
        self.rows += [{**fixed, "metric": m, "value": v, "n": n} for m, (v, n) in numbers]
        with atomic_write(self.folder / "samples" / f"{step}-{slug(name)}.pt") as file:
            torch.save(((x[:SHOWN] + 1) * 127.5).round().to(torch.uint8), file)
        write_json(self.folder / "measured.json", self.rows)

    def _prepare(self, model: LatentDiffusion) -> None:
        """Compute once what all measurements share."""
        run, config = self.run, self.run.experiment.data if self.run.experiment else None
        self.data = data_of(model, config, "train")
        self.conditions = conditions_of(model, config, run.samples, run.seed)
        self.networks = [OfflineFeatures(block).to(model.device).eval() for block in (10, None)]
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(0))
        real = self._images(order[:REFERENCE])
        self.real = [extract_features(real, network) for network in self.networks]

    def _images(self, rows: Tensor) -> Tensor:
        """Training images: (N,) -> (N, 3, H, W) in [-1, 1]."""
        return torch.stack([self.data[i]["image"] for i in rows.tolist()])

    def _numbers(self, x: Tensor) -> dict[str, tuple[float, int]]:
        """Samples (N, 3, H, W) in [-1, 1] -> (value, N) by metric."""
        pairs = zip(self.real, self.networks, strict=True)
        middle, head = ((real, extract_features(x, network)) for real, network in pairs)
        inside = precision_recall(*head, k=3)
        found = {
            "proxy_fid": frechet_distance(*middle),
            "kid": kernel_distance(*head),
            "precision": inside.precision,
            "recall": inside.recall,
        }
        numbers = {name: (float(value), len(x)) for name, value in found.items()}
        if self.conditions.metric:
            numbers[self.conditions.metric] = self._follows(x)
        return numbers

    def _follows(self, x: Tensor) -> tuple[float, int]:
        """Whether samples show what they were conditioned on."""
        metric, truth, side = self.conditions.metric, self.conditions.truth, x.shape[-1]
        if metric == "psnr":
            return float(psnr(truth, x).mean()), len(x)
        if metric == "accuracy":  # the classifier was trained on images of 64 pixels
            x = enlarge(x, 64 // side) if side < 64 else shrink(x, side // 64)
        else:
            image, slot = (truth["classes"] >= 0).nonzero().unbind(1)
            x = crop(x[image], truth["boxes"][image, slot])
            truth = truth["classes"][image, slot]
        name, question = CLASSIFIERS[metric]
        classifier = pretrained(name).to(next(self.networks[0].parameters()).device)
        found = accuracy(classifier, x, truth, question)
        return found.value, found.n


def shown(folder: Path) -> dict[str, Tensor]:
    """The first samples of each measurement, by "step-sampling": (8, 3, H, W) uint8."""
    paths = (folder / "samples").glob("*.pt")
    paths = sorted(paths, key=lambda path: (int(path.stem.partition("-")[0]), path.stem))
    return {path.stem: torch.load(path, weights_only=True) for path in paths}


def stage_folder(run: Run, shared: Path) -> Path | None:
    """Where a run's first stage is, or will be trained: a hash of its config. None: pixels."""
    if run.first_stage is None:
        return Path(run.first_stage_dir) if run.first_stage_dir else None
    text = json.dumps(to_dict(run.first_stage), sort_keys=True)
    return shared / "first_stages" / hashlib.sha256(text.encode()).hexdigest()[:12]


def is_trained(stage: Path | None) -> bool:
    """Whether a first stage is there, trained to its end; None: pixels need none."""
    if stage is None or not (stage / "config.json").is_file():
        return stage is None
    return "unfinished" not in read_card(stage)["info"]


def train_first_stage(run: Run, shared: Path, device: str | None = None) -> Iterator[Record]:
    """Train a run's first stage in the sweep's folder `shared`, if no run has done so."""
    if not is_trained(folder := stage_folder(run, shared)):
        yield from train_autoencoder(run.first_stage, run_dir=folder, device=device)


def train(run: Run, folder: Path, shared: Path, device: str | None = None) -> Iterator[Record]:
    """Train what is left to train and measure at the requested steps; yields stage 2's Records.

    Nothing happens where the run's model is trained already.
    """
    if run.experiment is None:
        return
    for _ in train_first_stage(run, shared, device):
        pass
    model_dir, own = folder / "model", folder / "first_stage"
    if not (own / "config.json").is_file():  # a copy, so that the run's folder can move
        stage = stage_folder(run, shared)
        autoencoder = load_model(stage, kind="autoencoder") if stage else Autoencoder(PIXELS)
        autoencoder.scale /= run.latent_std
        save_model(autoencoder, own)
    marks, done = {*run.measure_at, run.experiment.train.steps}, Measurements(run, folder)
    options = {"first_stage": own, "run_dir": model_dir, "device": device, "save_at": marks}
    for record in itertools.chain([None], train_ldm(run.experiment, **options)):
        step = record.step if record else saved_step(model_dir)  # a mark that was not measured
        if step in marks:
            done.add(load_model(model_dir).to(pick_device(device)), step, DEFAULT, run.sampling)
        if record:
            yield record


def measure_at_end(run: Run, folder: Path, device: str | None = None) -> list[dict[str, Any]]:
    """Measure the final model with every sampling, and write `results.json`; returns its rows.

    A row is {step, images, sampling, images_per_second, metric, value, n, seconds}. Rows of the
    sampling "first stage" are of the real images whose conditions are used, encoded and decoded.
    """
    done = Measurements(run, folder)
    model = load_model(find_model(run.model or folder / "model"), kind="latent-diffusion")
    model = model.to(pick_device(device))
    step = run.experiment.train.steps if run.experiment else 0
    for name, options in {DEFAULT: {}, **run.samplings}.items():
        done.add(model, step, name, override(run.sampling, options))
    if run.experiment:
        done.add(model, step, BOUND)
    pairs = itertools.pairwise(read_log(folder / "model")[:TIMED])
    times = [(b.seconds - a.seconds) / (b.step - a.step) for a, b in pairs]
    step_seconds = statistics.median(times or [0.0])  # pauses for measuring do not count
    rows = [{**row, "seconds": row["step"] * step_seconds} for row in done.rows]
    results = {"run": to_dict(run), "device": describe(model.device), "rows": rows}
    write_json(folder / RESULTS, results)
    return rows
