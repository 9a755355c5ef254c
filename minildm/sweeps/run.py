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
from typing import Any

import torch
from torch import Tensor

from minildm.compression.autoencoder import Autoencoder
from minildm.data.dataset import ImageDataset, cached
from minildm.data.scenes import crop
from minildm.data.transforms import enlarge, shrink
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.evaluation import metrics
from minildm.evaluation.following import accuracy, draw_conditions, pasted
from minildm.evaluation.intervals import Measured, mean_interval
from minildm.files import atomic_write, write_json
from minildm.layers import Batch
from minildm.sweeps.sweep import Run, slug
from minildm.training import checkpoint
from minildm.training.checkpoint import load_model, save_model
from minildm.training.configs import DataConfig, override, to_dict
from minildm.training.loop import Record, describe, pick_device, read_log
from minildm.training.presets import PIXELS
from minildm.training.stages import train_autoencoder, train_ldm

Row = dict[str, Any]  # step, sampling, images_per_second, metric, value, n, real, seconds
RESULTS = "results.json"
DEFAULT = "default"  # the label of a level's own sampling
BOUND = "first stage"  # real images through the first stage: the best that samples can be
REFERENCE = 2000  # real images at most
METRICS = {  # name: its axis
    "proxy_fid": "proxy-FID ↓",
    "kid": "KID ↓",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "requested group recognised by the classifier",
    "objects": "objects recognised in their boxes",
    "psnr": "PSNR to the true image, dB",
}
SHARES = ("precision", "recall", "accuracy", "objects")  # in [0, 1]


def data_of(run: Run, model: LatentDiffusion, split: str) -> ImageDataset:
    """The images that a run trains on; for a shipped model, those of its condition."""
    if run.experiment:
        return run.experiment.data.dataset(split)
    conditioner = model.config.conditioner
    kind = "scenes" if conditioner.kind in ("layout", "semantic") else "emoji"
    subgroups = conditioner.classes if conditioner.kind == "class" else ()
    return DataConfig(kind=kind, size=model.config.image_size, subgroups=subgroups).dataset(split)


def measure(run: Run, folder: Path, model: LatentDiffusion, step: int, name: str) -> list[Row]:
    """Measure samples, by the sampling of this name, unless that was done before.

    BOUND: real images, encoded and decoded. Returns all rows of `measured.json`.
    """
    path, fixed = folder / "measured.json", {"step": step, "sampling": name}
    content = {"run": to_dict(run), "rows": []}
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
    if content["run"] != to_dict(run):
        raise ValueError(f"{path} is of other settings: choose another folder")
    if any(fixed.items() <= row.items() for row in content["rows"]):
        return content["rows"]
    data, kind = data_of(run, model, "train"), model.config.conditioner.kind
    source = data_of(run, model, "val") if kind in ("low_res", "inpaint") else data
    y, requested, real = draw_conditions(model, run.samples, run.seed, source)
    began = time.perf_counter()
    if name == BOUND:
        x = metrics.reconstruct(model.autoencoder, real)
    else:  # from the same noise at every step
        options = asdict(override(run.sampling, run.samplings.get(name, {})))
        n = run.samples if y is None else None
        x = pasted(model.sample(y, n=n, seed=run.seed, **options).cpu(), requested)
        fixed["images_per_second"] = len(x) / (time.perf_counter() - began)
    found = scores(x, data, model.device) | follows(x, requested, real, data, model.device)
    fixed["real"] = min(len(data), REFERENCE)
    for metric, value in found.items():
        content["rows"].append({**fixed, "metric": metric, "value": value.value, "n": value.n})
    with atomic_write(folder / "samples" / f"{step}-{slug(name)}.pt") as file:
        torch.save(((x[:8] + 1) * 127.5).round().to(torch.uint8), file)
    write_json(path, content)
    return content["rows"]


