"""The optimisation loop on a linear model in float64: order, rates, gradients, failures."""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training.trainings import LINE, Fit, Line, fit, square

from minildm.layers import BatchRandom
from minildm.training.configs import TrainConfig
from minildm.training.loop import (
    NonFiniteLossError,
    describe,
    endless_batches,
    lr_at,
    pick_device,
    pick_precision,
)

pytestmark = pytest.mark.usefixtures("no_model_files")

# --- the order of the data ---


@pytest.mark.parametrize(("length", "size"), [(10, 4), (10, 5), (3, 7), (1, 3)])
def test_every_epoch_holds_each_image_once(length: int, size: int) -> None:
    order = [i for batch in endless_batches(length, size, 0, range(30)) for i in batch]
    assert len(order) == 30 * size
    epochs = [order[k : k + length] for k in range(0, len(order) - length + 1, length)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    assert length < 4 or len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("first", [0, 1, 7, 29, 30])
def test_batch_k_is_the_same_wherever_one_starts(first: int) -> None:
    whole = list(endless_batches(10, 4, 5, range(30)))
    assert list(endless_batches(10, 4, 5, range(first, 30))) == whole[first:]
    assert list(endless_batches(10, 4, 6, range(30))) != whole  # another seed


def test_processes_share_each_batch() -> None:
    parts = [list(endless_batches(10, 6, 0, range(9), rank, 3)) for rank in range(3)]
    joined = [[*a, *b, *c] for a, b, c in zip(*parts, strict=True)]
    assert joined == list(endless_batches(10, 6, 0, range(9)))


# --- the learning rate ---


def test_the_rate_warms_up_and_decays() -> None:
    config = TrainConfig(steps=100, lr=2.0, warmup_steps=10)
    assert lr_at(config, 1) == pytest.approx(0.2)
    assert lr_at(config, 51) == pytest.approx(2.0 * (1 + math.cos(math.pi / 2)) / 2)
    linear = replace(config, steps=10, warmup_steps=4, decay="linear")
    assert [lr_at(linear, s) for s in (1, 2, 4, 10, 11)] == pytest.approx([0.5, 0.9, 1.4, 0.2, 0])
    assert lr_at(replace(config, decay="constant"), 99) == 2.0


def test_the_optimiser_uses_the_recorded_rate(tmp_path: Path) -> None:
    """Adam's first step is the rate times the gradient's sign."""
    model = Fit()
    before = model.vector
    first = next(fit(tmp_path, model, square(model)))
    assert first.lr == lr_at(LINE, 1)
    assert (model.vector - before).abs().tolist() == pytest.approx([first.lr] * 3, rel=1e-4)


# --- what a step is ---


@contextmanager
def gradients() -> Iterator[list[Tensor]]:
    """Fills with the gradient of each optimiser step, whose scale Adam hides."""
    taken: list[Tensor] = []
    step = torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        own = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        taken.append(torch.cat(own))
        return step(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", spy)
        yield taken


def test_accumulated_batches_are_one_large_batch(tmp_path: Path) -> None:
    """Also of two optimisers, and neither term is rescaled."""
    runs = []
    for size, accumulate in ((8, 1), (4, 2), (1, 8)):
        config = replace(LINE, batch_size=size, accumulate=accumulate, grad_clip=1e9)
        model, adversary = Fit(), Fit(-0.5)
        with gradients() as taken:
            loss = game(model, adversary)
            options = {"config": config, "adversary": adversary}
            records = list(fit(tmp_path / str(size), model, loss, **options))
        assert [r.images for r in records] == [8, 16, 24, 32, 40, 48]
        terms = [list(r.terms.values()) for r in records]
        runs.append((torch.tensor(terms).double(), torch.stack(taken), model.vector))
    for run in runs[1:]:
        for one, large in zip(run, runs[0], strict=True):
            assert torch.allclose(one, large, rtol=1e-9)


def test_terms_are_the_scalars_that_the_loss_returns(tmp_path: Path) -> None:
    model, data = Fit(), Line()
    first = next(fit(tmp_path, model, square(model)))
    (batch,) = endless_batches(len(data), 4, LINE.seed, range(1))
    error = (Fit()(data.x[batch]) - data.y[batch]).square().mean().item()
    assert first.terms == pytest.approx({"loss": error, "double": 2 * error}, rel=1e-12)


def test_gradients_are_clipped_by_the_norm_of_each_optimiser(tmp_path: Path) -> None:
    model, adversary = Fit(), Fit(-0.5)
    with gradients() as taken:
        config = replace(LINE, grad_clip=1e-3)
        list(fit(tmp_path, model, game(model, adversary), config, adversary=adversary))
    assert [grad.norm().item() for grad in taken] == pytest.approx([1e-3] * 12, rel=1e-3)


def test_the_model_ends_with_the_average_of_its_weights(tmp_path: Path) -> None:
    model = Fit()
    expected = model.vector
    for n, _ in enumerate(fit(tmp_path, model, square(model)), 1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.vector
        last = model.vector
    assert torch.allclose(model.vector, expected, rtol=1e-12)
    assert not torch.allclose(model.vector, last)
    assert not model.training


def test_the_random_numbers_of_a_step_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    def noisy(seen: list[float]) -> Callable[..., dict[str, Tensor]]:
        def loss(batch: dict[str, Any], step: int, rng: BatchRandom) -> dict[str, Tensor]:
            seen.extend([rng.rand(1).item(), torch.rand(()).item()])  # ours, and dropout's
            return square(model)(batch, step, rng)

        return loss

    seen: dict[str, list[float]] = {"a": [], "b": [], "c": []}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(ord(name))
        model = Fit()
        run = fit(tmp_path / name, model, noisy(seen[name]), replace(LINE, seed=seed))
        list(islice(run, 3))
        run.close()
        list(fit(tmp_path / name, Fit(), noisy(seen[name]), replace(LINE, seed=seed)))
    assert seen["a"] == seen["b"]
    assert seen["a"][4:6] == seen["a"][6:8]  # step 3, which the resumed run repeats
    assert len(set(seen["a"])) == 12
    assert not set(seen["a"]) & set(seen["c"])


# --- two optimisers ---


def game(model: nn.Module, adversary: nn.Module, start: int = 1) -> Any:
    """Both fit the line; the adversary also sees the model's detached output."""

    def loss(batch: dict[str, Any], step: int, rng: BatchRandom) -> dict[str, Tensor]:
        out = model(batch["x"])
        terms = {"loss": (out - batch["y"]).square().mean()}
        if step < start:
            return {**terms, "disc_loss": torch.zeros(())}
        wrong = adversary(batch["x"]) - batch["y"] + 0.1 * out.detach()
        return {**terms, "disc_loss": 5 * wrong.square().mean()}

    return loss


def test_the_model_learns_as_if_alone_and_the_adversary_at_its_own_rate(tmp_path: Path) -> None:
    model, adversary, alone = Fit(), Fit(-0.5), Fit()
    before = adversary.vector
    options = {"adversary": adversary, "adversary_lr": 0.25}
    run = fit(tmp_path / "two", model, game(model, adversary), **options)
    first = next(run)
    moved = (adversary.vector - before).abs()
    assert moved.tolist() == pytest.approx([first.lr / 4] * 3, rel=1e-4)
    losses = [first.terms["loss"], *(r.terms["loss"] for r in run)]
    lonely = fit(tmp_path / "one", alone, square(alone))
    assert [r.terms["loss"] for r in lonely] == losses
    assert torch.equal(model.vector, alone.vector)


def test_before_its_start_the_adversary_is_not_changed(tmp_path: Path) -> None:
    model, adversary = Fit(), Fit(-0.5)
    before, changed = adversary.vector, []
    loss, config = game(model, adversary, start=4), replace(LINE, weight_decay=0.1)
    for _ in fit(tmp_path, model, loss, config, adversary=adversary):
        changed.append(not torch.equal(adversary.vector, before))
    assert changed == [False, False, False, True, True, True]


# --- values that are not finite ---

POISONS: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": lambda loss: loss * float("nan"),
    "inf": lambda loss: loss + float("inf"),
    "finite, with a gradient that is not": lambda loss: loss + (0 * loss).sqrt(),
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(("step", "log_every"), [(1, 1), (4, 1), (4, 3)])
def test_a_loss_that_is_not_finite_stops_the_run(
    step: int, log_every: int, poison: str, tmp_path: Path
) -> None:
    model = Fit()

    def bad(batch: dict[str, Any], at: int, rng: BatchRandom) -> dict[str, Tensor]:
        terms = square(model)(batch, at, rng)
        return {**terms, "loss": POISONS[poison](terms["loss"]) if at == step else terms["loss"]}

    config = replace(LINE, log_every=log_every, save_every=3 if log_every == 3 else 2)
    steps = "4 to 6" if log_every == 3 else f"{step} to {step}"
    kept = "step 3 stays" if log_every == 3 else "no checkpoint" if step == 1 else "step 2 stays"
    with pytest.raises(NonFiniteLossError, match=rf"steps {steps}: .*loss=.*double=.*{kept}"):
        list(fit(tmp_path, model, bad, config))
    if log_every == 1:
        assert model.vector.isfinite().all()  # found before the update
    healed, healthy = Fit(), Fit()
    list(fit(tmp_path, healed, square(healed), config))
    list(fit(tmp_path / "healthy", healthy, square(healthy), config))
    assert torch.equal(healed.vector, healthy.vector)


# --- where and how ---


def test_devices_by_name() -> None:
    assert (pick_device("cpu").type, pick_device("cpu:0").type) == ("cpu", "cpu")
    assert describe(pick_device("cpu")) == f"cpu, {torch.get_num_threads()} threads"
    for name in ("cuda:77", "gpu", "cpu:x", ""):
        with pytest.raises(ValueError, match=rf"device='{name}' does not exist here; known: .*cpu"):
            pick_device(name)


def test_a_second_gpu_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"known: cuda, cuda:0, cuda:1, .*cpu"):
        pick_device("cuda:2")


@pytest.mark.parametrize(("amx", "avx", "chosen"), [(0, 0, "fp32"), (1, 0, "bf16"), (0, 1, "bf16")])
def test_auto_precision_is_what_the_processor_has(
    amx: int, avx: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx))
    assert pick_precision("auto", torch.device("cpu")) == chosen
    assert pick_precision("fp32", torch.device("cpu")) == "fp32"
    assert pick_precision("auto", torch.device("mps")) == "fp32"
    assert pick_precision("fp16", torch.device("cuda")) == "fp16"
    with pytest.raises(ValueError, match="precision='fp16' requires a GPU"):
        pick_precision("fp16", torch.device("cpu"))


def test_accelerate_is_imported_only_to_train() -> None:
    code = "import sys, minildm.training.stages; assert 'accelerate' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
