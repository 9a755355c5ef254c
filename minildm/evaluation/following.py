"""Whether samples show what their condition asks for: classes, captions, layouts.

Each share is reported between two controls, all with intervals: `..._real`, of real images with
the same conditions, the most to expect; and `..._shuffled`, of the same samples with the
conditions randomly permuted, which is chance. `settings["follows"]`: is a share above chance?
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minildm.conditioning.base import look_up
from minildm.data.dataset import ImageDataset, as_float
from minildm.data.emoji import EmojiDataset
from minildm.data.scenes import CROP_CLASSES, CropsDataset, ScenesDataset, crop, empty_box
from minildm.data.transforms import style_caption
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.evaluation.intervals import (
    Evaluation,
    Measured,
    exactly,
    jackknife,
    mean_interval,
    proportion_interval,
    random_groups,
)
from minildm.layers import Batch
from minildm.training.classifier import QUESTIONS, Classifier, correct, logits_of

GRID, FINE = 9, 7  # positions a side that `located` tries: over the image, then near the best
KINDS = ("food-", "animal-", "face-", "transport-", "place-building")  # categories of emoji
SAME = 0.5  # the IoU from which two boxes count as the same, as in detection


def shuffled(n: int, seed: int) -> Tensor:
    """A random permutation of n >= 2 rows that leaves none in its place: (n,) int64."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    new = torch.empty_like(order)
    new[order] = order.roll(1)  # one cycle through all
    return new


def share(right: Tensor, clusters: Tensor) -> Measured:
    """The share of right answers (N,) bool; the wider bounds of two intervals.

    Cluster-robust over clusters (N,), since answers about one image or subject are not
    independent, and Wilson's, which is never empty.
    """
    wilson = proportion_interval(int(right.sum()), len(right))
    robust = mean_interval(right.float(), clusters)
    low, high = min(wilson.low, robust.low), max(wilson.high, robust.high)
    return Measured(wilson.value, max(low, 0.0), min(high, 1.0), len(right))


def controlled(
    measure: Callable[[Tensor, Any], dict[str, Measured]],
    x: Tensor,
    y: Sequence[Any] | Tensor | Batch,
    real: Tensor | None = None,
    seed: int = 0,
) -> Evaluation:
    """measure(samples, conditions), its control by shuffled conditions, and that of real images.

    Raises ValueError unless there are as many samples as conditions and real images.
    """
    columns = list(y.values()) if isinstance(y, dict) else [y]
    if {len(rows) for rows in (*columns, x if real is None else real)} != {len(x)}:
        raise ValueError(f"{len(x)} samples require as many conditions and real images")
    sets = {"": (x, y), "_shuffled": (x, _rows(y, shuffled(len(x), seed)))}
    sets |= {} if real is None else {"_real": (real, y)}
    found = {which: measure(*pair) for which, pair in sets.items()}
    measured = {f"{name}{which}": found[which][name] for name in found[""] for which in sets}
    follows = {name: m.low > found["_shuffled"][name].high for name, m in found[""].items()}
    return Evaluation(measured, {"shuffle_seed": seed, "follows": follows})


def _rows(y: Any, order: Tensor) -> Any:
    if isinstance(y, dict):
        return {name: _rows(column, order) for name, column in y.items()}
    return y[order] if isinstance(y, Tensor) else [y[i] for i in order.tolist()]


def accuracy(classifier: Classifier, x: Tensor, truth: Tensor, question: str = "group") -> Measured:
    """How often the classifier gives the right answer, with Wilson's interval.

    x (N, 3, H, W), float in [-1, 1] or uint8; truth (N,) int64; question: "label" (the subgroup),
    "group" or "style". The classifier errs too: report its accuracy on real images as well.
    """
    return proportion_interval(int(correct(classifier, as_float(x), truth, question).sum()), len(x))


