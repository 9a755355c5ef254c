"""Twelve prompts in five styles: `python data/results/prompts.py [MODEL]`.

Draws them by the shipped model of text, or by that in the folder MODEL, and lets the judge say
whether the kind of thing that was asked for is there. Writes, here or into --out:

    prompts.png     a row each prompt, a column each style: the first drawing of each
    prompts.json    shares with intervals, beside real validation pictures and chance

and, here, the README's line. No picture is chosen: the sheet is the beginning of the samples that
are judged. The prompts were fixed before the model was trained: captions of the training data, of
things that everybody knows, from all five kinds.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from torch import Tensor

from minildm import EmojiDataset, load_model, plots, pretrained
from minildm.checkpoints import fingerprint
from minildm.data.variants import style_caption
from minildm.demo import describe
from minildm.diffusion import LatentDiffusion
from minildm.evaluation import on_device, pictures
from minildm.files import atomic_write, write_json
from minildm.following import KINDS, Prompt, kind_following, kind_of, sample_conditions
from minildm.intervals import Evaluation, Measured
from minildm.loop import pick_device

HERE = Path(__file__).resolve().parent
README = HERE.parent.parent / "README.md"
BEGIN, END = "<!-- prompts -->\n", "<!-- /prompts -->"
PROMPTS = {  # caption -> what the data call it
    "a red apple": "food-fruit",
    "a hamburger": "food-prepared",
    "a doughnut": "food-sweet",
    "a dog face": "animal-mammal",
    "a penguin": "animal-bird",
    "a whale": "animal-marine",
    "a grinning face": "face-smiling",
    "a crying face": "face-concerned",
    "a bus": "transport-ground",
    "a rocket": "transport-air",
    "a house": "place-building",
    "a castle": "place-building",
}
GOAL = 0.8  # of the judge's share on real pictures


def asked_for(n: int) -> list[Prompt]:
    """Every prompt in every style, row by row, n times over: (60 n,)."""
    sheet = [
        Prompt(style_caption(caption, style), label, style=style, subject=caption)
        for caption, label in PROMPTS.items()
        for style in EmojiDataset.styles
    ]
    return sheet * n


def real_pictures(size: int) -> tuple[Tensor, list[Prompt]]:
    """Validation pictures of the five kinds, (M, 3, S, S) in [-1, 1], and what they show."""
    val = EmojiDataset("val", size)
    rows = [i for i in range(len(val)) if kind_of(val.classes[val.labels[i]]) >= 0]
    shown = [
        Prompt(val.captions[i], val.classes[val.labels[i]], subject=val.hexcodes[i]) for i in rows
    ]
    return pictures(val)[rows], shown


def two(found: Measured) -> str:
    """A share with its interval, if it has one, to two digits."""
    if math.isnan(found.low):
        return f"{found.value:.2f}"
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def line(results: dict[str, Any]) -> str:
    """The README's words on the sheet, the sheet itself included."""
    found = Evaluation.from_dict(results)
    kinds = f"{', '.join(list(KINDS)[:-1])} or {list(KINDS)[-1]}"
    return (
        "![Twelve prompts in five styles, drawn by the shipped model of text]"
        "(data/results/prompts.png)\n\n"
        "Twelve prompts in five styles, the first drawing of each. The judge sees the asked kind, "
        f"{kinds}, in {two(found['kind'])} of such samples (N={found['kind'].n}), and in "
        f"{two(found['kind_real'])} of real validation pictures (N={found['kind_real'].n}): "
        f"a ratio of {two(found['ratio'])}; by chance, the prompts dealt anew, in "
        f"{two(found['kind_shuffled'])}. `python data/results/prompts.py` draws and counts.\n"
    )


def with_line(readme: str, results: dict[str, Any]) -> str:
    """The README's text with what stands between its two markers made anew."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + line(results) + END + rest.split(END)[1]


def save_sheet(x: Tensor, path: Path) -> None:
    """The first picture of each prompt and style, doubled, in 256 colours."""
    styles = [f"{style} style" for style in EmojiDataset.styles]
    fig = plots.class_grid(x[: len(asked_for(1))], list(PROMPTS), heads=styles)
    with Image.open(plots.save(fig, path)) as picture:
        few, said = picture.convert("RGB").quantize(256), PngImagePlugin.PngInfo()
        said.add_text("Description", picture.info["Description"])
    with atomic_write(path) as file:
        few.save(file, format="png", optimize=True, pnginfo=said)


def measure(
    model: LatentDiffusion, judge: str, n: int, seed: int, **sampling: Any
) -> tuple[Tensor, Evaluation]:
    """All samples, (60 n, 3, S, S), and what the judge sees in them."""
    asked = asked_for(n)
    x = sample_conditions(model, [prompt.caption for prompt in asked], seed=seed, **sampling)
    real, shown = real_pictures(model.config.image_size)
    found = kind_following(x, asked, pretrained(judge), real, shown, seed=seed)
    settings = {"judge": judge, "n": n, "seed": seed, **sampling}
    return x, Evaluation(found.measured, found.settings | settings)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="emoji-text", help="a folder or a shipped name")
    parser.add_argument("--n", type=int, default=8, help="samples of each prompt in each style")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, default=HERE)
    return parser.parse_args()


def main() -> None:
    """Draw, count, write."""
    args = arguments()
    if args.n < 1:
        raise SystemExit(f"--n {args.n} must be at least 1")
    model = load_model(args.model) if Path(args.model).is_dir() else pretrained(args.model)
    place = pick_device(args.device)
    with on_device(model, place):
        sampling = {"steps": args.steps, "guidance_scale": args.guidance_scale}
        x, found = measure(model, "emoji-judge", args.n, args.seed, **sampling)
    results = {"model": Path(args.model).name, "weights": fingerprint(model)[:16]}
    results |= {"device": describe(place), "prompts": PROMPTS, "goal": GOAL, **found.as_dict()}
    write_json(args.out / "prompts.json", results)
    save_sheet(x, args.out / "prompts.png")
    if args.out == HERE:
        README.write_text(with_line(README.read_text(), json.loads(json.dumps(results))))
    print(found)


if __name__ == "__main__":
    main()
