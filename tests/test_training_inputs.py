"""A training may start from a trained model; other inputs are another run."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import (
    STEPS,
    Training,
    identical,
)

from minildm import (
    Autoencoder,
    AutoencoderConfig,
    load_model,
    save_model,
)
from minildm.training import with_steps


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
