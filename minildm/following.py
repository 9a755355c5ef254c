"""Whether samples show what their condition asked for: captions and layouts.

Each share stands between two others, all with intervals: that of real pictures of the same
conditions (`..._real`), the most that can be asked for, and that of the same samples with the
conditions dealt anew among them (`..._shuffled`), which is chance: a model that ignores its
condition gets it. `settings["follows"]` says whether the intervals of a share and chance are apart.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from minildm.data.crops import CROP_CLASSES, crop, empty_box
from minildm.data.emoji import EmojiDataset
from minildm.data.scenes import OBJECTS, ScenesDataset
from minildm.data.variants import style_caption
from minildm.diffusion import LatentDiffusion, seeded_noise
from minildm.intervals import (
    Evaluation,
    Measured,
    mean_interval,
    proportion_interval,
    ratio_interval,
    weighted_sum,
)
from minildm.judge import QUESTIONS, Judge, JudgeConfig, logits_of
from minildm.tau_theta import look_up
from minildm.types import Batch

GRID, FINE = 9, 7  # places a side where `located` looks: over the picture, then round the best
KINDS = {  # what anybody tells apart at a glance, and how its subgroups begin
    "food": "food-",
    "animal": "animal-",
    "face": "face-",
    "vehicle": "transport-",
    "building": "place-building",
}
SAME = 0.5  # the IoU from which two boxes count as the same, as in detection


class Prompt(NamedTuple):
    """A caption, and what its picture must show, by the judge's names; None: not asked."""

    caption: str
    label: str | None = None  # the subgroup
    group: str | None = None
    style: str | None = None
    subject: str = ""  # prompts of one subject are not independent; empty: the caption


def emoji_prompts(
    data: EmojiDataset, n: int, *, styled: bool = False, seed: int = 0
) -> tuple[list[Prompt], Tensor]:
    """Captions of n pictures by lot, with or without their style, and the pictures themselves.

    (n, 3, S, S) in [-1, 1]. ValueError for n outside 2..len(data).
    """
    if not 2 <= n <= len(data):
        raise ValueError(f"n={n} must lie in 2..{len(data)}, the pictures of {data.name}")
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:n]
    prompts = []
    for i in chosen.tolist():
        item = data.without_image(i)
        style = data.styles[item["style"]] if styled else None
        caption = style_caption(item["caption"], style) if style else item["caption"]
        names = data.classes[item["label"]], data.groups[item["group"]]
        prompts.append(Prompt(caption, *names, style, item["hexcode"]))
    return prompts, data.images[chosen].float() / 127.5 - 1


def text_following(
    x: Tensor, prompts: Sequence[Prompt], judge: Judge, *, real: Tensor | None = None, seed: int = 0
) -> Evaluation:
    """Whether the judge sees in x (N, 3, H, W) the subgroup, group and style of the N prompts.

    real: real pictures of the same prompts. seed: of the shuffling. Raises ValueError where the
    numbers differ, nothing is asked for, or the judge does not know a name.
    """
    sets = {"": x} if real is None else {"": x, "_real": real}
    if not prompts or {len(pictures) for pictures in sets.values()} != {len(prompts)}:
        numbers = ", ".join(str(len(pictures)) for pictures in sets.values())
        raise ValueError(f"{len(prompts)} prompts need as many pictures, got {numbers}")
    answers = {name: logits_of(judge, pictures) for name, pictures in sets.items()}
    subject = _numbered([p.subject or p.caption for p in prompts])
    measured: dict[str, Measured] = {}
    for question in QUESTIONS:
        truth = _ids(prompts, question, judge.config)
        asked = (truth >= 0).nonzero()[:, 0]
        if not len(asked):
            continue
        clusters, truth = subject[asked], truth[asked]
        named = {name: a[question].argmax(dim=1)[asked] for name, a in answers.items()}
        measured[question] = share(named[""] == truth, clusters)
        shuffled = truth[dealt_anew(len(truth), seed)]
        measured[f"{question}_shuffled"] = share(named[""] == shuffled, clusters)
        if real is not None:
            measured[f"{question}_real"] = share(named["_real"] == truth, clusters)
    if not measured:
        raise ValueError("no prompt asks for a label, a group or a style")
    return Evaluation(measured, {"shuffle_seed": seed, "follows": _follows(measured)})


