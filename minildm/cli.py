"""The command line: `minildm demo | train | sample | reconstruct | evaluate | convert | sweep`."""

import json
import os
import tomllib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils.data import default_collate

from minildm.conditioning import look_up
from minildm.data.dataset import as_float
from minildm.data.folder import read_image, read_map
from minildm.files import data_dir, write_json
from minildm.training.checkpoint import find_model, load_model, read_card
from minildm.training.configs import (
    AutoencoderExperiment,
    DataConfig,
    LatentDiffusionExperiment,
    from_dict,
    override,
    to_dict,
)
from minildm.training.loop import describe, pick_device
from minildm.training.presets import PRESETS

app = typer.Typer(
    help="Latent diffusion models (Rombach et al. 2022), small enough to read.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

LAYOUT = (
    'a JSON file, {"classes": ["dog"], "boxes": [[0.1, 0.5, 0.4, 0.9]]}, or a list of such; '
    "boxes are left, top, right, bottom as fractions of the image"
)
ModelName = Annotated[str, typer.Argument(help="a model's folder, or the name of a shipped one")]
Device = Annotated[str | None, typer.Option(help="cuda, cuda:1, mps or cpu; default: the best")]
SEEDS = {"min": -(2**63), "max": 2**63 - 1}  # what torch takes
Seed = Annotated[int, typer.Option(help="the same seed gives the same result", **SEEDS)]
Size = Annotated[int | None, typer.Option(min=8, help="side of the images; default: the model's")]
Set = Annotated[list[str] | None, typer.Option("--set", help="a field, as data.size=128")]


@app.command("demo")
def demo_command(
    run_dir: Annotated[Path, typer.Option(help="where everything goes")] = Path("runs/demo"),
    scale: Annotated[str | None, typer.Option(help="smoke, cpu or gpu")] = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Train both stages small on the embedded emoji, evaluate them, and show images."""
    from minildm.demo import demo

    demo(run_dir, scale=scale, device=device, seed=seed)


@app.command()
def train(
    preset: Annotated[str, typer.Argument(help=f"one of {', '.join(PRESETS)}")],
    run_dir: Annotated[Path, typer.Option(help="the run's folder; an unfinished run continues")],
    first_stage: Annotated[str | None, typer.Option(help="stage 2: folder or name")] = None,
    init: Annotated[Path | None, typer.Option(help="the model's folder to start from")] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps")] = None,
    batch_size: Annotated[int | None, typer.Option(help="images a step, in all")] = None,
    lr: Annotated[float | None, typer.Option(help="highest learning rate")] = None,
    folder: Annotated[Path | None, typer.Option(help="train on this folder of images")] = None,
    change: Set = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Train a preset: a first stage, a diffusion model on one, or a classifier."""
    from minildm.training import stages

    look_up(preset, list(PRESETS), "preset")
    experiment, place = PRESETS[preset], pick_device(device)
    fields = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
    changes = {f"train.{name}": value for name, value in fields.items() if value is not None}
    if folder is not None:
        own = {"kind": "folder", "path": str(folder.resolve())}
        changes["data"] = own | {"size": experiment.data.size}
    experiment = override(experiment, changes | _settings(change))
    if experiment.train.steps < (warm := experiment.train.warmup_steps):
        said = f"{experiment.train.steps} steps end within train.warmup_steps={warm}"
        typer.echo(f"minildm: {said}: the learning rate does not reach its full value", err=True)
    options: dict[str, Any] = {"run_dir": run_dir, "device": device, "init": init}
    if isinstance(experiment, AutoencoderExperiment):
        records = stages.train_autoencoder(experiment, **options)
    elif isinstance(experiment, LatentDiffusionExperiment):
        if first_stage is None:
            raise ValueError("a diffusion model requires --first-stage, an autoencoder's folder")
        records = stages.train_ldm(experiment, first_stage=find_model(first_stage), **options)
    else:
        records = stages.train_classifier(experiment, **options)
    stages.finish(records, experiment.train.steps, preset)
    typer.echo(f"trained on {describe(place)}: {run_dir}")


def _settings(texts: list[str] | None) -> dict[str, Any]:
    """--set NAME=VALUE: a number, list or truth value as in TOML, else a word."""
    found = {}
    for text in texts or ():
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise ValueError(f"--set {text!r} must be NAME=VALUE, as in train.steps=500")
        try:
            found[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name] = value
    return found


@app.command()
def sample(
    model: ModelName,
    y: Annotated[list[str] | None, typer.Argument(help="class names, or prompts")] = None,
    layout: Annotated[Path | None, typer.Option(help=LAYOUT)] = None,
    image: Annotated[Path | None, typer.Option(help="to enlarge, or to inpaint")] = None,
    mask: Annotated[Path | None, typer.Option(help="white where to inpaint; else random")] = None,
    map_: Annotated[Path | None, typer.Option("--map", help="whose grey levels are labels")] = None,
    n: Annotated[int, typer.Option(min=1, help="images a condition, or in all without one")] = 1,
    index: Annotated[int | None, typer.Option(min=0, help="only this image of all, from 0")] = None,
    size: Size = None,
    out: Annotated[Path, typer.Option(help=".png, .jpg or .webp")] = Path("samples.png"),
    steps: Annotated[int | None, typer.Option(help="sampling steps; default: the model's")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1: plain conditional")] = None,
    sampler: Annotated[str | None, typer.Option(help="ddim, ddpm, plms, ...")] = None,
    precision: Annotated[str, typer.Option(help="fp32, or bf16: faster, other images")] = "fp32",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Sample images of classes, prompts or layouts; of maps or images, by default held-out ones."""
    from minildm.evaluation.following import pasted
    from minildm.teaching import plots

    _check_image(out)
    folder = find_model(model)
    loaded = load_model(folder, kind="latent-diffusion")
    kind, reads = loaded.config.conditioner.kind, {"layout": {layout}, "semantic": {map_}}
    reads |= {"low_res": {image}, "inpaint": {image, mask}}
    if unread := {layout, image, mask, map_} - reads.get(kind, set()) - {None}:
        raise ValueError(f"the condition {kind!r} does not read {', '.join(map(str, unread))}")
    texts = [*(y or ()), *(str(file) for file in (layout, image, map_) if file)]
    found = _conditions(loaded, folder, texts, mask, size, n, seed)
    options = {"sampler": sampler, "steps": steps, "guidance_scale": guidance_scale, "size": size}
    options |= {"precision": precision, "seed": seed}
    if index is not None:
        if index >= len(found):
            raise ValueError(f"--index {index} must be below {len(found)}, the number of images")
        found, n, options["first"] = [found[index]], 1, index
    names, given = zip(*found, strict=True)
    images = default_collate(given) if isinstance(given[0], dict) else {}
    given = images or (None if given[0] is None else list(given))
    x = loaded.to(pick_device(device)).sample(given, n=len(found), **options)
    grid = {"rows": names[::n]} if any(names) and 1 < n <= 16 else {"titles": names}
    grid |= {"columns": max(8, round(len(x) ** 0.5)), "scale": max(1.1, x.shape[-1] / plots.DPI)}
    plots.save(plots.image_grid(pasted(x, images), **grid), out)
    typer.echo(f"{len(x)} images: {out}")


def _check_image(out: Path) -> None:
    """Raise ValueError for an image that cannot be written, before the work for it begins."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix.lower() not in (".png", ".jpg", ".webp") or not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out} must end in .png, .jpg or .webp, in a folder to write in")


def _trained_on(folder: Path) -> DataConfig | None:
    """The data of a model's training, as its card has it; None of a shipped model."""
    content = read_card(folder)["info"].get("data_config")
    return content and from_dict(DataConfig, content)


def _conditions(
    model: Any, folder: Path, y: list[str], mask: Path | None, size: int | None, n: int, seed: int
) -> list[tuple[str, Any]]:
    """A name and a condition for each image: n of each word or file in y; held-out ones without."""
    from minildm.evaluation.following import draw_conditions, given_of

    kind, side = model.config.conditioner.kind, size or model.config.image_size
    if not (y or mask) and kind in ("low_res", "inpaint", "semantic"):
        data = _trained_on(folder)
        drawn, _, _ = draw_conditions(model, n, seed, data and data.dataset("val"))
        rows = zip(*drawn.values(), strict=True)
        return [("", dict(zip(drawn, row, strict=True))) for row in rows]
    found: list[tuple[str, Any]] = []
    for text in y:
        if kind == "layout":
            found += [(", ".join(k for k, _ in c), c) for c in _layouts(Path(text))]
        elif kind == "semantic":
            labels = read_map(Path(text), side, len(model.config.conditioner.labels))
            found.append((text, {"semantic": labels}))
        elif kind in ("low_res", "inpaint"):
            x = as_float(read_image(Path(text), side))[None]
            given = given_of(x, kind, model.autoencoder.f, seed=seed)
            given |= {"mask": (read_image(mask, side)[None, :1] < 128).float()} if mask else {}
            found.append((text, {key: rows[0] for key, rows in given.items()}))
        else:
            found.append((text, text))
    return [each for each in found for _ in range(n)] or [("", None)] * n


def _layouts(path: Path) -> list[list[tuple[str, list[float]]]]:
    """Layouts from a file, as `sample` takes them. Raises ValueError naming the file."""
    try:
        found = json.loads(path.read_text())
        found = found if isinstance(found, list) else [found]
        return [list(zip(one["classes"], one["boxes"], strict=True)) for one in found]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a layout ({error!r:.80}); required: {LAYOUT}") from error


@app.command()
def reconstruct(
    model: ModelName,
    images: Annotated[list[Path], typer.Argument(help="image files")],
    size: Size = None,
    out: Annotated[Path, typer.Option(help=".png, .jpg or .webp")] = Path("reconstructions.png"),
    device: Device = None,
) -> None:
    """Encode and decode images by a first stage: each above its reconstruction."""
    from minildm.evaluation import metrics
    from minildm.teaching import plots

    _check_image(out)
    folder = find_model(model)
    autoencoder = load_model(folder, kind="autoencoder").to(pick_device(device))
    side = size or (_trained_on(folder) or DataConfig()).size
    x = as_float(torch.stack([read_image(file, side) for file in images]))
    pairs = torch.cat([x, metrics.reconstruct(autoencoder, x)])
    grid = {"rows": ("input", "reconstruction"), "scale": max(1.1, side / plots.DPI)}
    plots.save(plots.image_grid(pairs, **grid), out)
    typer.echo(f"{len(x)} images: {out}")


@app.command()
def evaluate(
    model: ModelName,
    out: Annotated[Path | None, typer.Option(help="a JSON file for the numbers")] = None,
    folder: Annotated[Path | None, typer.Option(help="measure on this folder of images")] = None,
    split: Annotated[str, typer.Option(help="val: held-out images; all")] = "val",
    per_class: Annotated[int, typer.Option(help="classes: samples of each")] = 24,
    n: Annotated[int, typer.Option(min=2, help="others: samples at each guidance scale")] = 128,
    steps: Annotated[int, typer.Option(help="sampling steps")] = 25,
    guidance_scale: Annotated[list[float], typer.Option(help="may be repeated")] = (3.0,),
    classifier: Annotated[str | None, typer.Option(help="its folder or name")] = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Measure a model on held-out images of its data: reconstructions, samples or answers."""
    from minildm.evaluation.following import evaluate_model

    place, path = pick_device(device), find_model(model)
    images = _trained_on(path)
    if folder is not None:
        images = replace(images or DataConfig(), kind="folder", path=str(folder.resolve()))
    elif not images and path.resolve().parent != (data_dir() / "weights").resolve():
        raise ValueError(f"{path} does not say what it was trained on: give --folder")
    options = {"per_class": per_class, "n": n, "guidance_scale": guidance_scale, "steps": steps}
    if classifier is not None:
        options["classifier"] = load_model(find_model(classifier)).to(place)
    trained = load_model(path).to(place)
    found = evaluate_model(trained, data=images, split=split, seed=seed, **options)
    for name, evaluation in found.items():
        typer.echo(f"{name}\n{evaluation}\n")
    if out is not None:
        results = {"model": model, "device": describe(place), "seed": seed, "split": split}
        results["data"] = images and to_dict(images)
        write_json(out, results | {"evaluations": {k: e.as_dict() for k, e in found.items()}})


@app.command("convert")
def convert_model(
    source: Annotated[str, typer.Argument(help="an official checkpoint, or a model's folder")],
    target: Annotated[Path, typer.Argument(help="what to write; it must not exist yet")],
    to: Annotated[str, typer.Option(help="minildm, diffusers or compvis")] = "minildm",
    config: Annotated[Path | None, typer.Option(help="the official YAML, if elsewhere")] = None,
    clip: Annotated[Path | None, typer.Option(help="Stable Diffusion: CLIP's folder")] = None,
) -> None:
    """Read a model of one project and write it for another."""
    from minildm.interop import convert

    form, to = convert(source, target, to=to, config=config, clip=clip)
    typer.echo(f"{source} ({form}) -> {target} ({to})")


@app.command()
def sweep(
    what: Annotated[str, typer.Argument(help="a name in notebooks/sweeps, a TOML file, a folder")],
    out: Annotated[Path | None, typer.Option(help="the folder; default: runs/sweep-NAME")] = None,
    jobs: Annotated[int | None, typer.Option(help="runs at once; default: one a device")] = None,
    device: Annotated[list[str] | None, typer.Option(help="may be repeated: cuda:0, cpu")] = None,
    level: Annotated[list[str] | None, typer.Option(help="run only this level")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="run only this seed")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="how many seeds, from 0")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="of each measurement")] = None,
    change: Set = None,
    measure_at: Annotated[list[int] | None, typer.Option(help="a step; may be repeated")] = None,
    scheduler: Annotated[str | None, typer.Option(help="address of a Dask scheduler")] = None,
    report: Annotated[bool, typer.Option(help="only collect table and report")] = False,
) -> None:
    """Ablate a factor: every level with every seed; one table, figures, a report."""
    from minildm.sweeps import run_sweep
    from minildm.sweeps.report import write_report
    from minildm.sweeps.sweep import DEFINITION, read_sweep

    own = Path(what, DEFINITION).is_file()  # a sweep's folder
    folder = out or Path(what if own else f"runs/sweep-{Path(what).stem}")
    source = folder if report and (folder / DEFINITION).is_file() else what
    given = {"samples": samples, "measure_at": tuple(measure_at or ())}
    given["seeds"] = tuple(seed or range(seeds or 0))
    fields = {name: value for name, value in given.items() if value}
    definition = replace(read_sweep(source).changed(_settings(change)), **fields)
    failed = {}
    if report and not write_report(definition, folder, failed):
        raise typer.Exit(1)
    if not report:
        options = {"jobs": jobs, "levels": level, "scheduler": scheduler}
        options |= {"devices": device or (), "say": typer.echo}
        failed = run_sweep(definition, folder, **options)
    typer.echo(f"{folder / 'table.csv'}, {folder / 'index.html'}")
    if failed:
        typer.echo(f"{len(failed)} failed", err=True)
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; bad input ends in one sentence and exit status 2."""
    warnings.showwarning = lambda message, *_: typer.echo(f"minildm: {message}", err=True)
    try:
        app()
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        typer.secho(f"minildm: {error}", fg=typer.colors.RED, err=True)
        raise SystemExit(2) from None
    except SystemExit as stop:
        if stop.code == 130:  # Ctrl-C, as typer reports it
            typer.echo("\nstopped; the same command continues from the last checkpoint", err=True)
        raise
