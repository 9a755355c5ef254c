"""The optimisation loop: data order, learning rate, accumulation, averages, failures."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lines import CONFIG, CPU, Line
from torch import Tensor, nn
from torch.utils.data import Dataset

from minildm import EMA, Conditioning, NoiseSchedule, Record, UNet, UNetConfig, ldm_loss
from minildm.checkpoints import to_dict
from minildm.experiments import TrainConfig
from minildm.loop import (
    NonFiniteLossError,
    batches,
    lr_at,
    optimise,
    pick_device,
    pick_precision,
)
from minildm.runs import RunFolder


def line_model() -> nn.Linear:
    model = nn.Linear(2, 1).double()
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias.fill_(0.0)
    return model


def square_loss(model: nn.Module) -> Callable[..., dict[str, Tensor]]:
    def loss(batch: dict, step: int = 1) -> dict[str, Tensor]:
        square = (model(batch["x"]) - batch["y"]).square().mean()
        return {"loss": square, "double": 2 * square, "index": batch["index"]}

    return loss


def train(
    model: nn.Module,
    loss: Callable[..., dict[str, Tensor]],
    config: TrainConfig,
    folder: Path,
    data: Dataset | None = None,
    save: Callable[[EMA], None] = lambda ema: None,
) -> Iterator[Record]:
    run = RunFolder(folder, {"Toy": to_dict(config)})
    run.fixed("precision", "fp32")
    data = Line() if data is None else data
    return optimise(model, loss, data, config, run, device=CPU, precision="fp32", save=save)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_records_say_the_rate_that_was_used(tmp_path: Path) -> None:
    """SGD would move by lr times the gradient; Adam's first step is lr times its sign."""
    model = line_model()
    before = weights(model)
    first = next(train(model, square_loss(model), CONFIG, tmp_path))
    assert first.lr == lr_at(CONFIG, 1)
    assert (weights(model) - before).abs().tolist() == pytest.approx([first.lr] * 3, rel=1e-4)


# --- what a step is ---


@contextmanager
def gradients(model: nn.Module) -> Iterator[list[Tensor]]:
    """Fills with the gradient that each optimiser step takes; Adam hides its scale."""
    taken: list[Tensor] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        taken.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        yield taken


def test_accumulated_micro_batches_are_one_large_batch(tmp_path: Path) -> None:
    runs = []
    for batch_size, accumulate in ((8, 1), (4, 2), (2, 4), (1, 8)):
        config = replace(CONFIG, batch_size=batch_size, accumulate=accumulate, grad_clip=1e9)
        model = line_model()
        with gradients(model) as taken:
            records = list(train(model, square_loss(model), config, tmp_path / str(accumulate)))
        assert [r.images for r in records] == [8, 16, 24, 32, 40, 48]
        losses = torch.tensor([r.terms["loss"] for r in records], dtype=torch.float64)
        runs.append((losses, torch.stack(taken), weights(model)))
    for run in runs[1:]:
        for one, large in zip(run, runs[0], strict=True):
            assert torch.allclose(one, large, rtol=1e-9)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_terms_are_the_losses_own_values(accumulate: int, tmp_path: Path) -> None:
    config = replace(CONFIG, accumulate=accumulate)
    model, untrained = line_model(), line_model()
    first = next(train(model, square_loss(model), config, tmp_path))
    first_batches = list(batches(Line(), config, 0))[:accumulate]
    values = [square_loss(untrained)(batch)["loss"].item() for batch in first_batches]
    assert first.terms["loss"] == pytest.approx(sum(values) / accumulate, rel=1e-12)
    assert first.terms["double"] == pytest.approx(2 * first.terms["loss"], rel=1e-12)
    assert set(first.terms) == {"loss", "double"}  # scalars alone


def test_gradients_are_clipped_by_their_norm(tmp_path: Path) -> None:
    model, config = line_model(), replace(CONFIG, grad_clip=1e-3)
    with gradients(model) as taken:
        list(train(model, square_loss(model), config, tmp_path))
    assert [grad.norm().item() for grad in taken] == pytest.approx([1e-3] * 6, rel=1e-3)


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    model = line_model()
    model.bias.requires_grad_(False)
    list(train(model, square_loss(model), CONFIG, tmp_path))
    assert model.bias.item() == 0.0
    assert (model.weight != 0.5).all()


