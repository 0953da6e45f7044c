"""A corpus -> train.bin, val.bin, meta.json; and load(), the reader of these files.

    python prepare.py tinystories                                  # the whole of it, from the Hugging Face Hub
    python prepare.py tinystories --stories 100000                 # the first ones, by streaming: a minute or so
    python prepare.py tinystories --source PATH                    # a local copy of the Hub's files
    python prepare.py toystories                                   # built in, no network
    python prepare.py mine --source mine.txt --tokenizer byte      # .txt, .jsonl, .parquet, a folder of them, a Hub id

Writes data/CORPUS/TOKENIZER/: train.bin and val.bin hold token ids, little-endian uint16 (uint32 above 65,536 ids), an
end-of-text after every story and no header; meta.json says the rest, tokenizer.json is a vocabulary trained here.
One pass over the corpus, a few batches of it in memory at a time, encoded in parallel threads.
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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import tokenizer as tokenizers
from tokenizer import EOT, Tokenizer, Unreachable

HUB_ID = "roneneldan/TinyStories"
TOYS = 30_000             # toystories has no end: so many stories unless --stories says otherwise
VAL_SHARE = 100           # where a source has no validation split of its own, one story in so many
SAMPLE = 32_000_000       # characters of training text that a BPE vocabulary is trained on, the first ones (4 s)
BATCH = 500_000           # characters that a thread encodes at a time
MAX_STORY = 50_000_000    # characters; a longer "story" of a .txt is a file without the separators
VAL_NAMES = ("validation", "val", "valid", "dev")


# ------------------------------------------------------------------------------------------------------------
# Sources: where stories come from. read("train") and read("val") start over from the first story at each call.

class Source(NamedTuple):
    read: Callable[[str], Iterator[str]]
    has_val: bool         # it has a validation split of its own


class Drawn(str):
    """A story that was drawn from a known distribution."""
    logprob: float        # nats


def toystories() -> Source:
    import toystories

    def read(split):
        for text, logprob in toystories.stories(seed=0):
            story = Drawn(text)
            story.logprob = logprob
            yield story

    return Source(read, has_val=False)


def read_txt(path: Path) -> Iterator[str]:
    """Stories end at a line `<|endoftext|>` if the file has any such line, else at blank lines."""
    with open(path, "rb") as f:
        marked = any(line.strip() == EOT.encode() for line in f)
    lines, size = [], 0
    with open(path, encoding="utf-8-sig") as f:  # a byte order mark, if any, is no text
        for line in f:
            if line.strip() == (EOT if marked else ""):
                if lines:
                    yield "".join(lines).strip("\n")
                lines, size = [], 0
                continue
            lines.append(line)
            if (size := size + len(line)) > MAX_STORY:
                raise ValueError(f"{path} has a story of over {MAX_STORY:,} characters: end stories by blank lines")
    if "".join(lines).strip():
        yield "".join(lines).strip("\n")


def read_jsonl(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8-sig") as f:
        for i, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                (row["text"] or "").encode()  # an escape such as \ud83d alone is no text
                yield row["text"]
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {i}: not JSON ({error})") from None
            except (KeyError, TypeError, AttributeError):
                raise ValueError(f'{path}, line {i}: no field "text" that holds a string') from None
            except UnicodeEncodeError:
                raise ValueError(f"{path}, line {i}: half a surrogate pair, which is not valid Unicode") from None


def text_files(path: Path) -> Source:
    """.txt and .jsonl, one file or a folder of them; a folder's validation files are told by their names."""
    files = sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl")) if path.is_dir() else [path]

    def named(*names):  # val.txt, stories-train.jsonl, validation/part1.txt
        return [p for p in files if path.is_dir()
                and set(re.split(r"[^a-z]+", str(p.relative_to(path)).lower())) & set(names)]

    parts = {"train": named("train"), "val": named(*VAL_NAMES)}
    has_val = bool(parts["train"] and parts["val"])
    if not has_val:
        parts = {"train": files, "val": []}

    def read(split):
        for file in parts[split]:
            try:
                yield from (read_txt if file.suffix == ".txt" else read_jsonl)(file)
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 text ({error.reason}): convert it first, "
                                 f"as in iconv -f WINDOWS-1252 -t UTF-8 {file.name} > utf8.txt") from None

    return Source(read, has_val)


