"""Show in the README what `make bench` measured: `python data/results/cost.py`.

Reads bench_first_stage.json and decode_memory.json, which `python tests/bench/bench.py --out
data/results` writes here.
"""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
README = HERE.parent.parent / "README.md"
BEGIN, END = "<!-- cost table -->\n", "<!-- /cost table -->"
KINDS = {"none": "no attention", "fused": "fused attention", "explicit": "explicit softmax"}


def times(bench: dict[str, Any]) -> list[str]:
    """Our time as a part of diffusers', one row for each model and setting."""
    what = list(dict.fromkeys(row["what"] for row in bench["rows"]))
    cells: dict[str, dict[str, str]] = {}
    for row in bench["rows"]:
        name = f"{row['model']}, {row['setting']}"
        interval = f"[{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
        cells.setdefault(name, {})[row["what"]] = f"{row['ratio']:.2f} {interval}"
    head = f"our time / diffusers' {bench['machine']['diffusers']} [quartiles]"
    return _markdown([head, *what], [[name, *row.values()] for name, row in cells.items()])


def peaks(memory: dict[str, Any]) -> list[str]:
    """MiB above the loaded model, one row a size."""
    sizes = list(dict.fromkeys(row["size"] for row in memory["rows"]))
    head = ["peak of decoding", *KINDS.values(), "an N x N matrix, computed"]
    rows = []
    for size in sizes:
        group = [row for row in memory["rows"] if row["size"] == size]
        peak = {row["attention"]: row["peak"] for row in group}
        shown = [_mib(peak[kind]) for kind in KINDS]
        rows.append([f"{size} px, N = {group[0]['tokens']:,}", *shown, _mib(group[0]["matrix"])])
    return _markdown(head, rows)


def _mib(count: int | None) -> str:
    return "not measured" if count is None else f"{count / 2**20:,.0f} MiB"


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def table(bench: dict[str, Any], memory: dict[str, Any]) -> str:
    """Both tables as Markdown, each with where and how it was measured."""
    machine = bench["machine"]
    load = f", load {machine['load'][0]}" if "load" in machine else ""
    millions = " and ".join(f"{n / 1e6:.1f} M" for n in bench["parameters"].values())
    said = (
        f"{' x '.join(map(str, bench['pictures']))} pictures, {millions} parameters (KL, VQ), "
        f"{bench['dtype']}; {machine['device']} ({machine['processor']}{load}), torch "
        f"{machine['torch']}; medians over {bench['repeats']} pairs of runs in turn, half as many "
        f"for training. Target: {bench['target']}; the median of the rows of like with like is "
        f"{bench['ratio']:.2f}."
    )
    device, width = memory["machine"]["device"], memory["width"]
    below = (
        f"One picture through the decoder of {memory['model']} at width {width}, float32, "
        f"{device}; above the loaded model, each in a process of its own."
    )
    return "\n".join([*times(bench), "", said, "", *peaks(memory), "", below]) + "\n"


def with_table(readme: str, bench: dict[str, Any], memory: dict[str, Any]) -> str:
    """The README's text with the tables between its two markers made anew."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table(bench, memory) + END + rest.split(END)[1]


def main() -> None:
    """Rewrite the README from the two files beside this one."""
    bench, memory = (
        json.loads((HERE / name).read_text())
        for name in ("bench_first_stage.json", "decode_memory.json")
    )
    README.write_text(with_table(README.read_text(), bench, memory))


if __name__ == "__main__":
    main()
