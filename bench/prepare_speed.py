"""
How fast prepare.py turns text into ids, and how much memory that takes.

    python bench/prepare_speed.py [--text PATH] [--mb 50] [--nanogpt]      # TIKTOKEN_CACHE_DIR helps offline
    python bench/prepare_speed.py --sizes 10 100 2000                      # memory, up to 2 GB of text

Over the same stories (of --text, else of the built-in corpus; repeated up to --mb), for bpe4096 and gpt2:
tiktoken's encode_ordinary_batch with as many threads; prepare() from text file to .bin files, its tokenizer
given; the whole command, which also starts Python and trains bpe4096 on the first 32 MB; and, with
--nanogpt, the way that nanoGPT prepares a corpus (data/openwebtext/prepare.py): `datasets` maps
encode_ordinary over single stories in processes, then 1,024 shards are joined into a memory map. Then the
peak of resident memory of the whole command at each of --sizes. About ten minutes; 2 GB take as many more.
"""

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import common
import numpy as np

import prepare
from nanostlm import sources
from nanostlm import tokenizer as tokenizers

MB = 1_000_000


def stories(text: str | None) -> Iterator[str]:
    """The stories of a file or directory, repeated; by default, those of the built-in corpus."""
    if text is None:
        return sources.corpus("toystories").generate()
    return (
        story for _ in itertools.count() for story in sources.find("text", text, None)["train"]() if story
    )


def take(text: str | None, size: float) -> Iterator[str]:
    """Stories with about `size` bytes in all."""
    for story in stories(text):
        yield story
        size -= len(story.encode()) + 2
        if size <= 0:
            return


def write(file: Path, texts: Iterator[str]) -> Path:
    """Write a text file with end-of-text lines."""
    with open(file, "w", encoding="utf-8") as out:
        for text in texts:
            out.write(f"{text}\n{tokenizers.EOT}\n")
    return file


def command(file: Path, folder: Path, tokenizer: str, workers: int) -> common.Ran:
    settings = dict(source=file, tokenizer=tokenizer, workers=workers, data_dir=folder)
    ran = common.run([sys.executable, common.ROOT / "prepare.py", "text", *common.words(settings)])
    for made in (folder / "text" / tokenizer).iterdir():  # so that the next run prepares it again
        made.unlink()
    return ran


def pipeline(file: Path, folder: Path, tokenizer: tokenizers.Tokenizer, workers: int) -> None:
    given = tokenizer if tokenizers.bpe_size(tokenizer.name) else None
    with contextlib.redirect_stdout(io.StringIO()):
        made = prepare.prepare("text", tokenizer.name, str(file), None, workers, folder, given)
    (made / "meta.json").unlink()


def by_map(
    texts: list[str], folder: Path, tokenizer: tokenizers.Tokenizer, processes: int
) -> Callable[[], float]:
    """nanoGPT's preparation of the same stories, without the one-time part of a download."""
    import datasets

    datasets.disable_progress_bars()
    corpus = datasets.Dataset.from_dict({"text": texts})
    corpus.to_parquet(folder / "stories.parquet")
    corpus = datasets.load_dataset(
        "parquet", data_files=str(folder / "stories.parquet"), split="train", cache_dir=str(folder / "cache")
    )
    encoding, eot = tokenizer.tiktoken, tokenizer.eot

    def one(row: dict) -> dict:
        ids = [*encoding.encode_ordinary(row["text"]), eot]
        return {"ids": ids, "count": len(ids)}

    def way() -> None:
        mapped = corpus.map(one, remove_columns=["text"], num_proc=processes, load_from_cache_file=False)
        out = np.memmap(folder / "mapped.bin", np.uint16, "w+", shape=(sum(mapped["count"]),))
        shards, at = min(1024, len(mapped)), 0
        for i in range(shards):
            rows = mapped.shard(shards, i, contiguous=True).with_format("numpy")["ids"]
            joined = np.concatenate(list(rows))
            out[at : at + len(joined)] = joined
            at += len(joined)
        out.flush()

    return lambda: common.seconds(way)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--text", help=".txt, .jsonl, .parquet or a folder of them; else stories of the built-in corpus")
    add("--mb", type=float, default=50, help="text to measure the speed with, in MB")
    add("--tokenizers", nargs="+", default=["bpe4096", "gpt2"])
    add("--workers", type=int, default=common.cpus(), help="threads, and processes of `datasets`")
    add("--nanogpt", action="store_true", help="also nanoGPT's way; needs no checkout")
    add("--sizes", type=float, nargs="*", default=[10, 100], help="MB of text to measure the memory with")
    options = common.parse(parser, argv)
    rates, peaks, size = {}, {}, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rates, size = speeds(options, folder)
        for mb in options.sizes:
            file = write(folder / "large.txt", take(options.text, mb * MB))
            peaks |= {
                f"{mb:g} MB, {name}": command(file, folder, name, options.workers).peak_mb
                for name in options.tokenizers
            }
    rows = []
    for (tokenizer, way), rate in rates.items():
        rows.append([tokenizer, way, rate, rate / rates[tokenizer, "tiktoken, encode_ordinary_batch"]])
    common.table(["tokenizer", "way", "MB/s", "times tiktoken"], rows)
    print()
    common.table(["text, tokenizer", "peak MB of prepare.py"], [list(pair) for pair in peaks.items()])
    common.finish(
        "prepare_speed",
        workers=options.workers,
        text_mb=size / MB,
        peak_mb=peaks,
        mb_per_s={" / ".join(key): rate for key, rate in rates.items()},
    )


def speeds(options: argparse.Namespace, folder: Path) -> tuple[dict[tuple[str, str], float], int]:
    """MB/s of each side with each tokenizer, and the size of the text in bytes."""
    texts = list(take(options.text, options.mb * MB))
    file, size = write(folder / "text.txt", iter(texts)), sum(len(text.encode()) for text in texts)
    took = {}
    for name in options.tokenizers:
        trained = tokenizers.bpe_size(name)
        tokenizer = tokenizers.train_bpe(texts, trained) if trained else tokenizers.get(name)
        sides = {
            "tiktoken, encode_ordinary_batch": lambda t=tokenizer: common.seconds(
                lambda: t.tiktoken.encode_ordinary_batch(texts, num_threads=options.workers)
            ),
            "prepare(), tokenizer given": lambda t=tokenizer: common.seconds(
                lambda: pipeline(file, folder, t, options.workers)
            ),
            "prepare.py, the whole command": lambda n=name: command(file, folder, n, options.workers).seconds,
        }
        if options.nanogpt:
            sides["nanoGPT's way, datasets.map"] = by_map(texts, folder, tokenizer, options.workers)
        sides["tiktoken, encode_ordinary_batch"]()  # builds its tables
        found = common.medians(common.in_turn(sides, options.repeats))
        took |= {(name, way): size / MB / seconds for way, seconds in found.items()}
    return took, size


if __name__ == "__main__":
    main()
