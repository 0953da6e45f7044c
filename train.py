"""
Train a model: one file, from the settings at the top to main() at the bottom.

    python train.py config/tiny.py                          # prepares the data if they are not there
    python train.py config/tiny.py --max_iters=200          # any setting of TrainConfig or GPTConfig
    python train.py config/tiny.py --resume                 # go on with this recipe's newest unfinished run
    torchrun --standalone --nproc_per_node=2 train.py ...   # the same run on two processes

From a notebook: trainer = Trainer(config, model, data), then trainer.train_step(step) and its brothers.
"""

import contextlib
import ctypes
import functools
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from tqdm import tqdm

import evaluate
import prepare
from model import GPT, GPTConfig, start_from_pairs
from nanostlm import checkpoint, optim, settings
from nanostlm.tokenizer import Tokenizer

# ----------------------------------------------------------------------------------------------------------
# Settings


@dataclass
class TrainConfig:
    # -- everyday
    dataset: str = "tinystories"  # a folder under data_dir, made by prepare.py (or on the spot)
    tokenizer: str = "bpe4096"  # gpt2 | byte | bpeN, N ids in all
    stories: int = 0  # how many stories of the data set to use; 0 = all
    out_dir: str = ""  # where the run is kept; empty = out/RECIPE, then out/RECIPE-2, ...
    max_iters: int = 1000  # updates of the weights; 0 = print the plan and end
    eval_interval: int = 250  # updates between evaluations
    log_interval: int = 10  # updates between lines in metrics.jsonl
    save_interval: int = 250  # updates between checkpoints
    batch_size: int = 16  # rows in a forward pass
    gradient_accumulation_steps: int = 1  # forward passes in an update, over all processes
    learning_rate: float = 1e-3  # the highest of AdamW
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: str = "auto"  # auto | bfloat16 | float16 | float32; of matrix products, weights stay float32
    compile: str = "auto"  # auto | True | False; torch.compile, where it pays
    seed: int = 1337  # of the weights, the order of the data, and dropout
    # -- data
    data_dir: str = "data"  # holds DATASET/TOKENIZER/{train.bin,val.bin,meta.json}
    source: str = ""  # where prepare.py finds a data set that is not there yet: a path or a Hub id
    fallback: str = ""  # a data set for where this one cannot be reached
    story_windows: bool = False  # full windows begin where stories do, rather than one behind the other
    context_schedule: str = ""  # share of the run: share of block_size, "0:0.25, 0.5:1"; empty = off
    pair_tokens: int = 0  # embedding and head start from the pairs in this many training tokens; 0 = off
    cross_stories: bool = True  # False: no attention to the story before, in training and in evaluation
    eval_tokens: int = 0  # tokens of the validation file that an evaluation reads; 0 = all
    # -- optimizer
    optimizer: str = "adamw"  # adamw | muon (for the matrices of the blocks, AdamW for the rest)
    muon_lr: float = 0.01  # the highest of Muon, scaled to AdamW's size of update
    muon_momentum: float = 0.95  # of Muon
    embedding_lr: float = 0.0  # the embedding's own learning rate; 0 = learning_rate
    head_lr: float = 0.0  # the same for a head that is not tied to the embedding
    schedule: str = "cosine"  # cosine | linear | wsd | constant
    warmup_iters: int = 100  # updates of linear warmup
    lr_decay_iters: int = 0  # where the learning rate reaches min_lr; 0 = max_iters
    decay_share: float = 0.2  # schedule=wsd: share of the run that decays
    min_lr: float = 0.0  # learning rate at the end (of the others, in proportion)
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = off
    dropout_schedule: str = ""  # dropout by update, as points on a line: "0:0.0, 500:0.1"; empty = `dropout`
    ema: float = 0.0  # decay of an average of the weights, evaluated and kept as the best; 0 = off
    # -- run
    patience: int = 0  # stop after this many evaluations without a better one; 0 = never
    init_from: str = ""  # weights and tokenizer to begin from: a checkpoint, or hf:FOLDER_OR_ID
    logger: str = ""  # tensorboard | wandb, besides metrics.jsonl
    threads: int = 0  # CPU threads of a process; 0 = OMP_NUM_THREADS or all cores, shared by the processes
    prompt: str = "Once upon a time"  # of the stories written at the end
    model: GPTConfig = field(default_factory=GPTConfig)

    def validate(self) -> None:
        """Raise a ValueError with one clear line if this makes no run."""
        positive = ("eval_interval", "log_interval", "save_interval", "batch_size",
                    "gradient_accumulation_steps")  # fmt: skip
        for name, value in asdict(self).items():
            if isinstance(value, int | float) and not (name in positive) <= value < math.inf:  # or nan
                raise ValueError(f"{name} must be at least {int(name in positive)}, not {value}")
        choices = dict(dtype=["auto", *DTYPES], compile=["auto", "True", "False"], schedule=optim.SCHEDULES,
                       optimizer=["adamw", "muon"], logger=["", "tensorboard", "wandb"])  # fmt: skip
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(filter(None, known))}; "
                                 f"not {getattr(self, name)!r}")  # fmt: skip
        if self.seed >= 2**63:
            raise ValueError(f"seed must be less than 2**63, not {self.seed}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be more than 0, not {self.learning_rate}")
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}")
        if max(self.beta1, self.beta2, self.muon_momentum, self.ema) >= 1 or self.decay_share > 1:
            raise ValueError("beta1, beta2, muon_momentum and ema must be less than 1, decay_share at most 1")
        if self.dropout_schedule:
            optim.points("dropout_schedule", self.dropout_schedule)
        if self.pair_tokens and self.model.tied:
            raise ValueError("pair_tokens needs a head of its own: tied=False, or pair_tokens=0")
        self.model.validate()
        self.stages()

    def stages(self) -> list[tuple[int, int]]:
        """context_schedule as (first update, tokens in a window), the last as long as the context."""
        if not self.context_schedule:
            return [(0, self.model.block_size)]
        T, end = self.model.block_size, self.lr_decay_iters or self.max_iters
        points = optim.points("context_schedule", self.context_schedule, 0, 1)
        found = [(round(share * end), round(T * part)) for share, part in points]
        exact = all(part and T * part == length and not T % length
                    for (_, part), (_, length) in zip(points, found, strict=True))  # fmt: skip
        if points[0][0] or points[-1][0] > 1 or points[-1][1] != 1 or not exact:
            raise ValueError(f"context_schedule={self.context_schedule!r} must begin at 0, end with 1, and "
                             f"make lengths that divide block_size={T}")  # fmt: skip
        return found


