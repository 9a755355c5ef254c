"""Diffusion in latent space, LDM Sec. 3.2: schedule, objective, UNet, samplers, guidance."""
