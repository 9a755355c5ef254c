"""What the repository promises about itself: names, links, sizes, commands."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import minildm
from minildm.training.checkpoint import pretrained, read_card

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("INSTRUCTORS", "COSTS", "METHOD", "GLOSSARY")
PAGES = ("README.md", *(f"notebooks/{name}.md" for name in NAMES))


def test_the_tree_stays_small() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [path for name in listed.stdout.split("\0") if (path := ROOT / name).is_file()]
    assert sum(path.stat().st_size for path in files) < 60 * 2**20


def test_every_public_name_is_importable() -> None:
    assert all(getattr(minildm, name) is not None for name in minildm.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = minildm.nothing


def test_environment_yml_installs_the_project_alone() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [[line]] = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert line == "-e .[test]" and "test" in project["optional-dependencies"]
    assert f"python {project['requires-python']}" in environment["dependencies"]


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str) -> None:
    text, folder = (ROOT / page).read_text(), (ROOT / page).parent
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links and [link for link in links if not (folder / link).exists()] == []
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, page, "exec")
        for module, names in re.findall(r"^from (minildm\S*) import (.+)$", block, re.MULTILINE):
            imported = __import__(module, fromlist=["x"])
            assert all(hasattr(imported, name) for name in names.split(", "))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_demo_met_its_goals(seed: int) -> None:
    """26 dB and an accuracy of at least 0.70."""
    results = json.loads((ROOT / f"data/results/demo_seed{seed}.json").read_text())
    assert (results["scale"], results["seed"]) == ("cpu", seed)
    assert results["psnr_samples"] >= 26 and results["accuracy_samples"] >= 0.70
    readme = (ROOT / "README.md").read_text()
    assert results["intervals"]["psnr_samples"] in readme
    assert f"{results['accuracy_samples']:.2f}" in readme


@pytest.mark.parametrize("name", sorted(p.name for p in ROOT.glob("data/weights/*-*")))
def test_a_shipped_model_has_a_card_and_half_precision(name: str) -> None:
    folder = ROOT / "data/weights" / name
    card, readme = read_card(folder), (ROOT / "data/weights/README.md").read_text()
    assert {"data", "train"} <= card["info"].keys()
    assert f"## {name}\n" in readme and f"minildm train {name}" in readme
    parameters = sum(p.numel() for p in pretrained(name).parameters())
    assert (folder / "model.safetensors").stat().st_size < 2.2 * parameters + 20_000
