"""A corpus -> train.bin, val.bin and meta.json; and load(), which reads them.

    python prepare.py tinystories                        # all of it, from the Hugging Face Hub
    python prepare.py tinystories --stories 100000       # the first ones, by streaming: a minute or so
    python prepare.py tinystories --source FOLDER        # a local copy of the Hub's files
    python prepare.py toystories                         # built in, needs no network
    python prepare.py mine --source mine.txt             # .txt, .jsonl, .parquet, a folder of them, a Hub id

Writes data/CORPUS/TOKENIZER/. The .bin files hold ids, little-endian uint16 (uint32 above 65,536 ids), with
end-of-text after every story and no header; meta.json says the rest. The corpus streams through: a few
batches of it are in memory at a time, encoded by threads.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nanostlm import tokenizer as tokenizers
from nanostlm.tokenizer import EOT, Tokenizer, Unreachable, within

HUB_ID = "roneneldan/TinyStories"
TOYS = 100_000  # toystories has no end: this many stories unless --stories says otherwise
VAL_SHARE = 100  # one story in so many, where a source has no validation split of its own
SAMPLE = 32_000_000  # characters of training text, the first ones, that a BPE is trained on (4 seconds)
BATCH = 500_000  # characters that a thread encodes at a time
MAX_STORY = 50_000_000  # characters; a .txt with a longer one has its separators wrong
SUFFIXES = (".txt", ".jsonl", ".parquet")
VAL_NAMES = ("validation", "val", "valid", "dev")


# ------------------------------------------------------------------------------------------------------------
# Reading a source: {"train": read, "val": read}, without "val" if it has no such split. read() starts over.

Source = dict[str, Callable[[], Iterator[str | None]]]


class Drawn(str):
    """A story that was drawn from a known distribution."""

    logprob: float  # nats


def read_toystories() -> Iterator[Drawn]:
    from nanostlm import toystories

    for text, logprob in toystories.stories(seed=0):
        story = Drawn(text)
        story.logprob = logprob
        yield story


def read_txt(path: str) -> Iterator[str]:
    """Stories end at a line `<|endoftext|>` if the file has any such line, else at blank lines."""
    with open(path, "rb") as f:
        end = EOT if any(line.strip() == EOT.encode() for line in f) else ""
    lines, size = [], 0
    with open(path, encoding="utf-8-sig") as f:  # -sig: a byte order mark is no text
        for line in chain(f, [end]):
            if line.strip() != end:
                lines.append(line)
                if (size := size + len(line)) > MAX_STORY:
                    raise ValueError(f"{path}: a story of over {MAX_STORY:,} characters; blank lines end one")
            else:
                if story := "".join(lines).strip("\n"):
                    yield story
                lines, size = [], 0


def read_jsonl(path: str) -> Iterator[str | None]:
    with open(path, encoding="utf-8-sig") as f:
        for i, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                _ = text is None or text.encode()
            except UnicodeEncodeError:  # an escape such as \ud83d alone
                raise ValueError(f"{path}, line {i}: half a surrogate pair is not valid Unicode") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {i}: not JSON ({error})") from None
            except (KeyError, TypeError, AttributeError):
                raise ValueError(f'{path}, line {i}: no field "text" that holds a string') from None
            yield text


def read_parquet(path: str) -> Iterator[str | None]:
    """`path` may be a hf:// address: only the pages that are read are fetched."""
    import fsspec
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    with fsspec.open(path) as f:
        try:
            file = ParquetFile(f, pre_buffer=False, buffer_size=2**20)  # else whole row groups are held
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file ({error})") from None
        kinds = {field.name: str(field.type) for field in file.schema_arrow}
        if kinds.get("text") not in ("string", "large_string"):
            raise ValueError(f'{path} has no field "text" of strings, only {kinds}')
        for rows in file.iter_batches(1000, columns=["text"], use_threads=False):
            yield from rows["text"].to_pylist()


def read_arrow(path: str) -> Iterator[str | None]:
    """A file in the cache of `datasets`; read, since the pages of a mapped file count as our memory."""
    import pyarrow as pa

    with open(path, "rb") as f, pa.ipc.open_stream(f) as batches:
        if "text" not in batches.schema.names:
            raise ValueError(f'no field "text", only {", ".join(batches.schema.names)}')
        for rows in batches:
            yield from rows["text"].to_pylist()


