"""
Scoring: the negative log-likelihood of texts, in nats per token, and bits per byte.

    nats, count = total(model, [ids], eot)              # a long text: sum of nats, number of tokens
    each = score(model, texts, eot, stride=128)         # for each text, an array of nats per token
    logp = loglikelihood(model, prefix, continuation)   # log-probability in nats; loglikelihoods: of many

A text is a sequence of ids. Every id is predicted exactly once, in windows of block_size ids in a fixed
order, with end-of-text before the first id of each text. With a stride, each window advances by `stride` ids:
each id has at least block_size - stride ids before it, where the text has them. total needs only
model(idx, targets) -> (_, loss), so that it works with nanoGPT's model too.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

MAX_LOGITS = 1 << 24  # of a batch of token_scores: 64 MB in float32


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
def token_scores(
    model,
    texts: Sequence[Sequence[int]],
    first: Sequence[int],
    *,
    stride: int = 0,
    rows: int = 16,
    block_size: int | None = None,
    device: str | torch.device | None = None,
    greedy: bool = False,
    progress: str = "",
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """
    For each text, the nats of every token (float32), and with `greedy` whether each is the most likely one
    (bool). first[i] is the id before text i. Texts are sorted by length, and a batch has as many windows as
    have the tokens of `rows` whole ones. `progress` is the title of a progress bar.
    """
    if not getattr(model.config, "causal", True):
        raise ValueError("scoring needs a causal model: this one sees the ids that it predicts")
    block_size = block_size or model.config.block_size
    device = device or next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    found = (w for i in order for w in windows([texts[i]], first[i], block_size, stride))
    most = min(rows * block_size, max(1, MAX_LOGITS // model.config.vocab_size))
    nats, best = [np.empty(0, dtype=np.float32)], [np.empty(0, dtype=bool)]
    with tqdm(
        desc=progress, total=sum(map(len, texts)), unit="token", disable=None if progress else True
    ) as bar:
        for idx, targets in by_width(found, most):
            idx, targets = idx.to(device), targets.to(device)
            used = targets.flatten() >= 0
            if greedy or not getattr(model, "token_losses", False):
                logits = model(idx)[0].flatten(0, 1).float()
                nll = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
            else:
                nll = model(idx, targets, reduction="none")[1]
            nats.append(nll[used].cpu().numpy())
            if greedy:
                best.append((logits.argmax(-1) == targets.flatten())[used].cpu().numpy())
            bar.update(len(nats[-1]))
    ends = np.cumsum([len(texts[i]) for i in order])[:-1]

    def unsorted(parts: list[np.ndarray]) -> list[np.ndarray]:
        split = dict(zip(order, np.split(np.concatenate(parts), ends), strict=True)) if order else {}
        return [split[i] for i in range(len(texts))]

    return unsorted(nats), unsorted(best) if greedy else []


def by_width(
    windows: Iterable[tuple[np.ndarray, np.ndarray]], tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches (idx, targets) of at most `tokens` positions, or one window, cut after the last target."""
    batch, width = [], 0
    for window in chain(windows, [None]):
        last = 0 if window is None else int(np.flatnonzero(window[1] >= 0)[-1]) + 1
        if batch and (window is None or (len(batch) + 1) * max(width, last) > tokens):
            yield tuple(torch.from_numpy(np.stack(parts)[:, :width]) for parts in zip(*batch, strict=True))
            batch, width = [], 0
        batch.append(window)
        width = max(width, last)


def score(model, texts: Sequence[Sequence[int]], eot: int, **options) -> list[np.ndarray]:
    """For each text, the nats of every token, float32. The options are those of `token_scores`."""
    return token_scores(model, texts, [eot] * len(texts), **options)[0]


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


def loglikelihoods(
    model,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    rows: int = 16,
    greedy: bool = False,
    progress: str = "",
) -> tuple[np.ndarray, np.ndarray | None]:
    """
    For each pair (prefix, continuation) of ids, the log-probability of the continuation in nats (float64),
    and with `greedy` whether all its ids are the most likely ones (bool). A prefix must not be empty: the
    first token of a text follows end-of-text. Each id sees at most block_size ids before it, and at least
    half as many where they exist.
    """
    if not all(len(prefix) for prefix, _ in pairs):
        raise ValueError("loglikelihood needs a prefix; for the start of a text it is [end-of-text]")
    T = model.config.block_size
    stride = max(1, T // 2)
    texts = []
    for prefix, continuation in pairs:
        if len(prefix) > T:  # the first window predicts `stride` ids of the continuation
            prefix = prefix[-(T + 1 - min(stride, len(continuation))) :]
        texts.append([*prefix, *continuation])
    nats, best = token_scores(
        model,
        [ids[1:] for ids in texts],
        [ids[0] for ids in texts],
        stride=stride,
        rows=rows,
        greedy=greedy,
        progress=progress,
    )
    lengths = [len(continuation) for _, continuation in pairs]
    logp = [-x[len(x) - n :].sum(dtype=np.float64) for x, n in zip(nats, lengths, strict=True)]
    hits = [x[len(x) - n :].all() for x, n in zip(best, lengths, strict=True)] if greedy else None
    return np.array(logp, dtype=np.float64), None if hits is None else np.array(hits, dtype=bool)


def loglikelihood(model, prefix: Sequence[int], continuation: Sequence[int]) -> float:
    """Log-probability in nats of the ids `continuation` after the ids `prefix`; see `loglikelihoods`."""
    return float(loglikelihoods(model, [(prefix, continuation)])[0][0])


def bits_per_byte(nats: float, n_bytes: int) -> float:
    return nats / math.log(2) / max(1, n_bytes)


def token_bytes(tokenizer) -> np.ndarray:
    """UTF-8 bytes of each id; end-of-text counts as one. (vocab_size,)"""
    count = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    count[tokenizer.eot] = 1
    return count
