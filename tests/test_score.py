"""Scoring: windows, nats per token, log-likelihoods, bits per byte; against token-by-token references."""

import math

import numpy as np
import pytest
import torch
from test_model import TINY, V, tiny, tokens

from model import GPT, GPTConfig
from nanostlm import score, tokenizer

EOT = V - 1


def reference_nats(model: GPT, text: list[int], stride: int) -> list[float]:
    """The nats of each token, from one forward pass over the ids before it in its window."""
    T, ids, nats = model.config.block_size, [EOT, *text], []
    for i in range(1, len(ids)):
        start = 0  # of the first window that reaches token i; the last window is full
        while start + T < i:
            start = min(start + stride, len(ids) - 1 - T) if stride < T else start + T
        logits = model(torch.tensor([ids[start:i]]))[0][0, -1]
        nats.append(-logits.log_softmax(-1)[ids[i]].item())
    return nats


@pytest.mark.parametrize("stride", [0, 1, 5, 8, 16])
@pytest.mark.parametrize("rows", [1, 3, 16])
@torch.no_grad()
def test_score_matches_reference(stride, rows):
    model = tiny()
    texts = [tokens(n, seed=n).tolist() for n in (1, 16, 17, 40, 3, 70)] + [[]]
    scores = score.score(model, texts, EOT, stride=stride, rows=rows)
    assert [len(nats) for nats in scores] == [len(text) for text in texts]
    for text, nats in zip(texts, scores, strict=True):
        assert nats.dtype == np.float32
        np.testing.assert_allclose(nats, reference_nats(model, text, stride or 16), rtol=1e-4, atol=1e-5)
    assert score.score(model, [], EOT) == []


@torch.no_grad()
def test_batches_are_full_and_have_little_padding(monkeypatch):
    """At most `rows` whole windows of positions, or MAX_LOGITS logits; texts of about the same length."""
    model, shapes = tiny(), []
    model.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    texts = [tokens(1 + i % 16, seed=i).tolist() for i in range(100)]
    score.score(model, texts, EOT, rows=4)
    positions = [shape.numel() for shape in shapes]
    assert max(positions) <= 4 * 16 and sum(positions) < 1.1 * sum(map(len, texts))
    assert len(positions) < 1.3 * sum(positions) / (4 * 16)
    shapes.clear()
    monkeypatch.setattr(score, "MAX_LOGITS", 20 * V)
    score.score(model, [*texts, tokens(40).tolist()], EOT, rows=4)
    assert 16 <= max(shape.numel() for shape in shapes) <= 20


def test_windows():
    text = np.arange(1, 12, dtype=np.uint16)
    windows = [(idx.tolist(), targets.tolist()) for idx, targets in score.windows([text], 0, 4)]
    assert windows == [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([4, 5, 6, 7], [5, 6, 7, 8]),
        ([8, 9, 10, 0], [9, 10, 11, -1]),
    ]
    windows = [(idx.tolist(), targets.tolist()) for idx, targets in score.windows([[1, 2], [3]], 0, 4)]
    assert windows == [([0, 1, 0, 0], [1, 2, -1, -1]), ([0, 0, 0, 0], [3, -1, -1, -1])]
    windows = [(idx.tolist(), targets.tolist()) for idx, targets in score.windows([text[:7]], 0, 4, stride=2)]
    assert windows == [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([2, 3, 4, 5], [-1, -1, 5, 6]),
        ([3, 4, 5, 6], [-1, -1, -1, 7]),
    ]
    for stride in (-1, 5):
        with pytest.raises(ValueError, match="stride must be between 0 and block_size=4"):
            list(score.windows([text], 0, 4, stride))


@torch.no_grad()
def test_total_is_the_sum_of_its_parts():
    model, texts = tiny(), [tokens(n, seed=n).numpy().astype(np.uint16) for n in (200, 3, 77)]
    nats, count = score.total(model, texts, EOT, rows=3)
    scores = score.score(model, texts, EOT)
    assert count == 280 and nats == pytest.approx(sum(s.sum() for s in scores), rel=1e-5)
    parts = [score.total(model, texts, EOT, rows=3, part=(rank, 4)) for rank in range(4)]
    assert sum(n for _, n in parts) == count and sum(x for x, _ in parts) == pytest.approx(nats, rel=1e-12)
    assert all(n for _, n in parts)


