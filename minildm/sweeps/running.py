"""All runs of a sweep: several at once here, or on a Dask cluster; then table, figures, report.

A sweep's folder holds `sweep.json` (what it is), `timing/` (seconds of each level, measured
alone), `first_stages/`, `runs/NAME/` with each run's executed notebook, and what is made of them:
`table.csv`, figures, `index.html`. Every run's folder is locked while it is worked on, so several
processes may share a sweep, each taking what the others have not begun.
"""

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import torch
from tqdm.auto import tqdm

from minildm.files import write_json
from minildm.loop import pick_device
from minildm.sweeps.execution import NOTEBOOK, Outcome, Place, perform, results_of, template
from minildm.sweeps.report import write_report
from minildm.sweeps.sweep import Run, Sweep
from minildm.sweeps.tables import write_table
from minildm.sweeps.timing import time_level

DEFINITION, TABLE = "sweep.json", "table.csv"
FREE = {"seeds", "question", "paper"}  # what may change while a sweep stays the same
ANSWERS_IN = 20.0  # seconds, a scheduler that is there
Perform = Callable[..., Outcome]


class SweepResult(NamedTuple):
    """What a sweep left: the table, the report, and the runs that failed, with their notebooks."""

    table: Path
    report: Path
    outcomes: list[Outcome]
    failed: dict[str, Path]


def run_sweep(
    sweep: Sweep,
    folder: str | Path,
    *,
    jobs: int | None = None,
    devices: Sequence[str] = (),
    threads: int = 1,
    levels: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    scheduler: str | None = None,
    say: Callable[[str], None] = tqdm.write,
) -> SweepResult:
    """Do what is left to do of a sweep, and write table and report of what is finished.

    jobs: runs at once, by default one a device. devices: "cuda:0", "cuda:1", "mps", "cpu"; by
    default the best there is. threads: CPU threads of a run. levels, seeds: do these alone.
    scheduler: the address of a Dask cluster whose workers see the folder, in place of jobs and
    devices. A run that fails is said, with its notebook, and the others go on; the same call
    tries it again. Ctrl-C ends the runs, and the same call goes on with them.
    Raises ValueError for a folder that holds another sweep, and for unknown names.
    """
    folder = Path(folder).resolve()
    runs = sweep.runs(levels, seeds)
    template()
    with _engine(scheduler, devices, jobs, threads) as engine:
        sweep = claim(sweep, folder)
        left = [run for run in runs if results_of(folder_of(folder, run), run) is None]
        time_levels(sweep, folder, runs, engine, say)
        outcomes = [Outcome(run.name, "was done") for run in runs if run not in left]
        outcomes += list(_all(left, folder, engine, say))
    table, report = collect(sweep, folder)
    failed = {o.name: folder / "runs" / o.name / NOTEBOOK for o in outcomes if o.state == "failed"}
    return SweepResult(table, report, outcomes, failed)


def folder_of(folder: Path, run: Run) -> Path:
    """Where a run of the sweep in `folder` works."""
    return folder / "runs" / run.name


def claim(sweep: Sweep, folder: Path) -> Sweep:
    """Write down what the folder's sweep is; ValueError where it is another one.

    More seeds than before are welcome: the sweep then has them all. Words may change.
    """
    path = folder / DEFINITION
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".lock"):
        if path.is_file():
            try:
                old = Sweep.from_dict(json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path} is no sweep of this version: {error}") from error
            sweep = replace(sweep, seeds=tuple(sorted({*old.seeds, *sweep.seeds})))
            was, now = (
                {name: value for name, value in each.as_dict().items() if name not in FREE}
                for each in (old, sweep)
            )
            if was != now:
                raise ValueError(
                    f"{folder} holds another sweep ({_differences(was, now)}); take another "
                    "folder or delete it"
                )
        write_json(path, sweep.as_dict())
    return sweep


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What makes two sweeps two, in words."""
    was, now, no = _listed(was), _listed(now), "nothing"
    differ = [key for key in sorted(was | now) if was.get(key, no) != now.get(key, no)]
    return ", ".join(f"{k}: {was.get(k, no)} there, {now.get(k, no)} asked" for k in differ)


def _listed(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """As `flat`, but tables that are empty stay: a level may set nothing."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        inside = _listed(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {}
        found |= inside or {f"{prefix}{key}": value}
    return found


def time_levels(
    sweep: Sweep, folder: Path, runs: Sequence[Run], engine: "Engine", say: Callable[[str], None]
) -> None:
    """Measure each level that was not, one after the other, before any run begins."""
    first = {run.level: run for run in reversed(runs)}
    for level in sweep.levels:
        path = timing_path(folder, first[level]) if level in first else None
        if path is None or path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock"):
            if not path.is_file():
                say(f"{sweep.name}={level}: measuring its time, alone")
                try:
                    write_json(path, engine.time(first[level]))
                except Exception as error:  # its runs will say more; the other levels go on
                    say(f"{sweep.name}={level}: has no time, {type(error).__name__}: {error}")


def timing_path(folder: Path, run: Run) -> Path:
    """Where a level's seconds are."""
    return folder / "timing" / f"{run.name.rpartition('-')[0]}.json"


