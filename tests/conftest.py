"""Every test has a cache of its own, the smoke scale, and a seeded torch."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from or left in the user's cache; notebooks run at the smallest scale."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILDM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MINILDM_SCALE", os.environ.get("MINILDM_SCALE", "smoke"))
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws depends on no test before it."""
    torch.manual_seed(0)
