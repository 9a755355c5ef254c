"""The main job: both stages trained small on the embedded emoji, judged, sampled, shown."""

import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from minildm import evaluation as ev
from minildm import plots
from minildm.checkpoints import load_model, pretrained, to_dict
from minildm.data.emoji import EmojiDataset
from minildm.diffusion import LatentDiffusion
from minildm.files import write_json
from minildm.judge import Judge
from minildm.loop import pick_device
from minildm.presets import PRESETS
from minildm.report import write_report
from minildm.runs import read_log
from minildm.training import progress, train_autoencoder, train_ldm, with_steps
from minildm.types import Record

GUIDANCE, SAMPLE_STEPS = 3.0, 25
SHOWN = 8  # samples of a class in the grid


@dataclass(frozen=True)
class Scale:
    """How long each stage trains, and how many pictures of a class are judged."""

    first_stage: str  # a preset
    diffusion: str  # a preset
    steps: tuple[int | None, int | None]  # of the two stages; None: the preset's
    per_class: int


SCALES = {
    "smoke": Scale("emoji-kl-f4", "emoji-class", (4, 4), 1),  # mechanics alone, in seconds
    "cpu": Scale("emoji-kl-f4", "emoji-class", (None, None), 24),
    "gpu": Scale("emoji-kl-f4-gpu", "emoji-class-gpu", (None, None), 48),
}

Start = Callable[[Path], Iterator[Record]]  # a run folder -> a training


def demo(
    run_dir: str | Path = "runs/demo",
    *,
    scale: str | None = None,
    device: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train both stages, evaluate, sample; leaves pictures, results.json and index.html.

    scale: "cpu" (at most ten minutes of training on two cores), "gpu", "smoke"; by default
    what the device allows. A run that was stopped goes on where it was. Returns the results.
    """
    place = pick_device(device)
    scale = scale or ("gpu" if place.type == "cuda" else "cpu")
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is not known; known: {', '.join(SCALES)}")
    run_dir, plan = Path(run_dir), SCALES[scale]
    print(f"minildm demo: scale {scale}, on {describe(place)}, into {run_dir}", flush=True)

    stage1, stage2 = (
        with_steps(PRESETS[name], steps or PRESETS[name].train.steps, seed=seed)
        for name, steps in zip((plan.first_stage, plan.diffusion), plan.steps, strict=True)
    )
    where, on = run_dir / "first_stage", place.type
    histories = {
        "first stage": _train(
            "first stage",
            lambda folder: train_autoencoder(stage1, run_dir=folder, device=on),
            where,
            stage1.train.steps,
        ),
        "diffusion": _train(
            "diffusion",
            lambda folder: train_ldm(stage2, first_stage=where, run_dir=folder, device=on),
            run_dir / "diffusion",
            stage2.train.steps,
        ),
    }
    started = time.perf_counter()
    results = {
        "scale": scale,
        "seed": seed,
        "device": describe(place),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "experiments": {"first stage": to_dict(stage1), "diffusion": to_dict(stage2)},
        "train_seconds": {k: round(h[-1].seconds, 1) for k, h in histories.items()},
        "train_images": {k: h[-1].images for k, h in histories.items()},
        **_evaluate(run_dir, plan, place, seed, histories),
    }
    results["evaluate_seconds"] = round(time.perf_counter() - started, 1)
    write_json(run_dir / "results.json", results)
    write_report(run_dir, results)
    print(f"done: open {run_dir / 'index.html'}", flush=True)
    return results


def describe(device: torch.device) -> str:
    """The device in words, as in "cpu, 2 threads"."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"{device.type}, {torch.get_num_threads()} threads"


def _train(name: str, start: Start, folder: Path, steps: int) -> list[Record]:
    """Run or go on with a training, behind a progress bar; what it logged."""
    if steps > 100 and not (folder / "training/state.pt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{name}: {estimate(start, steps, folder)}", flush=True)
    for _ in progress(start(folder), steps, name):
        pass
    return read_log(folder)


def estimate(start: Start, steps: int, near: Path, tried: int = 6) -> str:
    """Time and memory of a training, from its first steps; tried in a folder inside `near`."""
    with tempfile.TemporaryDirectory(dir=near) as folder:
        trial = start(Path(folder))
        seconds = [record.seconds for record in islice(trial, tried)]
        trial.close()
    pace = (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1)
    return f"{steps:,} steps, about {pace * steps / 60:.1f} minutes{_memory()}"


def _memory() -> str:
    """The most memory that this process ever held, in words; nothing where no one says."""
    try:
        import resource
    except ImportError:  # Windows has none
        return ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f", {peak / (2**30 if sys.platform == 'darwin' else 2**20):.1f} GB of memory so far"


def _evaluate(
    run_dir: Path,
    plan: Scale,
    place: torch.device,
    seed: int,
    histories: dict[str, list[Record]],
) -> dict[str, Any]:
    """The numbers of results.json, and every picture of the report."""
    plots.save(plots.loss_curves(histories), run_dir / "loss_curves.png")
    judge = pretrained("emoji-judge")
    fresh = load_model(run_dir / "diffusion", kind="latent-diffusion")
    shipped = pretrained("emoji-class")
    val = EmojiDataset("val", fresh.config.image_size)
    x = ev.pictures(val)
    with ev.on_device(fresh, place), ev.on_device(shipped, place):
        results = _first_stage(run_dir, fresh, shipped, x, seed)
        results["judge"] = {
            "what": "how often a classifier names the asked group; mean over groups",
            "guidance_scale": GUIDANCE,
            "sampling_steps": SAMPLE_STEPS,
            "fresh": _class_samples(run_dir, "samples", fresh, judge, plan, seed),
            "shipped": _class_samples(run_dir, "samples_shipped", shipped, judge, plan, seed),
        }
        _trajectory(run_dir, fresh, seed)
    return results


def _first_stage(
    run_dir: Path, fresh: LatentDiffusion, shipped: LatentDiffusion, x: torch.Tensor, seed: int
) -> dict[str, Any]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:8]
    x_rec = ev.reconstruct(fresh.autoencoder, x[order])
    plots.save(
        plots.pairs(x[order], x_rec, psnr=ev.psnr(x[order], x_rec)),
        run_dir / "reconstructions.png",
    )
    measured = {
        "psnr": ev.reconstruction_psnr(fresh.autoencoder, x),
        "psnr_shipped": ev.reconstruction_psnr(shipped.autoencoder, x),
        "psnr_bicubic": ev.bicubic_psnr(x, fresh.autoencoder.f),
    }
    return {
        **{name: round(m.value, 2) for name, m in measured.items()},
        "psnr_intervals": {name: str(m) for name, m in measured.items()},
    }