# A run that goes on may change these, and says so; others would silently make it another model or order of
# the data. dtype and loss_chunk change the rounding, `stories` what is prepared: fingerprint() sees that.
FREE = ("max_iters", "eval_interval", "log_interval", "save_interval", "batch_size", "device", "dtype",
        "compile", "gradient_accumulation_steps", "out_dir", "data_dir", "source", "fallback", "patience",
        "logger", "threads", "prompt", "loss_chunk", "stories")  # fmt: skip

# ----------------------------------------------------------------------------------------------------------
# The machine: every decision about devices is made here

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Machine(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of matrix products
    compile: bool
    why: str  # device and dtype in words
    rank: int = 0  # this process
    world: int = 1  # of so many

    @property
    def scales(self) -> bool:
        """fp16 gradients need a GradScaler."""
        return self.dtype == torch.float16

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def peak_memory(self) -> float:
        """Highest memory in use so far, in MB: of the GPU, else resident of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        try:
            import resource
        except ImportError:  # Windows
            return math.nan
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def choose_machine(c: TrainConfig) -> Machine:
    """Device, precision and whether to compile, from the settings and from what this machine can do."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = c.device
    if kind == "auto":
        mps = torch.backends.mps.is_available() and world == 1
        kind = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", kind):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, not {c.device!r}")
    device = torch.device(kind)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device=cuda, but PyTorch finds no CUDA GPU here; --device=cpu needs none")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"{device} is asked for: here are {torch.cuda.device_count()} CUDA GPUs")
        native = torch.cuda.get_device_capability(device) >= (8, 0)  # older ones only emulate bf16
        name, dtype = torch.cuda.get_device_name(device), torch.bfloat16 if native else torch.float16
        why = "bf16 is native" if native else "no native bf16, so fp16 with a GradScaler"
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("device=mps, but this is no Mac with Metal; --device=cpu trains without it")
        name, dtype, why = "Apple GPU", torch.float32, "the precision that MPS is sure of"
    else:
        can = torch.cpu.get_capabilities()
        native = bool(can.get("avx512_bf16") or can.get("amx_bf16") or can.get("bf16"))
        name, dtype = f"CPU ({can.get('architecture', '?')})", torch.bfloat16 if native else torch.float32
        why = "it has bf16 matrix units" if native else "it has no bf16 matrix units"
    if c.dtype != "auto":
        dtype, why = DTYPES[c.dtype], "as asked"
    pays = device.type == "cuda" and c.max_iters >= COMPILE_PAYS
    compile = pays if c.compile == "auto" else c.compile == "True"
    why = f"{name}, {str(dtype).removeprefix('torch.')} ({why})"
    return Machine(device, dtype, compile, why, rank, world)


COMPILE_PAYS = 500  # updates from which a minute of compiling is won back on a GPU


