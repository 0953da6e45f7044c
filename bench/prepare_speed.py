"""
The speed and the peak memory of prepare.py.

    python bench/prepare_speed.py [--text PATH] [--mb 50] [--nanogpt]      # TIKTOKEN_CACHE_DIR helps offline
    python bench/prepare_speed.py --sizes 10 100 2000                      # memory, up to 2 GB of text

On the same stories (from --text or the built-in corpus, repeated up to --mb), for bpe4096 and gpt2:
tiktoken's encode_ordinary_batch with as many threads; prepare() from text file to .bin files with a given
tokenizer; the whole command, which also starts Python and trains bpe4096 on the first 32 MB; and, with
--nanogpt, the method of nanoGPT's data/openwebtext/prepare.py: `datasets` maps encode_ordinary over single
stories in processes, then 1,024 shards are concatenated into a memory map. Then the peak resident memory of
the whole command at each of --sizes. Takes about ten minutes, and ten more for 2 GB.
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
    for output in (folder / "text" / tokenizer).iterdir():  # so that the next run prepares it again
        output.unlink()
    return ran


def pipeline(file: Path, folder: Path, tokenizer: tokenizers.Tokenizer, workers: int) -> None:
    given = tokenizer if tokenizers.bpe_size(tokenizer.name) else None
    with contextlib.redirect_stdout(io.StringIO()):
        output = prepare.prepare("text", tokenizer.name, str(file), None, workers, folder, given)
    (output / "meta.json").unlink()


def by_map(
    texts: list[str], folder: Path, tokenizer: tokenizers.Tokenizer, processes: int
) -> Callable[[], float]:
    """nanoGPT's preparation of the same stories, without the download and its conversion."""
    import datasets

    datasets.disable_progress_bars()
    corpus = datasets.Dataset.from_dict({"text": texts})
    corpus.to_parquet(folder / "stories.parquet")
    corpus = datasets.load_dataset(
        "parquet", data_files=str(folder / "stories.parquet"), split="train", cache_dir=str(folder / "cache")
    )
    encoding, eot = tokenizer.tiktoken, tokenizer.eot

    def encode_row(row: dict) -> dict:
        ids = [*encoding.encode_ordinary(row["text"]), eot]
        return {"ids": ids, "count": len(ids)}

    def prepare_with_map() -> None:
        mapped = corpus.map(
            encode_row, remove_columns=["text"], num_proc=processes, load_from_cache_file=False
        )
        out = np.memmap(folder / "mapped.bin", np.uint16, "w+", shape=(sum(mapped["count"]),))
        shards, at = min(1024, len(mapped)), 0
        for i in range(shards):
            rows = mapped.shard(shards, i, contiguous=True).with_format("numpy")["ids"]
            joined = np.concatenate(list(rows))
            out[at : at + len(joined)] = joined
            at += len(joined)
        out.flush()

    return lambda: common.seconds(prepare_with_map)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    add = parser.add_argument
    add("--text", help=".txt, .jsonl, .parquet or a folder of them; else stories of the built-in corpus")
    add("--mb", type=float, default=50, help="MB of text to measure the speed on")
    add("--tokenizers", nargs="+", default=["bpe4096", "gpt2"])
    add("--workers", type=int, default=common.cpus(), help="threads, and processes of `datasets`")
    add("--nanogpt", action="store_true", help="also nanoGPT's method; needs no checkout")
    add("--sizes", type=float, nargs="*", default=[10, 100], help="MB of text to measure the memory on")
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
    for (tokenizer, method), rate in rates.items():
        rows.append([tokenizer, method, rate, rate / rates[tokenizer, "tiktoken, encode_ordinary_batch"]])
    common.table(["tokenizer", "method", "MB/s", "ratio to tiktoken"], rows)
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
    rates = {}
    for name in options.tokenizers:
        bpe_size = tokenizers.bpe_size(name)
        tokenizer = tokenizers.train_bpe(texts, bpe_size) if bpe_size else tokenizers.get(name)
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
            sides["nanoGPT's method, datasets.map"] = by_map(texts, folder, tokenizer, options.workers)
        sides["tiktoken, encode_ordinary_batch"]()  # builds its tables
        medians = common.medians(common.in_turn(sides, options.repeats))
        rates |= {(name, method): size / MB / seconds for method, seconds in medians.items()}
    return rates, size


if __name__ == "__main__":
    main()
