"""Prepare a corpus for training: text -> train.bin, val.bin and meta.json in data/CORPUS/TOKENIZER/.

    python prepare.py tinystories                        # the whole corpus from the Hugging Face Hub
    python prepare.py tinystories --stories 100000       # only the first 100,000, streamed: about a minute
    python prepare.py tinystories --source FOLDER        # a local copy of the Hub's files
    python prepare.py toystories                         # built in, needs no network
    python prepare.py mine --source mine.txt             # .txt, .jsonl, .parquet, a folder of these, a Hub id
    python prepare.py mine --source FOLDER --split file  # every .txt file is one story

nanostlm/data.py describes the files. The corpus is streamed: only a few batches are in memory at a time, and
threads encode them. The folder is renamed into place when all files are complete; an interrupted run changes
nothing.
"""

from nanostlm.entry import script  # first, to handle signals during the other imports
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from filelock import FileLock, Timeout

from nanostlm import settings, sources
from nanostlm import tokenizer as tokenizers
from nanostlm.data import Bin, encode_all, fingerprint_source, outdated, prepared, rebuild_reason, remedy
from nanostlm.tokenizer import Tokenizer, Unreachable

SAMPLE = 32_000_000  # characters of training text, from its start, that a BPE is trained on (4 seconds)


def make(
    folder: Path,
    corpus: str,
    name: str,
    source: str | None,
    stories: int | None,
    workers: int,
    tokenizer: Tokenizer | None = None,
    split: str | None = None,
) -> dict:
    """Write the files of a corpus into the empty `folder`, meta.json last, and return its contents."""
    known, counts = sources.corpus(corpus), Counter(dropped_empty=0, dropped_in_val=0, repaired_marks=0)
    too_few = ValueError(
        f"{source} has too few stories: at least two different ones are needed, one of them for validation"
    )
    if tokenizer is not None:
        name = tokenizer.name
        if tokenizers.bpe_size(name):
            tokenizer.save(folder / "tokenizer.json")
    elif not tokenizers.bpe_size(name):
        tokenizer = tokenizers.get(name)
    items = sources.split(sources.find(corpus, source, stories, split), known, stories, counts)
    if tokenizer is None:
        sample, size = [], 0
        for text, is_val in items:
            sample.append((text, is_val))
            size += 0 if is_val else len(text)
            if size >= SAMPLE:
                break
        if not size:
            raise too_few
        texts = (text for text, is_val in sample if not is_val)
        tokenizer = tokenizers.train_bpe(texts, tokenizers.bpe_size(name))
        tokenizer.save(folder / "tokenizer.json")
        items = chain(sample, items)
        del sample  # chain() frees the stories one by one
    train, val = Bin(folder / "train.bin", tokenizer), Bin(folder / "val.bin", tokenizer, known.check)
    encode_all(items, train, val, workers, corpus)
    totals = {"train": train.close(), "val": val.close()}
    if not train.stories or not val.stories:
        raise too_few
    meta = {
        "corpus": corpus,
        "source": source,
        "limit": stories if counts.pop("more", 0) else None,
        "tokenizer": {
            "name": name,
            "kind": "bpe" if tokenizers.bpe_size(name) else name,
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.sha256,
        },
        "dtype": train.dtype.name,
        **totals,
        **counts,
        "source_files": fingerprint_source(source),
    }
    if split:
        meta["split"] = split
    if known.version:
        meta["version"] = known.version()
    if known.check:
        meta["floor_bpb"] = -val.logprob / math.log(2) / (val.bytes + val.stories)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with open(path, "rb+") as f:
            os.fsync(f.fileno())
    return meta


@contextmanager
def locked(path: Path, folder: Path) -> Iterator[bool]:
    """Hold the lock file `path`; wait while another prepare holds it.

    False if it cannot be locked: in a read-only directory, or on a file system without locks.
    """
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"waiting for another prepare.py in {folder}", flush=True)
        lock.acquire()
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):
            path.unlink()  # while locked: a waiting FileLock detects the deletion and creates a new file
        lock.release()


def earlier_source(folder: Path, hub_id: str | None, given: Tokenizer | None) -> tuple[str, str | None]:
    """The source and split rule with which the corpus of `folder` was prepared earlier, for any tokenizer.

    If there is none, `hub_id` is the source.
    """
    corpus, tokenizer = folder.parent.name, folder.name
    wanted = "this model's tokenizer" if given else tokenizer
    found = {name: meta for name, meta in prepared(folder.parent).items() if meta.get("source")}
    others = ", ".join(name for name in found if name != tokenizer)
    for meta in found.values():
        source = meta["source"]
        if os.path.exists(source) or sources.is_hub_id(source):
            if others:
                print(f"{folder.parent} is prepared with {others}, not with {wanted}: reading {source} again")
            return source, meta.get("split")
    if hub_id:
        return hub_id, None
    command = f"python prepare.py {corpus} --source PATH"
    if not found:
        names = " and ".join(sources.CORPORA)
        raise ValueError(f"dataset {corpus!r} not found: {command} (only {names} need no source)")
    state = f"is prepared with {others}, not with {wanted}" if others else "must be rebuilt"
    command = "add --source=PATH" if given else f"{command} --tokenizer {tokenizer}"
    source = next(iter(found.values()))["source"]
    raise ValueError(f"dataset {corpus!r} {state}, and its source {source} no longer exists: {command}")