def set_up(machine: Machine, c: TrainConfig) -> None:
    """The process-wide settings that go with a machine."""
    torch.set_float32_matmul_precision("high")  # TF32 for what stays float32 on CUDA
    if machine.device.type == "cpu":
        keep_memory()
    if machine.device.type == "cuda":
        torch.cuda.set_device(machine.device)
    elif c.threads or machine.world > 1:  # torchrun would give each process one thread
        torch.set_num_threads(c.threads or max(1, prepare.cpus() // machine.world))
    if machine.world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if machine.device.type == "cuda" else "gloo")


def keep_memory() -> None:
    """
    Have the C library keep what a step frees for the next one, rather than give it back to the system and
    fetch it again page by page: 13,000 faults a step of 3,072 tokens. Where it is not glibc, nothing.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, 2**30)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


# ----------------------------------------------------------------------------------------------------------
# The data: the global batch is a pure function of (seed, step)


class Batches:
    """
    Row r of update s is window perm[(s * rows + r) mod W] of that epoch's permutation of the W windows. Each
    process takes a fixed slice of the rows, so the batch does not depend on how many there are. A stage of
    context_schedule has windows of `length` tokens and permutations of its own, and counts from its `first`
    update; an update has as many tokens in every stage.
    """

    def __init__(self, c: TrainConfig, data: prepare.Data, machine: Machine, length=0, first=0, stage=0):
        self.c, self.ids, self.machine, self.first, self.stage = c, data.train, machine, first, stage
        self.length = T = length or c.model.block_size
        if c.story_windows and T == c.model.block_size:  # a window begins with the end-of-text before a story
            ends = np.flatnonzero(self.ids == data.tokenizer.eot)
            self.starts = ends[ends + T + 1 <= len(self.ids)]
        else:
            self.starts = np.arange(0, max(0, len(self.ids) - T), T)
        if not len(self.starts):
            raise ValueError(f"{data.folder}/train.bin has {len(self.ids):,} tokens, too few for one window "
                             f"of block_size={T} and its next token")  # fmt: skip
        A, world = c.gradient_accumulation_steps, machine.world
        B = c.batch_size * c.model.block_size // T
        if A % world and c.batch_size % world:
            raise ValueError(f"{world} processes divide neither gradient_accumulation_steps={A} nor "
                             f"batch_size={c.batch_size}")  # fmt: skip
        rows = np.arange(A * B).reshape(A, B)  # micro-batches by rows
        share = np.split(rows, world, axis=A % world and 1)[machine.rank]
        self.rows, self.per_step = share, A * B
        self.permutations: dict[int, np.ndarray] = {}

    def windows(self, step: int) -> np.ndarray:
        """Where the windows of this process' rows begin at `step`: (micro-batches, rows)."""
        at, W = (step - self.first) * self.per_step + self.rows, len(self.starts)
        epochs = at // W
        order = np.empty_like(at)
        for epoch in np.unique(epochs):
            if epoch not in self.permutations:
                generator = np.random.default_rng([self.c.seed, int(epoch), self.stage])
                self.permutations = {e: p for e, p in self.permutations.items() if e >= epoch - 1}
                self.permutations[int(epoch)] = generator.permutation(W)
            inside = epochs == epoch
            order[inside] = self.permutations[int(epoch)][at[inside] % W]
        return self.starts[order]

    def __call__(self, step: int):
        """This process' micro-batches of `step`: (idx, targets), each (rows, length), on the device."""
        reach = np.arange(self.length + 1)
        for starts in self.windows(step):
            tokens = torch.from_numpy(self.ids[starts[:, None] + reach].astype(np.int64))
            if self.machine.device.type == "cuda":
                tokens = tokens.pin_memory().to(self.machine.device, non_blocking=True)
            else:
                tokens = tokens.to(self.machine.device)
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


# ----------------------------------------------------------------------------------------------------------
# The trainer


class Trainer:
    """
    Everything that a run needs besides its loop. Steps count finished updates: train_step(0) makes the first.

        trainer = Trainer(config, model, data, out_dir="out/mine")
        for step in range(config.max_iters):
            trainer.log(step + 1, trainer.train_step(step))
        trainer.log(config.max_iters, trainer.val_step(), split="val")
        trainer.save_checkpoint(config.max_iters)
    """

    def __init__(self, c: TrainConfig, model: GPT, data: prepare.Data, out_dir: str | Path | None = None,
                 machine: Machine | None = None):  # fmt: skip
        c.validate()
        self.config, self.data = c, data
        self.machine = machine or choose_machine(c)
        self.model = model.to(self.machine.device)
        self.compiled = self.model  # what is called; the weights are those of self.model
        self.out_dir = Path(out_dir) if out_dir else None
        self.stages = [Batches(c, data, self.machine, T, first, stage)
                       for stage, (first, T) in enumerate(c.stages())]  # fmt: skip
        if self.out_dir:
            self.out_dir.mkdir(parents=True, exist_ok=True)
        fused = self.machine.device.type in ("cuda", "cpu")
        self.optimizers = optim.build(self.model, c, fused)
        self.scaler = torch.amp.GradScaler(self.machine.device.type, enabled=self.machine.scales)
        self.average = [p.detach().clone() for p in self.model.parameters()] if c.ema else None
        self.dropout = optim.points("dropout_schedule", c.dropout_schedule) if c.dropout_schedule else None
        self.bytes = evaluate.token_bytes(data.tokenizer)
        self.origin = {"data": fingerprint(data), "provenance": checkpoint.provenance()}  # as they are now
        self.tokens_per_step = self.stages[0].per_step * self.stages[0].length
        self.step = 0  # finished updates
        self.best = math.inf  # validation loss
        self.waited = 0  # evaluations since the best one
        self.skipped = self.skipped_in_a_row = 0  # updates that were not finite
        self.evaluated = -1  # the step of the last evaluation
        self.asked = self.stop = 0  # the signal that this process got; the one that all have agreed on
        self.save_now = False  # SIGUSR1: save at the next step and go on
        self.report_to = open_logger(c, self.out_dir) if self.machine.rank == 0 else None
        self.lines: list[str] = []  # of metrics, not yet written
        self.recipe: dict = {}  # as it was written, so that a later change of it is noticed
        self.began, self.elapsed = time.perf_counter(), 0.0
        self.timed = [0, 0.0]  # tokens and seconds of training since the last line of metrics

    # -- one update

    def train_step(self, step: int) -> dict[str, float]:
        """One update from the batch of `step`. -> loss (nats a token, of the whole batch), lr, grad_norm."""
        c, began = self.config, time.perf_counter()
        lr = optim.schedule(c, step)
        optim.set_lr(self.optimizers, lr)
        if self.dropout:
            optim.set_dropout(self.model, optim.interpolate(self.dropout, step))
        self.model.train()
        total = torch.zeros((), device=self.machine.device)
        for micro, (idx, targets) in enumerate(self.batches(step)):
            if c.model.dropout or self.dropout:  # dropout depends on where we are, not on how we came here
                words = np.random.SeedSequence([c.seed, step, micro, self.machine.rank]).generate_state(2)
                torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
            segments = None if c.cross_stories else (idx == self.data.tokenizer.eot).cumsum(dim=1)
            with self.machine.autocast():
                loss = self.compiled(idx, targets, segments=segments)[1]
            loss = loss / len(self.stages[0].rows)  # every row has as many targets: the mean of means
            self.scaler.scale(loss).backward()
            total += loss.detach()
        params = [p for p in self.model.parameters() if p.grad is not None]
        loss = self.sum_over_processes(params, total)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(params, c.grad_clip or math.inf).item()
        self.update(step, loss, norm)
        self.step = step + 1
        self.timed[0] += self.tokens_per_step
        self.timed[1] += time.perf_counter() - began
        return {"loss": loss, "lr": c.learning_rate * lr, "grad_norm": norm}

    def batches(self, step: int):
        """This process' micro-batches of `step`, of the stage that it is in: pairs (idx, targets)."""
        return next(stage for stage in reversed(self.stages) if stage.first <= step)(step)

    def sum_over_processes(self, params: list[torch.Tensor], loss: torch.Tensor) -> float:
        """One all-reduce: the mean of gradients and loss, and whether a process was asked to stop."""
        if self.machine.world == 1:
            self.stop = self.asked
            return loss.item()
        asked = loss.new_tensor([float(self.asked == s) for s in STOPS])
        flat = torch.cat([p.grad.flatten() for p in params] + [loss[None], asked])
        all_reduce(flat)
        grads, (mean, *asked) = flat[: -1 - len(STOPS)], flat[-1 - len(STOPS) :].tolist()
        self.stop = next((int(s) for s, votes in zip(STOPS, asked, strict=True) if votes), 0)
        grads /= self.machine.world
        for p, grad in zip(params, grads.split([p.numel() for p in params]), strict=True):
            p.grad.copy_(grad.view_as(p))
        return mean / self.machine.world

    def update(self, step: int, loss: float, norm: float) -> None:
        """Step the optimizers; leave out an update that is not finite, and give up after several in a row."""
        if math.isfinite(norm) and math.isfinite(loss):
            self.skipped_in_a_row = 0
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
            if self.average is not None:
                with torch.no_grad():
                    torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - self.config.ema)
        elif not (self.machine.scales and math.isfinite(loss)):  # else fp16 overflowed: the scaler's business
            self.skipped += 1
            self.skipped_in_a_row += 1
            say(f"update {step} left out: loss {loss}, gradient norm {norm}")
            if self.skipped_in_a_row >= 5:
                lr = self.config.learning_rate * optim.schedule(self.config, step)
                raise Diverged(
                    f"{self.skipped_in_a_row} updates in a row were not finite: step {step}, loss {loss}, "
                    f"gradient norm {norm}, learning rate {lr:.3g}. The last good checkpoint is kept; "
                    "a lower --learning_rate or more --warmup_iters usually helps"
                )
        self.scaler.update()  # after an overflow it scales by less
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def compile(self) -> None:
        """Compile the model, with a trial on the first batch: where that fails, say so and do without."""
        if not self.machine.compile:
            return
        began = time.perf_counter()
        try:
            compiled = torch.compile(self.model)
            idx, targets = next(self.batches(self.step))
            segments = None if self.config.cross_stories else torch.zeros_like(idx)
            self.model.train()
            with self.machine.autocast():
                compiled(idx, targets, segments=segments)[1].backward()
            self.compiled = compiled
            say(f"compiled in {time.perf_counter() - began:.0f} s")
        except Exception as error:  # whatever a compiler may throw: the run goes on without it
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            say(f"WARNING: torch.compile failed, so this run goes on without it, slower. {reason}")
        self.model.zero_grad(set_to_none=True)

    # -- evaluation

    def val_step(self) -> dict[str, float]:
        """Loss (nats a token) and bits per byte of the validation file, of the averaged weights if kept."""
        c, machine = self.config, self.machine
        ids, eot = self.data.val[: c.eval_tokens or None], self.data.tokenizer.eot
        batches = evaluate.windows(ids, eot, c.model.block_size, c.batch_size)
        mine = (batch for i, batch in enumerate(batches) if i % machine.world == machine.rank)
        self.model.eval()
        with self.averaged(), machine.autocast():
            found = evaluate.total_nats(self.compiled, mine, machine.device, None if c.cross_stories else eot)
        sums = torch.tensor(found, dtype=torch.float64)
        if machine.world > 1:
            sums = sums.to(machine.device)
            all_reduce(sums)
        nats, count = sums.tolist()
        return {"loss": nats / count, "bpb": evaluate.bits_per_byte(nats, int(self.bytes[ids].sum()))}

    @contextlib.contextmanager
    def averaged(self):
        """Inside, the model has the average of the weights."""
        if self.average is None:
            yield
            return
        params = list(self.model.parameters())
        kept = [p.detach().clone() for p in params]
        with torch.no_grad():
            torch._foreach_copy_(params, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(params, kept)

    def judge(self, step: int, result: dict[str, float]) -> None:
        """
        Keep the weights if this evaluation is the best so far, else lose patience. A closing evaluation off
        the interval counts for best.pt alone: made longer later, the run goes on as if it had not ended, but
        for best.pt, which is the closing one until one on the interval beats those before it.
        """
        best = result["loss"] < self.best
        if best and self.out_dir and step and self.machine.rank == 0:
            with self.averaged():
                self.write("best.pt", self.portrait(step) | {"val": result})
        if step % self.config.eval_interval == 0:
            self.evaluated = step
            self.best, self.waited = (result["loss"], 0) if best else (self.best, self.waited + 1)

    # -- signals

    def signals(self):
        """Inside, SIGINT and SIGTERM end the run after this step, saved; a second one ends it at once."""

        def ask(number, frame):
            self.asked = number
            signal.signal(number, signal.SIG_DFL)
            say(f"{signal.Signals(number).name}: saving after this step; once more ends at once")

        def save(number, frame):
            self.save_now = True

        return handling(ask, save)

    # -- what is written

    def log(self, step: int, result: dict[str, float], split: str = "train") -> dict[str, float]:
        """Add a line to metrics.jsonl, or keep it for later where that fails. -> the line."""
        line = {"step": step, "split": split, **result, "tokens": step * self.tokens_per_step}
        line["elapsed_s"] = round(self.elapsed + time.perf_counter() - self.began, 3)
        if split == "train":
            tokens, seconds = self.timed
            line["tokens_per_s"] = round(tokens / seconds) if seconds else 0
            self.timed = [0, 0.0]
        if self.out_dir and self.machine.rank == 0:
            self.lines.append(json.dumps(line) + "\n")
            try:
                self.write_lines()
            except OSError as error:
                say(f"WARNING: could not write metrics.jsonl at step {step}: {error}; trying again later")
        if self.report_to:
            self.report_to(line)
        return line

    def write_lines(self, name: str = "metrics.jsonl", sync: bool = False) -> None:
        """Append the lines that wait to a file: all, or none with an OSError. `sync`: as far as the disk."""
        path = self.out_dir / name
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(self.lines))
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)  # no half line
            raise
        self.lines.clear()

    def portrait(self, step: int) -> dict:
        """What a model needs to be used: weights, settings, tokenizer, and where it comes from."""
        return {"model": self.model.state_dict(), "model_config": asdict(self.config.model), "step": step,
                "train_config": asdict(self.config), "tokenizer": self.data.tokenizer.state(),
                "provenance": self.origin["provenance"]}  # fmt: skip

    def save_checkpoint(self, step: int) -> None:
        """latest.pt: everything to go on; the one before stays as previous.pt."""
        self.save_now = False
        if not self.out_dir or self.machine.rank:
            return
        state = self.portrait(step) | {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(), "average": self.average, "data": self.origin["data"],
            "best": self.best, "waited": self.waited, "evaluated": self.evaluated, "skipped": self.skipped,
            "elapsed": self.elapsed + time.perf_counter() - self.began, "recipe": self.recipe,
            "compiled": self.compiled is not self.model, "machine": self.machine.why,
        }  # fmt: skip
        self.write("latest.pt", state, previous=self.out_dir / "previous.pt")

    def write(self, name: str, state: dict, previous: Path | None = None) -> None:
        """Save `state`, after the lines of metrics up to it; where that fails, warn, try again, give up."""
        for wait in (1, 5, 0):
            try:
                self.write_lines(sync=True)
                return checkpoint.save(self.out_dir / name, state, previous)
            except (OSError, RuntimeError) as error:  # the writer inside torch raises the latter
                again = ", trying again" if wait else ""
                say(f"WARNING: could not save {name} at step {state['step']}: {error}{again}")
                time.sleep(wait)
        raise OSError(f"{self.out_dir} cannot be written to; the checkpoint before this one is whole")

    def load_checkpoint(self, state: dict) -> int:
        """Go on from what checkpoint.read returned. -> the step to make next."""
        if state["data"] != self.origin["data"]:
            raise ValueError(f"the files in {self.data.folder} are not those that this run began with")
        try:
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
                optimizer.load_state_dict(saved)
                for group, mine in zip(optimizer.param_groups, settings, strict=True):
                    group.update(mine)  # moments are those of the run, learning rates those of the settings
        except (RuntimeError, ValueError) as error:  # what --override cannot take: other shapes, other groups
            raise ValueError(f"the checkpoint does not fit these settings: {error}") from error
        if state["scaler"]:  # else it ran in a precision that needs none
            self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            now = [p.detach() for p in self.model.parameters()]  # where the run had no average so far
            torch._foreach_copy_(self.average, state["average"] or now)
        self.step, self.best, self.waited = state["step"], state["best"], state["waited"]
        self.evaluated, self.skipped, self.elapsed = state["evaluated"], state["skipped"], state["elapsed"]
        if state["machine"] != self.machine.why:  # its precision may be another
            say(f"the steps so far were made on {state['machine']}")
        if self.step:
            optim.set_lr(self.optimizers, optim.schedule(self.config, self.step - 1))  # as when it was saved
        return self.step


