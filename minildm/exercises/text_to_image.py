"""Checks of notebook 11: a caption as numbers, and cross-attention with one head."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from minildm.exercises.result import Result, Trial, check_function
from minildm.tokenizer import SPECIAL

VOCABULARY = {word: i for i, word in enumerate((*SPECIAL, "a", "red", "apple", "on", "snow"))}


def check_numbers(fn: object) -> Result:
    """Check `numbers(words, vocabulary, length)`: K words, {word: id}, int -> (length,) int64.

    The special tokens are in the vocabulary, by the names of minildm.tokenizer.SPECIAL.
    """
    praise = "start, the words, end, then padding; what is not in the vocabulary keeps its place."
    captions = ("a red apple", "a puppy on snow", "", "a puppy on a snow apple")
    trials = [_numbers_trial(caption.split(), 8) for caption in captions]
    return check_function(fn, trials, praise)


def _numbers_trial(words: Sequence[str], length: int) -> Trial:
    pad, unknown, start, end = range(4)
    ids = [VOCABULARY.get(word, unknown) for word in words]
    known = [number for number in ids if number != unknown]

    def filled(*row: int, at: int = pad) -> Tensor:
        return torch.tensor(([*row] + length * [at])[:length])

    right = filled(start, *ids, end)
    front = (length - len(ids) - 2) * [pad]
    inner = torch.cat([filled(start, *ids)[: length - 1], torch.tensor([end])])
    mistakes = {
        "start and end are missing: the words stand between [CLS] and [SEP].": filled(*ids),
        "the start, [CLS], is missing.": filled(*ids, end),
        "the end, [SEP], is missing.": filled(start, *ids),
        "start and end are swapped: [CLS] begins, [SEP] ends.": filled(end, *ids, start),
        "unknown words are left out; each becomes [UNK], in its place.": (
            filled(start, *known, end)
        ),
        "unknown words become padding; they have a token of their own, [UNK].": (
            filled(start, *(VOCABULARY.get(word, pad) for word in words), end)
        ),
        "it fills up with [UNK]; the rest is [PAD].": filled(start, *ids, end, at=unknown),
        "it fills up with [SEP]; the rest is [PAD].": filled(start, *ids, end, at=end),
        "the padding comes first; it belongs behind the end.": filled(*front, start, *ids, end),
        "the padding comes before the end: [SEP] follows the last word.": inner,
    }
    if words:
        mistakes["the words stand in reverse."] = filled(start, *reversed(ids), end)
        mistakes["the words are sorted; their order is what the caption says."] = filled(
            start, *sorted(ids), end
        )
    mistakes = {why: wrong for why, wrong in mistakes.items() if not torch.equal(wrong, right)}
    otherwise = f"its tokens are not those of {' '.join(words)!r}."
    return Trial((list(words), dict(VOCABULARY), length), right, mistakes, otherwise)


def check_look(fn: object) -> Result:
    """Check `look(x, c, w_q, w_k, w_v)`: cross-attention of pixels x to tokens c with one head.

    x (B, N, d_in), c (B, M, d_cond), w_q (d_in, d), w_k and w_v (d_cond, d) -> (B, N, d).
    """
    praise = "the pixels ask, the tokens answer, and each pixel's weights add up to 1."
    return check_function(fn, [_look_trial(2, 4, 4, 6, 4), _look_trial(1, 5, 3, 4, 9)], praise)


def _look_trial(b: int, n: int, m: int, d_in: int, d: int) -> Trial:
    generator = torch.Generator().manual_seed(0)
    x, c = (torch.randn(b, size, d_in, generator=generator) for size in (n, m))
    w_q, w_k, w_v = (0.7 * torch.randn(d_in, d, generator=generator) for _ in range(3))

    def seen(
        asks: Tensor = x, keys: Tensor = c, values: Tensor = c, scale: float = d**-0.5, dim: int = 2
    ) -> Tensor:
        return ((asks @ w_q) @ (keys @ w_k).mT * scale).softmax(dim) @ (values @ w_v)

    def weights(w_q: Tensor, w_k: Tensor) -> Tensor:
        return ((x @ w_q) @ (c @ w_k).mT / math.sqrt(d)).softmax(dim=2)

    mistakes = {
        "the scores are not divided by √d.": seen(scale=1.0),
        "the scores are divided by d; (2) divides by its root.": seen(scale=1 / d),
        "the scores are divided by √d_in; they are sums over d products.": seen(scale=d_in**-0.5),
        "the softmax is missing: each pixel's weights must add up to 1.": (
            (x @ w_q) @ (c @ w_k).mT / math.sqrt(d) @ (c @ w_v)
        ),
        "the softmax runs over the pixels; each pixel shares its look among the tokens.": (
            seen(dim=1)
        ),
        "w_q and w_k are swapped: Q comes from the pixels by w_q.": weights(w_k, w_q) @ (c @ w_v),
        "w_k and w_v are swapped: K is compared, V is passed on.": weights(w_q, w_v) @ (c @ w_k),
        "that is self-attention: K and V come from the tokens c.": seen(keys=x, values=x),
    }
    if n == m:  # else the shapes already say so
        mistakes |= {
            "the roles are swapped: the pixels ask, the tokens are K and V.": seen(c, x, x),
            "V comes from the pixels; it is c w_v.": seen(values=x),
            "K comes from the pixels; it is c w_k.": seen(keys=x),
            "the tokens ask: Q comes from the pixels x.": seen(c),
        }
    return Trial((x, c, w_q, w_k, w_v), seen(), mistakes, "its values are not those of (2).")
