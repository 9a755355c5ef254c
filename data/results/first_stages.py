"""The paper's Tab. 8 on our data: `python data/results/first_stages.py runs/ladder`.

Trains each first stage of `minildm.presets.LADDER` into RUNS/NAME, and measures it and pixel
space (f = 1) on validation emoji and on crops of the validation photographs, which none of them
was trained on, nor on any photograph. Writes, here or into --out:

    tab8_first_stage.csv        a row for each number: model, data, metric, value, interval, N
    tab8_reconstructions.png    a few pictures through each

What is trained or measured (RUNS/NAME/measured.json) is not done again, an interrupted training
goes on; --finished trains none and measures those that are there. `seconds` is how long the
training took by the clock, beside whatever else the machine did. --steps, --size, --subgroup and
--pictures are for a quick try.
"""

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm.auto import tqdm

from minildm import Autoencoder, EmojiDataset, PhotoDataset, load_model, plots, train_autoencoder
from minildm.checkpoints import fingerprint, read_card
from minildm.demo import describe
from minildm.experiments import AutoencoderExperiment
from minildm.files import atomic_write, write_csv, write_json
from minildm.loop import pick_device
from minildm.metrics import Evaluation, evaluate_first_stage, reconstruct
from minildm.presets import LADDER, PIXELS
from minildm.runs import read_log
from minildm.training import progress, with_steps

HERE = Path(__file__).resolve().parent
TABLE, PICTURE = "tab8_first_stage.csv", "tab8_reconstructions.png"
COLUMNS = (
    *("model", "regularizer", "f", "c", "codes", "parameters"),
    *("seed", "steps", "images", "seconds"),  # of the training
    *("data", "features", "metric", "value", "low", "high", "n", "clusters", "device"),
)
ON_FEATURES = ("proxy_r_fid", "r_fid", "kid", "precision", "recall")
EMOJI, PHOTOS = (2, 3, 6), (5, 17)  # which of a random order are shown


def experiments(args: argparse.Namespace) -> dict[str, AutoencoderExperiment]:
    """The rungs asked for, as the presets have them but for what the command line changes."""
    unknown = sorted(set(args.only or ()) - LADDER.keys())
    if unknown:
        raise SystemExit(f"--only {', '.join(unknown)}: not known; known: {', '.join(LADDER)}")
    found = {}
    for name in args.only or LADDER:
        rung = with_steps(LADDER[name], args.steps or LADDER[name].train.steps)
        data = replace(rung.data, size=args.size, subgroups=tuple(args.subgroup or ()))
        found[name] = replace(rung, data=data)
    return found


def train(rung: AutoencoderExperiment, run_dir: Path, device: str | None) -> None:
    """Train what is left to train of a rung; another experiment in that folder: ValueError."""
    records = train_autoencoder(rung, run_dir=run_dir, device=device)
    for _ in progress(records, rung.train.steps, run_dir.name):
        pass


def is_finished(run_dir: Path) -> bool:
    """Whether a training there came to its end, the latents' scale measured."""
    there = (run_dir / "config.json").is_file()
    return there and "unfinished" not in read_card(run_dir)["info"]


class Pictures(NamedTuple):
    """Validation pictures, and which of them belong together and are not independent."""

    x: Tensor  # (N, 3, S, S) uint8
    clusters: Tensor  # (N,) int64: the styles of one emoji, the crops of one photograph


def pictures(size: int, n: int | None) -> dict[str, Pictures]:
    """The validation pictures of each kind, all or n, in a random order."""
    emoji, photos = EmojiDataset("val", size), PhotoDataset("val", size)
    codes = sorted(set(emoji.hexcodes))
    together = torch.tensor([codes.index(code) for code in emoji.hexcodes])
    found = {"emoji": (emoji.images, together), "photos": (photos.images, photos.photo_ids)}
    order = torch.Generator().manual_seed(0)
    lots = {name: torch.randperm(len(x), generator=order)[:n] for name, (x, _) in found.items()}
    return {name: Pictures(x[lots[name]], c[lots[name]]) for name, (x, c) in found.items()}


