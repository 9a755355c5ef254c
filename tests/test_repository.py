"""What the repository promises about itself: sizes, names, the README's numbers."""

import importlib.util
import json
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from minildm import PRESETS, EmojiDataset, evaluation, pretrained
from minildm.checkpoints import from_dict, read_card
from minildm.judge import correct

ROOT = Path(__file__).resolve().parent.parent


def collect() -> ModuleType:
    """data/results/collect.py as a module."""
    spec = importlib.util.spec_from_file_location("collect", ROOT / "data/results/collect.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tracked() -> list[Path]:
    """The files of the repository; what git would commit."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_tree_stays_small() -> None:
    sizes = {path: path.stat().st_size for path in tracked()}
    assert sum(sizes.values()) < 56 * 2**20
    assert sum(s for p, s in sizes.items() if p.suffix == ".safetensors") < 24e6
    assert sizes[ROOT / "data/emoji/emoji.npz"] <= 18e6


def test_environment_yml_installs_the_project_alone() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [pip] = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    [line] = pip
    assert set(re.fullmatch(r"-e \.\[(.*)\]", line)[1].split(",")) <= set(
        project["optional-dependencies"]
    )
    assert f"python {project['requires-python']}" in environment["dependencies"]
    assert environment["name"] == project["name"]


def test_the_readme_shows_the_committed_results() -> None:
    readme, results = (ROOT / "README.md").read_text(), ROOT / "data/results/demo.json"
    assert collect().with_table(readme, json.loads(results.read_text())) == readme


def test_what_the_readme_names_is_there() -> None:
    readme = (ROOT / "README.md").read_text()
    links = [m for m in re.findall(r"\]\(([^)]+)\)", readme) if not m.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
    modules = set(re.findall(r"`(\w+)/?`", readme.split("| layer |")[1].split("##")[0]))
    known = {path.stem for path in (ROOT / "minildm").iterdir()} - {"__init__", "__main__"}
    assert {name for name in known if not name.startswith("__")} == modules - {"minildm"}


def test_the_demo_met_its_goals() -> None:
    """On two cores: ten minutes, 26 dB, and three quarters of the judge's rate on real ones."""
    results = json.loads((ROOT / "data/results/demo.json").read_text())
    assert results["scale"] == "cpu"
    assert results["device"] == "cpu, 2 threads"
    presets = {"first stage": "emoji-kl-f4", "diffusion": "emoji-class"}
    for stage, preset in presets.items():  # these very recipes, not older ones
        made = from_dict(type(PRESETS[preset]), results["experiments"][stage])
        assert made == PRESETS[preset]
    assert sum(results["train_seconds"].values()) <= 600
    assert results["psnr"] >= 26
    fresh = results["judge"]["fresh"]
    assert len(fresh["per_group_samples"]) >= 6
    assert fresh["accuracy_samples"] >= 0.75 * fresh["accuracy_real"]


SHIPPED = (
    *("emoji-kl-f4", "emoji-class", "emoji-text", "scenes-layout"),
    *("emoji-sr", "emoji-inpaint", "scenes-semantic"),
    *("emoji-judge", "scenes-judge", "scenes-segmenter"),
)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_has_a_card_and_half_precision(name: str) -> None:
    folder = ROOT / "data/weights" / name
    card, readme = read_card(folder), (ROOT / "data/weights/README.md").read_text()
    assert {"data", "pictures", "train"} <= card["info"].keys()
    assert f"## {name}" in readme
    assert f"minildm train {name}" in readme
    assert f"--steps {card['info']['train']['steps']}" in readme
    parameters = sum(p.numel() for p in pretrained(name).parameters())
    assert (folder / "model.safetensors").stat().st_size < 2.2 * parameters + 20_000


def test_the_shipped_first_stage_normalises_latents_it_never_saw() -> None:
    x = evaluation.pictures(EmojiDataset("val", 64))[:128]
    with torch.no_grad():
        z = pretrained("emoji-kl-f4").encode(x, sample=False)
    assert 0.8 < z.std() < 1.2


def test_shuffled_classes_are_judged_at_chance() -> None:
    """A model that ignored its condition would score the same on both."""
    model, judge = pretrained("emoji-class"), pretrained("emoji-judge")
    val = EmojiDataset("val", 64, subgroups=model.config.conditioner.classes)
    x = evaluation.sample_classes(model, 4, steps=10, guidance_scale=3.0, seed=1)
    asked = evaluation.group_of_class(val).repeat_interleave(4)
    order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0))
    right, shuffled = (correct(judge, x, y).float().mean() for y in (asked, asked[order]))
    assert right > 0.5
    assert shuffled < 0.4 < right