def prepare(
    corpus: str,
    tokenizer: str = "bpe4096",
    source: str | None = None,
    stories: int | None = None,
    workers: int | None = None,
    data_dir: str | Path = "data",
    given: Tokenizer | None = None,
    split: str | None = None,
) -> Path:
    """Return the folder of a prepared corpus: its first `stories` (None: all), from `source` if it is given.

    Prepares the folder if it does not exist or has fewer stories. `source` defaults to the one used before,
    for example with another tokenizer. With a tokenizer `given`,
    `tokenizer` only names the folder. ValueError and FileNotFoundError are user errors; OSError and
    RuntimeError are failures of the machine; Unreachable (an OSError) means that only the network is missing.
    """
    known = sources.corpus(corpus)
    if not re.fullmatch(r"\w[\w.-]*", corpus) or Path(corpus).suffix in sources.SUFFIXES:
        command = shlex.join(["python", "prepare.py", "NAME", "--source", corpus])
        raise ValueError(f"{corpus} is not a valid corpus name: {command}")
    for name, value, most in (("stories", stories, 10**9), ("workers", workers, 1024)):
        if value is not None and not 1 <= value <= most:
            raise ValueError(f"{name} must be between 1 and {most:,}, not {value!r:.60}")
    settings.check_path("data_dir", data_dir, "folder")
    if (source or split) and known.generate:
        raise ValueError(f"{corpus} is built in: --source and --split do not apply")
    stories = stories or known.stories
    if given is None:
        tokenizers.bpe_size(tokenizer)
    settings.check_path("source", source)
    if source:
        source = os.path.abspath(source) if os.path.exists(source) else str(source)
        split = sources.split_rule(source, split)
    folder = Path(data_dir, corpus, tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with locked(Path(data_dir, f".{corpus}.lock"), folder.parent) as is_locked:
            if not (reason := rebuild_reason(folder, source, stories, split)):
                print(f"{folder} is ready")
                return folder
            if not source and not known.generate:
                source, earlier_split = earlier_source(folder, known.hub_id, given)
                split = sources.split_rule(source, split or earlier_split)
            if folder.exists():
                print(f"{folder} is rebuilt: {reason}", flush=True)
            # left by a killed prepare
            for stale in folder.parent.glob(f".{tokenizer}-*") if is_locked else ():
                shutil.rmtree(stale, ignore_errors=True)
            folder.parent.mkdir(exist_ok=True)  # a concurrent prepare that failed may have removed it
            work = Path(tempfile.mkdtemp(prefix=f".{tokenizer}-", dir=folder.parent))
            try:
                (work / "new").mkdir()
                workers = workers or cpus()
                meta = make(work / "new", corpus, tokenizer, source, stories, workers, given, split)
                if folder.exists():
                    os.rename(folder, work / "old")
                os.rename(work / "new", folder)  # all files at once
            finally:
                shutil.rmtree(work, ignore_errors=True)
    finally:
        with suppress(OSError):
            folder.parent.rmdir()  # removes the folder only if it is empty, i.e. nothing was written
    print(
        f"{folder}: {meta['tokenizer']['vocab_size']:,} ids; dropped {meta['dropped_empty']:,} empty stories "
        f"and {meta['dropped_in_val']:,} training stories that are also in the validation split; repaired "
        f"{meta['repaired_marks']:,} quotation marks"
    )
    if split:
        total = meta["train"]["stories"] + meta["val"]["stories"]
        print(f"{source}: {total:,} stories; {sources.describe_split(split)} (--split changes this)")
    for name in ("train", "val"):
        n = meta[name]
        print(f"{name:>7}: {n['stories']:,} stories, {n['tokens']:,} tokens, {n['bytes'] / 1e6:,.2f} MB")
    return folder


def cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_missing(
    corpus: str,
    tokenizer: str,
    source: str,
    stories: int,
    data_dir: str | Path,
    given: Tokenizer | None,
    fallback: str,
) -> str:
    """
    Prepare a corpus for training unless its folder exists. If its source is unreachable, prepare `fallback`
    instead. Returns the name of the corpus that is prepared.
    """
    try:
        folder = Path(data_dir, corpus, tokenizer)
        if not (folder / "meta.json").exists():
            prepare(corpus, tokenizer, source or None, stories or None, data_dir=data_dir, given=given)
        elif (meta := prepared(folder.parent).get(tokenizer)) and (reason := outdated(corpus, meta)):
            note = f"{reason}; {remedy(folder)} (unfinished runs need the data as they are)"
            print(f"WARNING: {folder} is outdated: {note}", file=sys.stderr)
        return corpus
    except Unreachable as error:
        if not fallback:
            raise
        line = "!" * 100
        print(
            f"{line}\n{error}\nTRAINING ON {fallback.upper()} INSTEAD, a built-in corpus of made-up stories; "
            f"--fallback= insists on {corpus}\n{line}",
            file=sys.stderr,
        )
        return prepare_missing(fallback, tokenizer, "", stories, data_dir, given, "")


@script
def main(argv: list[str]) -> None:
    parser = settings.Parser(description="Prepare a corpus: text -> train.bin, val.bin, meta.json")
    add = parser.add_argument
    add("corpus", help=f"{', '.join(sources.CORPORA)}, or any name with --source")
    add("--tokenizer", default="bpe4096", help="gpt2, byte or bpeN (default: %(default)s)")
    add("--source", help=".txt, .jsonl, .parquet, a folder of them, or the id of a data set on the Hub")
    add(
        "--split",
        metavar="file|blank|LINE",
        help="where stories in .txt files end: with the file, at blank lines or at lines LINE (default: at "
        "lines <|endoftext|>; without these, with the file in a folder of small files, else at blank lines)",
    )
    limits = ", ".join(f"{n:,} of {name}" for name, c in sources.CORPORA.items() if (n := c.stories))
    add("--stories", type=int, metavar="N", help=f"use only the first N stories (default: all; {limits})")
    add("--workers", type=int, metavar="N", help="threads that encode (default: one per processor)")
    add("--data_dir", default="data", help="where to write CORPUS/TOKENIZER/ (default: %(default)s)")
    prepare(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