def _ids(prompts: Sequence[Prompt], question: str, config: JudgeConfig) -> Tensor:
    """What each prompt asks for, as the judge's number: (N,) int64, -1 where it asks nothing."""
    known = {"label": config.labels, "group": config.groups, "style": config.styles}[question]
    names = [getattr(prompt, question) for prompt in prompts]
    return torch.tensor([-1 if name is None else look_up(name, known, question) for name in names])


def kind_of(subgroup: str | None) -> int:
    """Which of the KINDS a subgroup belongs to; -1: none of them."""
    starts = [(subgroup or "").startswith(start) for start in KINDS.values()]
    return starts.index(True) if any(starts) else -1


def kind_following(
    x: Tensor,
    prompts: Sequence[Prompt],
    judge: Judge,
    real: Tensor,
    of_real: Sequence[Prompt],
    *,
    seed: int = 0,
) -> Evaluation:
    """Whether the subgroup that the judge sees in x (N, 3, H, W) is of the asked kind of KINDS.

    real, of_real: other pictures (M, 3, H, W), real ones, and what they show; each kind of them
    weighs as much as it is asked for. `ratio`: the share of x by theirs. For each kind "food",
    "food_real". Over all, prompts of one subject count as one; of a kind, where a few prompts
    are meant and no others, those of one caption. Raises ValueError where numbers differ, a
    prompt asks for none of the KINDS, or there is no real picture of one.
    """
    if (len(x), len(real)) != (len(prompts), len(of_real)):
        raise ValueError(f"{len(x)}, {len(real)} pictures for {len(prompts)}, {len(of_real)}")
    asked, there = (torch.tensor([kind_of(p.label) for p in ps]) for ps in (prompts, of_real))
    kinds = asked.unique().tolist()
    if -1 in kinds or not set(kinds) <= set(there.tolist()):
        raise ValueError(f"each prompt must ask for one of {', '.join(KINDS)}, and all be in real")
    kind_of_label = torch.tensor([kind_of(label) for label in judge.config.labels])
    seen, seen_real = (
        kind_of_label[logits_of(judge, pictures)["label"].argmax(dim=1)] for pictures in (x, real)
    )
    subjects = _numbered([p.subject or p.caption for p in prompts])
    captions, reals = (
        _numbered([p.caption for p in prompts]),
        _numbered([p.subject for p in of_real]),
    )
    of_kind: dict[str, Measured] = {}
    for k in kinds:
        name, mine, theirs = list(KINDS)[k], asked == k, there == k
        of_kind[name] = share(seen[mine] == k, captions[mine])
        of_kind[f"{name}_real"] = share(seen_real[theirs] == k, reals[theirs])
    whole = share(seen == asked, subjects)
    weights = [int((asked == k).sum()) / len(asked) for k in kinds]
    whole_real = weighted_sum([of_kind[f"{list(KINDS)[k]}_real"] for k in kinds], weights)
    measured = {"kind": whole, "kind_real": whole_real}
    measured["kind_shuffled"] = share(seen == asked[dealt_anew(len(asked), seed)], subjects)
    measured["ratio"] = ratio_interval(whole, whole_real)
    return Evaluation(measured | of_kind, {"shuffle_seed": seed, "follows": _follows(measured)})


def _numbered(names: Sequence[str]) -> Tensor:
    """A number for each different name: (N,) int64."""
    return torch.from_numpy(np.unique(list(names), return_inverse=True)[1])


def text_against_guidance(
    model: LatentDiffusion,
    prompts: Sequence[Prompt],
    judge: Judge,
    scales: Sequence[float] = (1.0, 2.0, 3.0, 5.0),
    *,
    real: Tensor | None = None,
    seed: int = 0,
    **sampling: Any,
) -> dict[float, Evaluation]:
    """`text_following` of the model's samples for each guidance scale, all from the same noise.

    `settings["unknown"]`: how many prompts have words that the model does not know.
    """
    captions = [prompt.caption for prompt in prompts]
    unknown = sum(bool(model.conditioner.tokenizer.unknown(caption)) for caption in captions)
    found = {}
    for scale in scales:
        x = sample_conditions(model, captions, guidance_scale=scale, seed=seed, **sampling)
        judged = text_following(x, prompts, judge, real=real, seed=seed)
        settings = {"guidance_scale": scale, "seed": seed, "unknown": unknown, **sampling}
        found[scale] = Evaluation(judged.measured, judged.settings | settings)
    return found


