"""
How good is a model: bits per byte of a corpus, comparable over tokenizers.

    python evaluate.py [--out_dir DIR] [--data DIR]     # the newest run, on the validation stories of its data
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

import tokenizer as tokenizers


def token_bytes(tokenizer: "tokenizers.Tokenizer") -> np.ndarray:
    """UTF-8 bytes that each id stands for; end-of-text counts as one. (vocab_size,)"""
    count = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    count[tokenizer.eot] = 1
    return count


def windows(
    ids: np.ndarray, eot: int, block_size: int, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """
    Every id once as a target, in fixed windows in fixed order, end-of-text standing before the first: batches
    (idx, targets) of (rows, block_size) int64, the last filled up with targets of -1.
    """
    span = rows * block_size
    for start in range(0, len(ids), span):
        targets = np.full(span, -1, dtype=np.int64)
        inputs = np.full(span, eot, dtype=np.int64)
        piece = ids[start : start + span]
        targets[: len(piece)] = piece
        first = max(start, 1)
        inputs[first - start : len(piece)] = ids[first - 1 : start + len(piece) - 1]
        yield tuple(torch.from_numpy(x.reshape(rows, block_size)) for x in (inputs, targets))


@torch.no_grad()
def total_nats(model, batches, device: str | torch.device = "cpu") -> tuple[float, int]:
    """Sum over batches (idx, targets) of the cross entropy in nats, and the number of targets."""
    nats, count = 0.0, 0
    for idx, targets in batches:
        n = int((targets != -1).sum())
        nats += n * model(idx.to(device), targets.to(device))[1].item()
        count += n
    return nats, count


def bits_per_byte(nats: float, size: int) -> float:
    return nats / math.log(2) / max(1, size)
