"""Checks of notebook 19: the gradient of a shared batch, and how long a sweep takes."""

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


def check_makespan(fn: object) -> Result:
    """Check `makespan(seconds, workers)`: (R,) in the order of the runs, an int -> a scalar.

    A worker that is free takes the next run; the answer is when the last run ends.
    """
    praise = "and a long run that comes last keeps everyone waiting: let it begin first."
    trials = [_runs([2, 8, 1, 7, 7, 1, 8, 5, 4], 3), _runs([5], 4), _runs([1, 1, 1, 9, 2], 2)]
    return check_function(fn, trials, praise)


def _runs(seconds: list[int], workers: int) -> Trial:
    each = torch.tensor(seconds, dtype=torch.float32)
    dealt = torch.stack([each[w::workers].sum() for w in range(workers)])
    blocks = torch.stack([part.sum() for part in each.tensor_split(workers)])
    rounds = torch.stack([part.max() for part in each.split(workers)]).sum()
    mistakes = {
        "that is the work shared evenly; a run cannot be split, so some worker ends later.": (
            each.sum() / workers
        ),
        "one worker cannot do the longest run while nobody does the others.": each.max(),
        "the workers do not work at once: that is the sum of all runs.": each.sum(),
        "the runs are dealt out in turn beforehand; whoever is free takes the next.": dealt.max(),
        "the runs are dealt out in blocks beforehand; whoever is free takes the next.": (
            blocks.max()
        ),
        "nobody waits for the others' runs to end before taking the next.": rounds,
        "the longest runs are taken first; keep the order.": _greedy(
            each.sort(descending=True).values, workers
        ),
    }
    return Trial((each, workers), _greedy(each, workers), mistakes)


def _greedy(seconds: Tensor, workers: int) -> Tensor:
    free = torch.zeros(workers)
    for run in seconds:
        free[free.argmin()] += run
    return free.max()
