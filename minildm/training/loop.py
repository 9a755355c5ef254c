"""The optimisation loop of all trainings. A training can be killed at any time and resumed.

All randomness of step n comes from (seed, n), and batch k of the data is a function of (seed, k).
On a CPU a resumed run is bit-equal to an uninterrupted one. Several processes (`accelerate launch`
or torchrun) share each batch, and average gradients and terms.
"""

import functools
import io
import json
import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from minildm.data.dataset import ImageDataset
from minildm.files import atomic_write, write_json
from minildm.layers import Batch, BatchRandom, at_least_float32, has_bf16, seed_of
from minildm.training.checkpoint import save_model
from minildm.training.configs import TrainConfig, differences, to_dict

LossFn = Callable[[Batch, int, BatchRandom], dict[str, Tensor]]  # (batch, step, rng) -> terms
RUN, STATE, LOG = "training/run.json", "training/state.pt", "log.json"


class Record(NamedTuple):
    """The optimiser steps since the last Record."""

    step: int  # the last one, counted from 1
    images: int  # training images seen so far
    seconds: float  # of training so far, earlier parts of a resumed run included
    lr: float  # of the last step
    terms: dict[str, float]  # the loss and its parts: means over these steps


def read_log(folder: str | Path) -> list[Record]:
    """The Records of a training, until its last save; [] in a new folder."""
    path = Path(folder) / LOG
    return [Record(**row) for row in json.loads(path.read_text())] if path.exists() else []


def pick_device(name: str | None = None) -> torch.device:
    """The named device, as "cuda", "cuda:1" or "cpu"; None: CUDA, else Apple's MPS, else the CPU.

    Raises ValueError for a device that does not exist here.
    """
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    known = [*["cuda"] * (gpus > 0), *[f"cuda:{i}" for i in range(gpus)], *["mps"] * mps, "cpu"]
    if name not in (None, "cpu:0", *known):
        raise ValueError(f"device={name!r} does not exist here; known: {', '.join(known)}")
    return torch.device(name or known[0])


def describe(device: torch.device) -> str:
    """The device in words, as "cpu, 2 threads"."""
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    return f"{device.type}, {torch.get_num_threads()} threads"


def lr_at(config: TrainConfig, step: int) -> float:
    """The learning rate of step 1, 2, ...: linear warm-up times decay."""
    warm = min(1.0, step / max(config.warmup_steps, 1))
    done = (step - 1) / config.steps
    left = (1 + math.cos(math.pi * done)) / 2 if config.decay == "cosine" else 1.0
    return config.lr * warm * left


