"""Keep what a demo gave: `python data/results/collect.py runs/demo`.

Copies its results.json and two of its pictures here, and writes the table of the README.
"""

import json
import sys
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
README = HERE.parent.parent / "README.md"
PICTURES = {"samples.png": "demo_fresh.png", "samples_shipped.png": "demo_shipped.png"}
BEGIN, END = "<!-- demo table -->\n", "<!-- /demo table -->"


def table(results: dict) -> str:
    """The demo's results as Markdown."""
    judge, minutes = results["judge"], results["train_seconds"]
    fresh, shipped = judge["fresh"], judge["shipped"]
    rows = [
        ("hardware, seed", f"{results['device']}; torch {results['versions']['torch']}; "
         f"seed {results['seed']}"),
        ("training", " + ".join(f"{s / 60:.1f} min ({name})" for name, s in minutes.items())),
        ("PSNR on validation emoji, 64 px", f"{results['psnr_intervals']['psnr']} dB; bicubic x4 "
         f"{results['psnr_intervals']['psnr_bicubic']} dB"),
        ("judge names the asked group, mean over six groups",
         f"{fresh['accuracy_samples']:.2f} of samples (N={fresh['n_samples']}), "
         f"{fresh['accuracy_real']:.2f} of real pictures (N={fresh['n_real']})"),
        ("the same for the shipped model",
         f"{shipped['accuracy_samples']:.2f} of samples (N={shipped['n_samples']}); "
         f"PSNR {results['psnr_intervals']['psnr_shipped']} dB"),
    ]  # fmt: skip
    lines = ["| `make demo` | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows)]
    return "\n".join(lines) + "\n"


def with_table(readme: str, results: dict) -> str:
    """The README's text with the table between its two markers made anew."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table(results) + END + rest.split(END)[1]


def main() -> None:
    """Copy from the run folder that the command line names."""
    run_dir = Path(sys.argv[1])
    results = json.loads((run_dir / "results.json").read_text())
    (HERE / "demo.json").write_text(json.dumps(results, indent=2) + "\n")
    for source, target in PICTURES.items():
        with Image.open(run_dir / source) as picture:  # 256 colours: a third of the bytes
            picture.convert("RGB").quantize(256).save(HERE / target, optimize=True)
    README.write_text(with_table(README.read_text(), results))


if __name__ == "__main__":
    main()
