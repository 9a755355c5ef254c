"""All runs of a sweep, several at once on this machine or on a Dask cluster.

A run is a papermill execution of notebooks/sweeps/one_run.ipynb in a kernel of its own; the
executed notebook stays in the run's folder. A run whose results.json exists is done.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from minildm.conditioning import look_up
from minildm.files import data_dir, write_json
from minildm.sweeps.report import NOTEBOOK, SPEC, with_others, write_report
from minildm.sweeps.run import RESULTS, is_trained, stage_folder
from minildm.sweeps.sweep import Sweep
from minildm.teaching.notebook import run_notebook
from minildm.training.configs import to_dict

Task = tuple[str, Path, dict[str, Any]]  # a notebook, where it goes, its parameters


class SweepResult(NamedTuple):
    """The table, the report, and the runs that failed: name -> the reason."""

    table: Path
    report: Path
    failed: dict[str, str]


def run_sweep(
    sweep: Sweep,
    folder: str | Path,
    *,
    jobs: int | None = None,
    devices: Sequence[str] = (),
    threads: int = 1,
    levels: Sequence[str] | None = None,
    scheduler: str | None = None,
    say: Callable[[str], None] = print,
) -> SweepResult:
    """Do what is left to do of a sweep; write the table and the report of what is done.

    jobs: runs at once, by default one per device. devices: "cuda:0", "cuda:1", "mps", "cpu"; by
    default the best one. threads: CPU threads of a run. levels: run only these. scheduler: the
    address of a Dask scheduler whose workers see the folder, in place of jobs.
    If a run fails, the others continue; the same call tries it again. Raises ValueError for a
    folder that holds another sweep, and for unknown names.
    """
    for level in levels or ():
        look_up(level, list(sweep.levels), f"{sweep.name}: level")
    folder, places = Path(folder).resolve(), itertools.cycle(devices or [""])
    with_others(sweep, folder)  # raises ValueError for another sweep
    left = [run for run in sweep.runs() if run.level in (levels or sweep.levels)]
    left = [run for run in left if not (folder / "runs" / run.name / RESULTS).is_file()]
    stages: dict[str, Task] = {}
    runs: dict[str, Task] = {}
    for run in left:
        parameters = {"run": to_dict(run), "shared": str(folder), "threads": threads}
        parameters["device"], stage = next(places), stage_folder(run, folder)
        runs[run.name] = "one_run", folder / "runs" / run.name, parameters
        if not is_trained(stage):
            stages[f"first stage {stage.name}"] = "first_stage", stage, parameters
    with _executor(scheduler, jobs or len(devices) or 1) as executor:
        failed = _carry_out(executor, stages, say)
        ready = [run.name for run in left if is_trained(stage_folder(run, folder))]
        failed |= _carry_out(executor, {name: runs[name] for name in ready}, say)
    return SweepResult(*write_report(sweep, folder, failed), failed)


def _carry_out(
    executor: Executor, tasks: dict[str, Task], say: Callable[[str], None]
) -> dict[str, str]:
    """Perform tasks by name; returns what went wrong, by name."""
    failed, futures = {}, {executor.submit(perform, *task): name for name, task in tasks.items()}
    for i, future in enumerate(as_completed(futures), 1):
        problem = repr(future.exception()) if future.exception() else future.result()
        failed |= {futures[future]: problem} if problem else {}
        say(f"{futures[future]}: {problem or 'done'} ({i} of {len(tasks)})")
    return failed


def perform(notebook: str, place: Path, parameters: dict[str, Any]) -> str:
    """Execute a notebook of notebooks/sweeps into a folder; returns what went wrong, if anything.

    The kernel is a process of its own, which ends when this one does.
    """
    write_json(place / SPEC, parameters["run"])
    template = data_dir().parent / f"notebooks/sweeps/{notebook}.ipynb"
    try:
        run_notebook(template, place / NOTEBOOK, {**parameters, "run_dir": str(place)})
    except Exception as error:  # of whatever kind: the other runs continue
        said = f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}"
        return f"failed: {said.splitlines()[0]}; see {place / NOTEBOOK}"
    return ""


@contextmanager
def _executor(scheduler: str | None, jobs: int) -> Iterator[Executor]:
    """Threads of this process, or the workers of a Dask cluster."""
    if scheduler is not None:
        from distributed import Client

        with Client(scheduler) as client, client.get_executor(pure=False) as executor:
            yield executor
        return
    with ThreadPoolExecutor(jobs) as executor:
        try:
            yield executor
        except BaseException:  # such as Ctrl-C, which does not reach the kernels
            executor.shutdown(wait=False, cancel_futures=True)
            for child in psutil.Process().children():
                if "ipykernel_launcher" in child.cmdline():
                    child.kill()
            raise
