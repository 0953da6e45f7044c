"""
Tokens a second of generation: with the cache, and with the whole window anew for each token as in nanoGPT.

    python bench/generation.py [--streams 1 16] [--dtype float32] [--threads 2]

Random weights (the speed does not depend on them); 6 layers, 384 wide, context 512, 4,096 ids unless told
otherwise. Each figure is the median of `--repeats` runs in turn; prints a table and one line of JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402


def cached(model: GPT, streams: int, tokens: int) -> float:
    """Tokens a second of `streams` rows together, prompts of one token, all samplers off."""
    prompts = [[i + 1] for i in range(streams)]
    began = time.perf_counter()
    made = sample.generate(model, prompts, tokens, eot=model.config.vocab_size - 1)
    return sum(map(len, made)) / (time.perf_counter() - began)


@torch.inference_mode()
def rerun(model: GPT, tokens: int) -> float:
    """Tokens a second of one row when a full window is run again for each token."""
    ids = torch.randint(model.config.vocab_size, (1, model.config.block_size))
    began = time.perf_counter()
    for _ in range(tokens):
        logits = model(ids)[0][:, -1]
        ids = torch.cat((ids[:, 1:], torch.multinomial(logits.softmax(dim=-1), 1)), dim=1)
    return tokens / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=0, help="0: PyTorch's own choice")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n_layer", type=int, default=6)
    parser.add_argument("--n_embd", type=int, default=384)
    parser.add_argument("--block_size", type=int, default=512)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = dict(n_layer=options.n_layer, n_head=6, n_embd=options.n_embd, block_size=options.block_size)
    model = GPT(GPTConfig(vocab_size=4096, **shape)).to(getattr(torch, options.dtype)).eval()
    plain = GPT(model.config).to(getattr(torch, options.dtype)).eval()
    sample.lay_out(model)
    rates: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        rates.setdefault("whole window for each token", []).append(rerun(plain, 20))
        for streams in options.streams:
            name = f"cached, {streams} stream{'s' if streams > 1 else ''}"
            rates.setdefault(name, []).append(cached(model, streams, options.tokens))
    found = {name: statistics.median(values) for name, values in rates.items()}
    base = found["whole window for each token"]
    for name, rate in found.items():
        spread = f"{min(rates[name]):,.1f} to {max(rates[name]):,.1f}"
        print(f"{name:30} {rate:9,.1f} tokens/s ({spread})  {rate / base:6.1f} times")
    print(json.dumps({"bench": "generation", **shape, "dtype": options.dtype, "torch": torch.__version__,
                      "threads": torch.get_num_threads(), "tokens_per_s": found}))  # fmt: skip


if __name__ == "__main__":
    main()