STOPS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def handling(stop, save):
    """Inside, SIGINT and SIGTERM call stop(number, frame), and SIGUSR1 save(number, frame)."""
    handlers = dict.fromkeys(STOPS, stop)
    if hasattr(signal, "SIGUSR1"):
        handlers[signal.SIGUSR1] = save
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_logger(c: TrainConfig, folder: Path | None) -> Callable[[dict], None] | None:
    """A function that takes lines of metrics, for TensorBoard or W&B, imported only when asked for."""
    if not c.logger or folder is None:
        return None
    try:
        if c.logger == "wandb":
            import wandb
        else:
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(f"logger={c.logger} needs another package: pip install {c.logger}") from None

    @functools.cache
    def opened():  # at the first line, when the folder is this run's alone
        if c.logger == "tensorboard":
            return SummaryWriter(folder)
        return wandb.init(project="nanostlm", id=folder.name, resume="allow", dir=folder, config=asdict(c))

    def report(line: dict) -> None:
        values = {f"{line['split']}/{key}": x for key, x in line.items() if key not in ("split", "step")}
        if c.logger == "wandb":
            return opened().log(values, step=line["step"])
        for key, x in values.items():
            opened().add_scalar(key, x, line["step"])
        opened().flush()

    return report


class Diverged(RuntimeError):
    """Training produced numbers that are not finite, again and again."""


