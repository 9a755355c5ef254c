"""Checks of notebook 19: the gradient of a shared batch, and a cluster's idle time."""

import torch
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function


def check_whole_gradient(fn: object) -> Result:
    """Check `whole_gradient(gradients, counts)`: (P, D), (P,) -> (D,).

    Process i computed the mean gradient of its counts[i] samples; the answer is the mean
    gradient of all samples.
    """
    praise = "every sample counts once, wherever it was computed."
    return check_function(fn, [_parts(3, 5), _parts(2, 1), _parts(6, 4)], praise)


def _parts(processes: int, d: int) -> Trial:
    draw = torch.Generator().manual_seed(processes)
    gradients = torch.randn(processes, d, generator=draw)
    counts = torch.arange(processes) * 3 + 2
    summed = (gradients * counts[:, None]).sum(0)
    mistakes = {
        "that weighs each process alike; one with more samples must count more.": gradients.mean(0),
        "that is the sum over processes; a mean is asked for.": gradients.sum(0),
        "divide by the number of samples of all processes.": summed,
        "divide by the number of samples, not of processes.": summed / processes,
        "the weights are turned around: more samples, more weight.": (
            (gradients / counts[:, None]).sum(0) / (1 / counts).sum()
        ),
        "that is one process's gradient.": gradients[0],
    }
    return Trial((gradients, counts), summed / counts.sum(), mistakes)


def check_idle_share(fn: object) -> Result:
    """Check `idle_share(seconds, workers)`: (R,) in the order of the runs, an int -> a scalar.

    A worker that is free takes the next run; until the last run ends, `workers` are paid for. The
    answer is the share of that time in which they have nothing to do.
    """
    praise = "what is paid for and not worked; a long run that comes last makes it large."
    trials = [_runs([2, 8, 1, 7, 7, 1, 8, 5, 4], 3), _runs([5], 4), _runs([1, 1, 1, 9, 2], 2)]
    return check_function(fn, trials, praise)


def _runs(seconds: list[int], workers: int) -> Trial:
    each = torch.tensor(seconds, dtype=torch.float32)
    busy, ends = each.sum(), _ends(each, workers)
    last = ends.max()

    def idle(end: Tensor) -> Tensor:
        return 1 - busy / (workers * end)

    dealt = torch.stack([each[w::workers].sum() for w in range(workers)]).max()
    blocks = torch.stack([part.sum() for part in each.tensor_split(workers)]).max()
    rounds = torch.stack([part.max() for part in each.split(workers)]).sum()
    mistakes = {
        "that is the share in which they work; asked for is the rest.": busy / (workers * last),
        "that is when the last run ends; what share of the workers' time until then is idle?": last,
        "those are seconds; divide by all that is paid for.": workers * last - busy,
        "divide by the time of all workers, not of one.": (workers * last - busy) / last,
        "all workers are paid for until the last run ends, not until their own last one.": (
            torch.zeros(())
        ),
        "that is the worker who ends first; take the mean of all.": 1 - ends.min() / last,
        "the runs are dealt out in turn beforehand; whoever is free takes the next.": idle(dealt),
        "the runs are dealt out in blocks beforehand; whoever is free takes the next.": (
            idle(blocks)
        ),
        "nobody waits for the others' runs to end before taking the next.": idle(rounds),
        "the workers work at once: the runs do not come one after the other.": idle(busy),
        "the longest runs are taken first; keep the order.": idle(
            _ends(each.sort(descending=True).values, workers).max()
        ),
    }
    return Trial((each, workers), idle(last), mistakes)


def _ends(seconds: Tensor, workers: int) -> Tensor:
    """When each worker has done its last run: (workers,)."""
    free = torch.zeros(workers)
    for run in seconds:
        free[free.argmin()] += run
    return free