def evaluate_classifier(classifier: Classifier, scenes: int = 1000) -> Evaluation:
    """Accuracy of each of a classifier's answers, on held-out emoji or crops of held-out scenes."""
    if classifier.config.labels == CROP_CLASSES:
        val: ImageDataset = CropsDataset(ScenesDataset("val", 64, n=scenes))
    else:
        val = EmojiDataset("val", 64, subgroups=classifier.config.labels)
    truths = {question: val.columns[question] for question in QUESTIONS}
    return Evaluation({q: accuracy(classifier, val.images, t, q) for q, t in truths.items()}, {})


def group_of_class(data: ImageDataset) -> Tensor:
    """Each class's group: (classes,) int64."""
    groups = torch.zeros(len(data.classes), dtype=torch.long)
    groups[data.labels] = data.group_ids
    return groups


def evaluate_classes(
    model: LatentDiffusion,
    classifier: Classifier,
    per_class: int,
    *,
    x: Tensor | None = None,
    **sampling: Any,
) -> Evaluation:
    """How often the classifier names the group of a sample's class; for models of emoji classes.

    `accuracy`, the mean over groups, so that sets with other shares of the groups compare, that
    of held-out images, `accuracy_real`, and their `ratio`; each group's, "food-drink" and
    "food-drink_real". x: samples, `per_class` of each class in order; None: sampled here.
    """
    classes = model.config.conditioner.classes
    real = EmojiDataset("val", model.config.image_size, subgroups=classes)
    if x is None:
        x = model.sample([name for name in classes for _ in range(per_class)], **sampling)
    asked = group_of_class(real).repeat_interleave(per_class)
    mean, per_group = {}, {}
    for which, images, groups in (("", x, asked), ("_real", real.images, real.group_ids)):
        right = correct(classifier, as_float(images), groups)
        parts = {real.groups[g]: right[groups == g] for g in groups.unique().tolist()}
        found = {g: proportion_interval(int(part.sum()), len(part)) for g, part in parts.items()}
        average = sum(m.value for m in found.values()) / len(found)
        mean[f"accuracy{which}"] = exactly(average, len(images))
        per_group |= {f"{g}{which}": m for g, m in found.items()}
    real_accuracy = mean["accuracy_real"].value or math.nan  # at sides that it was not trained on
    mean["ratio"] = exactly(mean["accuracy"].value / real_accuracy, len(x))
    return Evaluation(mean | per_group, {"per_class": per_class, **sampling})


class Prompt(NamedTuple):
    """A caption, and what its image must show, in the classifier's names; None: not asked."""

    caption: str
    label: str | None = None  # the subgroup
    group: str | None = None
    style: str | None = None
    subject: str = ""  # prompts of one subject are not independent; empty: the caption


def emoji_prompts(
    data: EmojiDataset, n: int, *, styled: bool = False, seed: int = 0
) -> tuple[list[Prompt], Tensor]:
    """Captions of n random images, with or without their style, and the images (n, 3, S, S).

    Raises ValueError for n outside 2..len(data).
    """
    if not 2 <= n <= len(data):
        raise ValueError(f"n={n} must be in 2..{len(data)}, the images of {data.name}")
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:n]
    prompts = []
    for i in chosen.tolist():
        style = data.styles[data.style_ids[i]] if styled else None
        caption = style_caption(data.captions[i], style) if style else data.captions[i]
        names = data.classes[data.labels[i]], data.groups[data.group_ids[i]]
        prompts.append(Prompt(caption, *names, style, data.hexcodes[i]))
    return prompts, as_float(data.images[chosen])


def subjects_of(prompts: Sequence[Prompt]) -> Tensor:
    """A number for each different subject: (N,) int64."""
    names = [prompt.subject or prompt.caption for prompt in prompts]
    return torch.from_numpy(np.unique(names, return_inverse=True)[1])


