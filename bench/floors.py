"""
COMPUTED, never measured: the least time of a step of every recipe on one GPU, and the share of that limit
that a step should reach.

    python bench/floors.py [--products 0.7] [--copies 0.8] [--launch_us 5] [--data_dir data]

The limit by FLOPs: 6 a weight in a product and 12 x layers x context x width for attention, at the full peak
of the card. The limit by bytes, at its full memory rate: float32 weights read twice per micro-batch,
gradients written and read, 7 numbers per weight for AdamW, and what a token leaves behind in each layer
written and read in bf16, 14 x width + 3 x hidden numbers, a rough count. The limit of a step is the larger.

The share follows from three assumptions, which the options set: matrix products reach --products of the peak
and copies --copies of the memory rate, one after the other; and a step takes at least --launch_us for each
kernel, 25 a layer and 40 for the rest in each micro-batch and 50 for the optimizer, if it is compiled. A step
of `bench/gpu.py` far below this share is worth a look; one above it refutes the assumptions.

Hours are for one pass over TinyStories at that share: 2,119,719 stories, about 1.92 GB of text (470M of
GPT-2's tokens), divided by the bytes a token of a prepared data set, else by those that the tokenizers had on
7,690 of its stories. GB held are weights, gradients and two states of the optimizer, and a micro-batch's
activations. Peaks are those that NVIDIA prints, without sparsity.
"""

import json
from pathlib import Path

import common

import train

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
    """Operations, bytes moved, kernels and memory of a step of a recipe, on any card."""
    model, micro_batches = c.model, c.gradient_accumulation_steps
    counts = model.estimate()
    count = counts["parameters"]
    tokens = c.batch_size * micro_batches * model.block_size
    return {
        "parameters": count,
        "flops_a_token": counts["flops_per_token"],
        "tokens_a_step": tokens,
        # float32 weights read twice, gradients written and read, 7 numbers per weight in AdamW; activations
        # written and read
        "bytes_a_step": (8 * micro_batches + 8 + 28) * count + 4 * tokens * counts["activations_per_token"],
        "kernels_a_step": micro_batches * (25 * model.n_layer + 40) + 50,
        "memory": model.memory(c.batch_size * model.block_size, 2),
    }


def on_card(made: dict[str, float], peak: float, rate: float, options) -> dict[str, float]:
    """Limits of a step in seconds, and the share of the larger one that follows from the assumptions."""
    flops = made["tokens_a_step"] * made["flops_a_token"] / peak / 1e12
    moved = made["bytes_a_step"] / rate / 1e12
    busy = flops / options.products + moved / options.copies
    step = max(busy, made["kernels_a_step"] * options.launch_us / 1e6)
    return {
        "limit_by_flops_s": flops,
        "limit_by_bytes_s": moved,
        "limit_tokens_per_s": made["tokens_a_step"] / max(flops, moved),
        "share": max(flops, moved) / step,
        "mfu": flops / step,
        "tokens_per_s": made["tokens_a_step"] / step,
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, repeats=0)
    add = parser.add_argument
    add("--products", type=float, default=0.7, help="share of the peak, assumed; default %(default)s")
    add("--copies", type=float, default=0.8, help="share of the memory rate, assumed; default %(default)s")
    add("--launch_us", type=float, default=5, help="microseconds a kernel, assumed; default %(default)s")
    add("--data_dir", default="data", help="where prepared data give the bytes a token")
    options = common.parse(parser, argv)
    rows, found = [], []
    for recipe, c in common.recipes().items():
        made = on_paper(c) | {"tokens_a_pass": tokens_of_a_pass(options.data_dir, c.tokenizer)}
        for name, (peak, rate) in CARDS.items():
            card = on_card(made, peak, rate, options)
            card["hours_a_pass"] = made["tokens_a_pass"] / card["tokens_per_s"] / 3600
            by_flops, by_bytes = card["limit_by_flops_s"], card["limit_by_bytes_s"]
            speeds = [f"{card[key] / 1e6:.2f}M" for key in ("limit_tokens_per_s", "tokens_per_s")]
            rows.append([recipe, name, f"{made['parameters'] / 1e6:.1f}M", made["flops_a_token"] / 1e6])
            rows[-1] += [by_flops * 1000, by_bytes * 1000, "FLOPs" if by_flops > by_bytes else "bytes"]
            rows[-1] += [speeds[0], f"{card['share']:.0%}", speeds[1], f"{card['mfu']:.0%}"]
            rows[-1] += [f"{card['hours_a_pass']:.2g}", made["memory"] / 2**30]
            found.append({"recipe": recipe, "card": name} | card | made)
    assumed = {name: getattr(options, name) for name in ("products", "copies", "launch_us")}
    print(
        f"COMPUTED, NOT MEASURED. Limits: full peak, full memory rate. Shares: if products reach "
        f"{options.products:.0%},\ncopies {options.copies:.0%}, and a kernel takes {options.launch_us:g} us"
    )
    head = ["recipe", "card", "parameters", "MFLOP a token", "ms a step by FLOPs", "by bytes", "limit"]
    head += ["tokens/s at the limit", "share to reach", "tokens/s at it", "share of the peak"]
    common.table([*head, "hours a pass", "GB held"], rows)
    common.finish("floors", measured=False, assumed=assumed, cards=CARDS, recipes=found)


if __name__ == "__main__":
    main()
