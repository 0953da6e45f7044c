"""
Causal attention on a CPU, forward and backward: PyTorch's fused kernel against model.BlockAttention.

    python bench/attention.py [--threads 2]

12 rows, heads with a total width of 128; alternating calls, medians of `--repeats`. Prints a table and JSON.
"""

from itertools import product

import common
import torch
import torch.nn.functional as F

from model import BlockAttention


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def blocks(q, k, v):
    return BlockAttention.apply(q, k, v, None)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, repeats=9)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    options, rows = common.parse(parser, argv), []
    for dtype, length, heads in product(options.dtype, options.lengths, (4, 2, 1)):
        shape = (12, heads, length, 128 // heads)
        inputs = [torch.randn(shape, dtype=getattr(torch, dtype), requires_grad=True) for _ in "qkv"]

        def side(attend, inputs=inputs):
            return lambda: common.seconds(lambda: attend(*inputs).backward(inputs[0].detach()))

        sides = {"fused": side(fused), "blocks": side(blocks)}
        common.in_turn(sides, 1)  # warmup
        medians = common.medians(common.in_turn(sides, options.repeats))
        ms = {name: 1000 * seconds for name, seconds in medians.items()}
        speedup = ms["fused"] / ms["blocks"]
        rows.append({"dtype": dtype, "length": length, "heads": heads, **ms, "times": speedup})
    common.table(
        ["dtype", "length", "heads", "fused ms", "blocks ms", "times"], [list(row.values()) for row in rows]
    )
    common.finish("attention", rows=rows)


if __name__ == "__main__":
    main()
