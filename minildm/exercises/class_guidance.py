"""Checks of notebook 10: guidance towards one class and away from another, and the dropout."""

import torch
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_steer(fn: object) -> Result:
    """Check `steer(eps_null, eps_c, eps_away, s, n)`: predictions (B, c, h, w), floats -> eps_hat.

    eps_null + s (eps_c - eps_null) - n (eps_away - eps_null).
    """
    praise = "both directions are measured from no class; n = 0 is plain guidance."
    trials = [_steer_trial(3.0, 1.5), _steer_trial(2.0, 0.0), _steer_trial(0.0, 1.0)]
    return check_function(fn, trials, praise)


def _steer_trial(s: float, n: float) -> Trial:
    null, c, away = (_draw(seed, 2, 3, 4, 5) for seed in range(3))

    def mixed(s: float, n: float) -> Tensor:
        return null + s * (c - null) - n * (away - null)

    right = mixed(s, n)
    mistakes = {
        "that goes towards the class to avoid; its step is subtracted.": mixed(s, -n),
        "s and n are swapped: s belongs to the asked class.": mixed(n, s),
        "eps_away is never used; that is plain guidance.": mixed(s, 0),
        "n is not used: its step is n times as long.": mixed(s, 1),
        "s scales both steps; the one away has its own number, n.": mixed(s, s),
        "eps_away took the place of eps_null: that is n = s − 1 and no other.": (
            away + s * (c - away)
        ),
        "the step away is a difference, too: eps_away − eps_null.": (
            null + s * (c - null) - n * away
        ),
        "the step towards the class is a difference, too: eps_c − eps_null.": (
            null + s * c - n * (away - null)
        ),
        "the step away begins at eps_c; both begin at eps_null.": (
            null + s * (c - null) - n * (away - c)
        ),
        "eps_null is missing, where both steps begin.": mixed(s, n) - null,
        "it begins at eps_c, so that s = 0 is not without a class.": mixed(s + 1, n),
        "those steps are multiplied; they are added up, one with a minus.": (
            null + s * (c - null) * n * (away - null)
        ),
    }
    mistakes = {why: wrong for why, wrong in mistakes.items() if not torch.allclose(wrong, right)}
    return Trial((null, c, away, s, n), right, mistakes, f"it is not (8) at s = {s:g}, n = {n:g}.")


def check_drop(fn: object) -> Result:
    """Check `drop(c, c_null, u, p)`: (B, M, d), (1, M, d), (B,) in [0, 1), float -> (B, M, d).

    A sample whose u is below p gets c_null, with all its tokens; the others keep their c.
    """
    praise = "each sample loses all of its tokens or none, with probability p."
    shapes = ((5, 2, 3), (4, 1, 4), (3, 3, 2), (4, 1, 1))
    trials = [_drop_trial(p, *shape) for shape in shapes for p in (0.4, 0.0)]
    return check_function(fn, trials, praise)


def _drop_trial(p: float, batch: int, length: int, d: int) -> Trial:
    c, null = _draw(0, batch, length, d), _draw(1, 1, length, d)
    u = torch.linspace(0.9, 0.05, batch)  # the first stays, the last goes
    drop = (u < p).view(-1, 1, 1)
    right = torch.where(drop, null, c)
    mistakes = {
        "it is the wrong way round: those with u < p lose their condition.": (
            torch.where(drop, c, null)
        ),
        "dropped tokens become zeros; c_null is a token that is learned.": c * ~drop,
        "c_null is added to what is kept; it takes its place.": torch.where(drop, c + null, c),
        "it mixes c and c_null; each sample has one or the other.": (1 - p) * c + p * null,
        "no sample lost its condition.": c,
        "every sample lost its condition.": null.expand_as(c),
    }
    if batch == d and length == 1:
        mistakes["u (B,) met the width d instead of the batch, silently; make it (B, 1, 1)."] = (
            torch.where(u < p, null, c)
        )
    if batch == length:
        mistakes["u (B, 1) met the tokens M instead of the batch, silently; make it (B, 1, 1)."] = (
            torch.where((u < p)[:, None], null, c)
        )
    mistakes = {why: wrong for why, wrong in mistakes.items() if not torch.allclose(wrong, right)}
    otherwise = f"its values are not those of (2) at p = {p:g}."
    return Trial((c, null, u, p), right, mistakes, otherwise)
