"""
One step of Muon on the matrices of config/tiny.py's blocks: torch.optim.Muon against ours, which steps all
matrices of the same shape at once.

    python bench/muon.py [--threads 2]

Ten steps per measurement; alternating, medians of `--repeats`. Prints a table and JSON.
"""

from functools import partial

import common
import torch

from nanostlm import optim

SHAPES = [(384, 128), (128, 128), (704, 128), (128, 352)] * 4  # qkv, proj, fc and proj of four layers
OPTIMIZERS = {"torch": partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"), "ours": optim.Muon}


def ten_steps(optimizer: torch.optim.Optimizer) -> None:
    for _ in range(10):
        optimizer.step()


def main(argv: list[str] | None = None) -> None:
    options, sides = common.parse(common.parser(__doc__, repeats=9), argv), {}
    for name, make in OPTIMIZERS.items():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in SHAPES]
        for p in params:
            p.grad = torch.randn_like(p)
        step = partial(ten_steps, make(params, lr=0.0))
        sides[name] = partial(common.seconds, step)
    common.in_turn(sides, 1)  # warmup
    medians = common.medians(common.in_turn(sides, options.repeats))
    ms = {name: 100 * seconds for name, seconds in medians.items()}
    common.table(["torch ms", "ours ms", "times"], [[ms["torch"], ms["ours"], ms["torch"] / ms["ours"]]])
    common.finish("muon", ms=ms)


if __name__ == "__main__":
    main()