# --- the average ---


def test_the_model_ends_with_the_average_of_its_weights(tmp_path: Path) -> None:
    model = line_model()
    expected = weights(model)
    for n, _ in enumerate(train(model, square_loss(model), CONFIG, tmp_path), 1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights(model)
        last = weights(model)
    assert torch.allclose(weights(model), expected, rtol=1e-12)
    assert not torch.allclose(weights(model), last)
    assert not model.training


def test_the_model_is_saved_every_few_steps_and_at_the_end(tmp_path: Path) -> None:
    model, saved, steps = line_model(), [], []
    config = replace(CONFIG, steps=7, save_every=3)
    run = train(model, square_loss(model), config, tmp_path, save=lambda e: saved.append(e.updates))
    for record in run:
        steps.append((record.step, len(saved)))
    assert saved == [3, 6, 7]
    assert steps == [(1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 2), (7, 3)]


# --- resuming ---


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6])
def test_an_abandoned_run_ends_where_the_unbroken_one_does(stop: int, tmp_path: Path) -> None:
    whole, broken = line_model(), line_model()
    records = list(train(whole, square_loss(whole), CONFIG, tmp_path / "whole"))
    first = train(broken, square_loss(broken), CONFIG, tmp_path / "broken")
    early = [next(first) for _ in range(stop)]
    first.close()
    model = line_model()  # a new process starts from new weights
    late = list(train(model, square_loss(model), CONFIG, tmp_path / "broken"))
    assert torch.equal(weights(model), weights(whole))
    begin = stop // 2 * 2  # the last step that was saved
    assert [r.step for r in late] == list(range(begin + 1, 7))
    for one, other in zip([*early[:begin], *late], records, strict=True):
        assert (one.step, one.images, one.lr) == (other.step, other.images, other.lr)
        assert one.terms == other.terms
    seconds = [r.seconds for r in [*early[:begin], *late]]
    assert seconds == sorted(seconds)


def test_the_log_of_a_resumed_run_holds_each_step_once(tmp_path: Path) -> None:
    model = line_model()
    first = train(model, square_loss(model), CONFIG, tmp_path)
    for _ in range(3):
        next(first)
    first.close()
    log = RunFolder(tmp_path, {"Toy": to_dict(CONFIG)})
    assert [r.step for r in log.history()] == [1, 2, 3]
    second = train(model, square_loss(model), CONFIG, tmp_path)
    assert next(second).step == 3
    assert [r.step for r in log.history()] == [1, 2, 3]
    assert [r.step for r in second] == [4, 5, 6]
    assert [r.step for r in log.history()] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_yields_nothing_and_gives_its_weights(tmp_path: Path) -> None:
    model, again = line_model(), line_model()
    list(train(model, square_loss(model), CONFIG, tmp_path))
    assert list(train(again, square_loss(again), CONFIG, tmp_path)) == []
    assert torch.equal(weights(again), weights(model))


def test_a_full_disk_stops_the_run_and_keeps_its_last_state(
    tmp_path: Path, full_disk: Callable[..., None]
) -> None:
    model, whole = line_model(), line_model()
    list(train(whole, square_loss(whole), CONFIG, tmp_path / "whole"))
    run = train(model, square_loss(model), CONFIG, tmp_path / "run")
    for _ in range(3):
        next(run)
    full_disk(500)
    with pytest.raises(OSError, match=r"No space left.*state\.pt"):
        next(run)
    full_disk(10**9)  # somebody made room
    model = line_model()
    late = train(model, square_loss(model), CONFIG, tmp_path / "run")
    assert [r.step for r in late] == [3, 4, 5, 6]
    assert torch.equal(weights(model), weights(whole))


# --- what is not finite ---


def poisoned(model: nn.Module, step: int, poison: Callable[[Tensor], Tensor]) -> Any:
    """The loss, gone wrong at that step."""
    loss, calls = square_loss(model), 0

    def at(batch: dict, step_: int) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        terms = loss(batch)
        return terms if calls != step else {**terms, "loss": poison(terms["loss"])}

    return at