def hugging_face(name: str, *args, **kwargs) -> Source:
    """load_dataset(*args, streaming=True): Parquet here, Arrow in the cache and Hub ids alike. `name` is for errors."""
    from datasets import load_dataset
    try:
        splits = load_dataset(*args, **kwargs, streaming=True)
    except Exception as error:
        raise (ValueError if isinstance(error, (ValueError, FileNotFoundError)) else OSError)(
            f"{name} cannot be opened: {error}") from None
    val = next((v for v in VAL_NAMES if v in splits), None)
    if "train" not in splits:
        raise ValueError(f"{name} has no split train, only {', '.join(splits)}")

    def read(split):
        try:
            for rows in splits["train" if split == "train" else val].with_format("arrow").iter(batch_size=1000):
                if "text" not in rows.column_names:
                    raise ValueError(f'no field "text", only {", ".join(rows.column_names)}')
                yield from rows["text"].to_pylist()
        except Exception as error:
            raise (ValueError if isinstance(error, ValueError) else OSError)(f"{name}: {error}") from None

    return Source(read, has_val=val is not None)


def hub(hub_id: str, stories: int | None) -> Source:
    """A data set of the Hugging Face Hub: from the cache of `datasets` if it is there, else `stories` of it by streaming,
    else all of it, which fills that cache. Unreachable, within 5 seconds, where the Hub is."""
    if not cached(hub_id):
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import RepositoryNotFoundError
        out = (f"take a local copy (--source PATH), the built-in corpus (python prepare.py toystories) or a mirror "
               f"(HF_ENDPOINT={'https://...'})")
        if constants.HF_HUB_OFFLINE:
            raise Unreachable(f"HF_HUB_OFFLINE is set and {hub_id} is not in the cache: unset it, or {out}")
        try:
            tokenizers.within(4, lambda: HfApi().dataset_info(hub_id, timeout=3))
        except RepositoryNotFoundError:
            raise ValueError(f"no file, folder or data set of the Hub is called {hub_id}") from None
        except Exception as error:
            raise Unreachable(f"the Hugging Face Hub cannot be reached at {constants.ENDPOINT} "
                              f"({type(error).__name__}): {out}") from None
        if stories is not None:
            return hugging_face(hub_id, hub_id)
        from datasets import load_dataset
        load_dataset(hub_id)
    return hugging_face(hub_id, "arrow", data_files=cached(hub_id))  # read as streams: memory-mapped, all would count as ours


