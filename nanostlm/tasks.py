"""
The evaluations behind evaluate.py.

    nats, bpb, n_tokens = validation_loss(model, data)    # of the validation stories
    lines = grammar_report(model, data)                   # a corpus whose entropy is known: toystories
"""

from collections import Counter

import numpy as np

from nanostlm import score, sources
from nanostlm.data import Data
from nanostlm.generate import stories


def validation_loss(model, data: Data, rows: int = 16, limit: int = 0) -> tuple[float, float, int]:
    """
    Nats per token, bits per byte and number of tokens of the validation file, or of its first `limit` tokens.
    `rows` windows per batch.
    """
    ids = data.val[: limit or None]
    nats, n_tokens = score.total(model, [ids], data.tokenizer.eot, rows=rows)
    n_bytes = int(score.token_bytes(data.tokenizer)[ids].sum())
    return nats / n_tokens, score.bits_per_byte(nats, n_bytes), n_tokens


def whole_stories(data: Data, block_size: int) -> list[np.ndarray]:
    """The validation stories that fit into the context, each with its end-of-text."""
    ends = np.flatnonzero(data.val == data.tokenizer.eot) + 1
    return [story for story in np.split(data.val, ends)[:-1] if 1 < len(story) <= block_size]


def grammar_report(model, data: Data, rows: int = 16, n_stories: int = 100) -> list[str]:
    """
    Compare a model with the grammar of its corpus: bits per byte of complete validation stories and their
    entropy, and the fraction of `n_stories` generated stories that are valid. Returns the lines to print.
    """
    check, tokenizer = sources.corpus(data.meta["corpus"]).check, data.tokenizer
    whole = whole_stories(data, model.config.block_size)
    nats, _ = score.total(model, whole, tokenizer.eot, rows=rows)
    texts = [tokenizer.decode(story[:-1]) for story in whole]
    n_bytes = sum(len(text.encode()) + 1 for text in texts)  # end-of-text counts as one byte
    bpb = score.bits_per_byte(nats, n_bytes)
    entropy = score.bits_per_byte(-sum(check(text).logprob for text in texts), n_bytes)
    excess = f"{bpb / entropy - 1:.1%} above it" if whole else "no story fits into the context"
    verdicts = [check(text) for text in stories(model, tokenizer, "", n_stories)]
    n_valid = sum(verdict.ok for verdict in verdicts)
    broken = Counter(verdict.rule for verdict in verdicts if not verdict.ok)
    rules = ", ".join(f"{n} {rule}" for rule, n in broken.most_common())
    return [
        f"on {len(whole)} whole stories: {bpb:.4f} bits per byte, entropy {entropy:.4f}: {excess}",
        f"{n_valid} of {n_stories} generated stories are valid" + (f" ({rules})" if rules else ""),
    ]
