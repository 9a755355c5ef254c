"""Fixtures of the trainings' tests."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from training.trainings import EXPERIMENTS, Training, make_stage

from minildm.training import loop


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first stage's folder."""
    return make_stage(tmp_path_factory.mktemp("first-stage") / "ae")


@pytest.fixture
def trainings(stage: Path) -> dict[str, Training]:
    """All kinds of trainings."""
    return {name: Training(experiment, stage) for name, experiment in EXPERIMENTS.items()}


@pytest.fixture(params=EXPERIMENTS)
def training(request: pytest.FixtureRequest, trainings: dict[str, Training]) -> Training:
    """Each kind of training in turn."""
    return trainings[request.param]


@pytest.fixture
def no_model_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """`optimise` saves no model; the numbers of updates at which it would."""
    saved: list[int] = []

    def save(model: Any, folder: Path, **options: Any) -> None:
        saved.append(0)

    monkeypatch.setattr(loop, "save_model", save)
    yield saved
