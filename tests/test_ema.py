"""The moving average of the weights: its closed form, lending it to a model, its state."""

from typing import Any

import pytest
import torch
from torch import nn

from minildm import EMA


def model_of(value: float) -> nn.Module:
    model = nn.Linear(2, 1).double()
    set_to(model, value)
    return model


@torch.no_grad()
def set_to(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.fill_(value)


def average(ema: EMA) -> float:
    (value,) = set(torch.cat([p.flatten() for p in ema.shadow.values()]).tolist())
    return value


def test_the_warm_up_follows_its_closed_form() -> None:
    model = model_of(0.0)
    ema, expected = EMA(model, decay=0.9), 0.0
    for n in range(1, 200):
        set_to(model, float(n))
        ema.update(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert average(ema) == pytest.approx(expected, rel=1e-12)
    assert ema.updates == 199


def test_at_a_constant_decay_old_weights_fade_geometrically() -> None:
    model = model_of(1.0)
    ema = EMA(model, decay=0.5)
    ema.updates = 1000  # the warm-up is over
    set_to(model, 0.0)
    for _ in range(10):
        ema.update(model)
    assert average(ema) == pytest.approx(0.5**10)


def test_decay_zero_is_the_model_itself() -> None:
    model = model_of(1.0)
    ema = EMA(model, decay=0.0)
    set_to(model, 7.0)
    ema.update(model)
    assert average(ema) == 7.0


def test_the_average_is_a_copy() -> None:
    model = model_of(1.0)
    ema = EMA(model)
    set_to(model, 2.0)
    assert average(ema) == 1.0
    assert not any(p.requires_grad for p in ema.shadow.values())


def test_within_applied_to_the_model_has_the_average_and_after_it_its_own() -> None:
    model, ema = model_of(1.0), EMA(model_of(5.0))
    with ema.applied_to(model) as lent:
        assert lent is model
        assert {p.item() for q in model.parameters() for p in q.flatten()} == {5.0}
    assert {p.item() for q in model.parameters() for p in q.flatten()} == {1.0}
    assert average(ema) == 5.0


def test_applied_to_gives_the_own_weights_back_after_an_error() -> None:
    model, ema = model_of(1.0), EMA(model_of(5.0))
    with pytest.raises(KeyError), ema.applied_to(model):
        raise KeyError
    assert {p.item() for q in model.parameters() for p in q.flatten()} == {1.0}


def test_copy_to_gives_the_average_for_good() -> None:
    model, ema = model_of(1.0), EMA(model_of(5.0))
    ema.copy_to(model)
    set_to(model, 6.0)
    assert average(ema) == 5.0


def test_frozen_weights_are_left_out(ldm_config: Any) -> None:
    from minildm import LatentDiffusion

    names = set(EMA(LatentDiffusion(ldm_config)).shadow)
    assert names
    assert not any(name.startswith("autoencoder.") for name in names)
    assert any(name.startswith("conditioner.") for name in names)


def test_the_state_goes_round_and_continues_alike() -> None:
    model = model_of(0.0)
    ema = EMA(model, decay=0.99)
    set_to(model, 1.0)
    for _ in range(3):
        ema.update(model)
    other = EMA(model_of(-1.0), decay=0.99)
    other.load_state_dict(ema.state_dict())
    ema.update(model)
    other.update(model)
    assert average(other) == average(ema)
    assert other.updates == ema.updates == 4


def test_a_state_without_a_weight_is_refused_by_name() -> None:
    ema = EMA(model_of(0.0))
    state = ema.state_dict()
    del state["bias"]
    with pytest.raises(KeyError, match="bias"):
        ema.load_state_dict(state)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay="):
        EMA(model_of(0.0), decay)
