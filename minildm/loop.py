"""The optimisation loop that all trainings share; it can be killed and resumed exactly.

Step n draws all its randomness (times, noise, flips, dropped conditions) from a seed made of
(seed, n), and the order of the data is a function of (seed, epoch). So a resumed run needs
weights, EMA, optimiser and n, and ends bit-for-bit where the unbroken one ends.

Several processes (`accelerate launch`) share each batch: each takes an equal part, with the draws
that those samples would get in a lone process, and gradients and terms are averaged. So a run is
the same whatever their number, but for the order of sums, and may go on with another number.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data import Sampler as IndexSampler

from minildm import draws, processes
from minildm.ema import EMA
from minildm.experiments import TrainConfig
from minildm.runs import RunFolder
from minildm.types import Batch, Record

LossFn = Callable[[Batch, int], dict[str, Tensor]]  # (batch, step) -> terms, "loss" among them


class Player(NamedTuple):
    """What one optimiser trains, and on which of the terms."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: list[nn.Parameter]
    term: str  # "loss", or "disc_loss"
    lr_factor: float  # of the training's learning rate


STATE_NAMES = (("model", "optimizer"), ("adversary", "adversary_optimizer"))  # in state.pt


class NonFiniteLossError(FloatingPointError):
    """The loss is NaN or infinite; the message has the step, the terms and the checkpoint."""


def pick_device(name: str | None = None) -> torch.device:
    """The named device, else the best there is: CUDA, Apple's MPS, the CPU.

    `accelerate launch --cpu` asks for the CPU, too.

    Raises ValueError for one that is not here.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    known = [kind for kind, there in here.items() if there] + ["cpu"]
    if name is not None and name not in known:
        raise ValueError(f"device={name!r} is not here; there is {', '.join(known)}")
    return torch.device(name or ("cpu" if processes.asked_for_cpu() else known[0]))


def pick_precision(wanted: str, device: torch.device) -> str:
    """Resolve "auto": bf16 on a GPU that has it, and on a CPU where a convolution gains by it.

    Raises ValueError for fp16 on a CPU, where accelerate would compute in float32 without a word.
    """
    if wanted == "fp16" and device.type == "cpu":
        raise ValueError("precision='fp16' needs a GPU; on a CPU take 'bf16', 'fp32' or 'auto'")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device.type != "cpu":
        return "fp32"
    seconds = {dtype: _conv_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return "bf16" if seconds[torch.bfloat16] < 0.7 * seconds[torch.float32] else "fp32"


def _conv_seconds(dtype: torch.dtype) -> float:
    x, weight = torch.ones(16, 64, 16, 16, dtype=dtype), torch.ones(64, 64, 3, 3, dtype=dtype)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        nn.functional.conv2d(x, weight, padding=1)
        best = min(best, time.perf_counter() - start)
    return best


def lr_at(config: TrainConfig, step: int) -> float:
    """The learning rate of step 1, 2, ...: linear warm-up, times the decay."""
    warm = min(1.0, step / max(config.warmup_steps, 1))
    done = (step - 1) / config.steps
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.lr * warm * left[config.decay]


def seed_of(seed: int, *parts: int) -> int:
    """One well-mixed 63-bit seed from several integers."""
    mask, mixed = 0xFFFFFFFFFFFFFFFF, seed
    for part in parts:  # splitmix64's finaliser, folded over the parts
        mixed = (mixed + 0x9E3779B97F4A7C15 * (part + 1)) & mask
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
        mixed ^= mixed >> 31
    return mixed >> 1


class EndlessBatches(IndexSampler[list[int]]):
    """Shuffled indices, epoch after epoch, in batches: batch k is a function of (seed, k).

    Of each batch the part of this process.
    """

    def __init__(self, length: int, batch_size: int, seed: int, first: int, last: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.first, self.last = first, last
        part = own_batch_size(batch_size)
        self.own = slice(part * processes.rank(), part * (processes.rank() + 1))

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        return torch.randperm(self.length, generator=generator).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, []
        for k in range(self.first, self.last):
            batch = []
            for position in range(k * self.batch_size, (k + 1) * self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = self._order(epoch)
                batch.append(order[position % self.length])
            yield batch[self.own]

    def __len__(self) -> int:
        return self.last - self.first


def own_batch_size(batch_size: int) -> int:
    """How many pictures of a batch are this process's; ValueError where not all get as many."""
    if batch_size % processes.world():
        raise ValueError(
            f"batch_size={batch_size} is that of all processes together: it must be a multiple of "
            f"their number, {processes.world()}"
        )
    return batch_size // processes.world()


