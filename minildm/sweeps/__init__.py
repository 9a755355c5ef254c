"""Ablations: many runs of one notebook, one table with intervals, one report."""

from minildm.sweeps.execution import run_sweep
from minildm.sweeps.report import read_table
from minildm.sweeps.sweep import Run, Sweep, read_sweep, standard_sweeps

__all__ = ["Run", "Sweep", "read_sweep", "read_table", "run_sweep", "standard_sweeps"]
