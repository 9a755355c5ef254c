"""Forward, a training step and 50 steps of DDIM of the UNet against diffusers' of the same size.

Both have the same weights, inputs, precision and memory format. Training: squared error of eps,
AdamW. bfloat16 is autocast's: the weights stay float32. Besides, our bfloat16 against their
float32: what a reader gains who comes from diffusers' defaults.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from first_stage import SETTINGS, Run, Setting, line, rounded, stepper, verdict
from timing import interleaved, machine
from torch import Tensor, nn

from minildm import NoiseSchedule, UNet, UNetConfig, ddim

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tests/, for the next line

from diffusers_copy import conditional, copy_unet, error, same_parameters, unconditional

SELF = UNetConfig(width=64, width_mult=(1, 2, 4), attn_levels=(1, 2))
CROSS = replace(SELF, heads=8, d_head=None, d_cond=64)
CONFIGS = {"cross-attention": CROSS, "self-attention": SELF}
TOKENS = 16  # of the condition
SAMPLES = 2  # that DDIM draws at once

Eps = Callable[[Tensor, Tensor], Tensor]  # (z_t, t) -> eps_hat


@dataclass(frozen=True)
class Contest:
    """Who computes in bfloat16, and how large the ratio, our time to theirs, may be."""

    name: str
    ours_half: bool
    theirs_half: bool
    target: float | None
    compiled: bool = False  # ours; theirs runs eagerly


CONTESTS = {
    "cpu": (
        Contest("float32", False, False, 1.05),
        Contest("bfloat16", True, True, 0.9),
        Contest("bfloat16, theirs float32", True, False, 0.9),
    ),
    "cuda": (
        Contest("float32", False, False, None),
        Contest("bfloat16", True, True, None),
        Contest("bfloat16 compiled, theirs eager", True, True, 0.67, compiled=True),
    ),
}


@dataclass(frozen=True)
class Inputs:
    """What both get: z_t, t, the noise to predict, and the tokens of a condition, if any."""

    z_t: Tensor
    t: Tensor
    eps: Tensor
    tokens: tuple[Tensor, ...]

    @classmethod
    def random(cls, config: UNetConfig, batch: tuple[int, ...], device: torch.device) -> "Inputs":
        """Pure noise at random times; batch: (B, c, h, w)."""
        z_t, eps = torch.randn(2, *batch, device=device)
        t = torch.randint(1000, batch[:1], device=device)
        width = config.d_cond
        tokens = (torch.randn(batch[0], TOKENS, width, device=device),) if width else ()
        return cls(z_t, t, eps, tokens)

    def like(self, memory_format: torch.memory_format) -> "Inputs":
        """The same, laid out in memory so."""
        return replace(self, z_t=self.z_t.contiguous(memory_format=memory_format))


def autocast(device: torch.device, half: bool) -> AbstractContextManager[Any]:
    """bfloat16 within the block, or nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=half)


def awake(net: UNet) -> UNet:
    """With small random numbers for the zeros that it starts from, which would hide errors."""
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return net


@torch.no_grad()
def rivals(config: UNetConfig) -> tuple[UNet, nn.Module]:
    """Our UNet and theirs, with the same weights and the same answer."""
    ours = awake(UNet(config))
    theirs = (conditional if config.d_cond else unconditional)(config)
    copy_unet(ours, theirs)
    given = Inputs.random(config, (2, config.in_channels, 16, 16), torch.device("cpu"))
    answers = [net(given.z_t, given.t, *given.tokens) for net in (ours, theirs)]
    assert error(answers[0], answers[1].sample) < 1e-5
    assert same_parameters(ours, theirs)
    return ours.train(), theirs.train()


@torch.no_grad()
def our_ddim(eps_theta: Eps, z_T: Tensor, steps: int) -> Tensor:
    """z_0."""
    *_, last = ddim(eps_theta, NoiseSchedule.scaled_linear(), z_T, steps)
    return last.z


