"""
Functions shared by the benchmarks: data, running and measuring programs, timing, tables, peers' code.

The code of a peer (nanoGPT, llama2.c) runs from a checkout of its repository or a temporary copy of it. A
result is the median of alternating runs (ours, the peer, ours, ...); a ratio compares results of one call.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import pickle
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare  # noqa: E402
import train  # noqa: E402
from model import GPT  # noqa: E402
from nanostlm import data as datasets  # noqa: E402
from nanostlm import score  # noqa: E402
from nanostlm import tokenizer as tokenizers  # noqa: E402
from nanostlm.machine import choose, cpus  # noqa: E402
from nanostlm.settings import build, read_recipe  # noqa: E402

# ----------------------------------------------------------------------------------------------------------
# The command line and the data


def parser(doc: str, repeats: int = 3) -> argparse.ArgumentParser:
    """An argument parser with --threads and, unless repeats=0, --repeats."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeats:
        parser.add_argument(
            "--repeats", type=int, default=repeats, help="alternating runs; default %(default)s"
        )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    return parser


def data_options(parser: argparse.ArgumentParser, tokenizer: str = "bpe4096") -> None:
    parser.add_argument("--dataset", default="tinystories", help="default %(default)s")
    parser.add_argument("--tokenizer", default=tokenizer, help="default %(default)s")
    parser.add_argument("--data_dir", default="data", help="where prepare.py writes; default %(default)s")
    parser.add_argument("--source", help="source of the corpus, if it is not prepared yet")


def nanogpt_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nanogpt", metavar="PATH", help="a checkout of github.com/karpathy/nanoGPT")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse the options and apply --threads to this process and the programs it starts."""
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    return options


def load_data(options: argparse.Namespace, tokenizer: str = "") -> datasets.Data:
    """The prepared corpus of --dataset and --tokenizer; prepares it first if it is missing."""
    tokenizer = tokenizer or options.tokenizer
    folder = Path(options.data_dir, options.dataset, tokenizer)
    if not (folder / "meta.json").exists():
        with contextlib.redirect_stdout(sys.stderr):
            prepare.prepare(options.dataset, tokenizer, options.source, data_dir=options.data_dir)
    return datasets.load_data(folder)


# ----------------------------------------------------------------------------------------------------------
# Running and measuring a program


class Ran(NamedTuple):
    seconds: float  # to the end of the program, or to the line given by `until`
    lines: list[tuple[float, str]]  # (seconds since the start, line) of stdout and stderr
    peak_mb: float  # peak resident memory; nan if the program did not run to its end
    status: int

    def find(self, pattern: str) -> tuple[float, re.Match]:
        """(seconds, match) of the last line that contains the pattern."""
        for seconds, line in reversed(self.lines):
            if match := re.search(pattern, line):
                return seconds, match
        raise SystemExit(f"no line has {pattern!r}:\n" + "\n".join(line for _, line in self.lines[-20:]))


# An intermediate process, because a child's peak memory includes that of the process that forked it.
WATCH = """
import resource, subprocess, sys
status = subprocess.call(sys.argv[1:])
print(f"\\n{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss}", flush=True)
sys.exit(status)
"""


def run(
    command: list,
    cwd: str | Path | None = None,
    until: str = "",
    check: bool = True,
    on_line: Callable[[str], None] | None = None,
) -> Ran:
    """Run a program, with `until` only up to the first matching line. on_line is called with every line."""
    argv = [sys.executable, "-I", "-S", "-c", WATCH, *map(str, command)]
    env, lines, seconds = os.environ | {"PYTHONUNBUFFERED": "1"}, [], math.nan
    start = time.perf_counter()
    process = subprocess.Popen(
        argv,
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line.rstrip()))
            if on_line:
                on_line(line)
            if until and re.search(until, line):
                return Ran(lines[-1][0], lines, math.nan, 0)
        process.wait()
        seconds = time.perf_counter() - start
    finally:  # no process keeps running, even after an error
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    peak = int(lines.pop()[1]) / (2**20 if sys.platform == "darwin" else 2**10)
    if process.returncode and check:
        last = "\n".join(line for _, line in lines[-20:])
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{last}")
    return Ran(seconds, lines, peak, process.returncode)


# ----------------------------------------------------------------------------------------------------------
# Our programs and nanoGPT's