def read_files(paths: list[str]) -> Iterator[str | None]:
    readers = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet, ".arrow": read_arrow}
    for path in paths:
        try:
            yield from readers[Path(path).suffix](path)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text ({error.reason}); convert it first, as in "
                f"iconv -f WINDOWS-1252 -t UTF-8 {Path(path).name} > utf8.txt"
            ) from None
        except (OSError, ValueError):
            raise
        except Exception as error:  # of the network's libraries
            raise OSError(f"{path}: {type(error).__name__}: {error}") from None


# ------------------------------------------------------------------------------------------------------------
# Finding a source: {split: files}


def find(corpus: str, source: str | None, stories: int | None) -> Source:
    """ValueError or FileNotFoundError where `source` is nothing to read stories from, Unreachable."""
    if corpus == "toystories":
        return {"train": read_toystories}
    if Path(source).exists():
        files = local_files(Path(source))
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and Path(source).suffix not in SUFFIXES:
        files = hub_files(source, stories)
    else:
        raise FileNotFoundError(f"{source}: no such file or folder")
    kinds = {Path(path).suffix for paths in files.values() for path in paths}
    if "train" not in files or not kinds <= {*SUFFIXES, ".arrow"}:
        raise ValueError(
            f"{source} has splits {', '.join(files)} of {', '.join(kinds)} files: it takes "
            f"a split train, of {', '.join(SUFFIXES)} files"
        )
    val = next((files[name] for name in VAL_NAMES if name in files), None)
    return {"train": partial(read_files, files["train"])} | ({"val": partial(read_files, val)} if val else {})


def local_files(path: Path) -> dict[str, list[str]]:
    """Splits are told by names, as in train.txt and validation/1.txt; with .parquet, by `datasets`."""
    if path.is_file():
        return {"train": [str(path)]}
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
    if not files:
        raise ValueError(f"{path} holds no {', '.join(SUFFIXES)} file")
    if any(p.suffix == ".parquet" for p in files):
        return ask_datasets(path)
    words = {p: set(re.split(r"[^a-z]+", str(p.relative_to(path)).lower())) for p in files}
    train = [str(p) for p in files if "train" in words[p]]
    val = [str(p) for p in files if words[p] & set(VAL_NAMES)]
    return {"train": train, "val": val} if train and val else {"train": [str(p) for p in files]}


def ask_datasets(name: str | Path, download: bool = False) -> dict[str, list[str]]:
    """Files of a folder or a Hub data set by the rules of `datasets`, or of the download in its cache."""
    import logging

    from datasets import load_dataset, load_dataset_builder

    logging.getLogger("huggingface_hub.repocard").setLevel("ERROR")  # it misses metadata in any README.md
    try:
        if download:
            return {k: [f["filename"] for f in v] for k, v in load_dataset(str(name)).cache_files.items()}
        return {str(k): list(v) for k, v in load_dataset_builder(str(name)).config.data_files.items()}
    except Exception as error:
        kind = ValueError if isinstance(error, (ValueError, FileNotFoundError)) else OSError
        raise kind(f"{name} cannot be opened: {error}") from None


def hub_files(hub_id: str, stories: int | None) -> dict[str, list[str]]:
    """Files in the cache of `datasets` if it has them; else, if only some stories are asked for, addresses of
    Parquet files; else all is downloaded to that cache. Unreachable, within 5 seconds, where the Hub is."""
    if files := cached_files(hub_id):
        return files
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    ways_out = (
        "take a local copy (--source PATH), the built-in corpus (python prepare.py toystories) or a "
        "mirror (HF_ENDPOINT=https://...)"
    )
    if constants.HF_HUB_OFFLINE:
        raise Unreachable(f"HF_HUB_OFFLINE is set and {hub_id} is not in the cache: unset it, {ways_out}")
    try:
        within(3, lambda: HfApi().dataset_info(hub_id, timeout=3))
    except RepositoryNotFoundError:
        raise ValueError(f"no file, no folder and no data set of the Hub is called {hub_id}") from None
    except Exception as error:
        raise Unreachable(
            f"the Hugging Face Hub cannot be reached at {constants.ENDPOINT} "
            f"({type(error).__name__}): {ways_out}"
        ) from None
    files = ask_datasets(hub_id) if stories else {}
    streams = files and all(path.endswith(".parquet") for path in chain(*files.values()))
    return files if streams else ask_datasets(hub_id, download=True)


