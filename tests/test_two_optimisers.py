"""Two players in one loop: each steps, each on its own term, accumulation rescales neither."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lines import CONFIG, CPU, Line
from torch import Tensor, nn
from trainings import Training

from minildm import Record
from minildm.checkpoints import to_dict
from minildm.experiments import AutoencoderExperiment, TrainConfig
from minildm.loop import NonFiniteLossError, lr_at, optimise
from minildm.losses import AdversarialConfig
from minildm.runs import RunFolder


def line(slope: float) -> nn.Linear:
    model = nn.Linear(2, 1).double()
    with torch.no_grad():
        model.weight.fill_(slope)
        model.bias.fill_(0.0)
    return model


def game(model: nn.Module, adversary: nn.Module, start: int = 1) -> Any:
    """Both fit the line; the adversary sees the model's detached answer, too."""

    def loss(batch: dict, step: int) -> dict[str, Tensor]:
        answer = model(batch["x"])
        terms = {"loss": (answer - batch["y"]).square().mean()}
        if step < start:
            return {**terms, "disc_loss": torch.zeros(())}
        wrong = adversary(batch["x"]) - batch["y"] + 0.1 * answer.detach()
        return {**terms, "disc_loss": 5 * wrong.square().mean()}

    return loss


def play(
    folder: Path, config: TrainConfig = CONFIG, start: int = 1, **options: Any
) -> tuple[Iterator[Record], nn.Module, nn.Module]:
    model, adversary = line(0.5), line(-0.5)
    run = RunFolder(folder, {"Toy": to_dict(config)})
    records = optimise(
        model,
        game(model, adversary, start),
        Line(),
        config,
        run,
        device=CPU,
        precision="fp32",
        save=lambda ema: None,
        adversary=adversary,
        **options,
    )
    return records, model, adversary


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def test_both_sides_step_at_their_own_rates(tmp_path: Path) -> None:
    """Adam's first step is the rate times the gradient's sign."""
    records, model, adversary = play(tmp_path, adversary_lr=0.25)
    before = weights(model), weights(adversary)
    next(records)
    lr = lr_at(CONFIG, 1)
    moved = (weights(model) - before[0]).abs(), (weights(adversary) - before[1]).abs()
    assert moved[0].tolist() == pytest.approx([lr] * 3, rel=1e-4)
    assert moved[1].tolist() == pytest.approx([lr / 4] * 3, rel=1e-4)


def test_the_adversary_learns_and_the_model_learns_as_if_alone(tmp_path: Path) -> None:
    config = replace(CONFIG, steps=40, save_every=40)
    records, model, adversary = play(tmp_path / "two", config)
    history = [r.terms for r in records]
    assert history[-1]["disc_loss"] < 0.2 * history[0]["disc_loss"]
    lonely = line(0.5)
    loss = game(lonely, adversary)
    run = RunFolder(tmp_path / "one", {"Toy": to_dict(config)})
    alone = optimise(
        lonely,
        lambda batch, step: {"loss": loss(batch, step)["loss"]},
        Line(),
        config,
        run,
        device=CPU,
        precision="fp32",
        save=lambda ema: None,
    )
    assert [r.terms["loss"] for r in alone] == [terms["loss"] for terms in history]
    assert torch.equal(weights(model), weights(lonely))


def test_before_its_start_the_adversary_stands_still(tmp_path: Path) -> None:
    records, _, adversary = play(tmp_path, replace(CONFIG, weight_decay=0.1), start=4)
    before, moved = weights(adversary), []
    for _ in records:
        moved.append(not torch.equal(weights(adversary), before))
    assert moved == [False, False, False, True, True, True]


def test_accumulation_rescales_neither_term(tmp_path: Path) -> None:
    """Equal batches in smaller pieces: the same terms and the same steps."""
    ends = []
    for batch_size, accumulate in ((8, 1), (4, 2), (1, 8)):
        config = replace(CONFIG, batch_size=batch_size, accumulate=accumulate)
        records, model, adversary = play(tmp_path / str(accumulate), config)
        terms = [list(r.terms.values()) for r in records]
        ends.append((torch.tensor(terms, dtype=torch.float64), weights(model), weights(adversary)))
    for other in ends[1:]:
        for one, whole in zip(other, ends[0], strict=True):
            assert torch.allclose(one, whole, rtol=1e-9)