def endless_batches(
    length: int, batch_size: int, seed: int, batches: range, rank: int = 0, world: int = 1
) -> Iterator[list[int]]:
    """Shuffled indices, epoch after epoch: this process's part of each of the batches.

    Batch k is a function of (seed, k).
    """

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        return torch.randperm(length, generator=generator).tolist()

    part = batch_size // world
    for k in batches:
        first = k * batch_size + rank * part
        yield [order(i // length)[i % length] for i in range(first, first + part)]


class EMA:
    """Moving average of a model's trained weights: samples come from it.

    shadow <- decay * shadow + (1 - decay) * weights after each optimiser step. The decay warms up
    as min(decay, (1 + n) / (10 + n)) at update n = 1, 2, ..., as in the official code: otherwise
    early averages would contain the random initialisation.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999) -> None:
        self.decay, self.updates = decay, 0
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in trained.items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [p for p in model.parameters() if p.requires_grad]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1.0 - decay)


class Training:
    """One training: its folder, the processes that share it, and its state between two steps."""

    def __init__(
        self,
        run_dir: str | Path,
        experiment: Any,
        device: str | None,
        data: ImageDataset,
        **inputs: Any,
    ) -> None:
        """Join the other processes, and check what the folder holds.

        inputs: hashes of the first stage, the initial model and a user's code. Raises ValueError if
        the folder holds another run, or if the number of processes does not divide the batch size.
        """
        from accelerate import Accelerator, InitProcessGroupKwargs
        from accelerate.state import AcceleratorState

        chosen, config = pick_device(device), experiment.train
        if config.precision == "auto":
            config = replace(config, precision="bf16" if has_bf16(chosen) else "fp32")
        if chosen.type == "cuda" and chosen.index is not None:
            torch.cuda.set_device(chosen)
        AcceleratorState._reset_state(reset_partial_state=True)  # a notebook trains several models
        self.accelerator = Accelerator(
            mixed_precision="no" if config.precision == "fp32" else config.precision,
            cpu=chosen.type == "cpu",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],  # to encode data
        )
        self.device, self.processes = self.accelerator.device, self.accelerator.num_processes
        if config.batch_size % self.processes:
            wanted = f"must be a multiple of {self.processes}, the number of processes"
            raise ValueError(f"batch_size={config.batch_size} {wanted}")
        resolved = to_dict(replace(experiment, train=config))
        content = {type(experiment).__name__: resolved, "data": data.fingerprint, **inputs}
        self.folder, self.config, self.content = Path(run_dir), config, content
        self.info = {"data": data.name, "images": len(data), "train": to_dict(config)}  # on a card
        self.info |= {"data_config": to_dict(data.config)} if data.config else {}
        path = self.folder / RUN
        old = json.loads(path.read_text()) if path.exists() else content
        if differ := differences(old, content).replace(f"{type(experiment).__name__}.", ""):
            raise ValueError(
                f"run_dir={str(run_dir)!r} holds another run ({differ}): resume it with its own "
                f"values, or train its model further, by --init {run_dir} and another --run-dir"
            )

    def optimise(
        self,
        model: nn.Module,
        loss: LossFn,
        data: Dataset,
        *,
        first_stage: str | None = None,
        adversary: nn.Module | None = None,
        adversary_lr: float = 1.0,
        save_at: Collection[int] = (),
        measure: Callable[[], dict[str, float]] = dict,
    ) -> Iterator[Record]:
        """Train `model` in place on the term "loss"; yields all Records, those of earlier runs too.

        first_stage: as for `save_model`. adversary: trained on the term "disc_loss", at
        adversary_lr times the learning rate. save_at: further steps after which the
        model is saved. measure: further terms of the Records of saved steps. At the end the model
        holds its averaged weights. Raises FloatingPointError for a loss or a gradient that is not
        finite; the last checkpoint stays.
        """
        config, accelerator, modules = self.config, self.accelerator, {"loss": model}
        if adversary is not None:
            if self.processes > 1 and self.device.type == "cuda":
                adversary = nn.SyncBatchNorm.convert_sync_batchnorm(adversary)
            modules["disc_loss"] = adversary
        options = {"first_stage": first_stage, "info": self.info}
        self._start(modules, adversary_lr)
        yield from self.records
        batches = self._batches(data)
        clock = time.perf_counter() - (self.records[-1].seconds if self.records else 0.0)
        gpus = [torch.cuda.current_device()] if self.device.type == "cuda" else []
        for step in range(self.step + 1, config.steps + 1):
            with torch.random.fork_rng(gpus):  # of dropout
                torch.manual_seed(seed_of(config.seed, step, accelerator.process_index))
                self.advance(*next(batches), loss)
            saves = step % config.save_every == 0 or step == config.steps or step in save_at
            if step % config.log_every and not saves:
                continue
            terms, seconds = self.read(), time.perf_counter() - clock
            terms |= measure() if saves else {}
            images, lr = step * config.batch_size, lr_at(config, step)
            self.records.append(Record(step, images, seconds, lr, terms))
            if saves and accelerator.is_main_process:
                # The model first: a resumed training repeats what its state lacks.
                save_model(model, self.folder, ema=self.ema.shadow, **options)
                self.save()
            yield self.records[-1]
        accelerator.wait_for_everyone()
        model.load_state_dict(self.ema.shadow, strict=False)
        model.eval()

    def _start(self, modules: dict[str, nn.Module], adversary_lr: float) -> None:
        """Take up what the training saved last; modules: by the term that each minimises."""
        self.modules = nn.ModuleDict(modules).to(self.device).train()
        if self.device.type != "mps":  # the memory layout in which convolutions are fastest
            self.modules.to(memory_format=torch.channels_last)
        lr_of = {"loss": 1.0, "disc_loss": adversary_lr}  # relative to the config's
        groups = [{"params": m.parameters(), "lr_factor": lr_of[t]} for t, m in modules.items()]
        options = {"betas": self.config.betas, "weight_decay": self.config.weight_decay}
        self.optimizer = torch.optim.AdamW(groups, fused=True, **options)  # fused: 3 x as fast
        self.ema = EMA(modules["loss"], self.config.ema_decay)
        self.step, self.sums = 0, {}  # the last step; sums of terms since the last Record
        if (path := self.folder / STATE).is_file():
            state = torch.load(path, "cpu", weights_only=True)
            self.step = self.ema.updates = state["step"]
            for name, average in self.ema.shadow.items():
                average.copy_(state["ema"][name])
            self.modules.load_state_dict(state["modules"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.records = [record for record in read_log(self.folder) if record.step <= self.step]

    def _batches(self, data: Dataset) -> Iterator[tuple[Batch, BatchRandom]]:
        """This process's part of the batches to come, on the device, with random numbers."""
        seed, share = self.config.seed, (self.accelerator.process_index, self.processes)
        left = range(self.step, self.config.steps)
        loader = DataLoader(
            data,
            batch_sampler=endless_batches(len(data), self.config.batch_size, seed, left, *share),
            num_workers=self.config.workers,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it draws from the caller's random state
        )
        for k, batch in zip(left, loader, strict=True):
            generator = torch.Generator(self.device).manual_seed(seed_of(seed, k, 1))
            for name, entry in batch.items():
                if isinstance(entry, Tensor):
                    batch[name] = entry.to(self.device, non_blocking=True)
            yield batch, BatchRandom(generator, *share)

    def advance(self, batch: Batch, rng: BatchRandom, loss: LossFn) -> None:
        """Take one optimiser step; nothing here waits for the device."""
        self.step += 1
        with self.accelerator.autocast():
            terms = loss(batch, self.step, rng)
        # The modules share no weight: one backward pass of the sum serves all.
        self.accelerator.backward(sum(terms[t] for t in self.modules if terms[t].requires_grad))
        for group in self.optimizer.param_groups:  # the model's, the adversary's
            graded = [p for p in group["params"] if p.grad is not None]  # none before it starts
            if self.processes > 1:
                for p in graded:
                    p.grad = self.accelerator.reduce(p.grad, "mean")
            norm = nn.utils.clip_grad_norm_(graded, self.config.grad_clip)
            terms["gradient"] = terms.get("gradient", 0.0) + norm
            group["lr"] = lr_at(self.config, self.step) * group["lr_factor"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.modules["loss"])
        for name, term in terms.items():
            if term.ndim == 0:
                self.sums[name] = self.sums.get(name, 0.0) + at_least_float32(term.detach())

    def read(self) -> dict[str, float]:
        """The mean terms since the last Record; waits for the device."""
        first = self.records[-1].step + 1 if self.records else 1
        means = torch.stack(list(self.sums.values())) / (self.step + 1 - first)
        means = self.accelerator.reduce(means, "mean").tolist()
        terms, self.sums = dict(zip(self.sums, means, strict=True)), {}
        if not all(map(math.isfinite, means)):
            listed = ", ".join(f"{name}={term:.4g}" for name, term in terms.items())
            raise FloatingPointError(
                f"steps {first} to {self.step}: not finite ({listed}); the last checkpoint stays. "
                "A lower lr, a longer warm-up or precision='fp32' usually helps"
            )
        return {name: term for name, term in terms.items() if name != "gradient"}

    def save(self) -> None:
        """Write what is trained on what, the log, and the state to resume from; each atomically."""
        state = {"modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"step": self.step, "ema": self.ema.shadow}
        write_json(self.folder / RUN, self.content)
        write_json(self.folder / LOG, [record._asdict() for record in self.records])
        buffer = io.BytesIO()
        torch.save(state, buffer)  # into a file, it would hide that the disk is full
        with atomic_write(self.folder / STATE) as file:  # last: it ends the save
            file.write(buffer.getbuffer())
