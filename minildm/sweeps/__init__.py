"""Ablations: many runs of one notebook, here or on a cluster; one table, figures, a report.

minildm.run_sweep(minildm.SWEEPS["f"], "runs/f")
"""

from minildm.sweeps.running import SweepResult, collect, run_sweep
from minildm.sweeps.standard import SWEEPS
from minildm.sweeps.sweep import Run, Sweep, read_sweep
from minildm.sweeps.tables import read_table

__all__ = [
    "SWEEPS",
    "Run",
    "Sweep",
    "SweepResult",
    "collect",
    "read_sweep",
    "read_table",
    "run_sweep",
]