def text_following(
    x: Tensor,
    prompts: Sequence[Prompt],
    classifier: Classifier,
    *,
    real: Tensor | None = None,
    seed: int = 0,
) -> Evaluation:
    """Whether the classifier names the prompts' subgroup, group and style in x (N, 3, H, W).

    real: real images of the same prompts. Raises ValueError where the numbers differ, or the
    classifier does not know a name.
    """

    def measure(images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Measured]:
        answers, subjects, found = logits_of(classifier, images), subjects_of(prompts), {}
        for question, logits in answers.items():
            known = getattr(classifier.config, f"{question}s")
            names = [getattr(prompt, question) for prompt in prompts]
            truth = [-1 if name is None else look_up(name, known, question) for name in names]
            asked = torch.tensor(truth) >= 0
            if asked.any():
                right = logits.argmax(dim=1) == torch.tensor(truth)
                found[question] = share(right[asked], subjects[asked])
        return found

    return controlled(measure, x, prompts, real, seed)


def kind_of(subgroup: str | None) -> int:
    """Index into KINDS of a subgroup's category; -1: none of them."""
    return next((i for i, kind in enumerate(KINDS) if (subgroup or "").startswith(kind)), -1)


def kind_following(
    x: Tensor,
    prompts: Sequence[Prompt],
    classifier: Classifier,
    real: Tensor,
    of_real: Sequence[Prompt],
    *,
    seed: int = 0,
) -> Evaluation:
    """Whether the classifier names a subgroup of the prompts' categories (KINDS) in x.

    real, of_real: other images (M, 3, H, W), real ones, and what they show, reweighted to the
    categories of the prompts, each of which must be among them. `ratio`: x's share over theirs.
    """
    of_label = torch.tensor([kind_of(label) for label in classifier.config.labels])

    def right(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        named = of_label[logits_of(classifier, images)["label"].argmax(dim=1)]
        return (named == torch.tensor([kind_of(p.label) for p in prompts])).double()

    def measure(images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Measured]:
        return {"kind": share(right(images, prompts) > 0, subjects_of(prompts))}

    def mean(rows: Tensor) -> Tensor:
        return rows[:, 0].sum() / rows[:, 1].sum()

    found = controlled(measure, x, prompts, seed=seed)
    asked, shown = ([kind_of(p.label) for p in ps] for ps in (prompts, of_real))
    weights = torch.tensor([asked.count(kind) / shown.count(kind) for kind in shown]).double()
    rows = torch.stack([weights * right(real, of_real), weights], dim=1)
    draw, both = torch.Generator().manual_seed(seed), (prompts, of_real)
    groups = [random_groups(len(ps), 10, draw, subjects_of(ps)) for ps in both]
    found["kind_real"] = jackknife(mean, rows, groups=groups[1:], bounds=(0.0, 1.0))
    found["ratio"] = jackknife(
        lambda a, b: a.mean() / mean(b), right(x, prompts), rows, groups=groups, n=len(x)
    )
    return found


def evaluate_text(
    model: LatentDiffusion, classifier: Classifier, n: int, *, styled: bool = False, **sampling: Any
) -> Evaluation:
    """`text_following` of a model's samples for n captions of held-out emoji; seed 0 by default."""
    sampling, data = {"seed": 0, **sampling}, EmojiDataset("val", model.config.image_size)
    prompts, real = emoji_prompts(data, n, styled=styled, seed=sampling["seed"])
    x = model.sample([prompt.caption for prompt in prompts], **sampling).cpu()
    found = text_following(x, prompts, classifier, real=real, seed=sampling["seed"])
    found.settings |= sampling
    return found


def layout_following(
    x: Tensor, layouts: Batch, classifier: Classifier, *, real: Tensor | None = None, seed: int = 0
) -> Evaluation:
    """Whether the requested objects are in their boxes in x (N, 3, H, W), and nothing elsewhere.

    layouts: `boxes` (N, K, 4), `classes` (N, K), -1 pads. classifier: of crops.

    objects: share of boxes in which the classifier names the requested object; filled: any
    object. empty: share of places clear of all boxes where it sees nothing. For objects requested
    once, where in the image a box of that size shows them best: iou, its overlap with the
    requested box, and found, the share with at least SAME.
    """
    if classifier.config.labels != CROP_CLASSES:
        raise ValueError("classifier must be one of crops of scenes, as 'scenes-classifier'")

    def named(images: Tensor, boxes: Tensor) -> Tensor:
        return logits_of(classifier, crop(images, boxes))["label"].argmax(dim=1)

    def measure(x: Tensor, layouts: Batch) -> dict[str, Measured]:
        boxes, classes, nothing = layouts["boxes"], layouts["classes"], len(CROP_CLASSES) - 1
        image, slot = (classes >= 0).nonzero().unbind(1)  # (J,) each
        boxes_of, asked = boxes[image, slot], classes[image, slot]
        seen, rng = named(x[image], boxes_of), np.random.default_rng(seed)
        clear = [(i, empty_box(rng, boxes[i][classes[i] >= 0])) for i in range(len(x))]
        places = torch.tensor([i for i, box in clear if box])
        elsewhere = named(x[places], torch.tensor([box for _, box in clear if box]))
        once = (classes[image] == asked[:, None]).sum(dim=1) == 1
        best = located(x[image[once]], boxes_of[once], asked[once], classifier)
        iou = overlaps(best, boxes_of[once])
        return {
            "objects": share(seen == asked, image),
            "filled": share(seen != nothing, image),
            "empty": share(elsewhere == nothing, places),
            "found": share(iou >= SAME, image[once]),
            "iou": mean_interval(iou, image[once]),
        }

    return controlled(measure, x, layouts, real, seed)


def located(x: Tensor, boxes: Tensor, asked: Tensor, classifier: Classifier) -> Tensor:
    """Where boxes of the same sizes show the requested classes best: (J, 4).

    x (J, 3, H, W), boxes (J, 4) xyxy, asked (J,). Tries GRID x GRID positions over the image, then
    FINE x FINE near the best of them; the requested position is not privileged.
    """

    def best(image: Tensor, steps: Tensor, size: Tensor, label: int) -> Tensor:
        corners = torch.cartesian_prod(steps[:, 0], steps[:, 1])  # (G * G, 2)
        places = torch.cat([corners, corners + size], dim=1)
        logits = logits_of(classifier, crop(image.expand(len(places), -1, -1, -1), places))["label"]
        return corners[logits.log_softmax(dim=1)[:, label].argmax()]

    found = []
    for image, box, label in zip(x, boxes, asked.tolist(), strict=True):
        size = box[2:] - box[:2]
        room = (1 - size).clamp(min=0)  # where the top left corner can be
        corner = best(image, torch.linspace(0, 1, GRID).outer(room), size, label)
        near = torch.linspace(-1, 1, FINE).outer(room / (GRID - 1)) + corner
        corner = best(image, near.clamp(min=0).minimum(room), size, label)
        found.append(torch.cat([corner, corner + size]))
    return torch.stack(found)


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of two lists of xyxy boxes: (J, 4), (J, 4) -> (J,)."""
    from torchvision.ops import box_iou  # here: it takes seconds to import

    return box_iou(a, b).diagonal()


def scene_layouts(scenes: ScenesDataset, n: int) -> Batch:
    """The layouts of the first n scenes: `boxes` (n, K, 4) and `classes` (n, K)."""
    return {name: scenes.columns[name][:n] for name in ("boxes", "classes")}


def evaluate_layout(
    model: LatentDiffusion, classifier: Classifier, n: int, *, seed: int = 0, **sampling: Any
) -> Evaluation:
    """`layout_following` of a model's samples for the layouts of n held-out scenes."""
    scenes = ScenesDataset("val", model.config.image_size, n=n)
    layouts, real = scene_layouts(scenes, n), as_float(scenes.images)
    x = model.sample(layouts, seed=seed, **sampling).cpu()
    found = layout_following(x, layouts, classifier, real=real, seed=seed)
    found.settings |= {"seed": seed, **sampling}
    return found
