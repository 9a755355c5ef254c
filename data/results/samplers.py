"""The paper's Fig. 7 over samplers: `python data/results/samplers.py runs/fig7`.

Draws the same pictures, from the same z_T, by each sampler with 2 to 100 steps, from the shipped
class-conditional model, plain (guidance 1) and guided (3), and measures them against the training
pictures of its classes, as the paper does. Writes, here or into --out:

    fig7_samplers.csv    a row for each number: sampler, steps, metric, value, interval, N

Classes come as often as among training pictures. `calls` counts evaluations of the network for a
picture (a guided call is two). `seconds` a picture, sampling and decoding, are those of the
fastest of the batches of 64; on a CPU of one thread, in CPU time, which waiting for others does
not change. `distance` is how far a picture's latent (root mean square, its spread being 1) lies
from where the flow leads, by Heun's method with 200 steps. Rows without steps: "real pictures"
are training pictures against the others, "first stage" these after encoding and decoding.

What is done (in RUNS) is not done again. --pictures, --reference, --steps and
--sampler are for a quick try.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from minildm import EmojiDataset, pretrained
from minildm.checkpoints import fingerprint
from minildm.demo import describe
from minildm.diffusion import LatentDiffusion, seeded_noise
from minildm.distances import precision_recalls
from minildm.evaluation import group_of_class, pictures
from minildm.features import OfflineFeatures
from minildm.files import atomic_write, write_csv, write_json
from minildm.intervals import Evaluation, Measured, jackknife_interval, lots, mean_interval
from minildm.loop import pick_device
from minildm.metrics import accuracy, extract, kid, proxy_fid, reconstruct
from minildm.types import Noise

HERE = Path(__file__).resolve().parent
TABLE = "fig7_samplers.csv"
COLUMNS = (
    *("sampler", "steps", "spacing", "guidance_scale", "calls", "seconds"),
    *("metric", "value", "low", "high", "n", "features", "reference", "seed", "device"),
)
STEPS = (2, 5, 10, 20, 50, 100)
LINES = {  # (sampler, spacing) -> steps: all on the same times, and two as in the official code
    ("ddim", "trailing"): STEPS,
    ("ddpm", "trailing"): STEPS,
    ("dpm_solver_pp", "trailing"): STEPS,
    ("heun", "trailing"): STEPS[:-1],  # two calls a step
    ("plms", "leading"): STEPS,
    ("ddim", "leading"): STEPS,
    ("euler", "trailing"): (5, 20),  # DDIM in other words: a check
}
GUIDED = dict.fromkeys((("ddim", "trailing"), ("dpm_solver_pp", "trailing")), (5, 20, 50))
EXACT, EXACT_N = ("heun", 200, "trailing"), 96  # what `distance` is measured to, on how many
BATCH, GROUPS, K, SEED = 64, 10, 3, 0
HEAD = "EfficientNet-Lite0"
FEATURES = {"proxy_fid": f"{HEAD}, block 10", "kid": HEAD, "precision": HEAD, "recall": HEAD}
DETERMINISTIC = ("ddim", "plms", "dpm_solver_pp", "euler", "heun")


class Cell(NamedTuple):
    """One sampling: of which sampler, with how many steps, how guided."""

    sampler: str
    steps: int
    spacing: str
    guidance_scale: float

    @property
    def name(self) -> str:
        return f"{self.sampler}-{self.steps}-{self.spacing}-{self.guidance_scale:g}"


class Drawn(NamedTuple):
    """What a cell gave."""

    z: Tensor  # (N, c, h, w)
    calls: int
    seconds: float


class Setting(NamedTuple):
    """What all cells share."""

    model: LatentDiffusion
    labels: Tensor  # (N,) int64: what is asked for
    z_T: Tensor  # (N, c, h, w)


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """The grid, or the part that the command line asks for; plain before guided."""
    for guidance, lines in ((1.0, LINES), (3.0, GUIDED)):
        for (sampler, spacing), grid in lines.items():
            if args.sampler is None or sampler in args.sampler:
                asked = args.steps or grid
                yield from (Cell(sampler, steps, spacing, guidance) for steps in asked)


def starting_at(z_T: Tensor, seed: int) -> Noise:
    """Noise whose first draw is z_T; the rest, which only `ddpm` takes, comes from the seed."""
    more, first = seeded_noise(seed), [z_T]
    return lambda like: first.pop().to(like) if first else more(like)


def clock(device: torch.device) -> float:
    """Seconds, by the CPU time of this process; on a GPU by the wall, once it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device.type == "cpu" else time.perf_counter()


