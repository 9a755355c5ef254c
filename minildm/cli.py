"""The command line: `minildm demo | train | sample | ...`, or `python -m minildm`."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from minildm import evaluation as ev
from minildm import following, plots, processes, restoring
from minildm.autoencoder import Autoencoder
from minildm.checkpoints import Model, load_model, pretrained
from minildm.data.emoji import EmojiDataset
from minildm.demo import SCALES, demo, describe
from minildm.diffusion import LatentDiffusion
from minildm.experiments import AutoencoderExperiment, DataConfig, LatentDiffusionExperiment
from minildm.files import write_json
from minildm.interop.conversion import convert
from minildm.intervals import Evaluation
from minildm.judge import Judge
from minildm.loop import pick_device
from minildm.metrics import evaluate_first_stage
from minildm.presets import PRESETS
from minildm.samplers import SAMPLERS
from minildm.segmenter import Segmenter
from minildm.sweeps import SWEEPS, run_sweep
from minildm.sweeps.command import asked_sweep, report_again
from minildm.training import progress, train_autoencoder, train_judge, train_ldm

app = typer.Typer(
    help="Latent diffusion models (Rombach et al. 2022), small enough to read.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DATA = "emoji, scenes or photos, whole, in place of the preset's"
LAYOUT = (  # brackets before a letter would be markup
    'a JSON file, {"classes": ["dog"], "boxes": [[0.1, 0.5, 0.4, 0.9]]}, or a list of such; '
    "boxes are left, top, right, bottom in shares of the picture"
)
FOLLOWS = {
    "none": "nothing: give --n",
    "class": "classes: give their names",
    "text": "prompts: give some",
    "layout": "layouts: give --layout, and no names",
    "ids": "numbered tokens, which have no place here",
}
MEASURE_AT = (
    "steps to measure at, as 250,500; the last one always is. Default: the sweep's own, those up "
    "to train.steps where --set gives another"
)
Device = Annotated[str | None, typer.Option(help="cuda, mps or cpu; default: the best there is")]
Seed = Annotated[int, typer.Option(help="the same seed, the same result")]


@app.command("demo")
def demo_command(
    run_dir: Annotated[Path, typer.Option(help="where everything goes")] = Path("runs/demo"),
    scale: Annotated[str | None, typer.Option(help=f"one of {', '.join(SCALES)}")] = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Train both stages small on the embedded emoji, judge them, and show pictures."""
    demo(run_dir, scale=scale, device=device, seed=seed)


