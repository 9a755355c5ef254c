"""The three trainings: killed and resumed, they end bit for bit where the unbroken ones end."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from trainings import (
    STEPS,
    TRAIN,
    Training,
    identical,
    outcome,
)

from minildm import (
    LatentDiffusion,
    load_model,
)
from minildm.checkpoints import fingerprint, read_card
from minildm.judge import Judge
from minildm.training import progress, with_steps

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
    floats = [w for w in weights.values() if w.dtype != torch.int64]  # a codebook counts
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in floats)
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
    mean = "minildm.autoencoder.DiagonalGaussian.sample", lambda self, noise: self.mean
    monkeypatch.setattr(*mean)
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