def all_reduce(tensor: torch.Tensor) -> None:
    """Sum over the processes, in place."""
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:
        raise ConnectionError(f"another process of this run is gone, so this ends too: {error}") from error


def fingerprint(data: prepare.Data) -> dict:
    """Sizes and checksums of the bins, so that a run does not go on with other data."""
    return {name: [len(ids), zlib.crc32(memoryview(ids).cast("B"))] for name, ids in
            (("train", data.train), ("val", data.val))}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# A run: its folder, its data, its report


def say(message: str) -> None:
    """A line for the person, above the progress bar; one process speaks."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(message, file=sys.stderr)


FLAGS = {
    "resume": "go on with the run in out_dir, or with this recipe's newest unfinished one",
    "overwrite": "throw away the run in out_dir and begin anew",
    "override": "with --resume: accept changed settings that make it another run",
}


class Plan(NamedTuple):
    """What the command line asked for."""

    config: TrainConfig
    name: str  # of the recipe
    recipe: dict  # its settings
    folder: Path
    state: dict | None  # the checkpoint to go on from


def parse(argv: list[str]) -> Plan:
    """The command line -> settings and folder; with --resume those of the run that goes on."""
    path, recipe, given, flags = settings.command_line(TrainConfig, argv, FLAGS, "Train a model.")
    if "vocab_size" in recipe | given:
        raise ValueError("vocab_size comes from the tokenizer; choose one with --tokenizer=bpeN")
    name = Path(path).stem or "run"
    default = {s.name: s.default for s in settings.settings_of(TrainConfig).values()}
    wanted = default | recipe | given
    longer = not given.keys().isdisjoint(("max_iters", "patience"))
    folder, state = run_folder(wanted["out_dir"], name, flags, longer)
    if state is not None:
        recipe = recipe if path else state["recipe"]
        wanted = default | continued(state, default | recipe, default | state["recipe"], given, flags)
    c = settings.build(TrainConfig, wanted)
    c.validate()
    if 0 < c.max_iters <= c.warmup_iters:
        say(f"warmup_iters={c.warmup_iters} is cut to {c.max_iters // 2}, half of the run")
        c.warmup_iters = c.max_iters // 2
    return Plan(c, name, recipe, folder, state)


def run_folder(out_dir: str, name: str, flags: set[str], longer: bool) -> tuple[Path, dict | None]:
    """The folder of a run, and the checkpoint to go on from; `longer`: it may be that of a finished run."""
    if "resume" in flags:
        for folder in [Path(out_dir)] if out_dir else runs_of(name):
            if (folder / "metrics.jsonl").exists():
                state = last_state(folder)
                over = state and finished(state["step"], state["waited"], state["train_config"])
                if out_dir or longer or not over:
                    return folder, state
        what = f"{out_dir} holds no run" if out_dir else f"no unfinished run out/{name}"
        raise ValueError(f"nothing to resume: {what}")
    if out_dir:
        if Path(out_dir, "metrics.jsonl").exists() and "overwrite" not in flags:
            raise ValueError(f"{out_dir} holds a run; --resume goes on with it, --overwrite throws it away")
        return Path(out_dir), None
    folders = (Path("out", f"{name}-{n}" if n > 1 else name) for n in itertools.count(1))
    return next(folder for folder in folders if not folder.exists()), None


def continued(state: dict, recipe: dict, recipe_then: dict, given: dict, flags: set[str]) -> dict:
    """The settings of a run that goes on: its own, but for what is given or was since edited."""
    before = state["train_config"] | state["model_config"]
    del before["model"]
    wanted = before | {k: v for k, v in recipe.items() if v != recipe_then[k]} | given
    changes = {k: f"{k}: {before.get(k)!r} -> {v!r}" for k, v in wanted.items() if v != before.get(k)}
    other = [change for name, change in changes.items() if name not in FREE]
    rows = "batch_size", "gradient_accumulation_steps"
    if math.prod(before[k] for k in rows) != math.prod(wanted[k] for k in rows):
        other.append(" * ".join(rows))
    if other and "override" not in flags:
        raise ValueError(f"these would make it another run: {'; '.join(other)}; --override takes them")
    for change in changes.values():
        say(f"changed for the rest of the run: {change}")
    made, now = state["provenance"], checkpoint.provenance()
    for file in ("model.py", "train.py", "nanostlm/optim.py"):
        if made.get(file) != now.get(file):
            say(f"{file} was changed since this run was saved: the rest may come out differently")
    return wanted


def runs_of(name: str) -> list[Path]:
    """The folders that runs of a recipe chose themselves, the newest first."""
    found = [f for f in Path("out").glob("*") if re.fullmatch(re.escape(name) + r"(-\d+)?", f.name)]
    return sorted(found, key=lambda folder: folder.stat().st_mtime, reverse=True)


def last_state(folder: Path) -> dict | None:
    """The newest checkpoint of a run that is whole, or None where there is none yet."""
    files = [folder / name for name in ("latest.pt", "previous.pt") if (folder / name).exists()]
    for file in files:
        try:
            return checkpoint.read(file) | {"file": file.name}
        except ValueError as error:
            say(f"WARNING: {error}")
    if files:
        raise ValueError(f"no checkpoint in {folder} is whole")
    say(f"{folder} was ended before its first checkpoint: it starts again at step 0")
    return None


# settings of the model that do not hang on its weights
ANY_WEIGHTS = ("dropout", "label_smoothing", "z_loss", "loss_chunk", "block_size")


def begin(c: TrainConfig) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of init_from. c.model and c.tokenizer (the data's folder) become theirs."""
    if c.init_from.startswith("hf:"):
        from nanostlm.formats import hf

        model, tokenizer = hf.from_hf(c.init_from.removeprefix("hf:"))
    else:
        model, tokenizer = checkpoint.load(c.init_from)
    wanted, there, default = asdict(c.model), asdict(model.config), asdict(GPTConfig())
    other = [f"{name}={value}" for name, value in wanted.items()
             if value not in (there[name], default[name]) and name not in ANY_WEIGHTS]  # fmt: skip
    if other:
        raise ValueError(f"{c.init_from} is another model than one with {', '.join(other)}: leave that out")
    c.model = replace(model.config, **{name: wanted[name] for name in ANY_WEIGHTS})
    state = model.state_dict()
    if c.model.position == "learned":
        if c.model.block_size > model.config.block_size:
            raise ValueError(f"block_size={c.model.block_size}, but {c.init_from} has learned only "
                             f"{model.config.block_size} positions")  # fmt: skip
        state["embedder.positions.weight"] = state["embedder.positions.weight"][: c.model.block_size]
    model = GPT(c.model)
    model.load_state_dict(state)
    c.tokenizer = tokenizer.name
    meta = Path(c.data_dir, c.dataset, c.tokenizer, "meta.json")
    own = tokenizer.name not in ("gpt2", "byte")
    if own and not (meta.exists() and tokenizer.sha256 in meta.read_text()):
        c.tokenizer += f"-{tokenizer.sha256[:8]}"  # another vocabulary than that corpus would get
    return model, tokenizer


