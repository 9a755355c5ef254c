"""The optimisation loop, on a linear model in float64: order, rates, gradients, failures."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training.trainings import TRAIN, Training, each, state_of

from minildm.layers import BatchRandom
from minildm.training import loop
from minildm.training.configs import Experiment, TrainConfig
from minildm.training.loop import (
    LossFn,
    Record,
    describe,
    endless_batches,
    lr_at,
    pick_device,
)


class Line(list):
    """y = 3 x - 1 with a little noise, in float64."""

    name, fingerprint, config = "line", "line", None


X = randn(16, 2, dtype=torch.float64)
Y = 3 * X[:, :1] - 1 + 0.1 * X[:, 1:]
DATA = Line({"x": x, "y": y} for x, y in zip(X, Y, strict=True))


class Fit(nn.Linear):
    """A linear model in float64, which starts at slope 0.5."""

    def __init__(self, slope: float = 0.5) -> None:
        super().__init__(2, 1, dtype=torch.float64)
        nn.init.constant_(self.weight, slope)
        nn.init.zeros_(self.bias)

    @property
    def vector(self) -> Tensor:
        """A copy of all weights."""
        return nn.utils.parameters_to_vector(self.parameters()).detach().clone()


LINE = replace(TRAIN, lr=0.1)


def square(model: nn.Module) -> LossFn:
    """The squared error."""
    return lambda batch, step, rng: {"loss": (model(batch["x"]) - batch["y"]).square().mean()}


def fit(
    folder: Path, model: nn.Module, loss: LossFn, config: TrainConfig = LINE, **options: Any
) -> Iterator[Record]:
    """Train on the line."""
    run = loop.Training(folder, Experiment(train=config), "cpu", DATA)
    return run.optimise(model, loss, DATA, **options)


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in which a linear model is trained, which has no file format."""
    monkeypatch.setattr(loop, "save_model", lambda *args, **options: None)
    return tmp_path


# --- the order of the data ---


