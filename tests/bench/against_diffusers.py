"""The first stage and the UNet against diffusers' models of the same size and weights.

Two rivals run in turn, A B A B ..., so that a drift of the machine's speed hits both.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minildm import Autoencoder, AutoencoderConfig, NoiseSchedule, UNet, UNetConfig, ddim
from minildm.compression.loss import autoencoder_loss
from minildm.interop import save_diffusers

Run = Callable[[], Any]
Rows = list[dict[str, Any]]
Runs = Iterator[tuple[str, Run, Run]]  # (what, ours, theirs)

KL = AutoencoderConfig(channels=64, channel_mult=(1, 2, 4))
SELF = UNetConfig(channels=64, channel_mult=(1, 2, 4), attn_levels=(1, 2))
CROSS = replace(SELF, heads=8, d_head=None, d_cond=64)
VQ = replace(KL, regularizer="vq", codebook_size=8192, vq_legacy=True)
MODELS: dict[str, dict[str, Any]] = {
    "first_stage": {"KL": KL, "VQ": VQ},
    "unet": {"cross-attention": CROSS, "self-attention": SELF},
}
LAYOUTS = {"as built": torch.contiguous_format, "channels_last": torch.channels_last}
KL_WEIGHT, TOKENS = 1e-6, 16


def seconds(run: Run, device: torch.device) -> float:
    """Time one run until the device has finished."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def timed(case: dict, run: Run, baseline: Run, pairs: int, device: torch.device) -> dict:
    """The case with median times, and median and quartiles of the ratio run / baseline, printed.

    One more pair comes first and is not counted: it loads kernels.
    """
    times = [(seconds(run, device), seconds(baseline, device)) for _ in range(pairs + 1)][1:]
    low, ratio, high = np.quantile([a / b for a, b in times], (0.25, 0.5, 0.75))
    own, other = (statistics.median(column) for column in zip(*times, strict=True))
    found = {"seconds": own, "baseline_seconds": other}
    found |= {"ratio": ratio, "ratio_low": low, "ratio_high": high}
    print(*case.values(), f"{own:.4g} s, ratio {ratio:.2f}", sep=", ", flush=True)
    return case | {name: float(f"{value:.4g}") for name, value in found.items()}


def training_step(net: nn.Module, loss: Run, *, bf16: bool = False) -> Run:
    """A step of AdamW on loss(); bf16: by autocast, the weights stay float32."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6)
    device = next(net.parameters()).device.type

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def rivals(config: AutoencoderConfig | UNetConfig) -> tuple[nn.Module, nn.Module]:
    """Our model and diffusers', with the same random weights, none of them zero."""
    ours = UNet(config) if isinstance(config, UNetConfig) else Autoencoder(config)
    for parameter in ours.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        save_diffusers(ours, folder)
        kind = json.loads((folder / "config.json").read_text())["_class_name"]
        theirs = getattr(diffusers, kind).from_pretrained(folder, low_cpu_mem_usage=False)
    return ours.train(), theirs.train()


def first_stage_runs(ours: nn.Module, theirs: nn.Module, x: Tensor, step: Any) -> Runs:
    """Encode, decode and a training step of images x (B, 3, H, W)."""
    z, vq = ours.encode(x, sample=False).detach(), ours.config.regularizer == "vq"

    def their_loss() -> Tensor:
        if vq:
            decoded = theirs.decode(theirs.encode(x).latents)
            return (x - decoded.sample).abs().mean() + decoded.commit_loss.mean()
        posterior = theirs.encode(x).latent_dist
        error = (x - theirs.decode(posterior.sample()).sample).abs().mean()
        return error + KL_WEIGHT * posterior.kl().mean() / x[0].numel()

    own = step(ours, lambda: autoencoder_loss(ours, x, kl_weight=KL_WEIGHT)["loss"])
    yield "training step", own, step(theirs, their_loss)
    encode = (lambda e: e.latents) if vq else (lambda e: e.latent_dist.mode())
    yield "encode", lambda: ours.encode(x, sample=False), lambda: encode(theirs.encode(x))
    yield "decode", lambda: ours.decode(z), lambda: theirs.decode(z).sample


def unet_runs(ours: nn.Module, theirs: nn.Module, z_t: Tensor, step: Any, steps: int) -> Runs:
    """Forward, a training step and DDIM of latents z_t (B, c, h, w)."""
    t, eps = torch.randint(1000, z_t.shape[:1], device=z_t.device), torch.randn_like(z_t)
    d_cond, schedule = ours.config.d_cond, NoiseSchedule.scaled_linear().to(z_t.device)
    tokens = (torch.randn(len(z_t), TOKENS, d_cond, device=z_t.device),) if d_cond else ()
    few, z_T = tuple(x[:2] for x in tokens), z_t[:2]  # two samples
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
    ends = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}
    scheduler = diffusers.DDIMScheduler(**betas, **ends)

    def their_ddim() -> Tensor:
        scheduler.set_timesteps(steps)
        z = z_T
        for at in scheduler.timesteps:
            z = scheduler.step(theirs(z, at.to(z.device), *few).sample, at, z).prev_sample
        return z

    forward = (lambda: ours(z_t, t, *tokens)), (lambda: theirs(z_t, t, *tokens).sample)
    a, b = (lambda run=run: F.mse_loss(run().float(), eps) for run in forward)
    yield "training step", step(ours, a), step(theirs, b)
    yield "forward", *forward
    call = partial(ddim, lambda z, at: ours(z, at, *few), schedule, z_T, steps)
    yield f"{steps} steps of DDIM", lambda: [*call()][-1].z, their_ddim


def contests(
    config: Any, layout: str, bf16: bool, device: torch.device, quick: bool = False
) -> Runs:
    """(what, our run, theirs) of one model, one memory layout and one precision."""
    ours, theirs = (net.to(device, memory_format=LAYOUTS[layout]) for net in rivals(config))
    n, side = (3, 16) if quick else (16, 256) if device.type == "cuda" else (4, 64)
    is_unet = isinstance(config, UNetConfig)
    shape = (2 * n, 4, side // 4, side // 4) if is_unet else (n, 3, side, side)
    x = torch.randn(shape, device=device).clamp(-1, 1).contiguous(memory_format=LAYOUTS[layout])
    step = partial(training_step, bf16=bf16)
    runs_of = partial(unet_runs, steps=2 if quick else 20) if is_unet else first_stage_runs
    for what, *runs in runs_of(ours, theirs, x, step):
        if what != "training step":
            half = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
            runs = [half(torch.no_grad()(run)) for run in runs]
        yield what, *runs


def compare(part: str, device: torch.device, pairs: int, quick: bool) -> dict[str, Rows]:
    """Time all rows of "first_stage" or "unet". quick: small models, one layout."""
    rows, small = [], {"channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1}
    small |= {"attn_levels": (1,)} if part == "unet" else {}
    cases = product(MODELS[part].items(), ("float32", "bfloat16"), list(LAYOUTS)[int(quick) :])
    for (model, config), precision, layout in cases:
        config = replace(config, **small) if quick else config
        for what, *runs in contests(config, layout, precision != "float32", device, quick):
            case = {"model": model, "precision": precision, "layout": layout, "what": what}
            rows.append(timed(case, *runs, pairs, device))
    return {f"bench_{part}": rows}
