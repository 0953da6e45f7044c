"""Sources of stories: readers for files and the Hugging Face Hub, and the table of known corpora.

    source = find("mine", "mine.txt", None)    # {"train": read}, and "val" if it has a validation split
    for text in source["train"](): ...         # each call of read() starts again
    split(source, Corpus(), None, Counter())   # (story, whether it is for validation), cleaned

Everything streams; a corpus is never loaded into memory completely.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from nanostlm.tokenizer import EOT, Unreachable, within

VAL_SHARE = 100  # one story in this many is for validation, if the source has no validation split
MAX_STORY = 50_000_000  # characters; a longer one means that a .txt file has no separators
SMALL = 20_000  # bytes; in a folder of .txt files that are all smaller, each file is one story
SUFFIXES = (".txt", ".jsonl", ".parquet")
VAL_NAMES = ("validation", "val", "valid", "dev")

# ------------------------------------------------------------------------------------------------------------
# Known corpora


@dataclass(frozen=True)
class Corpus:
    """Properties of a corpus, looked up by name. The defaults are for a user's own text."""

    hub_id: str | None = None  # the source, unless --source names another one
    generate: Callable[[], Iterator[str]] | None = None  # a built-in corpus: endless stories, no source
    stories: int | None = None  # number of stories unless --stories says otherwise; None: all
    repair: bool = False  # restore quotation marks that were decoded as Windows-1252
    check: Callable | None = None  # text -> Verdict(ok, logprob, ...), for a corpus of known entropy
    version: Callable[[], str] | None = None  # of a built-in corpus

    @property
    def needs_source(self) -> bool:
        return not (self.hub_id or self.generate)


def generate_toystories() -> Iterator[str]:
    from nanostlm import toystories

    return (text for text, _ in toystories.stories(seed=0))


def check_toystory(text: str):
    from nanostlm import toystories

    return toystories.check(text)


def toystories_version() -> str:
    from nanostlm import toystories

    return toystories.VERSION


CORPORA = {
    "tinystories": Corpus(hub_id="roneneldan/TinyStories", repair=True),
    "toystories": Corpus(
        generate=generate_toystories, stories=100_000, check=check_toystory, version=toystories_version
    ),
}


def corpus(name: str) -> Corpus:
    return CORPORA.get(name, Corpus())


# ------------------------------------------------------------------------------------------------------------
# Readers: a file -> its stories; None for a missing text


def has_line(path: str, wanted: str) -> bool:
    with open(path, "rb") as f:
        return any(line.strip() == wanted.strip().encode() for line in f)


def read_txt(path: str, split: str = "auto") -> Iterator[str]:
    """`split` is the name of a rule in SPLITS, or the line at which stories end."""
    if split == "auto":
        split = EOT if has_line(path, EOT) else "blank"
    end = {"file": None, "blank": ""}.get(split, split.strip())
    lines, size = [], 0
    with open(path, encoding="utf-8-sig") as f:  # -sig skips a byte order mark
        for line in chain(f, [None]):
            if line is not None and line.strip() != end:
                lines.append(line)
                if (size := size + len(line)) > MAX_STORY:
                    raise ValueError(
                        f"{path}: a story has more than {MAX_STORY:,} characters; {describe_split(split)} "
                        "(--split changes this)"
                    )
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
            except UnicodeEncodeError:  # a lone escape such as \ud83d
                raise ValueError(f"{path}, line {i}: a lone surrogate is not valid Unicode") from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {i}: not JSON ({error})") from None
            except (KeyError, TypeError, AttributeError):
                raise ValueError(f'{path}, line {i}: no field "text" that holds a string') from None
            yield text


def read_parquet(path: str) -> Iterator[str | None]:
    """`path` may be a hf:// address; only the pages that are read are downloaded."""
    import fsspec
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    with fsspec.open(path) as f:
        try:
            file = ParquetFile(f, pre_buffer=False, buffer_size=2**20)  # does not hold whole row groups
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a Parquet file ({error})") from None
        kinds = {field.name: str(field.type) for field in file.schema_arrow}
        if kinds.get("text") not in ("string", "large_string"):
            raise ValueError(f'{path} has no field "text" of strings, only {kinds}')
        for rows in file.iter_batches(1000, columns=["text"], use_threads=False):
            yield from rows["text"].to_pylist()


def read_arrow(path: str) -> Iterator[str | None]:
    """A file in the cache of `datasets`. It is not memory-mapped: mapped pages count as memory in use."""
    import pyarrow as pa

    with open(path, "rb") as f, pa.ipc.open_stream(f) as batches:
        if "text" not in batches.schema.names:
            raise ValueError(f'no field "text", only {", ".join(batches.schema.names)}')
        for rows in batches:
            yield from rows["text"].to_pylist()


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".parquet": read_parquet, ".arrow": read_arrow}


