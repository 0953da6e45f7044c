"""init_from: start a run from the weights and the tokenizer of another."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import config

import prepare
from model import GPT, GPTConfig
from nanostlm import checkpoint, runs
from nanostlm.data import load_data
from nanostlm.formats import hf
from nanostlm.tokenizer import from_state


@pytest.fixture
def origin(main, tmp_path):
    """A finished micro run."""
    assert main("first", max_iters=3) == 0
    return tmp_path / "first"


def test_init_from_takes_weights_and_a_new_optimizer(main, origin):
    assert (
        main("second", init_from="first", learning_rate=1e-9, max_iters=1, warmup_iters=0, weight_decay=0)
        == 0
    )
    before, after = (checkpoint.read(run / "latest.pt") for run in (origin, origin.parent / "second"))
    best = checkpoint.read(origin / "best.pt")["model"]
    assert after["step"] == 1
    for name, weight in after["model"].items():
        torch.testing.assert_close(weight, best[name], atol=1e-6, rtol=0)
    assert before["tokenizer"] == after["tokenizer"]


def test_init_from_with_another_model_shape_names_the_setting(main, origin):
    assert main("second", init_from="first", n_layer=3) == 2
    assert "n_layer=3" in main.stderr and not (origin.parent / "second").exists()


def test_adapt_changes_only_settings_without_weights():
    """Learned positions are truncated to a shorter context and never extended."""
    idx = torch.randint(0, 256, (1, 8))
    for position in ("rope", "learned"):
        c = config(position=position, block_size=16, separator=256, softcap=5.0).model
        model = GPT(c).eval()
        adapted = checkpoint.adapt(model, GPTConfig(block_size=8, dropout=0.5), "first").eval()
        assert adapted.config == replace(c, block_size=8, dropout=0.5, separator=-1)
        assert torch.equal(adapted(idx)[0], model(idx)[0])
    with pytest.raises(ValueError, match="block_size=32, but first has learned only 16 positions"):
        checkpoint.adapt(model, GPTConfig(block_size=32), "first")


def test_init_from_missing_checkpoint(main):
    assert main("second", init_from="nowhere.pt") == 2
    assert "nowhere.pt" in main.stderr


def test_init_from_hugging_face_folder(main, origin, tmp_path):
    model, tokenizer = checkpoint.load(origin)
    try:
        hf.to_hf(model, tokenizer, tmp_path / "hf")
    except ValueError as error:
        pytest.skip(f"the micro model has no equivalent there: {error}")
    assert main("second", init_from=f"hf:{tmp_path / 'hf'}", max_iters=1) == 0
    assert main("third", init_from="first", max_iters=1) == 0
    first = [runs.read_metrics(tmp_path / run)[0]["loss"] for run in ("second", "third")]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_init_from_prepares_the_corpus_with_its_tokenizer(main, corpus):
    """From the source that prepare.py was given for another tokenizer."""
    source, changes = str(corpus.parent / "mini.txt"), dict(dataset="other", data_dir="data", max_iters=1)
    prepare.prepare("mini", "bpe270", source, data_dir="data")
    assert main("first", dataset="mini", tokenizer="bpe270", data_dir="data", max_iters=3) == 0
    texts = (f"{i} {text}" for i, text in enumerate((corpus.parent / "mini.txt").read_text().split("\n\n")))
    Path("other.txt").write_text("\n\n".join(texts))
    prepare.prepare("other", "bpe270", "other.txt", data_dir="data")
    assert main("second", init_from="first", **changes) == 0
    tokenizer = checkpoint.read("second/latest.pt")["tokenizer"]
    assert tokenizer == checkpoint.read("first/latest.pt")["tokenizer"]
    name = f"bpe270-{from_state(tokenizer).sha256[:8]}"
    assert checkpoint.read("second/latest.pt")["train_config"]["tokenizer"] == name
    assert load_data(Path("data", "other", name)).train.size > 100
    shutil.rmtree(Path("data", "other", name))  # a resumed run prepares it again
    assert main("second", "--resume", micro=False, max_iters=2, data_dir="data") == 0


def test_init_from_when_the_source_of_the_corpus_is_missing(main, origin, corpus):
    Path("other.txt").write_text((corpus.parent / "mini.txt").read_text())
    prepare.prepare("other", "bpe270", "other.txt", data_dir="data")
    Path("other.txt").unlink()
    assert main("second", init_from="first", dataset="other", data_dir="data") == 2
    assert (
        "prepared with bpe270, not with this model's tokenizer" in main.stderr
        and "add --source=PATH" in main.stderr
    )
