"""Weights of other projects, in and out: every tensor finds its place, or an error lists it."""

from minildm.interop.compvis import load_compvis

__all__ = ["load_compvis"]