def draw(cell: Cell, setting: Setting, kept: Path, key: str) -> Drawn:
    """The cell's latents; what was drawn before under that key is read from `kept`."""
    path = kept / f"{cell.name}.safetensors"
    if path.is_file():
        with safe_open(path, "pt") as file:
            note = file.metadata()
            if note["key"] == key:
                return Drawn(file.get_tensor("z"), int(note["calls"]), float(note["seconds"]))
    drawn = sample(cell, setting)
    note = {"key": key, "calls": str(drawn.calls), "seconds": f"{drawn.seconds:.5g}"}
    with atomic_write(path) as file:
        file.write(save({"z": drawn.z.contiguous()}, note))
    return drawn


@torch.no_grad()
def sample(cell: Cell, setting: Setting) -> Drawn:
    """All pictures of a cell as latents, batch by batch."""
    model, seen, found, took = setting.model, [], [], []
    handle = model.unet.register_forward_hook(lambda _m, inputs, _out: seen.append(len(inputs[0])))
    names = model.config.conditioner.classes
    options = {name: getattr(cell, name) for name in ("sampler", "steps", "spacing")}
    options["guidance_scale"] = cell.guidance_scale
    for i in range(0, len(setting.z_T), BATCH):
        y = [names[label] for label in setting.labels[i : i + BATCH]]
        began = clock(model.device)
        *_, last = model.steps(
            y, noise=starting_at(setting.z_T[i : i + BATCH], SEED + i), **options
        )
        model.autoencoder.decode(last.z)
        took.append((clock(model.device) - began) / len(y))
        found.append(last.z.cpu().float())
    handle.remove()
    return Drawn(torch.cat(found), round(sum(seen) / len(setting.z_T)), min(took))


class Ruler:
    """Measures pictures against the reference, whose features are extracted once.

    The Frechet distance is on the 112 numbers of a middle block, since N pictures are too few for
    the covariance of the head's 1,280; the others are on the head.
    """

    def __init__(self, reference: Tensor, device: torch.device) -> None:
        networks = {"head": OfflineFeatures(), "block 10": OfflineFeatures(block=10)}
        self.networks = {name: net.to(device).eval() for name, net in networks.items()}
        self.judge = pretrained("emoji-judge").to(device)
        self.real = self.features(reference)

    def features(self, x: Tensor) -> dict[str, Tensor]:
        """Pictures (N, 3, H, W) -> (N, D) of each network."""
        return {name: extract(x, network) for name, network in self.networks.items()}

    def __call__(
        self, x: Tensor, groups: Tensor, real: dict[str, Tensor] | None = None
    ) -> dict[str, Measured]:
        """x (N, 3, H, W), groups (N,) -> numbers by name; real: other features to compare with."""
        real, fake = real or self.real, self.features(x)
        a, b = real["head"], fake["head"]
        generator = torch.Generator().manual_seed(SEED)
        drawn = lots(len(a), GROUPS, generator), lots(len(b), GROUPS, generator)
        precision, recall = precision_recalls(a, b, drawn, K)
        return {
            "proxy_fid": proxy_fid(real["block 10"], fake["block 10"], groups=GROUPS),
            "kid": kid(a, b, groups=GROUPS),
            "precision": jackknife_interval(precision, len(b), bounds=(0.0, 1.0)),
            "recall": jackknife_interval(recall, len(a), bounds=(0.0, 1.0)),
            "accuracy": accuracy(self.judge, x, groups),
        }


def distance(z: Tensor, exact: Tensor) -> Measured:
    """Root mean square difference of latents (N, c, h, w) to those of the flow, the first M."""
    gap = (z[: len(exact)] - exact).square().mean((1, 2, 3)).sqrt()
    return mean_interval(gap)