def cached_files(hub_id: str) -> dict[str, list[str]]:
    """What load_dataset(hub_id) left in the cache of `datasets`, the newest; {} where nothing."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    home = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
    owner, _, name = hub_id.rpartition("/")
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()  # tiny_stories
    infos = home.glob(f"{owner}___{name}/default/*/*/dataset_info.json")
    for info in sorted(infos, key=os.path.getmtime, reverse=True):
        splits = json.loads(info.read_text(encoding="utf-8")).get("splits") or {}
        return {split: sorted(str(p) for p in info.parent.glob(f"{name}-{split}*.arrow")) for split in splits}
    return {}


# ------------------------------------------------------------------------------------------------------------
# Stories: cleaned, counted, split

# UTF-8 that was read as Windows-1252 or Latin-1, as in parts of TinyStories. Quotation marks, dashes and the
# ellipsis begin with the bytes E2 80, which became â€; these are what became of the third (” often lost it).
THIRD = {
    "œ": "“",
    "\x9d": "”",
    "\ufffd": "”",
    "": "”",
    "˜": "‘",
    "™": "’",
    "ž": "„",
    "š": "‚",
    "“": "–",
    "”": "—",
    "¦": "…",
}
BROKEN = re.compile("â€([" + "".join(THIRD) + "]?)|â\x80[\x93\x94\x98\x99\x9a\x9c\x9d\x9e\xa6]")


def repair(text: str) -> tuple[str, int]:
    """The text with its broken quotation marks put right, and how many there were."""
    return BROKEN.subn(lambda m: m[0].encode("latin-1").decode() if m[1] is None else THIRD[m[1]], text)


def clean(stories: Iterable[str | None], corpus: str, counts: Counter) -> Iterator[str]:
    for text in stories:
        if text is None or not text.strip():
            counts["dropped_empty"] += 1
            continue
        if corpus == "tinystories" and "â" in text:
            text, n = repair(text)
            counts["repaired_marks"] += n
        yield text


def first(stories: Iterable[str], n: int | None, counts: Counter) -> Iterator[str]:
    """The first n; counts["more"] says whether that cut anything off."""
    for i, text in enumerate(stories):
        if i == n:
            counts["more"] = 1
            return
        yield text


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def split(source: Source, corpus: str, n: int | None, counts: Counter) -> Iterator[tuple[str, bool]]:
    """(story, is it for validation?); never is one story on both sides. n limits the stories that are split,
    or the training stories of a source that has a validation split: that one is always whole."""
    train = clean(source["train"](), corpus, counts)
    if "val" not in source:
        yield from split_by_hash(first(train, n, counts))
        return
    val = {digest(text) for text in clean(source["val"](), corpus, Counter())}
    new = (text for text in train if digest(text) not in val or counts.update(dropped_in_val=1))
    yield from ((text, False) for text in first(new, n, counts))
    yield from ((text, True) for text in clean(source["val"](), corpus, counts))


def split_by_hash(stories: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each story's own hash decides, so equal stories share a side, and always the same. Where none goes to
    validation, the lowest hash does: the first hundred or so are held until one is found."""
    hashed = ((digest(text), text) for text in stories)
    cut, held = (2**128 // VAL_SHARE).to_bytes(16, "big"), []
    for key, text in hashed:
        held.append((key, text))
        if key < cut:
            break
    else:
        cut = min(held, default=(b"",))[0] + b"\0"  # just above the lowest
    yield from ((text, key < cut) for key, text in chain(held, hashed))


# ------------------------------------------------------------------------------------------------------------
# Writing


class Bin:
    """A .bin file that is being written: the stories that wait for a thread, and totals of those written."""

    def __init__(self, path: Path, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 65_536 else "<u4")
        self.file = open(path, "wb")
        self.waiting, self.size = [], 0  # stories, characters
        self.stories = self.tokens = self.bytes = 0  # bytes of UTF-8 text, end-of-texts left out
        self.logprob = 0.0  # nats, of drawn stories

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
        self.logprob += sum(getattr(text, "logprob", 0.0) for text in texts)

    def close(self) -> dict:
        self.file.close()
        return {"stories": self.stories, "tokens": self.tokens, "bytes": self.bytes}


def encode_all(items: Iterable[tuple[str, bool]], train: Bin, val: Bin, workers: int, title: str) -> None:
    """Encodes (story, is_val) in threads and writes in order, two batches a thread under way."""
    under_way = deque()
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(desc=title, unit="B", unit_scale=True, disable=None) as bar,
    ):

        def write_one():
            file, result = under_way.popleft()
            before = file.bytes
            file.write(*result.result())
            stories, tokens = train.stories + val.stories, train.tokens + val.tokens
            bar.set_postfix_str(f"{stories:,} stories, {tokens / 1e6:.1f}M tokens", refresh=False)
            bar.update(file.bytes - before)

        def start(file):
            under_way.append((file, pool.submit(file.encode, file.waiting)))
            file.waiting, file.size = [], 0
            while len(under_way) > 2 * workers:
                write_one()

        for text, is_val in items:
            file = val if is_val else train
            file.waiting.append(text)
            file.size += len(text)
            if file.size >= BATCH:
                start(file)
        start(train)
        start(val)
        while under_way:
            write_one()


