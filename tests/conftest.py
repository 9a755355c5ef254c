"""All tests share a fresh cache, and have the smoke scale and a seeded torch."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A fresh cache for all workers, none of the user's; notebooks run at the smallest scale."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILDM_CACHE", str(folder / "cache"))
        patch.setenv("MINILDM_SCALE", os.environ.get("MINILDM_SCALE", "smoke"))
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What a test draws depends on no test before it."""
    torch.manual_seed(0)
