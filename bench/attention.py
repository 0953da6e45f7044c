"""
Causal attention on a CPU in bf16, forward and backward: PyTorch's fused kernel against model.short_attention.

    python bench/attention.py [--threads 2]

12 rows, 128 wide in all; the two in turn, medians of `--repeats` calls; prints a table and one line of JSON.
"""

import common
import torch
import torch.nn.functional as F

from model import short_attention


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, repeats=9)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024])
    options, rows = common.parse(parser, argv), []
    for length in options.lengths:
        for heads in (4, 2, 1):
            shape = (12, heads, length, 128 // heads)
            inputs = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]

            def side(attend, inputs=inputs):
                return lambda: common.seconds(lambda: attend(*inputs).backward(inputs[0].detach()))

            sides = {"fused": side(fused), "short": side(short_attention)}
            common.in_turn(sides, 1)  # warms up
            ms = {
                name: 1000 * s for name, s in common.medians(common.in_turn(sides, options.repeats)).items()
            }
            rows.append({"length": length, "heads": heads, **ms, "times": ms["fused"] / ms["short"]})
    common.table(["length", "heads", "fused ms", "short ms", "times"], [list(row.values()) for row in rows])
    common.finish("attention", rows=rows)


if __name__ == "__main__":
    main()
