"""The options of a training: decay, compilation, precision, layout, averages, objective."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainings import TRAIN, Training, identical, outcome

from minildm import NoiseSchedule, load_model
from minildm.diffusion import ScheduleConfig
from minildm.experiments import TrainConfig
from minildm.loop import compile_networks, float32_products, lr_at
from minildm.losses import ObjectiveConfig

# --- the learning rate ---


def test_linear_decay_falls_by_equal_parts_to_zero_after_the_last_step() -> None:
    config = TrainConfig(steps=10, lr=0.2, warmup_steps=0, decay="linear")
    rates = [lr_at(config, step) for step in range(1, 12)]
    assert rates == pytest.approx([0.02 * left for left in range(10, -1, -1)], abs=1e-12)


def test_warm_up_and_linear_decay_multiply() -> None:
    config = TrainConfig(steps=10, lr=0.2, warmup_steps=4, decay="linear")
    assert [lr_at(config, step) for step in (1, 2, 4, 10)] == pytest.approx(
        [0.25 * 0.2, 0.5 * 0.18, 0.14, 0.02]
    )


def test_an_unknown_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="decay='step' is not known; known: cosine, linear, const"):
        TrainConfig(steps=1, decay="step")


# --- compilation ---


@pytest.fixture(params=["aot_eager"])
def compiled(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[str]]:
    """What was compiled; without the code generator at the end, which takes minutes."""
    seen, compile_ = [], torch.compile

    def quick(call: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(call.__self__).__name__)
        return compile_(call, *args, backend=request.param, **kwargs)

    monkeypatch.setattr(torch, "compile", quick)
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


QUIET = pytest.mark.filterwarnings(  # inside the compiler, which looks at every tensor's grad
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


def with_train(training: Training, **changes: Any) -> Any:
    return replace(training.experiment, train=replace(TRAIN, **changes))


def weights_of(run: Path) -> dict[str, Tensor]:
    left = {name: value for name, value in outcome(run).items() if isinstance(value, Tensor)}
    assert any(name.startswith("model.safetensors/") for name in left)
    assert any("/optimizer/" in name for name in left)
    return left


def close(one: Path, other: Path, atol: float = 1e-4) -> bool:
    """The same names everywhere, and values that differ by rounding at most."""
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    gaps = {n: (first[n].double() - second[n].double()).abs().max().item() for n in first}
    return max(gaps.values()) < atol


@QUIET
def test_a_compiled_diffusion_model_ends_like_the_plain_one(
    trainings: dict, compiled: list[str], tmp_path: Path
) -> None:
    training = trainings["ldm"]
    unet = replace(training.experiment.unet, width_mult=(1,), attn_levels=(), dropout=0.0)
    small = replace(training.experiment, unet=unet, train=replace(TRAIN, steps=2))
    list(training(tmp_path / "plain", small))
    assert not compiled
    list(training(tmp_path / "fast", replace(small, train=replace(small.train, compile=True))))
    assert compiled == ["UNet", "ClassConditioner"]
    assert close(tmp_path / "plain", tmp_path / "fast")
    models = [load_model(tmp_path / name) for name in ("plain", "fast")]
    pictures = [model.sample(["red", "blue"], steps=3, seed=0) for model in models]
    assert torch.allclose(*pictures, atol=1e-3)


@QUIET
def test_a_compiled_training_resumes(trainings: dict, compiled: list[str], tmp_path: Path) -> None:
    training = trainings["judge"]
    fast = with_train(training, compile=True)
    list(training(tmp_path / "plain"))
    broken = training(tmp_path / "fast", fast)
    assert [record.step for record in islice(broken, 3)] == [1, 2, 3]
    broken.close()
    once = len(compiled)
    assert [record.step for record in training(tmp_path / "fast", fast)] == [3, 4, 5, 6]
    assert len(compiled) == 2 * once > 0
    assert close(tmp_path / "plain", tmp_path / "fast")


@QUIET
def test_a_compiled_game_ends_like_the_plain_one(
    trainings: dict, compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adaptive weight walks through the decoder's graph twice, once it is compiled for one."""
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", True)
    training = trainings["vq-gan"]
    adversarial = replace(training.experiment.adversarial, start=2, ramp=0)
    game = replace(
        training.experiment,
        model=replace(training.experiment.model, regularizer="kl", codebook_size=None),
        restart_dead=0,
        adversarial=adversarial,
        train=replace(TRAIN, steps=2),
    )
    list(training(tmp_path / "plain", game))
    list(training(tmp_path / "compiled", replace(game, train=replace(game.train, compile=True))))
    assert compiled[:2] == ["Encoder", "Decoder"]
    assert len(compiled) > 2  # the critic's parts
    assert close(tmp_path / "plain", tmp_path / "compiled")


def test_only_what_learns_is_compiled(compiled: list[str]) -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.Conv2d(1, 1, 1).requires_grad_(False)
            self.schedule, self.learns = NoiseSchedule.scaled_linear(10), nn.Linear(2, 2)

    model = Whole()
    names = list(model.state_dict())
    compile_networks([model, nn.Bilinear(1, 1, 1)])
    assert compiled == ["Linear", "Bilinear"]  # without children: itself
    assert list(model.state_dict()) == names


# --- precision and layout ---


@pytest.mark.parametrize("before", [("highest", True), ("high", False)])
@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_on_or_off_inside_and_as_before_after(tf32: bool, before: tuple) -> None:
    def state() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def set_to(precision: str, convolutions: bool) -> None:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions

    own = state()
    try:
        set_to(*before)
        with pytest.raises(KeyError), float32_products(tf32):
            assert state() == (("high", True) if tf32 else ("highest", False))
            raise KeyError
        assert state() == before
    finally:
        set_to(*own)


