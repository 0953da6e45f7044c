"""
Causal attention on a CPU in bf16, forward and backward: PyTorch's fused kernel against model.short_attention.

    python bench/attention.py [--threads 2]

12 rows, 128 wide in all; the two in turn, medians of `--repeats` calls; prints a table and one line of JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import short_attention  # noqa: E402


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def seconds(attend, inputs) -> float:
    began = time.perf_counter()
    attend(*inputs).backward(inputs[0].detach())
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's own choice")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for length in (128, 256, 512, 1024):
        for heads in (4, 2, 1):
            shape = (12, heads, length, 128 // heads)
            inputs = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]
            times = {"fused": [], "short": []}
            for _ in range(options.repeats + 1):  # the first one warms up
                times["fused"].append(seconds(fused, inputs))
                times["short"].append(seconds(short_attention, inputs))
            ms = {name: 1000 * statistics.median(values[1:]) for name, values in times.items()}
            rows.append({"length": length, "heads": heads, **ms})
            both = f"fused {ms['fused']:7.1f} ms  short {ms['short']:7.1f} ms"
            print(
                f"length {length:5}  heads {heads}  {both}  {ms['fused'] / ms['short']:.2f} times", flush=True
            )
    threads = torch.get_num_threads()
    print(json.dumps({"bench": "attention", "torch": torch.__version__, "threads": threads, "rows": rows}))


if __name__ == "__main__":
    main()