@torch.no_grad()
def their_ddim(eps_theta: Eps, z_T: Tensor, steps: int) -> Tensor:
    """The same by diffusers' scheduler, set as the official code's; `steps` divides 1000."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=False,
    )
    scheduler.set_timesteps(steps)
    z = z_T
    for t in scheduler.timesteps:
        z = scheduler.step(eps_theta(z, t.to(z.device)), t, z).prev_sample
    return z


def runs(
    net: nn.Module, call: Eps, sample: Callable[..., Tensor], given: Inputs, half: bool, steps: int
) -> Iterator[tuple[str, Run]]:
    """(what, a run of it) for one rival: `call` asks its `net` for eps_hat."""
    device = given.z_t.device

    @torch.no_grad()
    def forward() -> Tensor:
        with autocast(device, half):
            return call(given.z_t, given.t)

    def draw() -> Tensor:
        with autocast(device, half):
            return sample(call, given.z_t, steps)

    def loss() -> Tensor:
        return F.mse_loss(call(given.z_t, given.t).float(), given.eps)

    yield "forward", forward
    yield "training step", stepper(net, loss, half)
    yield f"{steps} steps of DDIM", draw


def contests(
    ours: UNet, theirs: nn.Module, setting: Setting, contest: Contest, given: Inputs, steps: int
) -> Iterator[tuple[str, Run, Run]]:
    """(what, our run, theirs). DDIM draws the first SAMPLES of the batch."""
    mine, other = (
        torch.channels_last if last else torch.contiguous_format
        for last in (setting.ours_last, setting.theirs_last)
    )
    ours.to(given.z_t.device, memory_format=mine)
    theirs.to(given.z_t.device, memory_format=other)
    few = Inputs(*(value[:SAMPLES] for value in (given.z_t, given.t, given.eps)), ())
    few = replace(few, tokens=tuple(value[:SAMPLES] for value in given.tokens))
    network = torch.compile(ours) if contest.compiled else ours

    def pair(inputs: Inputs) -> Iterator[tuple[tuple[str, Run], tuple[str, Run]]]:
        def our_eps(z: Tensor, t: Tensor) -> Tensor:
            return network(z, t, *inputs.tokens)

        def their_eps(z: Tensor, t: Tensor) -> Tensor:
            return theirs(z, t, *inputs.tokens).sample

        return zip(
            runs(ours, our_eps, our_ddim, inputs.like(mine), contest.ours_half, steps),
            runs(theirs, their_eps, their_ddim, inputs.like(other), contest.theirs_half, steps),
            strict=True,
        )

    for (what, a), (_, b) in [*list(pair(given))[:2], list(pair(few))[2]]:
        yield what, a, b


def compare(
    device: torch.device,
    *,
    repeats: int = 11,
    configs: dict[str, UNetConfig] = CONFIGS,
    settings: tuple[Setting, ...] = SETTINGS,
    batch: tuple[int, ...] | None = None,
    steps: int = 50,
) -> dict[str, Any]:
    """Time all rows and print them; the table, for JSON. CUDA: latents of the paper's size."""
    import diffusers

    batch = batch or ((16, 4, 64, 64) if device.type == "cuda" else (8, 4, 16, 16))
    pairs = {"forward": repeats, "training step": -(-repeats // 2)}  # the rest takes longer
    offered = CONTESTS.get(device.type, CONTESTS["cuda"][:2])
    print(f"\nUNet against diffusers {diffusers.__version__}, latents {batch}, {TOKENS} tokens")
    print(f"medians of {repeats} pairs of runs in turn, half as many for training, 3 for DDIM")
    rows = []
    for name, config in configs.items():
        ours, theirs = rivals(config)
        given = Inputs.random(config, batch, device)
        for setting in settings:
            for contest in offered:
                for what, a, b in contests(ours, theirs, setting, contest, given, steps):
                    n = pairs.get(what, min(repeats, 3))
                    row = {"model": name, "setting": setting.name, "contest": contest.name}
                    row |= {"what": what, "pairs": n, "counted": setting.counted}
                    rows.append(row | rounded(interleaved(a, b, n, device)))
                    shown = rows[-1] | {"model": f"{name:15} {contest.name:24}"}
                    print(line(shown, contest.target), flush=True)
    summary = medians(rows, offered)
    return {
        "command": "python tests/bench/bench.py unet --out data/results",
        "machine": machine(device) | {"diffusers": diffusers.__version__},
        "latents": list(batch),
        "samples of DDIM": SAMPLES,
        "tokens": TOKENS,
        "parameters": {
            name: sum(p.numel() for p in UNet(config).parameters())
            for name, config in configs.items()
        },
        "settings": [asdict(setting) for setting in settings],
        "repeats": repeats,
        "contests": summary,
        "rows": rows,
    }


def medians(rows: list[dict[str, Any]], offered: tuple[Contest, ...]) -> list[dict[str, Any]]:
    """Each contest with its median ratio over the rows of like with like, printed."""
    found = []
    for contest in offered:
        mine = [row for row in rows if row["contest"] == contest.name and row["counted"]]
        ratio = statistics.median(row["ratio"] for row in mine)
        found.append(asdict(contest) | {"ratio": ratio})
        print(f"{contest.name}: median ratio {ratio:.2f}, {verdict(ratio, contest.target)}")
    return found
