"""init_from: a new run from the weights and the tokenizer of another."""

import pytest
import torch

from nanostlm import checkpoint, runs
from nanostlm.formats import hf


@pytest.fixture
def origin(here, tmp_path):
    """A finished micro run."""
    assert here("first", max_iters=3) == 0
    return tmp_path / "first"


def test_begins_from_the_weights_with_a_fresh_optimizer(here, origin):
    assert (
        here("second", init_from="first", learning_rate=1e-9, max_iters=1, warmup_iters=0, weight_decay=0)
        == 0
    )
    before, after = (checkpoint.read(run / "latest.pt") for run in (origin, origin.parent / "second"))
    best = checkpoint.read(origin / "best.pt")["model"]
    assert after["step"] == 1
    for name, weight in after["model"].items():
        torch.testing.assert_close(weight, best[name], atol=1e-6, rtol=0)
    assert before["tokenizer"] == after["tokenizer"]


def test_another_model_is_refused_by_name(here, origin):
    assert here("second", init_from="first", n_layer=3) == 2
    assert "n_layer=3" in here.said and not (origin.parent / "second").exists()


def test_no_such_checkpoint(here):
    assert here("second", init_from="nowhere.pt") == 2
    assert "nowhere.pt" in here.said


def test_from_a_hugging_face_folder(here, origin, tmp_path):
    model, tokenizer = checkpoint.load(origin)
    try:
        hf.to_hf(model, tokenizer, tmp_path / "hf")
    except ValueError as error:
        pytest.skip(f"the micro model has no equivalent there: {error}")
    assert here("second", init_from=f"hf:{tmp_path / 'hf'}", max_iters=1) == 0
    assert here("third", init_from="first", max_iters=1) == 0
    first = [runs.read_metrics(tmp_path / run)[0]["loss"] for run in ("second", "third")]
    assert first[0] == pytest.approx(first[1], rel=1e-6)
