"""What came after the paper, measured against it: `python data/results/beyond.py runs/beyond`.

Trains a small class-conditional model of 32 px on the shipped first stage, as in the paper
("base": eps, every time alike) and changed, all with the same initial weights, pictures and order:

    v                   v in place of eps (Salimans & Ho 2022)
    min-SNR             eps, each time weighed by min(SNR, 5) / SNR (Hang et al. 2023)
    zero terminal SNR   v, and z_T holds nothing of z_0 (Lin et al. 2024)
    flow                rectified flow, tau drawn evenly (Liu et al. 2023, Lipman et al. 2023)
    reflow              goes on from flow, for half as many steps, on pairs that flow made
    guided              base, sampled with guidance 3 (nothing is trained)
    guidance interval   the same, but only at the middle noise (Kynkaanniemi et al. 2024)

and writes, here or into --out, beyond.csv: a row for each variant, seed and metric, and rows of
seed "mean" with Student's interval over the seeds. n: how many pictures or latents the value is a
mean over, or seeds. `step`, `seconds` and `images` are those of the training; seconds are the
clock's, whatever else the machine did. `_K` behind a metric: K sampling steps, of DDIM with
trailing spacing, or of Euler along the flow, from the same noise in each variant:

    proxy_fid    to all training pictures of the classes (EfficientNet-Lite0, block 10)
    accuracy     how often the judge names the class that was asked for
    brightness   mean over pictures of a picture's mean, in [-1, 1]; spread: standard deviation
    distance     of latents (root mean square) to the same model's with 50 steps
    calls        of the network for a picture
    z0_error_T   not of samples: mean squared error of z0_hat at held-out latents, noised as at
                 time T of the paper's schedule
    bend         how far a flow's paths are from straight (0): see flow.bend

Features and judge see pictures enlarged to 64 px. Rows of "real pictures" and "first stage" are
training pictures against the others, plain and decoded from their latents. What is done (in
RUNS) is not done again, and another training there is refused. --steps and others: a quick try.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from minildm import PRESETS, EmojiDataset, ObjectiveConfig, ScheduleConfig, pretrained
from minildm.autoencoder import Autoencoder
from minildm.checkpoints import fingerprint, to_dict
from minildm.data.latents import LatentDataset
from minildm.demo import describe
from minildm.diffusion import LatentDiffusion, seeded_noise
from minildm.evaluation import pictures
from minildm.experiments import LatentDiffusionExperiment
from minildm.features import OfflineFeatures
from minildm.files import write_csv, write_json
from minildm.flow import Velocity, bend, flow_euler, flow_loss, timed, z0_by_flow
from minildm.guidance import conditioned
from minildm.intervals import Measured, mean_interval
from minildm.judge import Judge
from minildm.loop import optimise, pick_device, pick_precision
from minildm.metrics import accuracy, extract, proxy_fid, reconstruct
from minildm.runs import RunFolder
from minildm.training import encode_dataset, new_model
from minildm.types import Batch, Step

HERE = Path(__file__).resolve().parent
TABLE = "beyond.csv"
COLUMNS = (
    *("variant", "seed", "step", "seconds", "images"),
    *("metric", "value", "low", "high", "n", "device"),
)
CLASSES = ("face-concerned", "heart", "food-fruit", "time")
V = {"objective": ObjectiveConfig(predict="v")}
VARIANTS: dict[str, dict[str, Any]] = {  # name -> what differs from the base
    "base": {},
    "v": V,
    "min-SNR": {"objective": ObjectiveConfig(weighting="min_snr")},
    "zero terminal SNR": V | {"schedule": ScheduleConfig(zero_terminal_snr=True)},
    "flow": {},
    "reflow": {},
}
FLOWS = ("flow", "reflow")
GUIDANCE = 3.0
# The interval that is best in the paper on ImageNet at 512: sigma in 0.28..2.9, times 2 since its
# data have the standard deviation 0.5, where our latents have 1.
SIGMAS = (0.56, 5.8)
STEPS, FINE, EXACT_N, BATCH = (2, 5, 20), 50, 64, 64  # sampling
TIMES, PAIRS, PAIR_STEPS = (20, 100, 300, 500, 700, 900, 999), 1024, 20
Found = dict[str, tuple[float, int]]  # metric -> its value, and n


class Setting(NamedTuple):
    """What all runs share."""

    args: argparse.Namespace
    device: torch.device
    autoencoder: Autoencoder
    latents: LatentDataset
    labels: Tensor  # (N,) int64: what is asked for
    z_T: Tensor  # (N, c, h, w)
    val: tuple[Tensor, Tensor]  # held-out latents (M, c, h, w), labels (M,)
    judge: Judge
    network: OfflineFeatures
    real: Tensor  # (R, D) features of all training pictures


class Pairs(Dataset):
    """Ends of a flow's paths: `z1`, `z0` (c, h, w), `label`."""

    def __init__(self, z1: Tensor, z0: Tensor, labels: Tensor) -> None:
        self.items = [
            {"z1": a, "z0": b, "label": label} for a, b, label in zip(z1, z0, labels, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]


def experiment_of(variant: str, seed: int, steps: int) -> LatentDiffusionExperiment:
    """The training of a variant; reflow goes half as long."""
    preset = PRESETS["emoji-class"]
    steps = max(1, steps // 2) if variant == "reflow" else steps
    train = replace(
        preset.train, steps=steps, batch_size=32, lr=3e-3, ema_decay=0.995, save_every=100,
        warmup_steps=min(50, steps), seed=seed,
    )  # fmt: skip
    data = replace(preset.data, size=32, subgroups=CLASSES)
    unet = replace(preset.unet, width_mult=(1, 2), attn_levels=(1,))
    return replace(preset, unet=unet, data=data, train=train, t_bias=1.0, **VARIANTS[variant])


def velocity_of(model: LatentDiffusion, labels: Tensor) -> Velocity:
    """A flow's velocity for these classes."""
    c = model.conditioner({"label": labels.to(model.device)})
    return timed(conditioned(model.network, c))


def identity(variant: str, seed: int, setting: Setting) -> dict[str, Any]:
    """All that decides what a variant's training ends in."""
    content = {
        "variant": variant,
        "experiment": to_dict(experiment_of(variant, seed, setting.args.steps)),
        "first_stage": fingerprint(setting.autoencoder),
    }
    if variant == "reflow":
        pairs = {"count": pairs_wanted(setting), "steps": PAIR_STEPS}
        content |= {"pairs": pairs, "flow": identity("flow", seed, setting)}
    return content


def pairs_wanted(setting: Setting) -> int:
    """How many pairs reflow trains on."""
    return min(PAIRS, 4 * setting.args.pictures)


def train(variant: str, seed: int, setting: Setting, folder: Path) -> tuple[LatentDiffusion, float]:
    """The trained model of a variant, and the seconds that its training took."""
    experiment = experiment_of(variant, seed, setting.args.steps)
    run = RunFolder(folder, identity(variant, seed, setting))
    build = partial(LatentDiffusion, autoencoder=setting.autoencoder)
    config = experiment.model_config(setting.autoencoder.config, CLASSES)
    model, data = new_model(build, config, seed), setting.latents
    if variant == "reflow":
        flow, _ = train("flow", seed, setting, folder.with_name(f"flow-{seed}"))
        model.load_state_dict(flow.state_dict())
        data = pairs_of(flow, setting, seed)

    def loss(batch: Batch, _step: int) -> dict[str, Tensor]:
        if "z0" in batch:
            z0, eps = batch["z0"], batch["z1"]
        else:
            moments = batch["moments"]  # (B, 2, c', h, w): as drawn, and mirrored
            side = torch.randint(2, (len(moments),), device=moments.device)
            z0 = model.autoencoder.latent(moments[torch.arange(len(moments)), side])
            eps = torch.randn_like(z0)
        if variant not in FLOWS:
            return model.loss({"z": z0, "label": batch["label"]})
        tau = torch.rand(len(z0), device=z0.device)
        return {"loss": flow_loss(velocity_of(model, batch["label"]), z0, tau, eps).mean()}

    precision = run.fixed("precision", lambda: pick_precision("auto", setting.device))
    options = {"device": setting.device, "precision": precision, "save": lambda _ema: None}
    for _ in optimise(model, loss, data, experiment.train, run, **options):
        pass
    return model.eval(), run.history()[-1].seconds


@torch.no_grad()
def pairs_of(flow: LatentDiffusion, setting: Setting, seed: int) -> Pairs:
    """Noise, and where the flow carries it."""
    count, noise = pairs_wanted(setting), seeded_noise(1000 + seed)
    z1 = noise(torch.zeros(count, *setting.z_T.shape[1:]))
    labels = setting.labels.repeat(-(-count // len(setting.labels)))[:count]
    return Pairs(z1, draw(flow, True, labels, z1, PAIR_STEPS), labels)


@torch.no_grad()
def draw(
    model: LatentDiffusion, flow: bool, labels: Tensor, z_T: Tensor, steps: int, **options: Any
) -> Tensor:
    """Latents of these classes from z_T (N, c, h, w): the same shape, on the CPU."""
    found = []
    for y, noise in zip(labels.split(BATCH), z_T.split(BATCH), strict=True):
        start = noise.to(model.device)
        if flow:
            path: Iterator[Step] = flow_euler(velocity_of(model, y), start, steps)
        else:
            options |= {"steps": steps, "spacing": "trailing", "noise": lambda _, z=start: z}
            path = model.steps(y.to(model.device), **options)
        *_, last = path
        found.append(last.z.cpu().float())
    return torch.cat(found)


def z0_errors(variant: str, model: LatentDiffusion, setting: Setting) -> Found:
    """Errors of z0_hat at the paper's noise levels, or those nearest; a latent has four noises."""
    base, own = ScheduleConfig().build().to(model.device), model.schedule
    noise = seeded_noise(0)
    z0, labels = (part.repeat_interleave(4, 0).to(model.device) for part in setting.val)
    c, found = model.conditioner({"label": labels}), {}
    for time in TIMES:
        eps = noise(z0)
        at = int((own.alphas_cumprod.log() - base.alphas_cumprod[time].log()).abs().argmin())
        t = torch.full((len(z0),), at, device=model.device)
        with torch.no_grad():
            if variant in FLOWS:
                z_t = base.q_sample(z0, t, eps)
                guess = z0_by_flow(velocity_of(model, labels), base, z_t, t)
            else:
                guess = model.predict(own.q_sample(z0, t, eps), t, c).z0
        error = ((guess - z0) ** 2).mean((1, 2, 3)).mean()
        found[f"z0_error_{time}"] = float(error), len(setting.val[0])
    return found


@torch.no_grad()
def look(z: Tensor, setting: Setting) -> Tensor:
    """Latents -> pictures (N, 3, 32, 32) in [-1, 1], on the CPU."""
    parts = [setting.autoencoder.decode(part.to(setting.device)).cpu() for part in z.split(BATCH)]
    return torch.cat(parts).clamp(-1.0, 1.0)


def enlarged(x: Tensor) -> Tensor:
    """To the 64 px that judge and features know."""
    return F.interpolate(x, size=(64, 64), mode="bicubic").clamp(-1.0, 1.0)


def scores(x: Tensor, labels: Tensor, setting: Setting, real: Tensor | None = None) -> Found:
    """What is measured of pictures (N, 3, 32, 32)."""
    names, large, means = setting.judge.config.labels, enlarged(x), x.mean((1, 2, 3))
    truth = torch.tensor([names.index(name) for name in CLASSES])[labels]
    fake = extract(large, setting.network)
    values = {
        "proxy_fid": proxy_fid(setting.real if real is None else real, fake).value,
        "accuracy": accuracy(setting.judge, large, truth, "label").value,
        "brightness": float(means.mean()),
        "spread": float(means.std()),
    }
    return {name: (value, len(x)) for name, value in values.items()}


def of_samples(variant: str, model: LatentDiffusion, setting: Setting) -> Found:
    """All that is measured of a trained variant's samples, and of its paths."""
    flow, labels, z_T = variant in FLOWS, setting.labels, setting.z_T
    first = labels[:EXACT_N], z_T[:EXACT_N]
    exact, found = draw(model, flow, *first, FINE), {}
    for steps in STEPS:
        z = draw(model, flow, labels, z_T, steps)
        gap = (z[:EXACT_N] - exact).square().mean((1, 2, 3)).sqrt()
        measured = scores(look(z, setting), labels, setting)
        measured |= {"distance": (float(gap.mean()), len(gap)), "calls": (steps, len(z))}
        found |= {f"{name}_{steps}": value for name, value in measured.items()}
    if flow:
        velocity, z_1 = velocity_of(model, first[0]), first[1].to(model.device)
        found["bend"] = float(bend(velocity, z_1, FINE).mean()), len(z_1)
    return found


def of_guidance(model: LatentDiffusion, setting: Setting) -> dict[str, Found]:
    """The base model, guided at all times and in the interval, by variant."""
    abar, steps = model.schedule.alphas_cumprod, STEPS[-1]
    inside = ((1 - abar) / abar).sqrt()
    inside = ((inside >= SIGMAS[0]) & (inside <= SIGMAS[1])).nonzero().flatten().tolist()
    found, times = {}, (inside[0], inside[-1])
    for variant, interval in (("guided", None), ("guidance interval", times)):
        seen = []
        handle = model.unet.register_forward_hook(
            lambda _m, a, _o, seen=seen: seen.append(len(a[0]))
        )
        options = {"guidance_scale": GUIDANCE, "guidance_interval": interval}
        z = draw(model, False, setting.labels, setting.z_T, steps, **options)
        handle.remove()
        measured = scores(look(z, setting), setting.labels, setting)
        measured |= {"calls": (sum(seen) / len(z), len(z))}
        found[variant] = {f"{name}_{steps}": value for name, value in measured.items()}
    return found


def one_run(variant: str, seed: int, setting: Setting) -> dict[str, Any]:
    """Train and measure one variant with one seed, or read what was measured before."""
    folder = setting.args.runs / f"{variant.replace(' ', '-')}-{seed}"
    kept, what = folder / "measured.json", identity(variant, seed, setting)
    text = json.dumps([what, setting.args.pictures, describe(setting.device)])
    key = hashlib.sha256(text.encode()).hexdigest()
    if kept.is_file() and (content := json.loads(kept.read_text()))["key"] == key:
        return content
    model, seconds = train(variant, seed, setting, folder)
    rows = {variant: of_samples(variant, model, setting) | z0_errors(variant, model, setting)}
    if variant == "base":
        rows |= of_guidance(model, setting)
    config = experiment_of(variant, seed, setting.args.steps).train
    fixed = {"seed": seed, "step": config.steps, "images": config.steps * config.batch_size}
    content = {"key": key, "fixed": fixed | {"seconds": round(seconds, 1)}, "rows": rows}
    write_json(kept, content)
    return content


def table_of(runs: list[dict[str, Any]], device: str) -> Iterator[dict[str, Any]]:
    """A row for each number of each run, and the means over seeds where there are several."""
    seeds: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        for variant, found in run["rows"].items():
            for metric, (value, n) in found.items():
                seeds.setdefault((variant, metric), []).append(value)
                row = {"variant": variant, "metric": metric, "value": f"{value:.6g}", "n": n}
                yield run["fixed"] | row | {"device": device}
    for (variant, metric), values in seeds.items():
        if len(values) > 1:
            numbers = Measured(*mean_interval(values))._asdict()
            row = {k: v if k == "n" else f"{v:.6g}" for k, v in numbers.items()}
            yield {"variant": variant, "seed": "mean", "metric": metric, "device": device} | row


def limits(x: Tensor, labels: Tensor, setting: Setting) -> list[dict[str, Any]]:
    """Training pictures (R, 3, 32, 32), the first of them against the others; and decoded."""
    n = len(setting.labels)
    others, shown = extract(enlarged(x[n:]), setting.network), x[:n]
    both = {"real pictures": shown, "first stage": reconstruct(setting.autoencoder, shown)}
    rows = {name: scores(part, labels[:n], setting, others) for name, part in both.items()}
    return [{"fixed": {}, "rows": rows}]


def prepared(args: argparse.Namespace, device: torch.device) -> tuple[Setting, Tensor, Tensor]:
    """The setting; training pictures and their labels, in the order of the lot."""
    autoencoder = pretrained("emoji-class").autoencoder.to(device).eval()
    data, val = (EmojiDataset(split, 32, subgroups=CLASSES) for split in ("train", "val"))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    x, labels = pictures(data)[order], data.labels[order]
    moments = encode_dataset(autoencoder, data, "fp32")
    with torch.no_grad():
        held = autoencoder.encode(pictures(val).to(device), sample=False).cpu()
    network = OfflineFeatures(block=10).to(device).eval()
    z_T = seeded_noise(0)(torch.zeros(min(args.pictures, len(x)), *held.shape[1:]))
    setting = Setting(
        args=args, device=device, autoencoder=autoencoder, latents=LatentDataset(data, moments),
        labels=labels[: len(z_T)], z_T=z_T, val=(held, val.labels),
        judge=pretrained("emoji-judge").to(device), network=network,
        real=extract(enlarged(x), network),
    )  # fmt: skip
    return setting, x, labels


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, help="the folder that keeps the runs")
    parser.add_argument("--out", type=Path, default=HERE, help="where the table goes")
    parser.add_argument("--steps", type=int, default=500, help="of each training")
    parser.add_argument("--pictures", type=int, default=200, help="how many each variant draws")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, sample, measure, write."""
    args = arguments(argv)
    device = pick_device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    setting, x, labels = prepared(args, device)
    todo = [(variant, seed) for seed in range(args.seeds) for variant in args.variants]
    runs = [one_run(*one, setting) for one in tqdm(todo, "variants", unit="run")]
    rows = list(table_of(limits(x, labels, setting) + runs, describe(device)))
    if not all(math.isfinite(float(row["value"])) for row in rows):
        raise ValueError("a number is not finite")
    write_csv(args.out / TABLE, COLUMNS, rows)
    print(f"{len(rows)} numbers: {args.out / TABLE}")


if __name__ == "__main__":
    main()
