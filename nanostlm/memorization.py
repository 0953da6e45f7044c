"""
The training text seen from generated stories: its words and names, and what a story shares with it.

    words, names = vocabulary(data)        # two sets
    found = memorization(data, texts)      # for each text, the spans and 8-grams that the training data have

Both read the training ids once, in blocks: 500 MB of text take about a minute each and little memory.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nanostlm.data import Data, check_not_truncated, release

WORD = re.compile(r"\w+(?:['’]\w+)*")
NAMED = re.compile(r"\b(?:[Nn]amed|[Cc]alled|[Nn]ame(?: is| was|['’]s)) (?:(?:Mrs?|Dr)\. )?(\w+)")
BLOCK = 1 << 18  # training tokens that are searched at a time


def split_words(text: str) -> list[str]:
    """Runs of letters, digits and inner apostrophes, in lower case."""
    return [word.lower().replace("’", "'") for word in WORD.findall(text)]


def blocks(data: Data, size: int, title: str) -> Iterator[np.ndarray]:
    """The training ids in blocks of whole stories, so that no n-gram of a story crosses a boundary."""
    check_not_truncated(data.train)
    start, N = 0, len(data.train)
    with tqdm(total=N, desc=title, unit=" tokens", unit_scale=True, disable=None) as bar:
        while start < N:
            length = size
            while start + length < N:
                ends = np.flatnonzero(data.train[start : start + length] == data.tokenizer.eot)
                if len(ends):
                    length = int(ends[-1]) + 1
                    break
                length *= 2  # a story longer than a block
            block = np.asarray(data.train[start : start + length])
            yield block
            release(data.train)
            start += len(block)
            bar.update(len(block))


def vocabulary(data: Data) -> tuple[set[str], set[str]]:
    """
    The words of the training text, in lower case, and its names: capitalized words that follow "named",
    "called" or "name is" at least twice and occur less often in lower case. Spot is a name, Sky is not.
    """
    tokens, counts, named = [*data.tokenizer.tokens[: data.tokenizer.eot], b"\n"], Counter(), Counter()
    for block in blocks(data, BLOCK, "words of the training text"):
        text = b"".join(map(tokens.__getitem__, block.tolist())).decode("utf-8", errors="replace")
        counts.update(WORD.findall(text))
        named.update(NAMED.findall(text))
    names = {w for w, n in named.items() if n > 1 and w.istitle() and counts[w] > counts[w.lower()]}
    return {word.lower().replace("’", "'") for word in counts}, names


class Memorization(NamedTuple):
    """What a text shares with a training story, in tokens of the data's tokenizer."""

    tokens: int  # of the text
    longest: int  # the longest span that also occurs in the training data
    start: int  # where in the text this span begins
    found: int  # 8-grams of the text that also occur in the training data
    grams: int  # 8-grams of the text

    @property
    def flagged(self) -> bool:
        """Whether at least half of the text, and 32 tokens, are one span of the training data."""
        return self.longest >= max(32, self.tokens / 2)


