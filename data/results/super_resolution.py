"""The paper's Tab. 5 on emoji: `python data/results/super_resolution.py runs/emoji-sr-regression`.

Trains the regression into RUN (the network of `emoji-sr`, asked for the answer at once, from its
weights on), and measures it on validation emoji, 16 px to 64 px, beside the shipped model, plain
and guided, a model of text that only guiding tells of the small picture, bicubic enlargement, and
the first stage alone, which nobody here can beat. Writes, here or into --out:

    tab5_super_resolution.json    for each row its numbers with intervals and N, and seconds

Intervals are over emoji, whose styles are not independent. `seconds` a picture are, on a CPU of
one thread, in CPU time. An interrupted training goes on, rows that are measured already, in
RUN/measured, are not measured again; --untrained leaves the regression out. --pictures, --steps
and --calls are for a quick try.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from minildm import EmojiDataset, load_model, pretrained, train_ldm
from minildm.checkpoints import fingerprint
from minildm.demo import describe
from minildm.diffusion import LatentDiffusion
from minildm.evaluation import pictures
from minildm.experiments import LatentDiffusionExperiment, as_regression
from minildm.features import OfflineFeatures, perceptual_distance
from minildm.files import data_dir, write_json
from minildm.intervals import mean_interval
from minildm.loop import pick_device
from minildm.metrics import Evaluation, evaluate_pictures, reconstruct
from minildm.presets import PRESETS
from minildm.restoring import given_of, kept, plain, restored
from minildm.training import progress, with_steps
from minildm.types import Batch
from minildm.upscaling import sample_towards

HERE = Path(__file__).resolve().parent
TABLE, SEED = "tab5_super_resolution.json", 0
MODEL_SCALE, TEXT_SCALE = 30.0, 300.0  # of perceptual guiding; the best of notebook 13's sweep
L2_SCALE = 0.4


def regression_experiment(steps: int) -> LatentDiffusionExperiment:
    """The regression, trained on from the weights of `emoji-sr`: half its batch will do."""
    regression = as_regression(PRESETS["emoji-sr"])
    return with_steps(regression, steps, batch_size=32, save_every=50)


def train_regression(run_dir: Path, steps: int, device: torch.device) -> LatentDiffusion:
    """Train, or go on; nothing is done where it is finished."""
    weights = data_dir() / "weights"
    options = {"first_stage": weights / "emoji-kl-f4", "init": weights / "emoji-sr"}
    records = train_ldm(
        regression_experiment(steps), run_dir=run_dir, device=str(device), **options
    )
    for _ in progress(records, steps, "regression"):
        pass
    return load_model(run_dir)


def rivals(
    given: Batch, calls: int, device: torch.device, regression: LatentDiffusion | None
) -> dict[str, Callable[[], Tensor]]:
    """Who makes pictures of what is given: a row's name -> a function that does."""
    model, text = (pretrained(name).to(device) for name in ("emoji-sr", "emoji-text"))
    far, low_res = perceptual_distance("offline").to(device), given["low_res"]
    fast = {"sampler": "dpm_solver_pp", "steps": calls, "seed": SEED}
    slow = {"steps": 2 * calls, "seed": SEED}  # guiding that is strong needs small steps
    nothing = [""] * len(low_res)  # the empty caption: an unconditional model
    found: dict[str, Callable[[], Tensor]] = {
        "bicubic": lambda: plain(given),
        "concatenation": lambda: restored(model, given, **fast),
        "concatenation, guided": lambda: sample_towards(
            model, low_res, MODEL_SCALE, given, perceptual=far, **fast
        ),
        "unconditional, guided (L2)": lambda: sample_towards(
            text, low_res, L2_SCALE, nothing, **slow
        ),
        "unconditional, guided (perceptual)": lambda: sample_towards(
            text, low_res, TEXT_SCALE, nothing, perceptual=far, **slow
        ),
    }
    if regression is not None:
        answers = regression.to(device)
        found["regression"] = lambda: restored(answers, given, steps=1, seed=SEED)
    return found


def clock(device: torch.device) -> float:
    """Seconds, by the CPU time of this process; on a GPU by the wall, once it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def measured(x: Tensor, made: Tensor, given: Batch, clusters: Tensor) -> Evaluation:
    """All of `evaluate_pictures` on pairs, and `kept`.

    By the offline networks, whatever else is on the machine, and the Frechet distance on a block
    whose covariance so few pictures can tell.
    """
    networks = {"features": OfflineFeatures(block=10), "perceptual": perceptual_distance("offline")}
    found = evaluate_pictures(x, made, paired=True, clusters=clusters, seed=SEED, **networks)
    true = {"kept": mean_interval(kept(made, given), clusters=clusters)}
    return Evaluation(found.measured | true, found.settings)


def rows(
    args: argparse.Namespace, device: torch.device, regression: LatentDiffusion | None
) -> dict[str, dict]:
    """Every row of the table; what RUN/measured has under the same key is taken from there."""
    val = EmojiDataset("val", 64)
    lot = torch.randperm(len(val), generator=torch.Generator().manual_seed(SEED))[: args.pictures]
    x, emoji = pictures(val)[lot], sorted(set(val.hexcodes))
    clusters = torch.tensor([emoji.index(val.hexcodes[i]) for i in lot.tolist()])
    given = given_of(x, "low_res", seed=SEED)
    asked = rivals(given, args.calls, device, regression)
    autoencoder = pretrained("emoji-kl-f4").to(device)
    asked["first stage"] = lambda: reconstruct(autoencoder, x)
    weights = [fingerprint(pretrained(name)) for name in ("emoji-sr", "emoji-text")]
    weights.append("" if regression is None else fingerprint(regression))
    found = {}
    for name, make in asked.items():
        content = json.dumps([name, *weights, args.pictures, args.calls, describe(device)])
        key = hashlib.sha256(content.encode()).hexdigest()
        path = args.run_dir / f"measured/{name}.json"
        if path.is_file() and (saved := json.loads(path.read_text()))["key"] == key:
            found[name] = saved["row"]
            continue
        began = clock(device)
        made = make()
        seconds = (clock(device) - began) / len(x)
        found[name] = {"seconds": seconds, **measured(x, made, given, clusters).as_dict()}
        write_json(path, {"key": key, "row": found[name]})
        print(f"{name}: {seconds:.3f} s a picture\n{Evaluation.from_dict(found[name])}\n")
    return found


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the regression's folder")
    parser.add_argument("--out", type=Path, default=HERE, help="where the table goes")
    parser.add_argument("--pictures", type=int, default=256, help="how many are enlarged")
    parser.add_argument("--steps", type=int, default=1000, help="of the regression's training")
    parser.add_argument("--calls", type=int, default=20, help="steps of a sampling")
    parser.add_argument("--untrained", action="store_true", help="leave the regression out")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, enlarge, measure, write."""
    args = arguments(argv)
    device = pick_device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    regression = None if args.untrained else train_regression(args.run_dir, args.steps, device)
    table = {"seed": SEED, "device": describe(device), "calls": args.calls}
    table["regression_steps"] = 0 if args.untrained else args.steps
    table["scales"] = {"concatenation": MODEL_SCALE, "L2": L2_SCALE, "perceptual": TEXT_SCALE}
    table["rows"] = rows(args, device, regression)
    write_json(args.out / TABLE, table)
    print(f"{len(table['rows'])} rows: {args.out / TABLE}")


if __name__ == "__main__":
    main()