@app.command()
def train(
    preset: Annotated[str, typer.Argument(help=f"one of {', '.join(PRESETS)}")],
    run_dir: Annotated[Path, typer.Option(help="the run's folder; an unfinished run goes on")],
    first_stage: Annotated[
        Path | None, typer.Option(help="stage 2: the folder of the autoencoder to build on")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="train further: a model's folder to start from")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="optimiser steps")] = None,
    batch_size: Annotated[int | None, typer.Option(help="pictures a step, in all")] = None,
    lr: Annotated[float | None, typer.Option(help="highest learning rate")] = None,
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    folder: Annotated[Path | None, typer.Option(help="train on this folder of pictures")] = None,
    size: Annotated[int | None, typer.Option(help="side of the pictures in pixels")] = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Train a preset: a first stage, a diffusion model on one, or the judge."""
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is not known; known: {', '.join(PRESETS)}")
    experiment = PRESETS[preset]
    asked = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
    changes = {name: value for name, value in asked.items() if value is not None}
    experiment = replace(experiment, train=replace(experiment.train, **changes))
    if data is not None or folder is not None:
        experiment = replace(experiment, data=_data(data, folder, experiment.data.size))
    if size is not None:
        experiment = replace(experiment, data=replace(experiment.data, size=size))
    where = {"run_dir": run_dir, "device": device, "init": init}
    if isinstance(experiment, AutoencoderExperiment):
        records = train_autoencoder(experiment, **where)
    elif isinstance(experiment, LatentDiffusionExperiment):
        if first_stage is None:
            raise ValueError("a diffusion model needs --first-stage, the folder of an autoencoder")
        records = train_ldm(experiment, first_stage=first_stage, **where)
    else:
        records = train_judge(experiment, **where)
    before = getattr(experiment, "alone_steps", 0) if init is None else 0
    for _ in progress(records, before + experiment.train.steps, preset):
        pass
    if processes.is_main():
        typer.echo(f"trained on {describe(pick_device(device))}: {run_dir}")


def _data(kind: str | None, folder: Path | None, size: int) -> DataConfig:
    """What the command line says of the pictures."""
    if folder is None:
        return DataConfig(kind=kind or "emoji", size=size)
    if kind not in (None, "folder"):
        raise ValueError(f"give --data {kind} or --folder {folder}, not both")
    return DataConfig(kind="folder", path=str(folder.resolve()), size=size)


def _model(name: str) -> Model:
    """A model's folder, or the name of one that ships."""
    return load_model(name) if Path(name).is_dir() else pretrained(name)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="a model's folder, or the name of a shipped one")],
    y: Annotated[
        list[str] | None, typer.Argument(help="class names, or prompts; one picture each")
    ] = None,
    layout: Annotated[Path | None, typer.Option(help=LAYOUT)] = None,
    n: Annotated[int, typer.Option(help="pictures of each, or in all without a condition")] = 1,
    out: Annotated[Path, typer.Option(help="the PNG to write")] = Path("samples.png"),
    steps: Annotated[int, typer.Option(help="sampling steps")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="1: the plain conditional")] = 3.0,
    sampler: Annotated[str, typer.Option(help=", ".join(SAMPLERS))] = "ddim",
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Draw pictures: of classes, prompts or layouts, whichever the model follows."""
    loaded = _model(model)
    if not isinstance(loaded, LatentDiffusion):
        raise ValueError(f"model={model!r} is not a diffusion model")
    kind = loaded.config.conditioner.kind
    if (kind == "layout") != (layout is not None) or (y and layout):
        raise ValueError(f"model={model!r} follows {FOLLOWS[kind]}")
    asked: list[Any] = [each for each in _layouts(layout) or y or () for _ in range(n)]
    options = {"steps": steps, "sampler": sampler, "seed": seed}
    if kind != "none":
        options |= {"y": asked or None, "guidance_scale": guidance_scale}
    else:
        options |= {"n": n}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        x = loaded.to(pick_device(device)).sample(**options).cpu()
    for said in dict.fromkeys(str(warning.message) for warning in caught):
        typer.echo(f"minildm: {said}", err=True)  # such as words that it does not know
    names = [a if isinstance(a, str) else ", ".join(name for name, _ in a) for a in asked]
    plots.save(plots.image_grid(x, names or None), out)
    typer.echo(f"{len(x)} pictures: {out}")


def _layouts(path: Path | None) -> list[list[tuple[str, list[float]]]]:
    """Layouts from a file, as `LayoutConditioner.batch_from` takes them; ValueError names it."""
    if path is None:
        return []
    try:
        found = json.loads(path.read_text())
        rows = [
            [(str(c), [float(v) for v in box]) for c, box in zip(*pair, strict=True)]
            for pair in ((one["classes"], one["boxes"]) for one in _as_list(found))
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no layout, {error!r:.80}; needed: {LAYOUT}") from error
    if not rows or not all(rows):
        raise ValueError(f"{path} holds a layout without boxes; needed: {LAYOUT}")
    return rows


def _as_list(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="a model's folder, or the name of a shipped one")],
    out: Annotated[Path | None, typer.Option(help="a JSON file for the numbers")] = None,
    data: Annotated[str | None, typer.Option(help="first stages: emoji, scenes, photos")] = None,
    folder: Annotated[Path | None, typer.Option(help="first stages: your own pictures")] = None,
    size: Annotated[int, typer.Option(help="first stages: side of the pictures")] = 64,
    per_class: Annotated[int, typer.Option(help="samples of each class")] = 24,
    steps: Annotated[int, typer.Option(help="sampling steps")] = 25,
    guidance_scale: Annotated[
        list[float] | None, typer.Option(help="1: the plain conditional; text: several; default 3")
    ] = None,
    n: Annotated[int, typer.Option(help="text, layouts: samples at each guidance scale")] = 128,
    judge: Annotated[
        str | None, typer.Option(help="text, layouts: the judge's folder or name")
    ] = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Measure a model on validation pictures: reconstructions, or what the judge sees."""
    loaded, place = _model(model), pick_device(device)
    if not isinstance(loaded, Autoencoder) and (data is not None or folder is not None):
        raise ValueError("--data and --folder are for first stages; others know their own data")
    with ev.on_device(loaded, place):
        if isinstance(loaded, Autoencoder):
            val = _data(data, folder, size).dataset("val")
            clusters = getattr(
                val, "photo_ids", None
            )  # crops of one photograph are not independent
            found = evaluate_first_stage(loaded, val.images, clusters=clusters, seed=seed)
            results = {"data": val.name, "size": size}
            results |= {name: str(measured) for name, measured in found.items()} | found.as_dict()
        elif isinstance(loaded, LatentDiffusion):
            scales, sampling = guidance_scale or [3.0], {"steps": steps, "seed": seed}
            conditioner = loaded.config.conditioner
            if conditioner.concat != "none":
                results = _restored(loaded, judge, n, sampling)
            elif conditioner.kind in ("text", "layout"):
                results = _followed(loaded, judge, n, scales, sampling)
            elif conditioner.kind != "class":
                raise ValueError(f"a model of kind {conditioner.kind!r} has nothing to judge it by")
            else:
                results = ev.class_accuracy(
                    loaded, _judge(judge), per_class, guidance_scale=scales[-1], **sampling
                )
        elif isinstance(loaded, Segmenter):
            results = _told(restoring.evaluate_segmenter(loaded, n))
        else:
            results = ev.judge_accuracy(loaded)
    for name in ("per_group_samples", "per_group_real"):
        if name in results:
            results[name] = {group: str(measured) for group, measured in results[name].items()}
    results = {"model": model, "device": describe(place), "seed": seed, **results}
    typer.echo(json.dumps(results, indent=2))
    if out is not None:
        write_json(out, results)


