"""Training: batches, schedules, device selection, one update, resuming, metrics, loggers, compiling."""

import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    MICRO,
    ROOT,
    batches,
    bit_equal,
    config,
    cpu_machine,
    gradients,
    max_difference,
    metrics,
    random_data,
    run_script,
    run_state,
    trainer,
)
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import prepare
import train
from model import GPT, GPTConfig
from nanostlm import checkpoint, generate, machine, optim, report, tokenizer
from nanostlm import data as datasets
from train import Diverged, TrainConfig, Trainer

# ----------------------------------------------------------------------------------------------------------
# Batches


def expected_starts(c: TrainConfig, starts: np.ndarray, step: int) -> list[int]:
    """Where the rows begin: row r of step s is window perm[(s*G + r) mod W] of the epoch's permutation."""
    G, W = c.batch_size * c.gradient_accumulation_steps, len(starts)
    positions = [divmod(step * G + r, W) for r in range(G)]
    return [int(starts[np.random.default_rng([c.seed, epoch]).permutation(W)[i]]) for epoch, i in positions]


def window_starts(loader: datasets.Batches, step: int) -> list[int]:
    """The first token of each window of a step, row by row."""
    return loader.windows(step)[0].flatten().tolist()


@pytest.mark.parametrize("story_windows", [False, True])
@pytest.mark.parametrize("rows", [(3, 2), (20, 5), (7, 1)], ids=str)
def test_global_batch_is_pure_function_of_seed_and_step(story_windows, rows):
    data, shape = random_data(300), dict(batch_size=rows[0], gradient_accumulation_steps=rows[1])
    c = config(**shape, story_windows=story_windows, seed=5)
    loader = batches(c, data)
    for step in [0, 1, 2, 30, 4, 1000, 0]:  # in any order, since batches have no state
        assert window_starts(loader, step) == expected_starts(c, loader.stages[0].starts, step)
    t = trainer(data, **shape, story_windows=story_windows, seed=5)
    for start, (idx, targets) in zip(loader.windows(3)[0], t.micro_batches(3), strict=True):
        expected = np.stack([data.train[s : s + 17] for s in start]).astype(np.int64)
        assert idx.dtype == targets.dtype == torch.int64
        assert idx.tolist() == expected[:, :-1].tolist() and targets.tolist() == expected[:, 1:].tolist()
        assert not story_windows or (idx[:, 0] == data.tokenizer.eot).all()
    assert window_starts(batches(c, data, seed=6), 0) != window_starts(loader, 0)


