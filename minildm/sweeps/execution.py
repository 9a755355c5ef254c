"""One run of a sweep, carried out by a process of its own, in a folder that is locked meanwhile.

A run is a papermill execution of notebooks/sweeps/one_run.ipynb with the run as its parameter:
the executed notebook stays in the run's folder, to be read. `perform` may be called anywhere that
sees the folder: in a thread here, or on another machine by a cluster's worker.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import filelock

from minildm.files import atomic_write, data_dir, write_json
from minildm.sweeps.one_run import RESULTS
from minildm.sweeps.sweep import Run

NOTEBOOK, SPEC, ERROR = "notebook.ipynb", "run.json", "error.txt"
PATIENCE = 30.0  # seconds until what a killed process has left behind is surely gone


class Outcome(NamedTuple):
    """How a run ended: "done", "was done", "busy" (another process has it), or "failed"."""

    name: str
    state: str
    message: str = ""


class Place(NamedTuple):
    """Where runs go: a device ("cuda:1", "mps", "cpu"; "": the best there is), threads of a run."""

    device: str = ""
    threads: int = 1


def template() -> Path:
    """The notebook that runs execute; FileNotFoundError outside of a clone."""
    path = data_dir().parent / "notebooks/sweeps/one_run.ipynb"
    if not path.is_file():
        raise FileNotFoundError(f"no notebook at {path}: a sweep needs a clone's notebooks/")
    return path


def results_of(folder: Path, run: Run) -> dict | None:
    """What a finished run left; None where it is not finished. ValueError for another run's."""
    path = folder / RESULTS
    if not path.is_file():
        return None
    results = json.loads(path.read_text())
    if results["run"] != run.as_dict():
        raise ValueError(f"{path} is of another run than {run.name}: delete {folder} to redo it")
    return results


def perform(
    folder: str | Path,
    content: dict,
    place: Place = Place(),  # noqa: B008, a tuple
    wait: float = PATIENCE,
    started: Callable[[subprocess.Popen], None] = lambda _process: None,
) -> Outcome:
    """Carry out a run (`Run.as_dict`) in its folder, from where it was left; how it ended.

    A finished one is not done again. wait: seconds for a folder that another process has locked;
    below 0: without end. started: is given the process, so that a caller can end it. A failure is
    an Outcome, with the notebook that shows where; error.txt has the rest.
    """
    folder, run = Path(folder), Run.from_dict(content)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", timeout=wait):
            if results_of(folder, run) is not None:
                return Outcome(run.name, "was done")
            write_json(folder / SPEC, content)
            (folder / ERROR).unlink(missing_ok=True)
            code, said = _in_process(folder, place, started)
            if code == 0 and results_of(folder, run) is not None:
                return Outcome(run.name, "done")
            with atomic_write(folder / ERROR) as file:
                file.write(said.encode())
            lines = [line for line in said.splitlines() if line.strip()]
            return Outcome(run.name, "failed", lines[-1] if lines else f"exit status {code}")
    except filelock.Timeout:
        return Outcome(run.name, "busy", f"{folder} is locked by another process")


def _in_process(
    folder: Path, place: Place, started: Callable[[subprocess.Popen], None]
) -> tuple[int, str]:
    """`main` on the folder, in a process of its own; it ends when this one does, however."""
    kind = place.device.partition(":")[0]
    process = subprocess.Popen(
        [sys.executable, "-c", f"import {__name__} as e; e.main()", str(folder.resolve()), kind],
        stdin=subprocess.PIPE,  # closed by the system when we are gone: see `_end_with_parent`
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment(place),
    )
    started(process)
    with process:
        said = process.stderr.read()
        return process.wait(), said


def environment(place: Place) -> dict[str, str]:
    """Of a run's process: its device alone, and as many threads as it may have."""
    threads = {name: str(place.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    known = dict(os.environ) | threads | {"TQDM_DISABLE": "1"}
    kind, _, number = place.device.partition(":")
    if kind == "cuda" and number:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        known["CUDA_VISIBLE_DEVICES"] = visible[int(number)] if visible != [""] else number
    return known


def _end_with_parent() -> None:
    """Wait until stdin closes, then end this process and the notebook's kernel at once.

    A worker that is killed could not do so itself, and its run goes on elsewhere.
    """
    import psutil

    while os.read(sys.stdin.fileno(), 1):  # not sys.stdin.read: its lock would outlive `main`
        pass
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(1)


def main() -> None:
    """Of a run's process: execute its notebook; the last line on stderr says what was wrong."""
    from papermill.exceptions import PapermillExecutionError

    from minildm.notebook import run_notebook

    folder, device = Path(sys.argv[1]), sys.argv[2]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run = json.loads((folder / SPEC).read_text())
    where = {"run_dir": str(folder), "shared": str(folder.parent.parent), "device": device}
    try:
        run_notebook(template(), folder / NOTEBOOK, {"run": run, **where})
    except PapermillExecutionError as error:
        sys.stderr.write("\n".join(error.traceback) + f"\n{error.ename}: {error.evalue}\n")
        sys.exit(1)
