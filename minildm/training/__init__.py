"""Training: configs and presets, the loop, checkpoints, the stages."""
