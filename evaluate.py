"""
How good is a model: bits per byte of a corpus, comparable over tokenizers; of toystories, whose entropy is
known, also the distance to that floor and the share of generated stories that the grammar accepts.

    python evaluate.py [--out_dir DIR] [--data FOLDER]    # the newest run, on the validation stories of its
    data
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch

import prepare
import sample
from nanostlm import checkpoint
from nanostlm import tokenizer as tokenizers


def token_bytes(tokenizer: "tokenizers.Tokenizer") -> np.ndarray:
    """UTF-8 bytes that each id stands for; end-of-text counts as one. (vocab_size,)"""
    count = np.array([len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)])
    count[tokenizer.eot] = 1
    return count


def windows(
    ids: np.ndarray, eot: int, block_size: int, rows: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """
    Every id once as a target, in fixed windows in fixed order, end-of-text standing before the first: batches
    (idx, targets) of (rows, block_size) int64, the last filled up with targets of -1.
    """
    span = rows * block_size
    for start in range(0, len(ids), span):
        targets = np.full(span, -1, dtype=np.int64)
        inputs = np.full(span, eot, dtype=np.int64)
        piece = ids[start : start + span]
        targets[: len(piece)] = piece
        first = max(start, 1)
        inputs[first - start : len(piece)] = ids[first - 1 : start + len(piece) - 1]
        yield tuple(torch.from_numpy(x.reshape(rows, block_size)) for x in (inputs, targets))


@torch.no_grad()
def total_nats(model, batches, device: str | torch.device = "cpu") -> tuple[float, int]:
    """
    Sum over batches (idx, targets) of the cross entropy in nats, and the number of targets.
    """
    nats, count = 0.0, 0
    for idx, targets in batches:
        idx, n = idx.to(device), int((targets != -1).sum())
        nats += n * model(idx, targets.to(device))[1].item()  # nanoGPT's model comes here too
        count += n
    return nats, count


def bits_per_byte(nats: float, size: int) -> float:
    return nats / math.log(2) / max(1, size)


def whole_stories(data: prepare.Data, block_size: int) -> list[np.ndarray]:
    """The validation stories that fit into one window, each with its end-of-text."""
    ends = np.flatnonzero(data.val == data.tokenizer.eot) + 1
    return [story for story in np.split(data.val, ends)[:-1] if 1 < len(story) <= block_size]


def story_windows(stories: list[np.ndarray], eot: int, block_size: int, rows: int):
    """Batches (idx, targets) of (rows, block_size), a window a story: end-of-text, then the whole of it."""
    for start in range(0, len(stories), rows):
        targets = np.full((rows, block_size), -1, dtype=np.int64)
        inputs = np.full((rows, block_size), eot, dtype=np.int64)
        for row, story in enumerate(stories[start : start + rows]):
            targets[row, : len(story)] = story
            inputs[row, 1 : len(story)] = story[:-1]
        yield torch.from_numpy(inputs), torch.from_numpy(targets)


def judge(model, data: prepare.Data, rows: int = 16, count: int = 100) -> list[str]:
    """A model of toystories: its distance to the floor on whole stories, and how many of its are valid."""
    from nanostlm import toystories

    eot, T, device = data.tokenizer.eot, model.config.block_size, next(model.parameters()).device
    whole = whole_stories(data, T)
    nats, _ = total_nats(model, story_windows(whole, eot, T, rows), device)
    texts = [data.tokenizer.decode(story[:-1]) for story in whole]
    size = sum(len(text.encode()) + 1 for text in texts)
    floor = bits_per_byte(-sum(toystories.check(text).logprob for text in texts), size)
    reached = bits_per_byte(nats, size)
    above = f"{reached / floor - 1:.1%} above it" if whole else "no story fits into the context"
    verdicts = [toystories.check(text) for text in sample.stories(model, data.tokenizer, "", count)]
    broken = Counter(verdict.rule for verdict in verdicts if not verdict.ok)
    rules = ", ".join(f"{n} {rule}" for rule, n in broken.most_common())
    return [
        f"on {len(whole)} whole stories: {reached:.4f} bits per byte, the floor is {floor:.4f}: {above}",
        f"{sum(v.ok for v in verdicts)} of {count} generated stories are valid"
        + (f" ({rules})" if rules else ""),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Bits per byte of a model on validation stories.")
    parser.add_argument("--out_dir", help="a run's folder or a checkpoint; default the newest run")
    parser.add_argument(
        "--data", help="a folder that prepare.py made; default the one the model was trained on"
    )
    parser.add_argument("--rows", type=int, default=16, help="windows in a batch")
    parser.add_argument("--dtype", default="float32", choices=["float32", "int8"], help="of the weights")
    options = parser.parse_args()
    try:
        path = checkpoint.find(options.out_dir or checkpoint.newest_run())
        state = checkpoint.read(path)
        model, tokenizer = checkpoint.build(state)
        trained = state["train_config"]
        data = prepare.load(
            options.data or f"{trained['data_dir']}/{trained['dataset']}/{trained['tokenizer']}"
        )
        if data.tokenizer.sha256 != tokenizer.sha256:
            raise ValueError(f"{data.folder} was made with another tokenizer than {path}")
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.dtype == "int8":
        sample.quantize(model)
    batches = windows(data.val, tokenizer.eot, model.config.block_size, options.rows)
    nats, count = total_nats(model, batches)
    size = token_bytes(tokenizer)[data.val].sum()
    print(f"{path}: {nats / count:.4f} nats a token, {bits_per_byte(nats, size):.4f} bits per byte "
          f"({count:,} tokens of {data.folder}/val.bin)")  # fmt: skip
    if data.meta["corpus"] == "toystories":
        print(*judge(model, data, options.rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
