"""Show in the README what `make bench` measured: `python data/results/cost.py`.

Reads the five tables (JSON) that `python tests/bench/bench.py --out data/results` writes here.
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent.parent / "README.md"
BEGIN, END = "<!-- cost table -->\n", "<!-- /cost table -->"
KINDS = {"none": "no attention", "fused": "fused attention", "explicit": "explicit softmax"}
UNET_KINDS = {
    "forward": "forward",
    "training": "training step",
    "checkpoint": "training step, gradient checkpointing",
}


def first_stage() -> list[str]:
    """Our time as a part of diffusers', one row for each model and setting."""
    bench = _read("bench_first_stage")
    what = list(dict.fromkeys(row["what"] for row in bench["rows"]))
    cells: dict[str, dict[str, str]] = {}
    for row in bench["rows"]:
        name = f"{row['model']}, {row['setting']}"
        interval = f"[{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
        cells.setdefault(name, {})[row["what"]] = f"{row['ratio']:.2f} {interval}"
    head = f"first stage: our time / diffusers' {bench['machine']['diffusers']} [quartiles]"
    millions = " and ".join(f"{n / 1e6:.1f} M" for n in bench["parameters"].values())
    said = (
        f"{' x '.join(map(str, bench['pictures']))} pictures, {millions} parameters (KL, VQ), "
        f"{bench['dtype']}; {_where(bench)}; medians over {bench['repeats']} pairs of runs in "
        f"turn, half as many for training. Target: {bench['target']}; the median of the rows of "
        f"like with like is {bench['ratio']:.2f}."
    )
    rows = [[name, *row.values()] for name, row in cells.items()]
    return [*_markdown([head, *what], rows), "", said]


def unet() -> list[str]:
    """The same for the UNet; a cell has the settings, one after the other."""
    bench = _read("bench_unet")
    what = list(dict.fromkeys(row["what"] for row in bench["rows"]))
    cells: dict[str, dict[str, list[str]]] = {}
    for row in bench["rows"]:
        name = f"{row['model']}, {row['contest']}"
        cells.setdefault(name, {}).setdefault(row["what"], []).append(f"{row['ratio']:.2f}")
    settings = [setting["name"] for setting in bench["settings"]]
    head = f"UNet: our time / diffusers' {bench['machine']['diffusers']} ({'; '.join(settings)})"
    rows = [[name, *("; ".join(cell) for cell in row.values())] for name, row in cells.items()]
    millions = " and ".join(f"{n / 1e6:.1f} M" for n in bench["parameters"].values())
    medians = ", ".join(
        f"{contest['name']} {contest['ratio']:.2f} (at most {contest['target']})"
        for contest in bench["contests"]
    )
    said = (
        f"{' x '.join(map(str, bench['latents']))} latents, {bench['tokens']} tokens, DDIM draws "
        f"{bench['samples of DDIM']}; {millions} parameters; {_where(bench)}; medians over "
        f"{bench['repeats']} pairs of runs in turn, half as many for training, 3 for DDIM. Over "
        f"the rows of like with like, and the target: {medians}."
    )
    return [*_markdown([head, *what], rows), "", said]


def options() -> list[str]:
    """A training step with each option as a part of the plain one's time."""
    bench = _read("bench_options")
    rows = [
        [row["name"], row["missing"], ""]
        if "missing" in row
        else [
            row["name"],
            f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]",
            f"{row['first_step_seconds']:.1f} s",
        ]
        for row in bench["rows"]
    ]
    head = ["UNet: option of a training", "its time / the plain step's [quartiles]", "first step"]
    said = f"The UNet with cross-attention from above, ours alone; {_where(bench)}."
    return [*_markdown(head, rows), "", said]


def decoding() -> list[str]:
    """MiB above the loaded model, one row a size."""
    memory = _read("decode_memory")
    rows = []
    for size, group in _groups(memory, "size").items():
        peak = {row["attention"]: row["peak"] for row in group}
        shown = [_mib(peak[kind]) for kind in KINDS]
        rows.append([f"{size} px, N = {group[0]['tokens']:,}", *shown, _mib(group[0]["matrix"])])
    head = ["peak of decoding", *KINDS.values(), "an N x N matrix, computed"]
    said = (
        f"One picture through the decoder of {memory['model']} at width {memory['width']}, "
        f"float32, {memory['machine']['device']}; above the loaded model, each in a process of "
        "its own."
    )
    return [*_markdown(head, rows), "", said]


def unet_memory() -> list[str]:
    """MiB above model and optimiser, one row a latent's size."""
    memory = _read("unet_memory")
    rows = []
    for side, group in _groups(memory, "side").items():
        peak = {row["what"]: row["peak"] for row in group}
        rows.append([f"latent of {side} x {side}", *(_mib(peak[kind]) for kind in UNET_KINDS)])
    said = (
        f"One latent, a UNet of {memory['parameters'] / 1e6:.1f} M parameters with "
        f"cross-attention, float32, {memory['machine']['device']}; above weights, gradients and "
        "AdamW's moments, each in a process of its own."
    )
    return [*_markdown(["peak of the UNet", *UNET_KINDS.values()], rows), "", said]


def _read(name: str) -> dict[str, Any]:
    return json.loads((HERE / f"{name}.json").read_text())


def _groups(table: dict[str, Any], key: str) -> dict[int, list[dict[str, Any]]]:
    """The rows by that key's value."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in table["rows"]:
        groups.setdefault(row[key], []).append(row)
    return groups


def _where(bench: dict[str, Any]) -> str:
    machine = bench["machine"]
    load = f", load {machine['load'][0]}" if "load" in machine else ""
    return f"{machine['device']} ({machine['processor']}{load}), torch {machine['torch']}"


def _mib(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 2**20:,.0f} MiB"


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def tables() -> str:
    """All of them as Markdown, each with where and how it was measured."""
    parts = (first_stage, unet, options, decoding, unet_memory)
    return "\n\n".join("\n".join(part()) for part in parts) + "\n"


def with_tables(readme: str) -> str:
    """The README's text with the tables between its two markers made anew."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + tables() + END + rest.split(END)[1]


def main() -> None:
    """Rewrite the README from the files beside this one."""
    README.write_text(with_tables(README.read_text()))


if __name__ == "__main__":
    main()
