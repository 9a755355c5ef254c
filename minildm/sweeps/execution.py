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
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from minildm.files import atomic_write, data_dir, write_json
from minildm.files import lock as file_lock
from minildm.sweeps.one_run import ENDED, RESULTS, given
from minildm.sweeps.sweep import Run

NOTEBOOK, SPEC, ERROR = "notebook.ipynb", "run.json", "error.txt"
PATIENCE = 30.0  # seconds until what a killed process has left behind is surely gone
GLANCE = 0.2  # seconds between two looks whether a wait has been given up


class Outcome(NamedTuple):
    """How a run ended: "done", "was done", "busy" (another process has it), "failed", or
    "interrupted"."""

    name: str
    state: str
    message: str = ""


class Place(NamedTuple):
    """Where runs go: a device ("cuda:1", "mps", "cpu"; "": the best there is), threads of a run."""

    device: str = ""
    threads: int = 1

    @property
    def kind(self) -> str:
        """As `pick_device` takes it: which of several it is, the environment says."""
        return self.device.partition(":")[0]


class Interrupted(Exception):
    """What was asked for is not wanted any more."""


class Stop:
    """Begins processes, ends all of them at once, and begins none after that."""

    def __init__(self) -> None:
        self._asked, self._mutex = threading.Event(), threading.Lock()
        self._processes: set[subprocess.Popen] = set()

    @property
    def asked(self) -> bool:
        """Whether `set` was called."""
        return self._asked.is_set()

    def set(self) -> None:
        """Ask for the end; processes end themselves, and their kernels, when stdin closes."""
        self._asked.set()
        with self._mutex:
            for process in self._processes:
                if process.poll() is None:
                    process.stdin.close()

    def begin(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen:
        """A process with pipes at stdin and stderr; Interrupted after `set`."""
        with self._mutex:  # so that `set` sees it, or it sees `set`
            if self.asked:
                raise Interrupted
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # closed by the system when we are gone: `end_with_parent`
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=env,
                # Of its own, so that Ctrl-C reaches us alone, who then know why it ended.
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # on Windows
            )
            self._processes = {p for p in self._processes if p.poll() is None} | {process}
        return process


def template() -> Path:
    """The notebook that runs execute; FileNotFoundError outside of a clone."""
    path = data_dir().parent / "notebooks/sweeps/one_run.ipynb"
    if not path.is_file():
        raise FileNotFoundError(f"no notebook at {path}: a sweep needs a clone's notebooks/")
    return path


def results_of(folder: Path, run: Run) -> dict | None:
    """What a finished run left; None where it is not finished.

    ValueError for another run's, and where the model or first stage it was given has changed.
    """
    path = folder / RESULTS
    if not path.is_file():
        return None
    results = json.loads(path.read_text(encoding="utf-8"))
    if results["run"] != run.as_dict():
        raise ValueError(f"{path} is of another run than {run.name}: delete {folder} to redo it")
    plan = run.plan()
    if results.get("given") not in (None, given(plan)):
        name = plan.model or plan.trained_first_stage
        raise ValueError(f"{path} is of other weights than {name} has now: delete {folder} to redo")
    return results


def perform(
    folder: str | Path,
    content: dict,
    place: Place = Place(),  # noqa: B008, a tuple
    wait: float | None = None,
    stop: Stop | None = None,
) -> Outcome:
    """Carry out a run (`Run.as_dict`) in its folder, from where it was left; how it ended.

    A finished one is not done again. wait: seconds for a folder that another process has locked,
    by default PATIENCE; below 0: without end. stop: begins the run's process, so that a caller can
    end it. A failure is an Outcome, with the notebook that shows where; error.txt has the rest.
    """
    folder, run, stop = Path(folder), Run.from_dict(content), stop or Stop()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / ".lock", PATIENCE if wait is None else wait, stop):
            return _performed(folder, run, place, stop)
    except filelock.Timeout:
        return Outcome(run.name, "busy", f"{folder} is locked by another process")
    except Interrupted:
        return Outcome(run.name, "interrupted")
    except Exception as error:  # another user's folder, a full disk: the other runs go on
        return Outcome(run.name, "failed", summary(error))


@contextmanager
def _locked(path: Path, wait: float, stop: Stop) -> Iterator[None]:
    """The lock, waited for in glances; filelock.Timeout, or Interrupted."""
    lock, end = file_lock(path), time.monotonic() + wait
    while not lock.is_locked:
        if stop.asked:
            raise Interrupted
        try:
            lock.acquire(timeout=GLANCE)
        except filelock.Timeout:
            if wait >= 0 and end <= time.monotonic():
                raise
    try:
        yield
    finally:
        lock.release()


def _performed(folder: Path, run: Run, place: Place, stop: Stop) -> Outcome:
    """`perform`, in a folder that is ours."""
    if results_of(folder, run) is not None:
        return Outcome(run.name, "was done")
    write_json(folder / SPEC, run.as_dict())
    for left in (ERROR, ENDED, NOTEBOOK):
        (folder / left).unlink(missing_ok=True)
    code, said = in_process(__name__, [str(folder.resolve()), place.kind], place, stop)
    if code == 0 and (folder / ENDED).is_file():
        (folder / ENDED).replace(folder / RESULTS)  # only now: the notebook is whole
        return Outcome(run.name, "done")
    if stop.asked:
        raise Interrupted
    with atomic_write(folder / ERROR) as file:
        file.write(said.encode())
    return Outcome(run.name, "failed", last_line(said) or f"exit status {code}")


def in_process(
    module: str, words: Sequence[str], place: Place, stop: Stop, **more: str
) -> tuple[int, str]:
    """`module.main` with these arguments, in a process of its own: exit status and stderr.

    It ends when this one does, however. more: for its environment.
    """
    with stop.begin(command(module, words), environment(place) | more) as process:
        said = process.stderr.read()
        return process.wait(), said


def command(module: str, words: Sequence[str]) -> list[str]:
    """Of a process that calls `module.main`."""
    return [sys.executable, "-c", f"import {module} as m; m.main()", *words]


def summary(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def last_line(text: str) -> str:
    """The last that is not empty, or nothing."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "")


def environment(place: Place) -> dict[str, str]:
    """Of a run's process: its device alone, and as many threads as it may have."""
    threads = {name: str(place.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    known = dict(os.environ) | threads | {"TQDM_DISABLE": "1"}
    kind, _, number = place.device.partition(":")
    if kind == "cuda" and number:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        known["CUDA_VISIBLE_DEVICES"] = visible[int(number)] if visible != [""] else number
    return known


def end_with_parent() -> None:
    """In a process: end it, and a notebook's kernel, as soon as stdin closes.

    A worker that is killed could not do so itself, and its run goes on elsewhere.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
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
    end_with_parent()
    run = json.loads((folder / SPEC).read_text(encoding="utf-8"))
    where = {"run_dir": str(folder), "shared": str(folder.parent.parent), "device": device}
    try:
        run_notebook(template(), folder / NOTEBOOK, {"run": run, **where})
    except PapermillExecutionError as error:
        sys.stderr.write("\n".join(error.traceback) + f"\n{_first_line(error)}\n")
        sys.exit(1)


def _first_line(error: Any) -> str:
    """What a cell raised: of several lines the first says what happened."""
    return f"{error.ename}: {error.evalue}".strip().splitlines()[0]