@torch.no_grad()
def test_total_works_with_any_model_that_returns_a_loss():
    """Such as nanoGPT's: called with (idx, targets), without our config. This one is uniform over 40 ids."""

    def model(idx, targets):
        assert idx.shape == targets.shape == (2, 8)
        return None, torch.tensor(math.log(40))

    nats, count = score.total(model, [range(30)], EOT, rows=2, block_size=8, device="cpu")
    assert (nats, count) == (pytest.approx(30 * math.log(40)), 30)


@torch.no_grad()
def test_score_works_with_a_head_that_has_only_a_mean_loss():
    class Uniform(torch.nn.Module):
        def forward(self, x):
            return x.new_zeros(*x.shape[:-1], V)

        def loss(self, x, targets):
            return None, x.new_tensor(math.log(V))

    [nats] = score.score(GPT(GPTConfig(**TINY), head=Uniform()), [[1, 2, 3]], EOT)
    np.testing.assert_allclose(nats, 3 * [math.log(V)], rtol=1e-6)


@torch.no_grad()
def test_scores_respect_the_separator():
    """A text with a separator scores as its parts do."""
    model, one, two = tiny(separator=EOT), [1, 2, 3, EOT], [4, 5, 6, 7]
    (joint,) = score.score(model, [one + two], EOT)
    np.testing.assert_allclose(joint, np.concatenate(score.score(model, [one, two], EOT)), rtol=1e-4)


@pytest.mark.parametrize("prefix, more", [(1, 1), (3, 5), (12, 5), (1, 16), (1, 40), (17, 3), (30, 9)])
@pytest.mark.parametrize("block_size", [16, 9, 1])
@torch.no_grad()
def test_loglikelihood_matches_reference(prefix, more, block_size):
    model, ids = tiny(block_size=block_size), tokens(prefix + more).tolist()
    stride, start, expected = max(1, block_size // 2), max(prefix, block_size + 1), 0.0
    for i in range(prefix, len(ids)):
        end = block_size + 1 if i < block_size + 1 else start + stride * math.ceil((i + 1 - start) / stride)
        context = ids[max(0, min(end, len(ids)) - block_size - 1) : i]
        assert min(i, stride) <= len(context) <= block_size
        expected += model(torch.tensor([context]))[0][0, -1].log_softmax(-1)[ids[i]].item()
    assert score.loglikelihood(model, ids[:prefix], ids[prefix:]) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_loglikelihood_matches_loss():
    model, ids = tiny(), tokens(1, 17)
    logprob = score.loglikelihood(model, ids[0, :1].tolist(), ids[0, 1:].tolist())
    assert -logprob / 16 == pytest.approx(model(ids[:, :-1], ids[:, 1:])[1].item(), rel=1e-5)
    assert score.loglikelihood(model, [1], []) == 0.0
    with pytest.raises(ValueError, match="prefix"):
        score.loglikelihood(model, [], [1])
    with pytest.raises(ValueError, match="causal"):
        score.loglikelihood(GPT(GPTConfig(**TINY, causal=False)), [1], [2])
    torch.nn.init.zeros_(model.head.linear.weight)
    assert score.loglikelihood(model, [1], [2, 3, 4]) == pytest.approx(-3 * math.log(V), abs=1e-5)


def test_scoring_needs_no_gradients():
    model = tiny()
    model.head.forward = lambda x, forward=model.head.forward: check_no_grad(forward(x))
    score.score(model, [[1, 2]], EOT)
    score.loglikelihood(model, [1], [2])
    model.head.loss = lambda x, y, loss=model.head.loss: (None, check_no_grad(loss(x, y)[1]))
    score.total(model, [[1, 2]], EOT)


def check_no_grad(x: torch.Tensor) -> torch.Tensor:
    assert not x.requires_grad
    return x


def test_bits_per_byte():
    byte = tokenizer.get("byte")
    size = score.token_bytes(byte)
    assert size.tolist() == [1] * 257
    assert score.bits_per_byte(16 * math.log(2), 4) == pytest.approx(4.0)
    assert score.bits_per_byte(0.0, 0) == 0.0
