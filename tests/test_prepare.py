"""prepare.py: the contents of the .bin files, atomic replacement, reading sources, one-line errors."""

import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

import prepare
from nanostlm import memorization, sources, toystories
from nanostlm import tokenizer as tokenizers
from nanostlm.data import Bin, Data, first_stories, load_data
from nanostlm.tokenizer import EOT, Tokenizer

ROOT = Path(__file__).parents[1]
TINYSTORIES = ROOT / ".." / "shared" / "tinystories"
WORDS = "once upon a time little lily and tom saw the big red ball naïve “yes” 😀 said no".split()


def stories(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    ends = [".", "\nThe end."]
    return [f"{i} " + " ".join(rng.choices(WORDS, k=rng.randint(3, 30))) + rng.choice(ends) for i in range(n)]


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def txt(path: Path, texts: list[str]) -> str:
    return write(path, "\n\n".join(texts))


def parquet(path: Path, texts: list, field: str = "text") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({field: texts}), path)
    return str(path)


def prepared(tmp_path: Path, source, tokenizer="byte", corpus="mine", **kwargs) -> Data:
    return load_data(prepare.prepare(corpus, tokenizer, source, data_dir=tmp_path / "data", **kwargs))


def texts_of(data: Data, name: str) -> list[str]:
    ids, tok = getattr(data, name), data.tokenizer
    assert ids[-1] == tok.eot
    return [tok.decode(story[:-1]) for story in np.split(ids, np.flatnonzero(ids == tok.eot) + 1)[:-1]]


def all_texts(data: Data) -> list[str]:
    return sorted(texts_of(data, "train") + texts_of(data, "val"))


def leftovers(tmp_path: Path) -> list[str]:
    return [str(p) for p in (tmp_path / "data").rglob("*") if p.name.startswith(".")]


# ------------------------------------------------------------------------------------------------------------
# Output files