def cached(hub_id: str) -> dict[str, list[str]]:
    """{split: Arrow files} that an earlier load_dataset(hub_id) left in the cache of `datasets`, the newest; {} if none."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    home = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
    owner, _, name = hub_id.rpartition("/")
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    infos = home.glob(f"{owner}___{snake}/default/*/*/dataset_info.json")
    for info in sorted(infos, key=lambda p: p.stat().st_mtime, reverse=True):
        splits = json.loads(info.read_text(encoding="utf-8")).get("splits") or {}
        return {s: sorted(str(p) for p in info.parent.glob(f"{snake}-{s}*.arrow")) for s in splits}
    return {}


def find(corpus: str, source: str | None, stories: int | None) -> Source:
    if corpus == "toystories":
        return toystories()
    path = Path(source)
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.suffix in (".txt", ".jsonl", ".parquet")]
        if not files:
            raise ValueError(f"{source} holds no .txt, .jsonl or .parquet file")
        if any(p.suffix == ".parquet" for p in files):
            return hugging_face(source, source)
        return text_files(path)
    if path.exists():
        if path.suffix not in (".txt", ".jsonl", ".parquet"):
            raise ValueError(f"{source}: stories are read from .txt, .jsonl or .parquet files, or a folder of them")
        return hugging_face(source, "parquet", data_files=source) if path.suffix == ".parquet" else text_files(path)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) or path.suffix in (".txt", ".jsonl", ".parquet"):
        raise FileNotFoundError(f"{source}: no such file or folder")
    return hub(source, stories)


# ------------------------------------------------------------------------------------------------------------
# Stories: cleaned, counted, split

# UTF-8 read as if it were Windows-1252 (or Latin-1), as in some of TinyStories: “ ” ‘ ’ „ ‚ – — … begin with the bytes
# E2 80, which became â€, and the third byte became one of these; that of ” has no character there and was often lost.
THIRD = {"œ": "“", "\x9d": "”", "\ufffd": "”", "": "”", "˜": "‘", "™": "’", "ž": "„", "š": "‚", "“": "–", "”": "—", "¦": "…"}
BROKEN = re.compile("â€([" + "".join(THIRD) + "]?)|â\x80[\x93\x94\x98\x99\x9a\x9c\x9d\x9e\xa6]")


def repair(text: str) -> tuple[str, int]:
    """The text with its broken quotation marks put right, and how many there were."""
    return BROKEN.subn(lambda m: THIRD[m[1]] if m[1] is not None else m[0].encode("latin-1").decode(), text)


def clean(stories: Iterator[str], corpus: str, counts: Counter) -> Iterator[str]:
    for text in stories:
        if text is None or not text.strip():
            counts["dropped_empty"] += 1
            continue
        if corpus == "tinystories" and "â" in text:
            text, n = repair(text)
            counts["repaired_marks"] += n
        yield text


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def first(stories: Iterator[str], n: int | None, counts: Counter) -> Iterator[str]:
    for i, text in enumerate(stories):
        if i == n:
            counts["more"] = 1  # there would be more: the limit cut something off
            return
        yield text


def split(source: Source, corpus: str, n: int | None, counts: Counter) -> Iterator[tuple[str, bool]]:
    """(story, is it for validation?): no story is ever on both sides. n limits the stories before the split, or the training
    stories of a source that has a validation split of its own."""
    def read(name, counts):
        return clean(source.read(name), corpus, counts)

    if not source.has_val:
        yield from split_by_hash(first(read("train", counts), n, counts))
        return
    val = {digest(text) for text in read("val", Counter())}
    train = read("train", counts)
    new = (text for text in train if digest(text) not in val or counts.update(dropped_in_val=1))
    yield from ((text, False) for text in first(new, n, counts))
    yield from ((text, True) for text in read("val", counts))


def split_by_hash(stories: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """A story's own hash decides, so that equal stories fall on one side, today and tomorrow. In a corpus too small for that
    the story of the lowest hash is the validation: `spare` holds it back (and its copies) until a regular one is found."""
    cut = (2**128 // VAL_SHARE).to_bytes(16, "big")
    spare, lowest, found = [], None, False
    for text in stories:
        key = digest(text)
        is_val = key < cut
        if not found and not is_val and lowest is not None and key == lowest:
            spare.append(text)
            continue
        if not found and (is_val or lowest is None or key < lowest):
            yield from ((other, False) for other in spare)
            spare, lowest, found = [] if is_val else [text], key, is_val
            if not is_val:
                continue
        yield text, is_val
    yield from ((text, True) for text in spare)


# ------------------------------------------------------------------------------------------------------------
# Writing

class Bin:
    """One .bin file on its way: a batch of stories that waits to be encoded, and totals of what was written."""

    def __init__(self, path: Path, tokenizer: Tokenizer):
        self.path, self.tokenizer = path, tokenizer
        self.file = open(path, "wb")
        self.batch, self.size = [], 0                         # stories, characters
        self.stories = self.tokens = self.bytes = 0           # bytes of UTF-8 text, end-of-texts left out
        self.logprob = 0.0                                    # nats, of drawn stories

    def encode(self, texts: list[str]):
        """What a thread does: texts -> (ids (n,) in the file's type, stories, bytes, nats)."""
        ids = self.tokenizer.encode_stories(texts)
        if len(ids) and int(ids.max()) >= self.tokenizer.vocab_size:
            raise RuntimeError(f"tokenizer {self.tokenizer.name} made an id past its {self.tokenizer.vocab_size:,}")
        size = sum(len(t) if t.isascii() else len(t.encode()) for t in texts)
        return (ids.astype(dtype_of(self.tokenizer)), len(texts), size, sum(getattr(t, "logprob", 0.0) for t in texts))

    def write(self, ids, stories, size, logprob):
        self.file.write(ids.data)
        self.stories += stories
        self.tokens += len(ids)
        self.bytes += size
        self.logprob += logprob

    def totals(self) -> dict:
        return {"stories": self.stories, "tokens": self.tokens, "bytes": self.bytes}


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 65_536 else "<u4")