def test_each_side_is_clipped_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms, step = [], torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        taken = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        norms.append(torch.cat(taken).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    list(play(tmp_path, replace(CONFIG, grad_clip=1e-3))[0])
    assert norms == pytest.approx([1e-3] * 12, rel=1e-3)


def test_a_broken_game_goes_on_where_it_was(tmp_path: Path) -> None:
    records, *whole = play(tmp_path / "whole", start=2)
    list(records)
    broken = play(tmp_path / "broken", start=2)[0]
    for record in broken:
        if record.step == 5:
            broken.close()
    records, *resumed = play(tmp_path / "broken", start=2)
    assert [r.step for r in records] == [5, 6]
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(weights(one), weights(other))


def test_an_adversary_gone_wrong_stops_the_run(tmp_path: Path) -> None:
    records, model, adversary = play(tmp_path)
    next(records)
    next(records)
    with torch.no_grad():
        adversary.weight.fill_(float("nan"))
    before = weights(model)
    with pytest.raises(NonFiniteLossError, match=r"step 3: .*disc_loss=nan.* of step 2 stays"):
        next(records)
    assert torch.equal(weights(model), before)


# --- in stage 1 ---


@pytest.fixture
def gan(trainings: dict[str, Training]) -> Training:
    return trainings["vq-gan"]


def test_the_discriminator_steps_once_it_has_entered(gan: Training, tmp_path: Path) -> None:
    seen = []
    for record in gan(tmp_path, replace(gan.experiment, train=SAVE_EACH)):
        state = torch.load(tmp_path / "training/state.pt", weights_only=True)
        seen.append((record, {k: v.clone() for k, v in state["adversary"].items()}))
    changed = [
        not torch.equal(one["net.0.weight"], other["net.0.weight"])
        for (_, one), (_, other) in pairwise(seen)
    ]
    assert changed == [False, True, True, True, True]  # it enters at step 3
    terms = [record.terms for record, _ in seen]
    assert all(t["disc_loss"] == t["adv_weight"] == 0 for t in terms[:2])
    assert all(t["disc_loss"] > 0 and t["adv_weight"] > 0 for t in terms[2:])
    assert {"rec_loss", "reg_loss", "adv_loss", "logits_real", "logits_fake"} <= terms[0].keys()


def test_until_it_enters_the_autoencoder_trains_as_without(gan: Training, tmp_path: Path) -> None:
    plain = replace(gan.experiment, adversarial=None)
    with_critic = [r.terms["rec_loss"] for r in gan(tmp_path / "gan")]
    without = [r.terms["rec_loss"] for r in gan(tmp_path / "plain", plain)]
    assert with_critic[:3] == without[:3]  # step 3 is the first whose gradient differs
    assert with_critic[3:] != without[3:]


SAVE_EACH = TrainConfig(
    steps=6, batch_size=4, lr=0.01, warmup_steps=2, ema_decay=0.5, precision="fp32", save_every=1
)


def test_repeated_micro_batches_make_the_same_step(
    gan: Training, make_pictures: Any, tmp_path: Path
) -> None:
    """One batch of all pictures, or the same twice, accumulated: nothing is divided twice."""
    data, ends = make_pictures(4), []
    still = replace(
        gan.experiment,
        restart_dead=0,
        adversarial=AdversarialConfig(discriminator=gan.experiment.adversarial.discriminator),
    )
    for accumulate in (1, 2):
        train = replace(SAVE_EACH, steps=2, accumulate=accumulate, flip=False)
        folder = tmp_path / str(accumulate)
        records = list(gan(folder, replace(still, train=train), data=data))
        state = torch.load(folder / "training/state.pt", weights_only=True)
        ends.append((records, state))
    (once, one), (twice, two) = ends
    for name in ("loss", "rec_loss", "reg_loss", "disc_loss", "adv_loss", "adv_weight"):
        assert twice[0].terms[name] == pytest.approx(once[0].terms[name], rel=1e-5), name
    for part in ("optimizer", "adversary_optimizer"):
        for index, moments in one[part]["state"].items():
            ours, theirs = moments["exp_avg"], two[part]["state"][index]["exp_avg"]
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6), (part, index)


def test_half_floats_and_a_critic_are_refused(gan: Training) -> None:
    with pytest.raises(ValueError, match="precision='fp16' does not go with adversarial"):
        replace(gan.experiment, train=replace(SAVE_EACH, precision="fp16"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"perceptual_weight": -1.0}, "perceptual_weight=-1.0 must not be negative"),
        ({"codebook_weight": float("nan")}, "codebook_weight=nan"),
        ({"restart_dead": -1}, "restart_dead=-1"),
    ],
)
def test_impossible_weights_are_refused(gan: Training, changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(gan.experiment, **changes)


def test_a_remedy_without_codes_is_refused(trainings: dict[str, Training]) -> None:
    kl: AutoencoderExperiment = trainings["autoencoder"].experiment
    with pytest.raises(ValueError, match="restart_dead=5 needs regularizer='vq'"):
        replace(kl, restart_dead=5)


def test_pixel_space_has_nothing_to_train(trainings: dict[str, Training], tmp_path: Path) -> None:
    kl = trainings["autoencoder"]
    pixels = replace(kl.experiment.model, regularizer="identity", z_channels=3)
    with pytest.raises(ValueError, match="nothing to train"):
        next(kl(tmp_path / "run", replace(kl.experiment, model=pixels)))
    assert not (tmp_path / "run").exists()