def collect(sweep: Sweep, folder: str | Path) -> tuple[Path, Path]:
    """Table and report of the runs that are finished, wherever they were carried out."""
    folder = Path(folder)
    results = []
    for run in sweep.runs():
        found = results_of(folder_of(folder, run), run)
        if found is not None:
            results.append(found)
    timing = {
        found["level"]: found
        for found in (json.loads(p.read_text()) for p in sorted(folder.glob("timing/*.json")))
    }
    rows = write_table(folder / TABLE, sweep, results, timing)
    return folder / TABLE, write_report(folder, sweep, rows, timing)


def _all(
    runs: Sequence[Run], folder: Path, engine: "Engine", say: Callable[[str], None]
) -> Iterator[Outcome]:
    """Every run; those that others have at work come last, when they are waited for."""
    began, busy = time.monotonic(), []
    for wait in (None, -1.0):  # perform's own patience; without end
        todo, busy = (list(runs), []) if wait is None else (busy, [])
        bar = tqdm(total=len(todo), desc="runs", unit="run", disable=None if todo else True)
        for outcome in engine.outcomes(todo, folder, wait):
            bar.update()
            if outcome.state == "busy":
                busy += [run for run in runs if run.name == outcome.name]
                say(f"{outcome.name}: another process has it; looked at again at the end")
                continue
            spent = f"{(time.monotonic() - began) / 60:.1f} min"
            say(f"{outcome.name}: {outcome.state}, {spent} after the start{_why(outcome, folder)}")
            yield outcome
        bar.close()


def _why(outcome: Outcome, folder: Path) -> str:
    if outcome.state != "failed":
        return ""
    return f": {outcome.message}\n  see {folder / 'runs' / outcome.name / NOTEBOOK}"


def _engine(
    scheduler: str | None, devices: Sequence[str], jobs: int | None, threads: int
) -> "Engine":
    """What carries out the runs; ValueError for options that do not go together."""
    if scheduler is None:
        places = _places(devices, threads)
        jobs = len(places) if jobs is None else jobs
        if jobs < 1:
            raise ValueError(f"jobs={jobs} must be at least 1")
        return Local(places, jobs)
    if devices or jobs is not None:
        raise ValueError(
            f"scheduler={scheduler!r} does not go with devices={list(devices)}, jobs={jobs}: each "
            "of the cluster's workers has its own"
        )
    _places((), threads)
    return Dask(scheduler, threads)


def _places(devices: Sequence[str], threads: int) -> list[Place]:
    if threads < 1:
        raise ValueError(f"threads={threads} must be at least 1")
    for device in devices:
        kind, _, number = device.partition(":")
        there = torch.cuda.device_count() if kind == "cuda" else 1
        pick_device(kind)  # ValueError for one that is not here
        if number and not (number.isdigit() and int(number) < there):
            raise ValueError(f"devices={device!r}: of {kind} there are {there} here")
    return [Place(device, threads) for device in devices or ("",)]


class Local:
    """Runs in processes of this machine, `jobs` at once, dealt over the devices."""

    def __init__(self, places: Sequence[Place], jobs: int) -> None:
        self.places, self.jobs = list(places), jobs
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.stdin.close()  # at which it ends itself, and its kernel

    def time(self, run: Run) -> dict[str, Any]:
        """A level's seconds, on the first device."""
        return time_level(run.as_dict(), self.places[0].device, self.places[0].threads)

    def outcomes(self, runs: Sequence[Run], folder: Path, wait: float | None) -> Iterator[Outcome]:
        """As they end. A slot keeps its device."""
        slots = list(islice(cycle(self.places), self.jobs))
        patience = {} if wait is None else {"wait": wait}

        def one(run: Run) -> Outcome:
            place = slots.pop()
            try:
                where = folder_of(folder, run)
                content = run.as_dict()
                return perform(where, content, place, started=self.processes.append, **patience)
            finally:
                slots.append(place)

        pool = ThreadPoolExecutor(self.jobs)
        try:
            for future in as_completed([pool.submit(one, run) for run in runs]):
                yield future.result()
        except BaseException:  # Ctrl-C: end what runs, begin nothing more
            self.__exit__()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


class Dask:
    """Runs on the workers of an existing cluster; they must see the folder under its path."""

    def __init__(self, address: str, threads: int) -> None:
        try:
            from distributed import Client
        except ImportError as error:
            raise ImportError("a scheduler needs Dask: pip install -e '.[cluster]'") from error
        self.place = Place("", threads)
        try:
            self.client = Client(address, timeout=ANSWERS_IN)
        except (OSError, ValueError) as error:  # nobody there; no address
            raise ValueError(f"scheduler={address!r} does not answer: {error}") from error

    def __enter__(self) -> "Dask":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def time(self, run: Run) -> dict[str, Any]:
        """A level's seconds on one of the workers, while the others have nothing to do."""
        content = run.as_dict()
        return self.client.submit(time_level, content, "", self.place.threads, pure=False).result()

    def outcomes(self, runs: Sequence[Run], folder: Path, wait: float | None) -> Iterator[Outcome]:
        """As they end; what a lost worker had is done by another, from its last checkpoint."""
        from distributed import as_completed

        patience = {} if wait is None else {"wait": wait}
        futures = {
            self.client.submit(
                perform,
                str(folder_of(folder, run)),
                run.as_dict(),
                self.place,
                pure=False,
                **patience,
            ): run
            for run in runs
        }
        for future in as_completed(futures):
            if future.status == "error":  # no outcome: its workers were lost again and again
                yield Outcome(futures[future].name, "failed", str(future.exception()))
            else:
                yield future.result()


Engine = Local | Dask
