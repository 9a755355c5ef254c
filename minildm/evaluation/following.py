"""Does a sample follow its condition: class, caption, layout, map, image? Any model in one call.

Each number is reported between two controls, all with intervals: `..._real`, of real images with
the same conditions, the most to expect; and `..._shuffled`, of the same samples with the
conditions randomly permuted, which is chance. `settings["follows"]`: is a number above chance?
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minildm.compression.autoencoder import Autoencoder
from minildm.data.dataset import ImageDataset, as_float
from minildm.data.emoji import EmojiDataset
from minildm.data.scenes import CROP_CLASSES, CropsDataset, ScenesDataset, crop, empty_box
from minildm.data.transforms import enlarge, mean_fill, shrink, style_caption, task_inputs
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.evaluation.intervals import Evaluation, Measured, mean_interval, proportion_interval
from minildm.evaluation.metrics import evaluate_first_stage, evaluate_images, psnr
from minildm.layers import Batch, BatchRandom
from minildm.training.checkpoint import pretrained
from minildm.training.classifier import Classifier, Segmenter, agreement, logits_of
from minildm.training.configs import DataConfig

GRID, FINE = 9, 7  # positions a side that `located` tries: over the image, then near the best


def shuffled(n: int, seed: int) -> Tensor:
    """A random permutation of n >= 2 rows that leaves none in its place: (n,) int64."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order.roll(1)[order.argsort()]  # one cycle through all


def share(right: Tensor, clusters: Tensor) -> Measured:
    """The share of right answers (N,) bool; the wider bounds of two intervals.

    Cluster-robust over clusters (N,), since answers about one image or subject are not
    independent, and Wilson's, which is never empty.
    """
    wilson = proportion_interval(int(right.sum()), len(right))
    robust = mean_interval(right.float(), clusters)
    low, high = min(wilson.low, robust.low), max(wilson.high, robust.high)
    return Measured(wilson.value, max(low, 0.0), min(high, 1.0), len(right))


def controlled(measure: Callable[..., dict[str, Measured]]) -> Callable[..., Evaluation]:
    """Turn measure(samples, requested, ...) into a function that measures the controls too.

    requested: columns by name, (N, ...) each. The function takes `real`, real images of the same
    conditions, and the `seed` of the permutation.
    """

    @wraps(measure)
    def following(
        x: Tensor, requested: Batch, *others: Any, real: Tensor | None = None, seed: int = 0
    ) -> Evaluation:
        order = shuffled(len(x), seed)
        permuted = {name: column[order] for name, column in requested.items()}
        found = {"": measure(x, requested, *others), "_shuffled": measure(x, permuted, *others)}
        if real is not None:
            found["_real"] = measure(real, requested, *others)
        measured = {f"{name}{which}": found[which][name] for name in found[""] for which in found}
        follows = {name: m.low > found["_shuffled"][name].high for name, m in found[""].items()}
        return Evaluation(measured, shuffle_seed=seed, follows=follows)

    return following


def accuracy(classifier: Classifier, x: Tensor, truth: Tensor, question: str = "group") -> Measured:
    """How often the classifier gives the right answer, with Wilson's interval.

    x (N, 3, H, W), float in [-1, 1] or uint8; truth (N,) int64; question: "label" (the subgroup),
    "group" or "style". The classifier errs too: report its accuracy on real images as well.
    """
    right = logits_of(classifier, as_float(x))[question].argmax(dim=1) == truth.cpu()
    return proportion_interval(int(right.sum()), len(x))


