"""All runs of a sweep: several at once here, or on a Dask cluster; then table, figures, report.

A sweep's folder holds `sweep.json` (what it is), `timing/` (seconds of each level, measured
before the runs), `first_stages/`, `runs/NAME/` with each run's executed notebook, and what is made
of them: `table.csv`, figures, `index.html`. Every run's folder is locked while it is worked on, so
several processes may share a sweep, each taking what the others have not begun.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from minildm.files import lock, write_json
from minildm.loop import pick_device
from minildm.sweeps.doubts import doubts_of
from minildm.sweeps.execution import (
    ERROR,
    NOTEBOOK,
    Outcome,
    Place,
    Stop,
    perform,
    results_of,
    template,
)
from minildm.sweeps.report import write_report
from minildm.sweeps.sweep import Run, Sweep
from minildm.sweeps.tables import write_table
from minildm.sweeps.timing import time_here, time_levels, timings

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
    tries it again. Ctrl-C ends the runs, and the same call goes on with them; on a cluster those
    that are under way go on at their workers, and no more are begun.
    Raises ValueError for a folder that holds another sweep, and for unknown names.
    """
    folder = Path(folder).resolve()
    runs = sweep.runs(levels, seeds)
    template()
    with _engine(scheduler, devices, jobs, threads) as engine:
        sweep = claim(sweep, folder)
        left = [run for run in runs if not is_finished(folder, run)]
        time_levels(folder, runs, engine.time, say)
        outcomes = [Outcome(run.name, "was done") for run in runs if run not in left]
        outcomes += list(_all(left, folder, engine, say))
    table, report = _write(sweep, folder, say)
    failed = {o.name: _shown(folder, o) for o in outcomes if o.state == "failed"}
    return SweepResult(table, report, outcomes, failed)


def folder_of(folder: Path, run: Run) -> Path:
    """Where a run of the sweep in `folder` works."""
    return folder / "runs" / run.name


def is_finished(folder: Path, run: Run) -> bool:
    """Whether it left results; where they cannot be taken, `perform` says why."""
    try:
        return results_of(folder_of(folder, run), run) is not None
    except (ValueError, OSError):
        return False


def claim(sweep: Sweep, folder: Path) -> Sweep:
    """Write down what the folder's sweep is; ValueError where it is another one.

    More seeds than before are welcome: the sweep then has them all. Words may change.
    """
    path = folder / DEFINITION
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / ".lock"):
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


def collect(
    sweep: Sweep,
    folder: str | Path,
    *,
    device: str = "",
    threads: int = 1,
    say: Callable[[str], None] = tqdm.write,
) -> tuple[Path, Path]:
    """Table and report of the runs that are finished, wherever they were carried out.

    Levels of finished runs that have no time yet, as where the runs came from other machines, are
    measured here first, on `device`. What is to be doubted is said, and stands in the report.
    """
    folder = Path(folder).resolve()
    finished = [run for run in sweep.runs() if is_finished(folder, run)]
    with Local(_places([device] if device else [], threads), 1) as engine:
        time_levels(folder, finished, engine.time, say)
    return _write(sweep, folder, say)


def _write(sweep: Sweep, folder: Path, say: Callable[[str], None]) -> tuple[Path, Path]:
    results, doubts, timing = [], [], timings(folder)
    for run in sweep.runs():
        try:
            found = results_of(folder_of(folder, run), run)
        except (ValueError, OSError) as error:
            doubts.append(f"{run.name} is left out: {error}")
            continue
        if found is not None:
            results.append(found)
    doubts += doubts_of(sweep, results, timing)
    for doubt in doubts:
        say(f"{sweep.name}: {doubt}")
    rows = write_table(folder / TABLE, sweep, results, timing)
    return folder / TABLE, write_report(folder, sweep, rows, timing, results, doubts)


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
    return f": {outcome.message}\n  see {_shown(folder, outcome)}"


def _shown(folder: Path, outcome: Outcome) -> Path:
    """What shows where a run failed: its notebook, or what was said before there was one."""
    place = folder / "runs" / outcome.name
    return next((place / f for f in (NOTEBOOK, ERROR) if (place / f).is_file()), place)


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
    """Runs in processes of this machine, `jobs` at once, dealt over the devices.

    After the block, however it ends, none of them lives.
    """

    def __init__(self, places: Sequence[Place], jobs: int) -> None:
        self.places, self.jobs, self.stop = list(places), jobs, Stop()

    def __enter__(self) -> "Local":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()

    def time(self, runs: Sequence[Run], folder: Path) -> str:
        """Measure levels on the first device: see `time_levels`."""
        return time_here(folder, [run.as_dict() for run in runs], self.places[0], self.stop)

    def outcomes(self, runs: Sequence[Run], folder: Path, wait: float | None) -> Iterator[Outcome]:
        """As they end. A slot keeps its device."""
        slots = list(islice(cycle(self.places), self.jobs))

        def one(run: Run) -> Outcome:
            place = slots.pop()
            try:
                return perform(folder_of(folder, run), run.as_dict(), place, wait, self.stop)
            finally:
                slots.append(place)

        pool = ThreadPoolExecutor(self.jobs)
        try:
            for future in as_completed([pool.submit(one, run) for run in runs]):
                yield future.result()
        except BaseException:  # Ctrl-C: begin nothing more, end what runs
            pool.shutdown(wait=False, cancel_futures=True)
            self.stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


class Dask:
    """Runs on the workers of an existing cluster; they must see the folder under its path.

    What a worker has begun it brings to its end, whether or not somebody still waits for it.
    """

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

    def time(self, runs: Sequence[Run], folder: Path) -> str:
        """Measure all levels on one of the workers; on another, what one that is lost left."""
        contents = [run.as_dict() for run in runs]
        future = self.client.submit(time_here, str(folder), contents, self.place, pure=False)
        return future.result()

    def outcomes(self, runs: Sequence[Run], folder: Path, wait: float | None) -> Iterator[Outcome]:
        """As they end; what a lost worker had is done by another, from its last checkpoint."""
        from distributed import as_completed

        futures = {}
        for run in runs:
            what = (str(folder_of(folder, run)), run.as_dict(), self.place, wait)
            futures[self.client.submit(perform, *what, pure=False)] = run
        for future in as_completed(futures):
            if future.status == "error":  # no outcome: its workers were lost again and again
                yield Outcome(futures[future].name, "failed", str(future.exception()))
            else:
                yield future.result()


Engine = Local | Dask