def measure(model: Autoencoder, sets: dict[str, Pictures], kept: Path) -> dict[str, Evaluation]:
    """A model on each kind of pictures; what was measured before is read from `kept`."""
    counts = {name: len(one.clusters.unique()) for name, one in sets.items()}
    shapes = {name: [*one.x.shape, counts[name]] for name, one in sets.items()}
    key = {"model": fingerprint(model), "sets": shapes}
    if kept.is_file() and (content := json.loads(kept.read_text()))["key"] == key:
        return {name: Evaluation.from_dict(content[name]) for name in sets}
    found = {
        name: evaluate_first_stage(
            model, one.x, clusters=one.clusters, groups=min(10, counts[name])
        )
        for name, one in sets.items()
    }
    write_json(kept, {"key": key} | {name: one.as_dict() for name, one in found.items()})
    return found


def rows(model: Autoencoder, fixed: dict[str, Any], data: str, found: Evaluation) -> Iterator[dict]:
    """The rows of one model on one kind of pictures."""
    config = model.config
    fixed = fixed | {
        "regularizer": config.regularizer,
        "f": config.f,
        "c": config.z_channels,
        "codes": config.codebook_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": data,
    }
    for metric, measured in found.items():
        network = "features" if metric in ON_FEATURES else metric
        numbers = {"value": measured.value, "low": measured.low, "high": measured.high}
        written = {key: "" if math.isnan(v) else f"{v:.6g}" for key, v in numbers.items()}
        features = found.settings.get(network, "")
        clusters = found.settings["clusters"]
        yield fixed | {
            "features": features,
            "metric": metric,
            "n": measured.n,
            "clusters": clusters,
            **written,
        }


def training_of(run_dir: Path, rung: AutoencoderExperiment) -> dict[str, Any]:
    """What is known of a rung's training."""
    last = read_log(run_dir)[-1]
    train = {"seed": rung.train.seed, "steps": last.step, "images": last.images}
    return {"model": run_dir.name, **train, "seconds": round(last.seconds)}


def write_picture(path: Path, shown: dict[str, Tensor]) -> None:
    """Each model's pictures in a row of their own, in 256 colours: a quarter of the bytes."""
    alt = f"Pictures through first stages, a row each: {', '.join(shown)}."
    plots.save(plots.class_grid(torch.cat(list(shown.values())), list(shown)), path, alt)
    text = PngInfo()
    text.add_text("Description", alt)
    with Image.open(path) as picture:
        palette = Image.Quantize.MAXCOVERAGE
        small = picture.convert("RGB").quantize(256, palette, 4, dither=Image.Dither.NONE)
    with atomic_write(path) as file:
        small.save(file, format="png", optimize=True, pnginfo=text)


def label(model: Autoencoder) -> str:
    """What a row of the picture is called."""
    if model.config.regularizer == "identity":
        return "pixels, f = 1"
    return f"{model.config.regularizer.upper()}, f = {model.f}"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the folder with a run's folder for each rung")
    parser.add_argument("--out", type=Path, default=HERE, help="where table and picture go")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rungs alone")
    parser.add_argument("--finished", action="store_true", help="train nothing")
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--subgroup", nargs="+", help="train on these emoji alone")
    parser.add_argument("--pictures", type=int, help="how many of each kind to measure on")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, measure, write."""
    args = arguments(argv)
    rungs, device = experiments(args), pick_device(args.device)
    if args.finished:
        rungs = {name: rung for name, rung in rungs.items() if is_finished(args.runs / name)}
    for name, rung in rungs.items():
        train(rung, args.runs / name, args.device)
    models = {"pixels": Autoencoder(PIXELS)}
    models |= {name: load_model(args.runs / name) for name in rungs}
    sets, table, shown = pictures(args.size, args.pictures), [], {}
    for name, model in tqdm(models.items(), "measure", unit="model"):
        model = model.to(device).eval()
        fixed = {"device": describe(device), "model": name}
        if name in rungs:
            fixed |= training_of(args.runs / name, rungs[name])
        for data, found in measure(model, sets, args.runs / name / "measured.json").items():
            table += rows(model, fixed, data, found)
        some = torch.cat([sets["emoji"].x[list(EMOJI)], sets["photos"].x[list(PHOTOS)]])
        shown[label(model)] = reconstruct(model, some)
    write_csv(args.out / TABLE, COLUMNS, table)
    write_picture(args.out / PICTURE, shown)
    print(f"{len(models)} first stages: {args.out / TABLE}")


if __name__ == "__main__":
    main()
