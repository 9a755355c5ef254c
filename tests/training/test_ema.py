"""The moving average of the weights: its closed form, its state, what it leaves out."""

import pytest
import torch
from helpers import tiny_ldm_config
from training.trainings import Fit

from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.training.ema import EMA


def filled(value: float) -> Fit:
    model = Fit()
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


def average(ema: EMA) -> float:
    (value,) = set(torch.cat([p.flatten() for p in ema.shadow.values()]).tolist())
    return value


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_warm_up_follows_its_closed_form(decay: float) -> None:
    ema, expected = EMA(filled(0.0), decay), 0.0
    for n in range(1, 200):
        ema.update(filled(float(n)))
        d = min(decay, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * n
        assert average(ema) == pytest.approx(expected, rel=1e-12)


def test_the_state_goes_round_and_continues_alike() -> None:
    ema, model = EMA(filled(0.0), 0.99), filled(1.0)
    for _ in range(3):
        ema.update(model)
    other = EMA(filled(-1.0), 0.99)
    other.load_state_dict({k: v.clone() for k, v in ema.state_dict().items()})
    for each in (ema, other):
        each.update(filled(2.0))
    assert average(other) == average(ema)
    other.copy_to(model)
    other.update(filled(50.0))
    assert torch.equal(model.vector, torch.full((3,), average(ema), dtype=torch.float64))
    with pytest.raises(KeyError, match="bias"):
        other.load_state_dict({"weight": torch.zeros(1, 2), "updates": torch.tensor(1)})


def test_frozen_weights_are_left_out() -> None:
    names = set(EMA(LatentDiffusion(tiny_ldm_config())).shadow)
    assert {name.partition(".")[0] for name in names} == {"unet", "conditioner"}
