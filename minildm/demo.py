"""The main job: train both stages small on the embedded emoji, evaluate, sample, show."""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from minildm.conditioning import look_up
from minildm.data.dataset import as_float
from minildm.data.emoji import EmojiDataset
from minildm.data.transforms import enlarge, shrink
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.evaluation.following import evaluate_classes
from minildm.evaluation.intervals import Measured, mean_interval, proportion_interval
from minildm.evaluation.metrics import psnr, reconstruct
from minildm.files import write_json
from minildm.teaching import plots
from minildm.training.checkpoint import load_model, pretrained
from minildm.training.configs import override
from minildm.training.loop import describe, pick_device
from minildm.training.presets import PRESETS
from minildm.training.stages import finish, train_autoencoder, train_ldm

SHOWN = 8  # samples of a class in the figure
SCALES = {  # the presets of both stages, samples of a class, which held-out images to measure
    "smoke": ("emoji-kl-f4", "emoji-class", 1, 8),  # only the mechanics: four steps, one style
    "cpu": ("emoji-kl-f4", "emoji-class", 24, 1),  # every single one
    "gpu": ("emoji-kl-f4-gpu", "emoji-class-gpu", 48, 1),
}
TITLES = {
    "samples": "Samples of the model just trained, one row a class",
    "samples_shipped": "The same of the shipped model, trained longer",
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
    look_up(scale, list(SCALES), "scale")
    *presets, per_class, every = SCALES[scale]
    print(f"minildm demo: scale {scale}, on {describe(place)}, into {run_dir}", flush=True)
    changes = {"train.seed": seed}
    if scale == "smoke":
        changes |= {"train.steps": 4, "data.styles": ["fluent3d"]}
    first, second = (override(PRESETS[name], changes) for name in presets)
    first = override(first, {"kl_weight": 0.1})  # noise on such latents does less harm
    stage, model = run_dir / "first_stage", run_dir / "diffusion"
    records = train_autoencoder(first, run_dir=stage, device=device)
    histories = {"first stage": finish(records, first.train.steps, "first stage")}
    records = train_ldm(second, first_stage=stage, run_dir=model, device=device)
    histories["diffusion"] = finish(records, second.train.steps, "diffusion")
    results: dict[str, Any] = {
        "scale": scale,
        "seed": seed,
        "device": describe(place),
        "train_seconds": {name: round(h[-1].seconds, 1) for name, h in histories.items()},
    }
    measured, figures = _evaluate(load_model(model).to(place), per_class, every, seed)
    results |= {name: round(value.value, 3) for name, value in measured.items()}
    results["intervals"] = {name: str(value) for name, value in measured.items()}
    write_json(run_dir / "results.json", results)
    figures["loss_curves"] = plots.loss_curves(histories)
    seconds = ", ".join(f"{k} {s / 60:.1f} min" for k, s in results["train_seconds"].items())
    shown = {"device": results["device"], "training": seconds} | results["intervals"]
    top = pd.Series(shown).rename(lambda name: name.replace("_", " ")).to_frame()
    top = top.to_html(header=False, border=0)
    top += '<p>All numbers: <a href="results.json">results.json</a>.</p>'
    plots.save_page(run_dir, "minildm: a latent diffusion model, trained here", top, figures)
    print(f"done: open {run_dir / 'index.html'}", flush=True)
    return results


def _roughness(x: Tensor, f: int) -> Tensor:
    """What x (N, 3, H, W) loses when it is shrunk f times and enlarged again: (N,)."""
    return (x - enlarge(shrink(x, f), f)).abs().mean((1, 2, 3))


@torch.no_grad()
def _evaluate(
    fresh: LatentDiffusion, per_class: int, every: int, seed: int
) -> tuple[dict[str, Measured], dict[str, plots.NotebookFigure]]:
    """Measure and draw the fresh model, and the shipped one for comparison."""
    models = {"samples": fresh, "samples_shipped": pretrained("emoji-class").to(fresh.device)}
    x = as_float(EmojiDataset("val", fresh.config.image_size).images)
    shown = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:8]]
    x, x_rec, f = x[::every], reconstruct(fresh.autoencoder, shown), fresh.autoencoder.f
    figures, classifier = {}, pretrained("emoji-classifier").to(fresh.device)
    measured = {"psnr_bicubic": mean_interval(psnr(x, enlarge(shrink(x, f), f)))}
    for name, model in models.items():
        x_ae = reconstruct(model.autoencoder, x)
        measured[f"psnr_{name}"] = mean_interval(psnr(x, x_ae))
        classes = model.config.conditioner.classes
        y = [c for c in classes for _ in range(per_class)]
        drawn = model.sample(y, seed=seed, steps=25).cpu()
        rows = drawn.unflatten(0, (len(classes), per_class))[:, :SHOWN].flatten(0, 1)
        figures[name] = plots.class_grid(rows, classes, title=TITLES[name])
        noisy = _roughness(drawn, f) > _roughness(x_ae, f).quantile(0.99)  # than real images
        measured[f"noise_{name}"] = proportion_interval(int(noisy.sum()), len(drawn))
        found = evaluate_classes(model, classifier, drawn)
        measured |= {f"accuracy_{name}": found["accuracy"], "accuracy_real": found["accuracy_real"]}
    rows, heads = ("held out", "reconstruction"), [f"{p:.1f} dB" for p in psnr(shown, x_rec)]
    figures["reconstructions"] = plots.class_grid(torch.cat([shown, x_rec]), rows, heads=heads)
    return measured, figures