def read_files(paths: list[str], split: str = "auto") -> Iterator[str | None]:
    readers = READERS | {".txt": partial(read_txt, split=split)}
    for path in paths:
        try:
            yield from readers.get(Path(path).suffix, readers[".txt"])(path)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text ({error.reason}); convert it first, as in "
                f"iconv -f WINDOWS-1252 -t UTF-8 {Path(path).name} > utf8.txt"
            ) from None
        except (OSError, ValueError):
            raise
        except Exception as error:  # raised by the libraries that read from the network
            raise OSError(f"{path}: {type(error).__name__}: {error}") from None


# ------------------------------------------------------------------------------------------------------------
# Finding a source

# "train", perhaps "val": a function that reads stories
Source = dict[str, Callable[[], Iterator[str | None]]]


def find(name: str, source: str | None, stories: int | None, split: str | None = None) -> Source:
    """The stories of a corpus, those of .txt files by the rule `split`.

    ValueError or FileNotFoundError if `source` has none; Unreachable.
    """
    if generate := corpus(name).generate:
        return {"train": generate}
    if Path(source).exists():
        files = local_files(Path(source))
    elif is_hub_id(source):
        files = hub_files(source, stories)
    else:
        raise FileNotFoundError(f"{source}: no such file or folder")
    suffixes = {Path(path).suffix for paths in files.values() for path in paths}
    if "train" not in files or not suffixes <= READERS.keys():
        raise ValueError(
            f"{source} has splits {', '.join(files)} of {', '.join(suffixes)} files; it needs "
            f"a split train, of {', '.join(SUFFIXES)} files"
        )
    val = next((files[name] for name in VAL_NAMES if name in files), None)
    read = partial(read_files, split=split or "auto")
    return {"train": partial(read, files["train"])} | ({"val": partial(read, val)} if val else {})


def is_hub_id(source: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)) and Path(source).suffix not in SUFFIXES


def local_files(path: Path) -> dict[str, list[str]]:
    """{split: files}, by names such as train.txt and validation/1.txt; of .parquet as in `datasets`."""
    if path.is_file():
        return {"train": [str(path)]}
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"{path} holds no {', '.join(SUFFIXES)} file")
    if any(p.suffix == ".parquet" for p in files):
        return ask_datasets(path)
    words = {p: set(re.split(r"[^a-z]+", str(p.relative_to(path)).lower())) for p in files}
    train = [str(p) for p in files if "train" in words[p]]
    val = [str(p) for p in files if words[p] & set(VAL_NAMES)]
    return {"train": train, "val": val} if train and val else {"train": [str(p) for p in files]}


SPLITS = {
    "file": "one story per file",
    "blank": "stories end at blank lines",
    "auto": f"stories end at lines {EOT}, in a file without one at blank lines",
}


def describe_split(split: str) -> str:
    return SPLITS.get(split, f"stories end at lines {split}")


def split_rule(source: str, split: str | None) -> str | None:
    """Where stories in .txt files end: a key of SPLITS or a separator line; None without such files.

    `split` decides, if it is given. Otherwise, a folder of several files, all SMALL and without a line
    `<|endoftext|>`, has one story per file. ValueError if `split` does not fit the files.
    """
    path, texts = Path(source), []
    if path.exists() and not (path.is_dir() and any(path.rglob("*.parquet"))):
        texts = [[file for file in files if file.endswith(".txt")] for files in local_files(path).values()]
    files = [*chain(*texts)]
    if not files:
        if split and (path.exists() or is_hub_id(source)):
            raise ValueError(f"--split is for .txt files, and {source} has none")
        return None
    if split in ("file", "blank"):
        return split
    if split and split != "auto":
        if not split.strip() or not any(has_line(file, split) for file in files):
            raise ValueError(
                f"no line of {source} is {split!r}: --split takes file, blank or a separator line"
            )
        return split
    marked = [has_line(file, EOT) for file in files]
    if any(marked):
        return EOT if all(marked) else "auto"
    small = all(os.path.getsize(file) < SMALL for file in files)
    return "file" if small and min(map(len, texts)) > 1 else "blank"


def ask_datasets(name: str | Path, download: bool = False) -> dict[str, list[str]]:
    """{split: files} of a folder or of a data set on the Hub, by the rules of `datasets`.

    With `download`, the data set is downloaded, and the files are those in the cache of `datasets`.
    """
    import logging

    from datasets import load_dataset, load_dataset_builder

    logging.getLogger("huggingface_hub.repocard").setLevel(
        "ERROR"
    )  # warns about any README.md without metadata
    try:
        if download:
            return cache_files(load_dataset(str(name)))
        return {str(k): list(v) for k, v in load_dataset_builder(str(name)).config.data_files.items()}
    except Exception as error:
        kind = ValueError if isinstance(error, (ValueError, FileNotFoundError)) else OSError
        raise kind(f"{name} cannot be opened: {error}") from None


