"""Scenes with nothing but their objects: what a layout says of a picture, and nothing else."""

import hashlib
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from minildm.data.emoji import STYLES
from minildm.data.scenes import BACKGROUNDS, Layout, ScenesDataset

GREY = 192  # of 255


class ObjectsAlone(ScenesDataset):
    """The scenes of `scenes`, each pixel that no object covers grey; all else is the same.

    Most of what distinguishes two scenes is their sky and ground, of which a layout says little.
    A model of layouts that begins with these pictures learns in minutes what stands where.
    Raises ValueError for other data.
    """

    def __init__(self, scenes: ScenesDataset) -> None:
        if not isinstance(scenes, ScenesDataset):
            raise ValueError(f"objects alone are cut out of scenes, got {type(scenes).__name__}")
        styles = [STYLES[style] for style in scenes._drawn_in]
        super().__init__(scenes.split, scenes.size, n=scenes.n, seed=scenes.seed, styles=styles)
        self.name = f"{scenes.name}-alone"

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the scenes' and with this file."""
        scenes = super().fingerprint  # of this name
        return hashlib.sha256(scenes.encode() + Path(__file__).read_bytes()).hexdigest()

    def _compose(self, i: int) -> tuple[Layout, Tensor, Tensor]:
        layout, pixels, semantic = super()._compose(i)
        empty = semantic < len(BACKGROUNDS)
        return layout, torch.where(empty, torch.tensor(GREY, dtype=torch.uint8), pixels), semantic