def make(
    folder: Path,
    corpus: str,
    name: str,
    source: str | None,
    stories: int | None,
    workers: int,
    tokenizer: Tokenizer | None = None,
) -> dict:
    """Writes the files of a corpus into the empty `folder`, meta.json last. Returns what that says."""
    counts = Counter(dropped_empty=0, dropped_in_val=0, repaired_marks=0)
    short = ValueError(f"{source} has too few stories: it takes two that differ, one of them for validation")
    if tokenizer is not None:
        name = tokenizer.name
        tokenizer.save(folder / "tokenizer.json")
    elif not tokenizers.bpe_size(name):
        tokenizer = tokenizers.get(name)
    items = split(find(corpus, source, stories), corpus, stories, counts)
    if tokenizer is None:
        sample, size = [], 0
        for text, is_val in items:
            sample.append((text, is_val))
            size += 0 if is_val else len(text)
            if size >= SAMPLE:
                break
        if not size:
            raise short
        texts = (text for text, is_val in sample if not is_val)
        tokenizer = tokenizers.train_bpe(texts, tokenizers.bpe_size(name))
        tokenizer.save(folder / "tokenizer.json")
        items = chain(sample, items)
        del sample
    train, val = Bin(folder / "train.bin", tokenizer), Bin(folder / "val.bin", tokenizer)
    encode_all(items, train, val, workers, corpus)
    totals = {"train": train.close(), "val": val.close()}
    if not train.stories or not val.stories:
        raise short
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
        "source_files": fingerprint(source),
    }
    if corpus == "toystories":
        meta["floor_bpb"] = -val.logprob / math.log(2) / (val.bytes + val.stories)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with open(path, "rb+") as f:
            os.fsync(f.fileno())
    return meta


def fingerprint(source: str | None) -> list[int] | None:
    """[files, bytes, seconds of the newest] of a local source: what shows that it was edited since."""
    path = Path(source or "")
    files = [p.stat() for p in (path.rglob("*") if path.is_dir() else [path]) if source and p.is_file()]
    return [len(files), sum(f.st_size for f in files), int(max(f.st_mtime for f in files))] if files else None


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Waits until no other prepare works in `folder`. False where no such locks are (Windows, some NFS)."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    fd, locked = os.open(folder, os.O_RDONLY), True
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another prepare is at work in {folder}: waiting for it", flush=True)
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(fd)