def cached_files(hub_id: str) -> dict[str, list[str]]:
    """The files of the newest download in the cache of `datasets`, without a network; {} if there is none."""
    import logging

    from datasets.packaged_modules.cache.cache import Cache  # what load_dataset uses without a network

    logging.getLogger("datasets.packaged_modules.cache.cache").setLevel("ERROR")
    name = hub_id.split("/")[-1]
    try:
        found = Cache(repo_id=hub_id, dataset_name=name, config_name="default", version="auto", hash="auto")
        return cache_files(found.as_dataset())
    except (ValueError, OSError):
        return {}


def cache_files(splits) -> dict[str, list[str]]:
    return {name: [file["filename"] for file in files] for name, files in splits.cache_files.items()}


def hub_files(hub_id: str, stories: int | None) -> dict[str, list[str]]:
    """{split: files} of a data set on the Hub.

    The files are those in the cache of `datasets` if it has the data set; otherwise, if only some stories are
    needed, the addresses of Parquet files, for streaming; otherwise all files, downloaded to that cache.
    Unreachable, within 5 seconds, if the data set is not cached and the Hub does not answer.
    """
    if files := cached_files(hub_id):
        return files
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError

    alternatives = (
        "use a local copy (--source PATH), the built-in corpus (python prepare.py toystories) or a "
        "mirror (HF_ENDPOINT=https://...)"
    )
    if constants.HF_HUB_OFFLINE:
        raise Unreachable(f"HF_HUB_OFFLINE is set and {hub_id} is not in the cache: unset it, {alternatives}")
    try:
        within(2.5, lambda: HfApi().dataset_info(hub_id, timeout=2.5))
    except RepositoryNotFoundError:
        raise ValueError(f"{hub_id} is neither a file, a folder, nor a dataset on the Hub") from None
    except Exception as error:
        raise Unreachable(
            f"the Hugging Face Hub cannot be reached at {constants.ENDPOINT} "
            f"({type(error).__name__}): {alternatives}"
        ) from None
    files = ask_datasets(hub_id) if stories else {}
    streams = files and all(path.endswith(".parquet") for path in chain(*files.values()))
    return files if streams else ask_datasets(hub_id, download=True)


# ------------------------------------------------------------------------------------------------------------
# Stories: cleaned, counted, split

# Parts of TinyStories are UTF-8 that was decoded as Windows-1252 or Latin-1. Quotation marks, dashes and the
# ellipsis begin with the bytes E2 80, which became "â€". THIRD maps the decoded third byte to the original
# character; the third byte of ” is often missing.
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
    """The text with its broken quotation marks restored, and their number."""
    return BROKEN.subn(lambda m: m[0].encode("latin-1").decode() if m[1] is None else THIRD[m[1]], text)


def clean(stories: Iterable[str | None], known: Corpus, counts: Counter) -> Iterator[str]:
    for text in stories:
        if text is None or not text.strip():
            counts["dropped_empty"] += 1
            continue
        if known.repair and "â" in text:
            text, n = repair(text)
            counts["repaired_marks"] += n
        yield text


def first(stories: Iterable[str], n: int | None, counts: Counter) -> Iterator[str]:
    """The first n stories; counts["more"] says whether there are more."""
    for i, text in enumerate(stories):
        if i == n:
            counts["more"] = 1
            return
        yield text


def digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def split(source: Source, known: Corpus, n: int | None, counts: Counter) -> Iterator[tuple[str, bool]]:
    """(story, whether it is for validation); no story is in both splits.

    n limits the number of stories; if the source has a validation split, n limits only its training stories.
    """
    train = clean(source["train"](), known, counts)
    if "val" not in source:
        yield from split_by_hash(first(train, n, counts))
        return
    val = {digest(text) for text in clean(source["val"](), known, Counter())}
    new = (text for text in train if digest(text) not in val or counts.update(dropped_in_val=1))
    yield from ((text, False) for text in first(new, n, counts))
    yield from ((text, True) for text in clean(source["val"](), known, counts))


def split_by_hash(stories: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Assign stories to splits by their hash, so that equal stories are always in the same split. About one
    in VAL_SHARE has a hash below the cutoff and is for validation; if none has, the one with the lowest.
    Stories are buffered until the first is found.
    """
    hashed = ((digest(text), text) for text in stories)
    cut, held = (2**128 // VAL_SHARE).to_bytes(16, "big"), []
    for key, text in hashed:
        held.append((key, text))
        if key < cut:
            break
    else:
        cut = min(held, default=(b"",))[0] + b"\0"  # just above the lowest
    yield from ((text, key < cut) for key, text in chain(held, hashed))