def _judge(name: str | None, default: str = "emoji-judge") -> Judge:
    """The judge asked for, or the shipped one."""
    found = _model(name or default)
    if not isinstance(found, Judge):
        raise ValueError(f"judge={name!r} is not a judge")
    return found


def _followed(
    model: LatentDiffusion, judge: str | None, n: int, scales: list[float], sampling: dict[str, int]
) -> dict[str, Any]:
    """Whether samples show what their captions or layouts ask for, for each guidance scale."""
    if model.config.conditioner.kind == "text":
        found = following.evaluate_text(model, _judge(judge), n, scales, **sampling)
    else:
        crops = _judge(judge, "scenes-judge")
        found = following.evaluate_layout(model, crops, n, scales, **sampling)
    return {name: _told(each) for name, each in found.items()}


def _restored(
    model: LatentDiffusion, judge: str | None, n: int, sampling: dict[str, int]
) -> dict[str, Any]:
    """How true samples are to the pictures or maps that they were given, beside rivals."""
    if model.config.conditioner.concat == "semantic":
        segmenter = _model(judge) if judge else None
        if not isinstance(segmenter, Segmenter):
            raise ValueError(
                f"judge={judge!r}: maps are judged by a segmenter, as the preset "
                "'scenes-segmenter' trains it; give its folder"
            )
        return _told(restoring.evaluate_semantic(model, segmenter, n, **sampling))
    val = EmojiDataset("val", model.config.image_size)
    _, x = following.emoji_prompts(val, n, seed=sampling["seed"])
    found = restoring.evaluate_restoration(model, x, **sampling)
    return {name: _told(each) for name, each in found.items()}


def _told(found: Evaluation) -> dict[str, Any]:
    """Measurements as they are read, and as they are kept."""
    return {key: str(value) for key, value in found.items()} | found.as_dict()


@app.command("convert")
def convert_model(
    source: Annotated[
        str,
        typer.Argument(
            help="an official .ckpt or .safetensors, a diffusers folder, a model's folder or name"
        ),
    ],
    target: Annotated[Path, typer.Argument(help="what to write; it must not be there yet")],
    to: Annotated[
        str | None,
        typer.Option(help="minildm, diffusers or compvis; default: minildm for what others made"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="the official YAML, if it is not beside the checkpoint")
    ] = None,
    clip: Annotated[
        Path | None, typer.Option(help="Stable Diffusion: the folder of CLIP's words and config")
    ] = None,
) -> None:
    """Read a model of one project and write it as another's reads it."""
    form, to = convert(source, target, to=to, config=config, clip=clip)
    typer.echo(f"{source} ({form}) -> {target} ({to})")


@app.command()
def sweep(
    what: Annotated[str, typer.Argument(help=f"one of {', '.join(SWEEPS)}; or a TOML file")],
    out: Annotated[Path | None, typer.Option(help="the folder; default: runs/sweep-NAME")] = None,
    jobs: Annotated[int | None, typer.Option(help="runs at once; default: one a device")] = None,
    device: Annotated[
        list[str] | None, typer.Option(help="cuda:0, cuda:1, mps, cpu; may be given again")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads of a run")] = 1,
    level: Annotated[list[str] | None, typer.Option(help="do this level now, no other")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="do this seed now, no other")] = None,
    seeds: Annotated[int | None, typer.Option(help="how many seeds in all, from 0")] = None,
    samples: Annotated[int | None, typer.Option(help="pictures each is measured on")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="for all levels, as train.steps=500")
    ] = None,
    measure_at: Annotated[list[str] | None, typer.Option(help=MEASURE_AT)] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="address of a Dask cluster, in place of --jobs and --device")
    ] = None,
    report: Annotated[bool, typer.Option(help="run nothing: table and report anew")] = False,
) -> None:
    """Ablate a factor: every level with every seed; one table, figures, a report."""
    fields = {"seeds": seeds, "samples": samples, "measure_at": measure_at or ()}
    asked = asked_sweep(what, change or (), **fields)
    folder = out or Path("runs") / f"sweep-{asked.name}"
    if report:
        where = {"device": device[0] if device else "", "threads": threads, "say": typer.echo}
        table, page = report_again(asked, folder, **where)
        typer.echo(f"{table}, {page}")
        return
    done = run_sweep(
        asked,
        folder,
        jobs=jobs,
        devices=device or (),
        threads=threads,
        levels=level,
        seeds=seed,
        scheduler=scheduler,
        say=typer.echo,
    )
    typer.echo(f"{done.table}, {done.report}")
    if done.failed:
        typer.echo(f"{len(done.failed)} of {len(done.outcomes)} runs failed", err=True)
        raise typer.Exit(1)


def main() -> None:
    """Run the command line; what is wrong with the input ends in one clear line."""
    try:
        app()
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        typer.secho(f"minildm: {error}", fg=typer.colors.RED, err=True)
        raise SystemExit(2) from None
    except SystemExit as stop:
        if stop.code == 130:  # Ctrl-C, as typer reports it
            typer.echo("\nstopped; the same command goes on from the last checkpoint", err=True)
        raise