def load_data(c: TrainConfig, tokenizer: Tokenizer | None = None) -> prepare.Data:
    """
    The data of a run, prepared on the spot if they are not there: with `tokenizer`, or that which c.tokenizer
    names. May change c.dataset to c.fallback.
    """

    def made(name: str, source: str | None, stories: int | None) -> str:
        if not Path(c.data_dir, name, c.tokenizer, "meta.json").exists():
            prepare.prepare(name, c.tokenizer, source, stories, data_dir=c.data_dir, given=tokenizer)
        return name

    def choose() -> tuple[str, int]:
        try:
            return made(c.dataset, c.source or None, c.stories or None), c.stories
        except prepare.Unreachable as error:
            if not c.fallback:
                raise
            line = "!" * 100
            say(f"{line}\n{error}\nTRAINING ON {c.fallback.upper()} INSTEAD, a built-in corpus of made-up "
                f"stories; --fallback= insists on {c.dataset}\n{line}")  # fmt: skip
            return made(c.fallback, None, None), 0

    c.dataset, c.stories = agree(choose)
    data = prepare.load(Path(c.data_dir, c.dataset, c.tokenizer))
    limit = data.meta["limit"] if c.dataset != "toystories" or c.stories else None
    if limit and (not c.stories or c.stories > limit):
        more = f" --stories {c.stories}" if c.stories else ""
        raise ValueError(f"{data.folder} holds only the first {limit:,} stories; for {c.stories or 'all'}: "
                         f"python prepare.py {c.dataset} --tokenizer {c.tokenizer}{more}")  # fmt: skip
    return data


