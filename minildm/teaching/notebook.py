"""The first cell of every notebook, and how notebooks run."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from minildm.conditioning import look_up
from minildm.training.loop import pick_device

SCALES = ("smoke", "cpu", "gpu")
KERNEL = "python3"  # of the environment that this runs in, not one of the user's
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"


def setup(scale: str, seed: int, run_dir: str | os.PathLike[str]) -> tuple[torch.device, Path]:
    """Check a notebook's parameters, seed torch, make the folder: (device, run_dir/SCALE-SEED).

    Raises ValueError for an unknown scale.
    """
    look_up(scale, SCALES, "scale")
    if scale == "smoke":
        print('scale = "smoke" only shows that all cells run: figures will not match the text.')
    torch.manual_seed(seed)
    folder = Path(run_dir) / f"{scale}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    return pick_device(), folder


def run_notebook(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    parameters: Mapping[str, Any],
    **options: Any,
) -> None:
    """Execute a notebook with papermill, from a fresh kernel; the executed copy goes to `out`.

    parameters: values for names in the cell tagged `parameters`; papermill warns of others. The
    kernel works in the caller's folder. A cell that fails raises papermill's
    PapermillExecutionError, and `out` shows where. options: of `papermill.execute_notebook`.
    """
    import papermill  # takes a second: not for notebooks that only want `setup`

    Path(out).parent.mkdir(parents=True, exist_ok=True)
    options |= {"kernel_name": KERNEL, "progress_bar": False}
    options |= {"extra_arguments": ["--log-level=CRITICAL"]}  # what fails is raised here
    papermill.execute_notebook(path, out, parameters, **options)
