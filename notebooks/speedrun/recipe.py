"""Baseline: emoji-uncond, batches of 32, constant learning rate, 12 steps of DPM-Solver++"""

import tempfile
import time

import torch

import minildm


def make(n: int, seed: int, training: float = 330.0) -> torch.Tensor:
    """Train for so many processor seconds, then sample (n, 3, 64, 64) in [-1, 1]."""
    began, preset = time.process_time(), minildm.PRESETS["emoji-uncond"]
    how = {"batch_size": 32, "lr": 2e-3, "decay": "constant", "ema_decay": 0.99, "save_every": 20}
    changes = {f"train.{k}": v for k, v in how.items()} | {"train.seed": seed}
    experiment = minildm.override(preset, changes)
    source = minildm.data_dir() / "weights/mixed-kl-f4"  # a trained first stage is allowed
    with tempfile.TemporaryDirectory() as folder:
        for _ in minildm.train_ldm(experiment, first_stage=source, run_dir=folder):
            if time.process_time() - began > training:
                break
        model = minildm.load_model(folder)
    return model.sample(n=n, seed=seed, sampler="dpm_solver_pp", steps=12, precision="bf16")