@pytest.mark.parametrize("story_windows", [False, True])
def test_epoch_visits_each_window_once(story_windows):
    """Also if a step spans two or more epochs."""
    for rows in (4, 7, 100):
        loader = batches(config(batch_size=rows, story_windows=story_windows), random_data(300))
        starts = loader.stages[0].starts.tolist()
        W = len(starts)
        assert W % rows, "a step must span two epochs"
        seen = sum((window_starts(loader, step) for step in range(3 * W // rows + 2)), [])
        epochs = [seen[i * W : (i + 1) * W] for i in range(3)]
        assert all(sorted(epoch) == sorted(starts) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2]


def test_windows_cover_the_file():
    for tokens in (17, 18, 32, 33, 34, 300):
        starts = batches(config(), random_data(tokens)).stages[0].starts
        assert starts[0] == 0 and starts[-1] + 17 <= tokens < starts[-1] + 2 * 17
        assert set(np.diff(starts)) <= {16}
    with pytest.raises(ValueError, match="16 tokens, too few for one window"):
        batches(config(), random_data(16))


@pytest.mark.parametrize(
    "batch_size, accumulation, world_sizes", [(4, 6, (1, 2, 3)), (6, 1, (1, 2, 3)), (4, 2, (2, 4))]
)
def test_ranks_partition_the_global_batch(batch_size, accumulation, world_sizes):
    c, data = config(batch_size=batch_size, gradient_accumulation_steps=accumulation), random_data()
    for step in (0, 1, 5):
        expected = sorted(expected_starts(c, batches(c, data).stages[0].starts, step))
        for world_size in world_sizes:
            slices = [batches(c, data, rank, world_size).windows(step)[0] for rank in range(world_size)]
            assert len({starts.shape for starts in slices}) == 1
            assert sorted(np.concatenate([starts.flatten() for starts in slices]).tolist()) == expected


def test_context_schedule_stages():
    """Each stage has its own windows and permutations; tokens per update are constant, for any world size."""
    changes = dict(context_schedule="0:0.25,0.5:1", max_iters=20, batch_size=2)
    c, data, t = config(**changes), random_data(300), trainer(**changes)
    assert [stage.length for stage in t.batches.stages] == [4, 16] and t.tokens_per_step == 32
    for step, shape in ((0, (8, 4)), (9, (8, 4)), (10, (2, 16)), (25, (2, 16))):
        assert [tuple(idx.shape) for idx, _ in t.micro_batches(step)] == [shape]
    loader = batches(c, data, stages=c.stages())
    starts, rng = loader.stages[1].starts, np.random.default_rng([c.seed, 0, 1])
    assert window_starts(loader, 10) == starts[rng.permutation(len(starts))[:2]].tolist()
    starts_by_rank = sum(
        (window_starts(batches(c, data, rank, 2, stages=c.stages()), 3) for rank in range(2)), []
    )
    assert len(starts_by_rank) == 8 and sorted(starts_by_rank) == sorted(window_starts(loader, 3))
    for schedule in ("0:0.25", "0.1:1", "0:0.3,0.5:1", "0:0,0.5:1", "0:0.75,0.5:1", "0:64,0.5:256", "x"):
        with pytest.raises(ValueError, match="context_schedule"):
            config(context_schedule=schedule).validate()


def test_stage_starts_are_rounded_to_an_update():
    assert optim.window_stages("0:0.5, 0.29:1", 100, 16) == [(0, 8), (29, 16)]  # 0.29 * 100 < 29


def test_last_story_window_has_all_targets():
    """A window at the end of the file is used if and only if its last token has a target."""
    eot, T = 256, 16
    ids = np.zeros(64, dtype=np.uint16)
    for last in (len(ids) - T - 1, len(ids) - T):  # the last start that fits, and one too late
        ids[[3, last]] = eot
        loader = datasets.Batches(ids, eot, block_size=T, batch_size=2, align=True)
        assert loader.stages[0].starts.tolist() == [3, len(ids) - T - 1]
        assert loader.windows(0)[0].shape == (1, 2) and loader.windows(0)[1] == T


def test_indivisible_world_size_raises():
    message = "3 processes divide neither gradient_accumulation_steps=2 nor batch_size=4"
    with pytest.raises(ValueError, match=message):
        batches(config(gradient_accumulation_steps=2), random_data(), 0, 3)


# ----------------------------------------------------------------------------------------------------------
# Schedules and optimizers


def rates(iters: int = 40, extra: int = 5, **changes) -> list[float]:
    c = config(learning_rate=0.5, max_iters=iters, warmup_iters=changes.pop("warmup_iters", 4), **changes)
    return [c.learning_rate * optim.schedule(c, step) for step in range(iters + extra)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedule_endpoints(name):
    lr = rates(schedule=name, min_lr=0.05)
    assert lr[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4]) and lr[4] == 0.5, "linear warmup, then the peak"
    assert all(a >= b for a, b in zip(lr[4:], lr[5:], strict=False))
    if name == "constant":
        assert set(lr[4:]) == {0.5}
        return
    assert lr[38] > lr[39] == 0.05, "min_lr at the last update, not before"
    assert set(lr[39:]) == {0.05}, "and min_lr after it"
    assert rates(schedule=name)[39] == 0.0


def test_schedule_between_endpoints():
    half = 4 + (39 - 4) / 2  # midway between the end of warmup and the last update
    c = config(learning_rate=0.5, max_iters=40, warmup_iters=4, min_lr=0.1)
    assert 0.5 * optim.schedule(c, half) == pytest.approx(0.3)
    expected = [0.1 + 0.4 * 0.5 * (1 + math.cos(math.pi * (s - 4) / 35)) for s in range(4, 40)]
    assert rates(min_lr=0.1)[4:40] == pytest.approx(expected)
    stable = rates(schedule="wsd", decay_share=0.25)
    assert stable[4:31] == [0.5] * 27 and stable[31] < 0.5 and stable[39] == 0.0
    assert rates(schedule="linear", warmup_iters=0)[0] == 0.5
    early = rates(lr_decay_iters=20, min_lr=0.1)
    assert early[18] > early[19] == pytest.approx(0.1) and early[39] == early[19]


def test_points_interpolate_triangle_linear_and_constant():
    """The triangle has 4 cycles between 0 and 0.1 in 100 updates."""
    peaks = [f"{12.5 * i}:{0.1 * (i % 2)}" for i in range(9)]
    triangle = optim.points("dropout_schedule", ", ".join(peaks))
    for start in (0, 25, 50, 75):
        values = [optim.interpolate(triangle, start + step) for step in (0, 5, 10, 15, 20, 25)]
        assert values == pytest.approx([0, 0.04, 0.08, 0.08, 0.04, 0])
    linear = optim.points("dropout_schedule", "10:0.0,20:0.5")
    assert [optim.interpolate(linear, s) for s in (0, 10, 15, 20, 99)] == [0, 0, 0.25, 0.5, 0.5]
    assert [optim.interpolate(optim.points("dropout_schedule", "0:0.3"), s) for s in (0, 7)] == [0.3, 0.3]
    for text in ("0.1", "0:0.1,0:0.2", "5:0.1,3:0.2", "0:1.0", "0:-0.1", "a:b", "0:0.1;5:0.2", "0:nan"):
        with pytest.raises(ValueError):
            optim.points("dropout_schedule", text)


@pytest.mark.parametrize("dropout", [0.0, 0])
def test_dropout_schedule_sets_every_layer(monkeypatch, dropout):
    t, recorded = trainer(dropout_schedule="0:0.0, 4:0.4", position="shaw", dropout=dropout), []
    forward = t.model.forward

    def record(*args, **kwargs):
        ps = [m.p for m in t.model.modules() if isinstance(m, torch.nn.Dropout)]
        recorded.append(set(ps + [block.attn.dropout for block in t.model.core.blocks]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(t.model, "forward", record)
    for step in range(6):
        t.train_step(step)
    assert [round(p, 6) for ps in recorded for p in ps] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.4]


def test_dropout_mask_depends_on_step_micro_batch_and_rank():
    """Repeating an update repeats its mask."""

    def losses(step: int, rank: int = 0) -> list[float]:
        t, recorded = trainer(dropout=0.5, gradient_accumulation_steps=2), []
        batch, forward = next(t.micro_batches(0)), t.forward
        t.machine, t.micro_batches = cpu_machine(rank=rank), lambda step: [batch, batch]

        def record(*args):
            logits, loss = forward(*args)
            recorded.append(loss.item())
            return logits, loss

        t.forward = record
        t.train_step(step)
        return recorded

    assert losses(0) == losses(0)
    assert len({*losses(0), *losses(1), *losses(0, rank=1)}) == 6


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_and_learning_rate_per_group(name):
    t = trainer(
        optimizer=name,
        tied=False,
        bias=True,
        norm="layernorm",
        position="learned",
        embedding_lr=0.3,
        head_lr=0.2,
        muon_lr=0.1,
    )
    names, group_of = {id(p): n for n, p in t.model.named_parameters()}, {}
    for optimizer in t.optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert id(p) not in group_of
                group_of[id(p)] = group
                assert (group["weight_decay"] > 0) == (p.ndim >= 2), "weight decay on matrices only"
                kind = names[id(p)].split(".")[0] if p.ndim > 1 else "vector"
                lr = {"embedder": 0.3, "head": 0.2, "core": 0.1 if name == "muon" else 0.01, "vector": 0.01}[
                    kind
                ]
                assert group["base_lr"] == lr, names[id(p)]
                muon = isinstance(optimizer, optim.Muon)
                assert muon == (name == "muon" and kind == "core"), "Muon only for the matrices of blocks"
    assert group_of.keys() == names.keys()
    t.train_step(0)
    factor = optim.schedule(t.config, 0)
    assert all(g["lr"] == g["base_lr"] * factor for o in t.optimizers for g in o.param_groups)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_of_a_block_with_parameters_that_are_not_matrices(name):
    """Muon updates only the matrices of a custom block; AdamW updates the rest, without decay for vectors."""
    t = trainer(optimizer=name, muon_lr=0.1)
    block = t.model.core.blocks[0]
    block.conv, block.scale = torch.nn.Conv1d(16, 16, 3), torch.nn.Parameter(torch.ones(()))
    optimizers = optim.build(t.model, t.config)
    groups = {
        id(p): (type(o), group) for o in optimizers for group in o.param_groups for p in group["params"]
    }
    assert groups.keys() == {id(p) for p in t.model.parameters()}
    for p, decays in ((block.conv.weight, True), (block.conv.bias, False), (block.scale, False)):
        kind, group = groups[id(p)]
        assert kind is optim.AdamW and group["base_lr"] == t.config.learning_rate
        assert (group["weight_decay"] > 0) == decays
    assert (groups[id(block.mlp.fc.weight)][0] is optim.Muon) == (name == "muon")
    before = block.conv.weight.detach().clone()
    for p in t.model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    assert not torch.equal(block.conv.weight, before)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_match_torch(name, monkeypatch):
    """AdamW bitwise, Muon up to rounding, also when the two exchange their states after every step."""
    ours, theirs = trainer(optimizer=name), None
    with monkeypatch.context() as patch:
        patch.setattr(optim, "AdamW", torch.optim.AdamW)
        patch.setattr(optim, "Muon", partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"))
        theirs = trainer(optimizer=name)
    for step in range(4):
        for t in (ours, theirs):
            t.train_step(step)
        for a, b in zip(ours.optimizers, theirs.optimizers, strict=True):
            our_state, their_state = a.state_dict(), b.state_dict()
            a.load_state_dict(their_state | {"param_groups": our_state["param_groups"]})
            b.load_state_dict(our_state | {"param_groups": their_state["param_groups"]})
    assert all(type(a) is not type(b) for a, b in zip(ours.optimizers, theirs.optimizers, strict=True))
    assert not any(
        p.requires_grad
        for o in ours.optimizers
        for s in o.state.values()
        for p in s.values()
        if isinstance(p, torch.Tensor)
    )
    # batched matrix products may round differently from single ones in bf16
    tolerance = 0.0 if name == "adamw" else 0.01
    for (n, p), q in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert (p - q).norm() <= tolerance * q.norm(), n


def test_optimizers_do_not_import_dynamo():
    code = """
import sys, torch
from nanostlm import optim
w = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2)]
for o in (optim.AdamW(w[:1], fused=True), optim.Muon(w[1:])):
    w[0].grad, w[1].grad = torch.ones(2, 2), torch.ones(2, 2)
    o.step(), o.zero_grad(), o.load_state_dict(o.state_dict())
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


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


def test_tied_and_shared_weights_are_optimized_once():
    t = trainer(tied=True, share="layers")
    params = [p for o in t.optimizers for g in o.param_groups for p in g["params"]]
    assert len(params) == len({id(p) for p in params}) == len(list(t.model.parameters()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_step_on_meta_device(name):
    """So that models larger than memory can be checked."""
    c = config(optimizer=name, n_embd=4096, n_head=32, n_layer=2)
    with torch.device("meta"):
        model = GPT(c.model)
    for optimizer in optim.build(model, c, fused=False):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.empty_like(p)
        optimizer.step()


# ----------------------------------------------------------------------------------------------------------
# Device, dtype and compiling


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
        "mps": "no Mac",
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


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(batch_size=0), "batch_size must be between 1 and .*, not 0"),
        (dict(max_iters=-1), "max_iters must be between 0 and"),
        (dict(learning_rate=0.0), "learning_rate must be between 1e-12 and"),
        (dict(learning_rate=math.nan), "learning_rate"),
        (dict(learning_rate=math.inf), "learning_rate"),
        (dict(min_lr=0.02), "min_lr=0.02 is above learning_rate=0.01"),
        (dict(beta2=1.0), "beta2 must be between 0 and 0.999999"),
        (dict(muon_momentum=1.0), "muon_momentum must be"),
        (dict(n_head=3), "n_head=3 does not divide n_embd=16"),
        (dict(n_embd=-16), "n_embd must be between 1 and"),
        (dict(dropout=1.0), "dropout must be between 0 and 0.999"),
        (dict(dropout_schedule="0:2"), "dropout_schedule must be"),
        (dict(dropout_schedule="0:0.1", compile="True"), "leave out dropout_schedule"),
    ],
)
def test_invalid_settings_raise(changes, message):
    with pytest.raises(ValueError, match=message) as excinfo:
        config(**changes).validate()
    assert "\n" not in str(excinfo.value)


# ----------------------------------------------------------------------------------------------------------
# One update


@pytest.mark.parametrize(
    "changes, tolerance",
    [
        (dict(), 1e-6),
        (dict(optimizer="muon"), 1e-2),
        (dict(dtype="bfloat16"), 1e-2),
        (dict(cross_stories=False, tied=False), 1e-6),
    ],
    ids=["adamw", "muon", "bf16", "stories"],
)
def test_accumulation_matches_gradient_of_large_batch(changes, tolerance):
    pair = [
        trainer(batch_size=2, gradient_accumulation_steps=4, grad_clip=0.0, **changes),
        trainer(batch_size=8, grad_clip=0.0, **changes),
    ]
    first = [gradients(t) for t in pair]
    assert max_difference(*first) < tolerance
    assert max_difference(first[0], gradients(pair[0], 1)) > 0.05, "another batch has another gradient"
    if "optimizer" in changes:  # also after some updates
        for step in range(3):
            losses = [float(t.train_step(step)["loss"]) for t in pair]
            assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        assert max_difference(*(gradients(t, 3) for t in pair)) < tolerance


def test_accumulation_matches_weights_of_large_batch_in_float64():
    pair = [
        trainer(weights=torch.float64, batch_size=2, gradient_accumulation_steps=4),
        trainer(weights=torch.float64, batch_size=8),
    ]
    before = [p.detach().clone() for p in pair[0].model.parameters()]
    for step in range(20):
        for t in pair:
            t.train_step(step)
    accumulated, large = ([p.detach() for p in t.model.parameters()] for t in pair)
    assert max((a - b).abs().max().item() for a, b in zip(accumulated, large, strict=True)) < 1e-12
    assert max_difference(accumulated, before) > 0.01


def test_update_matches_adamw_formula():
    t = trainer(weights=torch.float64, grad_clip=0.5, weight_decay=0.1, beta1=0.9, beta2=0.99)
    params = dict(t.model.named_parameters())
    expected = {name: p.detach().clone() for name, p in params.items()}
    m, v = ({name: torch.zeros_like(p) for name, p in expected.items()} for _ in "mv")
    for step in range(4):
        (idx, targets), *_ = t.micro_batches(step)
        _, loss = torch.func.functional_call(
            t.model, {n: p.requires_grad_() for n, p in expected.items()}, (idx, targets)
        )
        grads = dict(zip(expected, torch.autograd.grad(loss, expected.values()), strict=True))
        norm = sum(g.square().sum() for g in grads.values()).sqrt()
        result = t.train_step(step)
        assert result["loss"] == pytest.approx(loss.item(), rel=1e-6) and result[
            "grad_norm"
        ] == pytest.approx(norm.item())
        assert norm > 0.5
        lr = 0.01 * (min(step + 1, 3) / 3 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 21)))
        assert result["lr"] == pytest.approx(lr)
        for name, g in grads.items():
            g = g * 0.5 / (norm + 1e-6)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.99 * v[name] + 0.01 * g * g
            decay = 0.1 if g.ndim > 1 else 0.0
            step_ = m[name] / (1 - 0.9 ** (step + 1)) / ((v[name] / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8)
            expected[name] = (expected[name] * (1 - lr * decay) - lr * step_).detach()
    assert all(torch.allclose(params[n], expected[n], rtol=1e-9, atol=1e-12) for n in expected)


def inject_inf(t: Trainer, steps: dict[int, str]) -> None:
    """Make the loss ("loss") or only its gradient ("gradient") infinite at these steps."""
    forward = t.model.forward

    def forward_or_inf(idx, targets=None, **kwargs):
        logits, loss = forward(idx, targets, **kwargs)
        match steps.get(t.now) if t.model.training else None:
            case "loss":
                loss = loss * math.inf
            case "gradient":
                loss.register_hook(lambda grad: grad * math.inf)
        return logits, loss

    step = t.train_step
    t.model.forward = forward_or_inf
    t.train_step = lambda n: (setattr(t, "now", n), step(n))[1]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize(
    "changes", [dict(), dict(dtype="float16"), dict(dtype="float16", optimizer="muon")], ids=str
)
def test_nonfinite_update_is_skipped(kind, changes, capsys):
    t = trainer(**changes)
    inject_inf(t, {2: kind, 3: kind, 5: kind})
    scale = t.scaler.get_scale()
    for step in range(8):
        before = [p.detach().clone() for p in t.model.parameters()]
        moments = [s.copy() for o in t.optimizers for s in o.state.values()]
        moments = [{k: v.clone() for k, v in s.items()} for s in moments]
        result = t.train_step(step)
        after = [p.detach() for p in t.model.parameters()]
        assert all(p.isfinite().all() for p in after)
        assert bit_equal(before, after) == (step in (2, 3, 5)), f"step {step}"
        if step in (2, 3, 5):
            assert bit_equal(moments, [dict(s) for o in t.optimizers for s in o.state.values()])
            assert not math.isfinite(result["loss"] if kind == "loss" else result["grad_norm"])
    needs_scaler = t.machine.needs_scaler
    assert t.progress.skipped == (0 if needs_scaler and kind == "gradient" else 3)
    if needs_scaler:
        assert t.scaler.get_scale() < scale, "an overflow lowers the scale"
    err = capsys.readouterr().err
    assert t.progress.skipped == 0 or "update 2 left out" in err and "update 5 left out" in err


def test_five_nonfinite_updates_in_a_row_raise_diverged(tmp_path, capsys):
    t = trainer(out_dir=tmp_path, grad_clip=0.0)
    inject_inf(t, dict.fromkeys(range(7, 24), "loss") | {3: "loss"})
    with pytest.raises(
        Diverged, match="5 updates in a row .* step 11, .*gradient norm .*, learning rate 0.00"
    ):
        train.train(t)
    assert checkpoint.read(tmp_path / "latest.pt")["step"] == 10
    assert t.progress.skipped == 6


def test_grad_scaler_recovers_from_overflow_on_cpu():
    """With an initial scale that overflows: it is lowered until the gradients are finite."""
    t = trainer(dtype="float16", max_iters=40)
    t.data.train[:] = 7
    t.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    losses = [t.train_step(step)["loss"] for step in range(40)]
    assert t.scaler.get_scale() < 2.0**30 and t.progress.skipped == 0
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    assert all(p.dtype == torch.float32 for p in t.model.parameters())


def test_early_stopping(tmp_path, capsys):
    t = trainer(
        out_dir=tmp_path, max_iters=100, eval_interval=1, patience=3, learning_rate=1e-3, save_interval=50
    )
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.0, 3.1, 2.0])
    t.val_step = lambda: {"loss": next(losses), "bpb": 1.0}
    train.train(t)
    assert t.progress.step == 5 and t.progress.best == 3.0, "an equal loss is not an improvement"
    assert checkpoint.read(tmp_path / "best.pt")["step"] == 2
    assert checkpoint.read(tmp_path / "latest.pt")["step"] == 5


def test_patience_prints_reason_and_best_weights_may_be_initial(tmp_path, capsys):
    """If the evaluation at step 0 is the best, best.pt has its weights, and the report samples from them."""
    t = trainer(out_dir=tmp_path, max_iters=100, eval_interval=1, patience=2, learning_rate=1e-3)
    first = {name: p.clone() for name, p in t.model.state_dict().items()}
    losses = iter([3.0, 3.5, 3.1, 2.0])
    t.val_step = lambda: {"loss": next(losses), "bpb": 1.0}
    train.train(t)
    assert "stopped at step 2: no better evaluation in the last 2 (patience)" in capsys.readouterr().err
    assert checkpoint.read(tmp_path / "best.pt")["step"] == 0
    assert not bit_equal(dict(t.model.state_dict()), first)
    report.load_best(t)
    assert bit_equal(dict(t.model.state_dict()), first) and "of step 0" in capsys.readouterr().err


def test_document_masking_separates_stories():
    t, unmasked = trainer(cross_stories=False), trainer()
    assert max_difference(gradients(t), gradients(unmasked)) > 1e-4
    # a window of two stories has the logits of each story alone (RoPE depends on distances only)
    t.model.eval()
    window = torch.tensor([[256, 1, 2, 3, 256, 4, 5, 6]])
    with torch.no_grad():
        joint, _ = t.model(window)
        separate = torch.cat([t.model(part)[0] for part in window.split(4, dim=1)], dim=1)
    assert torch.allclose(joint, separate, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------
# Full runs in this process


VARIANTS = {
    "plain": dict(),
    "dropout": dict(dropout=0.2, batch_size=3),
    "accumulation": dict(gradient_accumulation_steps=3, batch_size=3, dropout=0.1),
    "fp16": dict(dtype="float16"),
    "bf16": dict(dtype="bfloat16", pointer="True"),
    "linear": dict(schedule="linear", tied="False", embedding_lr=0.02, head_lr=0.003),
    "wsd": dict(schedule="wsd", grad_clip=0.0, share="layers"),
    "constant": dict(schedule="constant", weight_decay=0.0, share="lora"),
    "muon": dict(optimizer="muon", min_lr=0.001),
    "dropout_schedule": dict(dropout_schedule="0:0.0,10:0.3,20:0.1"),
    "document_masking": dict(story_windows="True", cross_stories="False"),
    "context_schedule": dict(context_schedule="0:0.25,0.2:0.5,0.6:1", tied="False", pair_tokens=300),
    "patience": dict(patience=2, eval_interval=2, learning_rate=0.5),
    "combined": dict(
        optimizer="muon",
        dtype="float16",
        dropout_schedule="0:0.1,12:0.4",
        schedule="wsd",
        gradient_accumulation_steps=2,
        story_windows="True",
        tied="False",
        cross_stories="False",
        norm="layernorm",
        bias="True",
        position="learned",
        min_lr=0.001,
        patience=20,
        pointer="True",
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_resume_is_bitwise_exact(name, main):
    """Stopped two or more times, inside and at the end of epochs and of intervals, first after one update."""
    changes = VARIANTS[name]
    assert main("straight", **changes) == 0
    index = list(VARIANTS).index(name)
    stops = [1, 5, 6, 13, 23] if name == "combined" else [1 + index % 3, 5 + index]
    if name == "patience":  # one update before patience ends the run
        stops = [1, run_state("straight")["step"] - 1]
    for i, stop in enumerate(stops):
        assert main("stopped", *["--resume"][:i], stop_after=stop, **changes) == 143
        assert f"saved at step {stop}" in main.stderr
    assert main("stopped", "--resume", micro=False) == 0 and f"at step {stops[-1]}" in main.stderr
    assert metrics("stopped") == metrics("straight")
    assert bit_equal(run_state("stopped"), run_state("straight"))
    assert bit_equal(run_state("stopped", "best.pt"), run_state("straight", "best.pt"))
    assert main("stopped", "--resume", micro=False) == 0, "resuming a finished run changes nothing"
    assert bit_equal(run_state("stopped"), run_state("straight"))
    assert metrics("stopped") == metrics("straight")
    assert len(metrics("straight")) > 12 or name == "patience" and 7 < run_state("straight")["step"] < 24


@pytest.mark.parametrize("half", [1, 2, 6, 7, 9, 12])
def test_extending_a_run_matches_one_long_run(half, main):
    """n updates, then --resume --max_iters=2n, with n on and off the log (2) and evaluation (3) intervals."""
    changes = dict(
        lr_decay_iters=2 * half,
        eval_interval=3,
        save_interval=4,
        dropout=0.1,
        warmup_iters=0,
        patience=3,
        learning_rate=0.05,
    )
    assert main("straight", max_iters=2 * half, **changes) == 0
    assert main("halves", max_iters=half, **changes) == 0
    assert [line["step"] for line in metrics("halves")[-2:]] == [half, half], "a train line and a val line"
    before = metrics("halves")
    assert main("halves", "--resume", micro=False) == 0 and metrics("halves") == before, "the run is finished"
    assert main("halves", "--resume", micro=False, max_iters=2 * half) == 0
    assert f"max_iters: {half} -> {2 * half}" in main.stderr
    assert metrics("halves") == metrics("straight")
    assert bit_equal(run_state("halves"), run_state("straight"))


def test_final_evaluation_counts_for_best_but_not_for_patience(tmp_path):
    t = trainer(out_dir=tmp_path, max_iters=8, eval_interval=5, patience=3)
    losses = iter([5.0, 4.0, 3.0])
    t.val_step = lambda: {"loss": next(losses), "bpb": 1.0}
    train.train(t)
    assert checkpoint.read(tmp_path / "best.pt")["step"] == 8
    state = checkpoint.read(tmp_path / "latest.pt")["progress"]
    saved = state["best"], state["evals_since_best"], state["evaluated"]
    assert saved == (4.0, 0, 5), "as if the run had not ended"


def test_requested_checkpoint_is_saved_once(tmp_path):
    t, saved = trainer(out_dir=tmp_path, max_iters=6, save_interval=100, eval_interval=100), []
    t.directory.save = lambda name, state, previous="": saved.append((name, state["step"]))
    t.requests.save = True
    train.train(t)
    assert [step for name, step in saved if name == "latest.pt"] == [0, 6]


def test_intervals_do_not_change_training(main):
    changes = dict(dropout=0.2, dtype="bfloat16", log_interval=1)
    assert main("a", eval_interval=24, save_interval=24, **changes) == 0
    assert main("b", eval_interval=1, save_interval=3, **changes) == 0
    assert main("c", eval_interval=5, eval_tokens=17, **changes) == 0
    a, b, c = (metrics(run, "train") for run in "abc")
    assert len(a) == 24 and a == b == c
    weights = [run_state(run)["model"] for run in "abc"]
    assert bit_equal(weights[0], weights[1]) and bit_equal(weights[0], weights[2])
    assert main("d", eval_interval=24, save_interval=24, **changes | dict(seed=1)) == 0
    assert metrics("d", "train") != a, "another seed has other losses"


def test_resume_takes_lr_from_settings_and_moments_from_checkpoint(tmp_path):
    t = trainer(out_dir=tmp_path)
    t.train_step(0)
    t.save_checkpoint(1)
    resumed = trainer(out_dir=tmp_path, learning_rate=1e-9)
    assert resumed.load_checkpoint(checkpoint.read(tmp_path / "latest.pt")) == 1
    before = [p.clone() for p in resumed.model.parameters()]
    assert resumed.train_step(1)["lr"] < 1e-9
    assert 0 < max_difference(before, list(resumed.model.parameters())) < 1e-6
    moments = resumed.optimizers[0].state_dict()["state"]
    assert {int(moment["step"]) for moment in moments.values()} == {2}


def test_resume_with_different_accumulation(main):
    """The split of the batch may change: the data are the same, and the losses nearly so."""
    changes = dict(batch_size=6, gradient_accumulation_steps=2, log_interval=1)
    assert main("a", **changes) == 0
    assert main("b", stop_after=10, **changes) == 143
    assert main("b", "--resume", micro=False, batch_size=3, gradient_accumulation_steps=4) == 0
    assert "batch_size: 6 -> 3" in main.stderr and "gradient_accumulation_steps: 2 -> 4" in main.stderr
    a, b = metrics("a", "train"), metrics("b", "train")
    assert [x["step"] for x in a] == [x["step"] for x in b] and a[:10] == b[:10]
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], rel=1e-4)


@pytest.mark.parametrize(
    "before, after", [("float32", "float16"), ("float16", "bfloat16"), ("bfloat16", "float16")]
)
def test_resume_with_different_dtype(before, after, main):
    """Before or after the resume, the dtype may need a GradScaler."""
    assert main("run", dtype=before, stop_after=4) == 143
    assert main("run", "--resume", micro=False, dtype=after) == 0
    assert f"dtype: '{before}' -> '{after}'" in main.stderr
    assert metrics("run", "train")[-1]["step"] == 24


def test_resume_on_different_machine_prints_both(main, monkeypatch):
    """dtype=auto is chosen anew; compile=auto stays what it was."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64"})
    assert main("run", dtype="auto", compile="auto", stop_after=4) == 143
    assert main("run", "--resume", micro=False, stop_after=5) == 143 and "so far" not in main.stderr
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "arm64", "bf16": True})
    state = checkpoint.read("run/latest.pt")
    checkpoint.save("run/latest.pt", state | {"compiled": True})
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda *args, **kwargs: model(*args, **kwargs))
    assert main("run", "--resume", micro=False) == 0
    assert "machine  CPU (arm64), bfloat16 (it has bf16 matrix units), compiled" in main.stderr
    assert "the steps so far were made on CPU (x86_64), float32 (it has no bf16 matrix units)" in main.stderr


