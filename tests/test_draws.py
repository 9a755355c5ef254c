"""Draws for a shared batch: each process's rows are the rows of the whole."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from several import CLASS, EXPERIMENTS, UNET
from test_training_text import CONDITIONERS, Placed
from torch import Tensor, nn
from torch.utils.data import default_collate
from trainings import DATA, TRAIN

from minildm import (
    Autoencoder,
    ConditionerConfig,
    draws,
    save_model,
    train_autoencoder,
    train_judge,
    train_ldm,
    training,
)
from minildm.data import corruptions
from minildm.experiments import AutoencoderExperiment, JudgeExperiment
from minildm.judge import soften
from minildm.segmenter import roughened


def flat(x: Tensor) -> Tensor:
    """The same values, as a GPU likes them: the channels last in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def pictures(n: int) -> Tensor:
    draw = torch.Generator().manual_seed(7)
    return (2 * torch.rand(8, 3, 16, 16, generator=draw) - 1)[:n]


# Each makes the draws for n samples, in a batch of 8 or in a part of it.
FUNCTIONS: dict[str, Callable[[int], Tensor]] = {
    "rand": lambda n: draws.rand(n, 5),
    "rand, the batch second": lambda n: draws.rand(3, n, 2, dim=1).transpose(0, 1),
    "randn": lambda n: draws.randn(n, 7),
    "randint": lambda n: draws.randint(1000, n),
    "uniform": lambda n: draws.uniform(-2.0, 3.0, n, 2),
    "randn_like": lambda n: draws.randn_like(torch.zeros(n, 3, 4, 4)),
    "randn_like, channels last": lambda n: draws.randn_like(flat(torch.zeros(n, 3, 4, 4))),
    "randn_like, of a part": lambda n: draws.randn_like(flat(torch.zeros(n, 4, 4, 4))[:, :2]),
    "randn_like, few": lambda n: draws.randn_like(torch.zeros(n, 1)),
    "dropout": lambda n: draws.Dropout(0.5)(torch.ones(n, 6, 4)),
    "dropout, channels last": lambda n: draws.Dropout(0.3)(flat(torch.ones(n, 3, 4, 5))),
    "soften": lambda n: soften(part(pictures(8), n)),
    "roughened": lambda n: roughened(part(pictures(8), n)),
    "random_flips": lambda n: training.random_flips(part(pictures(8), n)),
    "spoiled": lambda n: corruptions.spoiled(part(pictures(8), n), 4),
    **{
        f"masks of {kind}": lambda n, kind=kind: corruptions.draw_masks((kind,), n, (8, 12))
        for kind in corruptions.MASKS
    },
    "masks": lambda n: corruptions.draw_masks(tuple(corruptions.MASKS), n, (8, 12)),
}


