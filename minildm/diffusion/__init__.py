"""Diffusion in latent space, LDM Sec. 3.2: schedule, objective, UNet, samplers, guidance."""

from minildm.diffusion.objective import EpsTheta
from minildm.diffusion.samplers import Denoise, EditFn, Spacing, Step
from minildm.diffusion.schedule import NoiseSchedule, Prediction

__all__ = ["Denoise", "EditFn", "EpsTheta", "NoiseSchedule", "Prediction", "Spacing", "Step"]
