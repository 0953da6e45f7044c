"""
Train a model: one file, from the settings at the top to main() at the bottom.

    python train.py config/tiny.py                          # prepares the data if they are missing
    python train.py config/tiny.py --max_iters=200          # any setting of TrainConfig or GPTConfig
    python train.py config/tiny.py --resume                 # continue this recipe's newest unfinished run
    torchrun --standalone --nproc_per_node=2 train.py ...   # the same run on two processes

From a notebook: trainer = Trainer(config, model, data), then trainer.train_step(step) and its other methods.
"""

from nanostlm.entry import Requests, lost, script  # first, to handle signals during the other imports
import contextlib
import math
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import experiments
from model import GPTConfig, check_settings
from nanostlm import checkpoint, machine, optim, report, runs, score, settings, sources
from nanostlm.data import Batches, Data, check_not_truncated, folder_name, load_data
from nanostlm.machine import print0
from nanostlm.schema import NAME, check
from nanostlm.tokenizer import Tokenizer, from_state

# ----------------------------------------------------------------------------------------------------------
# Settings


@dataclass(frozen=True)
class TrainConfig:
    # -- everyday
    dataset: str = "tinystories"  # a folder under data_dir; prepared by prepare.py, or automatically
    architecture: str = "gpt"  # gpt (model.py), or NAME for experiments/NAME.py with its own settings
    objective: str = ""  # empty = predict the next token; or NAME for experiments/NAME.py, as above
    tokenizer: str = "bpe4096"  # gpt2 | byte | bpeN (a vocabulary of N ids)
    stories: int = 0  # train on the first N training stories of the dataset; 0 = all
    out_dir: str = ""  # run directory; empty = out/RECIPE, then out/RECIPE-2, ...
    max_iters: int = 1000  # updates of the weights; 0 = print the plan and exit
    eval_interval: int = 250  # updates between evaluations
    log_interval: int = 10  # updates between lines in metrics.jsonl
    save_interval: int = 250  # updates between checkpoints
    sample_interval: int = 0  # updates between short samples of the model; 0 = off
    batch_size: int = 16  # sequences per micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches per update, over all processes
    learning_rate: float = 1e-3  # AdamW's peak learning rate
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: str = "auto"  # auto | bfloat16 | float16 | float32; autocast dtype; weights stay float32
    compile: str = "auto"  # auto | True | False; auto compiles only long runs on CUDA
    seed: int = 1337  # random seed of initialization, data order and dropout
    # -- data
    data_dir: str = "data"  # holds DATASET/TOKENIZER/{train.bin,val.bin,meta.json}
    source: str = ""  # source of a dataset that is not prepared yet: a path or a Hub id
    fallback: str = ""  # dataset to use if this one is unreachable
    story_windows: bool = False  # document alignment: windows of block_size begin where stories do
    context_schedule: str = ""  # fraction of the run: fraction of block_size, "0:0.25, 0.5:1"; empty = off
    pair_tokens: int = 0  # bigram initialization from this many training tokens; 0 = off
    cross_stories: bool = True  # False: document masking, no attention to the previous story
    eval_tokens: int = 0  # tokens of the validation file that an evaluation reads; 0 = all
    # -- optimizer
    optimizer: str = "adamw"  # adamw | muon (for the matrices of the blocks, AdamW for the rest)
    muon_lr: float = 0.01  # Muon's peak learning rate, scaled to AdamW's update size
    muon_momentum: float = 0.95  # Muon's momentum
    embedding_lr: float = 0.0  # the embedding's own learning rate; 0 = learning_rate
    head_lr: float = 0.0  # the untied head's own learning rate; 0 = learning_rate
    schedule: str = "cosine"  # cosine | linear | wsd | constant
    warmup_iters: int = 100  # updates of linear warmup
    lr_decay_iters: int = 0  # update at which the learning rate reaches min_lr; 0 = max_iters
    decay_share: float = 0.2  # schedule=wsd: fraction of the run with a decaying learning rate
    min_lr: float = 0.0  # final learning rate; other groups are scaled alike
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # AdamW's beta1
    beta2: float = 0.95  # AdamW's beta2
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = off
    dropout_schedule: str = ""  # dropout by update, linear between points: "0:0.0, 500:0.1"; empty = dropout
    # -- run
    patience: int = 0  # stop after this many evaluations without a new best; 0 = never
    init_from: str = ""  # weights and tokenizer to start from: a checkpoint, or hf:FOLDER_OR_ID
    logger: str = ""  # tensorboard | wandb, besides metrics.jsonl
    threads: int = 0  # CPU threads of a process; 0 = OMP_NUM_THREADS or all cores, shared by the processes
    prompt: str = "Once upon a time"  # prompt for the final samples
    model: GPTConfig = field(default_factory=GPTConfig)

    def validate(self) -> None:
        """Raise a one-line ValueError if the settings are invalid."""
        check_settings(self, RANGES, CHOICES)
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}")
        if self.dropout_schedule:
            optim.points("dropout_schedule", self.dropout_schedule)
            if self.compile == "True":
                raise ValueError("leave out dropout_schedule: compile=True would compile for each dropout")
        self.model.validate()
        experiments.check(self)
        self.stages()

    def stages(self) -> list[tuple[int, int]]:
        """context_schedule as pairs (first update, window length)."""
        iters = self.lr_decay_iters or self.max_iters
        return optim.window_stages(self.context_schedule, iters, self.model.block_size)


