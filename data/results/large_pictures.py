"""Large pictures with the latents' scale right and wrong: `python data/results/large_pictures.py
runs/large_pictures`.

Trains scenes-semantic twice, briefly and alike but for one number: on the shipped first stage, and
on the same with its latents left as they come out of the encoder, "unscaled", which is what LDM's
appendix D.1 compares. Both draw the maps of validation scenes, at the training's 64 px, and those
of wide scenes of four times the side, in one pass. Writes, here or into --out:

    large_pictures.json    agreement with the maps, how even a sky is, with intervals
    large_pictures.png     one wide scene by each

What is trained (in RUNS) is not trained again. --steps, --small, --wide, --calls and --segmenter
are for a quick try.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import minildm
from minildm import plots
from minildm.data.scenes import SKIES, ScenesDataset
from minildm.data.wide import wide_scene
from minildm.demo import describe
from minildm.files import write_json
from minildm.following import dealt_anew, sample_conditions
from minildm.intervals import Evaluation, Measured, mean_interval
from minildm.loop import pick_device
from minildm.segmenter import Segmenter, agreement, segmented
from minildm.training import progress, with_steps

HERE = Path(__file__).resolve().parent
FIRST_STAGE = HERE.parent / "weights/emoji-kl-f4"
STEPS, BATCH, SCENES, SEED = 3000, 24, 3000, 0
CELL = 8  # pixels: what is finer is grain, not a colour of the sky


def first_stages(runs: Path) -> dict[str, Path]:
    """The shipped first stage, and the same with scale 1."""
    unscaled = minildm.load_model(FIRST_STAGE)
    unscaled.scale.fill_(1.0)
    minildm.save_model(unscaled, runs / "first_stage_unscaled")
    return {"right": FIRST_STAGE, "unscaled": runs / "first_stage_unscaled"}


def train(runs: Path, steps: int, device: str) -> None:
    """Both models, in RUNS; what is there goes on, or is left as it is."""
    changes = {"batch_size": BATCH, "seed": SEED, "ema_decay": 0.99}
    experiment = with_steps(minildm.PRESETS["scenes-semantic"], steps, **changes)
    data = ScenesDataset("train", experiment.data.size, n=SCENES)
    for name, first_stage in first_stages(runs).items():
        where = {"first_stage": first_stage, "run_dir": runs / name, "device": device}
        for _ in progress(minildm.train_ldm(experiment, data, **where), steps, name):
            pass


def sky_spread(x: Tensor, maps: Tensor) -> Tensor:
    """How uneven a sky is along its rows: (N, 3, H, W) in [-1, 1], (N, H, W) -> (N,).

    Of cells of CELL pixels that are all sky, the standard deviation of the colour over each row,
    root mean square over rows and colours. The skies of the scenes change from row to row alone.
    NaN for a picture with no row of two such cells.
    """
    cells = F.avg_pool2d(x, CELL)  # (N, 3, rows, columns)
    sky = F.avg_pool2d((maps < len(SKIES)).float()[:, None], CELL) > 0.999
    count = sky.sum(-1)  # (N, 1, rows)
    mean = (cells * sky).sum(-1) / count.clamp(min=1)
    off = ((cells - mean[..., None]).square() * sky).sum(-1) / count.clamp(min=1)
    rows = (count > 1).float()
    return ((off * rows).sum((1, 2)) / (3 * rows.sum((1, 2)))).sqrt()


def judged(segmenter: Segmenter, x: Tensor, maps: Tensor) -> dict[str, Measured]:
    """Agreement with the maps, `pixels` and `iou`, also dealt anew, and `sky_spread`."""
    found, order = segmented(segmenter, x), dealt_anew(len(x), SEED)
    (pixels, iou), (chance, _) = agreement(found, maps), agreement(found, maps[order])
    spread = sky_spread(x, maps)
    return {
        "pixels": mean_interval(pixels),
        "iou": mean_interval(iou),
        "pixels_shuffled": mean_interval(chance),
        "sky_spread": mean_interval(spread[spread.isfinite()]),
    }


def scenes(small: int, wide: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Pictures and maps by the side: of validation scenes, and of wide ones."""
    val = ScenesDataset("val", 64, n=small)
    rows = {64: [val[i] for i in range(small)], 256: [wide_scene(i) for i in range(wide)]}
    return {
        f"{side} px": tuple(
            torch.stack([item[key] for item in items]) for key in ("image", "semantic")
        )
        for side, items in rows.items()
    }


def measure(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """All numbers by name and side; the first wide scene: itself, and drawn by each."""
    segmenter = args.segmenter and minildm.load_model(args.segmenter)
    segmenter = (segmenter or minildm.pretrained("scenes-segmenter")).to(device)
    numbers, shown, given = {}, [], scenes(args.small, args.wide)
    for name in ("right", "unscaled"):
        model = minildm.load_model(args.runs / name).to(device)
        for side, (_, maps) in given.items():
            options = {"seed": SEED, "steps": args.calls, "batch": 16}
            x = sample_conditions(model, {"semantic": maps}, **options)
            numbers |= {f"{name}, {side}, {k}": m for k, m in judged(segmenter, x, maps).items()}
        shown.append(x[0])
    for side, (x, maps) in given.items():
        numbers |= {f"real, {side}, {k}": m for k, m in judged(segmenter, x, maps).items()}
    scale = float(minildm.load_model(FIRST_STAGE).scale)
    settings = {"steps": args.steps, "calls": args.calls, "seed": SEED, "batch": BATCH}
    settings |= {"scenes": SCENES, "unscaled_by": scale, "device": describe(device)}
    return Evaluation(numbers, settings).as_dict(), torch.stack([x[0], *shown])


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Large pictures, the scale right and wrong.")
    parser.add_argument("runs", type=Path, help="the folder that keeps the trainings")
    parser.add_argument("--out", type=Path, default=HERE, help="where table and picture go")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training")
    parser.add_argument("--small", type=int, default=64, help="how many scenes of 64 px")
    parser.add_argument("--wide", type=int, default=12, help="how many wide scenes")
    parser.add_argument("--calls", type=int, default=25, help="steps of a sampling")
    parser.add_argument("--segmenter", type=Path, help="a folder, not the shipped one")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, draw, measure, write."""
    args = arguments(argv)
    device = pick_device(args.device)
    train(args.runs, args.steps, str(device))
    results, x = measure(args, device)
    write_json(args.out / "large_pictures.json", results)
    notes = ["the scene itself", "scale right", "unscaled"]
    plots.save(plots.image_grid(x, notes, scale=2.7), args.out / "large_pictures.png")
    print(Evaluation.from_dict(results))


if __name__ == "__main__":
    main()
