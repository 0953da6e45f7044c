"""evaluate.py and nanostlm/tasks.py against simple references."""

import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import prepare
from model import GPT, GPTConfig
from nanostlm import checkpoint, tasks, tokenizer, toystories
from nanostlm import data as datasets
from nanostlm.generate import quantize

BYTE = tokenizer.get("byte")
EOT = BYTE.eot


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """80 toystories as bytes, one or two of them for validation."""
    folder = tmp_path_factory.mktemp("data")
    return datasets.load_data(prepare.prepare("toystories", "byte", stories=80, data_dir=folder))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPTConfig(
        n_layer=1, n_head=2, n_embd=16, block_size=1024, vocab_size=257, init="fan_in", tied=False
    )
    return GPT(config).eval()


@pytest.fixture
def run(tmp_path, model, data, monkeypatch):
    """The path of a checkpoint of the model that names the data as its training data."""
    monkeypatch.chdir(tmp_path)
    trained = dict(
        data_dir=str(data.folder.parent.parent), dataset="toystories", tokenizer="byte", cross_stories=True
    )
    state = {
        "model": model.state_dict(),
        "model_config": dataclasses.asdict(model.config),
        "train_config": trained,
    }
    path = tmp_path / "out" / "toys" / "best.pt"
    path.parent.mkdir(parents=True)
    checkpoint.save(path, state | {"tokenizer": BYTE.state()})
    return path


def stories_of(data) -> list[list[int]]:
    """The validation stories, each with its end-of-text."""
    ids, stories = data.val.tolist(), []
    while ids:
        end = ids.index(EOT) + 1
        stories.append(ids[:end])
        ids = ids[end:]
    return stories


@torch.no_grad()
def reference_nats(model, ids: list[int]) -> float:
    """Negative log-likelihood of ids in windows of block_size, with end-of-text before the first."""
    T, total = model.config.block_size, 0.0
    for start in range(0, len(ids), T):
        targets = torch.tensor(ids[start : start + T])
        inputs = torch.tensor([EOT, *ids][start : start + len(targets)])
        logp = model(inputs[None])[0][0].log_softmax(dim=-1)
        total -= logp.gather(1, targets[:, None]).sum().item()
    return total


def test_validation_loss_matches_reference(model, data):
    nats, bpb, n_tokens = tasks.validation_loss(model, data, rows=2)
    assert n_tokens == len(data.val)
    assert nats == pytest.approx(reference_nats(model, data.val.tolist()) / n_tokens, rel=1e-5)
    assert bpb == pytest.approx(nats / math.log(2), rel=1e-9)  # each token is a byte


@pytest.mark.parametrize("block_size", [1024, 64])
def test_grammar_report_compares_with_the_entropy(model, data, block_size, monkeypatch):
    model = GPT(dataclasses.replace(model.config, block_size=block_size)).eval()
    whole = [story for story in stories_of(data) if len(story) <= block_size]
    line, _ = tasks.grammar_report(model, data, rows=2, n_stories=1)
    if not whole:
        assert line.startswith("on 0 whole stories: ") and line.endswith(": no story fits into the context")
        return
    n_bytes = sum(map(len, whole))
    bpb = sum(reference_nats(model, story) for story in whole) / n_bytes / math.log(2)
    logprobs = [toystories.check(BYTE.decode(story[:-1])).logprob for story in whole]
    entropy = -sum(logprobs) / n_bytes / math.log(2)
    words = line.replace(":", "").replace(",", "").split()
    assert int(words[1]) == len(whole)
    assert float(words[4]) == pytest.approx(bpb, abs=2e-4) and float(words[9]) == pytest.approx(
        entropy, abs=1e-4
    )
    assert line.endswith(f"{bpb / entropy - 1:.1%} above it")


def test_whole_stories_skips_empty_and_too_long_ones(data):
    stories = [[*b"four", EOT], [EOT], [*b"three", EOT], [*b"a", EOT]]
    val = np.array([i for story in stories for i in story] + list(b"cut"), dtype=data.val.dtype)
    selected = tasks.whole_stories(data._replace(val=val), block_size=5)
    assert [story.tolist() for story in selected] == [stories[0], stories[3]]


