"""Checks of notebook 07: the timestep embedding, and attention in several heads."""

import math

import torch
from einops import rearrange
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function
from minildm.layers import attention, timestep_embedding


def check_timestep_embedding(fn: object) -> Result:
    """Check `embed(t, width)`: (B,) int64 and an even int -> (B, width), max_period 10,000."""
    praise = "cosines, then sines, from one turn in 2π steps to one in 2π · 10,000."
    # The first times are small: rounding would hide which mistake a wrong large angle is.
    times = {4: (0, 1, 3), 8: (7, 250, 999), 32: (3, 500, 998, 999), 2: (600,)}
    return check_function(fn, [_embedding(width, t) for width, t in times.items()], praise)


def _embedding(width: int, times: tuple[int, ...]) -> Trial:
    t, half = torch.tensor(times), width // 2
    index = torch.arange(half)

    def embedded(frequency: Tensor) -> Tensor:
        angle = t[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], dim=1)

    frequency = torch.exp(-math.log(10_000) * index / half)
    right = timestep_embedding(t, width)
    cos, sin = right.chunk(2, dim=1)
    mistakes = {
        "sines come first there; (2) has the cosines first.": torch.cat([sin, cos], dim=1),
        "cosines and sines alternate; (2) has all cosines, then all sines.": (
            rearrange([cos, sin], "part b half -> b (half part)")
        ),
        "the frequencies rise: the exponent is negative, −i / half.": embedded(1 / frequency),
        "the exponent is divided by width; (2) divides by half = width / 2.": (
            embedded(frequency.sqrt())
        ),
        "a factor 2π is too much: the fastest angle is t itself.": (
            embedded(2 * math.pi * frequency)
        ),
        "the exp is missing: those are exponents, not frequencies.": (
            embedded(-math.log(10_000) * index / half)
        ),
        "10 stands where 10,000 belongs, or log10 for log.": embedded(10.0 ** (-index / half)),
        "t is scaled to [0, 1]; (2) takes the index itself.": embedded(frequency / 1000),
    }
    if half > 1:
        mistakes[
            "the last frequency is 1 / 10,000: that divides by half − 1; (2) divides by half."
        ] = embedded(torch.exp(-math.log(10_000) * index / (half - 1)))
    return Trial((t, width), right, mistakes)


def check_attention(fn: object) -> Result:
    """Check `attend(q, k, v, heads)`: (B, N, C), (B, M, C), (B, M, C), int -> (B, N, C)."""
    praise = "each head compares in its own C / heads channels, and mixes its own values."
    trials = [_attention(2, 5, 3, 8, 2), _attention(1, 4, 4, 12, 4), _attention(3, 6, 2, 6, 1)]
    return check_function(fn, trials, praise)


def _attention(b: int, n: int, m: int, c: int, heads: int) -> Trial:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (1.5 * torch.randn(b, size, c, generator=generator) for size in (n, m, m))

    def mixed(scale: float, split: str = "(head d)", dim: int = -1, heads: int = heads) -> Tensor:
        inward, outward = f"b n {split} -> b head n d", f"b head n d -> b n {split}"
        queries, keys, values = (rearrange(x, inward, head=heads) for x in (q, k, v))
        weights = (queries @ rearrange(keys, "b head m d -> b head d m") * scale).softmax(dim)
        return rearrange(weights @ values, outward)

    d = c // heads
    queries, keys, values = (
        rearrange(x, "b n (head d) -> b head n d", head=heads) for x in (q, k, v)
    )
    right = rearrange(attention(queries, keys, values), "b head n d -> b n (head d)")
    scores = queries @ rearrange(keys, "b head m d -> b head d m") / math.sqrt(d)
    unused = rearrange(scores @ values, "b head n d -> b n (head d)")
    mistakes = {
        "the scores are not divided by √d.": mixed(1.0),
        "the scores are divided by d; (4) divides by its root.": mixed(1 / d),
        "the softmax is missing: the weights of a query must add up to 1.": unused,
        "the softmax runs over the queries; it runs over the keys, the last axis.": (
            mixed(d**-0.5, dim=-2)
        ),
    }
    if heads > 1:
        mistakes |= {
            "the scores are divided by √C; a head compares in d = C / heads channels.": (
                mixed(c**-0.5)
            ),
            "there is only one head: split the channels into heads first.": (
                mixed(c**-0.5, heads=1)
            ),
            "the channels are split as (d head); here a head's channels lie side by side, "
            "(head d).": mixed(d**-0.5, "(d head)"),
            "the heads are joined as (d head); put them back as they were, (head d).": (
                rearrange(attention(queries, keys, values), "b head n d -> b n (d head)")
            ),
        }
    return Trial((q, k, v, heads), right, mistakes)
