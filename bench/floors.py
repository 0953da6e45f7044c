"""
Estimates, not measurements: the time and memory of each recipe on one GPU.

    python bench/floors.py [--share 0.4] [--data_dir data]

For each recipe and card: FLOPs per token (6 per weight of a matrix, 12 x layers x context x width for
attention), tokens/s at --share of the card's peak, hours per epoch of TinyStories, lower bounds of the time
of a step by FLOPs at peak compute and by bytes at peak memory bandwidth, and the memory: weights, gradients
and two optimizer states in float32, and roughly 14 x width + 3 x hidden activations per token and layer in
bf16. An epoch is the 2,119,719 stories of the training split, about 1.92 GB of text (470M GPT-2 tokens);
bytes per token come from a prepared dataset, or else from 7,690 of the stories. Peaks are as published by
NVIDIA, without sparsity.
"""

import json
from dataclasses import replace
from pathlib import Path

import common

import train
from nanostlm import settings
from nanostlm import tokenizer as tokenizers

CARDS = {"H100 SXM 80 GB": common.CARDS["H100 80GB HBM3"], "RTX 4090 24 GB": common.CARDS["RTX 4090"]}
STORIES, BYTES = 2_119_719, 1.92e9
BYTES_PER_TOKEN = {"gpt2": 4.062, "bpe4096": 3.974, "bpe8192": 4.114}  # end-of-text: a byte and a token


def tokens_per_epoch(data_dir: str, tokenizer: str) -> float:
    """The number of tokens in the training split of TinyStories."""
    meta = Path(data_dir, "tinystories", tokenizer, "meta.json")
    if meta.exists():
        train_split = json.loads(meta.read_text(encoding="utf-8"))["train"]
        size = (train_split["bytes"] + train_split["stories"]) / train_split["tokens"]
    else:
        size = BYTES_PER_TOKEN.get(tokenizer, 4.0)
    return (BYTES + STORIES) / size


def estimate(c: train.TrainConfig) -> dict[str, float]:
    """FLOPs, bytes moved and memory of a recipe's step, for any card."""
    ids = tokenizers.bpe_size(c.tokenizer) or {"gpt2": 50257, "byte": 257}[c.tokenizer]
    model = replace(c.model, vocab_size=ids)
    counts = model.estimate()
    count = counts["parameters"]
    tokens = c.batch_size * c.gradient_accumulation_steps * model.block_size
    return {
        "parameters": count,
        "flops_a_token": counts["flops_per_token"],
        "tokens_a_step": tokens,
        # float32 weights read twice, gradients written and read, 7 numbers per weight in AdamW; activations
        # written and read
        "bytes_a_step": (8 * c.gradient_accumulation_steps + 8 + 28) * count
        + 4 * tokens * counts["activations_per_token"],
        "memory": model.memory(c.batch_size * model.block_size, 2),
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, repeats=0)
    parser.add_argument("--share", type=float, default=0.4, help="share of the peak; default %(default)s")
    parser.add_argument("--data_dir", default="data", help="prepared data, for the bytes per token")
    options = common.parse(parser, argv)
    rows, results = [], []
    for file in sorted((common.ROOT / "config").glob("*.py")):
        values = settings.read_recipe(file, train.TrainConfig) if file.stem != "__init__" else {}
        if not values or "init_from" in values:  # finetune.py has the size of the model it starts from
            continue
        c = settings.build(train.TrainConfig, values)
        estimated = estimate(c) | {"tokens_a_pass": tokens_per_epoch(options.data_dir, c.tokenizer)}
        for name, (peak, rate) in CARDS.items():
            speed = options.share * peak * 1e12 / estimated["flops_a_token"]
            bounds = {
                "operations": estimated["tokens_a_step"] * estimated["flops_a_token"] / peak / 1e12,
                "bytes": estimated["bytes_a_step"] / rate / 1e12,
            }
            hours = estimated["tokens_a_pass"] / speed / 3600
            rows.append(
                [
                    file.stem,
                    name,
                    f"{estimated['parameters'] / 1e6:.1f}M",
                    estimated["flops_a_token"] / 1e6,
                    f"{speed / 1e6:.2f}M",
                    f"{hours:.2g}",
                    bounds["operations"] * 1000,
                    bounds["bytes"] * 1000,
                    estimated["memory"] / 2**30,
                ]
            )
            results.append(
                {
                    "recipe": file.stem,
                    "card": name,
                    "tokens_per_s": speed,
                    "hours_a_pass": hours,
                    "step_s": bounds,
                }
                | estimated
            )
    print(f"ESTIMATED, NOT MEASURED: tokens/s at {options.share:.0%} of the peak, epochs of TinyStories")
    common.table(
        [
            "recipe",
            "card",
            "parameters",
            "MFLOP per token",
            "tokens/s",
            "hours per epoch",
            "ms per step by FLOPs",
            "by bytes",
            "GB of memory",
        ],
        rows,
    )
    common.finish("floors", measured=False, share=options.share, cards=CARDS, recipes=results)


if __name__ == "__main__":
    main()
