"""The optimisation loop of all trainings. A training can be killed at any time and resumed.

All randomness of step n comes from (seed, n), and batch k of the data is a function of (seed, k).
On a CPU a resumed run is bit-equal to an uninterrupted one. Several processes (`accelerate launch`
or torchrun) share each batch, and average gradients and terms.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from minildm.layers import Batch, BatchRandom, seed_of
from minildm.training.checkpoint import Record, RunFolder, read_state, save_model, saved_step
from minildm.training.configs import TrainConfig, to_dict
from minildm.training.ema import EMA

LossFn = Callable[[Batch, int, BatchRandom], dict[str, Tensor]]  # (batch, step, rng) -> terms
Prepare = Callable[[Batch, BatchRandom], Batch]


class NonFiniteLossError(FloatingPointError):
    """The loss or its gradient is NaN or infinite."""


def pick_device(name: str | None = None) -> torch.device:
    """The named device, as "cuda", "cuda:1" or "cpu"; None: CUDA, else Apple's MPS, else the CPU.

    Raises ValueError for a device that does not exist here.
    """
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    known = [*["cuda"] * (gpus > 0), *[f"cuda:{i}" for i in range(gpus)], *["mps"] * mps, "cpu"]
    if name not in (None, "cpu:0", *known):
        raise ValueError(f"device={name!r} does not exist here; known: {', '.join(known)}")
    return torch.device(name or known[0])


def pick_precision(wanted: str, device: torch.device) -> str:
    """Resolve "auto": bf16 where the GPU, or the CPU by AMX or AVX512, has it; else fp32.

    Raises ValueError for fp16 on a CPU.
    """
    if wanted == "fp16" and device.type == "cpu":
        raise ValueError("precision='fp16' requires a GPU; on a CPU use 'bf16', 'fp32' or 'auto'")
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    has = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if has and device.type == "cpu" else "fp32"


def describe(device: torch.device) -> str:
    """The device in words, as "cpu, 2 threads"."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"{device.type}, {torch.get_num_threads()} threads"


def lr_at(config: TrainConfig, step: int) -> float:
    """The learning rate of step 1, 2, ...: linear warm-up times decay."""
    warm = min(1.0, step / max(config.warmup_steps, 1))
    done = (step - 1) / config.steps
    left = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.lr * warm * left[config.decay]


def endless_batches(
    length: int, batch_size: int, seed: int, batches: range, rank: int = 0, world: int = 1
) -> Iterator[list[int]]:
    """Shuffled indices, epoch after epoch: this process's part of each of the batches.

    Batch k is a function of (seed, k).
    """
    part, epoch, order = batch_size // world, -1, []
    for k in batches:
        indices = []
        for i in range(k * batch_size, (k + 1) * batch_size):
            if i // length != epoch:
                epoch = i // length
                generator = torch.Generator().manual_seed(seed_of(seed, epoch))
                order = torch.randperm(length, generator=generator).tolist()
            indices.append(order[i % length])
        yield indices[part * rank : part * (rank + 1)]


class Run(NamedTuple):
    """Where a training runs, and where it is kept."""

    folder: RunFolder
    config: TrainConfig  # with a resolved precision
    accelerator: Any  # accelerate's; its device is where the model is trained


