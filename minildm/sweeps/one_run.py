"""What one run of a sweep does: train, and measure on the way. Its notebook calls these in turn.

    run = Run.from_dict(run)
    for record in one_run.train(run, folder, shared): ...
    rows = one_run.measure_at_end(run, folder)

A run's folder holds `model/` (the training), `measured.json` (what was measured so far) and, when
all is measured, `ended.json`, which the sweep renames to `results.json` when the notebook has come
to its last cell. Killed at any point, the same calls go on with what is left.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from minildm.autoencoder import Autoencoder
from minildm.checkpoints import fingerprint, load_model, read_card, save_model, to_dict
from minildm.demo import describe
from minildm.diffusion import LatentDiffusion
from minildm.experiments import LatentDiffusionExperiment
from minildm.files import atomic_write, data_dir, lock, write_json
from minildm.loop import pick_device, pick_precision
from minildm.metrics import reconstruct
from minildm.presets import PIXELS
from minildm.runs import saved_step
from minildm.sweeps.measuring import Ruler
from minildm.sweeps.settings import Plan, trained
from minildm.sweeps.sweep import Run
from minildm.training import train_autoencoder, train_ldm
from minildm.types import Record

RESULTS, ENDED, MEASURED = "results.json", "ended.json", "measured.json"
PRECISION = "precision.json"  # of the sweep's folder
SHOWN = 8  # samples of each measuring that are kept
BOUND = "first stage"  # in place of a sampling: real pictures through it, the best there can be


def settled(plan: Plan, shared: Path, device: str | None = None) -> Plan:
    """The plan with what precision "auto" means in all of the sweep, in place of "auto".

    shared: the sweep's folder. On a CPU "auto" measures, and on a busy one may choose otherwise
    the next time; so the first process that asks chooses for all.
    """
    parts = {"experiment": plan.experiment, "first_stage": plan.first_stage}
    auto = {k: e for k, e in parts.items() if e is not None and e.train.precision == "auto"}
    if not auto:
        return plan
    path = shared / PRECISION
    shared.mkdir(parents=True, exist_ok=True)
    with lock(f"{path}.lock"):
        if not path.is_file():
            place = pick_device(device)
            chosen = {"auto": pick_precision("auto", place), "device": describe(place)}
            write_json(path, chosen)
    chosen = json.loads(path.read_text(encoding="utf-8"))["auto"]
    precise = {k: replace(e, train=replace(e.train, precision=chosen)) for k, e in auto.items()}
    return replace(plan, **precise)


def first_stage_of(plan: Plan, shared: Path, device: str | None = None) -> Path:
    """The folder of the run's first stage; it is trained here if no run has done it before.

    shared: the sweep's folder, where all runs look. Others that want the same one wait meanwhile.
    The folder is called after what the first stage is made of: other pictures, or other weights
    of one that was trained before, are another.
    """
    if plan.trained_first_stage is not None:
        content: Any = given(plan)
    elif plan.first_stage is not None:
        content = [to_dict(plan.first_stage), plan.first_stage.data.dataset("train").fingerprint]
    else:
        content = "pixels"
    text = json.dumps([content, plan.latent_std], sort_keys=True)
    folder = shared / "first_stages" / hashlib.sha256(text.encode()).hexdigest()[:12]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(f"{folder}.lock"):
        if not _is_trained(folder):
            _make_first_stage(plan, folder, shared, device)
    return folder


def _is_trained(folder: Path) -> bool:
    return (folder / "config.json").is_file() and "unfinished" not in read_card(folder)["info"]


def _make_first_stage(plan: Plan, folder: Path, shared: Path, device: str | None) -> None:
    """A copy of one that is there, so that the sweep's folder can be moved; or a training."""
    if plan.latent_std != 1.0:
        source = first_stage_of(replace(plan, latent_std=1.0), shared, device)
        _rescaled(source, folder, plan.latent_std)
    elif plan.trained_first_stage is not None:
        save_model(_autoencoder(plan.trained_first_stage), folder)
    elif plan.first_stage is None:
        save_model(Autoencoder(PIXELS), folder)
    else:
        experiment = settled(plan, shared, device).first_stage
        for _ in train_autoencoder(experiment, run_dir=folder, device=device):
            pass


def _autoencoder(name: str) -> Autoencoder:
    model = trained(name)
    model = model.autoencoder if isinstance(model, LatentDiffusion) else model
    if not isinstance(model, Autoencoder):
        raise ValueError(f"trained_first_stage={name!r} is no autoencoder")
    return model


def given(plan: Plan) -> str | None:
    """The hash of the weights that a level is given, as a model or first stage; None for none."""
    name = plan.model or plan.trained_first_stage
    if name is None:
        return None
    folder = Path(name) if Path(name).is_dir() else data_dir() / "weights" / name
    stamp = (folder / "config.json").stat().st_mtime_ns  # written last
    return _hash(name, stamp, whole=plan.model is not None)


@lru_cache
def _hash(name: str, _stamp: int, whole: bool) -> str:
    return fingerprint(trained(name) if whole else _autoencoder(name))[:16]


def _precision(folder: Path) -> str | None:
    """Of a training, which keeps the one that it began with."""
    path = folder / "training/run.json"
    return json.loads(path.read_text(encoding="utf-8"))["precision"] if path.is_file() else None


def _rescaled(source: Path, folder: Path, latent_std: float) -> None:
    """The same first stage with latents of another standard deviation than 1."""
    autoencoder = load_model(source, kind="autoencoder")
    autoencoder.scale /= latent_std
    save_model(autoencoder, folder)