def _class_samples(
    run_dir: Path, name: str, model: LatentDiffusion, judge: Judge, plan: Scale, seed: int
) -> dict[str, Any]:
    """Sample every class, draw them, and let the judge name their groups; real ones beside."""
    classes = model.config.conditioner.classes
    x = ev.sample_classes(
        model, plan.per_class, steps=SAMPLE_STEPS, guidance_scale=GUIDANCE, seed=seed
    )
    shown = x.unflatten(0, (len(classes), plan.per_class))[:, :SHOWN].flatten(0, 1)
    plots.save(plots.class_grid(shown, classes), run_dir / f"{name}.png")
    found = ev.class_accuracy(model, judge, plan.per_class, x=x)
    groups = {"real": found["per_group_real"], "samples": found["per_group_samples"]}
    plots.save(plots.bars(groups), run_dir / f"{name}_judged.png")
    return {**found, **{f"per_group_{k}": _as_text(v) for k, v in groups.items()}}


def _as_text(measured: dict[str, ev.Measured]) -> dict[str, str]:
    return {name: str(value) for name, value in measured.items()}


@torch.no_grad()
def _trajectory(run_dir: Path, model: LatentDiffusion, seed: int) -> None:
    """Some intermediate states of one sampling, decoded: z_t, and the z0 predicted there."""
    name = model.config.conditioner.classes[0]
    steps = list(model.steps(name, steps=SAMPLE_STEPS, guidance_scale=GUIDANCE, seed=seed))
    chosen = [steps[i] for i in (0, 4, 8, 12, 16, 20, SAMPLE_STEPS - 1)]
    z, z0_hat = (
        torch.cat([model.autoencoder.decode(latent).cpu() for latent in latents]).clamp(-1, 1)
        for latents in ([s.z for s in chosen], [s.z0_hat for s in chosen])
    )
    figure = plots.trajectory(z, [s.t for s in chosen], z0_images=z0_hat)
    plots.save(figure, run_dir / "trajectory.png")
