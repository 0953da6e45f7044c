"""nanostlm/optim.py: schedules and optimizers."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from helpers import ROOT, config, trainer

from model import GPT
from nanostlm import optim

# ----------------------------------------------------------------------------------------------------------
# Schedules


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


# ----------------------------------------------------------------------------------------------------------
# Optimizers


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