def agree(choose):
    """What `choose()` returns in the first process, for all of them."""
    if not dist.is_initialized():
        return choose()
    box = [choose() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def describe(c: TrainConfig, model: GPT, data: prepare.Data, machine: Machine, iters: int) -> str:
    """The plan of a run in a few lines."""
    sizes, meta, rows = model.num_params(), data.meta, c.batch_size * c.gradient_accumulation_steps
    tokens = rows * c.model.block_size
    share, epochs = sizes["embedding"] / sizes["total"], iters * tokens / len(data.train)
    width = 14 * c.model.n_embd + 3 * c.model.hidden  # numbers that a token leaves behind in a layer
    held = 16 * sizes["total"] + 4 * c.batch_size * c.model.block_size * c.model.n_layer * width
    held += 12 * c.model.loss_chunk * c.model.padded_vocab
    return (
        f"model    {sizes['total'] / 1e6:.2f}M parameters, {share:.0%} of them embeddings; "
        f"{c.model.n_layer} layers, {c.model.n_embd} wide, context {c.model.block_size}\n"
        f"data     {data.folder}: {meta['train']['stories']:,} stories, {len(data.train) / 1e6:.2f}M tokens\n"
        f"batch    {rows} rows x {c.model.block_size} = {tokens:,} tokens a step; "
        f"{iters:,} steps = {iters * tokens / 1e6:.1f}M tokens = {epochs:.2f} epochs\n"
        f"machine  {machine.why}, {'compiled' if machine.compile else 'not compiled'}\n"
        f"needs    about {held / 2**20:,.0f} MB of memory, {44 * sizes['total'] / 2**20:,.0f} MB of disk"
    )


def take_folder(trainer: Trainer, state: dict | None) -> FileLock:
    """
    Make the folder this run's alone, see that its disk has room, and cut metrics.jsonl back to the step of
    `state`. The lock is the system's own: it ends with the process, however that ends.
    """
    folder = trainer.out_dir
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another run is writing to {folder}") from None
    need, free = 44 * trainer.model.num_params()["total"], shutil.disk_usage(folder).free
    if free < need:
        raise OSError(f"checkpoints need {need >> 20:,} MB; the disk of {folder} has {free >> 20:,} MB left")
    lines = lines_until(state, read_metrics(folder), trainer.config.max_iters) if state else []
    old = () if state else ("latest.pt", "previous.pt", "best.pt", "loss.png")
    if state and state["file"] == "previous.pt":  # a damaged latest.pt must not take its place
        old = ("latest.pt",)
    for file in [*folder.glob("*.tmp"), *(folder / name for name in old)]:  # .tmp: a kill while saving
        file.unlink(missing_ok=True)
    trainer.lines = [json.dumps(line) + "\n" for line in lines]
    trainer.write_lines("metrics.tmp", sync=True)
    os.replace(folder / "metrics.tmp", folder / "metrics.jsonl")
    return lock


def lines_until(state: dict, lines: list[dict], max_iters: int) -> list[dict]:
    """
    The lines of metrics up to the step of `state`, without the closing lines of a run that ended there off
    its intervals: if that is still the end, its evaluation is made again; if not, they do not belong there.
    """
    end, every = state["step"], state["train_config"]
    stays = {"val": end % every["eval_interval"] == 0,
             "train": end % every["log_interval"] == 0 or end == 1 or end >= max_iters}  # fmt: skip
    return [x for x in lines if x["step"] < end or x["step"] == end and stays[x["split"]]]


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl; one that a kill tore is left out."""
    file, lines = folder / "metrics.jsonl", []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def plot(runs: dict[Path, list[dict]], floor: float | None) -> None:
    """loss.png: loss against tokens, the run before in grey, and the floor (nats) where it is known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    looks = [{"train": ("tab:blue", "train"), "val": ("tab:orange", "val")},
             {"train": ("0.8", None), "val": ("0.6", "the run before")}]  # fmt: skip
    for lines, look in reversed(list(zip(runs.values(), looks, strict=False))):  # grey lies below
        for split, (color, label) in look.items():
            x, y = ([line[k] for line in lines if line["split"] == split] for k in ("tokens", "loss"))
            axes.plot(x, y, color=color, label=label, linewidth=1 if split == "train" else 2)
    if floor:
        axes.axhline(floor, color="tab:green", linestyle="--", label="floor of the corpus")
    folder = next(iter(runs))
    axes.set(xlabel="tokens", ylabel="loss (nats a token)", title=str(folder))
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def report(trainer: Trainer, name: str) -> None:
    """The end of a run: curve, summary beside the previous run's, stories, and the next command to type."""
    from sample import stories

    c, folder, data = trainer.config, trainer.out_dir, trainer.data
    earlier = [run for run in runs_of(name) if run != folder and (run / "metrics.jsonl").exists()]
    runs = {run: read_metrics(run) for run in [folder, *earlier[:1]]}
    val, floor = data.meta["val"], data.meta.get("floor_bpb")
    size = (val["bytes"] + val["stories"]) / max(1, val["tokens"])  # bytes a token
    plot(runs, floor and floor * math.log(2) * size)
    speed = [line["tokens_per_s"] for line in runs[folder] if line["split"] == "train"]
    seconds = runs[folder][-1]["elapsed_s"] if runs[folder] else 0
    tokens = trainer.step * trainer.tokens_per_step
    say(f"\n{trainer.step:,} updates, {tokens / 1e6:.2f}M tokens = {tokens / len(data.train):.2f} epochs in "
        f"{seconds:.0f} s; {np.median(speed) if speed else 0:,.0f} tokens/s; "
        f"peak memory {trainer.machine.peak_memory():,.0f} MB")  # fmt: skip
    for run, lines in runs.items():
        if found := [line for line in lines if line["split"] == "val"]:
            best = min(found, key=lambda line: line["loss"])
            say(f"best val loss {best['loss']:.4f} nats a token, {best['bpb']:.4f} bits per byte "
                f"(step {best['step']}) in {run}")  # fmt: skip
    if trainer.skipped:
        say(f"{trainer.skipped} updates were left out: their loss or gradient was not finite")
    trainer.model.eval()
    with trainer.averaged():  # in float32: a token at a time, autocast would only cast
        if c.dataset == "toystories":
            for line in evaluate.judge(trainer.model, data):
                say(line)
        for text in stories(trainer.model, data.tokenizer, c.prompt, 3, seed=c.seed):
            say(f"\n{text}")
    say(f'\ncurve: {folder / "loss.png"}\nnext:  python sample.py --out_dir {folder} --prompt "{c.prompt}"')


# ----------------------------------------------------------------------------------------------------------
# The loop


def finished(step: int, waited: int, c: dict) -> bool:
    """Whether a run of these settings has made all its steps, or used up its patience."""
    return step >= c["max_iters"] or 0 < c["patience"] <= waited


def run(trainer: Trainer) -> None:
    """Train to max_iters, or until patience or a signal ends it; what is done is saved."""
    c, step, begun = trainer.config, trainer.step, trainer.step
    quiet = not sys.stderr.isatty() or trainer.machine.rank > 0
    bar = tqdm(total=c.max_iters, initial=step, unit="step", disable=quiet)
    while True:
        if (step % c.eval_interval == 0 or step >= c.max_iters) and trainer.evaluated != step:
            result = trainer.val_step()
            trainer.log(step, result, split="val")
            trainer.judge(step, result)
            say(f"step {step:6,}  val loss {result['loss']:.4f}  {result['bpb']:.4f} bits per byte")
        last = trainer.stop or finished(step, trainer.waited, vars(c))
        if last or (step % c.save_interval == 0 and step > begun) or trainer.save_now:
            trainer.save_checkpoint(step)
        if last:
            break
        result = trainer.train_step(step)
        step += 1
        bar.update()
        if step == 1 or step % c.log_interval == 0 or step == c.max_iters:
            line = trainer.log(step, result)
            loss, speed = line["loss"], line["tokens_per_s"]
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,} tokens/s")
            if quiet and (step == 1 or step % (10 * c.log_interval) == 0):
                left = (c.max_iters - step) * trainer.tokens_per_step / max(1, speed)
                say(f"step {step:6,}  loss {loss:.4f}  {speed:,} tokens/s  {left:.0f} s left")
    bar.close()