# ----------------------------------------------------------------------------------------------------------
# Metrics


def reference_bpb(model: GPT, ids: list[int], tok, cross_stories: bool = True) -> tuple[float, float]:
    """(nats per token, bits per byte), one token at a time: fixed windows, end-of-text before the first."""
    T, nats, size = model.config.block_size, 0.0, 0
    stream = [tok.eot, *ids]
    for i, target in enumerate(ids):
        start = i - i % T  # of this token's window
        if not cross_stories:  # or of its story, if later (RoPE depends on distances only)
            start = max([start, *(k for k in range(start, i + 1) if stream[k] == tok.eot)])
        with torch.no_grad():
            logits, _ = model.eval()(torch.tensor([stream[start : i + 1]]))
        nats -= F.log_softmax(logits[0, -1].double(), -1)[target].item()
        size += 1 if target == tok.eot else len(tok.tokens[target])
    return nats / len(ids), nats / math.log(2) / size


@pytest.mark.parametrize("eval_tokens", [0, 1, 16, 37, 10_000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_bits_per_byte_matches_reference(eval_tokens, batch_size):
    data = random_data()
    t = trainer(data, eval_tokens=eval_tokens, batch_size=batch_size)
    for step in range(3):
        t.train_step(step)
    state = torch.get_rng_state()
    result = t.val_step()
    assert torch.equal(state, torch.get_rng_state()), "the RNG state does not change"
    loss, bpb = reference_bpb(t.model, data.val[: eval_tokens or None].tolist(), data.tokenizer)
    assert result["loss"] == pytest.approx(loss, rel=1e-5) and result["bpb"] == pytest.approx(bpb, rel=1e-5)


def test_evaluation_applies_document_masking():
    t, unmasked = trainer(cross_stories=False, eval_tokens=0), trainer(eval_tokens=0)
    loss, _ = reference_bpb(t.model, t.data.val.tolist(), t.data.tokenizer, cross_stories=False)
    assert t.val_step()["loss"] == pytest.approx(loss, rel=1e-6)
    assert unmasked.val_step()["loss"] != pytest.approx(loss, rel=1e-6), "masking changes the loss"


@pytest.mark.parametrize("cross_stories", [True, False])
def test_evaluate_matches_training_evaluation(cross_stories, main, tmp_path, capsys):
    for name in ("train", "val"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name} {i}" for i in range(30)))
    prepare.prepare("short", "byte", source=str(tmp_path), data_dir="data")
    changes = dict(dataset="short", data_dir="data", eval_tokens=0, cross_stories=cross_stories)
    assert main("run", learning_rate=0.1, **changes) == 0
    assert evaluate.main(["--out_dir=run"]) == 0
    assert f"{metrics('run', 'val')[-1]['loss']:.4f} nats a token" in capsys.readouterr().out
    assert evaluate.main(["--out_dir=run", "--dtype=int8"]) == 0
    nats = float(capsys.readouterr().out.split(" nats")[0].split()[-1])
    assert nats == pytest.approx(metrics("run", "val")[-1]["loss"], rel=0.02)


def test_bits_per_byte_counts_bytes_of_bpe_tokens():
    tok = tokenizer.train_bpe(["the cat sat on the mat, the cat sat on the hat " * 5] * 20, 270)
    assert tok.vocab_size > 260
    ids = np.array(
        [*tok.encode("the cat sat on the hat"), tok.eot, *tok.encode("the mat"), tok.eot], dtype="<u2"
    )
    data = datasets.Data(np.tile(ids, 20), ids, {"limit": None}, tok, Path("nowhere"))
    c = config(vocab_size=tok.vocab_size, eval_tokens=0)
    result = Trainer(c, GPT(c.model), data).val_step()
    assert result["bpb"] == pytest.approx(result["loss"] * len(ids) / math.log(2) / (22 + 1 + 7 + 1))


def test_metrics_format(main):
    assert main("run", max_iters=17, eval_interval=6, log_interval=4, gradient_accumulation_steps=2) == 0
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    val_rows = [line for line in rows if line["split"] == "val"]
    train_rows = [line for line in rows if line["split"] == "train"]
    assert [line["step"] for line in val_rows] == [0, 6, 12, 17], "at 0, every eval_interval, the end"
    assert [line["step"] for line in train_rows] == [1, 4, 8, 12, 16, 17]
    common = {"step", "split", "loss", "tokens", "elapsed_s"}
    assert all(line.keys() == common | {"bpb"} for line in val_rows)
    assert all(line.keys() == common | {"lr", "grad_norm", "tokens_per_s"} for line in train_rows)
    assert all(line["tokens"] == line["step"] * 16 * 4 * 2 for line in rows)
    assert [line["step"] for line in rows] == sorted(line["step"] for line in rows)
    assert [line["elapsed_s"] for line in rows] == sorted(line["elapsed_s"] for line in rows)
    assert val_rows[0]["loss"] == pytest.approx(math.log(257), abs=0.1), "nats per token"
    t = trainer(
        datasets.load_data(Path(train_config("run")["data_dir"], "mini", "byte")), max_iters=17, batch_size=8
    )
    assert t.train_step(0)["loss"] == pytest.approx(train_rows[0]["loss"], rel=1e-6), "over all micro-batches"


def train_config(run) -> dict:
    return checkpoint.read(Path(run, "latest.pt"))["train_config"]


def test_elapsed_continues_after_resume(main):
    assert main("run", stop_after=8) == 143
    state = checkpoint.read("run/latest.pt")
    state["progress"]["elapsed"] += 1000
    checkpoint.save("run/latest.pt", state)
    assert main("run", "--resume") == 0
    assert 1000 < json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])["elapsed_s"] < 1100