def sample_conditions(
    model: LatentDiffusion,
    y: Sequence[str] | Batch,
    *,
    seed: int = 0,
    batch: int = 64,
    **sampling: Any,
) -> Tensor:
    """A picture for each caption, or each row of a batch of layouts or pictures: (N, 3, H, W).

    One seed for all: a longer list begins with the same noise. Unknown words do not warn.
    """
    n = len(next(iter(y.values()))) if isinstance(y, dict) else len(y)
    noise, parts = seeded_noise(seed), []
    for start in tqdm(range(0, n, batch), "sample", unit="batch", delay=2, leave=False):
        rows = slice(start, start + batch)
        some = {k: v[rows] for k, v in y.items()} if isinstance(y, dict) else list(y[rows])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "this model does not know")
            parts.append(model.sample(some, noise=noise, **sampling).cpu())
    return torch.cat(parts)


def evaluate_text(
    model: LatentDiffusion, judge: Judge, n: int, scales: Sequence[float], **sampling: Any
) -> dict[str, Evaluation]:
    """A model of text on n captions of validation emoji: "plain" and "styled", at each scale.

    Keys such as "styled, guidance 3". sampling: `seed`, `steps` and whatever `sample` takes.
    """
    data, found = EmojiDataset("val", model.config.image_size), {}
    for kind in ("plain", "styled"):
        seed = sampling.get("seed", 0)
        prompts, real = emoji_prompts(data, n, styled=kind == "styled", seed=seed)
        by_scale = text_against_guidance(model, prompts, judge, scales, real=real, **sampling)
        found |= {f"{kind}, guidance {scale:g}": by_scale[scale] for scale in scales}
    return found


# --- layouts ---


def scene_layouts(scenes: ScenesDataset, n: int) -> Batch:
    """What the first n scenes hold: `boxes` (n, K, 4) and `classes` (n, K)."""
    if not 2 <= n <= len(scenes):
        raise ValueError(f"n={n} must lie in 2..{len(scenes)}, the scenes of {scenes.name}")
    items = [scenes.without_image(i) for i in range(n)]
    return {name: torch.stack([item[name] for item in items]) for name in ("boxes", "classes")}


def layout_following(
    x: Tensor, layouts: Batch, judge: Judge, *, real: Tensor | None = None, seed: int = 0
) -> Evaluation:
    """Whether the asked objects are in their boxes in x (N, 3, H, W), and nothing elsewhere.

    layouts: `boxes` (N, K, 4), `classes` (N, K), -1 pads. judge: of crops ("scenes-judge").

    objects: share of boxes in which the judge names the asked object. filled: in which it sees
    anything. empty: share of places clear of all boxes where it sees nothing. For objects that
    are asked for once, where in the picture a box of that size shows them best: iou, its overlap
    with the asked box, and found, the share with SAME at least. Raises ValueError for a judge of
    other classes, and for numbers that differ.
    """
    if judge.config.labels != CROP_CLASSES:
        raise ValueError("judge must be one of crops of scenes, as the preset 'scenes-judge'")
    sets = {"": x} if real is None else {"": x, "_real": real}
    if {len(pictures) for pictures in sets.values()} != {len(layouts["boxes"])}:
        numbers = ", ".join(str(len(pictures)) for pictures in sets.values())
        raise ValueError(f"{len(layouts['boxes'])} layouts need as many pictures, got {numbers}")
    order = dealt_anew(len(x), seed)
    shuffled = {name: layouts[name][order] for name in ("boxes", "classes")}
    looks = {"": (x, layouts), "_shuffled": (x, shuffled)}
    looks |= {} if real is None else {"_real": (real, layouts)}
    each = {name: _in_layouts(*look, judge, seed) for name, look in looks.items()}
    measured = {f"{m}{name}": found[m] for m in each[""] for name, found in each.items()}
    return Evaluation(measured, {"shuffle_seed": seed, "follows": _follows(measured)})


def _in_layouts(x: Tensor, layouts: Batch, judge: Judge, seed: int) -> dict[str, Measured]:
    boxes, classes = layouts["boxes"], layouts["classes"]
    picture, slot = (classes >= 0).nonzero().unbind(1)  # (J,) each
    boxes_of, asked, nothing = boxes[picture, slot], classes[picture, slot], len(CROP_CLASSES) - 1
    named = logits_of(judge, crop(x[picture], boxes_of))["label"].argmax(dim=1)
    rng = np.random.default_rng(seed)
    clear = [(i, empty_box(rng, boxes[i][classes[i] >= 0])) for i in range(len(x))]
    places = torch.tensor([i for i, box in clear if box])
    beside = crop(x[places], torch.tensor([box for _, box in clear if box]))
    still = logits_of(judge, beside)["label"].argmax(dim=1) == nothing
    once = (classes[picture] == asked[:, None]).sum(dim=1) == 1
    iou = overlaps(located(x[picture[once]], boxes_of[once], asked[once], judge), boxes_of[once])
    return {
        "objects": share(named == asked, picture),
        "filled": share(named != nothing, picture),
        "empty": share(still, places),
        "found": share(iou >= SAME, picture[once]),
        "iou": mean_interval(iou, clusters=picture[once]),
    }


