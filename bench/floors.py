"""
COMPUTED, not measured: lower bounds of the time of a training step of each recipe on one GPU, and the share
of that limit that a step should reach.

    python bench/floors.py [--products 0.7] [--copies 0.8] [--launch_us 5] [--data_dir data]

The limit by FLOPs: 6 per weight of a matrix and 12 x layers x context x width for attention, at peak compute.
The limit by bytes, at peak memory bandwidth: float32 weights read twice per micro-batch, gradients written
and read, 7 numbers per weight for AdamW, and the activations of each token and layer written and read in
bf16, roughly 14 x width + 3 x hidden numbers. The limit of a step is the larger of the two times.

The share follows from three assumptions, set by options: matrix products reach --products of the peak and
copies reach --copies of the memory bandwidth, one after the other; and a step takes at least --launch_us per
kernel, with 25 kernels per layer and 40 others in each micro-batch and 50 for the optimizer, if compiled. A
step of `bench/gpu.py` far below this share should be investigated; a step above it refutes the assumptions.

Hours are for one epoch of TinyStories at that share: the 2,119,719 stories of the training split, about
1.92 GB of text (470M GPT-2 tokens); bytes per token come from a prepared dataset, or else from 7,690 of the
stories. Memory is weights, gradients and two optimizer states, and the activations of a micro-batch. Peaks
are as published by NVIDIA, without sparsity.
"""

import json
from pathlib import Path

import common

import train

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
    """FLOPs, bytes moved, kernels and memory of a recipe's step, for any card."""
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


def on_card(estimated: dict[str, float], peak: float, rate: float, options) -> dict[str, float]:
    """Limits of a step in seconds, and the share of the larger one that the assumptions imply."""
    flops = estimated["tokens_a_step"] * estimated["flops_a_token"] / peak / 1e12
    moved = estimated["bytes_a_step"] / rate / 1e12
    busy = flops / options.products + moved / options.copies
    step = max(busy, estimated["kernels_a_step"] * options.launch_us / 1e6)
    return {
        "limit_by_flops_s": flops,
        "limit_by_bytes_s": moved,
        "limit_tokens_per_s": estimated["tokens_a_step"] / max(flops, moved),
        "share": max(flops, moved) / step,
        "mfu": flops / step,
        "tokens_per_s": estimated["tokens_a_step"] / step,
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, repeats=0)
    add = parser.add_argument
    add("--products", type=float, default=0.7, help="assumed share of the peak; default %(default)s")
    add("--copies", type=float, default=0.8, help="assumed share of the bandwidth; default %(default)s")
    add("--launch_us", type=float, default=5, help="assumed microseconds per kernel; default %(default)s")
    add("--data_dir", default="data", help="prepared data, for the bytes per token")
    options = common.parse(parser, argv)
    rows, results = [], []
    for recipe, c in common.recipes().items():
        estimated = estimate(c) | {"tokens_a_pass": tokens_per_epoch(options.data_dir, c.tokenizer)}
        for name, (peak, rate) in CARDS.items():
            card = on_card(estimated, peak, rate, options)
            card["hours_a_pass"] = estimated["tokens_a_pass"] / card["tokens_per_s"] / 3600
            by_flops, by_bytes = card["limit_by_flops_s"], card["limit_by_bytes_s"]
            speeds = [f"{card[key] / 1e6:.2f}M" for key in ("limit_tokens_per_s", "tokens_per_s")]
            rows.append(
                [recipe, name, f"{estimated['parameters'] / 1e6:.1f}M", estimated["flops_a_token"] / 1e6]
            )
            rows[-1] += [by_flops * 1000, by_bytes * 1000, "FLOPs" if by_flops > by_bytes else "bytes"]
            rows[-1] += [speeds[0], f"{card['share']:.0%}", speeds[1], f"{card['mfu']:.0%}"]
            rows[-1] += [f"{card['hours_a_pass']:.2g}", estimated["memory"] / 2**30]
            results.append({"recipe": recipe, "card": name} | card | estimated)
    assumed = {name: getattr(options, name) for name in ("products", "copies", "launch_us")}
    print(
        f"COMPUTED, NOT MEASURED. Limits: peak compute, peak memory bandwidth. Shares: if products reach "
        f"{options.products:.0%},\ncopies {options.copies:.0%}, and a kernel takes {options.launch_us:g} us"
    )
    head = ["recipe", "card", "parameters", "MFLOP per token", "ms per step by FLOPs", "by bytes", "limit"]
    head += ["tokens/s at the limit", "share to reach", "tokens/s at that share", "share of the peak"]
    common.table([*head, "hours per epoch", "GB of memory"], rows)
    common.finish("floors", measured=False, assumed=assumed, cards=CARDS, recipes=results)


if __name__ == "__main__":
    main()
