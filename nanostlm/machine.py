"""
Device, precision, compiling, threads, processes, memory, energy: all decisions that depend on hardware.

    machine = choose("auto", "auto", "auto", max_iters=1000)     # for training
    machine.set_up(threads=0)
    with machine.autocast(): ...
"""

import contextlib
import ctypes
import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from nanostlm import entry

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MAX_LAYERS = 10_000  # constructing so many layers of any width takes several seconds
MIN_ITERS_TO_COMPILE = 500  # compiling, about a minute on a GPU, pays for longer runs only
LATER_LIBRARIES = 60 * 2**20  # bytes that PyTorch's kernels and matplotlib add after the plan is printed
RAPL = "/sys/class/powercap"  # energy counters of Intel's and AMD's CPUs
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

# ----------------------------------------------------------------------------------------------------------
# Device and precision


def choose_device(name: str = "auto") -> torch.device:
    """
    The device for `name` (auto | cpu | cuda | cuda:N | mps). With several
    processes, cuda is the GPU of this process. ValueError if there is no such device.
    """
    if name == "auto":
        mps = torch.backends.mps.is_available() and world_size() == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?|mps", name):
        raise ValueError(f"device must be auto, cpu, cuda, cuda:N or mps, not {name!r:.60}")
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device=mps, but Metal is not available; use --device=cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device=cuda, but no CUDA GPU was found; use --device=cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"{device} requested, but only {torch.cuda.device_count()} CUDA GPUs found")
    return device


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware. Older GPUs only emulate it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    found = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def inference_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the weights for sampling. auto: bfloat16 on CUDA GPUs that have it, else float32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and has_native_bf16(device) else "float32"
    if name == "int8" and not (device.type == "cpu" and hasattr(torch.ops.aten, "_weight_int8pack_mm")):
        raise ValueError("--dtype int8 needs --device cpu and a PyTorch that has its kernel")
    return getattr(torch, name)


def compiled(model: torch.nn.Module) -> Callable:
    """A compiled forward pass: one graph for each shape of its input, and for training and evaluation."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = 64  # the default of 8 is less than some schedules have lengths
    torch._dynamo.config.optimize_ddp = False  # it would split the graph at every bucket of gradients
    return torch.compile(model, dynamic=False)


def compile_failure(error: Exception) -> str:
    """The reason of a torch.compile failure, in one line."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if re.search(r"InvalidCxxCompiler|Compiler: \S+ is not found", reason):  # the latter on Windows
        return "no C++ compiler found; install g++ or clang++, or set CXX to one"
    return reason