@pytest.mark.parametrize("name", ["byte", "bpe300", "bpe500"])
def test_bins_match_reference(tmp_path, name, monkeypatch):
    monkeypatch.setattr("nanostlm.data.BATCH", 5000)  # many batches
    monkeypatch.setattr(prepare, "SAMPLE", 20_000)  # smaller than the corpus
    texts = stories(1500) + [f"in the text {EOT} it is text"]
    data = prepared(tmp_path, txt(tmp_path / "mine.txt", texts), name, workers=3)
    val = [t for t in texts if sources.digest(t) < (2**128 // sources.VAL_SHARE).to_bytes(16, "big")]
    assert 3 < len(val) < 40
    for split, expected in (("train", [t for t in texts if t not in val]), ("val", val)):
        ids = [i for text in expected for i in (*data.tokenizer.encode(text), data.tokenizer.eot)]
        raw = (data.folder / f"{split}.bin").read_bytes()
        assert np.frombuffer(raw, "<u2").tolist() == ids == getattr(data, split).tolist()
        size = sum(len(t.encode()) for t in expected)
        assert data.meta[split] == {"stories": len(expected), "tokens": len(ids), "bytes": size}
    size = 257 if name == "byte" else int(name[3:])
    assert data.meta["tokenizer"] == {
        "name": name,
        "kind": "byte" if name == "byte" else "bpe",
        "vocab_size": size,
        "sha256": data.tokenizer.sha256,
    }
    assert (data.meta["corpus"], data.meta["limit"], data.meta["dtype"]) == ("mine", None, "uint16")
    assert sorted(p.name for p in data.folder.iterdir()) == sorted(
        ["meta.json", "train.bin", "val.bin"] + ["tokenizer.json"] * (name != "byte")
    )
    assert leftovers(tmp_path) == []


def test_bpe_is_trained_on_the_training_split_only(tmp_path):
    texts = stories(300)
    data = prepared(tmp_path, txt(tmp_path / "mine.txt", texts), "bpe400")
    val = texts_of(data, "val")
    expected = tokenizers.train_bpe([t for t in texts if t not in val], 400)
    assert val and data.tokenizer.sha256 == expected.sha256
    assert data.tokenizer.sha256 != tokenizers.train_bpe(texts, 400).sha256  # the vocabularies differ


def test_vocabulary_over_65536_is_uint32(tmp_path, monkeypatch):
    words = [f"{i:05d}".encode() for i in range(70_000)]
    big = Tokenizer("gpt2", [bytes([b]) for b in range(256)] + words)
    monkeypatch.setattr(tokenizers, "get", lambda name: big)
    data = prepared(tmp_path, txt(tmp_path / "mine.txt", [f"69999 {i}" for i in range(10)]), "gpt2")
    assert data.meta["dtype"] == "uint32" and data.train.dtype == np.uint32
    assert 70_255 in data.train and data.train[-1] == big.eot == 70_256
    assert set(all_texts(data)) == {f"69999 {i}" for i in range(10)}


def test_ids_outside_the_vocabulary_are_never_written(tmp_path, monkeypatch):
    tok = tokenizers.get("byte")
    tok.encode_stories = lambda texts: np.array([70_000], np.uint32)  # as uint16 it would be 4,464
    monkeypatch.setattr(tokenizers, "get", lambda name: tok)
    with pytest.raises(RuntimeError, match="70000"):
        prepared(tmp_path, txt(tmp_path / "mine.txt", stories(9)))
    assert not (tmp_path / "data" / "mine").exists()


@pytest.mark.parametrize("n", [2, 3, 20, 500])
def test_splits_are_disjoint_and_independent_of_order(n):
    texts = [f"story {i}" for i in range(n)] * 3
    random.Random(n).shuffle(texts)
    items = list(sources.split_by_hash(texts))
    train, val = ([t for t, is_val in items if is_val == split] for split in (False, True))
    assert Counter(train) + Counter(val) == Counter(texts) and train and val and not set(train) & set(val)
    assert [t for t, _ in items] == texts
    assert set(val) == {t for t, is_val in sources.split_by_hash(sorted(texts)) if is_val}
    if n == 500:  # more stories do not change the split of these
        more = {t for t, v in sources.split_by_hash([*texts, *(f"more {i}" for i in range(5000))]) if v}
        assert set(val) == more & set(texts) and 20 < len(more) < 100


def test_toystories_entropy(tmp_path, monkeypatch):
    fake = sources.Corpus(
        generate=lambda: (f"toy é {i}" for i in count()),
        stories=300,
        check=lambda text: SimpleNamespace(logprob=-1.5 * (int(text.split()[2]) % 7 + 1)),
    )
    monkeypatch.setitem(sources.CORPORA, "toystories", fake)
    data = prepared(tmp_path, None, corpus="toystories")
    assert data.meta["limit"] == 300 and data.meta["train"]["stories"] + data.meta["val"]["stories"] == 300
    val = texts_of(data, "val")
    nats = sum(1.5 * (int(t.split()[2]) % 7 + 1) for t in val)
    size = sum(len(t.encode()) + 1 for t in val)
    assert data.meta["floor_bpb"] == pytest.approx(nats / math.log(2) / size)
    assert prepared(tmp_path, None, corpus="toystories", stories=100).meta["limit"] == 300
    assert prepared(tmp_path, None, corpus="toystories", stories=301).meta["limit"] == 301


def test_built_in_corpus(tmp_path):
    data = prepared(tmp_path, None, corpus="toystories", stories=200)
    expected = list(islice(toystories.stories(seed=0), 200))
    assert all_texts(data) == sorted(text for text, _ in expected)
    val = texts_of(data, "val")
    nats = -sum(logprob for text, logprob in expected if text in val)
    assert data.meta["floor_bpb"] == nats / math.log(2) / sum(len(text.encode()) + 1 for text in val)
    assert data.meta["source"] is None and not sources.corpus("toystories").needs_source


def test_outdated_version_of_a_built_in_corpus(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toystories, "VERSION", "1")
    data = prepared(tmp_path, None, corpus="toystories", stories=200)
    assert data.meta["version"] == "1"
    prepared(tmp_path, None, corpus="toystories", stories=200)
    assert "is ready" in capsys.readouterr().out
    monkeypatch.setattr(toystories, "VERSION", "2")
    before = (data.folder / "meta.json").stat().st_mtime_ns

    def prepare_for_training():
        return prepare.prepare_missing("toystories", "byte", "", 200, tmp_path / "data", None, "")

    for version in ("version 1", "an earlier version"):  # training warns and keeps the data
        assert (
            prepare_for_training() == "toystories"
            and (data.folder / "meta.json").stat().st_mtime_ns == before
        )
        err = capsys.readouterr().err
        assert f"WARNING: {data.folder} is outdated: it has {version} of toystories, not version 2" in err
        assert "python prepare.py toystories --tokenizer byte" in err
        edit(data.folder / "meta.json", lambda b: b.replace(b'"version": "1",', b""))
        before = (data.folder / "meta.json").stat().st_mtime_ns
    assert prepared(tmp_path, None, corpus="toystories", stories=200).meta["version"] == "2"
    assert "is rebuilt: it has an earlier version" in capsys.readouterr().out
    prepare_for_training()
    assert "WARNING" not in capsys.readouterr().err


def test_known_corpora():
    mine = sources.corpus("mine")
    assert mine.needs_source and not (mine.stories or mine.repair or mine.check)
    assert sources.corpus("tinystories").hub_id == "roneneldan/TinyStories"
    assert not sources.corpus("tinystories").needs_source


def test_load_data_with_the_first_stories(tmp_path):
    data = prepared(tmp_path, txt(tmp_path / "mine.txt", stories(300)))
    texts = texts_of(data, "train")
    for n in (1, 7, len(texts) - 1, len(texts), 10_000):
        first = load_data(data.folder, n)
        assert texts_of(first, "train") == texts[:n] and texts_of(first, "val") == texts_of(data, "val")
        assert first.meta["train"]["stories"] == min(n, len(texts))
        assert first.meta["train"]["tokens"] == len(first.train)
    eot = data.tokenizer.eot
    for n in (1, 7, len(texts)):  # also in small blocks
        assert (
            first_stories(data.train, eot, n, block=50).tolist() == load_data(data.folder, n).train.tolist()
        )


# ------------------------------------------------------------------------------------------------------------
# Sources


def test_read_txt(tmp_path):
    def read(text):
        return list(sources.read_txt(write(tmp_path / "x.txt", text)))

    assert read("one\n  two\n\n\n \nthree") == ["one\n  two", "three"]
    assert read("\n\none\r\ntwo\r\n\r\nthree\r\n") == ["one\ntwo", "three"]
    assert read(f"one\n\ntwo\n{EOT}\n{EOT}\nthree {EOT} four\n{EOT}\n") == ["one\n\ntwo", f"three {EOT} four"]
    assert read("\ufeffone\n\nдва 😀") == ["one", "два 😀"]
    assert read("") == read("\n\n") == read(f"{EOT}\n\n{EOT}\n\n") == []


def folder_of_texts(folder: Path, texts: list[str]) -> str:
    for i, text in enumerate(texts):
        write(folder / f"{i:03}.txt", text)
    return str(folder)


def test_folder_of_small_files_has_one_story_per_file(tmp_path, capsys):
    texts = [f"{text}\n\nand so on" for text in stories(61)]
    source = folder_of_texts(tmp_path / "tales", texts)
    data = prepared(tmp_path, source)
    assert all_texts(data) == sorted(texts) and data.meta["split"] == "file"
    assert f"{source}: 61 stories; one story per file (--split changes this)" in capsys.readouterr().out
    write(tmp_path / "tales" / "large.txt", "x" * sources.SMALL)
    assert len(all_texts(prepared(tmp_path, source))) == 2 * 61 + 1  # one file is not small: blank lines
    out = capsys.readouterr().out
    assert "tales has changed" in out and "123 stories; stories end at blank lines" in out


@pytest.mark.parametrize(
    "texts, split, expected",
    [
        (["a\n\nb", "c\n\nd"], None, "file"),
        (["a\n\nb"], None, "blank"),  # a single file
        (["a\n\nb", f"c\n{EOT}\nd\n\ne"], None, "auto"),
        ([f"a\n{EOT}\nb", f"c\n{EOT}\nd\n\ne"], None, EOT),
        (["a\n\nb", "c\n\nd"], "blank", "blank"),
        (["a\n\nb", f"c\n{EOT}\nd"], "file", "file"),
        (["a\n* *\nb", "c\n\nd"], "* *", "* *"),
    ],
)
def test_split_rules(tmp_path, texts, split, expected):
    source = folder_of_texts(tmp_path / "tales", texts)
    data = prepared(tmp_path, source, split=split)
    ends = {"file": r"$^", "blank": r"\n\n", EOT: rf"\n{re.escape(EOT)}\n", "* *": r"\n\* \*\n"}
    ends["auto"] = ends[EOT]
    parts = [re.split(ends["blank" if expected == "auto" and EOT not in t else expected], t) for t in texts]
    assert all_texts(data) == sorted(story for part in parts for story in part)
    assert data.meta["split"] == expected


def test_changed_split_rebuilds_the_data(tmp_path, capsys):
    source = folder_of_texts(tmp_path / "tales", [f"{text}\n---\n\nend" for text in stories(9)])
    assert len(all_texts(prepared(tmp_path, source))) == 9
    capsys.readouterr()
    for split, n in (("blank", 18), ("---", 18), ("file", 9)):
        assert len(all_texts(prepared(tmp_path, None, split=split))) == n  # source from the earlier data
        assert f"not {split}" in capsys.readouterr().out
    prepared(tmp_path, source)
    prepared(tmp_path, None)
    assert capsys.readouterr().out.count("is ready") == 2
    prepared(tmp_path, None, split="blank")
    assert len(all_texts(prepared(tmp_path, None, "bpe300"))) == 18  # the split rule of the earlier data
    assert len(all_texts(prepared(tmp_path, source))) == 9  # the default rule again


def test_invalid_splits(tmp_path, monkeypatch, capsys):
    text, jsonl = txt(tmp_path / "a.txt", stories(9)), write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    for name, source, split, message in (
        ("mine", text, "###", "no line of .*a.txt is '###': --split takes file, blank or a separator line"),
        ("mine", text, " ", "--split takes file, blank or a separator line"),
        ("mine", jsonl, "file", "--split is for .txt files, and .*a.jsonl has none"),
        ("mine", "someone/Stories", "file", "--split is for .txt files"),
        ("toystories", None, "file", "--source and --split do not apply"),
    ):
        argv = ["--source", source] if source else []
        status, err = run(monkeypatch, capsys, tmp_path, name, *argv, f"--split={split}")
        assert status == 2 and re.search(message, err) and err.count("\n") == 1, err


def test_formats_are_equivalent(tmp_path):
    texts = stories(50)
    jsonl = "".join(json.dumps({"id": 1, "text": t}) + "\n" for t in texts)
    sources = {
        "txt": txt(tmp_path / "a.txt", texts),
        "jsonl": write(tmp_path / "a.jsonl", jsonl + "\n"),
        "parquet": parquet(tmp_path / "a.parquet", texts),
        "folder": os.path.dirname(txt(tmp_path / "f" / "a.txt", texts[:20])),
        "parquets": os.path.dirname(parquet(tmp_path / "g" / "a.parquet", texts[:30])),
    }
    write(tmp_path / "f" / "deeper" / "b.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts[20:]))
    parquet(tmp_path / "g" / "b.parquet", texts[30:])
    for kind, source in sources.items():
        data = prepared(tmp_path, source, corpus=kind)
        assert all_texts(data) == sorted(texts), kind


@pytest.mark.parametrize("kind", ["txt", "parquet"])
def test_validation_split_of_the_source_is_used(tmp_path, kind):
    train, val = stories(40), stories(5, seed=1)
    write_file = txt if kind == "txt" else parquet
    write_file(tmp_path / "s" / f"train.{kind}", [*train[:20], val[2], *train[20:], val[2], val[4]])
    write_file(tmp_path / "s" / f"validation.{kind}", val)
    data = prepared(tmp_path, str(tmp_path / "s"))
    assert texts_of(data, "train") == train and texts_of(data, "val") == val
    assert data.meta["dropped_in_val"] == 3 and data.meta["limit"] is None
    few = prepared(tmp_path, str(tmp_path / "s"), corpus="few", stories=25)
    assert texts_of(few, "train") == train[:25] and texts_of(few, "val") == val
    assert few.meta["limit"] == 25 and few.meta["dropped_in_val"] == 1


def test_tinystories_quotes_are_repaired_and_empty_stories_dropped(tmp_path):
    quotes = "“Yes,” she said – ‘it’s’ „so‚ — …"
    broken = "".join(c if ord(c) < 128 else c.encode().decode("cp1252", "ignore") for c in quotes)
    assert broken.startswith("â€œYes,â€ she")
    latin1 = quotes.encode().decode("latin-1")
    intact = 'It cost 5 € in the château, "â" she said. “Good.”'
    unrepaired = "".join(c.encode().decode("cp1252") for c in "“’")  # another corpus is not repaired
    parquet(
        tmp_path / "s" / "data" / "train-00000-of-00001.parquet",
        [broken, "", latin1, intact, " \n", None, "â€\x9d", unrepaired + " ok"],
    )
    parquet(tmp_path / "s" / "data" / "validation-00000-of-00001.parquet", ["val â€™"])
    data = prepared(tmp_path, str(tmp_path / "s"), corpus="tinystories")
    assert texts_of(data, "train") == [quotes, quotes, intact, "”", "“’ ok"]
    assert texts_of(data, "val") == ["val ’"]
    assert data.meta["dropped_empty"] == 3 and data.meta["repaired_marks"] == 10 + 10 + 1 + 2 + 1
    other = prepared(tmp_path, str(tmp_path / "s"), corpus="other")
    assert unrepaired + " ok" in texts_of(other, "train") and other.meta["repaired_marks"] == 0


@pytest.mark.skipif(not TINYSTORIES.is_dir(), reason="needs real stories in ../shared/tinystories")
def test_real_tinystories(tmp_path):
    data = prepared(tmp_path, str(TINYSTORIES), "bpe4096", corpus="tinystories")
    assert (data.meta["train"]["stories"], data.meta["val"]["stories"]) == (7690, 500)
    assert (data.meta["train"]["bytes"], data.meta["val"]["bytes"]) == (6_483_214, 421_398)
    assert data.tokenizer.vocab_size == 4096 and 3.8 < 6_483_214 / len(data.train) < 4.1
    rows = pq.read_table(TINYSTORIES / "data" / "validation-00000-of-00001.parquet")["text"].to_pylist()
    assert texts_of(data, "val") == rows


# ------------------------------------------------------------------------------------------------------------
# Repeated, killed and concurrent calls


def test_data_are_rebuilt_only_if_the_request_or_source_changes(tmp_path, capsys):
    source = txt(tmp_path / "mine.txt", stories(400))
    first = prepared(tmp_path, source, stories=100)
    assert first.meta["limit"] == 100 and len(all_texts(first)) == 100
    stamp = os.stat(first.folder / "meta.json").st_mtime_ns

    def unchanged():
        return os.stat(first.folder / "meta.json").st_mtime_ns == stamp

    for request in ({"stories": 100}, {"stories": 7}, {"stories": 50, "source": None}):
        prepared(tmp_path, **{"source": source, **request})
        assert unchanged() and "is ready" in capsys.readouterr().out
    more = prepared(tmp_path, source, stories=101)
    assert not unchanged() and "has the first 100 stories, not 101" in capsys.readouterr().out
    assert len(all_texts(more)) == 101
    everything = prepared(tmp_path, source)
    assert everything.meta["limit"] is None and len(all_texts(everything)) == 400
    assert prepared(tmp_path, source, stories=10_000).meta["limit"] is None
    assert "is ready" in capsys.readouterr().out  # it already has all stories
    time.sleep(0.01)
    txt(tmp_path / "mine.txt", stories(401))
    assert len(all_texts(prepared(tmp_path, source))) == 401
    assert "mine.txt has changed" in capsys.readouterr().out
    assert len(all_texts(prepared(tmp_path, txt(tmp_path / "other.txt", stories(30))))) == 30
    assert leftovers(tmp_path) == []


def test_limit_is_none_when_all_stories_are_used(tmp_path):
    source = txt(tmp_path / "mine.txt", stories(50))
    assert prepared(tmp_path, source, stories=50).meta["limit"] is None
    assert prepared(tmp_path, source, corpus="less", stories=49).meta["limit"] == 49


def test_killed_prepare_leaves_no_data_and_is_repeated(tmp_path):
    source = txt(tmp_path / "mine.txt", stories(3000))
    killed = (
        "import os, signal, prepare\n"
        "from nanostlm import data\n"
        "data.BATCH, write = 5000, data.Bin.write\n"
        "def fatal(bin, *args):\n"
        "    write(bin, *args)\n"
        "    bin.file.flush()\n"
        "    if bin.stories > 1000: os.kill(os.getpid(), signal.SIGKILL)\n"
        "data.Bin.write = fatal\n"
        f"prepare.prepare('mine', 'byte', {source!r}, data_dir={str(tmp_path / 'data')!r})"
    )
    assert subprocess.run([sys.executable, "-c", killed], cwd=ROOT, capture_output=True).returncode == -9
    assert not (tmp_path / "data" / "mine" / "byte").exists()
    assert list((tmp_path / "data").rglob("train.bin"))  # in the temporary folder
    with pytest.raises(ValueError, match="python prepare.py mine --tokenizer byte"):
        load_data(tmp_path / "data" / "mine" / "byte")
    assert len(all_texts(prepared(tmp_path, source))) == 3000
    assert os.listdir(tmp_path / "data") == ["mine"]  # leftovers of the killed process are removed
    assert os.listdir(tmp_path / "data" / "mine") == ["byte"]


def test_failure_keeps_the_old_data(tmp_path, monkeypatch):
    source = txt(tmp_path / "mine.txt", stories(300))
    old = all_texts(prepared(tmp_path, source, stories=40))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Bin, "write", full)
    with pytest.raises(OSError, match="No space left"):
        prepared(tmp_path, source)
    assert all_texts(load_data(tmp_path / "data" / "mine" / "byte")) == old
    assert os.listdir(tmp_path / "data" / "mine") == ["byte"]


def test_concurrent_prepares(tmp_path):
    source = txt(tmp_path / "mine.txt", stories(4000))
    command = [
        sys.executable,
        "prepare.py",
        "mine",
        "--tokenizer",
        "bpe300",
        "--source",
        source,
        "--data_dir",
        str(tmp_path / "data"),
    ]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [p.communicate(timeout=60)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert sum("is ready" in out for out in outputs) == 1  # one process made the data
    data = load_data(tmp_path / "data" / "mine" / "bpe300")
    assert len(all_texts(data)) == 4000 and os.listdir(tmp_path / "data" / "mine") == ["bpe300"]
    assert os.listdir(tmp_path / "data") == ["mine"]


def test_prepare_waits_for_the_lock(tmp_path, capsys):
    source = txt(tmp_path / "mine.txt", stories(100))
    acquired, released = threading.Event(), []

    def hold_lock():
        with FileLock(tmp_path / "data" / ".mine.lock"):
            acquired.set()
            time.sleep(0.5)
            released.append(not (tmp_path / "data" / "mine" / "byte").exists())

    threading.Thread(target=hold_lock).start()
    acquired.wait()
    assert len(all_texts(prepared(tmp_path, source))) == 100 and released == [True]
    assert "waiting for another prepare.py" in capsys.readouterr().out
    assert os.listdir(tmp_path / "data") == ["mine"]


def test_data_dir_without_locks(tmp_path, monkeypatch, capsys):
    """As on a file system without locks: existing data are used, missing data are made without a lock."""
    source = txt(tmp_path / "mine.txt", stories(100))

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    assert len(all_texts(prepared(tmp_path, source))) == 100
    prepared(tmp_path, source)
    assert "is ready" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory usage from /proc")
def test_peak_memory_does_not_grow_with_the_corpus(tmp_path):
    code = (
        "import prepare, sys\n"
        "prepare.prepare('x', 'bpe1000', sys.argv[1], data_dir=sys.argv[2])\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    peak = []
    for i, n in enumerate((20, 60)):  # 38 and 114 MB, both larger than SAMPLE
        for kind in ("txt", "parquet"):
            (txt if kind == "txt" else parquet)(tmp_path / f"{i}.{kind}", stories(20_000) * n)
            argv = [sys.executable, "-c", code, str(tmp_path / f"{i}.{kind}"), str(tmp_path / f"{i}{kind}")]
            result = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
            peak.append(int(result.stdout.split()[-1]) / 1024)
    assert max(peak) < 600 and peak[2] < peak[0] + 60 and peak[3] < peak[1] + 60, peak


# ------------------------------------------------------------------------------------------------------------
# load_data() raises for damaged data, with the command that makes them again


def edit(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


def file_pages() -> int:
    """Bytes of memory-mapped files that count as memory of this process."""
    return 1024 * int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_large_files_are_checked_in_blocks_that_do_not_stay_in_memory(corpus, tmp_path):
    folder = tmp_path / "mini" / "byte"
    shutil.copytree(corpus / "mini" / "byte", folder)
    small, times = load_data(folder).train, 6000
    np.tile(small, times).tofile(folder / "train.bin")  # 30 MB, 15 blocks
    meta = json.loads((folder / "meta.json").read_text())
    meta["train"] = {key: n * times for key, n in meta["train"].items()}
    (folder / "meta.json").write_text(json.dumps(meta))
    before = file_pages()
    data = load_data(folder)
    assert len(data.train) * 2 > 28e6 and file_pages() - before < 8e6
    assert sum(len(block) for block in memorization.blocks(data, 1 << 18, "")) == len(data.train)
    assert file_pages() - before < 8e6
    edit(folder / "train.bin", lambda b: b"\x2c\x01" + b[2:])
    with pytest.raises(ValueError, match="train.bin has an id 300"):
        load_data(folder)


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda f: edit(f / "train.bin", lambda b: b[:-1]), "train.bin has [0-9,]+ bytes, not"),
        (lambda f: edit(f / "val.bin", lambda b: b[:-2]), "val.bin has [0-9,]+ bytes, not"),
        (lambda f: edit(f / "val.bin", lambda b: b + b"ab"), "val.bin has [0-9,]+ bytes, not"),
        (lambda f: edit(f / "train.bin", lambda b: b"\x2c\x01" + b[2:]), "train.bin has an id 300"),
        (lambda f: edit(f / "train.bin", lambda b: b[:-2] + b"ab"), "train.bin has an id 25,185"),
        (lambda f: (f / "val.bin").unlink(), "val.bin has 0 bytes"),
        (lambda f: (f / "meta.json").unlink(), "meta.json: there is no such file"),
        (lambda f: (f / "meta.json").write_text("{"), "meta.json: Expecting"),
        (lambda f: (f / "meta.json").write_text("{}"), "meta.json: corpus is missing"),
        (lambda f: (f / "meta.json").write_text("[]"), "meta.json: the content must be an object"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: there is no such file"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: model is missing"),
        (
            lambda f: tokenizers.train_bpe(["other text"], 260).save(f / "tokenizer.json"),
            "was prepared with a different",
        ),
    ],
)
def test_load_data_raises_for_damaged_data(tmp_path, damage, message):
    source = txt(tmp_path / "mine.txt", stories(30))
    folder = prepared(tmp_path, source, "bpe300").folder
    damage(folder)
    with pytest.raises(ValueError, match=message) as excinfo:
        load_data(folder)
    assert "\n" not in str(excinfo.value)
    option = re.escape(f"--data_dir {tmp_path / 'data'}")
    assert re.search(f"python prepare.py mine --tokenizer bpe300 --source PATH {option}", str(excinfo.value))
    assert all_texts(prepared(tmp_path, source, "bpe300")) == sorted(stories(30))  # prepare() repairs it


# ------------------------------------------------------------------------------------------------------------
# The command line: one-line errors, exit status 2 (user error) or 1 (system error), no files left


def run(monkeypatch, capsys, tmp_path, *args) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args), "--data_dir", str(tmp_path / "data")])
    status = prepare.main()
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("x.txt", "", "too few stories"),
        ("x.txt", "\n \n\n", "too few stories"),
        ("x.txt", "only one story", "too few stories"),
        ("x.txt", "the same\n\nthe same\n\nthe same", "too few stories"),
        ("x.txt", b"caf\xe9 au lait\n\nand more", "x.txt is not UTF-8 text"),
        ("x.jsonl", b'{"text": "caf\xe9"}\n', "x.jsonl is not UTF-8 text"),
        ("x.jsonl", '{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("x.jsonl", '{"text": "a"}\n{"story": "b"}\n', 'line 2: no field "text"'),
        ("x.jsonl", '{"text": 0}\n', 'line 1: no field "text" that holds a string'),
        ("x.jsonl", "[1]\n", 'line 1: no field "text"'),
        ("x.jsonl", '{"text": "\\ud83d"}\n', "line 1: a lone surrogate"),
        ("x.parquet", "no parquet", "x.parquet is not a Parquet file"),
        ("x.csv", "text\na\n", "x.csv.*[.]txt, .jsonl, .parquet"),
        ("folder/x.csv", "text\na\n", "folder holds no .txt, .jsonl, .parquet file"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["byte", "bpe300"])
def test_invalid_sources(tmp_path, monkeypatch, capsys, name, content, message, tokenizer):
    write(tmp_path / name, content)
    source = tmp_path / name.split("/")[0]
    status, err = run(monkeypatch, capsys, tmp_path, "mine", "--source", source, "--tokenizer", tokenizer)
    assert status == 2 and re.search(message, err), err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert not (tmp_path / "data" / "mine").exists()


def test_invalid_parquet(tmp_path, monkeypatch, capsys):
    for i, (texts, field) in enumerate([(["a", "b"], "story"), ([1, 2], "text")]):
        source = parquet(tmp_path / f"{i}.parquet", texts, field)
        status, err = run(monkeypatch, capsys, tmp_path, "mine", "--source", source)
        assert status == 2 and 'no field "text" of strings' in err


@pytest.mark.parametrize(
    "args,message",
    [
        (["mine"], "--source PATH"),
        (["mine", "--source", "nowhere.txt"], "nowhere.txt: no such file"),
        (["mine", "--source", "../no/where"], "no such file"),
        (["mine.txt"], "python prepare.py NAME --source mine.txt"),
        (["../mine", "--source", "x.txt"], "not a valid corpus name"),
        (["toystories", "--source", "x.txt"], "--source and --split do not apply"),
        (["toystories", "--stories", "0"], "must be between 1 and"),
        (["toystories", "--workers", "-1"], "must be between 1 and"),
        (["toystories", "--tokenizer", "bpe200"], "257"),
        (["toystories", "--tokenizer", "llama"], "gpt2, byte and bpeN"),
    ],
)
def test_invalid_arguments(tmp_path, monkeypatch, capsys, args, message):
    status, err = run(monkeypatch, capsys, tmp_path, *args)
    assert status == 2 and message in err and err.count("\n") == 1
    assert not list((tmp_path / "data").rglob("*"))


def test_story_longer_than_the_limit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "MAX_STORY", 10_000)
    source = write(tmp_path / "x.txt", "a line\n" * 5000)
    status, err = run(monkeypatch, capsys, tmp_path, "mine", "--source", source)
    assert status == 2 and "blank lines" in err