def open_run(
    run_dir: str | Path, experiment: Any, device: str | None, data: Dataset, **inputs: str | None
) -> Run:
    """Open or create a training's folder, and join the other processes.

    inputs: hashes of the first stage and of the initial model. Raises ValueError if the folder
    holds another run, and for a batch size that the number of processes does not divide.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs  # here: it takes long to import
    from accelerate.state import AcceleratorState

    chosen, config = pick_device(device), experiment.train
    config = replace(config, precision=pick_precision(config.precision, chosen))
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    AcceleratorState._reset_state(reset_partial_state=True)  # a notebook trains several models
    accelerator = Accelerator(
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        cpu=chosen.type == "cpu",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],  # to encode the data
    )
    if config.batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size={config.batch_size}, of all processes together, must be a multiple of "
            f"their number, {accelerator.num_processes}"
        )
    resolved = to_dict(replace(experiment, train=config))
    content = {type(experiment).__name__: resolved, "data": data.fingerprint, **inputs}
    return Run(RunFolder(run_dir, content), config, accelerator)


class Training:
    """The state of a training between two steps, and the parts of a step."""

    def __init__(self, modules: dict[str, nn.Module], adversary_lr: float, run: Run) -> None:
        """modules: what is trained, by the term of the loss that it minimises."""
        self.modules, self.run = modules, run
        self.lr_factors = {"loss": 1.0, "disc_loss": adversary_lr}
        self.optimizers = {term: _optimizer(module, run) for term, module in modules.items()}
        self.ema = EMA(modules["loss"], run.config.ema_decay)
        self.records: list[Record] = []
        self.step, self.first = 0, 1  # the last step; the first one since the last Record
        self.sums: dict[str, Tensor] = {}  # of the terms in these steps, on the device

    def gradients(self, batch: Batch, rng: BatchRandom, loss: LossFn) -> None:
        """Add the gradients and terms of one batch."""
        with self.run.accelerator.autocast():
            terms = loss(batch, self.step, rng)
        # The modules share no weight: one backward pass of the sum serves all.
        minimised = [terms[term] for term in self.modules if terms[term].requires_grad]
        self.run.accelerator.backward(sum(minimised) / self.run.config.accumulate)
        for name, term in terms.items():
            if term.ndim == 0:
                self._add(name, term.detach() / self.run.config.accumulate)

    def clip(self) -> None:
        """Average the gradients over the processes, and limit their norms."""
        accelerator = self.run.accelerator
        for graded in filter(None, map(_graded, self.modules.values())):
            if accelerator.num_processes > 1:
                whole = accelerator.reduce(torch.cat([p.grad.flatten() for p in graded]), "mean")
                parts = whole.split([p.numel() for p in graded])
                for p, part in zip(graded, parts, strict=True):
                    p.grad.copy_(part.view_as(p))
            norm = accelerator.clip_grad_norm_(graded, self.run.config.grad_clip)
            if accelerator.scaler is None:  # fp16's scaler skips steps that are not finite
                self._add("grad_norm", norm)

    def _add(self, name: str, value: Tensor) -> None:
        wide = value.float() if value.device.type == "mps" else value.double()
        self.sums[name] = self.sums.get(name, 0.0) + wide

    def read(self) -> dict[str, float]:
        """The mean terms since the last Record; waits for the device. Raises NonFiniteLossError."""
        means = torch.stack(list(self.sums.values())) / (self.step - self.first + 1)
        means = self.run.accelerator.reduce(means, "mean").tolist()
        terms = dict(zip(self.sums, means, strict=True))
        if not all(map(math.isfinite, means)):
            listed = ", ".join(f"{name}={term:.4g}" for name, term in terms.items())
            saved = saved_step(self.run.folder.path)
            kept = f"the checkpoint of step {saved} stays" if saved else "no checkpoint yet"
            raise NonFiniteLossError(
                f"steps {self.first} to {self.step}: not finite ({listed}); {kept}. A lower lr, a "
                "longer warm-up or precision='fp32' usually helps"
            )
        self.sums, self.first = {}, self.step + 1
        return {name: term for name, term in terms.items() if name != "grad_norm"}

    def update(self, lr: float) -> None:
        """Step the optimisers and the average."""
        for term, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = lr * self.lr_factors[term]
            if _graded(self.modules[term]):
                optimizer.step()
            optimizer.zero_grad()
        self.ema.update(self.modules["loss"])

    def parts(self) -> dict[str, Any]:
        """All that has a state_dict."""
        parts: dict[str, Any] = {"ema": self.ema}
        for term, module in self.modules.items():
            parts |= {f"{term} model": module, f"{term} optimizer": self.optimizers[term]}
        scaler = self.run.accelerator.scaler
        return parts | ({"scaler": scaler} if scaler else {})

    def save(self) -> None:
        """Write what a resumed training needs."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        log = [tuple(record) for record in self.records]
        self.run.folder.save({"step": self.step, "log": log, **state}, self.records)

    def resume(self) -> None:
        """Restore what was saved last, if anything was."""
        if state := read_state(self.run.folder.path):
            self.step, self.first = state["step"], state["step"] + 1
            self.records = [Record(*record) for record in state["log"]]
            for name, part in self.parts().items():
                part.load_state_dict(state[name])