def encode_all(items, train: Bin, val: Bin, workers: int, title: str) -> None:
    """Encodes (story, is_val) items in `workers` threads and writes them in order; a few batches are under way at a time."""
    waiting = deque()
    with ThreadPoolExecutor(workers) as pool, \
            tqdm(desc=title, unit="B", unit_scale=True, disable=None, mininterval=0.5) as bar:

        def start(bin):
            waiting.append((bin, pool.submit(bin.encode, bin.batch)))
            bin.batch, bin.size = [], 0

        def finish():
            bin, encoded = waiting.popleft()
            _, _, size, _ = result = encoded.result()
            bin.write(*result)
            bar.set_postfix_str(f"{train.stories + val.stories:,} stories, {(train.tokens + val.tokens) / 1e6:,.1f}M tokens",
                                refresh=False)
            bar.update(size)

        for text, is_val in items:
            bin = val if is_val else train
            bin.batch.append(text)
            bin.size += len(text)
            if bin.size >= BATCH:
                start(bin)
                if len(waiting) > 2 * workers:
                    finish()
        start(train)
        start(val)
        while waiting:
            finish()


def sample_of(items, size: int) -> deque:
    """The first items, until their training stories have `size` characters."""
    taken = deque()
    while size > 0 and (item := next(items, None)):
        taken.append(item)
        size -= 0 if item[1] else len(item[0])
    return taken


def emptied(taken: deque) -> Iterator:
    while taken:
        yield taken.popleft()


def write(folder: Path, corpus: str, name: str, source: str | None, stories: int | None, workers: int) -> dict:
    """Writes the files of a corpus into the empty `folder`, meta.json last, and returns what that says."""
    counts = Counter(dropped_empty=0, dropped_in_val=0, repaired_marks=0)
    n_bpe = tokenizers.bpe_size(name)
    tokenizer = None if n_bpe else tokenizers.get(name)
    items = split(find(corpus, source, stories), corpus, stories, counts)
    if n_bpe:
        taken = sample_of(items, SAMPLE)
        if not any(not is_val for _, is_val in taken):
            raise ValueError(too_short(corpus, source))
        tokenizer = tokenizers.train_bpe((text for text, is_val in taken if not is_val), n_bpe)
        tokenizer.save(folder / "tokenizer.json")
        items = chain(emptied(taken), items)
    train, val = Bin(folder / "train.bin", tokenizer), Bin(folder / "val.bin", tokenizer)
    encode_all(items, train, val, workers, corpus)
    if not train.stories or not val.stories:
        raise ValueError(too_short(corpus, source))
    meta = {"corpus": corpus, "source": source, "limit": stories if counts.pop("more", 0) else None,
            "tokenizer": {"name": name, "kind": "bpe" if n_bpe else name, "vocab_size": tokenizer.vocab_size,
                          "sha256": tokenizer.sha256},
            "dtype": dtype_of(tokenizer).name, "train": train.totals(), "val": val.totals(), **counts}
    if corpus == "toystories":
        meta["floor_bpb"] = -val.logprob / math.log(2) / (val.bytes + val.stories)
    elif source and os.path.exists(source):
        meta["source_files"] = fingerprint(Path(source))
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    for file in (train.file, val.file):
        file.close()
    for path in (*folder.iterdir(), folder):
        sync(path)
    return meta


def too_short(corpus, source):
    return f"{source or corpus} has too few stories: it takes two different ones, one to train on and one to validate with"


def fingerprint(path: Path) -> list[int]:
    """[files, bytes, time of the newest] of a local source, so that an edited one is seen."""
    files = [p.stat() for p in (path.rglob("*") if path.is_dir() else [path]) if p.is_file()]
    return [len(files), sum(f.st_size for f in files), int(max(f.st_mtime for f in files))]


def sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return
    fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    os.fsync(fd)
    os.close(fd)


@contextmanager
def alone(folder: Path):
    """Waits until no other prepare is at work in `folder`. Yields False where the system has no such locks."""
    try:
        import fcntl
        fd = os.open(folder, os.O_RDONLY)
    except ImportError:  # Windows: two at once do the work twice
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another prepare is at work in {folder}: waiting for it", flush=True)
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:  # some network file systems
            pass
        yield True
    finally:
        os.close(fd)


def prepare(corpus: str, tokenizer: str = "bpe4096", source: str | os.PathLike | None = None, stories: int | None = None,
            workers: int | None = None, data_dir: str | os.PathLike = "data") -> Path:
    """The folder with the corpus prepared, made where it is not there or does not do. `stories`: the first so many at least.

    Raises ValueError or FileNotFoundError for what was asked or given, Unreachable where a network is missing, OSError."""
    if not re.fullmatch(r"\w[\w.-]*", corpus) or Path(corpus).suffix in (".txt", ".jsonl", ".parquet"):
        raise ValueError(f"{corpus!r} is no name for a corpus: python prepare.py NAME --source {corpus}")
    if stories is not None and stories < 1 or workers is not None and workers < 1:
        raise ValueError("--stories and --workers are 1 or more")
    if corpus == "toystories" and source is not None:
        raise ValueError("toystories is built in and takes no --source")
    tokenizers.bpe_size(tokenizer)  # ValueError for a name that is none
    source = None if source is None else os.fspath(source)
    if corpus == "toystories":
        stories = stories or TOYS
    folder = Path(data_dir, corpus, tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.parent) as locked:
        reason = lacking(folder, source, stories)
        if not reason:
            print(f"{folder} is ready")
            return folder
        if folder.exists():
            print(f"{folder} is made anew: {reason}")
        if corpus == "tinystories":
            source = source or HUB_ID
        elif corpus != "toystories" and source is None:
            raise ValueError(f"where is the corpus {corpus}? python prepare.py {corpus} --source PATH_OR_HUB_ID "
                             "(tinystories and toystories need no --source)")
        if locked:  # what a killed prepare left
            for stale in folder.parent.glob(f".{tokenizer}-*"):
                shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{tokenizer}-", dir=folder.parent))
        try:
            (work / "new").mkdir()
            meta = write(work / "new", corpus, tokenizer, source, stories, workers or cpus())
            if folder.exists():
                os.rename(folder, work / "old")
            os.rename(work / "new", folder)  # all or nothing
            sync(folder.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    report(folder, meta)
    return folder


def cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def report(folder: Path, meta: dict) -> None:
    print(f"{folder}: {meta['tokenizer']['name']}, {meta['tokenizer']['vocab_size']:,} ids")
    for name in ("train", "val"):
        n = meta[name]
        print(f"  {name:<5} {n['stories']:>11,} stories {n['tokens']:>13,} tokens {n['bytes'] / 1e6:>9,.2f} MB of text, "
              f"{n['bytes'] / n['tokens']:.2f} bytes a token")
    print(f"  dropped {meta['dropped_empty']:,} empty stories and {meta['dropped_in_val']:,} that are in the validation too; "
          f"repaired {meta['repaired_marks']:,} broken quotation marks")


# ------------------------------------------------------------------------------------------------------------
# Reading

class Data(NamedTuple):
    train: np.ndarray     # (tokens,) uint16 or uint32, memory-mapped: ids of all stories, end-of-text after each
    val: np.ndarray       # the same
    meta: dict            # meta.json
    tokenizer: Tokenizer
    folder: Path


def command(folder: Path) -> str:
    """What to type to make the data in `folder`."""
    data_dir, corpus, name = folder.parent.parent, folder.parent.name, folder.name
    source = "" if corpus in ("tinystories", "toystories") else " --source PATH"
    where = "" if data_dir == Path("data") else f" --data_dir {data_dir}"
    return f"python prepare.py {corpus} --tokenizer {name}{source}{where}"


def opened(folder: Path) -> tuple[dict, dict]:
    """(meta, {"train": ids, "val": ids}), found whole. ValueError names the file and what to type."""
    remedy = f"make the data again: {command(folder)}"
    if not folder.is_dir():
        raise ValueError(f"no data in {folder}: {command(folder)}")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype, vocab_size = np.dtype(meta["dtype"]).newbyteorder("<"), meta["tokenizer"]["vocab_size"]
        expected = {name: meta[name]["tokens"] for name in ("train", "val")}
    except FileNotFoundError:
        raise ValueError(f"{folder} has no meta.json; {remedy}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'meta.json'} is damaged ({error!r}); {remedy}") from None
    bins = {}
    for name, tokens in expected.items():
        path = folder / f"{name}.bin"
        size = path.stat().st_size if path.exists() else -1
        if size < 0:
            raise ValueError(f"{path} is missing; {remedy}")
        if size % dtype.itemsize:
            raise ValueError(f"{path} is cut off: {size:,} bytes are no whole number of {dtype.name} ids; {remedy}")
        if size // dtype.itemsize != tokens:
            raise ValueError(f"{path} has {size // dtype.itemsize:,} tokens, meta.json says {tokens:,}; {remedy}")
        bins[name] = np.memmap(path, dtype, "r") if tokens else np.empty(0, dtype)
        if (top := highest(bins[name])) >= vocab_size:
            raise ValueError(f"{path} has an id {top:,}, past the vocabulary of {vocab_size:,}; {remedy}")
    return meta, bins


def highest(ids: np.ndarray, block: int = 1 << 20, most: int = 128) -> int:
    """The highest id. In more than `most` blocks of ids, that of `most` blocks spread from the first to the last (0.1 s)."""
    blocks = range(0, len(ids), block)
    if len(blocks) > most:
        blocks = [(len(ids) - block) * i // (most - 1) for i in range(most)]
    return max((int(ids[i:i + block].max()) for i in blocks), default=0)


def load(folder: str | os.PathLike) -> Data:
    """The data that prepare() made, checked. ValueError (or Unreachable, for gpt2's vocabulary) in one line."""
    folder = Path(folder)
    meta, bins = opened(folder)
    name = meta["tokenizer"]["name"]
    tokenizer = tokenizers.load(folder / "tokenizer.json", name) if tokenizers.bpe_size(name) else tokenizers.get(name)
    if tokenizer.sha256 != meta["tokenizer"]["sha256"]:
        raise ValueError(f"{folder}: these ids were made with another {name} vocabulary; make the data again: {command(folder)}")
    return Data(bins["train"], bins["val"], meta, tokenizer, folder)


def lacking(folder: Path, source: str | None, stories: int | None) -> str | None:
    """Why the data in `folder` do not do for a request, or None where they do."""
    try:
        meta, _ = opened(folder)
    except ValueError as error:
        return str(error).split(";")[0]
    had, limit = meta.get("source"), meta.get("limit")
    if source is not None and os.path.abspath(source) != os.path.abspath(had or ""):
        return f"it was made from {had}"
    if source is not None and os.path.exists(source) and fingerprint(Path(source)) != meta.get("source_files"):
        return f"{source} has changed since"
    if limit is not None and (stories is None or stories > limit):
        return f"it holds the first {limit:,} stories, and {f'{stories:,}' if stories else 'all'} are wanted"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="A corpus -> train.bin, val.bin and meta.json in data/CORPUS/TOKENIZER.")
    parser.add_argument("corpus", help="tinystories, toystories, or any name together with --source")
    parser.add_argument("--tokenizer", default="bpe4096", help="bpe4096 (any bpeN), gpt2 or byte; default %(default)s")
    parser.add_argument("--source", help=".txt, .jsonl, .parquet, a folder of them, or a data set's id on the Hub")
    parser.add_argument("--stories", type=int, help="the first so many stories; default all (of toystories 30,000)")
    parser.add_argument("--workers", type=int, help="threads that encode; default one for each processor")
    parser.add_argument("--data_dir", default="data", help="default %(default)s")
    try:
        prepare(**vars(parser.parse_args()))
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, FileNotFoundError) as e:  # what was typed or given
        error, status = e, 2
    except (OSError, RuntimeError, ImportError) as e:  # the machine: no network, disk full
        error, status = e, 1
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