def words(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def recipes() -> dict[str, train.TrainConfig]:
    """
    The configurations in config/ by name, with the vocabulary size of their tokenizers, smallest model first;
    finetune.py is left out, because its size is that of the model it starts from.
    """
    configs = {}
    for file in (ROOT / "config").glob("*.py"):
        values = read_recipe(file, train.TrainConfig)
        if "init_from" not in values:
            name = values["tokenizer"]
            vocab_size = tokenizers.bpe_size(name) or {"gpt2": 50257, "byte": 257}[name]
            configs[file.stem] = build(train.TrainConfig, values | {"vocab_size": vocab_size})
    return dict(sorted(configs.items(), key=lambda item: item[1].model.estimate()["parameters"]))


def ours(recipe: str, data: datasets.Data, out_dir: str | Path, **settings) -> list[str]:
    """The command that trains with our train.py on `data`."""
    corpus = dict(
        dataset=data.folder.parent.name,
        tokenizer=data.folder.name,
        out_dir=out_dir,
        data_dir=data.folder.parent.parent.resolve(),
    )
    return [sys.executable, ROOT / "train.py", Path(recipe).resolve(), *words(corpus | settings)]


def trainer(recipe: str, data: datasets.Data, **changes) -> train.Trainer:
    """A Trainer in this process, not yet compiled, with a recipe's settings ("": defaults) and `changes`."""
    values = (read_recipe(recipe, train.TrainConfig) if recipe else {}) | changes
    masked = not values.get("cross_stories", True)
    values |= dict(vocab_size=data.tokenizer.vocab_size, separator=data.tokenizer.eot if masked else -1)
    c = build(train.TrainConfig, values)
    machine = choose(c.device, c.dtype, c.compile, c.max_iters)
    machine.set_up(c.threads)
    torch.manual_seed(c.seed)
    return train.Trainer(c, GPT(c.model), data, None, machine)


def checkout(path: str, file: str) -> Path:
    if not Path(path, file).is_file():
        raise SystemExit(f"{path} has no {file}: expected a checkout of its repository")
    return Path(path)


def nanogpt(path: str, folder: Path, data: datasets.Data) -> Path:
    """Copy nanoGPT's programs to `folder`, with our bins as its dataset "ours"."""
    source = checkout(path, "train.py")
    if data.train.dtype.itemsize > 2:
        raise SystemExit(f"{data.folder} holds ids of 4 bytes, and nanoGPT reads 2")
    bins = folder / "data" / "ours"
    bins.mkdir(parents=True)
    for file in source.glob("*.py"):
        shutil.copy(file, folder)
    shutil.copytree(source / "config", folder / "config")
    for name in ("train.bin", "val.bin"):
        (bins / name).symlink_to((data.folder / name).resolve())
    vocab_size = 64 * math.ceil(
        data.tokenizer.vocab_size / 64
    )  # nanoGPT pads GPT-2's vocabulary to a multiple of 64 too
    (bins / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    return folder


def nanogpt_train(**settings) -> list[str]:
    """
    The training command of nanoGPT's README for a machine without a GPU: the small config's optimizer, no
    dropout, no compilation. On a CPU its train.py computes in float32, whatever --dtype says.
    """
    cuda = torch.cuda.is_available()
    defaults = dict(
        device="cuda" if cuda else "cpu",
        dtype="bfloat16" if cuda else "float32",
        compile=False,
        dataset="ours",
        dropout=0.0,
        eval_iters=1,
        log_interval=1,
    )
    return [sys.executable, "train.py", "config/train_shakespeare_char.py", *words(defaults | settings)]


def nanogpt_module(path: str) -> ModuleType:
    """nanoGPT's model.py, imported from the checkout."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout(path, "model.py") / "model.py")
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # leave the checkout as it is
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def bits_per_byte(model, data: datasets.Data, block_size: int, eval_tokens: int = 0) -> float:
    """Bits per byte of any model(idx, targets) -> (_, loss), in our windows of the validation file."""
    ids, eot = data.val[: eval_tokens or None], data.tokenizer.eot
    nats, _ = score.total(model, [ids], eot, block_size=block_size)
    return score.bits_per_byte(nats, int(score.token_bytes(data.tokenizer)[ids].sum()))


# ----------------------------------------------------------------------------------------------------------
# Timing and the machine's limits

CARDS = {  # part of a card's name -> (dense bf16 TFLOP/s with float32 sums, TB/s), as published by NVIDIA
    "H200": (989, 4.8),
    "H100 80GB HBM3": (989, 3.35),
    "H100 PCIe": (756, 2.0),
    "A100-SXM4-80GB": (312, 2.039),
    "A100-SXM4-40GB": (312, 1.555),
    "A100-PCIE-40GB": (312, 1.555),
    "A100 80GB PCIe": (312, 1.935),
    "L40S": (362, 0.864),
    "L4": (121, 0.3),
    "RTX 4090": (165.2, 1.008),
    "RTX 3090": (71, 0.936),
}


def card(name: str) -> tuple[float, float] | None:
    """The peak rates of a GPU by its name (the longest matching part), or None if it is not in CARDS."""
    fits = [part for part in CARDS if re.search(rf"\b{part}\b", name)]
    return CARDS[max(fits, key=len)] if fits else None


def seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call, including the GPU's work."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(sides: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure the sides alternately, `repeats` times. -> {side: its measurements}"""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            measured[name].append(side())
    return measured


def medians(measured: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in measured.items()}


def matrix_rate(m: int, k: int, n: int, dtype: torch.dtype, device: str = "cpu", repeats: int = 7) -> float:
    """Operations per second of (m, k) @ (k, n), the best of several runs."""
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    return 2 * m * k * n / min(seconds(lambda: a @ b) for _ in range(repeats + 1))


def memory_rate(device: str = "cpu", size: int = 1 << 28, repeats: int = 7) -> float:
    """Bytes read and written per second by a copy, the best of several runs."""
    a = torch.ones(size // 4, device=device)
    b = torch.empty_like(a)
    return 2 * size / min(seconds(lambda: b.copy_(a)) for _ in range(repeats + 1))


# ----------------------------------------------------------------------------------------------------------
# Output


def table(head: list[str], rows: list[list]) -> None:
    """Print a table with aligned columns, numbers to the right."""
    text = [[show(cell) for cell in row] for row in [head, *rows]]
    width = [max(len(row[i]) for row in text) for i in range(len(head))]
    left = [all(isinstance(row[i], str) for row in rows) for i in range(len(head))]
    for line in text:
        columns = zip(line, width, left, strict=True)
        print("  ".join(c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in columns).rstrip())


def show(cell: Any) -> str:
    if cell is None or isinstance(cell, float) and math.isnan(cell):
        return "-"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def machine() -> dict[str, Any]:
    """The conditions of a measurement: processor, GPU, threads, PyTorch version, date."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        match = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = match[1] if match else name
    return {
        "cpu": name,
        "cores": cpus(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def finish(bench: str, **values) -> None:
    """Print all results as JSON, on one line."""
    print(json.dumps({"bench": bench, **machine(), **values}))
