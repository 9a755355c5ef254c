"""Weights of other projects, in and out: every tensor finds its place, or an error lists it."""

from minildm.interop.compvis import load_compvis
from minildm.interop.compvis_saving import save_compvis
from minildm.interop.conversion import convert
from minildm.interop.diffusers_folders import load_diffusers, save_diffusers

__all__ = ["convert", "load_compvis", "load_diffusers", "save_compvis", "save_diffusers"]
