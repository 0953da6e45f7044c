"""What every objective keeps to, and the numbers of distillation."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import MICRO, bit_equal, run_state

import experiments
import train
from experiments.distill import Config, Objective
from model import GPT, GPTConfig
from nanostlm import checkpoint, tokenizer

BYTES = tokenizer.get("byte")
PLAIN = dict(n_layer=1, n_head=2, n_embd=16, block_size=12, vocab_size=257, tied=False, loss_chunk=7)


def random_model(seed: int, scale: float = 0.15, **changes) -> GPT:
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**PLAIN | changes)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=scale)
    return model


def saved(path, model: GPT, tokens=BYTES) -> str:
    """The path of a checkpoint of the model."""
    state = {"model": model.float().state_dict(), "architecture": "gpt", "model_config": vars(model.config)}
    checkpoint.save(path, state | {"tokenizer": tokens.state()})
    return str(path)


def objective(model: GPT, teachers: list[GPT], tmp_path, **changes) -> Objective:
    paths = ",".join(saved(tmp_path / f"{i}.pt", teacher) for i, teacher in enumerate(teachers))
    config = SimpleNamespace(objective_config=Config(teacher=paths, **changes), architecture="gpt")
    found = Objective(config, model, SimpleNamespace(tokenizer=BYTES, folder="data"))
    found.teachers = [teacher.double() for teacher in found.teachers]
    return found


def ids(rows: int = 3, length: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.randint(0, 257, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return found[:, :-1], found[:, 1:].clone()


@pytest.mark.parametrize("pointer", [False, True])
@pytest.mark.parametrize("n_teachers", [1, 2])
@pytest.mark.parametrize("loss_chunk", [0, 7])
def test_distillation_is_the_formula(tmp_path, pointer, n_teachers, loss_chunk):
    model = random_model(0, pointer=pointer, separator=256, loss_chunk=loss_chunk)
    teachers = [random_model(seed, n_layer=2, pointer=True) for seed in range(1, 1 + n_teachers)]
    idx, targets = ids()
    targets[0, 3:6] = -1
    own = objective(model, teachers, tmp_path, alpha=0.3, temperature=1.7)
    loss, parts = own(model, idx, targets, 0)
    mean = sum(teacher(idx)[0] for teacher in own.teachers) / n_teachers
    p, q = ((logits / 1.7).softmax(-1) for logits in (mean, model(idx)[0]))
    kl = 0.0
    for row in range(3):
        for t in range(12):
            if targets[row, t] >= 0:
                kl += sum(
                    a * math.log(a / b) for a, b in zip(p[row, t].tolist(), q[row, t].tolist(), strict=True)
                )
    kl /= 33
    assert parts["kl"].item() == pytest.approx(kl, rel=1e-9)
    assert parts["loss"].item() == pytest.approx(model(idx, targets)[1].item(), rel=1e-12)
    assert loss.item() == pytest.approx(0.7 * parts["loss"].item() + 0.3 * 1.7**2 * kl, rel=1e-9)


def test_gradient_is_that_of_all_tokens_at_once(tmp_path):
    idx, targets = ids()
    found = []
    for chunk in (0, 7):
        model = random_model(0, pointer=True, loss_chunk=chunk)
        objective(model, [random_model(1)], tmp_path)(model, idx, targets, 0)[0].backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert found[0].norm() > 0.01 and torch.allclose(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pointer", [False, True])
def test_a_model_has_nothing_to_learn_from_itself(tmp_path, pointer):
    model = random_model(0, pointer=pointer)
    own = objective(model, [random_model(0, pointer=pointer)], tmp_path, alpha=1.0)
    with torch.no_grad():  # the teacher was saved in float32
        for p, q in zip(model.parameters(), own.teachers[0].parameters(), strict=True):
            p.copy_(q)
    own(model, *ids(), 0)[0].backward()
    assert max(p.grad.abs().max().item() for p in model.parameters()) < 1e-12
    other = objective(model, [random_model(1)], tmp_path, alpha=1.0)
    other(model, *ids(), 0)[0].backward()
    assert max(p.grad.abs().max().item() for p in model.parameters()) > 1e-3


def test_fresh_random_tokens_take_ln_v(tmp_path):
    """A teacher that has memorized other text shows the model nothing of new tokens."""
    idx, targets = ids(100, 12, seed=5)
    model = random_model(0, pointer=True)
    _, parts = objective(model, [random_model(1)], tmp_path)(model, idx, targets, 0)
    losses = torch.nn.functional.cross_entropy(
        model(idx)[0].flatten(0, 1), targets.flatten(), reduction="none"
    )
    assert parts["loss"] > math.log(257) - 3 * losses.std() / len(losses) ** 0.5


# ----------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def teacher(main) -> str:
    assert main("teacher", n_layer=1, max_iters=4) == 0
    return "teacher"


def test_resume_is_bitwise_exact(main, teacher):
    """Half of a run and the rest after --resume, without the setting, are the whole run; dropout included."""
    own = dict(objective="distill", teacher=teacher, alpha=0.6, dropout=0.1, gradient_accumulation_steps=2)
    assert main("whole", max_iters=12, lr_decay_iters=12, **own) == 0
    assert "forward and backward pass take" in main.stderr
    assert main("half", max_iters=7, lr_decay_iters=12, **own) == 0
    assert main("half", "--resume", micro=False, max_iters=12) == 0, main.stderr
    whole, half = run_state("whole"), run_state("half")
    assert whole["step"] == half["step"] == 12
    assert bit_equal(whole["model"], half["model"]) and bit_equal(whole["optimizers"], half["optimizers"])
    assert main("plain", max_iters=12, lr_decay_iters=12, dropout=0.1, gradient_accumulation_steps=2) == 0
    assert not bit_equal(whole["model"], run_state("plain")["model"])


def test_an_objective_gets_the_step_and_is_not_compiled(main, teacher, monkeypatch):
    steps, asked, choose = [], [], train.machine.choose

    def loss(self, model, idx, targets, step):
        steps.append(step)
        return experiments.Objective.__call__(self, model, idx, targets, step)

    monkeypatch.setattr(Objective, "__call__", loss)
    monkeypatch.setattr(train.machine, "choose", lambda *args: asked.append(args[2]) or choose(*args))
    assert main("run", max_iters=3, objective="distill", teacher=teacher, compile="auto") == 0
    assert steps == [0, 1, 2] and asked == ["False"]


def test_metrics_have_the_parts_and_the_cross_entropy(main, teacher, tmp_path):
    changes = dict(max_iters=2, log_interval=1, eval_tokens=0)
    assert main("plain", **changes) == 0
    assert main("taught", objective="distill", teacher=teacher, **changes) == 0
    first, taught = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()][1]
        for run in ("plain", "taught")
    )
    assert taught.keys() - first.keys() == {"kl"} and 0 < taught["kl"] < 1
    assert taught["loss"] == first["loss"], "of the same weights"


def test_only_the_cross_entropy_with_alpha_0_is_plain_training(main, teacher):
    assert main("plain", max_iters=6) == 0
    assert main("taught", max_iters=6, objective="distill", teacher=teacher, alpha=0) == 0
    for name, tensor in run_state("plain")["model"].items():
        assert torch.allclose(tensor, run_state("taught")["model"][name], atol=1e-6), name


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(objective="distil"), "objective must be one of distill"),
        (dict(objective="distill"), "needs a teacher, as in --teacher=out/teacher"),
        (dict(objective="distill", teacher="out/none"), "there is no checkpoint at out/none"),
        (dict(objective="distill", teacher="{teacher}", alpha=2), "alpha must be"),
        (
            dict(objective="distill", teacher="{teacher}", compile="True"),
            "leave out compile: objective=distill",
        ),
        (
            dict(objective="distill", teacher="{teacher}", block_size=32),
            "context of 16 tokens: lower block_size",
        ),
        (dict(objective="distill", teacher="{teacher}", architecture="bigram"), "architecture=bigram"),
        (dict(objective="distill", teacher="{other}"), "has another tokenizer (bpe259) than"),
        (dict(alpha=0.5), "there is no option '--alpha'"),
    ],
)
def test_user_error_is_one_line_that_names_it(main, teacher, corpus, tmp_path, changes, message):
    bpe = tokenizer.train_bpe(["a tiny story about a dog and a cat " * 20], 259)
    other = saved(tmp_path / "other.pt", random_model(0, vocab_size=259), bpe)
    names = {"teacher": teacher, "other": other}
    changes = {key: value.format(**names) if type(value) is str else value for key, value in changes.items()}
    if "architecture" in changes:  # it has no such settings
        changes = {
            key: x for key, x in (MICRO | changes).items() if key not in ("n_layer", "n_head", "n_embd")
        }
        changes["data_dir"] = corpus
    assert main("run", micro="architecture" not in changes, **changes) == 2
    assert message in main.stderr.splitlines()[-1]


def test_help_lists_the_settings_of_the_objective(capsys):
    for name in experiments.objectives():
        assert train.main([f"--objective={name}", "--help"]) == 0
        text = capsys.readouterr().out
        own, _ = experiments.objective(name)
        assert "\nthe objective:" in text
        for field in own.__dataclass_fields__:
            assert f"--{field} " in text
    assert replace(Config(teacher="x")).teacher == "x"
