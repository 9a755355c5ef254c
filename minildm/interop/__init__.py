"""Official and diffusers weights, in and out: each tensor finds its place, or an error names it."""

from minildm.interop.compvis import load_compvis, save_compvis
from minildm.interop.convert import convert
from minildm.interop.diffusers import load_diffusers, save_diffusers

__all__ = ["convert", "load_compvis", "load_diffusers", "save_compvis", "save_diffusers"]