@pytest.mark.parametrize(("length", "size"), [(10, 4), (10, 5), (3, 7)])
def test_every_epoch_holds_each_image_once(length: int, size: int) -> None:
    order = [i for batch in endless_batches(length, size, 0, range(30)) for i in batch]
    epochs = [order[k : k + length] for k in range(0, len(order) - length + 1, length)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_batch_k_is_the_same_wherever_one_starts_and_is_shared_by_the_processes() -> None:
    whole = list(endless_batches(10, 6, 5, range(30)))
    assert list(endless_batches(10, 6, 5, range(7, 30))) == whole[7:]
    assert list(endless_batches(10, 6, 6, range(30))) != whole  # another seed
    parts = [list(endless_batches(10, 6, 5, range(30), rank, 3)) for rank in range(3)]
    assert [[*a, *b, *c] for a, b, c in zip(*parts, strict=True)] == whole


# --- what a step is ---


def test_the_rate_warms_up_and_decays() -> None:
    config = TrainConfig(steps=100, lr=2.0, warmup_steps=10)
    assert lr_at(config, 1) == pytest.approx(0.2)
    assert lr_at(config, 51) == pytest.approx(2.0 * (1 + math.cos(math.pi / 2)) / 2)
    assert lr_at(replace(config, decay="constant"), 99) == 2.0


def test_the_gradients_of_each_network_are_clipped_by_their_norm(
    line: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms, step = [], torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        for group in self.param_groups:
            norms.append(torch.cat([p.grad.flatten() for p in group["params"]]).norm())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    model, adversary, config = Fit(), Fit(-0.5), replace(LINE, grad_clip=1e-3)
    list(fit(line, model, game(model, adversary), config, adversary=adversary))
    assert [norm.item() for norm in norms] == pytest.approx([1e-3] * 12, rel=1e-3)


def test_the_model_ends_with_the_average_of_its_weights(line: Path) -> None:
    """In closed form, with the decay's warm-up."""
    model = Fit()
    expected, config = model.vector, replace(LINE, steps=20)
    for n, _ in enumerate(fit(line, model, square(model), config), start=1):
        decay = min(LINE.ema_decay, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.vector
    assert torch.allclose(model.vector, expected, rtol=1e-12)
    assert not model.training


# --- two networks, one optimiser ---


def game(model: nn.Module, adversary: nn.Module) -> Any:
    """Both fit the line; the adversary also sees the model's detached output."""

    def loss(batch: dict[str, Any], step: int, rng: BatchRandom) -> dict[str, Tensor]:
        out = model(batch["x"])
        terms = {"loss": (out - batch["y"]).square().mean()}
        wrong = adversary(batch["x"]) - batch["y"] + 0.1 * out.detach()
        return {**terms, "disc_loss": 5 * wrong.square().mean()}

    return loss


def test_the_model_learns_as_if_alone_and_the_adversary_at_its_own_rate(line: Path) -> None:
    """Adam's first step is the rate times the gradient's sign."""
    model, adversary, alone = Fit(), Fit(-0.5), Fit()
    before = adversary.vector
    options = {"adversary": adversary, "adversary_lr": 0.25}
    run = fit(line / "two", model, game(model, adversary), **options)
    first = next(run)
    assert first.lr == lr_at(LINE, 1)
    for one, other, rate in ((model.vector, alone.vector, 1.0), (adversary.vector, before, 0.25)):
        assert (one - other).abs().tolist() == pytest.approx([first.lr * rate] * 3, rel=1e-4)
    losses = [first.terms["loss"], *(r.terms["loss"] for r in run)]
    lonely = fit(line / "one", alone, square(alone))
    assert [r.terms["loss"] for r in lonely] == losses
    assert torch.equal(model.vector, alone.vector)


# --- values that are not finite ---


@pytest.mark.parametrize(
    ("step", "log_every", "poison", "said", "saved"),
    [
        (1, 1, lambda loss: loss * float("nan"), "steps 1 to 1: not finite .*loss=", None),
        (4, 1, lambda loss: loss + float("inf"), "steps 4 to 4: not finite .*loss=", 2),
        (5, 4, lambda loss: loss + (0 * loss).sqrt(), "steps 5 to 6: not finite .*loss=", 4),
    ],
)
def test_a_loss_or_a_gradient_that_is_not_finite_stops_the_run(
    step: int, log_every: int, poison: Any, said: str, saved: int | None, line: Path
) -> None:
    model = Fit()

    def bad(batch: dict[str, Any], at: int, rng: BatchRandom) -> dict[str, Tensor]:
        terms = square(model)(batch, at, rng)
        return {**terms, "loss": poison(terms["loss"]) if at == step else terms["loss"]}

    config = replace(LINE, log_every=log_every)
    with pytest.raises(FloatingPointError, match=said):
        list(fit(line, model, bad, config))
    assert saved is None or state_of(line)["step"] == saved
    healed, healthy = Fit(), Fit()
    list(fit(line, healed, square(healed), config))
    list(fit(line / "healthy", healthy, square(healthy), config))
    assert torch.equal(healed.vector, healthy.vector)


# --- a step reads nothing from its device, so that a GPU computes without a pause ---

aten = torch.ops.aten
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal}


class NoReading(TorchDispatchMode):
    """Fails where a value leaves a tensor: `.item()`, `bool(x)`, `x[mask]`, `nonzero`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in READS, func
        if func.overloadpacket is aten.index:
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "x[mask]"
        return func(*args, **(kwargs or {}))


@contextmanager
def sync_error() -> Iterator[None]:
    """Every wait for the GPU raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@each
def test_a_step_does_not_wait_for_the_device(
    training: Training, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 2 to 4, until they are logged."""
    advance, read = loop.Training.advance, loop.Training.read
    with ExitStack() as guards:

        def begin(self: loop.Training, *args: Any) -> None:
            advance(self, *args)
            if self.step == 1:
                guards.enter_context(NoReading() if device == "cpu" else sync_error())

        def end(self: loop.Training) -> dict[str, float]:
            guards.close()
            return read(self)

        monkeypatch.setattr(loop.Training, "advance", begin)
        monkeypatch.setattr(loop.Training, "read", end)
        rare = training.changed(steps=4, log_every=4, save_every=4)
        [record] = training(tmp_path, rare, device=device)
    assert record.step == 4 and record.terms["loss"] > 0


# --- where and how ---


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (pick_device("cpu").type, pick_device("cpu:0").type) == ("cpu", "cpu")
    assert describe(pick_device("cpu")) == f"cpu, {torch.get_num_threads()} threads"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    for name in ("cuda:2", "gpu", "cpu:x", ""):
        with pytest.raises(
            ValueError, match=rf"device='{name}' does .* known: cuda, .*cuda:1, .*cpu"
        ):
            pick_device(name)