def part(whole: Tensor, n: int) -> Tensor:
    """This process's n rows of 8; the whole at n = 8."""
    return whole if n == len(whole) else draws.mine(whole)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_process_gets_its_rows_of_the_whole(name: str, world: int) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        whole, after = FUNCTIONS[name](8), torch.rand(4)
        parts = []
        for rank in range(world):
            torch.manual_seed(3)
            with draws.share(rank, world):
                parts.append(FUNCTIONS[name](8 // world))
            assert torch.equal(torch.rand(4), after)  # what is drawn next is the same, too
    exact = name not in ("soften", "spoiled")  # they compute, in other orders
    assert torch.allclose(torch.cat(parts), whole, rtol=0, atol=0 if exact else 1e-5)
    assert len(whole.reshape(8, -1).unique(dim=0)) > 1


def test_a_blur_ends_where_the_whole_batch_s_widest_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Gaussians' tails are cut; JPEG would hide most of what that is worth."""
    monkeypatch.setattr(corruptions, "jpeg", lambda x, quality: x)
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        whole, parts = corruptions.spoiled(pictures(8), 4), []
        for rank in range(8):
            torch.manual_seed(3)
            with draws.share(rank, 8):
                parts.append(corruptions.spoiled(pictures(8)[rank : rank + 1], 4))
    assert torch.allclose(torch.cat(parts), whole, rtol=0, atol=1e-6)


TORCHS: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
    "rand": (lambda: draws.rand(3, 5, dim=1), lambda: torch.rand(3, 5)),
    "randn": (lambda: draws.randn(3, 5), lambda: torch.randn(3, 5)),
    "randint": (lambda: draws.randint(9, 5), lambda: torch.randint(9, (5,))),
    "uniform": (lambda: draws.uniform(1, 2, 5), lambda: torch.empty(5).uniform_(1, 2)),
    "randn_like": (
        lambda: draws.randn_like(flat(pictures(4))),
        lambda: torch.randn_like(flat(pictures(4))),
    ),
    "dropout": (
        lambda: draws.Dropout(0.2)(flat(pictures(4))),
        lambda: nn.Dropout(0.2)(flat(pictures(4))),
    ),
}


@pytest.mark.parametrize("name", TORCHS)
def test_alone_they_are_torch_s_bit_for_bit(name: str) -> None:
    ours, theirs = TORCHS[name]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        one = ours()
        torch.manual_seed(0)
        assert torch.equal(one, theirs())


def test_evaluation_drops_nothing_and_draws_nothing() -> None:
    dropout, x = draws.Dropout(0.5).eval(), pictures(2)
    before = torch.get_rng_state()
    with draws.share(1, 2):
        assert torch.equal(dropout(x), x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_share_ends_with_its_block() -> None:
    with pytest.raises(RuntimeError), draws.share(1, 2):
        assert draws.total(3) == 6
        raise RuntimeError
    assert draws.total(3) == 3


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_an_impossible_share_is_refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match=f"rank={rank} must lie in 0"), draws.share(rank, world):
        pass


# --- every training: the mean over the parts of a batch is the whole batch's ---


class Everything(Placed):
    """Pictures with all that any task asks for."""

    semantic_classes = ("ground", *Placed.classes)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = super().__getitem__(i)
        covered = (self.images[i] < 255).any(dim=0)
        return {**item, "semantic": covered.long() * (1 + item["label"])}


def beside(concat: str, **data: Any) -> Any:
    """The experiment with a picture beside z_t."""
    more = {"stages": 1, "channels": 4} if concat == "semantic" else {}
    tau = ConditionerConfig(concat=concat, **more)
    unet = replace(UNET, d_cond=None, in_channels=2 + tau.concat_channels(2))
    return replace(CLASS, conditioner=tau, unet=unet, data=replace(DATA, **data))


TASKS = {
    **{name: EXPERIMENTS[name] for name in ("kl", "class", "judge")},
    "text": replace(CLASS, conditioner=CONDITIONERS["text"], data=replace(DATA, style_words=0.5)),
    "layout": replace(CLASS, conditioner=CONDITIONERS["layout"]),
    "low_res": beside("low_res", degradation="spoiled"),
    "inpaint": beside("inpaint"),
    "semantic": beside("semantic"),
    "segmenter": JudgeExperiment(
        train=TRAIN, data=replace(DATA, kind="scenes"), width=8, maps=True
    ),
}


@pytest.fixture
def prepared(
    autoencoder: Autoencoder, shaken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Any], tuple[nn.Module, Any, Any]]:
    """`prepared(experiment)`: the model, loss and data that its training would begin with."""
    given: list[Any] = []

    def take(model: nn.Module, loss_fn: Any, data: Any, *_: Any, **__: Any) -> Iterator[Any]:
        given.extend((shaken(model).train(), loss_fn, data))
        return iter(())

    monkeypatch.setattr(training, "optimise", take)
    save_model(autoencoder, tmp_path / "stage")

    def prepare(experiment: Any) -> tuple[nn.Module, Any, Any]:
        where = {"run_dir": tmp_path / "run", "device": "cpu"}
        if isinstance(experiment, AutoencoderExperiment):
            records = train_autoencoder(experiment, Everything(), **where)
        elif isinstance(experiment, JudgeExperiment):
            records = train_judge(experiment, Everything(), **where)
        else:
            records = train_ldm(experiment, Everything(), first_stage=tmp_path / "stage", **where)
        assert list(records) == []
        return tuple(given)

    return prepare


@pytest.mark.parametrize("task", TASKS)
def test_the_mean_over_the_parts_is_the_whole_batch_s(task: str, prepared: Any) -> None:
    """Terms and gradients, with flips, noise, times, dropped conditions, dropout, corruptions."""
    model, loss_fn, data = prepared(TASKS[task])
    batch = default_collate([data[i] for i in range(8)])

    def gradient(rank: int, world: int) -> tuple[Tensor, Tensor]:
        rows = slice(8 // world * rank, 8 // world * (rank + 1))
        torch.manual_seed(11)
        model.zero_grad()
        with draws.share(rank, world):
            terms = loss_fn({key: value[rows] for key, value in batch.items()}, 1)
        terms["loss"].backward()
        scalars = [term.detach() for term in terms.values() if term.ndim == 0]
        found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return torch.stack(scalars), torch.cat(found)

    with torch.random.fork_rng([]):
        terms, whole = gradient(0, 1)
        for world in (2, 4):
            parts = [gradient(rank, world) for rank in range(world)]
            means = [torch.stack(each).mean(0) for each in zip(*parts, strict=True)]
            assert torch.allclose(means[0], terms, rtol=1e-5)
            assert (means[1] - whole).norm() < 1e-4 * whole.norm()
            assert (parts[0][1] - whole).norm() > 0.01 * whole.norm()  # a part is not the whole