RANGES = {  # the lowest and the highest value of the settings that are numbers; of others 0 and 10**9
    **dict.fromkeys(("eval_interval", "log_interval", "save_interval"), (1, 10**9)),
    **dict.fromkeys(("batch_size", "gradient_accumulation_steps"), (1, 10**9)),
    **dict.fromkeys(("muon_lr", "embedding_lr", "head_lr", "min_lr"), (0, 10**6)),
    **dict.fromkeys(("beta1", "beta2", "muon_momentum"), (0, 0.999999)),
    "learning_rate": (1e-12, 10**6),
    "decay_share": (0, 1),
    "seed": (0, 2**63 - 1),
    "threads": (0, 512),
}
CHOICES = {
    "dtype": ["auto", *machine.DTYPES],
    "compile": ["auto", "True", "False"],
    "schedule": optim.SCHEDULES,
    "optimizer": ["adamw", "muon"],
    "logger": ["", "tensorboard", "wandb"],
}

# Settings that may change on resume, and are then printed; others would make it a different run. Changing
# dtype or loss_chunk changes rounding.
MAY_CHANGE = (
    *("max_iters", "eval_interval", "log_interval", "save_interval", "sample_interval", "batch_size"),
    *("patience", "prompt", "gradient_accumulation_steps", "device", "dtype", "compile", "threads"),
    *("logger", "loss_chunk", "out_dir", "data_dir", "source", "fallback"),
)
FLAGS = {
    "resume": "continue the run in out_dir, or this recipe's newest unfinished one",
    "overwrite": "discard the run in out_dir and start again",
    "override": "with --resume: accept changed settings that make it a different run",
}

RESOLVED = {  # settings that follow from others
    "vocab_size": "comes from the tokenizer; choose one with --tokenizer=bpeN",
    "separator": "comes from the tokenizer; for document masking set cross_stories=False",
}

# ----------------------------------------------------------------------------------------------------------
# From the command line to a configuration, data and weights


class Plan(NamedTuple):
    """The resolved command line."""

    config: TrainConfig
    machine: machine.Machine
    data: Data
    folder: Path
    name: str  # of the recipe
    recipe: dict[str, Any]  # its settings
    state: dict | None  # the checkpoint to resume from
    weights: nn.Module | None  # the model to start from


