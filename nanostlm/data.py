"""The files of a prepared corpus, in data/CORPUS/TOKENIZER/.

train.bin, val.bin   token ids, little-endian uint16 (uint32 above 65,536 ids), with end-of-text after every
                     story, without a header
meta.json            corpus, source, limit, tokenizer, dtype; split (where stories in .txt files end) or
                     version (of a built-in corpus); stories, tokens and bytes of train and val
tokenizer.json       a trained tokenizer

data = load_data("data/tinystories/bpe4096")   # Data(train, val, meta, tokenizer, folder)
"""

import functools
import mmap
import os
import shlex
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nanostlm import sources
from nanostlm import tokenizer as tokenizers
from nanostlm.schema import COUNT, FINITE, NAME, TEXT, read_json
from nanostlm.tokenizer import Tokenizer, Unreachable

BATCH = 500_000  # characters per encoding task
SPLIT = {"stories": COUNT, "tokens": COUNT, "bytes": COUNT}
META = {
    "corpus": NAME,
    "tokenizer": {"name": tokenizers.NAME, "vocab_size": COUNT, "sha256": TEXT},
    "dtype": ("uint16 or uint32", lambda x: x in ("uint16", "uint32")),
    **{"train": SPLIT, "val": SPLIT, "limit?": COUNT, "floor_bpb?": FINITE},
    **dict.fromkeys(["source?", "split?", "version?"], TEXT),
}

# ------------------------------------------------------------------------------------------------------------
# Writing


class Bin:
    """Writer of a .bin file: buffers stories to be encoded, and counts what has been written.

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
            raise RuntimeError(f"the tokenizer returned id {ids.max()} of {self.tokenizer.vocab_size:,}")
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


def load_data(folder: str | Path, stories: int = 0, tokenizer: Tokenizer | None = None) -> Data:
    """
    Open and check prepared data; `train` has the first `stories` of the training split, or all if it is 0.
    If `tokenizer` is given, the data must have been prepared with it, except for its special tokens.
    ValueError names the damaged file and the command to prepare it again.
    """
    folder, given = Path(folder), tokenizer
    try:
        meta, train, val = open_bins(folder)
        name, size, sha256 = (meta["tokenizer"][key] for key in ("name", "vocab_size", "sha256"))
        if given is None:
            trained = folder / "tokenizer.json" if tokenizers.bpe_size(name) else None
            tokenizer = tokenizers.load(trained, name) if trained else tokenizers.get(name)
            if (tokenizer.sha256, tokenizer.eot + 1) != (sha256, size):
                raise ValueError(f"{folder} was prepared with a different {name} vocabulary")
    except ValueError as error:
        raise ValueError(f"{error}; {remedy(folder)}") from None
    if (tokenizer.sha256, tokenizer.eot + 1) != (sha256, size):
        raise ValueError(f"{folder} was prepared with another tokenizer ({name}) than the model's")
    if 0 < stories < meta["train"]["stories"]:
        train = first_stories(train, tokenizer.eot, stories)
        meta = meta | {"train": {"stories": stories, "tokens": len(train)}}
    return Data(train, val, meta, tokenizer, folder)


def first_stories(ids: np.ndarray, eot: int, n: int, block: int = 1 << 20) -> np.ndarray:
    """The ids up to the n-th end-of-text, or all if there are fewer."""
    for start in range(0, len(ids), block):
        ends = np.flatnonzero(ids[start : start + block] == eot)
        if n <= len(ends):
            return ids[: start + ends[n - 1] + 1]
        n -= len(ends)
    return ids


def open_bins(folder: Path) -> tuple[dict, np.ndarray, np.ndarray]:
    """(meta, train, val), checked: sizes, ids and the number of stories."""
    meta, bins, block = read_json(folder / "meta.json", META), [], 1 << 20
    dtype, eot = np.dtype(meta["dtype"]).newbyteorder("<"), meta["tokenizer"]["vocab_size"] - 1
    for name in ("train", "val"):
        path, tokens, stories = folder / f"{name}.bin", meta[name]["tokens"], meta[name]["stories"]
        size = path.stat().st_size if path.is_file() else 0
        if size != tokens * dtype.itemsize:
            raise ValueError(f"{path} has {size:,} bytes, not {tokens * dtype.itemsize:,} for {tokens:,} ids")
        ids, top, ends = np.memmap(path, dtype, "r"), 0, 0
        for i in range(0, tokens, block):
            top = max(top, int(ids[i : i + block].max()))
            ends += np.count_nonzero(ids[i : i + block] == eot)
            release(ids)
        if top != eot:
            raise ValueError(f"{path} has an id {top:,}, and the vocabulary in meta.json ends at {eot:,}")
        if ends != stories:
            raise ValueError(f"{path} has {ends:,} stories, not {stories:,} as in meta.json")
        bins.append(ids)
    return meta, *bins


def release(ids: np.ndarray) -> None:
    """Forget which pages of a memory-mapped file were read, because they count as this process' memory."""
    file = getattr(ids, "_mmap", None)
    if file is not None and hasattr(file, "madvise"):  # not on Windows
        file.madvise(mmap.MADV_DONTNEED)


def check_not_truncated(ids: np.ndarray) -> None:
    """
    OSError if a memory-mapped file was truncated: reading past its end is a SIGBUS, the end of the process.
    Called at each step and evaluation; a file that is truncated after the call still ends it that way.
    """
    file = getattr(ids, "_mmap", None)  # knows the file even if another one has taken its name since
    if file is not None and file.size() < len(file):
        raise OSError(f"{ids.filename} was truncated during the run, which ends at its last checkpoint")


