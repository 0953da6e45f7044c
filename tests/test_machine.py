"""nanostlm/machine.py: choice of device and dtype, threads, memory, reading windows, energy, output."""

import math
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, config, cpu_machine, trainer

from nanostlm import machine, report

# ----------------------------------------------------------------------------------------------------------
# Device and dtype


class Gpu(SimpleNamespace):
    """A mock of the devices that PyTorch finds."""

    def install(self, patch):
        patch.setattr(torch.cuda, "is_available", lambda: self.cuda > 0)
        patch.setattr(torch.cuda, "device_count", lambda: self.cuda)

        def capability(device=None):
            if torch.device(device).index >= self.cuda:
                raise AssertionError("Invalid device id")
            return self.capability

        patch.setattr(torch.cuda, "get_device_capability", capability)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: self.name)
        patch.setattr(torch.backends.mps, "is_available", lambda: self.mps)
        patch.setattr(torch.cpu, "get_capabilities", lambda: self.cpu)


NONE = dict(cuda=0, capability=None, name="a card", mps=False, cpu={"architecture": "x86_64"})
MACHINES = {
    "V100": (dict(cuda=1, capability=(7, 0)), "cuda:0", torch.float16, True),
    "T4": (dict(cuda=1, capability=(7, 5)), "cuda:0", torch.float16, True),
    "A100": (dict(cuda=8, capability=(8, 0)), "cuda:0", torch.bfloat16, False),
    "H100": (dict(cuda=8, capability=(9, 0)), "cuda:0", torch.bfloat16, False),
    "MPS": (dict(mps=True), "mps", torch.float32, False),
    "CPU": (dict(), "cpu", torch.float32, False),
    "CPU with AMX": (dict(cpu={"amx_bf16": True, "avx512_bf16": True}), "cpu", torch.bfloat16, False),
    "ARM CPU with bf16": (dict(cpu={"architecture": "aarch64", "bf16": True}), "cpu", torch.bfloat16, False),
}


@pytest.mark.parametrize("name", MACHINES)
def test_device_and_dtype_selection(name, monkeypatch):
    features, device, dtype, needs_scaler = MACHINES[name]
    Gpu(**NONE | {"name": name} | features).install(monkeypatch)
    chosen = machine.choose(device="auto", dtype="auto", compile="auto", max_iters=10_000)
    assert (str(chosen.device), chosen.dtype, chosen.needs_scaler) == (device, dtype, needs_scaler)
    assert chosen.compile == device.startswith("cuda"), "auto compiles on CUDA only"
    assert str(dtype).removeprefix("torch.") in chosen.description
    assert name in chosen.description or "cuda" not in device
    for iters, compiles in ((machine.MIN_ITERS_TO_COMPILE, True), (machine.MIN_ITERS_TO_COMPILE - 1, False)):
        assert machine.choose(max_iters=iters).compile == (compiles and device.startswith("cuda"))
    short = machine.choose(device="auto", dtype="auto", compile="auto", max_iters=20)
    assert not short.compile, "auto does not compile short runs"
    requested = machine.choose(device="cpu", dtype="float16", compile="True")
    assert (str(requested.device), requested.dtype, requested.compile) == ("cpu", torch.float16, True)
    assert requested.needs_scaler and "as requested" in requested.description


def test_unavailable_devices_and_unknown_choices_raise(monkeypatch):
    Gpu(**NONE).install(monkeypatch)
    for device, message in {
        "cuda": "no CUDA GPU",
        "cuda:1": "no CUDA GPU",
        "mps": "Metal is not available",
        "tpu": "device must be",
        "meta": "device must be",
        "cuda:x": "device must be",
        "xpu": "device must be",
    }.items():
        with pytest.raises(ValueError, match=message):
            machine.choose(device=device)
    Gpu(**NONE | dict(cuda=2, capability=(9, 0))).install(monkeypatch)
    assert machine.choose(device="cuda:1").device.index == 1
    with pytest.raises(ValueError, match="only 2 CUDA GPUs found"):
        machine.choose(device="cuda:2")
    for field, value in dict(
        dtype="int8", compile="yes", schedule="cosin", optimizer="sgd", logger="x"
    ).items():
        with pytest.raises(ValueError, match=f"{field} must be one of .*; not '{value}'"):
            config(**{field: value}).validate()


