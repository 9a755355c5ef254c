"""Keep what lessons measured: `python data/results/lessons.py 02_autoencoder_kl ...`.

Runs each notebook at cpu scale in a temporary folder and keeps its results.json under its name
in lessons.json, as it is. A notebook at smoke scale, whose training is too short to show a
claim, asserts that claim on these numbers:

    json.loads((data_dir() / "results/lessons.json").read_text())["02_autoencoder_kl"]
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from minildm.files import write_json
from minildm.notebook import run_notebook

HERE = Path(__file__).resolve().parent
NOTEBOOKS, TABLE = HERE.parent.parent / "notebooks", HERE / "lessons.json"


def measure(notebook: Path, scale: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Execute a notebook; what it wrote into its results.json."""
    with tempfile.TemporaryDirectory() as folder:
        parameters = {"scale": scale, "seed": seed, "run_dir": f"{folder}/run"}
        run_notebook(notebook, Path(folder) / notebook.name, parameters)
        return json.loads((Path(folder) / "run/results.json").read_text())


def keep(table: Path, name: str, results: dict[str, Any]) -> None:
    """Put one lesson's results into the table, in order; the other lessons' stay."""
    kept = json.loads(table.read_text()) if table.is_file() else {}
    write_json(table, dict(sorted({**kept, name: results}.items())))


def main(names: list[str]) -> None:
    """Measure the notebooks that the command line names, one after the other."""
    paths = [NOTEBOOKS / f"{name}.ipynb" for name in names]
    missing = [path.stem for path in paths if not path.is_file()]
    if missing or not names:
        known = ", ".join(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
        sys.exit(f"no notebook {', '.join(missing) or 'named'}; there are {known}")
    for path in paths:
        keep(TABLE, path.stem, measure(path))
        print(f"{path.stem}: kept in {TABLE.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