def test_summary_reports_updates_made_and_best_evaluations(tmp_path, monkeypatch, capsys):
    """Of this run and of the newest earlier run of the same recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "plot", lambda *args: None)
    monkeypatch.setattr(generate, "stories", lambda *args, **sampling: [])
    data = random_data()._replace(meta={"corpus": "random", "val": dict(bytes=80, stories=10, tokens=90)})
    for age, name in ((200, "run"), (100, "run-2"), (0, "run-3")):
        t = trainer(data, out_dir=Path("out", name), max_iters=100)
        for step, loss in ((1, 3.0), (2, 2.0 + age / 1000), (3, 2.5)):
            t.log(step, {"loss": loss, "bpb": loss / 2}, split="val")
        t.directory.write_config({"data": t.fingerprint})
        os.utime(Path("out", name), (time.time() - age,) * 2)
    t.progress.step = 35
    report.final(t, "run")
    err = capsys.readouterr().err
    assert "35 updates, 0.00M tokens = 3.20 epochs" in err  # 35 * 4 * 16 / 700
    assert "best val loss 2.0000 nats a token, 1.0000 bits per byte (step 2) in out/run-3\n" in err
    assert "best val loss 2.1000 nats a token, 1.0500 bits per byte (step 2) in out/run-2\n" in err
    assert err.count("best val loss") == 2


def test_entropy_in_the_plot_is_in_nats_per_token(tmp_path, monkeypatch):
    """The unit of the losses in the plot. End-of-text counts as one byte."""
    monkeypatch.chdir(tmp_path)
    val, floors = dict(bytes=80, stories=10, tokens=45), []
    monkeypatch.setattr(report, "plot", lambda metrics, floor: floors.append(floor))
    monkeypatch.setattr(generate, "stories", lambda *args, **sampling: [])
    for entropy in ({"floor_bpb": 0.5}, {}):
        data = random_data()._replace(meta={"corpus": "random", "val": val, **entropy})
        report.final(trainer(data, out_dir="run", prompt="Tom"), "run")
    assert floors == [pytest.approx(0.5 * math.log(2) * 2), None]


def test_checkpoint_stores_elapsed_seconds_over_resumes(tmp_path):
    t = trainer(out_dir=tmp_path)
    t.progress.elapsed, t.began = 1000.0, t.began - 1e6  # before the resume; as if resumed 1e6 s ago
    t.save_checkpoint(0)
    assert checkpoint.read(tmp_path / "latest.pt")["progress"]["elapsed"] > 1_001_000


def test_plan_numbers(monkeypatch):
    """Epochs of the whole run, memory of one micro-batch."""
    monkeypatch.setattr(machine.Machine, "base_memory", lambda self: 0)
    data, machine_of = random_data(), cpu_machine()
    data = data._replace(meta={"train": {"stories": 70}})

    def plan(**changes) -> str:
        return report.plan(config(**changes), data, machine_of, iters=350)

    shape = dict(batch_size=4, gradient_accumulation_steps=3, n_embd=128, block_size=64)
    text = plan(**shape)
    assert "12 rows x 64 = 768 tokens a step; 350 steps = 0.3M tokens = 384.00 epochs" in text
    assert "70 stories" in text and "not compiled" in text
    c = config(**shape).model
    for rows in (4, 400):
        memory = c.memory(rows * 64, 4) / 2**20
        assert f"about {memory:,.0f} MB of memory" in plan(**shape | dict(batch_size=rows))


def test_console_without_terminal(capsys):
    """Prints the first update, every tenth logged update with the remaining time, and every evaluation."""
    with report.Console(trainer(max_iters=100, log_interval=2)) as console:
        for step in (1, *range(2, 42, 2)):
            console.show({"step": step, "split": "train", "loss": 2.5, "lr": 0.01, "tokens_per_s": 128})
        console.show({"step": 41, "split": "val", "loss": 2.25, "bpb": 1.125})
    first, second, third, val = capsys.readouterr().err.splitlines()
    assert first.split() == "step 1 loss 2.5000 lr 0.01 128 tokens/s 50 s left".split()
    assert second.split()[1] == "20" and second.endswith(" 40 s left")
    assert third.split()[1] == "40" and third.endswith(" 30 s left")
    assert val.split() == "step 41 val loss 2.2500 1.1250 bits per byte".split()


@pytest.mark.slow  # measures memory, which other processes influence
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory usage from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planned_memory_matches_peak(dtype, tmp_path, corpus):
    shape = dict(n_layer=4, n_embd=192, n_head=4, block_size=128, batch_size=8, max_iters=3, dtype=dtype)
    argv = [f"--{key}={value}" for key, value in (MICRO | shape | {"data_dir": corpus}).items()]
    err = run_script(ROOT / "train.py", *argv, "--out_dir=run", cwd=tmp_path).stderr
    planned = int(re.search(r"about ([\d,]+) MB of memory", err)[1].replace(",", ""))
    peak = int(re.search(r"peak memory ([\d,]+) MB", err)[1].replace(",", ""))
    assert planned == pytest.approx(peak, rel=0.2)


def test_final_report(tmp_path, monkeypatch, corpus, capsys):
    """The end of a real run: loss.png, summary with that of the previous run, samples, the next command."""
    monkeypatch.chdir(tmp_path)
    argv = [f"--{k}={v}" for k, v in MICRO.items()] + [
        f"--data_dir={corpus}",
        "--prompt=Tom",
        "--max_iters=4",
    ]
    for _ in range(2):
        assert train.main(argv) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^val_bpb: \d\.\d{4}$", out, re.M) and out.count("val_bpb") == 2, (
        "once per run, on stdout"
    )
    assert "in out/run\n" in err and "in out/run-2\n" in err and "bits per byte" in err
    assert Path("out/run-2/loss.png").read_bytes().startswith(b"\x89PNG")
    assert err.count("\nTom") == 6 and "next:  python sample.py --out_dir=out/run-2 --prompt=Tom" in err
    assert train.main([*argv, "--eval_tokens=50", "--seed=1"]) == 0, "compared: same data"
    assert "in out/run-2\n" in capsys.readouterr().err
    config = json.loads(Path("out/run-3/config.json").read_text())
    assert config["settings"]["seed"] == 1 and config["settings"]["model"]["vocab_size"] == 257
    assert config["command"][0] == "train.py" and "--seed=1" in config["command"]
    assert config["provenance"]["torch"] == torch.__version__
    Path("other.txt").write_text("\n\n".join(f"A story of {i} dogs and one cat." for i in range(99)))
    prepare.prepare("other", "byte", source="other.txt", data_dir="data")
    assert train.main([*argv, "--dataset=other", "--data_dir=data"]) == 0, "not compared: other data"
    err = capsys.readouterr().err
    assert "in out/run-4\n" in err and "in out/run-3\n" not in err


# ----------------------------------------------------------------------------------------------------------
# The notebook, loggers, compiling


def test_training_loop_in_a_notebook(corpus, tmp_path):
    """A user's own loop over Trainer's methods."""
    data = datasets.load_data(corpus / "mini" / "byte")
    c = config(max_iters=20)
    model = GPT(c.model)
    trainer = Trainer(c, model, data, out_dir=tmp_path)
    for step in range(c.max_iters):
        train_loss = trainer.train_step(step)
        if step % c.log_interval == 0:
            trainer.log(step, train_loss)
        if step % c.eval_interval == 0:
            val_loss = trainer.val_step()
            trainer.log(step, val_loss, split="val")
        if step % c.save_interval == 0:
            trainer.save_checkpoint(step + 1)

    val = metrics(tmp_path, "val")
    assert val[-1]["loss"] < val[0]["loss"] - 0.3
    assert len(metrics(tmp_path, "train")) == 10
    resumed = Trainer(c, GPT(c.model), data, out_dir=tmp_path)
    assert resumed.load_checkpoint(checkpoint.read(tmp_path / "latest.pt")) == 16
    model, tok = checkpoint.load(tmp_path)
    assert tok.vocab_size == 257 and not model.training


def test_trainer_without_out_dir():
    t = trainer()
    t.log(1, t.train_step(0))
    t.keep_best(1, t.val_step())
    t.save_checkpoint(1)


def test_loggers_are_imported_only_when_selected(tmp_path):
    code = """if 1:
        import sys, train
        loaded = {name.split(".")[0] for name in sys.modules}
        unwanted = {"wandb", "tensorboard", "matplotlib", "datasets", "transformers", "tokenizers",
                    "tiktoken"}
        assert not loaded & unwanted, loaded & unwanted"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_tensorboard(main):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main("run", logger="tensorboard", max_iters=6) == 0
    logged = events.EventAccumulator("run").Reload()
    assert set(logged.Tags()["scalars"]) >= {"train/loss", "val/loss", "val/bpb", "train/lr"}
    expected = {line["step"]: line["loss"] for line in metrics("run", "val")}
    assert {e.step: e.value for e in logged.Scalars("val/loss")} == pytest.approx(expected)