POISONS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda loss: loss * float("nan"),
    "inf": lambda loss: loss + float("inf"),
    "finite, but not its gradient": lambda loss: loss + (0 * loss).sqrt(),
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_loss_that_is_not_finite_stops_the_run(step: int, poison: str, tmp_path: Path) -> None:
    model, records = line_model(), []
    run = train(model, poisoned(model, step, POISONS[poison]), CONFIG, tmp_path)
    with pytest.raises(NonFiniteLossError, match=rf"step {step}: .*loss=.*double=") as caught:
        for record in run:
            records.append(record)
    assert [r.step for r in records] == list(range(1, step))
    kept = (step - 1) // 2 * 2
    said = f"the checkpoint of step {kept} stays" if kept else "no checkpoint yet"
    assert said in str(caught.value)
    assert weights(model).isfinite().all()
    # What it left resumes, once the cause is gone, to where a healthy run ends.
    model, healthy = line_model(), line_model()
    late = list(train(model, square_loss(model), CONFIG, tmp_path))
    list(train(healthy, square_loss(healthy), CONFIG, tmp_path / "healthy"))
    assert late[0].step == kept + 1
    assert torch.equal(weights(model), weights(healthy))


def test_any_term_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = line_model()

    def loss(batch: dict, step: int = 1) -> dict[str, Tensor]:
        return {**square_loss(model)(batch), "side": torch.tensor(float("inf"))}

    with pytest.raises(NonFiniteLossError, match="side=inf"):
        next(train(model, loss, CONFIG, tmp_path))


# --- what it leaves alone ---


def random_states() -> tuple[Any, ...]:
    """Of all the generators that a caller may use."""
    numpys = np.random.get_state()[1].tolist()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), numpys


def test_the_callers_random_state_is_untouched_and_has_no_say(tmp_path: Path) -> None:
    def noisy(model: nn.Module) -> Callable[..., dict[str, Tensor]]:
        def loss(batch: dict, step: int = 1) -> dict[str, Tensor]:
            x = batch["x"] + torch.randn_like(batch["x"])
            return {"loss": (model(x) - batch["y"]).square().mean()}

        return loss

    ends = []
    for seed in (1, 2):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model, before = line_model(), random_states()
            list(train(model, noisy(model), CONFIG, tmp_path / str(seed)))
            assert random_states() == before
        ends.append(weights(model))
    assert torch.equal(*ends)


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    ends = []
    for seed in (0, 1):
        model, config = line_model(), replace(CONFIG, seed=seed)
        list(train(model, square_loss(model), config, tmp_path / str(seed)))
        ends.append(weights(model))
    assert not torch.allclose(*ends)


# --- it learns ---


def test_a_unet_overfits_one_noised_batch(
    unet_config: UNetConfig, randn: Any, tmp_path: Path
) -> None:
    schedule, unet = NoiseSchedule.scaled_linear(), UNet(replace(unet_config, d_cond=None))
    z0, eps = randn(4, 2, 4, 4), randn(4, 2, 4, 4, seed=1)
    t = torch.tensor([100, 300, 600, 900])

    class OneBatch(Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {"z0": z0[i], "eps": eps[i], "t": t[i]}

    def loss(batch: dict, step: int = 1) -> dict[str, Tensor]:
        def eps_theta(z_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
            return unet(z_t, t)

        each = ldm_loss(eps_theta, schedule, batch["z0"], Conditioning(), batch["t"], batch["eps"])
        return {"loss": each.mean()}

    config = replace(CONFIG, steps=120, lr=0.01, save_every=120)
    records = list(train(unet, loss, config, tmp_path, OneBatch()))
    assert records[0].terms["loss"] == pytest.approx(eps.square().mean().item(), rel=1e-5)
    assert records[-1].terms["loss"] < 0.05 * records[0].terms["loss"]


# --- where and how ---


def test_a_wish_for_device_and_precision_is_followed() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device().type in ("cpu", "cuda", "mps")
    for precision in ("fp32", "bf16"):
        assert pick_precision(precision, CPU) == precision
    assert pick_precision("fp16", torch.device("cuda")) == "fp16"
    with pytest.raises(ValueError, match="precision='fp16' needs a GPU; on a CPU take 'bf16'"):
        pick_precision("fp16", CPU)
    assert pick_precision("auto", CPU) in ("fp32", "bf16")
    assert pick_precision("auto", torch.device("mps")) == "fp32"
