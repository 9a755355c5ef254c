"""A user's own model, objective and parts: they train, resume, are saved and loaded."""

import re
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training.test_checkpoints import model_of, same
from training.trainings import LDM, difference

from minildm.diffusion.latent_diffusion import LatentDiffusion
from minildm.training.checkpoint import CheckpointError, load_model, own_code, save_model

PAGE = Path(__file__).parents[2] / "notebooks/METHOD.md"


class Own(LatentDiffusion):
    """One weight more than the stock model."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.more = nn.Parameter(torch.ones(2, 1, 1))

    def network(self, z_t: Tensor, *rest: Any) -> Tensor:
        return super().network(z_t * self.more, *rest)


def scaled(model: LatentDiffusion, batch: dict, rng: Any, factor: float = 1.0) -> dict:
    """The model's loss, times a factor."""
    return {"loss": factor * model.loss(batch, rng)["loss"]}


def test_an_own_model_and_loss_train_resume_and_load(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    own = {"build": Own, "loss": partial(scaled, factor=2.0)}
    records = list(LDM(whole, **own))
    assert len(list(islice(LDM(broken, **own), 3))) == 3
    assert list(LDM(broken, **own))[-1].terms == records[-1].terms
    assert difference(whole, broken) == []
    stock = next(LDM(tmp_path / "stock"))  # zero at the start, whatever the weight
    assert records[0].terms["loss"] == pytest.approx(2 * stock.terms["loss"], rel=1e-5)
    for other in ({}, {"build": Own}, {**own, "loss": scaled}, {**own, "build": LatentDiffusion}):
        with pytest.raises(ValueError, match=r"holds another run \(code\.<?(class|func)"):
            next(LDM(broken, **other))
    with pytest.raises(CheckpointError, match=r"own, <class '.*Own'>: give build="):
        load_model(whole)
    model = load_model(whole, build=Own)
    assert type(model) is Own and not torch.equal(model.more, torch.ones(2, 1, 1))
    assert model.sample("red", steps=2).isfinite().all()
    list(LDM(tmp_path / "further", **own, init=whole))


class Times:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, *args: Any) -> dict:
        return scaled(*args, self.factor)


def closure(factor: float) -> Any:
    return lambda *args: scaled(*args, factor)


@pytest.mark.parametrize("make", [Times, closure, lambda x: Times(x).__call__])
def test_what_a_loss_keeps_is_part_of_the_run(make: Any) -> None:
    one, same, other = (own_code(make(factor)) for factor in (1.0, 1.0, 2.0))
    assert one == same != other


@pytest.mark.parametrize("wrap", [nn.DataParallel, partial(torch.compile, backend="eager")])
def test_a_wrapped_unet_is_saved_under_its_own_names(wrap: Any, tmp_path: Path) -> None:
    model, plain = model_of("class"), model_of("class")
    save_model(model.autoencoder, tmp_path / "ae")
    model.unet = wrap(model.unet)
    ema = {name: weight + 1 for name, weight in model.named_parameters()}
    save_model(model, tmp_path / "ldm", ema=ema, first_stage="../ae")
    assert same(load_model(tmp_path / "ldm", ema=False), plain)
    weight = load_model(tmp_path / "ldm").unet.conv_out.weight
    assert torch.equal(weight, plain.unet.conv_out.weight + 1)


def test_the_page_on_the_method_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for block in blocks:
        assert len([line for line in block.splitlines() if line.strip()]) <= 20
        exec(re.sub(r"\b(200|512)\b", "4", block), names)
    assert len(blocks) == 5 and names["x"].shape == (4, 3, 32, 32)
    assert names["x"].isfinite().all() and len(names["x"].flatten(1).unique(dim=0)) == 4
