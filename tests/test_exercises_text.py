"""The checks of notebook 11: right answers pass, and each typical mistake is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exercise_rules import (  # noqa: F401
    test_a_check_leaves_the_random_state_alone,
    test_a_mistake_is_named,
    test_no_answer_makes_a_check_raise,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from minildm.exercises import text_to_image
from minildm.layers import CrossAttention
from minildm.tokenizer import CaptionTokenizer

Fn = Callable[..., Any]
CHECKS = NUMBERS, LOOK = (text_to_image.check_numbers, text_to_image.check_look)


def packages_numbers(words: list[str], vocabulary: dict[str, int], length: int) -> Tensor:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return CaptionTokenizer(tokenizer)([" ".join(words)], length)[0]


def packages_look(x: Tensor, c: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor) -> Tensor:
    """The package's module with one head, and a last layer that changes nothing."""
    d = w_q.shape[1]
    attn = CrossAttention(x.shape[2], d_cond=c.shape[2], heads=1, d_head=d)
    for layer, w in ((attn.to_q, w_q), (attn.to_k, w_k), (attn.to_v, w_v)):
        layer.weight.data = w.T
    attn.to_out = torch.nn.Identity()
    return attn(x, c)


def row(front: Fn, *, pad: str = "[PAD]", place: Fn = lambda ids, rest: ids + rest) -> Fn:
    """Numbers put together from parts: `front` gives the names that are no padding."""

    def numbers(words: list[str], vocabulary: dict[str, int], length: int) -> Tensor:
        names = front([word if word in vocabulary else "[UNK]" for word in words])
        ids = [vocabulary[name] for name in names]
        return torch.tensor(place(ids, [vocabulary[pad]] * (length - len(ids))))

    return numbers


def framed(words: list[str]) -> list[str]:
    return ["[CLS]", *words, "[SEP]"]


def look(
    asks: Fn = lambda x, c: x,
    keys: Fn = lambda x, c: c,
    values: Fn = lambda x, c: c,
    root: Fn = lambda d_in, d: d**0.5,
    share: Fn = lambda scores: scores.softmax(-1),
    order: tuple[int, int, int] = (0, 1, 2),
) -> Fn:
    """Cross-attention put together from parts; order: which matrix serves as w_q, w_k, w_v."""

    def fn(x: Tensor, c: Tensor, *w: Tensor) -> Tensor:
        q, k, v = (part(x, c) @ w[i] for part, i in zip((asks, keys, values), order, strict=True))
        return share(q @ k.mT / root(*w[0].shape)) @ v

    return fn


RIGHT: list[tuple[Fn, Fn]] = [
    (NUMBERS, packages_numbers),
    (NUMBERS, row(framed)),
    (LOOK, packages_look),
    (LOOK, look()),
    (LOOK, lambda x, c, a, b, v: F.scaled_dot_product_attention(x @ a, c @ b, c @ v)),
]


@pytest.mark.parametrize(("check", "fn"), RIGHT)
def test_a_right_answer_passes_however_it_is_written(check: Fn, fn: Fn) -> None:
    verdict = check(fn)
    assert verdict.ok, verdict


def known(words: list[str]) -> list[str]:
    return [word for word in words if word != "[UNK]"]


def before_the_end(ids: list[int], rest: list[int]) -> list[int]:
    return ids[:-1] + rest + ids[-1:]


WRONG: dict[str, tuple[Fn, Fn, str]] = {
    "numbers: bare": (NUMBERS, row(lambda w: w), "start and end are missing"),
    "numbers: no start": (NUMBERS, row(lambda w: [*w, "[SEP]"]), "start, [CLS], is missing"),
    "numbers: no end": (NUMBERS, row(lambda w: ["[CLS]", *w]), "end, [SEP], is missing"),
    "numbers: turned": (NUMBERS, row(lambda w: ["[SEP]", *w, "[CLS]"]), "[CLS] begins"),
    "numbers: left out": (NUMBERS, row(lambda w: framed(known(w))), "are left out"),
    "numbers: unknown is padding": (
        NUMBERS,
        row(lambda w: framed([x if x != "[UNK]" else "[PAD]" for x in w])),
        "token of their own",
    ),
    "numbers: padded with unknown": (NUMBERS, row(framed, pad="[UNK]"), "fills up with [UNK]"),
    "numbers: padded with end": (NUMBERS, row(framed, pad="[SEP]"), "fills up with [SEP]"),
    "numbers: in front": (NUMBERS, row(framed, place=lambda i, r: r + i), "padding comes first"),
    "numbers: end last": (NUMBERS, row(framed, place=before_the_end), "before the end"),
    "numbers: reverse": (NUMBERS, row(lambda w: framed(w[::-1])), "in reverse"),
    "numbers: sorted": (
        NUMBERS,
        lambda w, v, n: packages_numbers(sorted(w, key=lambda x: v.get(x, 1)), v, n),
        "words are sorted",
    ),
    "numbers: not padded": (
        NUMBERS,
        row(framed, place=lambda ids, rest: ids),
        "shape is (5,), expected (8,)",
    ),
    "numbers: no unknown": (
        NUMBERS,
        lambda w, v, n: packages_numbers([x if x in v else str(v[x]) for x in w], v, n),
        "KeyError",
    ),
    "numbers: a list": (NUMBERS, lambda *a: packages_numbers(*a).tolist(), "of type list"),
    "numbers: other": (NUMBERS, lambda w, v, n: torch.arange(n), "are not those of 'a red apple'"),
    "look: no root": (LOOK, look(root=lambda d_in, d: 1.0), "not divided by √d."),
    "look: d": (LOOK, look(root=lambda d_in, d: d), "divided by d;"),
    "look: d_in": (LOOK, look(root=lambda d_in, d: d_in**0.5), "divided by √d_in"),
    "look: no softmax": (LOOK, look(share=lambda s: s), "softmax is missing"),
    "look: over pixels": (LOOK, look(share=lambda s: s.softmax(1)), "runs over the pixels"),
    "look: w_q and w_k": (LOOK, look(order=(1, 0, 2)), "w_q and w_k are swapped"),
    "look: w_k and w_v": (LOOK, look(order=(0, 2, 1)), "w_k and w_v are swapped"),
    "look: self": (
        LOOK,
        look(keys=lambda x, c: x, values=lambda x, c: x),
        "that is self-attention",
    ),
    "look: roles": (
        LOOK,
        lambda x, c, *w: look()(c, x, *w),
        "roles are swapped",
    ),
    "look: values": (LOOK, look(values=lambda x, c: x), "V comes from the pixels"),
    "look: keys": (LOOK, look(keys=lambda x, c: x), "K comes from the pixels"),
    "look: tokens ask": (LOOK, look(asks=lambda x, c: c), "the tokens ask"),
    "look: in place": (LOOK, lambda x, c, *w: look()(x.mul_(2), c, *w), "in place"),
    "look: other": (LOOK, lambda x, c, *w: 2 * look()(x, c, *w), "not those of (2)"),
}
