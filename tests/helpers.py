"""
What tests share: micro settings, trainers on random data, bitwise comparison, scripts in other processes.

`Program` runs train.main in a process forked from one that has already imported torch, so that it starts in
milliseconds instead of seconds. Tests of signals and kills use it.
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
TIMING_KEYS = ("elapsed_s", "tokens_per_s")
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
    """The configuration of a micro run with the byte tokenizer."""
    return settings.build(TrainConfig, MICRO | {"vocab_size": 257} | changes)


def random_data(tokens: int = 700, seed: int = 0) -> datasets.Data:
    """Data of random ids, one in ten of them end-of-text."""
    rng = np.random.default_rng(seed)
    bins = [np.where(rng.random(n) < 0.1, 256, rng.integers(0, 256, n)).astype("<u2") for n in (tokens, 90)]
    meta = {"corpus": "random", "limit": None}
    return datasets.Data(*bins, meta, tokenizer.get("byte"), Path("nowhere"))


def trainer(data: datasets.Data | None = None, out_dir=None, weights=torch.float32, **changes) -> Trainer:
    """A trainer of a micro model on `data` (default: random_data())."""
    data = data or random_data()
    if changes.pop("cross_stories", True) is False:
        changes |= {"cross_stories": False, "separator": data.tokenizer.eot}
    c = config(**changes)
    torch.manual_seed(c.seed)
    return Trainer(c, GPT(c.model).to(weights), data, out_dir)


def batches(c: TrainConfig, data: datasets.Data, rank: int = 0, world_size: int = 1, **changes):
    """The Batches that a trainer of this configuration uses."""
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
    """The gradients of the batch of `step`, without an update."""
    t.update = lambda *args: None
    t.train_step(step)
    del t.update
    grads = [p.grad.clone() for p in t.model.parameters()]
    t.model.zero_grad()
    return grads


def max_difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The largest absolute difference, relative to the largest magnitude in `a`."""
    scale = max(x.abs().max().item() for x in a)
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True)) / scale


# ----------------------------------------------------------------------------------------------------------
# Results


def bit_equal(a, b) -> bool:
    """Whether nested lists, dicts and tensors are bitwise equal."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(bit_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(bit_equal, a, b))
    return type(a) is type(b) and (a == b or a != a and b != b)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def metrics(folder, split: str | None = None) -> list[dict]:
    """The lines of metrics.jsonl, without timings. Fails on an incomplete line."""
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in TIMING_KEYS}
        for line in rows
        if split in (None, line["split"])
    ]


def run_state(folder, name: str = "latest.pt") -> dict:
    """The state of the training in a checkpoint, without timings and settings."""
    state = checkpoint.read(Path(folder, name))
    state |= {k: v for k, v in state.pop("progress", {}).items() if k != "elapsed"}
    return {k: v for k, v in state.items() if k not in ("provenance", "recipe", "train_config")}


# ----------------------------------------------------------------------------------------------------------
# Command lines and processes


def cli_args(corpus, **changes) -> list[str]:
    """The command-line arguments of a micro run."""
    return [f"--{key}={value}" for key, value in ({"data_dir": corpus} | MICRO | changes).items()]


def write_recipe(name: str, **values) -> str:
    """Write NAME.py, a recipe with the micro settings and `values`, and return its path."""
    path = Path(f"{name}.py")
    path.write_text("\n".join(f"{key} = {value!r}" for key, value in (MICRO | values).items()))
    return str(path)


def run_script(*argv, cwd, status: int = 0) -> subprocess.CompletedProcess:
    """Run a script in a subprocess and check its exit status."""
    command = [sys.executable, *map(str, argv)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert result.returncode == status, result.stderr
    assert "Traceback" not in result.stderr
    return result


FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch", "train", "sample", "helpers"])


def child(argv: list[str], folder: str, env: dict[str, str], hook, output: str) -> None:
    """In the new process: call the hook, then run `train.py argv` in `folder`, with output to a file."""
    try:
        os.chdir(folder)
        os.environ.update(env)
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        torch.set_num_threads(1)
        report.final = lambda trainer, name: None  # tested in test_report.py
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
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # for the fork server
        self.output = Path(folder, f".output-{Program.count}")
        args = [str(arg) for arg in argv], str(folder), env or {}, hook, str(self.output)
        self.process = FORKSERVER.Process(target=child, args=args, daemon=True)  # ends with this process
        self.process.start()

    @property
    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""

    def wait(self, seconds: float = 60) -> int:
        """Wait and return the exit status (negative: a signal). Kill the process on timeout."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self.text}")
        return self.process.exitcode

    def until(self, pattern: str, seconds: float = 60) -> None:
        """Wait until the output contains `pattern`."""
        end = time.monotonic() + seconds
        while pattern not in self.text:
            if self.process.exitcode is not None or time.monotonic() > end:
                raise TimeoutError(f"{pattern!r} not in output, status {self.process.exitcode}:\n{self.text}")
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        if self.process.is_alive():
            self.signal(signal.SIGKILL)
        self.process.join()


def cpu_machine(dtype=torch.float32, rank: int = 0, world_size: int = 1) -> machine.Machine:
    """A CPU Machine, without machine.choose."""
    return machine.Machine(torch.device("cpu"), dtype, False, "", rank, world_size)