def steps_of(run: Run, experiment: LatentDiffusionExperiment) -> tuple[int, ...]:
    """The steps at which a run is measured, the last one among them."""
    return tuple(sorted({*run.measure_at, experiment.train.steps}))


def train(run: Run, folder: Path, shared: Path, device: str | None = None) -> Iterator[Record]:
    """Train what is left to train, and measure at the asked steps: yields the training's records.

    Nothing where the run's model is trained already.
    """
    plan = settled(run.plan(), shared, device)
    if plan.experiment is None:
        return
    marks = steps_of(run, plan.experiment)
    first_stage, model_dir = first_stage_of(run.plan(), shared, device), folder / "model"
    ruler: Ruler | None = None

    def measure(step: int) -> None:
        nonlocal ruler
        if step in marks and not _has(folder, step, "plain"):
            model = load_model(model_dir).to(pick_device(device)).eval()
            ruler = ruler or _ruler(run, plan, model)
            _measure(run, folder, ruler, model, step, "plain", plan.sampling)

    if (step := saved_step(model_dir)) is not None:
        measure(step)
    where = {"first_stage": first_stage, "run_dir": model_dir, "device": device}
    # A checkpoint stands at every mark, so that one which was not measured in time still is.
    for record in train_ldm(plan.experiment, save_at=marks, **where):
        yield record
        if record.step in marks and saved_step(model_dir) == record.step:  # not one of `alone`
            measure(record.step)


def final_model(run: Run, folder: Path, device: str | None = None) -> LatentDiffusion:
    """The run's model, trained; or the one that was trained before; on its device."""
    plan = run.plan()
    model = trained(plan.model) if plan.model else load_model(folder / "model")
    if not isinstance(model, LatentDiffusion):
        raise ValueError(f"model={plan.model!r} is no diffusion model")
    return model.to(pick_device(device)).eval()


def measure_at_end(run: Run, folder: Path, device: str | None = None) -> list[dict[str, Any]]:
    """The last model with every sampling that is asked for, and `ended.json`: the rows of it.

    A row is {step, images, sampling, metric, value, n}; those of "first stage" are of the real
    pictures that samples were asked for, encoded and decoded. ended.json also has the run, the
    hashes of its first stage and of what it was given, parameters, device, and the precision of
    its training.
    """
    plan, model = run.plan(), final_model(run, folder, device)
    step = plan.experiment.train.steps if plan.experiment else 0
    samplings = {"plain": plan.sampling}
    samplings |= {name: {**plan.sampling, **more} for name, more in run.samplings.items()}
    ruler: Ruler | None = None
    for name, sampling in samplings.items():
        if not _has(folder, step, name):
            ruler = ruler or _ruler(run, plan, model)
            _measure(run, folder, ruler, model, step, name, sampling)
    if plan.experiment is not None and not _has(folder, step, BOUND):
        ruler = ruler or _ruler(run, plan, model)
        if (x := ruler.truth(plan.experiment.data)) is not None:
            _keep(run, folder, ruler, reconstruct(model.autoencoder, x), step, BOUND)
    rows = measured(folder)
    results = {
        "run": run.as_dict(),
        "parameters": sum(p.numel() for p in model.unet.parameters()),
        "first_stage": fingerprint(model.autoencoder)[:16],
        "given": given(plan),
        "device": describe(model.device),
        "precision": _precision(folder / "model"),
        "rows": rows,
    }
    write_json(folder / ENDED, results)
    return rows


def measured(folder: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    path = folder / MEASURED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _has(folder: Path, step: int, sampling: str) -> bool:
    return any((row["step"], row["sampling"]) == (step, sampling) for row in measured(folder))


def _ruler(run: Run, plan: Plan, model: LatentDiffusion) -> Ruler:
    data = plan.experiment.data if plan.experiment else None
    return Ruler(model, data, run.samples, run.seed, run.metrics)


def _measure(
    run: Run,
    folder: Path,
    ruler: Ruler,
    model: LatentDiffusion,
    step: int,
    name: str,
    sampling: dict[str, Any],
) -> None:
    """Draw and measure."""
    _keep(run, folder, ruler, ruler.sample(model, sampling), step, name)


def _keep(run: Run, folder: Path, ruler: Ruler, x: torch.Tensor, step: int, name: str) -> None:
    """Measure, and keep the numbers and a few of the pictures."""
    experiment = run.plan().experiment
    batch = experiment.train.batch_size * experiment.train.accumulate if experiment else 0
    fixed = {"step": step, "images": step * batch, "sampling": name}
    rows = [
        {**fixed, "metric": metric, "value": value, "n": n}
        for metric, (value, n) in ruler(x).items()
    ]
    samples = folder / "samples" / f"{step}-{name.replace(' ', '_')}.pt"
    with atomic_write(samples) as file:
        torch.save(((x[:SHOWN] + 1) * 127.5).round().to(torch.uint8), file)
    write_json(folder / MEASURED, measured(folder) + rows)


def shown(folder: Path) -> dict[str, torch.Tensor]:
    """The first samples of each measuring, by "step-sampling": (SHOWN, 3, H, W) in [-1, 1]."""
    paths = (folder / "samples").glob("*.pt")
    paths = sorted(paths, key=lambda path: (int(path.stem.partition("-")[0]), path.stem))
    return {path.stem: torch.load(path, weights_only=True) / 127.5 - 1 for path in paths}


def stacked(samples: dict[str, torch.Tensor]) -> torch.Tensor:
    """Those of all measurings, one after the other: (M * SHOWN, 3, H, W)."""
    return torch.cat(list(samples.values()))