def _graded(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that have a gradient."""
    return [p for p in module.parameters() if p.grad is not None]


def _optimizer(module: nn.Module, run: Run) -> torch.optim.Optimizer:
    """Move a module to its device, and make its optimiser."""
    device, config = run.accelerator.device, run.config
    module.to(device).train()
    if config.channels_last and device.type != "mps":
        module.to(memory_format=torch.channels_last)
    adam = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=device.type != "mps",  # one kernel instead of thousands: three times faster on a CPU
    )
    return run.accelerator.prepare_optimizer(adam)


def _batches(
    data: Dataset, run: Run, done: int, prepare: Prepare | None
) -> Iterator[tuple[Batch, BatchRandom]]:
    """This process's part of the batches after step `done`, on the device, with random numbers."""
    config, accelerator, device = run.config, run.accelerator, run.accelerator.device
    share = accelerator.process_index, accelerator.num_processes
    left = range(done * config.accumulate, config.steps * config.accumulate)
    loader = DataLoader(
        data,
        batch_sampler=endless_batches(len(data), config.batch_size, config.seed, left, *share),
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else it draws from the caller's random state
    )
    for k, batch in zip(left, loader, strict=True):
        host, on_device = (torch.Generator(place) for place in ("cpu", device))
        host.manual_seed(seed_of(config.seed, k, 0))
        on_device.manual_seed(seed_of(config.seed, k, 1))
        batch = prepare(batch, BatchRandom(host, *share)) if prepare else batch
        tensors = {key: x for key, x in batch.items() if isinstance(x, Tensor)}
        moved = {key: x.to(device, non_blocking=True) for key, x in tensors.items()}
        yield {**batch, **moved}, BatchRandom(on_device, *share)


def optimise(
    model: nn.Module,
    loss: LossFn,
    data: Dataset,
    run: Run,
    *,
    card: Mapping[str, Any],
    prepare: Prepare | None = None,
    adversary: nn.Module | None = None,
    adversary_lr: float = 1.0,
    save_at: Collection[int] = (),
) -> Iterator[Record]:
    """Train `model` in place on the term "loss", from where `run` stopped.

    adversary: trained on the term "disc_loss" by its own optimiser, at adversary_lr times the
    learning rate. prepare: changes a batch before it moves to the device. card: what `save_model`
    is told. save_at: steps after which the model is saved, besides save_every. At the end the
    model holds its averaged weights. Raises NonFiniteLossError; the last checkpoint stays.
    """
    config, accelerator, modules = run.config, run.accelerator, {"loss": model}
    if adversary is not None:
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            adversary = nn.SyncBatchNorm.convert_sync_batchnorm(adversary)
        modules["disc_loss"] = adversary
    training = Training(modules, adversary_lr, run)
    training.resume()
    if config.compile:
        compile_networks(*modules.values())
    source = _batches(data, run, training.step, prepare)
    clock = time.perf_counter() - (training.records[-1].seconds if training.records else 0.0)
    while training.step < config.steps:
        training.step += 1
        step, lr = training.step, lr_at(config, training.step)
        saves = step % config.save_every == 0 or step == config.steps or step in save_at
        ends, terms = saves or step % config.log_every == 0, {}
        with _settings(seed_of(config.seed, step, accelerator.process_index), run):
            for _ in range(config.accumulate):
                training.gradients(*next(source), loss)
            training.clip()
            if ends:  # before the update, so that no bad gradient reaches a saved weight
                terms = training.read()
            training.update(lr)
        if not ends:
            continue
        images = step * config.batch_size * config.accumulate
        training.records.append(Record(step, images, time.perf_counter() - clock, lr, terms))
        if saves and accelerator.is_main_process:
            # The model first: a resumed training repeats what its state lacks.
            save_model(model, run.folder.path, ema=training.ema.shadow, **card)
            training.save()
        yield training.records[-1]
    accelerator.wait_for_everyone()
    training.ema.copy_to(model)
    model.eval()


def compile_networks(*modules: nn.Module) -> None:
    """Compile, in place, the parts of each module that have weights to train."""
    if len(modules) > 1:  # the adaptive weight walks a graph twice: it must keep its buffers
        torch._functorch.config.donated_buffer = False
    for module in modules:
        children = [m for m in module.children() if any(p.requires_grad for p in m.parameters())]
        for network in children or [module]:
            network.compile()


@contextmanager
def _settings(seed: int, run: Run) -> Iterator[None]:
    """For one step: the seed of torch's global generators (dropout), TF32; restored afterwards."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    cuda = run.accelerator.device.type == "cuda"
    with torch.random.fork_rng([torch.cuda.current_device()] if cuda else []):
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("high" if run.config.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = run.config.tf32  # of convolutions
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]
