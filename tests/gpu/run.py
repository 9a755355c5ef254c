"""Everything that requires a GPU, in at most nine minutes: `make gpu`.

The tests marked `gpu`, the benchmark, and notebooks 08, 10 and 16 at gpu scale. Logs, tables and
executed notebooks go to runs/gpu, or to the folder that is named. What does not fit into the time
is stopped and counts as failed.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 540
NOTEBOOK = "import sys; from minildm.teaching.notebook import run_notebook; "
NOTEBOOK += "run_notebook(*sys.argv[1:3], dict(scale='gpu', run_dir=sys.argv[3]))"


def jobs(out: Path) -> dict[str, list[str]]:
    """The arguments of Python for each job, by its name."""
    found = {
        "tests": ["-m", "pytest", "-q", "-m", "gpu", "tests"],
        "bench": ["tests/bench/bench.py", "first_stage", "unet", "--out", str(out)],
    }
    for number in ("08", "10", "16"):
        [path] = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
        run_dir = str(out / f"run-{number}")
        found[path.stem] = ["-c", NOTEBOOK, str(path), str(out / path.name), run_dir]
    return found


def main(out: Path) -> int:
    """Run all jobs one after the other; 1 if one failed."""
    if not torch.cuda.is_available():
        print("make gpu: there is no GPU here, so nothing was run")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    end, failed = time.monotonic() + SECONDS, []
    for name, arguments in jobs(out).items():
        start, log = time.monotonic(), out / f"{name}.log"
        with log.open("w") as file:
            options = {"cwd": ROOT, "stdout": file, "stderr": subprocess.STDOUT}
            try:
                command = [sys.executable, *arguments]
                status = subprocess.run(command, timeout=max(end - start, 1), **options).returncode
            except subprocess.TimeoutExpired:
                status = "out of time"
        failed += [name] * (status != 0)
        print(f"{name}: {status or 'ok'}, {time.monotonic() - start:.0f} s, {log}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "runs/gpu").resolve()))
