"""The main job: train both stages small on the embedded emoji, evaluate, sample, show."""

import html
from pathlib import Path
from typing import Any

import torch

from minildm.data.dataset import as_float
from minildm.data.emoji import EmojiDataset
from minildm.data.transforms import enlarge, shrink
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.evaluation.following import evaluate_classes
from minildm.evaluation.image_metrics import psnr, reconstruct
from minildm.evaluation.intervals import mean_interval
from minildm.files import atomic_write, write_json
from minildm.teaching import plots
from minildm.training.checkpoint import load_model, pretrained, read_log
from minildm.training.configs import with_steps
from minildm.training.loop import describe, pick_device
from minildm.training.presets import PRESETS
from minildm.training.stages import progress, train_autoencoder, train_ldm

SAMPLING: dict[str, Any] = {"steps": 25, "guidance_scale": 3.0}
SHOWN = 8  # samples of a class in the figure
SCALES = {  # the presets of both stages, their steps (None: the preset's), samples of a class
    "smoke": ("emoji-kl-f4", "emoji-class", 4, 1),  # only the mechanics, in seconds
    "cpu": ("emoji-kl-f4", "emoji-class", None, 24),
    "gpu": ("emoji-kl-f4-gpu", "emoji-class-gpu", None, 48),
}
FIGURES = {
    "samples": "Samples of the model just trained, one row a class.",
    "samples_shipped": "The same from the shipped model, trained longer.",
    "trajectory": "One sampling, from noise to image: z_t, and the z0 predicted at each t.",
    "reconstructions": "Held-out emoji, and their reconstructions by the first stage.",
    "loss_curves": "The losses of both stages.",
    "accuracy": "How often a classifier names the requested group.",
}


def demo(
    run_dir: str | Path = "runs/demo",
    *,
    scale: str | None = None,
    device: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train both stages, evaluate, sample; writes images, results.json and index.html.

    scale: "cpu" (at most eight minutes of training on two cores), "gpu" or "smoke"; default:
    what the device allows. A run that was stopped continues. Returns the results.
    Raises ValueError for another scale.
    """
    place, run_dir = pick_device(device), Path(run_dir)
    scale = scale or ("gpu" if place.type == "cuda" else "cpu")
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is not known; known: {', '.join(SCALES)}")
    *presets, steps, per_class = SCALES[scale]
    print(f"minildm demo: scale {scale}, on {describe(place)}, into {run_dir}", flush=True)
    first, second = (
        with_steps(PRESETS[name], steps or PRESETS[name].train.steps, seed=seed) for name in presets
    )
    stage, model = run_dir / "first_stage", run_dir / "diffusion"
    records = train_autoencoder(first, run_dir=stage, device=device)
    for _ in progress(records, first.train.steps, "first stage"):
        pass
    records = train_ldm(second, first_stage=stage, run_dir=model, device=device)
    for _ in progress(records, second.train.steps, "diffusion"):
        pass
    histories = {"first stage": read_log(stage), "diffusion": read_log(model)}
    results: dict[str, Any] = {
        "scale": scale,
        "seed": seed,
        "device": describe(place),
        "train_seconds": {name: round(h[-1].seconds, 1) for name, h in histories.items()},
    }
    results |= _evaluate(run_dir, load_model(model).to(place), per_class, seed)
    plots.save(plots.loss_curves(histories), run_dir / "loss_curves.png")
    write_json(run_dir / "results.json", results)
    _write_page(run_dir, results)
    print(f"done: open {run_dir / 'index.html'}", flush=True)
    return results


@torch.no_grad()
def _evaluate(run_dir: Path, fresh: LatentDiffusion, per_class: int, seed: int) -> dict[str, Any]:
    """Measure and draw the fresh model, and the shipped one for comparison."""
    models = {"samples": fresh, "samples_shipped": pretrained("emoji-class").to(fresh.device)}
    x = as_float(EmojiDataset("val", fresh.config.image_size).images)
    shown = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:8]]
    x_rec = reconstruct(fresh.autoencoder, shown)
    figure = plots.pairs(shown, x_rec, psnr=psnr(shown, x_rec))
    plots.save(figure, run_dir / "reconstructions.png")
    f = fresh.autoencoder.f
    measured = {"psnr_bicubic": mean_interval(psnr(x, enlarge(shrink(x, f), f)))}
    classifier, accuracy = pretrained("emoji-classifier").to(fresh.device), {}
    for name, model in models.items():
        measured[f"psnr_{name}"] = mean_interval(psnr(x, reconstruct(model.autoencoder, x)))
        classes = model.config.conditioner.classes
        y = [c for c in classes for _ in range(per_class)]
        drawn = model.sample(y, seed=seed, **SAMPLING).cpu()
        rows = drawn.unflatten(0, (len(classes), per_class))[:, :SHOWN].flatten(0, 1)
        plots.save(plots.class_grid(rows, classes), run_dir / f"{name}.png")
        found = evaluate_classes(model, classifier, drawn)
        measured[f"accuracy_{name}"] = found["accuracy"]
        accuracy[name.replace("_", ", ")] = found["accuracy"]
        measured["accuracy_real"] = accuracy["held-out emoji"] = found["accuracy_real"]
    plots.save(plots.bars(accuracy, chance=1 / 6), run_dir / "accuracy.png")
    name, decode = fresh.config.conditioner.classes[0], fresh.autoencoder.decode
    steps = list(fresh.steps(name, seed=seed, **SAMPLING))[::4]
    z = decode(torch.cat([step.z for step in steps]))
    z0_hat = decode(torch.cat([step.z0_hat for step in steps]))
    figure = plots.trajectory(z, [step.t for step in steps], z0_images=z0_hat)
    plots.save(figure, run_dir / "trajectory.png")
    numbers = {name: round(value.value, 3) for name, value in measured.items()}
    return {**numbers, "intervals": {name: str(value) for name, value in measured.items()}}


def _write_page(run_dir: Path, results: dict[str, Any]) -> None:
    """index.html next to the images it shows; it needs no network."""
    seconds = ", ".join(f"{k} {s / 60:.1f} min" for k, s in results["train_seconds"].items())
    lines = {"device": results["device"], "training": seconds, **results["intervals"]}
    cells = "".join(f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in lines.items())
    figures = "".join(
        f'<figure><img src="{name}.png" alt="{text}"><figcaption>{text}</figcaption></figure>'
        for name, text in FIGURES.items()
    )
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>minildm demo</title>
<style>body {{ font: 16px/1.5 system-ui; max-width: 60rem; margin: 2rem auto }}
img {{ max-width: 100% }} th {{ text-align: left; padding-right: 1rem }}</style>
<h1>minildm: a latent diffusion model, trained here</h1>
<table>{cells}</table>
{figures}
<p>All numbers: <a href="results.json">results.json</a>. Checkpoints: <code>first_stage/</code>
and <code>diffusion/</code>.</p>
</html>
"""
    with atomic_write(run_dir / "index.html") as file:
        file.write(page.encode())