@torch.no_grad()
def located(x: Tensor, boxes: Tensor, asked: Tensor, judge: Judge) -> Tensor:
    """Where boxes of the same sizes show the asked classes best: (J, 4), by the judge of crops.

    x (J, 3, H, W), boxes (J, 4) xyxy, asked (J,). Looks at GRID x GRID places over the picture,
    then at FINE x FINE round the best of them; the asked place itself is no better known.
    """
    found = []
    for picture, box, label in zip(x, boxes, asked.tolist(), strict=True):
        size = box[2:] - box[:2]
        room = (1 - size).clamp(min=0)  # where the left top corner can be
        best = _best(picture, torch.linspace(0, 1, GRID).outer(room), size, label, judge)
        near = torch.linspace(-1, 1, FINE).outer(room / (GRID - 1)) + best
        best = _best(picture, near.clamp(min=0).minimum(room), size, label, judge)
        found.append(torch.cat([best, best + size]))
    return torch.stack(found)


def _best(picture: Tensor, steps: Tensor, size: Tensor, label: int, judge: Judge) -> Tensor:
    """Of the places at all pairs of steps (G, 2) the one that shows the label best: (2,)."""
    corners = torch.cartesian_prod(steps[:, 0], steps[:, 1])  # (G * G, 2)
    boxes = torch.cat([corners, corners + size], dim=1)
    crops = crop(picture.expand(len(boxes), -1, -1, -1), boxes)
    return corners[logits_of(judge, crops)["label"].log_softmax(dim=1)[:, label].argmax()]


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of two lists of xyxy boxes: (J, 4), (J, 4) -> (J,)."""
    sides = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])
    both = sides.clamp(min=0).prod(dim=1)
    area_a, area_b = ((box[:, 2:] - box[:, :2]).prod(dim=1) for box in (a, b))
    return both / (area_a + area_b - both)


def evaluate_layout(
    model: LatentDiffusion, judge: Judge, n: int, scales: Sequence[float], **sampling: Any
) -> dict[str, Evaluation]:
    """A model of layouts on those of n validation scenes, at each scale: keys "guidance 3".

    Raises ValueError for a model of other objects than the scenes'.
    """
    if model.config.conditioner.classes != OBJECTS:
        raise ValueError("the model's classes are not the objects of the scenes")
    scenes, found = ScenesDataset("val", model.config.image_size, n=n), {}
    layouts, seed = scene_layouts(scenes, n), sampling.get("seed", 0)
    real = scenes.images.float() / 127.5 - 1
    for scale in scales:
        x = sample_conditions(model, layouts, guidance_scale=scale, **sampling)
        judged = layout_following(x, layouts, judge, real=real, seed=seed)
        settings = judged.settings | {"guidance_scale": scale, **sampling}
        found[f"guidance {scale:g}"] = Evaluation(judged.measured, settings)
    return found


# --- shares, and chance ---


def share(right: Tensor, clusters: Tensor) -> Measured:
    """The share of right answers (N,) bool, with the wider bounds of two 95 % intervals.

    Of one over clusters (N,), since those of one picture or subject are not independent, and of
    Wilson's, which is never empty. Raises ValueError for fewer than two clusters.
    """
    wilson = proportion_interval(int(right.sum()), len(right))
    robust = mean_interval(right.float(), clusters=clusters)
    low, high = min(wilson.low, robust.low), max(wilson.high, robust.high)
    return Measured(wilson.value, max(low, 0.0), min(high, 1.0), len(right))


def dealt_anew(n: int, seed: int) -> Tensor:
    """A permutation of n >= 2 things by lot that leaves none in its place: (n,) int64."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    new = torch.empty_like(order)
    new[order] = order.roll(1)  # one cycle through all
    return new


def _follows(measured: dict[str, Measured]) -> dict[str, bool]:
    """For each question, whether its interval lies above that of the shuffled conditions."""
    return {
        name: found.low > measured[f"{name}_shuffled"].high
        for name, found in measured.items()
        if f"{name}_shuffled" in measured
    }