def evaluate_classes(
    model: LatentDiffusion, classifier: Classifier, x: Tensor, split: str = "val"
) -> Evaluation:
    """How often the classifier names the group of a sample's class; for models of emoji classes.

    `accuracy`, the mean over groups, so that sets with other shares of the groups compare, and that
    of real images, `accuracy_real`; each group's, "food-drink" and "food-drink_real". x: samples,
    equally many of each class, in order. split: of the real images.
    """
    real = EmojiDataset(split, model.config.image_size, subgroups=model.config.conditioner.classes)
    groups = [real.group_ids[real.labels == c][0] for c in range(len(real.classes))]
    requested, measured = torch.stack(groups).repeat_interleave(len(x) // len(groups)), {}
    for which, images, truth in (("", x, requested), ("_real", real.images, real.group_ids)):
        present = truth.unique().tolist()
        found = [accuracy(classifier, images[truth == g], truth[truth == g]) for g in present]
        average = sum(m.value for m in found) / len(found)
        measured[f"accuracy{which}"] = Measured(average, n=len(images))
        measured |= {f"{real.groups[g]}{which}": m for g, m in zip(present, found, strict=True)}
    return Evaluation(measured)


@controlled
def text_following(x: Tensor, requested: Batch, classifier: Classifier) -> dict[str, Measured]:
    """How often the classifier names what captions request in x (N, 3, H, W).

    requested: `label` (the subgroup), `group` and `style`, or some of them, and `subject`: (N,)
    int64; images of one subject are not independent.
    """
    return {
        question: share(logits.argmax(dim=1) == requested[question], requested["subject"])
        for question, logits in logits_of(classifier, x).items()
        if question in requested
    }


@controlled
def layout_following(x: Tensor, layouts: Batch, classifier: Classifier) -> dict[str, Measured]:
    """Whether the requested objects are in their boxes in x (N, 3, H, W), and nothing elsewhere.

    layouts: `boxes` (N, K, 4), `classes` (N, K), -1 pads. classifier: of crops.

    objects: share of boxes in which the classifier names the requested object; filled: any
    object. empty: share of places clear of all boxes where it sees nothing. For objects requested
    once, where in the image a box of that size shows them best: iou, its overlap with the
    requested box, and found, the share with at least 0.5, as in detection.
    """
    boxes, classes, nothing = layouts["boxes"], layouts["classes"], len(CROP_CLASSES) - 1
    image, slot = (classes >= 0).nonzero().unbind(1)  # (J,) each
    boxes_of, requested = boxes[image, slot], classes[image, slot]
    rng = np.random.default_rng(0)
    clear = [(i, empty_box(rng, boxes[i][classes[i] >= 0])) for i in range(len(x))]
    places = torch.tensor([i for i, box in clear if box])
    clear_boxes = torch.tensor([box for _, box in clear if box])
    seen, elsewhere = (
        logits_of(classifier, crop(x[rows], there))["label"].argmax(dim=1)
        for rows, there in ((image, boxes_of), (places, clear_boxes))
    )
    once = (classes[image] == requested[:, None]).sum(dim=1) == 1
    best = located(x[image[once]], boxes_of[once], requested[once], classifier)
    iou = overlaps(best, boxes_of[once])
    return {
        "objects": share(seen == requested, image),
        "filled": share(seen != nothing, image),
        "empty": share(elsewhere == nothing, places),
        "found": share(iou >= 0.5, image[once]),
        "iou": mean_interval(iou, image[once]),
    }


def located(x: Tensor, boxes: Tensor, labels: Tensor, classifier: Classifier) -> Tensor:
    """Where boxes of the same sizes show the requested classes best: (J, 4).

    x (J, 3, H, W), boxes (J, 4) xyxy, labels (J,). Tries GRID x GRID positions over the image,
    then FINE x FINE near the best of them; the requested position is not privileged.
    """
    found = []
    for image, box, label in zip(x, boxes, labels.tolist(), strict=True):
        size = box[2:] - box[:2]
        room = (1 - size).clamp(min=0)  # where the top left corner can be
        corner, reach = room / 2, room / 2
        for n in (GRID, FINE):
            steps = (corner + torch.linspace(-1, 1, n).outer(reach)).clamp(min=0).minimum(room)
            corners = torch.cartesian_prod(*steps.unbind(1))  # (n * n, 2)
            places = torch.cat([corners, corners + size], dim=1)
            crops = crop(image.expand(len(places), -1, -1, -1), places)
            scores = logits_of(classifier, crops)["label"].log_softmax(dim=1)[:, label]
            corner, reach = corners[scores.argmax()], room / (GRID - 1)
        found.append(torch.cat([corner, corner + size]))
    return torch.stack(found)


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of two lists of xyxy boxes: (J, 4), (J, 4) -> (J,)."""
    from torchvision.ops import box_iou  # here: it takes seconds to import

    return box_iou(a, b).diagonal()


@controlled
def map_following(x: Tensor, maps: Batch, segmenter: Segmenter) -> dict[str, Measured]:
    """Whether the segmenter sees the requested `semantic` maps (N, H, W) in x (N, 3, H, W).

    pixels: the share with the requested label; iou: the mean over an image's requested labels.
    """
    pixels, iou = agreement(logits_of(segmenter, x).argmax(1), maps["semantic"])
    return {"pixels": mean_interval(pixels), "iou": mean_interval(iou)}


def given_of(x: Tensor, task: str, f: int = 4, *, seed: int = 0, **options: Any) -> Batch:
    """The input of a restoration of x (N, 3, H, W) in [-1, 1]: `low_res`, or `image` and `mask`.

    task: "low_res" or "inpaint". options: `masks`, as of `task_inputs`. Determined by the seed
    alone, so the same for every model and baseline.
    """
    rng = BatchRandom(torch.Generator().manual_seed(seed))
    return task_inputs({"image": x}, task, f, rng, **options)


def pasted(x: Tensor, given: Batch) -> Tensor:
    """Inpainting: the known pixels as given, x in the hole; other tasks: x itself."""
    if "mask" not in given:
        return x
    return torch.where(given["mask"].to(x.device) > 0.5, given["image"].to(x), x)


def restored(model: LatentDiffusion, given: Batch, **sampling: Any) -> Tensor:
    """A sample for each input, with the known pixels pasted in: (N, 3, H, W) in [-1, 1], CPU."""
    return pasted(model.sample(given, **sampling).cpu(), given)


def baseline(given: Batch, f: int = 4) -> Tensor:
    """The restoration without learning: bicubic enlargement, or the mean colour in the hole."""
    if "mask" in given:
        return mean_fill(given["image"], given["mask"])
    return enlarge(given["low_res"], f)


def kept(x: Tensor, given: Batch, f: int = 4) -> Tensor:
    """Consistency of x (N, 3, H, W) with its input: PSNR in dB, (N,).

    Super-resolution: of x shrunk again against `low_res`. Inpainting: of the known pixels, before
    they are pasted.
    """
    if "mask" in given:
        known = given["mask"] > 0.5
        return psnr(torch.where(known, given["image"], 0.0), torch.where(known, x, 0.0))
    return psnr(given["low_res"], shrink(x, f))


def evaluate_restoration(
    model: LatentDiffusion,
    x: Tensor,
    given: Batch,
    groups: int = 10,
    seed: int = 0,
    **sampling: Any,
) -> dict[str, Evaluation]:
    """A model of super-resolution or inpainting on images x (N, 3, H, W), and its baseline.

    given: the inputs, as from `given_of`. Keys "model", and "bicubic" or "mean fill"; each as
    `evaluate_images(paired=True)`. The model also has `kept`, its consistency with the input, and
    `kept_shuffled`, with permuted inputs.
    """
    f, raw = model.autoencoder.f, model.sample(given, seed=seed, **sampling).cpu()
    images = {"model": pasted(raw, given)}
    images["mean fill" if "mask" in given else "bicubic"] = baseline(given, f)
    options = {"paired": True, "groups": groups, "seed": seed}
    found = {name: evaluate_images(x, made, **options) for name, made in images.items()}
    consistency = controlled(lambda x, given: {"kept": mean_interval(kept(x, given, f))})
    follows = consistency(raw, given, seed=seed)
    found["model"] |= follows
    found["model"].settings |= follows.settings | sampling
    return found


def draw_conditions(
    model: LatentDiffusion,
    n: int,
    seed: int,
    data: ImageDataset | None = None,
    *,
    styled: bool = False,
) -> tuple[Any, Batch, Tensor]:
    """n conditions for `model.sample`, what they request, and their real images (n, 3, S, S).

    data: default, held-out emoji; n random images, repeated where it has fewer, but a restoration
    takes each image once. Layouts and maps are of held-out scenes. styled: captions name the
    style. Requested: columns as `text_following` and `layout_following` take them, `semantic`, or
    what a restoration is given.
    """
    kind, size = model.config.conditioner.kind, model.config.image_size
    if kind in ("layout", "semantic"):
        scenes = ScenesDataset("val", size, n=n)
        requested = {key: scenes.columns[key] for key in ("boxes", "classes")}
        requested["semantic"] = scenes.maps.long()
        y = {"semantic": requested["semantic"]} if kind == "semantic" else requested
        return y, requested, as_float(scenes.images)
    data = data or EmojiDataset("val", size)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    if kind in ("low_res", "inpaint"):
        x = as_float(data.images[order[:n]])
        given = given_of(x, kind, model.autoencoder.f, seed=seed)
        return given, given, x
    rows = order[torch.arange(n) % len(data)]
    x, captions = as_float(data.images[rows]), [data.captions[i] for i in rows.tolist()]
    if kind == "none":
        return None, {}, x
    requested = {"label": data.labels[rows], "group": data.group_ids[rows]}
    if styled:
        requested["style"] = data.style_ids[rows]
        names = [data.styles[i] for i in requested["style"].tolist()]
        captions = list(map(style_caption, captions, names))
    key = next(key for key in ("hexcode", "file", "caption") if key in data.columns)
    subjects = np.unique(data.columns[key], return_inverse=True)[1]
    requested["subject"] = torch.from_numpy(subjects)[rows]
    classes = [data.classes[i] for i in requested["label"].tolist()]
    return classes if kind == "class" else captions, requested, x


FOLLOWING: dict[str, tuple[str, Callable[..., Evaluation]]] = {  # by kind: who tells, and how
    "class": ("emoji-classifier", evaluate_classes),
    "text": ("emoji-classifier", text_following),
    "frozen_text": ("emoji-classifier", text_following),
    "layout": ("scenes-classifier", layout_following),
    "semantic": ("scenes-segmenter", map_following),
}


def evaluate_model(
    model: nn.Module,
    *,
    data: DataConfig | None = None,
    split: str = "val",
    classifier: nn.Module | None = None,
    per_class: int = 24,
    n: int = 128,
    guidance_scale: Sequence[float] = (3.0,),
    seed: int = 0,
    **sampling: Any,
) -> dict[str, Evaluation]:
    """Evaluate a first stage, a diffusion model or a classifier, by default on held-out data.

    data: default, the images in `data/` of the model's task; samples for others are compared with
    these images. split: "val", or "all". classifier: of a diffusion model's samples; default, the
    shipped one where it knows the data. per_class, n: samples of each class, or in all, at each
    guidance scale. Raises ValueError for data and classifiers that do not suit the model.
    """
    if not isinstance(model, LatentDiffusion):
        return evaluate_network(model, data, split, n, seed)
    config, how, found = model.config.conditioner, {"seed": seed, **sampling}, {}
    kind, home = config.kind, "scenes" if config.kind in ("layout", "semantic") else "emoji"
    data = replace(data or DataConfig(kind=home), size=model.config.image_size)
    if home == "scenes" and (data.kind, split) != ("scenes", "val"):
        raise ValueError(f"data and split must be 'scenes' and 'val' for the condition {kind!r}")
    val = None if home == "scenes" else data.dataset(split)
    if kind in ("low_res", "inpaint"):
        given, _, x = draw_conditions(model, n, seed, val)
        return evaluate_restoration(model, x, given, **how)
    if known := data.kind == home and kind in FOLLOWING:
        name, follow = FOLLOWING[kind]
        shipped = pretrained(name).to(model.device)
        classifier, labels = classifier or shipped, shipped.config.labels
    else:
        follow, labels = text_following if classifier else None, val.classes
        if min(n, len(val)) < 7:
            raise ValueError(f"n={n} and {len(val)} images of {val.name} must be at least 7 each")
    others = classifier and getattr(classifier.config, "labels", None) != labels
    if others and follow is not evaluate_classes:
        raise ValueError(f"classifier must know these classes, in order: {', '.join(labels):.200}")
    styles = ("plain, ", "styled, ") if known and follow is text_following else ("",)
    for scale, style in product(guidance_scale if config.null_batch else (1.0,), styles):
        how["guidance_scale"] = scale
        if follow is evaluate_classes:
            y = [name for name in config.classes for _ in range(per_class)]
            evaluation = evaluate_classes(model, classifier, model.sample(y, **how), split)
        else:
            y, requested, real = draw_conditions(model, n, seed, val, styled=style == "styled, ")
            x = model.sample(y, n=n, **how).cpu()
            evaluation = Evaluation({}) if known else evaluate_images(val.images, x, seed=seed)
            if follow:
                follows = follow(x, requested, classifier, real=real, seed=seed)
                evaluation |= follows
                evaluation.settings |= follows.settings
        evaluation.settings |= how
        found[f"{style}guidance {scale:g}"] = evaluation
    return found


def evaluate_network(
    model: nn.Module, data: DataConfig | None, split: str, n: int, seed: int
) -> dict[str, Evaluation]:
    """`evaluate_model` of what is not sampled from: a first stage, or a classifier."""
    if isinstance(model, Autoencoder):
        found = {}
        for val in (data or DataConfig()).parts(split):
            clusters = getattr(val, "photo_ids", None)  # crops of one photograph
            options = {"clusters": clusters, "seed": seed}
            found[val.name] = evaluate_first_stage(model, val.images, **options)
        return found
    if isinstance(model, Segmenter):
        scenes = ScenesDataset("val", 64, n=n)
        maps, x = {"semantic": scenes.maps.long()}, as_float(scenes.images)
        return {"held-out scenes": map_following(x, maps, model, seed=seed)}
    labels, questions = model.config.labels, ("label", "group", "style")
    crops = labels == CROP_CLASSES and CropsDataset(ScenesDataset("val", 64, n=1000))
    val = crops or (data or DataConfig(subgroups=labels)).dataset(split)
    if val.classes != labels:
        said = f"the classifier knows {', '.join(labels):.90}, not {', '.join(val.classes):.90}"
        raise ValueError(said)
    found = {q: accuracy(model, val.images, val.columns[q], q) for q in questions}
    return {"held-out images": Evaluation(found)}
