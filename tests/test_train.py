"""train.py: batches, settings, one update, resuming, metrics, compiling."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    batches,
    bit_equal,
    config,
    cpu_machine,
    gradients,
    max_difference,
    metrics,
    random_data,
    run_state,
    trainer,
)
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import prepare
import train
from model import GPT, GPTConfig
from nanostlm import checkpoint, machine, optim, report, tokenizer
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
    with pytest.raises(ValueError, match="16 tokens, fewer than one window"):
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
# Settings


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
    "changes",
    [dict(), dict(optimizer="muon"), dict(dtype="float16"), dict(dtype="float16", optimizer="muon")],
    ids=str,
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
    assert t.progress.skipped == 0 or "update 2 skipped" in err and "update 5 skipped" in err


def test_checkpoint_counts_the_update_just_skipped(tmp_path):
    """Although its outcome is read a step late otherwise."""
    t = trainer(out_dir=tmp_path)
    inject_inf(t, {2: "loss"})
    for step in range(3):
        t.train_step(step)
    t.save_checkpoint(3)
    assert checkpoint.read(tmp_path / "latest.pt")["progress"]["skipped"] == 1


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
    assert bit_equal(dict(t.model.state_dict()), first) and "from step 0" in capsys.readouterr().err


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
    assert "previous steps ran on CPU (x86_64), float32 (it has no bf16 matrix units)" in main.stderr


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
    for dtype, tolerance in (("float32", 1e-4), ("int8", 0.02)):
        assert evaluate.main(["--out_dir=run", f"--dtype={dtype}"]) == 0
        line = next(x for x in capsys.readouterr().out.splitlines() if "nats per token" in x)
        assert float(line.split()[4]) == pytest.approx(metrics("run", "val")[-1]["loss"], rel=tolerance)


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


def test_checkpoint_stores_elapsed_seconds_over_resumes(tmp_path):
    t = trainer(out_dir=tmp_path)
    t.progress.elapsed, t.began = 1000.0, t.began - 1e6  # before the resume; as if resumed 1e6 s ago
    t.save_checkpoint(0)
    assert checkpoint.read(tmp_path / "latest.pt")["progress"]["elapsed"] > 1_001_000


# ----------------------------------------------------------------------------------------------------------
# Trainer without train.main, compiling


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
    """The trial passes of Trainer.compile have no side effects. torch.compile is mocked."""
    calls = []

    def compiled(model, **_):
        return lambda *args, **kwargs: calls.append(model.training) or model(*args, **kwargs)

    assert main("plain", dropout=0.1) == 0
    monkeypatch.setattr(torch, "compile", compiled)
    assert main("compiled", dropout=0.1, compile="True") == 0
    assert "compiled in" in main.stderr
    assert calls.count(True) == 1 + 24, "one trial pass, and every update is compiled"
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
