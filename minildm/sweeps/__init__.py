"""Ablations: many runs of one notebook, one table with intervals, one report.

A run is a papermill execution of notebooks/sweeps/one_run.ipynb in a kernel of its own; the
executed notebook stays in the run's folder. A run whose results.json exists is done.
"""

import itertools
import platform
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from minildm.conditioning import look_up
from minildm.files import cache_dir, data_dir, write_json
from minildm.sweeps.report import NOTEBOOK, finished, write_report
from minildm.sweeps.run import is_trained, stage_folder
from minildm.sweeps.sweep import DEFINITION, Sweep, joined
from minildm.teaching.notebook import run_notebook
from minildm.training.configs import to_dict
from minildm.training.loop import read_log

PAUSE = 60.0  # seconds between two lines of a run's step


def run_sweep(
    sweep: Sweep,
    folder: str | Path,
    *,
    jobs: int | None = None,
    devices: Sequence[str] = (),
    levels: Sequence[str] | None = None,
    scheduler: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Execute the unfinished runs of a sweep; returns what went wrong, by the run's name.

    jobs: runs at once, by default one per device. devices: "cuda:0", "cuda:1", "mps", "cpu"; by
    default the best one. levels: run only these. scheduler: the address of a Dask scheduler whose
    workers see the folder, in place of jobs. A run has as many CPU threads as OMP_NUM_THREADS
    says, by default one. If a run fails, the others continue; the same call tries it again.
    Writes sweep.json, and tables, figures and index.html of all finished runs into the folder.
    Raises ValueError for a folder that holds another sweep, and for an unknown level.
    """
    for level in levels or ():
        look_up(level, list(sweep.levels), f"{sweep.name}: level")
    folder, places = Path(folder).resolve(), itertools.cycle(devices or [""])
    whole = joined(sweep, folder)
    done = {run.name for run, _ in finished(sweep, folder)}
    stages, runs = {}, {}  # tasks by name; a run's with the first stage that it requires
    for run in sweep.runs():
        place, stage = folder / "runs" / run.name, stage_folder(run, folder)
        if run.level in (levels or sweep.levels) and run.name not in done:
            parameters = {"run": to_dict(run), "shared": str(folder), "device": next(places)}
            runs[run.name] = stage, ("one_run", place, parameters)
            if not is_trained(stage):
                label = f"first stage of {sweep.name} = {run.level}"
                stages.setdefault(stage, (label, ("first_stage", stage, parameters)))
    write_json(folder / DEFINITION, to_dict(whole))
    if runs:
        cache_dir()  # one for all, also where it must be temporary
        say(f"{len(done)} runs are finished; now {len(stages)} first stages, then {len(runs)} runs")
    with _executor(scheduler, jobs or len(devices) or 1) as executor:
        failed = _carry_out(executor, dict(stages.values()), say)
        ready = {name: task for name, (stage, task) in runs.items() if is_trained(stage)}
        failed |= _carry_out(executor, ready, say)
    write_report(sweep, folder, failed)
    return failed


def _carry_out(
    executor: Executor, tasks: dict[str, tuple[Any, ...]], say: Callable[[str], None]
) -> dict[str, str]:
    """Call `perform` with each task's arguments, by name; returns what went wrong, by name."""
    failed, futures = {}, {executor.submit(perform, *task): name for name, task in tasks.items()}
    left = set(futures)
    while left:
        ended, left = wait(left, PAUSE, FIRST_COMPLETED)
        for i, future in enumerate(ended, len(tasks) - len(left) - len(ended) + 1):
            problem = repr(future.exception()) if future.exception() else future.result()
            failed |= {futures[future]: problem} if problem else {}
            say(f"{futures[future]}: {problem or 'done'} ({i} of {len(tasks)})")
        for name in () if ended else sorted(futures[future] for future in left):
            place = tasks[name][1]  # of a first stage, else of a run
            if log := read_log(place) or read_log(place / "model"):
                say(f"{name}: step {log[-1].step}")
    return failed


def perform(notebook: str, place: Path, parameters: dict[str, Any]) -> str:
    """Execute a notebook of notebooks/sweeps into a folder; returns what went wrong, or ""."""
    template = data_dir().parent / f"notebooks/sweeps/{notebook}.ipynb"
    if not Path(parameters["shared"], DEFINITION).is_file():
        return f"failed: worker {platform.node()} does not see {parameters['shared']}"
    try:
        run_notebook(template, place / NOTEBOOK, {**parameters, "run_dir": str(place)})
    except Exception as error:  # whatever it is, the other runs continue
        if type(error).__name__ == "DeadKernelError":
            return f"killed (signal 9, out of memory?); see {place / NOTEBOOK}"
        said = f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}"
        return f"failed: {said.splitlines()[0]}; see {place / NOTEBOOK}"
    return ""


@contextmanager
def _executor(scheduler: str | None, jobs: int) -> Iterator[Executor]:
    """Threads of this process, or the workers of a Dask cluster; each starts a kernel a run."""
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