def test_grammar_report_counts_valid_stories(model, data, monkeypatch):
    valid = BYTE.decode(stories_of(data)[0][:-1])
    texts = [valid, valid + " Nonsense.", "Nonsense.", valid]
    monkeypatch.setattr(tasks, "stories", lambda *args: texts)
    rules = [toystories.check(text).rule for text in texts[1:3]]
    line = tasks.grammar_report(model, data, n_stories=4)[1]
    assert line.startswith("2 of 4 generated stories are valid (") and all(rule in line for rule in rules)
    monkeypatch.setattr(tasks, "stories", lambda *args: [valid])
    assert tasks.grammar_report(model, data, n_stories=1)[1] == "1 of 1 generated stories are valid"


def test_default_is_the_newest_run_on_its_own_data(run, model, data, capsys):
    assert evaluate.main([]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    nats, bpb, n_tokens = tasks.validation_loss(model, data)
    assert (
        str(run.relative_to(run.parents[2])) in first
        and f"({n_tokens:,} tokens of {data.folder}/val.bin)" in first
    )
    assert f"{nats:.4f} nats a token, {bpb:.4f} bits per byte" in first
    assert others[0].startswith("on ") and others[1].endswith(
        "generated stories are valid (100 not of the grammar)"
    )
    assert evaluate.main(["--out_dir", str(run), "--data", str(data.folder), "--rows=3", "--dtype=int8"]) == 0
    int8 = float(capsys.readouterr().out.split(" nats")[0].split()[-1])
    quantized = copy.deepcopy(model)
    quantize(quantized)
    assert int8 == pytest.approx(tasks.validation_loss(quantized, data, 3)[0], abs=1e-4) != round(nats, 4)
    assert int8 == pytest.approx(nats, rel=0.02)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--out_dir", "nowhere"], "no checkpoint at nowhere"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "other/toystories/bpe264"], "was prepared with another tokenizer"),
        (["--rows", "0"], "rows must be between 1 and 4,096, not 0"),
        (["--row", "4"], "there is no option '--row'; did you mean '--rows'?"),
        (["--dtype", "float8"], "--dtype"),
    ],
)
def test_user_error_prints_one_line_and_returns_2(run, argv, message, capsys):
    if "bpe264" in argv[1]:
        prepare.prepare("toystories", "bpe264", stories=40, data_dir="other")
        capsys.readouterr()
    assert evaluate.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_checkpoint_without_data_needs_an_option(tmp_path, model, data, capsys):
    state = {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config)}
    checkpoint.save(tmp_path / "model.pt", state | {"tokenizer": BYTE.state()})
    assert evaluate.main(["--out_dir", str(tmp_path / "model.pt")]) == 2
    assert "pass --data" in capsys.readouterr().err
    assert evaluate.main(["--out_dir", str(tmp_path / "model.pt"), "--data", str(data.folder)]) == 0


def test_comparison_of_runs(main, capsys):
    assert main("a") == 0 and main("b", n_layer=1, max_iters=12) == 0
    assert evaluate.main(["a", "b", "--plot", "both.png"]) == 0
    *_, head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "max_iters", "n_layer"] and head.endswith("bits per byte")
    assert first.split()[:3] == ["a", "24", "2"] and second.split()[:3] == ["b", "12", "1"]
    assert "1,536" in first and "768" in second, "tokens of 24 and 12 updates"
    assert Path("both.png").read_bytes().startswith(b"\x89PNG")


def test_tasks_and_device_options(run, capsys):
    assert evaluate.main([str(run), "--tasks=bpb", "--device=cpu"]) == 0
    assert "generated stories" not in capsys.readouterr().out
    assert evaluate.main([str(run), "--tasks=bpb,nothing"]) == 2
    assert evaluate.main([str(run), "--device=tpu"]) == 2
    err = capsys.readouterr().err
    assert "unknown task nothing" in err and "device must be" in err


def test_tokenizer_is_read_from_the_checkpoint(main, monkeypatch):
    """So GPT-2's vocabulary, for example, need not be available."""
    assert main("run", max_iters=2) == 0

    def unreachable(name):
        raise tokenizer.Unreachable("no network")

    monkeypatch.setattr(tokenizer, "get", unreachable)
    assert evaluate.main(["run"]) == 0


def test_ctrl_c_exits_with_130_and_prints_nothing(run, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "validation_loss", interrupted)
    assert evaluate.main([str(run)]) == 130 and capsys.readouterr().err == ""