def test_length_limit_is_per_story(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_STORY", 1000)
    texts = stories(100)
    assert sum(map(len, texts)) > 5000
    assert all_texts(prepared(tmp_path, txt(tmp_path / "x.txt", texts))) == sorted(texts)


def test_exit_status_of_system_errors_and_ctrl_c(tmp_path, monkeypatch, capsys):
    source = txt(tmp_path / "x.txt", stories(9))
    for error, status in ((OSError(28, "full"), 1), (RuntimeError("broken"), 1), (KeyboardInterrupt, 130)):

        def fail(*args, error=error):
            raise error

        monkeypatch.setattr(Bin, "write", fail)
        assert run(monkeypatch, capsys, tmp_path, "mine", "--source", source)[0] == status
        assert not (tmp_path / "data" / "mine").exists()


# ------------------------------------------------------------------------------------------------------------
# The source of earlier data


def test_source_of_earlier_data_is_reused(tmp_path, monkeypatch, capsys):
    texts = stories(60)
    txt(tmp_path / "mine.txt", texts)
    monkeypatch.chdir(tmp_path)
    prepared(tmp_path, "mine.txt")
    monkeypatch.chdir("/")
    data = prepared(tmp_path, None, "bpe300")
    assert all_texts(data) == sorted(texts) and data.meta["source"] == str(tmp_path / "mine.txt")
    assert (
        f"is prepared with byte, not with bpe300: reading {tmp_path / 'mine.txt'} again"
        in capsys.readouterr().out
    )
    (data.folder / "train.bin").unlink()
    assert all_texts(prepared(tmp_path, None, "bpe300")) == sorted(texts)  # also to rebuild the same folder


def test_local_copy_of_a_hub_dataset_is_reused(tmp_path):
    parquet(tmp_path / "s" / "train-00000-of-00001.parquet", stories(30))
    prepared(tmp_path, str(tmp_path / "s"), corpus="tinystories")
    assert all_texts(prepared(tmp_path, None, "bpe300", corpus="tinystories")) == sorted(stories(30))


def test_missing_source_of_earlier_data(tmp_path, monkeypatch, capsys):
    source = Path(txt(tmp_path / "mine.txt", stories(60)))
    folder = prepared(tmp_path, source).folder
    source.unlink()
    status, err = run(monkeypatch, capsys, tmp_path, "mine", "--tokenizer", "bpe300")
    assert status == 2
    assert f"is prepared with byte, not with bpe300, and its source {source} no longer exists" in err
    assert "python prepare.py mine --source PATH --tokenizer bpe300" in err
    with pytest.raises(ValueError, match="not with this model's tokenizer.* exists: add --source=PATH"):
        prepared(tmp_path, None, "bpe300-12345678", given=tokenizers.train_bpe(stories(60), 300))
    (folder / "train.bin").unlink()
    status, err = run(monkeypatch, capsys, tmp_path, "mine", "--tokenizer", "byte")
    assert status == 2 and "'mine' must be rebuilt, and its source" in err


# ------------------------------------------------------------------------------------------------------------
# The Hub


def cli(*args, **env):
    env = {k: v for k, v in os.environ.items() if not re.match("HF_|(?i:https?_proxy|all_proxy)", k)} | env
    command, start = [sys.executable, "prepare.py", *map(str, args)], time.monotonic()
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr, time.monotonic() - start


@pytest.mark.parametrize("kind", ["refused", "silent", "offline"])
def test_unreachable_hub(tmp_path, kind):
    """Fails within seconds, not after the library's timeout of minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections and never answers
        port = server.getsockname()[1]
        if kind == "refused":
            server.close()
        offline = {"HF_HUB_OFFLINE": "1"} if kind == "offline" else {}
        env = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{port}", **offline}
        status, _, err, seconds = cli("tinystories", "--data_dir", tmp_path / "data", **env)
    assert status == 1 and seconds < 30 and err.startswith("error: ") and err.count("\n") == 1
    assert all(way in err for way in ("--source", "python prepare.py toystories", "HF_ENDPOINT"))
    assert not list((tmp_path / "data").rglob("*"))


def test_training_falls_back_to_another_corpus(tmp_path, capsys):
    """With the same number of stories as requested of the unreachable one."""
    toystories_corpus = sources.CORPORA["toystories"]
    kwargs = dict(source="", stories=40, data_dir=tmp_path / "data", given=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setitem(sources.CORPORA, "toystories", replace(toystories_corpus, stories=60))
        with pytest.raises(tokenizers.Unreachable):
            prepare.prepare_missing("tinystories", "byte", fallback="", **kwargs)
        corpus = prepare.prepare_missing("tinystories", "byte", fallback="toystories", **kwargs)
    assert corpus == "toystories"
    meta = load_data(tmp_path / "data" / "toystories" / "byte").meta
    assert meta["train"]["stories"] + meta["val"]["stories"] == 40
    assert "TRAINING ON TOYSTORIES INSTEAD" in capsys.readouterr().err


def test_unreachable_is_an_oserror():
    assert issubclass(tokenizers.Unreachable, OSError) and tokenizers.Unreachable is tokenizers.Unreachable


class Hub(BaseHTTPRequestHandler):
    """A server with the part of the Hub's API that `datasets` uses: one dataset of `files` {path: bytes}."""

    files, name, sha, requests = {}, "someone/MyStories", "a" * 40, []

    def log_message(self, *args):
        pass

    def listed(self, paths):
        return [
            {"type": "file", "path": p, "size": len(self.files[p]), "oid": p}
            for p in paths
            if p in self.files
        ]

    def reply(self, body, status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in ({"Content-Length": len(body), "X-Repo-Commit": self.sha} | headers).items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        self.requests.append((self.command, path))
        if path.startswith(f"/datasets/{self.name}/resolve/"):
            name = path.removeprefix(f"/datasets/{self.name}/resolve/").split("/", 1)[1]
            if name not in self.files:
                return self.reply({}, 404, X_Error_Code="EntryNotFound")
            body, headers = self.files[name], {"ETag": f'"{name}"', "Accept_Ranges": "bytes"}
            wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not wanted:
                return self.reply(body, **headers)
            start, end = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
            headers["Content_Range"] = f"bytes {start}-{end}/{len(body)}"
            return self.reply(body[start : end + 1], 206, **headers)
        if path.startswith(f"/api/datasets/{self.name}/tree/"):
            inside = path.removeprefix(f"/api/datasets/{self.name}/tree/").partition("/")[2]
            folder = [{"type": "directory", "path": "data", "size": 0, "oid": "d"}]
            return self.reply(self.listed(self.files) if inside else folder)
        if path.startswith(f"/api/datasets/{self.name}"):
            return self.reply({"id": self.name, "sha": self.sha, "tags": [], "siblings": []})
        self.reply({}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        self.reply(self.listed(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]))


def test_hub_dataset(tmp_path):
    """A part of the stories is streamed; all of them are downloaded once, and read without network later."""
    train, val = stories(200), stories(20, seed=1)
    for name, texts in (("train", train), ("validation", val)):
        path = parquet(tmp_path / "x.parquet", texts)
        Hub.files[f"data/{name}-00000-of-00001.parquet"] = Path(path).read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
    args = ["mine", "--source", Hub.name, "--tokenizer", "byte", "--data_dir", tmp_path / "data"]
    folder = tmp_path / "data" / "mine" / "byte"
    try:
        status, _, err, _ = cli(*args, "--stories", 50, **hub)
        assert status == 0, err
        data = load_data(folder)
        assert texts_of(data, "train") == train[:50] and texts_of(data, "val") == val
        assert data.meta["limit"] == 50 and data.meta["source"] == Hub.name
        assert not list((tmp_path / "home").rglob("*.arrow"))
        status, _, err, _ = cli(*args, **hub)
        assert status == 0, err
        assert texts_of(load_data(folder), "train") == train
        status, _, err, _ = cli("other", "--source", "no/such", "--data_dir", tmp_path / "data", **hub)
        assert status == 2 and "no/such is neither a file, a folder, nor a dataset on the Hub" in err
    finally:
        server.shutdown()
    args[-1] = tmp_path / "again"
    for n, offline in ((60, {}), (70, {"HF_HUB_OFFLINE": "1"})):  # from the cache: the server is gone
        status, _, err, seconds = cli(*args, "--stories", n, **hub, **offline)
        assert status == 0, err
        assert texts_of(load_data(tmp_path / "again" / "mine" / "byte"), "train") == train[:n]