def test_logger_that_is_not_installed(main, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main("run", logger="wandb") == 2
    assert "pip install wandb" in main.stderr and "Traceback" not in main.stderr


def test_wandb(main, monkeypatch):
    logged, init_kwargs = [], {}
    run = SimpleNamespace(log=lambda line, step: logged.append((step, line)))
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **kwargs: init_kwargs.update(kwargs) or run)
    )
    assert main("run", logger="wandb", max_iters=6) == 0
    assert init_kwargs["config"]["max_iters"] == 6
    assert [step for step, _ in logged] == [line["step"] for line in metrics("run")]


def test_compile_failure_warns_and_continues(main, monkeypatch):
    def broken(model, **_):
        raise RuntimeError("no compiler found\nand more lines")

    monkeypatch.setattr(torch, "compile", broken)
    assert main("run", compile="True", dropout=0.1) == 0
    warning = next(line for line in main.stderr.splitlines() if "WARNING" in line)
    assert warning == "WARNING: this run is not compiled, and slower: RuntimeError: no compiler found"
    monkeypatch.undo()


def test_missing_cpp_compiler_warns(main, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nonexistent"))
    assert main("run", compile="True", max_iters=2) == 0
    (warning,) = [line for line in main.stderr.splitlines() if "WARNING" in line]
    assert "no C++ compiler found; install g++" in warning and len(warning) < 140


def test_compile_changes_no_weights_or_losses(main, monkeypatch):
    """The trial step in Trainer.compile has no side effects. torch.compile is mocked."""
    assert main("plain", dropout=0.1) == 0
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda *args, **kwargs: model(*args, **kwargs))
    assert main("compiled", dropout=0.1, compile="True") == 0
    assert "compiled in" in main.stderr
    assert metrics("plain") == metrics("compiled")
    assert bit_equal(run_state("plain")["model"], run_state("compiled")["model"])
    assert not any(k.startswith("_orig") for k in run_state("compiled")["model"])