def configure(argv: list[str]) -> Plan:
    """
    Recipe, command line, an earlier run (--resume) or model (init_from), and the data -> the final
    configuration. Prepares the data if necessary. ValueError with one clear line if something does not fit.
    """
    about = "Train a model."
    kind, goal = (settings.peek(argv, name) for name in ("architecture", "objective"))
    cls = settings.with_parts(TrainConfig, model=experiments.architecture(kind or "gpt")[0])
    if goal:
        cls = settings.with_parts(cls, objective_config=experiments.objective(goal)[0])
    path, recipe, given, flags = settings.command_line(cls, argv, FLAGS, about, RESOLVED)
    name = Path(path).stem or "run"
    defaults = {s.name: s.default for s in settings.settings_of(cls).values()}
    extended = not given.keys().isdisjoint(("max_iters", "patience"))
    values = defaults | recipe | given
    folder, state = runs.find(values, name, flags, extended)
    if state:  # these decide which other settings there are
        before = checkpoint.flat_settings(state)
        own = {"architecture": (kind, state["architecture"]), "objective": (goal, before.get("objective"))}
        more = [f"--{name}={old}" for name, (new, old) in own.items() if not new and old and old != "gpt"]
        if more:
            return configure([*argv, *more])
    if state is not None:
        before = defaults | state["recipe"]
        recipe = recipe if path else state["recipe"]
        override = "override" in flags
        values = runs.resumed_settings(state, defaults | recipe, before, given, MAY_CHANGE, override)
    c = settings.build(cls, values)
    c.validate()
    settings.check_path("data_dir", c.data_dir, "folder")
    settings.check_path("out_dir", c.out_dir or None, "folder")
    if 0 < c.max_iters <= c.warmup_iters:
        print0(f"warmup_iters={c.warmup_iters} is cut to {c.max_iters // 2}, half of the run")
        c = replace(c, warmup_iters=c.max_iters // 2)

    compiles = c.compile if getattr(c.model, "compiles", True) and not c.dropout_schedule else "False"
    compiles = "False" if c.objective else compiles
    chosen = machine.choose(c.device, c.dtype, compiles, c.max_iters, state["machine"] if state else "")
    if state and c.compile == "auto":  # a run continues the way it began
        chosen = chosen._replace(compile=state["compiled"])
    if state is None and "loss_chunk" not in recipe | given:
        c = replace(c, model=settings.update(c.model, loss_chunk=chosen.loss_chunk()))
    chosen.set_up(c.threads)

    weights, tokenizer = None, None
    if c.init_from and state is None:
        weights, tokenizer = load_weights(c)
        folder_of_data = folder_name(c.data_dir, c.dataset, tokenizer)
        c = replace(c, model=weights.config, tokenizer=folder_of_data)
    elif c.init_from:
        tokenizer = from_state(state["tokenizer"])
    c, data = find_data(c, tokenizer)
    special = experiments.objective(c.objective)[1].special if c.objective else ()
    data = data._replace(tokenizer=(tokenizer or data.tokenizer).with_special(special))
    vocab_size, eot = data.tokenizer.vocab_size, data.tokenizer.eot
    separator = -1 if c.cross_stories else eot
    c = replace(c, model=settings.update(c.model, vocab_size=vocab_size, separator=separator))
    folder = machine.from_rank0(lambda: folder)
    return Plan(c, chosen, data, folder, name, recipe, state, weights)


def load_weights(c: TrainConfig) -> tuple[nn.Module, Tokenizer]:
    """The model and tokenizer of init_from; settings of `c` that do not affect the weights are applied."""
    if c.init_from.startswith("hf:"):
        from nanostlm.formats.hf import from_hf

        model, tokenizer = from_hf(c.init_from.removeprefix("hf:"))
    else:
        model, tokenizer = checkpoint.load(c.init_from)
    return checkpoint.adapt(model, c.model, c.init_from), tokenizer


def find_data(c: TrainConfig, tokenizer: Tokenizer | None) -> tuple[TrainConfig, Data]:
    """
    The data of a run, prepared first if they are missing: with `tokenizer`, or the one that c.tokenizer
    names. If the dataset is unreachable and has a fallback, the configuration names that instead.
    """
    from prepare import prepare_missing

    if tokenizer is not None:  # the files have no special tokens
        tokenizer = Tokenizer(tokenizer.name, tokenizer.tokens[: tokenizer.eot])
    asked = c.dataset, c.tokenizer, c.source, c.stories, c.data_dir
    dataset = machine.from_rank0(lambda: prepare_missing(*asked, tokenizer, c.fallback))
    check({"dataset": dataset, "tokenizer": c.tokenizer}, {"dataset": NAME, "tokenizer": NAME})
    data = load_data(Path(c.data_dir, dataset, c.tokenizer), c.stories)
    limit = data.meta.get("limit") if c.stories or not sources.corpus(dataset).generate else None
    if limit and (not c.stories or c.stories > limit):
        more = f" --stories {c.stories}" if c.stories else ""
        raise ValueError(
            f"{data.folder} holds only the first {limit:,} stories; for {c.stories or 'all'}: "
            f"python prepare.py {shlex.quote(dataset)} --tokenizer {shlex.quote(c.tokenizer)}{more}"
        )
    return replace(c, dataset=dataset), data


def build_model(plan: Plan) -> nn.Module:
    """Build the model of the plan and load its initial weights."""
    c = plan.config
    torch.manual_seed(c.seed)
    model = experiments.architecture(c.architecture)[1](c.model)
    if plan.weights is not None:
        model.load_state_dict(checkpoint.grown(plan.weights, model.state_dict()))
    elif c.pair_tokens and plan.state is None:
        from nanostlm.variants import bigram_init

        if plan.machine.rank == 0:
            bigram_init(model, torch.from_numpy(plan.data.train[: c.pair_tokens].astype(np.int64)))
        machine.broadcast(model.to(plan.machine.device))
    return model


# ----------------------------------------------------------------------------------------------------------
# The trainer


class Diverged(RuntimeError):
    """Several consecutive updates were not finite."""


class Trainer:
    """
    Everything a run needs except its loop. Steps count finished updates: train_step(0) makes the first.

        trainer = Trainer(config, model, data, out_dir="out/mine")
        for step in range(config.max_iters):
            trainer.log(step + 1, trainer.train_step(step))
        trainer.log(config.max_iters, trainer.val_step(), split="val")
        trainer.save_checkpoint(config.max_iters)
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        data: Data,
        out_dir: str | Path | None = None,
        chosen: machine.Machine | None = None,
        recipe: dict[str, Any] | None = None,
    ):
        config.validate()
        self.config, self.data, self.recipe = config, data, recipe or {}
        c = config
        self.machine = chosen or machine.choose(c.device, c.dtype, c.compile, c.max_iters)
        self.batches = Batches(
            data.train,
            data.tokenizer.eot,
            block_size=c.model.block_size,
            batch_size=c.batch_size,
            gradient_accumulation_steps=c.gradient_accumulation_steps,
            seed=c.seed,
            stages=c.stages(),
            align=c.story_windows,
            rank=self.machine.rank,
            world_size=self.machine.world_size,
        )
        self.tokens_per_step = self.batches.tokens_per_step
        self.windows = machine.WindowReader(data.train, self.machine)
        self.model = model.to(self.machine.device)
        self.forward = self.model  # compiled or not; the weights are always those of self.model
        self.parallel: torch.nn.Module | None = None  # computes the loss, averages gradients over processes
        self.objective: experiments.Objective | None = None
        if c.objective:
            self.objective = experiments.objective(c.objective)[1](c, self.model, data)
            self.objective.prepare_model(self.model)
        self.optimizers = optim.build(self.model, c)
        self.scaler = torch.amp.GradScaler(self.machine.device.type, enabled=self.machine.needs_scaler)
        self.dropout = optim.points("dropout_schedule", c.dropout_schedule) if c.dropout_schedule else None
        self.progress = runs.Progress()
        self.unread: tuple[int, torch.Tensor] | None = None  # step and outcome of the last update
        self.skipped_in_a_row = 0
        self.requests = Requests()  # from signals to this process
        self.stop = 0  # the signal that ends the run, the same in all processes
        self.directory = runs.RunDirectory(out_dir) if out_dir else None
        self.logger = report.logger(c, self.directory.folder) if out_dir and not self.machine.rank else None
        self.token_bytes = score.token_bytes(data.tokenizer)
        self.fingerprint = runs.fingerprint(data.train, data.val)
        self.architecture = experiments.name_of(model)
        self.provenance = checkpoint.provenance(self.architecture, c.objective)
        self.began, self.joules_before = time.perf_counter(), self.machine.joules()
        self.timed = [0, 0.0]  # tokens and seconds since the last logged step

    # -- one update

    def train_step(self, step: int) -> dict[str, float | torch.Tensor]:
        """
        Make one update from the batch of `step`. -> loss (nats per token, whole batch), lr, grad_norm. Loss
        and norm stay on the device: reading one waits for the update.
        """
        c, began = self.config, time.perf_counter()
        lr = optim.schedule(c, step)
        optim.set_lr(self.optimizers, lr)
        if self.dropout:
            optim.set_dropout(self.model, optim.interpolate(self.dropout, step))
        self.model.train()
        if self.parallel is None:
            forward, own = self.forward, self.objective
            self.parallel = machine.data_parallel(experiments.Minimized(own, forward) if own else forward)
        n, parts = self.batches.micro_batches, {}  # of the loss, over the micro-batches
        for micro, (idx, targets) in enumerate(self.micro_batches(step)):
            if c.model.dropout or self.dropout:  # dropout depends on the step only, so that a resume is exact
                words = np.random.SeedSequence([c.seed, step, micro, self.machine.rank]).generate_state(2)
                torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
            last = micro == n - 1
            with self.machine.autocast(), machine.averaging(self.parallel, last):
                found, loss = self.parallel(idx, targets, *([step] if self.objective else []))
            loss = loss / n  # of as many targets each: the mean of the means
            self.scaler.scale(loss).backward()
            found = {key: x / n for key, x in found.items()} if self.objective else {"loss": loss}
            parts = {key: parts.get(key, 0.0) + x.detach() for key, x in found.items()}
        machine.average_gradients(self.model)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.grad_clip or math.inf)
        self.read_outcome()
        parts = {"loss": parts.pop("loss"), "grad_norm": norm} | parts
        outcome = machine.agree(torch.stack([*parts.values()]), self.requests.ending)
        means = dict(zip(parts, outcome, strict=False))  # votes follow
        self.update(outcome[:2].isfinite().all())
        self.unread = step, torch.cat((outcome[:2], outcome[len(parts) :]))
        if self.machine.world_size == 1:
            self.stop = self.requests.ending
        self.progress.step = step + 1
        self.timed = [self.timed[0] + self.tokens_per_step, self.timed[1] + time.perf_counter() - began]
        return {"loss": means.pop("loss"), "lr": c.learning_rate * lr} | means

    def micro_batches(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This process' micro-batches of `step`: idx and targets, int64 (rows, length), on the device."""
        if self.objective and (own := self.objective.batch(step)) is not None:
            yield from own
            return
        starts, length = self.batches.windows(step)
        for rows in starts:
            tokens = self.windows(rows, length + 1)
            yield tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def update(self, finite: torch.Tensor) -> None:
        """Step the optimizers if loss and gradient are finite; the device decides, or in fp16 the host."""
        for optimizer in self.optimizers:
            if not self.scaler.is_enabled():
                optimizer.found_inf = 1 - finite.float()
                optimizer.step()
            elif finite:
                self.scaler.step(optimizer)
        self.scaler.update()  # lowers its scale after an overflow
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def read_outcome(self) -> None:
        """
        Read how the last update went, a step late, so that the host does not wait for the device: count it if
        it was skipped, raise Diverged after five in a row, and see whether a process got a signal.
        """
        if self.unread is None:
            return
        (step, outcome), self.unread = self.unread, None
        loss, norm, *votes = outcome.tolist()
        self.stop = machine.signal_of(votes) if votes else self.stop
        if math.isfinite(norm) and math.isfinite(loss):
            self.skipped_in_a_row = 0
        elif not (self.machine.needs_scaler and math.isfinite(loss)):  # the GradScaler skips overflows
            self.progress.skipped += 1
            self.skipped_in_a_row += 1
            print0(f"update {step} skipped: loss {loss}, gradient norm {norm}")
            if self.skipped_in_a_row >= 5:
                lr = self.config.learning_rate * optim.schedule(self.config, step)
                raise Diverged(
                    f"{self.skipped_in_a_row} updates in a row were not finite: step {step}, loss {loss}, "
                    f"gradient norm {norm}, learning rate {lr:.3g}. The last good checkpoint is kept; "
                    "a lower --learning_rate or more --warmup_iters usually helps"
                )

    def compile(self) -> None:
        """Compile the model for every shape of the run, if the machine is to."""
        if self.machine.compile:
            steps = {
                max(first, self.progress.step) for first, _ in self.config.stages()
            }  # every window length
            batches = (next(self.micro_batches(step)) for step in steps)
            shape = self.config.batch_size, self.config.model.block_size  # in val_step
            self.forward = self.machine.compiled_for(self.model, batches, shape)

    # -- evaluation

    def val_step(self) -> dict[str, float]:
        """Loss (nats per token) and bits per byte of the validation file."""
        c, part = self.config, (self.machine.rank, self.machine.world_size)
        ids = self.data.val[: c.eval_tokens or None]
        check_not_truncated(ids)
        self.model.eval()
        with self.machine.autocast():
            eot, T, device = self.data.tokenizer.eot, c.model.block_size, self.machine.device
            found = score.total(
                self.forward, [ids], eot, rows=c.batch_size, block_size=T, device=device, part=part
            )
        sums = torch.tensor(found, dtype=torch.float64)
        if self.machine.world_size > 1:
            sums = sums.to(self.machine.device)
            torch.distributed.all_reduce(sums)
        nats, count = sums.tolist()
        return {"loss": nats / count, "bpb": score.bits_per_byte(nats, int(self.token_bytes[ids].sum()))}

    def keep_best(self, step: int, result: dict[str, float]) -> None:
        """
        Save the weights as best.pt if this evaluation is the best so far. A final evaluation off the
        interval counts for best.pt only: a run that is extended later continues as if it had not ended.
        """
        progress, best = self.progress, result["loss"] < self.progress.best
        wanted = step or self.config.patience  # only patience can leave a run at its first evaluation
        if best and wanted and self.directory and self.machine.rank == 0:
            self.directory.save("best.pt", self.inference_state(step) | {"val": result})
        if step % self.config.eval_interval == 0:
            progress.evaluated = step
            progress.evals_since_best = 0 if best else progress.evals_since_best + 1
            progress.best = result["loss"] if best else progress.best

    # -- metrics and checkpoints

    def log(self, step: int, result: dict[str, float], split: str = "train") -> dict[str, float]:
        """Add a line to metrics.jsonl and return it."""
        line = {"step": step, "split": split, **{name: float(value) for name, value in result.items()}}
        line["tokens"] = step * self.tokens_per_step
        line["elapsed_s"] = round(self.elapsed, 3)
        if split == "train":
            tokens, seconds = self.timed
            line["tokens_per_s"] = round(tokens / seconds) if seconds else 0
            self.timed = [0, 0.0]
        if self.directory and self.machine.rank == 0:
            self.directory.log(line)
        if self.logger:
            self.logger(line)
        return line

    @property
    def elapsed(self) -> float:
        """Seconds of this run, over all resumes."""
        return self.progress.elapsed + time.perf_counter() - self.began

    @property
    def joules(self) -> float:
        """Energy of this run, over all resumes; nan where the machine does not report it."""
        return self.progress.joules + self.machine.joules() - self.joules_before

    def description(self) -> dict[str, Any]:
        """Settings, data and versions of this run as plain data."""
        known = {"settings": asdict(self.config), "data": self.fingerprint, "provenance": self.provenance}
        return known | {"machine": self.machine.description}

    def inference_state(self, step: int) -> dict[str, Any]:
        """All that inference needs: weights, configuration, tokenizer; and provenance."""
        return {
            "model": self.model.state_dict(),
            "architecture": self.architecture,
            "model_config": asdict(self.config.model),
            "step": step,
            "train_config": asdict(self.config),
            "tokenizer": self.data.tokenizer.state(),
            "provenance": self.provenance,
        }

    def save_checkpoint(self, step: int) -> None:
        """Write latest.pt with the full training state; the previous one becomes previous.pt."""
        self.read_outcome()
        self.requests.save = False
        if not self.directory or self.machine.rank:
            return
        state = self.inference_state(step) | {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "progress": asdict(replace(self.progress, step=step, elapsed=self.elapsed, joules=self.joules)),
            "data": self.fingerprint,
            "recipe": self.recipe,
            "compiled": self.forward is not self.model,
            "machine": self.machine.description,
        }
        if self.objective:
            state["objective"] = self.objective.state_dict()
        self.directory.save("latest.pt", state, previous="previous.pt")

    def load_checkpoint(self, state: dict) -> int:
        """Continue from what checkpoint.read returned. -> the number of finished updates."""
        if state["data"] != self.fingerprint:
            raise ValueError(
                f"the files in {self.data.folder} differ from the data that this run was started with"
            )
        try:
            checkpoint.fit(state["model"], self.model.state_dict())
            self.model.load_state_dict(state["model"])
            optim.load_states(self.optimizers, state["optimizers"], checkpoint.fit)
            if state["scaler"]:  # empty if the run used no GradScaler
                self.scaler.load_state_dict(state["scaler"])
            if self.objective:
                self.objective.load_state_dict(state["objective"])
        except (RuntimeError, ValueError, KeyError) as error:  # shapes and parameter groups cannot change
            raise ValueError(f"the checkpoint does not fit these settings: {error}") from error
        self.progress = runs.Progress(**state["progress"])
        if state["machine"] != self.machine.description:  # dtype or device may differ
            print0(f"previous steps ran on {state['machine']}")
        if self.progress.step:
            optim.set_lr(self.optimizers, optim.schedule(self.config, self.progress.step - 1))  # as saved
        return self.progress.step


# ----------------------------------------------------------------------------------------------------------
# The loop


def train(trainer: Trainer) -> None:
    """Train to max_iters, or until patience or a signal ends the run, and save."""
    c, progress, first = trainer.config, trainer.progress, trainer.progress.step
    with report.Console(trainer) as console:
        while True:
            step = progress.step
            if (step % c.eval_interval == 0 or step >= c.max_iters) and progress.evaluated != step:
                val = trainer.val_step()
                console.show(trainer.log(step, val, split="val"))
                trainer.keep_best(step, val)
            if c.sample_interval and step % c.sample_interval == 0 and step < c.max_iters:
                console.sample(trainer)
            done = trainer.stop or progress.finished(c.max_iters, c.patience)
            if done or trainer.requests.save or step % c.save_interval == 0 and step > first:
                trainer.save_checkpoint(step)
            if done:
                if not trainer.stop and step < c.max_iters:
                    print0(
                        f"stopped at step {step:,}: no better evaluation in the last {c.patience} (patience)"
                    )
                break
            result = trainer.train_step(step)
            console.bar.update()
            if step == 0 or (step + 1) % c.log_interval == 0 or step + 1 == c.max_iters:
                console.show(trainer.log(step + 1, result))


def run(plan: Plan, argv: list[str]) -> Trainer:
    """Start or continue the run of a plan, up to its end or a signal; argv goes into its config.json."""
    c, rank = plan.config, plan.machine.rank
    plan.machine.check_run(c)
    trainer = Trainer(c, build_model(plan), plan.data, plan.folder, plan.machine, plan.recipe)
    if plan.state:
        trainer.load_checkpoint(plan.state)
    disk, claim = report.CHECKPOINT_BYTES * c.model.estimate()["parameters"], contextlib.nullcontext()
    if rank == 0:  # as late as possible, because it deletes the files of an earlier run
        claim = trainer.directory.claim(disk, plan.state, c.max_iters)
    with claim:
        if rank == 0:
            trainer.directory.write_config(trainer.description() | {"command": ["train.py", *argv]})
        resumed = f"resuming {plan.folder} at step {trainer.progress.step:,}"
        print0(resumed if plan.state else f"run      {plan.folder}")
        trainer.compile()
        try:
            with trainer.requests.handle(), machine.lost_processes():
                train(trainer)
        except torch.OutOfMemoryError:
            raise RuntimeError(
                f"out of memory on {plan.machine.device}: for the same run with less memory, lower "
                f"--batch_size={c.batch_size} and raise --gradient_accumulation_steps by as much"
            ) from None
    return trainer


@script
def main(argv: list[str]) -> int:
    plan = configure(argv)
    c, iters = plan.config, plan.config.max_iters or plan.recipe.get("max_iters", TrainConfig.max_iters)
    print0(report.plan(c, plan.data, plan.machine, iters))
    if not c.max_iters:
        return 0
    trainer = run(plan, argv)
    step, stop = trainer.progress.step, trainer.stop or trainer.requests.stop
    if stop:
        words = [word for word in argv if word not in [f"--{flag}" for flag in FLAGS]]
        more = "continue with: " + shlex.join(["python", "train.py", *words, "--resume"])
        more = "the run is finished" if trainer.progress.finished(c.max_iters, c.patience) else more
        print0(f"saved at step {step:,}; {more}")
    elif plan.machine.rank == 0:
        report.final(trainer, plan.name)
    if lost and not trainer.requests.stop:
        raise RuntimeError(f"{next(iter(lost.values()))}; the run is saved at step {step:,}")
    return 128 + stop if stop else 0


if __name__ == "__main__":
    sys.exit(main())