def rows(fixed: dict[str, Any], found: dict[str, Measured], reference: int) -> Iterator[dict]:
    """A row for each number; `features` and `reference` for those that have them."""
    for metric, measured in found.items():
        numbers = {"value": measured.value, "low": measured.low, "high": measured.high}
        written = {key: "" if math.isnan(v) else f"{v:.6g}" for key, v in numbers.items()}
        extra = {"metric": metric, "n": measured.n, "features": FEATURES.get(metric, "")}
        extra["reference"] = reference if metric in FEATURES else ""
        yield fixed | extra | written


def measured_cells(
    args: argparse.Namespace, setting: Setting, ruler: Ruler, groups: Tensor, key: str
) -> Iterator[tuple[Cell, Drawn, dict[str, Measured]]]:
    """Every cell of the grid, drawn and measured."""
    wanted, first = list(cells(args)), setting.labels[:EXACT_N]
    part = setting._replace(labels=first, z_T=setting.z_T[: len(first)])
    steps = 2 * max(cell.steps for cell in wanted) if args.steps else EXACT[1]
    exact = {
        scale: draw(Cell(EXACT[0], steps, EXACT[2], scale), part, args.runs / "exact", key).z
        for scale in sorted({cell.guidance_scale for cell in wanted})
    }
    compared = f"{key}, {len(ruler.real['head'])} real, {steps} steps"
    for cell in tqdm(wanted, "samplers", unit="cell"):
        drawn, kept = draw(cell, setting, args.runs, key), args.runs / f"{cell.name}.json"
        if kept.is_file() and (content := json.loads(kept.read_text()))["key"] == compared:
            yield cell, drawn, dict(Evaluation.from_dict(content))
            continue
        found = ruler(decoded(setting.model, drawn.z), groups)
        if cell.sampler in DETERMINISTIC:
            found["distance"] = distance(drawn.z, exact[cell.guidance_scale])
        write_json(kept, {"key": compared, **Evaluation(found).as_dict()})
        yield cell, drawn, found


@torch.no_grad()
def decoded(model: LatentDiffusion, z: Tensor) -> Tensor:
    """(N, c, h, w) -> pictures (N, 3, H, W) in [-1, 1], on the CPU."""
    parts = [model.autoencoder.decode(part.to(model.device)).cpu() for part in z.split(BATCH)]
    return torch.cat(parts).clamp(-1.0, 1.0)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the folder that keeps the latents")
    parser.add_argument("--out", type=Path, default=HERE, help="where the table goes")
    parser.add_argument("--pictures", type=int, default=400, help="how many each sampler draws")
    parser.add_argument("--reference", type=int, help="how many training pictures to compare with")
    parser.add_argument("--steps", type=int, nargs="+", help="these alone")
    parser.add_argument("--sampler", nargs="+", choices=sorted({sampler for sampler, _ in LINES}))
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Sample, measure, write."""
    args = arguments(argv)
    device = pick_device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    model = pretrained("emoji-class").to(device, memory_format=torch.channels_last)
    size, classes = model.config.image_size, model.config.conditioner.classes
    data = EmojiDataset("train", size, subgroups=classes)
    x, order = pictures(data), torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    real, held = order[: args.reference], order[: args.pictures]
    z_T = seeded_noise(SEED)(torch.zeros(len(held), *model.autoencoder.encode(x[:1]).shape[1:]))
    setting, groups = (
        Setting(model, data.labels[held], z_T),
        group_of_class(data)[data.labels[held]],
    )
    ruler = Ruler(x[real], device)
    shared = {"seed": SEED, "device": describe(device)}
    content = json.dumps([fingerprint(model), args.pictures, describe(device)])
    key, table = hashlib.sha256(content.encode()).hexdigest(), []
    for name, shown in (
        ("real pictures", x[held]),
        ("first stage", reconstruct(model.autoencoder, x[held])),
    ):
        others = ruler.features(x[order[args.pictures :][: args.reference]])
        found = ruler(shown, groups, others)
        table += rows(shared | {"sampler": name}, found, len(others["head"]))
    for cell, drawn, found in measured_cells(args, setting, ruler, groups, key):
        fixed = cell._asdict() | {"calls": drawn.calls, "seconds": f"{drawn.seconds:.4g}"}
        fixed["guidance_scale"] = f"{cell.guidance_scale:g}"
        table += rows(shared | fixed, found, len(real))
    write_csv(args.out / TABLE, COLUMNS, table)
    print(f"{len(table)} numbers: {args.out / TABLE}")


if __name__ == "__main__":
    main()
