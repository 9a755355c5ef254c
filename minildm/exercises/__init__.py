"""The checks behind the notebooks' exercises, a module a notebook; each returns a `Result`."""

from minildm.exercises.result import Result

__all__ = ["Result"]
