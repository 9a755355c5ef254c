"""data/results: its two scripts, and that what is shown is what is committed."""

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

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


def test_another_subgroup_of_the_kind_is_right_and_no_kind_is_wrong() -> None:
    labels = ("food-a", "food-b", "animal-a", "heart")
    assert [prompts.kind_of(name) for name in labels] == [0, 0, 1, -1]

    def classifier(x: Tensor) -> dict[str, Tensor]:
        return {"label": one_hot(x.flatten().long(), 4)}

    classifier.config, classifier.parameters = SimpleNamespace(labels=labels), lambda: iter(())
    requested = prompts.of_kinds(["food-a"] * 12 + ["animal-a"] * 4, list("abcdefghijklmnop"))
    shown = prompts.of_kinds([*labels[:3]] * 10, [f"{i}" for i in range(30)])  # 20 food, 10 animals
    x = torch.tensor([0.0, 1, 3, 2] * 3 + [2, 2, 2, 3])
    real = torch.tensor([float(i % 3 if i % 2 else 3) for i in range(30)])
    found = prompts.kind_following(x, requested, classifier, real, shown)
    assert found["kind"].value == (6 + 3) / 16
    assert found["kind_real"].value == pytest.approx(12 / 16 * 10 / 20 + 4 / 16 * 5 / 10)
