"""data/results: its two scripts, and that what is shown is what is committed."""

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

from minildm import EmojiDataset, as_float
from minildm.evaluation.intervals import Evaluation, Measured

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "data/results"
names = ("prompts", "notebook_costs")
prompts, costs = (SimpleNamespace(**runpy.run_path(str(RESULTS / f"{n}.py"))) for n in names)


def test_the_readme_names_every_file() -> None:
    named = re.findall(r"`(\w+\.(?:json|csv|png))`", (RESULTS / "README.md").read_text())
    there = {path.name for path in RESULTS.iterdir() if path.suffix in (".json", ".csv", ".png")}
    assert sorted(named) == sorted(there)


def test_lessons_were_measured_at_cpu_scale_by_notebooks_that_exist() -> None:
    lessons = json.loads((RESULTS / "lessons.json").read_text())
    for name, results in lessons.items():
        assert (ROOT / f"notebooks/{name}.ipynb").is_file()
        assert (results["scale"], results["seed"]) == ("cpu", 0)


def test_the_pages_show_the_committed_numbers() -> None:
    measured = json.loads((RESULTS / "prompts.json").read_text())["measured"]
    found = Evaluation({name: Measured(**row) for name, row in measured.items()})
    readme = prompts.README.read_text(encoding="utf-8")
    assert prompts.with_line(readme, found) == readme
    page = (ROOT / "notebooks/COSTS.md").read_text(encoding="utf-8")
    assert costs.with_tables(page) == page


def test_the_prompts_request_what_their_emoji_show() -> None:
    captions, requested, real = prompts.all_prompts(2, 32)
    assert captions[5] == "a hamburger, noto style"
    assert requested["style"].tolist() == 24 * [0, 1, 2, 3, 4]
    emoji = EmojiDataset("train", 32)
    burger = emoji.captions.index("a hamburger")  # styles in their order: noto first
    assert requested["label"][65] == emoji.labels[burger]
    assert (real[65] == as_float(emoji.images[burger])).all()
