"""The commands of data/results, to be called by tests."""

import importlib.util
from pathlib import Path
from types import ModuleType

RESULTS = Path(__file__).parent.parent / "data/results"


def command_of(name: str) -> ModuleType:
    """data/results/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, RESULTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