def leave(number, frame):
    """A signal before the loop, when there is nothing to save, or after it, when all is saved."""
    signal.signal(number, signal.SIG_DFL)
    say(f"{signal.Signals(number).name}: ended, with no update lost")
    sys.exit(128 + number)


@handling(leave, signal.SIG_IGN)
def main(argv: list[str]) -> int:
    try:
        plan = parse(argv)
        c = plan.config
        machine = choose_machine(c)
        if plan.state and c.compile == "auto":  # what a run was begun with, it goes on with
            machine = machine._replace(compile=plan.state["compiled"])
        set_up(machine, c)
        torch.manual_seed(c.seed)
        model, tokenizer = begin(c) if c.init_from and not plan.state else (None, None)
        data = load_data(c, tokenizer)
        if model is None:
            c.model.vocab_size = data.tokenizer.vocab_size
            model = GPT(c.model)
        iters = c.max_iters or plan.recipe.get("max_iters", TrainConfig.max_iters)
        say(describe(c, model, data, machine, iters))
        if not c.max_iters:
            return 0
        if c.pair_tokens and not (plan.state or c.init_from):
            start_from_pairs(model, torch.from_numpy(data.train[: c.pair_tokens].astype(np.int64)))
        folder = agree(lambda: plan.folder)
        trainer = Trainer(c, model, data, folder, machine)
        trainer.recipe = plan.recipe
        if plan.state:
            trainer.load_checkpoint(plan.state)
        lock = contextlib.nullcontext()
        if machine.rank == 0:  # only now, since it throws away what is not to stay
            lock = take_folder(trainer, plan.state)
        say(f"going on with {folder} at step {trainer.step:,}" if plan.state else f"run      {folder}")
    except (ValueError, FileNotFoundError) as error:
        return fail(error, 2)
    except (OSError, RuntimeError) as error:
        return fail(error, 1)
    trainer.compile()
    try:
        with trainer.signals(), lock:
            run(trainer)
        if machine.rank == 0 and not trainer.stop:
            report(trainer, plan.name)
    except (Diverged, OSError) as error:
        return fail(error, 1)
    except torch.OutOfMemoryError:
        return fail(f"out of memory on {machine.device}: for the same run in less of it, lower --batch_size"
                    f"={c.batch_size} and raise --gradient_accumulation_steps by as much", 1)  # fmt: skip
    if trainer.stop:
        words = [word for word in argv if word.removeprefix("--") not in FLAGS]
        say(f"saved at step {trainer.step:,}; go on with: python train.py {shlex.join(words)} --resume")
        return 128 + trainer.stop
    return 0


def fail(error: Exception | str, status: int) -> int:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