@pytest.mark.parametrize("tf32", [True, False])
def test_a_step_computes_as_its_config_says_and_its_caller_as_before(
    tf32: bool, trainings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, seen = trainings["ldm"], []
    forward = nn.Conv2d.forward

    def spied(self: nn.Conv2d, x: Tensor) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return forward(self, x)

    own = torch.get_float32_matmul_precision()
    run = training(tmp_path / "run", with_train(training, tf32=tf32))
    next(run)
    monkeypatch.setattr(nn.Conv2d, "forward", spied)
    next(run)
    assert torch.get_float32_matmul_precision() == own
    run.close()
    assert set(seen) == {"high" if tf32 else "highest"}


def test_the_layout_in_memory_changes_no_result(trainings: dict, tmp_path: Path) -> None:
    """By the losses: of weights whose gradient is rounding alone, Adam makes what it likes."""
    for name in ("ldm", "vq-gan"):
        training, losses = trainings[name], []
        for channels_last in (True, False):
            experiment = with_train(training, channels_last=channels_last, steps=4)
            if name == "ldm":  # dropout draws in the order of memory
                experiment = replace(experiment, unet=replace(experiment.unet, dropout=0.0))
            run = training(tmp_path / name / str(channels_last), experiment)
            losses.append([record.terms["loss"] for record in run])
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_layout_reaches_the_weights_that_train(
    trainings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, seen = trainings["ldm"], []
    forward = nn.Conv2d.forward

    def spied(self: nn.Conv2d, x: Tensor) -> Tensor:
        if self.training and self.weight.shape[2] == 3 and self.weight.shape[1] > 1:
            seen.append(self.weight.is_contiguous(memory_format=torch.channels_last))
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, "forward", spied)
    for channels_last in (True, False):
        seen.clear()
        run = training(
            tmp_path / str(channels_last), with_train(training, channels_last=channels_last)
        )
        next(run)
        run.close()
        assert set(seen) == {channels_last}


def test_fp16_needs_a_gpu(trainings: dict, tmp_path: Path) -> None:
    """accelerate would train in float32 and call it fp16."""
    training = trainings["ldm"]
    with pytest.raises(ValueError, match="precision='fp16' needs a GPU"):
        next(training(tmp_path / "run", with_train(training, precision="fp16")))


# --- averages ---


def test_samples_come_from_the_average_and_differ_from_the_last_weights(
    trainings: dict, tmp_path: Path
) -> None:
    list(trainings["ldm"](tmp_path / "run"))
    state = torch.load(tmp_path / "run/training/state.pt", weights_only=True)
    assert int(state["ema"]["updates"]) == state["step"] == TRAIN.steps
    own = load_model(tmp_path / "run", ema=False)

    def latent(model: Any) -> Tensor:
        *_, last = model.steps(["red", "blue"], steps=4, seed=0)
        return last.z

    averaged, last = latent(load_model(tmp_path / "run")), latent(own)
    assert not torch.allclose(averaged, last, atol=1e-4)
    own.load_state_dict({k: v for k, v in state["ema"].items() if k != "updates"}, strict=False)
    assert torch.equal(latent(own), averaged)


# --- objectives ---


OBJECTIVES = {
    "v, min-SNR, zero terminal SNR": (
        ObjectiveConfig(predict="v", weighting="min_snr"),
        ScheduleConfig(zero_terminal_snr=True),
    ),
    "z0, L1, cosine": (ObjectiveConfig(predict="z0", loss="l1"), ScheduleConfig(kind="cosine")),
    "eps, min-SNR, linear": (
        ObjectiveConfig(weighting="min_snr", gamma=2.0),
        ScheduleConfig(kind="linear", T=100, b0=0.001, b1=0.2),
    ),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_resumes_loads_and_samples(
    name: str, trainings: dict, tmp_path: Path
) -> None:
    training = trainings["ldm"]
    objective, schedule = OBJECTIVES[name]
    experiment = replace(training.experiment, objective=objective, schedule=schedule)
    records = list(training(tmp_path / "whole", experiment))
    assert all(("simple" in r.terms) == (objective.weighting != "simple") for r in records)
    if schedule.zero_terminal_snr:  # resuming knows nothing of objectives: once is enough
        broken = training(tmp_path / "broken", experiment)
        list(islice(broken, 3))
        broken.close()
        list(training(tmp_path / "broken", experiment))
        assert identical(tmp_path / "whole", tmp_path / "broken")
    model = load_model(tmp_path / "whole")
    assert (model.config.objective, model.config.schedule) == (objective, schedule)
    assert model.schedule.T == schedule.T
    pictures = model.sample(["red", "blue"], steps=4, seed=0, guidance_scale=2.0)
    assert pictures.shape == (2, 3, 16, 16)
    assert pictures.isfinite().all()


def test_v_prediction_overfits_one_batch(
    trainings: dict, make_pictures: Any, tmp_path: Path
) -> None:
    training = trainings["ldm"]
    train = replace(TRAIN, steps=30, flip=False, save_every=30, batch_size=16)
    objective = ObjectiveConfig(predict="v")
    experiment = replace(training.experiment, objective=objective, train=train)
    run = training(tmp_path / "run", experiment, data=make_pictures(2))
    losses = [record.terms["loss"] for record in run]
    assert sum(losses[-5:]) / 5 < 0.8 * sum(losses[:2]) / 2
