"""What a run measures: samples beside real pictures, and whether the asked thing is in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from minildm.checkpoints import pretrained
from minildm.data.latents import cached_moments
from minildm.data.scenes import ScenesDataset
from minildm.diffusion import LatentDiffusion, seeded_noise
from minildm.evaluation import pictures
from minildm.experiments import DataConfig
from minildm.features import OfflineFeatures
from minildm.fidelity import psnr
from minildm.following import layout_following, sample_conditions, scene_layouts
from minildm.judge import correct
from minildm.metrics import extract, kid, precision_recall, proxy_fid
from minildm.restoring import given_of, pasted
from minildm.sweeps.settings import Plan, unknown

METRICS = {  # name: least number of samples
    "proxy_fid": 20,  # on a middle block's 112 numbers; smaller is better
    "kid": 20,
    "precision": 20,
    "recall": 20,
    "accuracy": 20,  # how often the judge names the asked group; emoji alone
    "objects": 20,  # share of boxes in which the judge sees the asked object; scenes alone
    "psnr": 20,  # to the true picture; restored pictures alone
}
ALWAYS = ("proxy_fid", "kid", "precision", "recall")
REFERENCE, K, BATCH = 2000, 3, 64  # pictures at most; neighbours; samples at a time
JUDGED = 64  # px: the side that judges know


@dataclass(frozen=True)
class Asked:
    """What samples are asked to show.

    y: names or captions, (N,) a list; a batch of what stands beside z_t; or None. truth: what
    `metric` compares with: groups (N,), layouts, or true pictures (N, 3, H, W). rows: of the
    training pictures whose conditions these are, (N,).
    """

    n: int
    y: Sequence[str] | dict[str, Tensor] | None
    metric: str | None = None
    truth: Any = None
    rows: Tensor | None = None


def metrics_of(kind: str, concat: str, data: str) -> tuple[str, ...]:
    """The metrics that apply to a model of that condition, on those pictures."""
    if data == "scenes" and (kind == "layout" or concat == "semantic"):
        return (*ALWAYS, "objects")
    if concat in ("low_res", "inpaint"):
        return (*ALWAYS, "psnr")
    if data == "emoji" and kind in ("class", "text"):
        return (*ALWAYS, "accuracy")
    return ALWAYS


def check_metrics(asked: Sequence[str], plan: Plan, samples: int, where: str) -> None:
    """ValueError for metrics that are not known or do not apply, or want more samples."""
    for name in asked:
        if name not in METRICS:
            raise unknown(f"{where}: metrics", name, METRICS)
    applies = tuple(METRICS)
    if plan.experiment is not None:
        conditioner, kind = plan.experiment.conditioner, plan.experiment.data.kind
        applies = metrics_of(conditioner.kind, conditioner.concat, kind)
        for name in set(asked) - set(applies):
            raise ValueError(
                f"{where}: metrics={name!r} says nothing here; {', '.join(applies)} do"
            )
    for name in asked or applies:
        if samples < METRICS[name]:
            raise ValueError(
                f"{where}: samples={samples} are too few for {name}, at least {METRICS[name]}"
            )


def data_of(model: LatentDiffusion, config: DataConfig | None, split: str) -> Dataset:
    """The pictures that a model learned from; of a shipped one, those its classes tell of."""
    if config is not None:
        return config.dataset(split)
    conditioner, size = model.config.conditioner, model.config.image_size
    if conditioner.kind == "layout" or conditioner.concat == "semantic":
        return DataConfig(kind="scenes", size=size).dataset(split)
    return DataConfig(size=size, subgroups=conditioner.classes).dataset(split)


def asked_of(model: LatentDiffusion, config: DataConfig | None, n: int, seed: int) -> Asked:
    """n conditions: as often as among the training pictures; others of validation pictures."""
    conditioner = model.config.conditioner
    if conditioner.kind == "layout" or conditioner.concat == "semantic":
        scenes = ScenesDataset("val", model.config.image_size, n=n)
        layouts = scene_layouts(scenes, n)
        if conditioner.kind == "layout":
            return Asked(n, layouts, "objects", layouts)
        maps = torch.stack([scenes[i]["semantic"] for i in range(n)])
        return Asked(n, {"semantic": maps}, "objects", layouts)
    if conditioner.concat in ("low_res", "inpaint"):
        real = pictures(data_of(model, config, "val"))
        x = real[_drawn(len(real), n, seed)]
        return Asked(n, given_of(x, conditioner.concat, model.autoencoder.f), "psnr", x)
    data = data_of(model, config, "train")
    rows = _drawn(len(data), n, seed)
    if conditioner.kind == "none":
        return Asked(n, None, rows=rows)
    groups = data.group_ids[rows] if data.name.startswith("emoji") else None
    metric = None if groups is None else "accuracy"
    if conditioner.kind == "class":
        return Asked(n, [data.classes[i] for i in data.labels[rows]], metric, groups, rows)
    captions = [data.without_image(i)["caption"] for i in rows.tolist()]
    return Asked(n, captions, metric, groups, rows)


def _drawn(length: int, n: int, seed: int) -> Tensor:
    """n indices, each as often as the others but for one: (n,)."""
    draw = torch.Generator().manual_seed(seed)
    rounds = [torch.randperm(length, generator=draw) for _ in range(-(-n // length))]
    return torch.cat(rounds)[:n]


class Ruler:
    """Measures samples of a model; real features and conditions are had once.

    Real pictures are those of the training split, as in the paper's appendix E, REFERENCE at
    most. The Frechet distance is on the 112 numbers of a middle block, since some hundred samples
    are too few for the covariance of the head's 1,280; kid, precision and recall are on the head.
    """

    def __init__(
        self,
        model: LatentDiffusion,
        config: DataConfig | None,
        n: int,
        seed: int,
        metrics: Sequence[str] = (),
    ) -> None:
        conditioner = model.config.conditioner
        data = data_of(model, config, "train")
        kind = data.name.partition("-")[0]
        self.metrics = tuple(metrics) or metrics_of(conditioner.kind, conditioner.concat, kind)
        self.device, self.seed = model.device, seed
        self.asked = asked_of(model, config, n, seed)
        self.networks = {"block 10": OfflineFeatures(block=10), "head": OfflineFeatures()}
        self.networks = {name: net.to(self.device).eval() for name, net in self.networks.items()}
        self.real = {name: self._reference(data, name) for name in self.networks}

    def _reference(self, data: Dataset, name: str) -> Tensor:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:REFERENCE]

        def compute() -> Tensor:
            x = torch.stack([data[i]["image"] for i in order.tolist()])
            return extract(x, self.networks[name]).cpu()

        return cached_moments(f"features-{data.fingerprint}-{name}-{REFERENCE}", compute)

    def truth(self, config: DataConfig) -> Tensor | None:
        """The training pictures whose conditions are asked for, (N, 3, H, W); None for others."""
        if self.asked.rows is None:
            return None
        data = config.dataset("train")
        return torch.stack([data[i]["image"] for i in self.asked.rows.tolist()])

    def sample(self, model: LatentDiffusion, sampling: Mapping[str, Any]) -> Tensor:
        """Pictures for the conditions, from the same noise every time: (N, 3, H, W), CPU."""
        y = self.asked.y
        if y is None:
            noise, starts = seeded_noise(self.seed), range(0, self.asked.n, BATCH)
            counts = [min(BATCH, self.asked.n - start) for start in starts]
            return torch.cat([model.sample(n=n, noise=noise, **sampling).cpu() for n in counts])
        x = sample_conditions(model, y, seed=self.seed, **sampling)
        return pasted(x, y) if isinstance(y, dict) else x

    def __call__(self, x: Tensor) -> dict[str, tuple[float, int]]:
        """Samples (N, 3, H, W) in [-1, 1] -> (value, N) by metric."""
        fake = {name: extract(x, net).cpu() for name, net in self.networks.items()}
        head, middle = (self.real["head"], fake["head"]), (self.real["block 10"], fake["block 10"])
        found = {"proxy_fid": proxy_fid(*middle, groups=0).value, "kid": kid(*head, groups=0).value}
        inside = precision_recall(*head, k=K)
        found |= {"precision": float(inside.precision), "recall": float(inside.recall)}
        numbers = {name: (value, len(x)) for name, value in found.items()}
        if self.asked.metric is not None:
            numbers[self.asked.metric] = self._asked_for(x)
        return {name: numbers[name] for name in self.metrics}

    def _asked_for(self, x: Tensor) -> tuple[float, int]:
        """Whether samples show what they were asked for."""
        if self.asked.metric == "accuracy":
            judge = pretrained("emoji-judge").to(self.device)
            right = correct(judge, at_side(x, JUDGED), self.asked.truth)
            return float(right.double().mean()), len(right)
        if self.asked.metric == "objects":
            judge = pretrained("scenes-judge").to(self.device)
            found = layout_following(at_side(x, JUDGED), self.asked.truth, judge)["objects"]
            return found.value, found.n
        return float(psnr(self.asked.truth, x).mean()), len(x)


def at_side(x: Tensor, side: int) -> Tensor:
    """Pictures at the side that a judge learned on: (B, 3, S, S) -> (B, 3, side, side)."""
    if x.shape[-1] == side:
        return x
    small = {"antialias": True} if x.shape[-1] > side else {}
    resized = F.interpolate(x, (side, side), mode="bicubic", align_corners=False, **small)
    return resized.clamp(-1.0, 1.0)