def prepare(
    corpus: str,
    tokenizer: str = "bpe4096",
    source: str | None = None,
    stories: int | None = None,
    workers: int | None = None,
    data_dir: str | Path = "data",
    given: Tokenizer | None = None,
) -> Path:
    """The folder of the prepared corpus, made if it is not there or lacks what is asked: the first `stories`
    (None: all), from `source` if that is given. With a `given` tokenizer, `tokenizer` only names the folder.
    ValueError and FileNotFoundError are the user's mistakes, OSError and RuntimeError the machine's;
    Unreachable (an OSError) where only the network is missing."""
    if not re.fullmatch(r"\w[\w.-]*", corpus) or Path(corpus).suffix in SUFFIXES:
        raise ValueError(f"{corpus} is no name for a corpus: python prepare.py NAME --source {corpus}")
    if min(stories or 1, workers or 1) < 1 or stories == 0:
        raise ValueError("--stories and --workers are whole numbers from 1 on")
    if corpus == "toystories":
        if source:
            raise ValueError("toystories is built in and takes no --source")
        stories = stories or TOYS
    if given is None:
        tokenizers.bpe_size(tokenizer)
    source = str(source) if source else None
    folder = Path(data_dir, corpus, tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with alone(folder.parent) as locked:
            if not (reason := lacking(folder, source, stories)):
                print(f"{folder} is ready")
                return folder
            if folder.exists():
                print(f"{folder} is made anew: {reason}", flush=True)
            if corpus == "tinystories":
                source = source or HUB_ID
            if not source and corpus != "toystories":
                raise ValueError(
                    f"where is {corpus}? python prepare.py {corpus} --source PATH "
                    "(only tinystories and toystories need none)"
                )
            for stale in folder.parent.glob(f".{tokenizer}-*") if locked else ():  # of a killed prepare
                shutil.rmtree(stale, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)  # another that failed may have removed it
            work = Path(tempfile.mkdtemp(prefix=f".{tokenizer}-", dir=folder.parent))
            try:
                (work / "new").mkdir()
                meta = make(work / "new", corpus, tokenizer, source, stories, workers or cpus(), given)
                if folder.exists():
                    os.rename(folder, work / "old")
                os.rename(work / "new", folder)  # all files at once
            finally:
                shutil.rmtree(work, ignore_errors=True)
    finally:
        with suppress(OSError):
            folder.parent.rmdir()  # it is empty where nothing was made
    empty, twice, repaired = (meta[k] for k in ("dropped_empty", "dropped_in_val", "repaired_marks"))
    print(
        f"{folder}: {meta['tokenizer']['vocab_size']:,} ids; dropped {empty:,} empty stories and {twice:,} "
        f"that are in the validation, too; repaired {repaired:,} quotation marks"
    )
    for name in ("train", "val"):
        n = meta[name]
        print(f"{name:>7}: {n['stories']:,} stories, {n['tokens']:,} tokens, {n['bytes'] / 1e6:,.2f} MB")
    return folder


def cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------------------
# Reading what was made


class Data(NamedTuple):
    train: np.ndarray  # (tokens,) uint16 or uint32, memory-mapped: stories, end-of-text after each
    val: np.ndarray  # the same
    meta: dict
    tokenizer: Tokenizer
    folder: Path


def load(folder: str | Path) -> Data:
    """What prepare() made, checked. ValueError names the file that is wrong and what to type."""
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
    """(meta, train, val), found whole."""
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
    """The highest id; in a file of more than `most` blocks, of so many spread over it (0.1 s)."""
    starts = range(0, len(ids), block)
    if len(starts) > most:
        starts = [(len(ids) - block) * i // (most - 1) for i in range(most)]
    return max(int(ids[i : i + block].max()) for i in starts)


def remedy(folder: Path) -> str:
    """What to type for this data/CORPUS/TOKENIZER."""
    source = "" if folder.parent.name in ("tinystories", "toystories") else " --source PATH"
    data_dir = folder.parent.parent
    where = "" if data_dir == Path("data") else f" --data_dir {data_dir}"
    return f"to make it: python prepare.py {folder.parent.name} --tokenizer {folder.name}{source}{where}"


def lacking(folder: Path, source: str | None, stories: int | None) -> str | None:
    """Why the data in `folder` do not do for what is asked; None where they do."""
    try:
        meta = load(folder).meta
    except Unreachable:  # only gpt2's vocabulary is
        meta = open_bins(folder)[0]
    except ValueError as error:
        return str(error).split(";")[0]
    had, limit = meta.get("source"), meta.get("limit")
    if source and os.path.abspath(source) != os.path.abspath(had or ""):
        return f"it was made from {had}"
    if source and os.path.exists(source) and fingerprint(source) != meta.get("source_files"):
        return f"{source} has changed"
    if limit and (not stories or stories > limit):
        return f"it has the first {limit:,} stories, not {f'{stories:,}' if stories else 'all'}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="A corpus -> train.bin, val.bin, meta.json")
    option = parser.add_argument
    option("corpus", help="tinystories, toystories, or any name with --source")
    option("--tokenizer", default="bpe4096", help="gpt2, byte or bpeN; default %(default)s")
    option("--source", help=".txt, .jsonl, .parquet, a folder of them, or a data set's id on the Hub")
    option("--stories", type=int, help=f"the first so many; default all (of toystories {TOYS:,})")
    option("--workers", type=int, help="threads that encode; default one for each processor")
    option("--data_dir", default="data", help="where CORPUS/TOKENIZER/ goes; default %(default)s")
    try:
        prepare(**vars(parser.parse_args()))
        return 0
    except KeyboardInterrupt:
        print("stopped; nothing was changed", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1


if __name__ == "__main__":
    sys.exit(main())