def test_local_rank_selects_the_gpu(monkeypatch):
    Gpu(**NONE | dict(cuda=2, capability=(9, 0), mps=True)).install(monkeypatch)
    for key, value in dict(RANK=3, WORLD_SIZE=4, LOCAL_RANK=1).items():
        monkeypatch.setenv(key, str(value))
    chosen = machine.choose(device="auto")
    assert (chosen.device.index, chosen.rank, chosen.world_size) == (1, 3, 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="only 2 CUDA GPUs found"):
        machine.choose(device="auto")


@pytest.mark.parametrize(
    "bf16_rate, dtype", [(1.0, torch.bfloat16), (0.6, torch.bfloat16), (0.4, torch.float32)]
)
def test_auto_dtype_on_cpu_avoids_slow_bf16(bf16_rate, dtype, monkeypatch):
    """Slow: less than half the speed of float32. A resumed run keeps its dtype."""
    Gpu(**NONE | dict(cpu={"avx512_bf16": True, "architecture": "x86"})).install(monkeypatch)
    rates = {torch.bfloat16: bf16_rate, torch.float32: 1.0}
    monkeypatch.setattr(machine.Machine, "matmul_rate", lambda self, d=None: rates[d or self.dtype])
    chosen = machine.choose()
    assert chosen.dtype == dtype and ("half as fast" in chosen.description) == (bf16_rate < 0.5)
    for rate in (1.0, 0.4):
        rates[torch.bfloat16] = rate
        assert machine.choose(before=chosen.description)[:4] == chosen[:4]
    assert machine.choose(dtype="bfloat16").dtype == torch.bfloat16
    assert machine.choose(before="CPU (x86), float16 (as requested)").dtype == torch.float32
    assert machine.choose(before="NVIDIA T4, float16 (no native bf16)").dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------
# Threads, memory, energy, output


def test_threads_are_divided_among_processes(monkeypatch):
    requested = []
    monkeypatch.setattr(torch, "set_num_threads", requested.append)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    cpu_machine().set_up(threads=0)  # PyTorch's default
    cpu_machine(rank=1, world_size=4).set_up(threads=0)
    cpu_machine().set_up(threads=3)
    assert requested == [2, 3]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_reused():
    code = """
import resource, torch
from nanostlm import machine
machine.keep_freed_memory()
def step():
    for size in (1 << 20, 1 << 22, 1 << 21):
        torch.ones(size).mul(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(-step() + [step() for _ in range(10)][-1])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert int(result.stdout) < 20_000  # page faults; 80,000 without keep_freed_memory


@pytest.mark.parametrize("dtype, high", [("<u2", 65_535), ("<u4", 100_000)])
def test_window_reader_on_device_matches_host(dtype, high):
    ids = np.random.default_rng(0).integers(0, high + 1, 500).astype(dtype)
    ids[7] = high
    readers = [machine.WindowReader(ids, cpu_machine(), resident) for resident in (False, True)]
    assert readers[0].resident is None and readers[1].resident is not None
    for starts in (np.array([0, 3, 483]), np.array([7])):
        host, device = (reader(starts, 17) for reader in readers)
        assert device.dtype == torch.int64 and torch.equal(host, device)
        assert host.tolist() == [ids[i : i + 17].tolist() for i in starts]


def test_report_includes_energy_where_it_is_measured(tmp_path, monkeypatch):
    counters = {"intel-rapl:0": "1500000\n", "intel-rapl:1": "500000", "intel-rapl:0:0": "9"}
    for folder, value in counters.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "energy_uj").write_text(value)
    monkeypatch.setattr(machine, "RAPL", tmp_path)
    assert cpu_machine().joules() == 2.0
    t = trainer()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("4500000")
    t.train_step(0)
    logged = {tmp_path: [t.log(1, t.train_step(1))]}
    per_million = f"{3e6 / (2 * t.tokens_per_step):,.0f} J per million tokens"
    assert t.joules == 3.0 and f"FLOPs, 3 J, {per_million}" in report.totals(t, logged)
    monkeypatch.setattr(machine, "RAPL", tmp_path / "none")
    assert math.isnan(cpu_machine().joules())


def test_print0_wraps_lines_in_a_terminal(monkeypatch, capsys):
    message = "a plan of several words that is longer than the terminal is wide\n\nand a second line"
    machine.print0(message)
    assert capsys.readouterr().err == message + "\n", "not wrapped in a file"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "30")
    machine.print0(message)
    err = capsys.readouterr().err
    assert max(map(len, err.splitlines())) <= 30 and err.split() == message.split()
    assert "\n\nand a second line" in err
