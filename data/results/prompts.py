"""Twelve prompts in five styles: `python data/results/prompts.py [MODEL]`.

Samples them from the shipped text model, or from a model's folder, and asks a classifier which
kind of thing it recognises. Writes, here or into --out, `prompts.png` (a row a prompt, a column a
style: the first sample of each) and `prompts.json`, and, here, the README's line. No image is
selected. The prompts are captions of the training data, of all five kinds.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minildm import EmojiDataset, as_float, describe, load_model, pick_device, plots, pretrained
from minildm.data.emoji import STYLES
from minildm.data.transforms import style_caption
from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.evaluation.following import controlled, share
from minildm.evaluation.intervals import Evaluation, Measured, jackknife, random_groups
from minildm.files import fingerprint, write_json
from minildm.layers import Batch
from minildm.training.classifier import Classifier, logits_of

HERE = Path(__file__).resolve().parent
README = HERE.parent.parent / "README.md"
KINDS = ("food-", "animal-", "face-", "transport-", "place-building")  # categories of emoji
BEGIN, END = "<!-- prompts -->\n", "<!-- /prompts -->"
PROMPTS = (
    *("a red apple", "a hamburger", "a doughnut", "a dog face", "a penguin", "a whale"),
    *("a grinning face", "a crying face", "a bus", "a rocket", "a house", "a castle"),
)


def kind_of(subgroup: str) -> int:
    """Index into KINDS of a subgroup's category; -1: none of them."""
    return next((i for i, kind in enumerate(KINDS) if subgroup.startswith(kind)), -1)


def right_kind(x: Tensor, kinds: Tensor, classifier: Classifier) -> Tensor:
    """Whether the classifier names a subgroup of the kinds (N,) in x (N, 3, H, W): (N,) bool."""
    of_label = torch.tensor([kind_of(label) for label in classifier.config.labels])
    return of_label[logits_of(classifier, x)["label"].argmax(dim=1)] == kinds


def of_kinds(subgroups: list[str], subjects: list[str]) -> Batch:
    """`kind` and `subject`, whose images are not independent, as numbers: (N,) int64 each."""
    numbers = torch.from_numpy(np.unique(subjects, return_inverse=True)[1])
    return {"kind": torch.tensor([kind_of(name) for name in subgroups]), "subject": numbers}


@controlled
def kind_share(x: Tensor, requested: Batch, classifier: Classifier) -> dict[str, Measured]:
    """The share of x (N, 3, H, W) of the requested kind."""
    right = right_kind(x, requested["kind"], classifier)
    return {"kind": share(right, requested["subject"])}


def kind_following(
    x: Tensor,
    requested: Batch,
    classifier: Classifier,
    real: Tensor,
    shown: Batch,
    seed: int = 0,
) -> Evaluation:
    """Whether the classifier recognises the requested kinds in x.

    real: other, real images (M, 3, H, W), and what is shown there, reweighted to the requested
    kinds, each of which must be among them.
    """
    found = kind_share(x, requested, classifier, seed=seed)
    wanted, there = (some["kind"].tolist() for some in (requested, shown))
    weights = torch.tensor([wanted.count(kind) / there.count(kind) for kind in there]).double()
    rows = torch.stack([weights * right_kind(real, shown["kind"], classifier), weights], dim=1)

    def mean(rows: Tensor) -> Tensor:
        return rows[:, 0].sum() / rows[:, 1].sum()

    draw, both = torch.Generator().manual_seed(seed), (requested, shown)
    groups = [random_groups(len(s["kind"]), 10, draw, s["subject"]) for s in both]
    found["kind_real"] = jackknife(mean, rows, groups=groups[1:], bounds=(0.0, 1.0))
    return found


def all_prompts(n: int) -> tuple[list[str], Batch]:
    """Every prompt in every style, row by row, n times, and what they request: (60 n,)."""
    train = EmojiDataset("train", unpaired=8)
    labels = dict(zip(train.captions, train.labels.tolist(), strict=True))
    rows = n * [(prompt, style) for prompt in PROMPTS for style in STYLES]
    names = [train.classes[labels[prompt]] for prompt, _ in rows]
    captions = [style_caption(prompt, style) for prompt, style in rows]
    return captions, of_kinds(names, [prompt for prompt, _ in rows])


def held_out(size: int) -> tuple[Tensor, Batch]:
    """Validation images of the five kinds, (M, 3, S, S) in [-1, 1], and what they show."""
    val = EmojiDataset("val", size)
    names = [val.classes[label] for label in val.labels.tolist()]
    rows = [i for i, name in enumerate(names) if kind_of(name) >= 0]
    shown = of_kinds([names[i] for i in rows], [val.hexcodes[i] for i in rows])
    return as_float(val.images[rows]), shown


def measure(model: LatentDiffusion, n: int, **sampling: Any) -> tuple[Tensor, Evaluation]:
    """All samples, (60 n, 3, S, S), and how often the classifier recognises the kind."""
    (captions, requested), classifier = all_prompts(n), pretrained("emoji-classifier")
    x = model.sample(captions, **sampling).cpu()
    real = held_out(model.config.image_size)
    found = kind_following(x, requested, classifier, *real, seed=sampling["seed"])
    found.settings |= {"classifier": "emoji-classifier", "n": n, **sampling}
    return x, found


def line(found: Evaluation) -> str:
    """The README's words on the sheet, the sheet itself included."""

    def percent(share: Measured) -> str:
        value, low, high = (f"{100 * number:.0f} %" for number in share[:3])
        return f"{value} [{low}, {high}]"

    kind, real, chance = (found[f"kind{which}"] for which in ("", "_real", "_shuffled"))
    return (
        "![Twelve prompts in five styles, sampled from the shipped text model]"
        "(data/results/prompts.png)\n\n"
        "Twelve prompts in five styles, the first sample of each. A classifier recognises the "
        "requested kind (food, animal, face, vehicle or building) in "
        f"{percent(kind)} of such samples (N={kind.n}), in {percent(real)} of real held-out "
        f"images (N={real.n}), and in {percent(chance)} with shuffled prompts.\n"
    )


def with_line(readme: str, found: Evaluation) -> str:
    """The README's text with the part between the markers replaced."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + line(found) + END + rest.split(END)[1]


def main(argv: list[str] | None = None) -> None:
    """Sample, count, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="emoji-text", help="a folder or a shipped name")
    parser.add_argument("--n", type=int, default=8, help="samples of each prompt in each style")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args(argv)
    place = pick_device(args.device)
    model = load_model(args.model) if Path(args.model).is_dir() else pretrained(args.model)
    sampling = {"steps": 25, "guidance_scale": 3.0, "seed": 0}
    x, found = measure(model.to(place), args.n, **sampling)
    facts = {"model": Path(args.model).name, "weights": fingerprint(model)[:16]}
    write_json(args.out / "prompts.json", facts | {"device": describe(place)} | found.as_dict())
    sheet, heads = x[: len(PROMPTS) * len(STYLES)], [f"{style} style" for style in STYLES]
    plots.save(plots.class_grid(sheet, PROMPTS, heads=heads), args.out / "prompts.png")
    if args.out == HERE:
        README.write_text(with_line(README.read_text("utf-8"), found), "utf-8")
    print(found)


if __name__ == "__main__":
    main()