class Machine(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of matrix products in training
    compile: bool
    description: str  # device and dtype in words
    rank: int = 0  # of this process
    world_size: int = 1

    @property
    def needs_scaler(self) -> bool:
        """fp16 gradients need a GradScaler."""
        return self.dtype == torch.float16

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def compiled_for(
        self,
        model: torch.nn.Module,
        batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
        shape: tuple[int, int],
    ) -> torch.nn.Module:
        """
        The compiled model, after training passes of these batches (idx, targets) and an evaluation of idx
        (rows, length) of this shape, without updates. If compiling fails, warn and return the model itself.
        """
        began, found = time.perf_counter(), model
        try:
            compiled_model = compiled(model)
            model.train()
            for idx, targets in batches:
                with self.autocast():
                    compiled_model(idx, targets)[1].backward()
            idx = torch.zeros(shape, dtype=torch.int64, device=self.device)
            model.eval()
            with torch.no_grad(), self.autocast():
                compiled_model(idx, idx + 1)
            found = compiled_model
            print0(f"compiled in {time.perf_counter() - began:.0f} s")
        except Exception as error:  # compilers raise many kinds of exceptions
            print0(f"WARNING: this run is not compiled, and slower: {compile_failure(error)}")
        model.zero_grad(set_to_none=True)
        return found

    def loss_chunk(self) -> int:
        """Tokens per chunk of the loss: a CPU's cache holds few logits, a GPU needs many rows to be busy."""
        return 256 if self.device.type == "cpu" else 8192

    def to_device(self, x: torch.Tensor) -> torch.Tensor:
        """Copy a tensor to the device, on CUDA without waiting for the copy."""
        if self.device.type == "cuda":
            return x.pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)

    def set_up(self, threads: int = 0) -> None:
        """Apply process-wide settings. threads=0: PyTorch's default, or cores / world_size."""
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32 on CUDA
        if self.device.type == "cpu":
            keep_freed_memory()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        elif threads or self.world_size > 1:  # torchrun would give each process one thread
            torch.set_num_threads(threads or max(1, cpus() // self.world_size))
        if self.world_size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def joules(self) -> float:
        """The energy counter of the GPU (NVML) or of the CPUs (RAPL), in joules; nan if there is none."""
        try:
            if self.device.type == "cuda":
                import pynvml

                pynvml.nvmlInit()
                handle = pynvml.nvmlDeviceGetHandleByUUID(
                    f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
                )
                return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
            counters = [int(file.read_text()) for file in Path(RAPL).glob("intel-rapl:?/energy_uj")]
            return sum(counters) / 1e6 if counters else math.nan
        except Exception:  # no such library, no permission, no such counter on this device
            return math.nan

    def matmul_rate(self, dtype: torch.dtype | None = None) -> float:
        """Operations per second of a square matrix product in this precision, measured in a few ms."""
        for size in (256, 512, 1024, 2048, 4096):  # until one product takes long enough to be measured
            a = torch.ones(size, size, dtype=dtype or self.dtype, device=self.device)
            times = []
            for _ in range(2):
                began = time.perf_counter()
                (a @ a)[0, 0].item()  # waits for the device
                times.append(time.perf_counter() - began)
            if min(times) > 0.002:
                break
        return 2 * size**3 / min(times)

    def base_memory(self) -> int:
        """Memory in bytes besides the model: on a CPU, this process and libraries loaded later."""
        if self.device.type == "cuda":
            return 0
        try:
            with open("/proc/self/statm") as file:
                resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:  # not Linux
            peak = self.peak_memory()
            resident = 0 if math.isnan(peak) else int(peak * 2**20)
        return resident + LATER_LIBRARIES

    def run_memory(self, c) -> int:
        """Bytes of memory that a run of a TrainConfig takes, roughly."""
        model = c.model.memory(c.batch_size * c.model.block_size, self.dtype.itemsize)
        return model + self.base_memory()

    def check_run(self, c) -> None:
        """ValueError if a run of a TrainConfig certainly takes more memory than the device has."""
        states = 12 * c.model.estimate()["parameters"]  # weights and optimizer state
        rows = 48 * c.batch_size * c.gradient_accumulation_steps  # their numbers, in every step
        check_memory(c.model, self.device, max(states, rows, self.run_memory(c) // 4))

    def peak_memory(self) -> float:
        """Peak memory so far in MB: allocated on the GPU, else resident in this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        try:
            import resource
        except ImportError:  # Windows
            return math.nan
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class WindowReader:
    """
    Reads windows of the token ids (N,): reader(starts, length) -> (rows, length) int64 on the device. On CUDA
    the ids are kept on the GPU if they fit into a tenth of its memory; else the host reads the next windows
    while the GPU computes.
    """

    def __init__(self, ids: np.ndarray, machine: Machine, resident: bool | None = None):
        self.ids, self.machine, self.resident = ids, machine, None
        if resident is None and machine.device.type == "cuda":
            resident = ids.nbytes <= torch.cuda.get_device_properties(machine.device).total_memory / 10
        if resident:  # as signed integers, because few operations take unsigned ones
            signed = np.array(ids).view(f"<i{ids.itemsize}")
            self.resident = torch.from_numpy(signed).to(machine.device)

    def __call__(self, starts: np.ndarray, length: int) -> torch.Tensor:
        if self.resident is None:
            windows = self.ids[starts[:, None] + np.arange(length)]
            return self.machine.to_device(torch.from_numpy(windows.astype(np.int64)))
        first = self.machine.to_device(torch.from_numpy(starts.astype(np.int64)))
        windows = self.resident[first[:, None] + torch.arange(length, device=first.device)]
        return windows.long() & (256**self.ids.itemsize - 1)


def choose(
    device: str = "auto", dtype: str = "auto", compile: str = "auto", max_iters: int = 0, before: str = ""
) -> Machine:
    """
    The machine to train on. `before` is the description of the one that a resumed run began on: on the same
    device, it keeps its precision. ValueError if the machine lacks what is requested.
    """
    chosen = choose_device(device)
    native = has_native_bf16(chosen)
    if chosen.type == "cuda":
        name, best = torch.cuda.get_device_name(chosen), "bfloat16" if native else "float16"
        why = "bf16 is native" if native else "no native bf16, so fp16 with a GradScaler"
    elif chosen.type == "mps":
        name, best, why = "Apple GPU", "float32", "the safest precision on MPS"
    else:
        name, best = f"CPU ({torch.cpu.get_capabilities().get('architecture', '?')})", "float32"
        if native:
            best = "bfloat16"
        why = "it has bf16 matrix units" if native else "it has no bf16 matrix units"
    pays = chosen.type == "cuda" and max_iters >= MIN_ITERS_TO_COMPILE
    found = Machine(chosen, DTYPES[best], pays if compile == "auto" else compile == "True", "")
    found = found._replace(rank=rank(), world_size=world_size())
    kept = re.fullmatch(re.escape(name) + r", (\w+) \((?!as requested)(.+)\)", before)
    if dtype != "auto":
        best, why = dtype, "as requested"
    elif kept:
        best, why = kept.groups()
    elif (
        (chosen.type == "cpu" and native and world_size() == 1)  # several might decide differently
        and found.matmul_rate() < 0.5 * found.matmul_rate(torch.float32)
    ):
        best, why = "float32", "its bf16 matrix units are less than half as fast"
    return found._replace(dtype=DTYPES[best], description=f"{name}, {best} ({why})")


# ----------------------------------------------------------------------------------------------------------
# Memory, threads, processes


def keep_freed_memory() -> None:
    """
    Make the C library keep freed memory for the next step instead of returning it to the system, which
    costs 13,000 page faults in a step of 3,072 tokens. Does nothing where the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, 2**30)


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU; else of this machine, or of the container that it lets this process use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = [2**63]  # if the system does not say
    with contextlib.suppress(AttributeError, OSError, ValueError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of control groups, version 2 and 1
        with contextlib.suppress(OSError, ValueError), open(f"/sys/fs/cgroup/{limit}") as file:
            found.append(int(file.read()))  # or "max"
    return min(found)


def check_memory(c, device: str | torch.device = "cpu", need: int = 0) -> None:
    """
    ValueError unless the configuration of a model is valid, the model can be constructed in some seconds, and
    it fits into the memory of the device. `need`: the bytes that are certain there, if more than its weights.
    """
    c.validate()
    if c.n_layer > MAX_LAYERS:
        raise ValueError(f"n_layer={c.n_layer:,}: more than {MAX_LAYERS:,} layers take too long to construct")
    count = c.estimate()["parameters"]
    unshared = replace(c, share="none", tied=False) if hasattr(c, "share") else c  # this is built first
    built = unshared.estimate()["parameters"]
    for place, size in (("cpu", 4 * built), (device, max(need, 4 * count))):
        if size > (has := total_memory(torch.device(place))):
            figures = f"{size / 2**20:,.0f} MB of memory, and {place} has {has / 2**20:,.0f} MB"
            raise ValueError(f"with {count:,} parameters, this takes at least {figures}")


def cpus() -> int:
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def print0(message: str) -> None:
    """
    Print a message on stderr, above the progress bar, in the first process only. A terminal gets it wrapped
    at words.
    """
    from tqdm import tqdm

    if rank() == 0:
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns
            message = "\n".join(textwrap.fill(line, width) for line in message.split("\n"))
        tqdm.write(message, file=sys.stderr)


@contextlib.contextmanager
def lost_processes():
    """Inside, an error of the communication between processes becomes a ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not re.search("gloo|nccl|process group|connection", str(error), re.I):
            raise
        raise ConnectionError(f"another rank of this run has exited: {error}") from error


def from_rank0(compute: Callable[[], Any]) -> Any:
    """Call compute() on rank 0 and broadcast the result."""
    if not dist.is_initialized():
        return compute()
    box = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def broadcast(model: torch.nn.Module) -> None:
    """Give the model the parameters of rank 0, in every process."""
    if dist.is_initialized():
        for p in model.parameters():
            dist.broadcast(p.detach(), 0)


def data_parallel(forward: torch.nn.Module) -> torch.nn.Module:
    """On GPUs, `forward` with gradients that are averaged over the processes while they are computed."""
    if world_size() == 1 or next(forward.parameters()).device.type == "cpu":
        return forward
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(forward, gradient_as_bucket_view=True)


def average_gradients(model: torch.nn.Module) -> None:
    """
    On CPUs, replace the gradients by their mean over the processes: one sum after the backward pass is faster
    there than DistributedDataParallel, whose sums compete with the backward pass for the cores (RESULTS.md).
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if world_size() == 1 or grads[0].device.type != "cpu":
        return
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= world_size()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def averaging(parallel: torch.nn.Module, last: bool):
    """Inside, a forward pass of what data_parallel returned averages the gradients only if it is the last."""
    return contextlib.nullcontext() if last or not hasattr(parallel, "no_sync") else parallel.no_sync()


def agree(values: torch.Tensor, signal_number: int) -> torch.Tensor:
    """
    The mean of `values` over the processes, followed by a vote for each of STOP_SIGNALS: more than 0 if any
    process got it. One process has no votes. Nothing waits for the device.
    """
    if world_size() == 1:
        return values
    votes = [float(signal_number == number) for number in entry.STOP_SIGNALS]
    values = torch.cat((values, values.new_tensor(votes)))
    dist.all_reduce(values)
    return values / world_size()


def signal_of(votes: list[float]) -> int:
    """The signal that `agree` found votes for, or 0."""
    return next((int(number) for number, vote in zip(entry.STOP_SIGNALS, votes, strict=False) if vote), 0)
