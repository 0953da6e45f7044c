"""
What tests share: micro settings, trainers on random data, comparisons to the last bit, programs to start.

`Program` runs train.main in a process forked from one that has already imported torch, so that a start costs
milliseconds instead of seconds. It is what tests start, signal and kill.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import train
from model import GPT
from nanostlm import checkpoint, machine, report, settings, tokenizer
from nanostlm import data as datasets
from train import TrainConfig, Trainer

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = ("elapsed_s", "tokens_per_s")
MICRO = dict(
    dataset="mini",
    tokenizer="byte",
    n_layer=2,
    n_head=2,
    n_embd=16,
    block_size=16,
    batch_size=4,
    learning_rate=0.01,
    warmup_iters=2,
    max_iters=24,
    eval_interval=6,
    save_interval=5,
    log_interval=2,
    eval_tokens=100,
    device="cpu",
    dtype="float32",
    compile="False",
    threads=1,
)

# ----------------------------------------------------------------------------------------------------------
# Configurations, data, trainers


def config(**changes) -> TrainConfig:
    """A configuration of a micro run on bytes."""
    return settings.build(TrainConfig, MICRO | {"vocab_size": 257} | changes)


def numbers(tokens: int = 700, seed: int = 0) -> datasets.Data:
    """Data of random ids, with an end-of-text now and then."""
    rng = np.random.default_rng(seed)
    bins = [np.where(rng.random(n) < 0.1, 256, rng.integers(0, 256, n)).astype("<u2") for n in (tokens, 90)]
    meta = {"corpus": "numbers", "limit": None}
    return datasets.Data(*bins, meta, tokenizer.get("byte"), Path("nowhere"))


def trainer(data: datasets.Data | None = None, out_dir=None, weights=torch.float32, **changes) -> Trainer:
    """A trainer of a micro model on `data`, random by default."""
    data = data or numbers()
    if changes.pop("cross_stories", True) is False:
        changes |= {"cross_stories": False, "separator": data.tokenizer.eot}
    c = config(**changes)
    torch.manual_seed(c.seed)
    return Trainer(c, GPT(c.model).to(weights), data, out_dir)


def batches(c: TrainConfig, data: datasets.Data, rank: int = 0, world_size: int = 1, **changes):
    """The training windows that a trainer of this configuration reads."""
    values = dict(
        block_size=c.model.block_size,
        batch_size=c.batch_size,
        seed=c.seed,
        align=c.story_windows,
        gradient_accumulation_steps=c.gradient_accumulation_steps,
        rank=rank,
        world_size=world_size,
    )
    return datasets.Batches(data.train, data.tokenizer.eot, **values | changes)


def gradients(t: Trainer, step: int = 0) -> list[torch.Tensor]:
    """The gradient of the batch of `step`; no update is made."""
    t.update = lambda *args: None
    t.train_step(step)
    del t.update
    found = [p.grad.clone() for p in t.model.parameters()]
    t.model.zero_grad()
    return found


def apart(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The largest difference, as a share of the largest magnitude."""
    most = max(x.abs().max().item() for x in a)
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True)) / most


# ----------------------------------------------------------------------------------------------------------
# Results


def same(a, b) -> bool:
    """Whether nested lists, dicts and tensors are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a and b != b)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def lines(folder, split: str | None = None) -> list[dict]:
    """metrics.jsonl without what a clock measures. Every line must be whole."""
    found = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in CLOCKS} for line in found if split in (None, line["split"])
    ]


def kept(folder, name: str = "latest.pt") -> dict:
    """What a checkpoint holds of the training itself: no clocks, no settings."""
    state = checkpoint.read(Path(folder, name))
    state |= {k: v for k, v in state.pop("progress", {}).items() if k != "elapsed"}
    return {k: v for k, v in state.items() if k not in ("provenance", "recipe", "train_config")}


# ----------------------------------------------------------------------------------------------------------
# Command lines and programs


def words(corpus, **changes) -> list[str]:
    """The command line of a micro run."""
    return [f"--{key}={value}" for key, value in ({"data_dir": corpus} | MICRO | changes).items()]


def recipe(name: str, **values) -> str:
    """Write a recipe of micro settings and return its path."""
    path = Path(f"{name}.py")
    path.write_text("\n".join(f"{key} = {value!r}" for key, value in (MICRO | values).items()))
    return str(path)


def typed(*argv, cwd, status: int = 0) -> subprocess.CompletedProcess:
    """Run a program in a process of its own, as a user types it."""
    command = [sys.executable, *map(str, argv)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "train", "sample", "helpers"])


def child(argv: list[str], folder: str, env: dict[str, str], hook, output: str) -> None:
    """In the new process: `train.py argv` in `folder`, its output in a file, hook() called first."""
    try:
        os.chdir(folder)
        os.environ.update(env)
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        torch.set_num_threads(1)
        report.final = lambda trainer, name: None  # the curve and the stories have tests of their own
        if hook:
            hook[0](*hook[1:])
        status = train.main(argv)
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


class Program:
    """train.main(argv) in another process. `hook`: a function and its arguments, called there first."""

    count = 0

    def __init__(self, argv: list[str], folder: Path, env: dict[str, str] | None = None, hook: tuple = ()):
        Program.count += 1
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # of the fork server
        self.output = Path(folder, f".output-{Program.count}")
        args = [str(word) for word in argv], str(folder), env or {}, hook, str(self.output)
        self.process = FORKS.Process(target=child, args=args, daemon=True)  # ends with this process
        self.process.start()

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""

    def wait(self, seconds: float = 60) -> int:
        """Its exit status; that of a signal is negative. Kills it after so many seconds."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self.text}")
        return self.process.exitcode

    def until(self, pattern: str, seconds: float = 60) -> None:
        """Wait until its output contains `pattern`."""
        end = time.monotonic() + seconds
        while pattern not in self.text:
            if self.process.exitcode is not None or time.monotonic() > end:
                raise TimeoutError(f"{pattern!r} never came, status {self.process.exitcode}:\n{self.text}")
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process.is_alive():
            self.signal(signal.SIGKILL)
        self.process.join()


def cpu(dtype=torch.float32, rank: int = 0, world_size: int = 1) -> machine.Machine:
    """A CPU in tests that choose no machine."""
    return machine.Machine(torch.device("cpu"), dtype, False, "", rank, world_size)
