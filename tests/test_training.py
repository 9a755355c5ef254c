"""The three trainings: killed and resumed, they end bit for bit where the unbroken ones end."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from minildm import (
    Autoencoder,
    AutoencoderConfig,
    LatentDiffusion,
    Record,
    UNetConfig,
    load_model,
    save_model,
    train_autoencoder,
    train_judge,
    train_ldm,
)
from minildm.checkpoints import fingerprint, read_card
from minildm.conditioning import ConditionerConfig
from minildm.judge import Judge
from minildm.presets import (
    AutoencoderExperiment,
    DataConfig,
    JudgeExperiment,
    LatentDiffusionExperiment,
    TrainConfig,
)
from minildm.training import progress, with_steps

STEPS = 6
TRAIN = TrainConfig(
    steps=STEPS,
    batch_size=4,
    lr=0.01,
    warmup_steps=2,
    ema_decay=0.5,
    precision="fp32",
    save_every=2,
)
DATA = DataConfig(size=16)
KINDS = ("autoencoder", "ldm", "judge")


@dataclass
class Training:
    """One of the three trainings, on the tiny pictures."""

    start: Callable[..., Iterator[Record]]
    experiment: Any
    options: dict[str, Any]

    def __call__(self, run_dir: Path, experiment: Any = None, **more: Any) -> Iterator[Record]:
        experiment = experiment or self.experiment
        return self.start(experiment, run_dir=run_dir, device="cpu", **{**self.options, **more})


@pytest.fixture
def trainings(
    pictures: Any,
    ae_config: AutoencoderConfig,
    unet_config: UNetConfig,
    autoencoder: Autoencoder,
    tmp_path: Path,
) -> dict[str, Training]:
    autoencoder.scale.fill_(2.0)
    save_model(autoencoder, tmp_path / "first-stage")
    data = {"data": pictures}
    conditioner = ConditionerConfig(kind="class", d_cond=8, p_uncond=0.5)
    ldm = LatentDiffusionExperiment(
        unet=replace(unet_config, dropout=0.1), train=TRAIN, data=DATA, conditioner=conditioner
    )
    return {
        "autoencoder": Training(
            train_autoencoder, AutoencoderExperiment(model=ae_config, train=TRAIN, data=DATA), data
        ),
        "ldm": Training(train_ldm, ldm, {**data, "first_stage": tmp_path / "first-stage"}),
        "judge": Training(train_judge, JudgeExperiment(train=TRAIN, data=DATA, width=8), data),
    }


@pytest.fixture(params=KINDS)
def training(request: pytest.FixtureRequest, trainings: dict[str, Training]) -> Training:
    return trainings[request.param]


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """A nested state as path -> leaf."""
    pairs = state.items() if isinstance(state, dict) else enumerate(state)
    leaves: dict[str, Any] = {}
    for key, value in pairs:
        nested = isinstance(value, dict | list | tuple)
        leaves |= flat(value, f"{prefix}{key}/") if nested else {f"{prefix}{key}": value}
    return leaves


def outcome(run_dir: Path) -> dict[str, Any]:
    """All that a training leaves, but for how long it took."""
    left: dict[str, Any] = {"config": json.loads((run_dir / "config.json").read_text())}
    for file in sorted(run_dir.glob("*.safetensors")):
        left[file.name] = load_file(file)
    left["state"] = torch.load(run_dir / "training/state.pt", weights_only=True)
    rows = [line.split(",") for line in (run_dir / "log.csv").read_text().splitlines()]
    left["log"] = [row[:2] + row[3:] for row in rows]
    return {k: v for k, v in flat(left).items() if k != "state/seconds"}


def identical(one: Path, other: Path) -> bool:
    first, second = outcome(one), outcome(other)
    assert first.keys() == second.keys()
    assert any("optimizer" in key for key in first)
    differ = [
        key
        for key, value in first.items()
        if not (
            torch.equal(value, second[key]) if isinstance(value, Tensor) else value == second[key]
        )
    ]
    assert not differ, differ[:10]
    return True


# --- resuming ---


@pytest.mark.parametrize("stop", [1, 6])
def test_an_abandoned_training_ends_bit_for_bit_like_the_unbroken(
    stop: int, training: Training, tmp_path: Path
) -> None:
    assert len(list(training(tmp_path / "whole"))) == STEPS
    first = training(tmp_path / "broken")
    for _ in range(stop):
        next(first)
    first.close()
    with torch.random.fork_rng([]):
        torch.manual_seed(99)  # another process, another random state
        late = list(training(tmp_path / "broken"))
    assert [r.step for r in late] == list(range(stop // 2 * 2 + 1, STEPS + 1))
    assert identical(tmp_path / "whole", tmp_path / "broken")


def test_a_copy_of_the_folder_resumes_bit_for_bit(training: Training, tmp_path: Path) -> None:
    for record in training(tmp_path / "whole"):
        if record.step == 4:  # as a backup finds it, while the run goes on
            shutil.copytree(tmp_path / "whole", tmp_path / "copy")
    assert [record.step for record in training(tmp_path / "copy")] == [5, 6]
    assert identical(tmp_path / "whole", tmp_path / "copy")


def test_a_training_can_be_killed_again_and_again(training: Training, tmp_path: Path) -> None:
    list(training(tmp_path / "whole"))
    seen = []
    for _ in range(3):
        run = training(tmp_path / "broken")
        seen.append([record.step for record in islice(run, 3)])
        run.close()
    list(training(tmp_path / "broken"))
    assert seen == [[1, 2, 3], [3, 4, 5], [5, 6]]
    assert identical(tmp_path / "whole", tmp_path / "broken")


def test_a_finished_training_changes_nothing_more(training: Training, tmp_path: Path) -> None:
    list(training(tmp_path / "run"))
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    assert list(training(tmp_path / "run")) == []
    assert identical(tmp_path / "run", tmp_path / "kept")


def test_a_model_can_be_loaded_while_it_trains(training: Training, tmp_path: Path) -> None:
    run = training(tmp_path / "run")
    for record in run:
        if record.step == 2:
            break
    model = load_model(tmp_path / "run")
    averages = torch.load(tmp_path / "run/training/state.pt", weights_only=True)["ema"]
    own = dict(model.named_parameters())
    names = set(averages) - {"updates"}
    assert names
    assert all(torch.equal(own[name], averages[name]) for name in names)
    run.close()


def test_the_callers_random_state_is_untouched(training: Training, tmp_path: Path) -> None:
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    list(training(tmp_path / "run"))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


def test_another_experiment_in_the_folder_is_refused(training: Training, tmp_path: Path) -> None:
    run = training(tmp_path / "run")
    next(run)
    next(run)
    run.close()
    before = outcome(tmp_path / "run").keys()
    changed = replace(training.experiment, train=replace(TRAIN, lr=0.5))
    with pytest.raises(ValueError, match=r"run.* holds another run .*train\.lr: 0\.01 there, 0\.5"):
        next(training(tmp_path / "run", changed))
    assert outcome(tmp_path / "run").keys() == before


def test_another_kind_of_training_in_the_folder_is_refused(
    trainings: dict[str, Training], tmp_path: Path
) -> None:
    next(trainings["judge"](tmp_path / "run"))
    with pytest.raises(ValueError, match="holds another run"):
        next(trainings["autoencoder"](tmp_path / "run"))


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_state_that_was_cut_short_is_named(part: float, trainings: dict, tmp_path: Path) -> None:
    training = trainings["autoencoder"]
    run = training(tmp_path / "run")
    next(run)
    next(run)
    run.close()
    file = tmp_path / "run/training/state.pt"
    content = file.read_bytes()
    file.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"state\.pt is cut short.*delete it"):
        next(training(tmp_path / "run"))
    file.unlink()
    assert next(training(tmp_path / "run")).step == 1


def test_the_precision_is_chosen_once(
    trainings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = iter(["fp32", "bf16"])
    monkeypatch.setattr("minildm.training.pick_precision", lambda *_: next(chosen))
    training = trainings["autoencoder"]
    for _ in range(2):
        run = training(tmp_path / "run")
        next(run)
        next(run)
        run.close()
    assert list(chosen) == ["bf16"]  # asked once
    card = json.loads((tmp_path / "run/training/run.json").read_text())
    assert card["precision"] == "fp32"
    monkeypatch.undo()
    list(training(tmp_path / "run"))
    list(training(tmp_path / "whole"))
    assert identical(tmp_path / "run", tmp_path / "whole")


def test_bf16_trains_float32_weights(training: Training, tmp_path: Path) -> None:
    half = replace(training.experiment, train=replace(TRAIN, precision="bf16"))
    records = list(training(tmp_path / "half", half))
    list(training(tmp_path / "full"))
    assert json.loads((tmp_path / "half/training/run.json").read_text())["precision"] == "bf16"
    weights = load_file(tmp_path / "half/model.safetensors")
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values())
    full = load_file(tmp_path / "full/model.safetensors")
    assert any(not torch.equal(weights[name], full[name]) for name in full)  # it did something
    assert all(torch.isfinite(torch.tensor(r.terms["loss"])) for r in records)


# --- what each of them leaves ---


def test_the_autoencoder_ends_with_its_averaged_weights_and_their_scale(
    trainings: dict, pictures: Any, tmp_path: Path
) -> None:
    list(trainings["autoencoder"](tmp_path / "run"))
    model = load_model(tmp_path / "run", kind="autoencoder")
    averages = torch.load(tmp_path / "run/training/state.pt", weights_only=True)["ema"]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, averages[name])
    x = torch.stack([pictures[i]["image"] for i in range(12)])
    x = torch.cat([x, x.flip(-1)]).repeat(40, 1, 1, 1)  # 960 pictures, 128 values each
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        assert model.encode(x).std().item() == pytest.approx(1.0, abs=0.01)
    assert not (tmp_path / "run/ema.safetensors").exists()


def test_the_diffusion_model_keeps_its_own_and_its_averaged_weights(
    trainings: dict, tmp_path: Path
) -> None:
    list(trainings["ldm"](tmp_path / "run"))
    state = torch.load(tmp_path / "run/training/state.pt", weights_only=True)
    averaged, own = load_model(tmp_path / "run"), load_model(tmp_path / "run", ema=False)
    assert isinstance(averaged, LatentDiffusion)
    for name, weight in averaged.unet.named_parameters(prefix="unet"):
        assert torch.equal(weight, state["ema"][name])
    for name, weight in own.unet.named_parameters(prefix="unet"):
        assert torch.equal(weight, state["model"][name])
    assert averaged.sample(["red", "blue"], steps=2, seed=0).shape == (2, 3, 16, 16)


def test_the_diffusion_model_names_its_first_stage(trainings: dict, tmp_path: Path) -> None:
    list(trainings["ldm"](tmp_path / "deep" / "run"))
    stage = load_model(tmp_path / "first-stage")
    card = read_card(tmp_path / "deep" / "run")
    assert card["first_stage"] == {"path": "../../first-stage", "sha256": fingerprint(stage)}
    model = load_model(tmp_path / "deep" / "run")
    assert model.autoencoder.scale.item() == 2.0
    assert model.config.conditioner.classes == ("red", "green", "blue")


def test_a_diffusion_model_does_not_change_its_first_stage(trainings: dict, tmp_path: Path) -> None:
    before = {p.name: p.read_bytes() for p in (tmp_path / "first-stage").iterdir()}
    list(trainings["ldm"](tmp_path / "run"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "first-stage").iterdir()} == before


def test_the_diffusion_model_trains_on_normalised_latents_of_both_sides(
    trainings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, loss = [], LatentDiffusion.loss

    def spy(self: LatentDiffusion, batch: dict) -> dict:
        seen.append((batch["moments"], batch["z"]))
        return loss(self, batch)

    monkeypatch.setattr(LatentDiffusion, "loss", spy)
    monkeypatch.setattr("minildm.training.DiagonalGaussian.sample", lambda self: self.mean)
    list(trainings["ldm"](tmp_path / "run"))
    mirrored = 0
    for moments, z in seen:
        for own, latent in zip(moments, z, strict=True):
            sides = own[:, :2] / 2.0  # the first stage's scale
            hits = [torch.allclose(side, latent, atol=1e-6) for side in sides]
            assert any(hits)
            mirrored += hits == [False, True]
    assert 0 < mirrored < 4 * STEPS


def test_the_judge_knows_its_classes(trainings: dict, tmp_path: Path) -> None:
    list(trainings["judge"](tmp_path / "run"))
    judge = load_model(tmp_path / "run", kind="judge")
    assert isinstance(judge, Judge)
    assert judge.config.labels == ("red", "green", "blue")
    assert judge.config.groups == ("warm", "cold")


def test_the_folder_says_how_it_was_trained(training: Training, tmp_path: Path) -> None:
    list(training(tmp_path / "run"))
    info = read_card(tmp_path / "run")["info"]
    assert (info["data"], info["pictures"]) == ("tiny", 12)
    assert info["train"]["steps"] == STEPS


def test_records_count_steps_and_images(training: Training, tmp_path: Path) -> None:
    records = list(training(tmp_path / "run"))
    assert [r.step for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r.images for r in records] == [4, 8, 12, 16, 20, 24]
    assert all(a.seconds < b.seconds for a, b in pairwise(records))
    assert all("loss" in r.terms for r in records)


# --- it learns ---


def test_an_autoencoder_overfits_one_batch(
    trainings: dict, make_pictures: Callable[..., Any], tmp_path: Path
) -> None:
    training = trainings["autoencoder"]
    overfit = with_steps(training.experiment, 100, flip=False, save_every=100, lr=0.02)
    records = list(training(tmp_path / "run", overfit, data=make_pictures(4)))
    assert records[-1].terms["rec_loss"] < 0.25 * records[0].terms["rec_loss"]


def test_a_diffusion_model_overfits_one_batch(
    trainings: dict, make_pictures: Callable[..., Any], tmp_path: Path
) -> None:
    training = trainings["ldm"]
    overfit = with_steps(training.experiment, 40, flip=False, save_every=40, batch_size=16)
    losses = [r.terms["loss"] for r in training(tmp_path / "run", overfit, data=make_pictures(2))]
    assert losses[0] == pytest.approx(1.0, abs=0.15)  # the untrained UNet says 0
    assert sum(losses[-10:]) / 10 < 0.5


# --- starting from a trained model ---


def test_a_training_can_start_from_a_trained_model(training: Training, tmp_path: Path) -> None:
    list(training(tmp_path / "first"))
    further = with_steps(training.experiment, 2, lr=1e-9, warmup_steps=0, ema_decay=0.0)
    list(training(tmp_path / "second", further, init=tmp_path / "first"))
    one, other = load_model(tmp_path / "first"), load_model(tmp_path / "second")
    for (name, weight), later in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(weight, later, atol=1e-6), name


def test_a_first_stage_in_training_is_no_first_stage(trainings: dict, tmp_path: Path) -> None:
    stage1 = trainings["autoencoder"](tmp_path / "ae")
    list(islice(stage1, 2))  # saved, and abandoned
    stage1.close()
    with pytest.raises(ValueError, match=r"first_stage=.*ae' is still in training"):
        next(trainings["ldm"](tmp_path / "ldm", first_stage=tmp_path / "ae"))
    list(trainings["autoencoder"](tmp_path / "ae"))
    list(trainings["ldm"](tmp_path / "ldm", first_stage=tmp_path / "ae"))


def test_a_full_disk_at_the_last_save_loses_no_step(
    trainings: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, real = trainings["ldm"], save_model

    def fails_at_the_end(*arguments: Any, **options: Any) -> None:
        if (tmp_path / "run/log.csv").read_text().count("\n") > STEPS:
            raise OSError(28, "No space left on device")
        real(*arguments, **options)

    monkeypatch.setattr("minildm.training.save_model", fails_at_the_end)
    with pytest.raises(OSError, match="No space left"):
        list(training(tmp_path / "run"))
    monkeypatch.undo()
    list(training(tmp_path / "run"))
    list(training(tmp_path / "whole"))
    assert identical(tmp_path / "run", tmp_path / "whole")


def test_a_start_from_a_model_of_another_shape_is_refused(
    trainings: dict, ae_config: AutoencoderConfig, tmp_path: Path
) -> None:
    training = trainings["autoencoder"]
    save_model(Autoencoder(replace(ae_config, width=16)), tmp_path / "wide")
    with pytest.raises(ValueError, match=r"wide' holds a model of another kind or config"):
        next(training(tmp_path / "run", init=tmp_path / "wide"))


def test_other_pictures_are_another_run(
    training: Training, make_pictures: Callable[..., Any], tmp_path: Path
) -> None:
    next(training(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"holds another run \(inputs\.data: \w+ there"):
        next(training(tmp_path / "run", data=make_pictures(9)))


def test_another_first_stage_is_another_run_and_no_start_for_an_init(
    trainings: dict, ae_config: AutoencoderConfig, tmp_path: Path
) -> None:
    training = trainings["ldm"]
    list(training(tmp_path / "run"))
    save_model(Autoencoder(ae_config), tmp_path / "other")
    with pytest.raises(ValueError, match=r"inputs\.first_stage: \w+ there"):
        next(training(tmp_path / "run", first_stage=tmp_path / "other"))
    with pytest.raises(ValueError, match=r"run' was trained on another first stage"):
        next(training(tmp_path / "new", first_stage=tmp_path / "other", init=tmp_path / "run"))


# --- small things ---


def test_with_steps_changes_the_training_alone(trainings: dict) -> None:
    experiment = trainings["ldm"].experiment
    longer = with_steps(experiment, 99, lr=0.5)
    assert longer.train == replace(TRAIN, steps=99, lr=0.5)
    assert replace(longer, train=TRAIN) == experiment


def test_progress_lets_the_records_pass(
    trainings: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainings["judge"](tmp_path / "run")
    records = list(progress(run, STEPS, "judge"))
    assert [r.step for r in records] == [1, 2, 3, 4, 5, 6]
    assert "judge: 100%" in capsys.readouterr().err
