"""data/results/lessons.py: what notebooks measured at cpu scale, kept for those at smoke scale."""

import json
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from scripts import command_of

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "data/results/lessons.json"


@pytest.fixture(scope="module")
def lessons() -> ModuleType:
    return command_of("lessons")


def test_a_lesson_runs_at_cpu_scale_and_its_results_come_back(
    lessons: ModuleType, tmp_path: Path
) -> None:
    parameters = new_code_cell(
        'scale = "smoke"\nseed = 3\nrun_dir = "runs"', metadata={"tags": ["parameters"]}
    )
    work = new_code_cell(
        "from pathlib import Path\n"
        "from minildm.files import write_json\n"
        'write_json(Path(run_dir) / "results.json", {"scale": scale, "seed": seed, "psnr": 1.5})'
    )
    path = tmp_path / "98_tiny.ipynb"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=[parameters, work], metadata={"kernelspec": kernel}), path)
    before = path.read_bytes()
    assert lessons.measure(path) == {"scale": "cpu", "seed": 0, "psnr": 1.5}
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_one_lesson_is_replaced_and_the_others_stay(lessons: ModuleType, tmp_path: Path) -> None:
    table = tmp_path / "lessons.json"
    for name, results in (("03_b", {"x": 1}), ("02_a", {"y": 2}), ("03_b", {"x": 3})):
        lessons.keep(table, name, results)
    assert list(json.loads(table.read_text()).items()) == [("02_a", {"y": 2}), ("03_b", {"x": 3})]


@pytest.mark.parametrize("names", [[], ["00_quickstart", "99_none"]])
def test_an_unknown_notebook_stops_it_before_anything_runs(
    lessons: ModuleType, names: list[str]
) -> None:
    with pytest.raises(SystemExit, match=r"no notebook (named|99_none); there are 00_quickstart"):
        lessons.main(names)


def test_what_is_kept_was_measured_at_cpu_scale_by_a_notebook_that_exists() -> None:
    kept = json.loads(TABLE.read_text())
    assert kept and list(kept) == sorted(kept)
    for name, results in kept.items():
        assert (ROOT / f"notebooks/{name}.ipynb").is_file()
        assert (results["scale"], results["seed"]) == ("cpu", 0) and results["seconds"] > 0