class Spans:
    """
    The n-grams of a list of ids (N,), for any n, by a polynomial hash: sum of code[id] * BASE**i mod 2**64.
    """

    BASE = 0x9E3779B97F4A7C15

    def __init__(self, ids: np.ndarray, code: np.ndarray):
        powers = np.cumprod(np.full(len(ids), self.BASE, np.uint64))
        self.inverse = np.cumprod(np.full(len(ids), pow(self.BASE, -1, 2**64), np.uint64))
        self.sums = np.concatenate((np.zeros(1, np.uint64), np.cumsum(code[ids] * powers)))
        self.ids = ids

    def hashes(self, n: int) -> np.ndarray:
        """(N - n + 1,) uint64."""
        return (self.sums[n:] - self.sums[:-n]) * self.inverse[: max(0, len(self.ids) - n + 1)]

    def equal(self, at: np.ndarray, other: "Spans", there: np.ndarray, n: int) -> np.ndarray:
        """Whether the n-grams that begin at `at` equal those of `other` that begin at `there`: bool."""
        steps, parts = np.arange(n), 1 + len(at) * n // 2**22  # parts bound the memory
        pairs = zip(np.array_split(at, parts), np.array_split(there, parts), strict=True)
        ids = ((self.ids[a[:, None] + steps], other.ids[b[:, None] + steps]) for a, b in pairs)
        return np.concatenate([(mine == theirs).all(axis=1) for mine, theirs in ids])

    def find(self, at: np.ndarray, n: int, block: "Spans") -> np.ndarray:
        """Where in a block the n-grams that begin at `at` occur, or -1. Compares the ids, not only hashes."""
        keys, first, which = np.unique(self.hashes(n)[at], return_index=True, return_inverse=True)
        table = np.zeros(1 << 20, bool)  # by the highest bits of the hash: rules out most of the block
        table[keys >> 44] = True
        hashes = block.hashes(n)
        there = np.flatnonzero(table[hashes >> 44])
        key = np.minimum(np.searchsorted(keys, hashes[there]), len(keys) - 1)
        there, key = (x[keys[key] == hashes[there]] for x in (there, key))
        mine = np.flatnonzero(np.isin(which, key))
        if not self.equal(at[mine], self, at[first][which[mine]], n).all():
            raise RuntimeError("two n-grams of these texts have the same hash: try another seed")
        same = block.equal(there, self, at[first][key], n)
        found = np.full(len(keys), -1)
        found[key[same]] = there[same]
        return found[which]


def memorization(data: Data, texts: Sequence[str], block: int = BLOCK) -> list[Memorization]:
    """
    The longest span and the 8-grams that each text shares with the training data, exactly. Texts are encoded
    by the data's tokenizer. Reads the data once, and needs memory for a block and the texts only: each block
    is searched for spans of each text that are longer than its longest so far.
    """
    eot = data.tokenizer.eot
    ids = [np.array(data.tokenizer.encode(text), dtype=np.int64) for text in texts]
    tokens = np.array([len(story) for story in ids], dtype=np.int64)
    ends = np.cumsum(tokens + 1) - 1
    offsets = ends - tokens
    code = np.random.default_rng(0).integers(1, 2**64, data.tokenizer.vocab_size, np.uint64)
    query = Spans(np.concatenate([np.append(story, eot) for story in ids] or [[eot]]), code)

    def starts(stories, n):  # the positions of all n-grams of these stories, and the story of each
        counts = np.maximum(0, tokens[stories] - n + 1)
        story = np.repeat(stories, counts)
        return offsets[story] + np.arange(len(story)) - np.repeat(np.cumsum(counts) - counts, counts), story

    longest, begin = np.zeros_like(tokens), np.zeros_like(tokens)
    at, story = starts(np.arange(len(texts)), 8)
    found = np.zeros_like(tokens)
    for ids_of_block in blocks(data, block, "memorization"):
        there = Spans(ids_of_block, code)
        if len(at):
            seen = query.find(at, 8, there) >= 0
            found += np.bincount(story[seen], minlength=len(texts))
            at, story = at[~seen], story[~seen]
        n = 0
        while (waiting := longest[(longest >= n) & (longest < tokens)]).size and waiting.min() < len(
            there.ids
        ):
            n = waiting.min() + 1
            where, whose = starts(np.flatnonzero(longest == n - 1), n)
            spots = query.find(where, n, there)
            seen = np.flatnonzero(spots >= 0)
            for i, first in zip(*np.unique(whose[seen], return_index=True), strict=True):
                begin[i] = where[seen[first]]
                mine, theirs = query.ids[begin[i] : ends[i]], there.ids[spots[seen[first]] :]
                shorter = min(len(mine), len(theirs))
                differs = mine[:shorter] != theirs[:shorter]
                longest[i] = differs.argmax() if differs.any() else shorter
    counts = np.maximum(0, tokens - 7)
    columns = tokens, longest, begin - offsets * (longest > 0), found, counts
    return [Memorization(*map(int, row)) for row in zip(*columns, strict=True)]
