"""Checks of notebook 16: runs compared at equal time, and two levels compared seed by seed."""

import torch
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function


def check_at_time(fn: object) -> Result:
    """Check `at_time(seconds, values, budget)`: two (F, S), a float -> (F,).

    Row f was measured at S moments, seconds[f] ascending. Its value after `budget` seconds lies on
    the line between the two moments around it; before the first and after the last moment it is
    the value there.
    """
    praise = "every row is read at the same second, whatever number of steps it made until then."
    return check_function(fn, [_moments(0, 36.0), _moments(1, 2.0), _moments(2, 4000.0)], praise)


def _moments(seed: int, budget: float) -> Trial:
    """Four rows whose steps take 0.05 to 0.4 seconds, each measured after four numbers of steps."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.tensor([50.0, 100.0, 200.0, 1000.0])
    seconds = torch.tensor([0.4, 0.2, 0.1, 0.05])[:, None] * steps
    values = 5000 / (1 + steps / 400) * (0.7 + 0.6 * torch.rand(4, 4, generator=draw))
    right = (seconds < budget).sum(1).clamp(1, 3)[:, None]  # of the two around it, the later
    x0, x1 = seconds.gather(1, right - 1), seconds.gather(1, right)
    y0, y1 = values.gather(1, right - 1), values.gather(1, right)
    free = (y0 + (y1 - y0) * (budget - x0) / (x1 - x0))[:, 0]
    share = ((budget - x0) / (x1 - x0)).clamp(0, 1)
    held = (y0 + (y1 - y0) * share)[:, 0]
    logs = ((torch.tensor(budget).log() - x0.log()) / (x1.log() - x0.log())).clamp(0, 1)
    mistakes = {
        "that is the last moment before the budget; go on along the line to the next one.": y0[
            :, 0
        ],
        "that is the first moment after the budget; the line to it is shorter.": y1[:, 0],
        "that is the nearest moment; the value lies on the line between two.": (
            values.gather(1, (seconds - budget).abs().argmin(1, keepdim=True))[:, 0]
        ),
        "the line goes on beyond the last moment, or before the first; stop it there.": free,
        "these are the values at the end, after equal steps: the budget says equal time.": (
            values[:, -1]
        ),
        "every row is read at the first row's moments; each has seconds of its own.": torch.stack(
            [_line(seconds[0], row, budget) for row in values]
        ),
        "the line is straight in seconds here, not in their logarithm.": (
            (y0 + (y1 - y0) * logs)[:, 0]
        ),
    }
    return Trial((seconds, values, budget), held, mistakes)


def _line(x: Tensor, y: Tensor, at: float) -> Tensor:
    """One row's value at a moment."""
    i = int((x < at).sum().clamp(1, len(x) - 1))
    share = ((at - x[i - 1]) / (x[i] - x[i - 1])).clamp(0, 1)
    return y[i - 1] + (y[i] - y[i - 1]) * share


def check_difference(fn: object) -> Result:
    """Check `difference(a, b, t)`: two levels' values by seed (S,), Student's t -> (3,).

    The mean of a - b, and the ends of its interval: low, high. Seeds are pairs.
    """
    praise = "what a seed does to both levels alike drops out; only what is left widens it."
    trials = [_pairs(3, 4.3027), _pairs(5, 2.7764), _pairs(8, 2.3646)]
    return check_function(fn, trials, praise)


def _pairs(n: int, t: float) -> Trial:
    """Values that share most of their spread."""
    draw = torch.Generator().manual_seed(n)
    seed = 300 * torch.randn(n, generator=draw).double()
    a = 2400 + seed + 40 * torch.randn(n, generator=draw).double()
    b = 2100 + seed + 40 * torch.randn(n, generator=draw).double()
    gap = a - b

    def around(half: Tensor, mean: Tensor = gap.mean()) -> Tensor:  # noqa: B008
        return torch.stack([mean, mean - half, mean + half])

    error = gap.std() / n**0.5
    mistakes = {
        "the levels are treated as strangers; subtract seed by seed first, then take the spread.": (
            around(t * ((a.var() + b.var()) / n).sqrt())
        ),
        "the two half-widths are added: that is far too wide, and ignores the pairs.": (
            around(t * (a.std() + b.std()) / n**0.5)
        ),
        "1.96 is for many seeds; with so few the t that is handed over is right.": (
            around(1.96 * error)
        ),
        "the root of the number of seeds is missing: a mean varies less than one seed.": (
            around(t * gap.std())
        ),
        "the spread divides by S; S − 1 is right where the mean is estimated too.": (
            around(t * gap.std(correction=0) / n**0.5)
        ),
        "std / S is too narrow: variances add up, so it is std / √S.": around(t * gap.std() / n),
        "the sign is turned around: a − b is asked for.": around(t * error, -gap.mean()),
        "low and high are swapped.": around(-t * error),
        "one standard error is not 95 %: multiply it by t.": around(error),
        "the second and third are half-widths; return the ends, mean − and mean +.": torch.stack(
            [gap.mean(), t * error, t * error]
        ),
    }
    return Trial((a, b, t), around(t * error), mistakes)
