"""
On paper, not measured: what the recipes would take on one GPU.

    python bench/floors.py [--share 0.4] [--data_dir data]

For each recipe and card: operations a token (6 a weight in a product, 12 x layers x context x width for
attention), tokens/s at --share of the card's peak, hours for one pass over TinyStories, the least time of a
step by operations at the full peak and by bytes at the full memory rate, and the memory: weights, gradients,
two states of the optimizer, in float32, and what a token leaves behind in each layer, 14 x width + 3 x hidden
numbers in bf16, as a rough count. One pass is the 2,119,719 stories of the training split, about 1.92 GB of
text (470M of GPT-2's tokens), divided by the bytes a token of a prepared data set, else by those that the
tokenizers had on 7,690 of its stories. Peaks are those that NVIDIA prints, without sparsity.
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
BYTES_A_TOKEN = {"gpt2": 4.062, "bpe4096": 3.974, "bpe8192": 4.114}  # end-of-text: a byte and a token


def tokens_of_a_pass(data_dir: str, tokenizer: str) -> float:
    """The number of tokens in the training split of TinyStories."""
    meta = Path(data_dir, "tinystories", tokenizer, "meta.json")
    if meta.exists():
        train_split = json.loads(meta.read_text(encoding="utf-8"))["train"]
        size = (train_split["bytes"] + train_split["stories"]) / train_split["tokens"]
    else:
        size = BYTES_A_TOKEN.get(tokenizer, 4.0)
    return (BYTES + STORIES) / size


def on_paper(c: train.TrainConfig) -> dict[str, float]:
    """Operations, bytes moved and memory of a step of a recipe, on any card."""
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
    parser.add_argument("--share", type=float, default=0.4, help="of the peak; default %(default)s")
    parser.add_argument("--data_dir", default="data", help="where prepared data give the bytes a token")
    options = common.parse(parser, argv)
    rows, found = [], []
    for file in sorted((common.ROOT / "config").glob("*.py")):
        values = settings.read_recipe(file, train.TrainConfig) if file.stem != "__init__" else {}
        if not values or "init_from" in values:  # finetune.py has the size of the model it starts from
            continue
        c = settings.build(train.TrainConfig, values)
        made = on_paper(c) | {"tokens_a_pass": tokens_of_a_pass(options.data_dir, c.tokenizer)}
        for name, (peak, rate) in CARDS.items():
            speed = options.share * peak * 1e12 / made["flops_a_token"]
            by = {
                "operations": made["tokens_a_step"] * made["flops_a_token"] / peak / 1e12,
                "bytes": made["bytes_a_step"] / rate / 1e12,
            }
            hours = made["tokens_a_pass"] / speed / 3600
            rows.append(
                [
                    file.stem,
                    name,
                    f"{made['parameters'] / 1e6:.1f}M",
                    made["flops_a_token"] / 1e6,
                    f"{speed / 1e6:.2f}M",
                    f"{hours:.2g}",
                    by["operations"] * 1000,
                    by["bytes"] * 1000,
                    made["memory"] / 2**30,
                ]
            )
            found.append(
                {
                    "recipe": file.stem,
                    "card": name,
                    "tokens_per_s": speed,
                    "hours_a_pass": hours,
                    "step_s": by,
                }
                | made
            )
    print(f"ON PAPER, NOT MEASURED: tokens/s at {options.share:.0%} of the peak, one pass over TinyStories")
    common.table(
        [
            "recipe",
            "card",
            "parameters",
            "MFLOP a token",
            "tokens/s",
            "hours a pass",
            "ms a step by operations",
            "by bytes",
            "GB held",
        ],
        rows,
    )
    common.finish("floors", measured=False, share=options.share, cards=CARDS, recipes=found)


if __name__ == "__main__":
    main()
