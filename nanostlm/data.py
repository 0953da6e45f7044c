"""Write and read the files of a prepared corpus, in data/CORPUS/TOKENIZER/.

    train.bin, val.bin   token ids, little-endian uint16 (uint32 above 65,536 ids), with end-of-text after
                         every story, without a header
    meta.json            corpus, source, limit, tokenizer, dtype; stories, tokens and bytes of each split
    tokenizer.json       the tokenizer, if it was trained on the corpus

`load("data/tinystories/bpe4096")` returns Data(train, val, meta, tokenizer, folder).
"""

import json
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nanostlm import sources
from nanostlm import tokenizer as tokenizers
from nanostlm.tokenizer import Tokenizer, Unreachable

BATCH = 500_000  # characters that a thread encodes at a time

# ------------------------------------------------------------------------------------------------------------
# Writing


class Bin:
    """A .bin file while it is written: the stories that wait to be encoded, and totals of what is written.

    With `check`, logprob is the total log-probability of the stories.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer, check: Callable | None = None):
        self.tokenizer, self.check = tokenizer, check
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65_536 else "<u4")
        self.file = open(path, "wb")
        self.waiting, self.size = [], 0  # stories, and their characters
        self.stories = self.tokens = self.bytes = 0  # bytes of UTF-8 text, without end-of-text
        self.logprob = 0.0  # nats

    def encode(self, texts: list[str]) -> tuple[np.ndarray, list[str]]:
        ids = self.tokenizer.encode_stories(texts)
        if ids.max(initial=0) >= self.tokenizer.vocab_size:
            raise RuntimeError(f"the tokenizer made an id {ids.max()} of {self.tokenizer.vocab_size:,}")
        return ids.astype(self.dtype), texts

    def write(self, ids: np.ndarray, texts: list[str]) -> None:
        self.file.write(ids.data)
        self.stories += len(texts)
        self.tokens += len(ids)
        self.bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
        if self.check:
            self.logprob += sum(self.check(text).logprob for text in texts)

    def close(self) -> dict:
        self.file.close()
        return {"stories": self.stories, "tokens": self.tokens, "bytes": self.bytes}


def encode_all(items: Iterable[tuple[str, bool]], train: Bin, val: Bin, workers: int, title: str) -> None:
    """Encode (story, is_val) in threads and write in order, with up to two batches per thread in flight."""
    in_flight = deque()
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(desc=title, unit="B", unit_scale=True, disable=None) as bar,
    ):

        def write_one():
            file, result = in_flight.popleft()
            before = file.bytes
            file.write(*result.result())
            stories, tokens = train.stories + val.stories, train.tokens + val.tokens
            bar.set_postfix_str(f"{stories:,} stories, {tokens / 1e6:.1f}M tokens", refresh=False)
            bar.update(file.bytes - before)

        def submit(file):
            in_flight.append((file, pool.submit(file.encode, file.waiting)))
            file.waiting, file.size = [], 0
            while len(in_flight) > 2 * workers:
                write_one()

        for text, is_val in items:
            file = val if is_val else train
            file.waiting.append(text)
            file.size += len(text)
            if file.size >= BATCH:
                submit(file)
        submit(train)
        submit(val)
        while in_flight:
            write_one()


def fingerprint_source(source: str | None) -> list[int] | None:
    """[files, bytes, seconds of the last modification] of a local source, to see whether it has changed."""
    path = Path(source or "")
    files = [p.stat() for p in (path.rglob("*") if path.is_dir() else [path]) if source and p.is_file()]
    return [len(files), sum(f.st_size for f in files), int(max(f.st_mtime for f in files))] if files else None


# ------------------------------------------------------------------------------------------------------------
# Reading


class Data(NamedTuple):
    train: np.ndarray  # (tokens,) uint16 or uint32, memory-mapped: stories, with end-of-text after each
    val: np.ndarray  # the same
    meta: dict
    tokenizer: Tokenizer
    folder: Path


def load(folder: str | Path) -> Data:
    """Open and check prepared data. ValueError names the damaged file and the command that makes it anew."""
    folder = Path(folder)
    meta, train, val = open_bins(folder)
    name = meta["tokenizer"]["name"]
    trained = folder / "tokenizer.json" if tokenizers.bpe_size(name) else None
    if trained and not trained.exists():
        raise ValueError(f"{trained} is missing; {remedy(folder)}")
    tokenizer = tokenizers.load(trained, name) if trained else tokenizers.get(name)
    if tokenizer.sha256 != meta["tokenizer"]["sha256"]:
        raise ValueError(f"{folder} was made with another vocabulary than this {name}; {remedy(folder)}")
    return Data(train, val, meta, tokenizer, folder)


def open_bins(folder: Path) -> tuple[dict, np.ndarray, np.ndarray]:
    """(meta, train, val), checked: sizes, and the highest id."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype, vocab_size = np.dtype(meta["dtype"]).newbyteorder("<"), meta["tokenizer"]["vocab_size"]
        tokens = {name: meta[name]["tokens"] for name in ("train", "val")}
    except FileNotFoundError:
        raise ValueError(f"{folder} has no meta.json: no data there, or not all; {remedy(folder)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'meta.json'} is damaged ({error!r}); {remedy(folder)}") from None
    bins = []
    for name, expected in tokens.items():
        path = folder / f"{name}.bin"
        size = path.stat().st_size if path.exists() else 0
        if size != expected * dtype.itemsize:
            raise ValueError(
                f"{path} has {size:,} bytes, not {expected * dtype.itemsize:,} for "
                f"{expected:,} ids; {remedy(folder)}"
            )
        bins.append(np.memmap(path, dtype, "r"))
        if (top := highest(bins[-1])) >= vocab_size:
            raise ValueError(
                f"{path} has an id {top:,}, past the {vocab_size:,} of the vocabulary; {remedy(folder)}"
            )
    return meta, *bins


def highest(ids: np.ndarray, block: int = 1 << 20, most: int = 128) -> int:
    """The highest id. Of a file of more than `most` blocks, it reads `most` blocks spread over it (0.1 s)."""
    starts = range(0, len(ids), block)
    if len(starts) > most:
        starts = [(len(ids) - block) * i // (most - 1) for i in range(most)]
    return max(int(ids[i : i + block].max()) for i in starts)


def remedy(folder: Path) -> str:
    """The command that makes this data/CORPUS/TOKENIZER."""
    corpus, data_dir = folder.parent.name, folder.parent.parent
    source = " --source PATH" if sources.corpus(corpus).needs_source else ""
    where = "" if data_dir == Path("data") else f" --data_dir {data_dir}"
    return f"to make it: python prepare.py {corpus} --tokenizer {folder.name}{source}{where}"


def rebuild_reason(folder: Path, source: str | None, stories: int | None) -> str | None:
    """Why the data in `folder` do not satisfy a request for `stories` of `source`; None if they do."""
    try:
        meta = load(folder).meta
    except Unreachable:  # only the vocabulary of gpt2 is missing
        meta = open_bins(folder)[0]
    except ValueError as error:
        return str(error).split(";")[0]
    made_from, limit = meta.get("source"), meta.get("limit")
    if source and os.path.abspath(source) != os.path.abspath(made_from or ""):
        return f"it was made from {made_from}"
    if source and os.path.exists(source) and fingerprint_source(source) != meta.get("source_files"):
        return f"{source} has changed"
    if limit and (not stories or stories > limit):
        return f"it has the first {limit:,} stories, not {f'{stories:,}' if stories else 'all'}"
    return None