def scores(x: Tensor, data: ImageDataset, device: torch.device) -> dict[str, Measured]:
    """Distances of samples (N, 3, H, W) in [-1, 1] from real images, by metric.

    Real images are those of the training split, as in the paper's appendix E. The Fréchet
    distance is on the 112 features of a middle block, since a few hundred samples are too few for
    the covariance of the head's 1,280; the other distances are on the head.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:REFERENCE]
    network = metrics.OfflineFeatures("block10", "head").to(device)
    key = f"features-{data.fingerprint[:24]}-{len(order)}"  # once for all runs
    real = cached(key, lambda: metrics.extract_features(data.images[order], network))
    pair = (y.split([112, 1280], dim=1) for y in (real, metrics.extract_features(x, network)))
    middle, head = zip(*pair, strict=True)
    found = {"proxy_fid": metrics.frechet_distance(*middle), "kid": metrics.kernel_distance(*head)}
    found |= {"precision": metrics.precision(*head), "recall": metrics.precision(*head[::-1])}
    return {name: Measured(float(value), n=len(x)) for name, value in found.items()}


def follows(
    x: Tensor, requested: Batch, real: Tensor, data: ImageDataset, device: torch.device
) -> dict[str, Measured]:
    """Whether samples (N, 3, H, W) show what was requested of them, by metric.

    requested, real: of `draw_conditions`. {} where no classifier knows the images.
    """
    if "boxes" in requested:
        classifier = checkpoint.pretrained("scenes-classifier").to(device)
        image, slot = (requested["classes"] >= 0).nonzero().unbind(1)
        crops = crop(x[image], requested["boxes"][image, slot])
        classes = requested["classes"][image, slot]
        return {"objects": accuracy(classifier, crops, classes, "label")}
    if "group" in requested and data.name.startswith("emoji"):
        classifier, side = checkpoint.pretrained("emoji-classifier").to(device), x.shape[-1]
        # It was trained on images of 64 pixels.
        x = enlarge(x, 64 // side) if side < 64 else shrink(x, side // 64)
        return {"accuracy": accuracy(classifier, x, requested["group"])}
    restores = "low_res" in requested or "mask" in requested
    return {"psnr": mean_interval(metrics.psnr(real, x))} if restores else {}


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
    return not (stage / checkpoint.AVERAGES).exists()


def train_first_stage(run: Run, shared: Path, device: str | None = None) -> Path | None:
    """Train a run's first stage, if no run has done so; returns its folder, or None for pixels."""
    if not is_trained(folder := stage_folder(run, shared)):
        for _ in train_autoencoder(run.first_stage, run_dir=folder, device=device):
            pass
    return folder


def train(run: Run, folder: Path, shared: Path, device: str | None = None) -> Iterator[Record]:
    """Train what is left to train and measure at the requested steps; yields stage 2's Records."""
    if run.experiment is None:
        return
    if len(data := run.experiment.data.dataset("train")) < 7:
        raise ValueError(f"{len(data)} images are too few to compare samples with: at least 7")
    stage = train_first_stage(run, shared, device)
    model_dir, own = folder / "model", folder / "first_stage"
    autoencoder = load_model(stage, kind="autoencoder") if stage else Autoencoder(PIXELS)
    autoencoder.scale /= run.latent_std
    save_model(autoencoder, own)  # a copy, so that the run's folder can move
    marks = {*run.measure_at, run.experiment.train.steps}
    options = {"first_stage": own, "run_dir": model_dir, "device": device, "save_at": marks}
    for record in train_ldm(run.experiment, data, **options):
        if record.step in marks:
            model = load_model(model_dir).to(pick_device(device))
            measure(run, folder, model, record.step, DEFAULT)
        yield record


def measure_at_end(run: Run, folder: Path, device: str | None = None) -> list[Row]:
    """Measure the final model with every sampling, and write `results.json`; returns its rows.

    Rows of the sampling "first stage" are of real images, encoded and decoded.
    """
    place = checkpoint.find_model(run.model or folder / "model")
    model = load_model(place, kind="latent-diffusion").to(pick_device(device))
    step, bound = (run.experiment.train.steps, [BOUND]) if run.experiment else (0, [])
    for name in (DEFAULT, *run.samplings, *bound):
        rows = measure(run, folder, model, step, name)
    pairs = itertools.pairwise(read_log(folder / "model")[:100])
    times = [(b.seconds - a.seconds) / (b.step - a.step) for a, b in pairs]
    step_seconds = statistics.median(times or [0.0])  # pauses for measuring do not count
    rows = [{**row, "seconds": row["step"] * step_seconds} for row in rows]
    results = {"run": to_dict(run), "device": describe(model.device), "rows": rows}
    write_json(folder / RESULTS, results)
    return rows