def folder_name(data_dir: str | Path, corpus: str, tokenizer: Tokenizer) -> str:
    """
    The name of the folder for a corpus in this vocabulary. It is the tokenizer's name, plus a hash if the
    vocabulary was trained on a different corpus.
    """
    found = prepared(Path(data_dir, corpus)).get(tokenizer.name)
    if tokenizer.name in ("gpt2", "byte") or found and found["tokenizer"]["sha256"] == tokenizer.sha256:
        return tokenizer.name
    return f"{tokenizer.name}-{tokenizer.sha256[:8]}"


def remedy(folder: Path) -> str:
    """A hint with the command that prepares data/CORPUS/TOKENIZER."""
    corpus, data_dir = folder.parent.name, folder.parent.parent
    if "-" in folder.name:  # see folder_name
        return f"remove {folder}, and train.py will prepare it again"
    source = ["--source", "PATH"] if sources.corpus(corpus).needs_source else []
    where = [] if data_dir == Path("data") else ["--data_dir", str(data_dir)]
    command = ["python", "prepare.py", corpus, "--tokenizer", folder.name, *source, *where]
    return f"to make it: {shlex.join(command)}"


def prepared(folder: Path) -> dict[str, dict]:
    """{TOKENIZER: what an undamaged meta.json says} of the data in data/CORPUS, the newest first."""
    files, found = folder.glob("*/meta.json"), {}
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        with suppress(ValueError):
            found[path.parent.name] = read_json(path, META)
    return found


def outdated(corpus: str, meta: dict) -> str | None:
    """Which version of a built-in corpus data have, if it is not the current one."""
    version = sources.corpus(corpus).version
    if not version or meta.get("version") == version():
        return None
    found = f"version {meta['version']}" if "version" in meta else "an earlier version"
    return f"it has {found} of {corpus}, not version {version()}"


def rebuild_reason(
    folder: Path, source: str | None, stories: int | None, split: str | None = None
) -> str | None:
    """The reason to prepare `folder` again for this request; None if its data are up to date."""
    try:
        meta = load_data(folder).meta
    except Unreachable:  # only the vocabulary of gpt2 is missing
        meta = open_bins(folder)[0]
    except ValueError as error:
        return str(error).split(";")[0]
    made_from, limit = meta.get("source"), meta.get("limit")
    if reason := outdated(folder.parent.name, meta):
        return reason
    if source and os.path.abspath(source) != os.path.abspath(made_from or ""):
        return f"it was made from {made_from}"
    if source and os.path.exists(source) and fingerprint_source(source) != meta.get("source_files"):
        return f"{source} has changed"
    if split and split != meta.get("split"):
        return f"it was made with --split {meta.get('split', '(not recorded)')}, not {split}"
    if limit and (not stories or stories > limit):
        return f"it has the first {limit:,} stories, not {f'{stories:,}' if stories else 'all'}"
    return None


# ----------------------------------------------------------------------------------------------------------
# Training windows


class Stage(NamedTuple):
    """A phase of a run with a fixed window length."""

    first_step: int
    length: int  # tokens in a window
    starts: np.ndarray  # where the windows begin in the file
    rows: np.ndarray  # (micro-batches, rows) of this process, as row numbers in the global batch


class Batches:
    """
    batches.windows(step) says which windows of the file a training step reads. The global batch is a pure
    function of (seed, step): its row r is window perm[(step * rows + r) mod W], where perm is the epoch's
    permutation of the W windows. Each process takes a fixed slice of the rows.

    `ids` (N,) are the training tokens. `stages` lists (first step, window length): each stage has its own
    windows and permutations, and all steps have the same number of tokens. With `align`, windows of
    block_size tokens begin at the end-of-text before a story rather than every block_size tokens.
    ValueError if there are too few tokens for one window, or the processes do not divide the batch.
    """

    def __init__(
        self,
        ids: np.ndarray,
        eot: int,
        *,
        block_size: int,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        seed: int = 0,
        stages: Sequence[tuple[int, int]] = (),
        align: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.ids, self.seed, self.stages = ids, seed, []
        self.tokens_per_step = gradient_accumulation_steps * batch_size * block_size
        by_rows = gradient_accumulation_steps % world_size > 0  # else each process takes whole micro-batches
        if by_rows and batch_size % world_size:
            raise ValueError(
                f"{world_size} processes divide neither gradient_accumulation_steps="
                f"{gradient_accumulation_steps} nor batch_size={batch_size}"
            )
        for first_step, length in stages or [(0, block_size)]:
            if align and length == block_size:
                ends = np.flatnonzero(ids == eot)
                starts = ends[ends + length + 1 <= len(ids)]
            else:
                starts = np.arange(0, max(0, len(ids) - length), length)
            if not len(starts):
                raise ValueError(
                    f"the training data have {len(ids):,} tokens, fewer than one window of "
                    f"block_size={length} and its next token"
                )
            rows = np.arange(self.tokens_per_step // length).reshape(gradient_accumulation_steps, -1)
            rows = np.split(rows, world_size, axis=int(by_rows))[rank]
            self.stages.append(Stage(first_step, length, starts, rows))
        self.micro_batches = len(self.stages[0].rows)
        self.permutation = functools.lru_cache(maxsize=4)(self._permutation)

    def _permutation(self, stage: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch, stage]).permutation(len(self.stages[stage].starts))

    def windows(self, step: int) -> tuple[np.ndarray, int]:
        """Where this process' windows of `step` begin, (micro-batches, rows), and their length."""
        check_not_truncated(self.ids)
        index = max(i for i, stage in enumerate(self.stages) if stage.first_step <= step)
        first_step, length, starts, rows = self.stages[index]
        places = (step - first_step) * (self.tokens_per_step // length) + rows
        epochs, order = places // len(starts), np.empty_like(places)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            order[inside] = self.permutation(index, int(epoch))[places[inside] % len(starts)]
        return starts[order], length
