"""Twelve prompts in five styles: `python data/results/prompts.py [MODEL]`.

Samples them from the shipped text model, or from a model's folder, as its card says, and asks a
classifier which subgroup and style it recognises. Writes, here or into --out, `prompts.png` (a row
a prompt, a column a style: the first sample of each) and `prompts.json`, and, here, the README's
line. No image is selected. The prompts are captions of the training data.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minildm import EmojiDataset, as_float, describe, load_model, pick_device, plots, pretrained
from minildm.data.emoji import STYLES
from minildm.data.transforms import style_caption
from minildm.evaluation.following import text_following
from minildm.evaluation.intervals import Evaluation, Measured
from minildm.files import fingerprint, write_json
from minildm.layers import Batch

HERE = Path(__file__).resolve().parent
README = HERE.parent.parent / "README.md"
BEGIN, END = "<!-- prompts -->\n", "<!-- /prompts -->"
PROMPTS = (
    *("a red apple", "a hamburger", "a doughnut", "a dog face", "a penguin", "a whale"),
    *("a grinning face", "a crying face", "a bus", "a rocket", "a house", "a castle"),
)


def all_prompts(n: int, size: int = 64) -> tuple[list[str], Batch, Tensor]:
    """Every prompt in every style, row by row, n times: captions, what they request, real images.

    Requested: `label`, `style` and `subject`, (60 n,) int64 each; the images, (60 n, 3, S, S) in
    [-1, 1], are the emoji that have these captions.
    """
    emoji = EmojiDataset("train", size)
    drawings = zip(emoji.captions, emoji.style_ids.tolist(), strict=True)
    row_of = {drawing: row for row, drawing in enumerate(drawings)}
    wanted = n * [(prompt, style) for prompt in PROMPTS for style in range(len(STYLES))]
    rows = [row_of[drawing] for drawing in wanted]
    requested = {"label": emoji.labels[rows], "style": emoji.style_ids[rows]}
    subjects = np.unique([prompt for prompt, _ in wanted], return_inverse=True)[1]
    requested["subject"] = torch.from_numpy(subjects)
    captions = [style_caption(prompt, STYLES[style]) for prompt, style in wanted]
    return captions, requested, as_float(emoji.images[rows])


def line(found: Evaluation) -> str:
    """The README's words on the sheet, the sheet itself included."""

    def percent(share: Measured) -> str:
        value, low, high = (f"{100 * number:.0f} %" for number in share[:3])
        return f"{value} [{low}, {high}]"

    def rates(question: str) -> str:
        made, real, chance = (percent(found[question + w]) for w in ("", "_real", "_shuffled"))
        return f"{made} (the emoji themselves: {real}; shuffled prompts: {chance})"

    return (
        "![Twelve prompts in five styles, sampled from the shipped text model]"
        "(data/results/prompts.png)\n\n"
        "Twelve prompts in five styles, the first sample of each. A classifier recognises the "
        f"requested subgroup in {rates('label')}, the style in {rates('style')}; "
        f"N={found['label'].n}.\n"
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
    captions, requested, real = all_prompts(args.n, model.config.image_size)
    x = model.to(place).sample(captions, seed=0).cpu()
    found = text_following(x, requested, pretrained("emoji-classifier"), real=real)
    facts = {"model": Path(args.model).name, "weights": fingerprint(model)[:16]}
    facts |= {"device": describe(place), "seed": 0, "sampling": asdict(model.config.sampling)}
    write_json(args.out / "prompts.json", facts | found.as_dict())
    sheet, heads = x[: len(PROMPTS) * len(STYLES)], [f"{style} style" for style in STYLES]
    plots.save(plots.class_grid(sheet, PROMPTS, heads=heads), path := args.out / "prompts.png")
    colours = Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=4)
    colours.save(path, optimize=True)  # a fifth of the size
    if args.out == HERE:
        README.write_text(with_line(README.read_text("utf-8"), found), "utf-8")
    print(found)


if __name__ == "__main__":
    main()