def batches(data: Dataset, config: TrainConfig, first_step: int) -> Iterator[Batch]:
    """The micro-batches of steps first_step + 1 .. config.steps, in order; this process's part."""
    if len(data) == 0:
        raise ValueError("data holds no picture")
    first, last = first_step * config.accumulate, config.steps * config.accumulate
    order = EndlessBatches(len(data), config.batch_size, config.seed, first, last)
    # A generator of its own: the loader would otherwise draw from the caller's random state.
    own = torch.Generator().manual_seed(seed_of(config.seed, 0))
    return iter(DataLoader(data, batch_sampler=order, num_workers=config.workers, generator=own))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors there; lists stay as they are."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def optimise(
    model: nn.Module,
    loss_fn: LossFn,
    data: Dataset,
    config: TrainConfig,
    run: RunFolder,
    *,
    device: torch.device,
    precision: str,
    save: Callable[[EMA], None],
    adversary: nn.Module | None = None,
    adversary_lr: float = 1.0,
    save_at: Collection[int] = (),
) -> Iterator[Record]:
    """Train `model` in place on `loss_fn(batch, step)["loss"]`, from where `run` stopped.

    adversary: trained beside it on the term "disc_loss" by an optimiser of its own, at
    adversary_lr times the learning rate; the two terms must not reach each other's weights.
    At the end the model holds its EMA weights. `save` writes the model's folder, every save_every
    steps, at those of save_at, at the end. Raises NonFiniteLossError; the last checkpoint stays.

    Of several processes each must call this alike, with a loss that is a mean over the pictures of
    its batch and draws by `draws`; config.batch_size is the whole batch. Only the main one writes.
    """
    processes.join(device)
    players = [_player(model, "loss", config, 1.0, device)]
    if adversary is not None:
        players.append(_player(adversary, "disc_loss", config, adversary_lr, device))
    ema = EMA(model, config.ema_decay)
    accelerator = _accelerator(precision, device)
    step, images, seconds = _restore(run, players, ema, accelerator)
    modules = nn.ModuleList(player.module for player in players)
    # evaluation_mode: no wrapper that averages gradients; _one_step does, once.
    forward = accelerator.prepare_model(_LossModule(modules, loss_fn), evaluation_mode=True)
    players = [p._replace(optimizer=accelerator.prepare_optimizer(p.optimizer)) for p in players]

    source = batches(data, config, step)
    if config.compile:
        compile_networks((p.module for p in players), twice=adversary is not None)
    clock = time.perf_counter() - seconds
    while step < config.steps:
        step += 1
        lr = _set_lr(players, lr_at(config, step))
        try:
            with float32_products(config.tf32):
                terms = _one_step(forward, source, players, accelerator, config, step)
        except ValueError as error:  # a picture with NaN, say
            raise ValueError(f"step {step}: {error}; {run.last_good()}") from error
        _check_finite(terms, step, run)
        ema.update(model)
        images += config.batch_size * config.accumulate
        record = Record(step, images, time.perf_counter() - clock, lr, terms)
        if processes.is_main():
            run.log(record)
        if step % config.save_every == 0 or step == config.steps or step in save_at:
            keep = (save, run, record, players, ema, accelerator)
            processes.from_main(lambda keep=keep: _save(*keep))
        yield record
    ema.copy_to(model)
    model.eval()


def _set_lr(players: list[Player], lr: float) -> float:
    for player in players:
        for group in player.optimizer.param_groups:
            group["lr"] = lr * player.lr_factor
    return lr


def compile_networks(modules: Iterable[nn.Module], *, twice: bool = False) -> None:
    """torch.compile, in place, the networks of each module; names of weights stay.

    Those are its children that hold weights to train (the UNet, tau_theta; encoder, decoder):
    what surrounds them draws noise and looks into batches, which a compiler gains nothing from.
    twice: a graph is walked back through more than once, as for the adaptive weight.
    """
    if twice:  # else a compiled graph gives its buffers away on the first walk, and fails
        torch._functorch.config.donated_buffer = False
    for module in modules:
        children = [m for m in module.children() if any(p.requires_grad for p in m.parameters())]
        for network in children or [module]:
            network.compile()


@contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Within the block a GPU multiplies and convolves float32 with TF32, or exactly; as before
    after it."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32  # convolutions have a switch of their own, on at first
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _player(
    module: nn.Module, term: str, config: TrainConfig, lr_factor: float, device: torch.device
) -> Player:
    module.to(device).train()
    if config.channels_last and device.type != "mps":
        module.to(memory_format=torch.channels_last)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=device.type != "mps",  # one kernel in place of thousands: three times faster on a CPU
    )
    return Player(module, optimizer, parameters, term, lr_factor)


def _restore(
    run: RunFolder, players: list[Player], ema: EMA, accelerator: Accelerator
) -> tuple[int, int, float]:
    state = run.load_state()
    processes.from_main(lambda: run.rewind_log(0 if state is None else state["step"]))
    if state is None:
        return 0, 0, 0.0
    for player, (module, optimizer) in zip(players, STATE_NAMES, strict=False):
        player.module.load_state_dict(state[module])
        player.optimizer.load_state_dict(state[optimizer])
    ema.load_state_dict(state["ema"])
    if accelerator.scaler is not None and "scaler" in state:
        accelerator.scaler.load_state_dict(state["scaler"])
    return state["step"], state["images"], state["seconds"]


def _save(
    save: Callable[[EMA], None],
    run: RunFolder,
    record: Record,
    players: list[Player],
    ema: EMA,
    accelerator: Accelerator,
) -> None:
    save(ema)  # before the state: a resume repeats what the state does not know
    state = {
        "step": record.step,
        "images": record.images,
        "seconds": record.seconds,
        "ema": ema.state_dict(),
    }
    for player, (module, optimizer) in zip(players, STATE_NAMES, strict=False):
        state[module] = player.module.state_dict()
        state[optimizer] = player.optimizer.state_dict()
    if accelerator.scaler is not None:  # fp16 alone
        state["scaler"] = accelerator.scaler.state_dict()
    run.save_state(state)


class _LossModule(nn.Module):
    """accelerate wraps a module's forward; ours returns the terms of the loss."""

    def __init__(self, modules: nn.ModuleList, loss_fn: LossFn) -> None:
        super().__init__()
        self.players, self.loss_fn = modules, loss_fn

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        return self.loss_fn(batch, step)


def _accelerator(precision: str, device: torch.device) -> Accelerator:
    mixed = "no" if precision == "fp32" else precision
    return Accelerator(mixed_precision=mixed, cpu=device.type == "cpu")


def _one_step(
    forward: nn.Module,
    source: Iterator[Batch],
    players: list[Player],
    accelerator: Accelerator,
    config: TrainConfig,
    step: int,
) -> dict[str, float]:
    """One step of each optimiser on the mean gradient of `accumulate` micro-batches."""
    sums: dict[str, float] = {}
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    for micro in range(config.accumulate):
        batch = to_device(next(source), accelerator.device)
        with torch.random.fork_rng(devices):  # the caller's random state is not ours to change
            torch.manual_seed(seed_of(config.seed, step, micro))
            with draws.share(processes.rank(), processes.world()):
                terms = forward(batch, step)
        # The players' graphs share no weight: one backward pass of the sum serves them all.
        minimised = [terms[p.term] for p in players if terms[p.term].requires_grad]
        accelerator.backward(sum(minimised) / config.accumulate)
        for name, term in terms.items():
            if term.ndim == 0:
                sums[name] = sums.get(name, 0.0) + term.item() / config.accumulate
    processes.average_gradients([p for player in players for p in player.parameters])
    sums = processes.average_numbers(sums, accelerator.device)  # what one finds not finite, all do
    for player in players:
        norm = accelerator.clip_grad_norm_(player.parameters, config.grad_clip)
        if accelerator.scaler is None and not math.isfinite(norm):  # fp16's scaler skips those
            sums["grad_norm"] = float(norm)
    finite = all(math.isfinite(term) for term in sums.values())
    for player in players:
        if finite and any(p.grad is not None for p in player.parameters):
            player.optimizer.step()
        player.optimizer.zero_grad()
    return sums


def _check_finite(terms: dict[str, float], step: int, run: RunFolder) -> None:
    if all(math.isfinite(term) for term in terms.values()):
        return
    listed = ", ".join(f"{name}={term:.4g}" for name, term in terms.items())
    raise NonFiniteLossError(
        f"step {step}: a term of the loss is not finite ({listed}); {run.last_good()}. "
        "A lower lr, a longer warm-up or precision='fp32' usually helps"
    )
