"""The order of the data and the learning rate: functions of the step alone."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from lines import CONFIG, Line

from minildm.experiments import TrainConfig
from minildm.loop import (
    EndlessBatches,
    batches,
    lr_at,
    seed_of,
)

# --- the order of the data ---


@pytest.mark.parametrize(("length", "size"), [(10, 4), (10, 5), (3, 7), (1, 3)])
def test_every_epoch_holds_each_picture_once(length: int, size: int) -> None:
    order = [i for batch in EndlessBatches(length, size, 0, 0, 30) for i in batch]
    assert len(order) == 30 * size
    epochs = [order[k : k + length] for k in range(0, len(order) - length + 1, length)]
    assert len(epochs) > 4
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    assert length < 4 or len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew


@pytest.mark.parametrize("first", [0, 1, 3, 7, 29, 30])
def test_batches_are_the_same_wherever_one_starts(first: int) -> None:
    whole = list(EndlessBatches(10, 4, 5, 0, 30))
    assert list(EndlessBatches(10, 4, 5, first, 30)) == whole[first:]
    assert len(EndlessBatches(10, 4, 5, first, 30)) == 30 - first


def test_another_seed_is_another_order() -> None:
    assert list(EndlessBatches(10, 4, 0, 0, 5)) != list(EndlessBatches(10, 4, 1, 0, 5))


def test_steps_take_the_next_batches_of_all_their_micro_batches() -> None:
    config = replace(CONFIG, accumulate=3)
    drawn = [batch["index"].tolist() for batch in batches(Line(), config, 2)]
    assert drawn == list(EndlessBatches(16, 4, 0, 2 * 3, 6 * 3))


def test_no_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="no picture"):
        batches(Line(0), CONFIG, 0)


def test_seeds_are_mixed_well() -> None:
    seeds = {seed_of(a, b, c) for a in range(10) for b in range(100) for c in range(3)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 2) != seed_of(2, 1)
    bits = torch.tensor([[seed >> k & 1 for k in range(63)] for seed in seeds]).double()
    assert (bits.mean(dim=0) - 0.5).abs().max() < 5 * 0.5 / 3000**0.5


# --- the learning rate ---


def test_the_learning_rate_warms_up_linearly_then_stays() -> None:
    config = TrainConfig(steps=50, lr=0.2, warmup_steps=10, decay="constant")
    rates = [lr_at(config, step) for step in range(1, 51)]
    assert rates[:10] == pytest.approx([0.02 * step for step in range(1, 11)])
    assert rates[10:] == [0.2] * 40


def test_the_cosine_falls_from_the_full_rate_to_almost_nothing() -> None:
    config = TrainConfig(steps=1000, lr=0.2, warmup_steps=0)
    rates = [lr_at(config, step) for step in range(1, 1001)]
    assert rates[0] == 0.2
    assert rates[500] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(rates))
    assert 0 < rates[-1] < 0.001 * 0.2


def test_warm_up_and_cosine_multiply() -> None:
    config = TrainConfig(steps=100, lr=0.2, warmup_steps=10)
    whole = replace(config, warmup_steps=0)
    for step in (1, 5, 9, 10, 60):
        expected = min(1.0, step / 10) * lr_at(whole, step)
        assert lr_at(config, step) == pytest.approx(expected)