def test_compile_makes_one_graph_per_window_length_and_one_for_evaluation(main, monkeypatch):
    """All graphs are compiled before the first step; no later step or evaluation recompiles."""
    counter, original_compile, counts = CompileCounter(), torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda model, **o: original_compile(model, backend=counter, **o))
    trainer_compile = Trainer.compile

    def count_graphs(self):
        torch._dynamo.reset()
        trainer_compile(self)
        counts.append(counter.frame_count)

    monkeypatch.setattr(Trainer, "compile", count_graphs)
    variants = dict(context_schedule="0:0.25, 0.3:0.5, 0.6:1", pointer=True, cross_stories=False)
    assert main("run", compile="True", **variants) == 0
    assert counts == [4] and counter.frame_count == 4, "three window lengths and the evaluation"


class HostReads(TorchDispatchMode):
    """Counts the operations that copy a value to the host, which would synchronize a GPU."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_train_step_does_not_synchronize(optimizer, monkeypatch):
    """Except in read_outcome, which reads the outcome of the previous step."""
    t = trainer(optimizer=optimizer, pointer=True, cross_stories=False, dropout=0.1)
    t.train_step(0)
    order = []
    monkeypatch.setattr(Trainer, "read_outcome", lambda self: order.append(self.unread[0]))
    with HostReads() as reads:
        for step in (1, 2, 3):
            t.train_step(step)
    assert reads.count == 0 and order == [0, 1, 2]


# ----------------------------------------------------------------------------------------------------------
# CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_training_on_cuda(main, dtype):
    changes = dict(device="cuda", dtype=dtype, optimizer="muon", dropout=0.1)
    assert main("run", stop_after=10, **changes) == 143
    assert main("run", "--resume") == 0
    val = metrics("run", "val")
    assert val[-1]["loss"] < val[0]["loss"] - 0.1


@pytest.mark.cuda
def test_compile_on_cuda(main):
    assert main("run", device="cuda", dtype="auto", compile="True") == 0
    assert "WARNING" not in main.stderr and "compiled in" in main.stderr


@pytest.mark.cuda
def test_flex_attention_gradients_match_the_dense_mask():
    torch.manual_seed(0)
    c = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=256, vocab_size=64, separator=5)
    model, idx = GPT(c).cuda(), torch.randint(64, (2, 257), device="cuda")
    grads = []
    for forward in (model, machine.compiled(model)):
        model.zero_grad()
        forward(idx[:, :-1], idx[:, 1:])[1].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert max_difference(*grads) < 1e-3


@pytest.mark.cuda
def test_train_step_does_not_synchronize_the_gpu():
    t = trainer(device="cuda", optimizer="muon", pointer=True, cross_stories=False, dtype="float32")
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step == 3 else "default")
        t.read_outcome()
        t.unread = None  # otherwise, the next step reads it and synchronizes
        t.train_step(step)
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_cuda_out_of_memory_suggests_a_smaller_batch(main):
    assert main("run", device="cuda", batch_size=50_000_000, block_size=1000, n_embd=1024) == 1
    assert "--batch_size" in main.stderr and "Traceback" not in main.stderr


def test_out_of_memory_prints_one_line(main, monkeypatch):
    def full(self, step):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand so on")

    monkeypatch.setattr(Trainer, "train_step", full)
    assert main("run") == 1
    assert "lower --batch_size=4" in main.stderr.splitlines()[-1] and "Traceback" not in main.stderr


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
