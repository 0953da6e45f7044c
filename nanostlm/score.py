"""
Scoring: the negative log-likelihood of texts, in nats per token, and bits per byte.

    nats, count = total(model, [ids], eot)              # a long text: sum of nats, number of tokens
    each = score(model, texts, eot, stride=128)         # for each text, an array of nats per token
    logp = loglikelihood(model, prefix, continuation)   # log-probability in nats

A text is a sequence of ids. Every id is predicted exactly once, in windows of block_size ids in a fixed
order, with end-of-text before the first id of each text. With a stride, each window advances by `stride` ids:
each id has at least block_size - stride ids before it, where the text has them. total needs only
model(idx, targets) -> (_, loss), so that it works with nanoGPT's model too.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F


def windows(
    texts: Iterable[Sequence[int]], eot: int, block_size: int, stride: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """
    Windows (inputs, targets), (block_size,) int64 each; targets are -1 at positions that are not scored. With
    a stride below block_size, the last window of a text is moved back so that it is full.
    """
    stride = stride or block_size
    if not 0 < stride <= block_size:
        raise ValueError(f"stride must be between 0 and block_size={block_size}, not {stride}")
    for text in texts:
        start = done = 0
        while done < len(text):
            piece = np.asarray(text[start : start + block_size])
            inputs, targets = (np.full(block_size, i, dtype=np.int64) for i in (eot, -1))
            inputs[1 : len(piece)] = piece[:-1]
            if start:
                inputs[0] = text[start - 1]
            targets[done - start : len(piece)] = piece[done - start :]
            yield inputs, targets
            done = start + len(piece)
            start += stride
            if stride < block_size:
                start = max(0, min(start, len(text) - block_size))


def batches(
    windows: Iterator[tuple[np.ndarray, np.ndarray]], eot: int, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (idx, targets) of `rows` windows, the last one filled with rows that have no targets."""
    while batch := list(islice(windows, rows)):
        idx, targets = (torch.from_numpy(np.stack(parts)) for parts in zip(*batch, strict=True))
        fill = (0, 0, 0, rows - len(batch))
        yield F.pad(idx, fill, value=eot), F.pad(targets, fill, value=-1)


@torch.no_grad()
def score(
    model,
    texts: Sequence[Sequence[int]],
    eot: int,
    *,
    stride: int = 0,
    rows: int = 16,
    block_size: int | None = None,
    device: str | torch.device | None = None,
) -> list[np.ndarray]:
    """For each text, the nats of every token, float32. Computes `rows` windows per batch."""
    block_size = block_size or model.config.block_size
    device = device or next(model.parameters()).device
    nats = [np.empty(0, dtype=np.float32)]
    for idx, targets in batches(windows(texts, eot, block_size, stride), eot, rows):
        used = targets >= 0
        width, height = int(used.any(dim=0).nonzero().max()) + 1, int(used.any(dim=1).sum())
        idx, targets = idx[:height, :width].to(device), targets[:height, :width].to(device)
        logits = model(idx)[0].flatten(0, 1).float()
        nll = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
        nats.append(nll[targets.flatten() >= 0].cpu().numpy())
    return np.split(np.concatenate(nats), np.cumsum([len(text) for text in texts]))[:-1]


@torch.no_grad()
def total(
    model,
    texts: Iterable[Sequence[int]],
    eot: int,
    *,
    rows: int = 16,
    block_size: int | None = None,
    device: str | torch.device | None = None,
    part: tuple[int, int] = (0, 1),
) -> tuple[float, int]:
    """
    Sum of the nats of all tokens, and their number, from the mean loss of each batch of `rows` windows.
    part=(rank, world_size): only every world_size-th batch, beginning with the one of this rank.
    """
    block_size = block_size or model.config.block_size
    device = device or next(model.parameters()).device
    nats, count = 0.0, 0
    every = batches(windows(texts, eot, block_size), eot, rows)
    for idx, targets in islice(every, part[0], None, part[1]):
        n = int((targets != -1).sum())
        nats += n * model(idx.to(device), targets.to(device))[1].item()
        count += n
    return nats, count


def loglikelihood(model, prefix: Sequence[int], continuation: Sequence[int]) -> float:
    """
    Log-probability in nats of the ids `continuation` after the ids `prefix`, which must not be empty: the
    first token of a text is preceded by end-of-text. Each id sees at most block_size ids before it, and at
    least half as many where they exist.
    """
    if not model.config.causal:
        raise ValueError("loglikelihood needs a causal model: this one sees the ids that it predicts")
    if not len(prefix):
        raise ValueError("loglikelihood needs a prefix; for the start of a text it is [end-of-text]")
    T, n = model.config.block_size, len(continuation)
    stride = max(1, T // 2)
    if len(prefix) > T:  # the first window predicts `stride` ids of the continuation
        prefix = prefix[-(T + 1 - min(stride, n)) :]
    ids = [*prefix, *continuation]
    (nats,) = score(model, [ids[1:]], ids[0], stride=stride)
    return -float(nats[len(nats) - n :].sum(dtype=np.float64))


def bits_per_byte(nats: float, n_bytes: int) -> float:
    return nats / math.log(2) / max(1, n_bytes)


def token_bytes(tokenizer) -> np.ndarray:
    """UTF-8 bytes of each id; end-of-text counts as one. (vocab_size,)"""
    count = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    count[tokenizer.eot] = 1
    return count
