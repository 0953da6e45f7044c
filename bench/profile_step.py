"""
Where a training step's time goes, and the least that it could take on this machine.

    python bench/profile_step.py [--recipe config/tiny.py] [--compile] [-- --batch_size=12 ...]

The parts of Trainer.train_step, measured where it calls them: data, forward, backward, the optimizers; the
rest is what is left (clipping, schedules). Then the head with its loss, and the attention of all layers,
alone, forward and backward. The floor: operations (6 a weight, 12 x layers x context x width for attention)
over the measured rate of bf16 or float32 matrix products, and bytes over the measured rate of copying:
weights read twice, gradients written and read, AdamW's or Muon's states read and written, in float32, and
the numbers that a token leaves behind in a layer written and read in the products' precision: a rough count.
"""

import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch

import train
from model import attn_inputs
from nanostlm import settings


class Stopwatch:
    """Seconds of each part of a step."""

    def __init__(self, device: str):
        self.parts: dict[str, float] = {}
        self.device = device

    def timed(self, name: str, call: Callable) -> Callable:
        """Wrap a function so that its time is added to a part."""

        def wrapped(*arguments, **keywords):
            before = self.now()
            try:
                return call(*arguments, **keywords)
            finally:
                self.parts[name] = self.parts.get(name, 0.0) + self.now() - before

        return wrapped

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


@contextlib.contextmanager
def watched(trainer: train.Trainer, watch: Stopwatch):
    """Inside, the parts of the trainer's steps are timed."""
    plain = trainer.micro_batches, trainer.parallel, trainer.update, torch.Tensor.backward
    batches = watch.timed("data", lambda step: list(plain[0](step)))
    trainer.micro_batches, trainer.parallel = batches, watch.timed("forward", trainer.forward)
    trainer.update = watch.timed("optimizer", plain[2])
    torch.Tensor.backward = watch.timed("backward", plain[3])
    try:
        yield
    finally:
        trainer.micro_batches, trainer.parallel, trainer.update, torch.Tensor.backward = plain


def apart(trainer: train.Trainer, repeats: int) -> dict[str, float]:
    """Seconds of the head with its loss, and of all attention layers, each forward and backward alone."""
    model, machine = trainer.model, trainer.machine
    idx, targets = next(iter(trainer.micro_batches(0)))
    attn = attn_inputs(model.config, idx)[1]
    x = torch.randn(*idx.shape, model.config.n_embd, device=machine.device, requires_grad=True)

    def head() -> None:
        with machine.autocast():
            loss = model.head.loss(x, targets)[1]
        loss.backward()

    def attention() -> None:
        with machine.autocast():
            y = sum(block.attn(x, attn) for block in model.core.blocks)
        y.sum().backward()

    parts = {"head and loss": head, "attention, all layers": attention}
    sides = {name: lambda call=call: common.seconds(call) for name, call in parts.items()}
    found = common.in_turn(sides, repeats + 1)  # the first is a warmup
    model.zero_grad(set_to_none=True)
    return common.medians({name: values[1:] for name, values in found.items()})


def floor(trainer: train.Trainer, matrix: int, copied: int) -> dict[str, float]:
    """The minimum time of a step by operations and by bytes, at the rates of this machine."""
    c, machine = trainer.config.model, trainer.machine
    device, tokens = machine.device.type, trainer.tokens_per_step
    rate = common.matrix_rate(matrix, matrix, matrix, machine.dtype, device)
    count = c.estimate()
    moved = (8 + 8 + 28) * count["parameters"]
    moved += 2 * machine.dtype.itemsize * tokens * count["activations_per_token"]
    return {
        "operations": count["flops_per_token"] * tokens / rate,
        "bytes": moved / common.memory_rate(device, copied),
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, repeats=10)
    common.data_options(parser)
    add = parser.add_argument
    add("--recipe", default=str(common.ROOT / "config" / "tiny.py"))
    add("--compile", action="store_true")
    add("--matrix", type=int, default=2048, help="side of the matrices of the rate; 8192 for a GPU")
    add("--copied", type=int, default=1 << 28, help="bytes of the copy of the rate")
    add("ours", nargs="*", help="after --: further settings, as of train.py")
    options = common.parse(parser, argv)
    data = common.load_data(options)
    given = settings.command_line(train.TrainConfig, options.ours, {}, "")[2]
    changes = {"compile": str(options.compile)} | given
    trainer = common.trainer(options.recipe, data, **changes)
    trainer.compile()
    watch, steps = Stopwatch(trainer.machine.device.type), []
    for step in range(3):
        trainer.train_step(step)
    with watched(trainer, watch):
        for step in range(options.repeats):
            watch.parts = {}
            watch.timed("whole step", trainer.train_step)(step + 3)
            steps.append(watch.parts)
    parts = {name: statistics.median(one[name] for one in steps) for name in steps[0]}
    whole = parts.pop("whole step")
    parts["rest"] = whole - sum(parts.values())
    alone, least = apart(trainer, options.repeats), floor(trainer, options.matrix, options.copied)
    rows = [["whole step", whole, whole], *([name, s, whole] for name, s in parts.items())]
    rows += [[f"alone: {name}", s, whole] for name, s in alone.items()]
    rows += [[f"floor by {name}", s, whole] for name, s in least.items()]
    common.table(["part", "ms", "of the step"], [[name, s * 1000, f"{s / of:.1%}"] for name, s, of in rows])
    print(
        f"{trainer.tokens_per_step:,} tokens a step, {trainer.tokens_per_step / whole:,.0f} tokens/s; "
        f"{trainer.machine.description}"
    )
    common.finish(
        "profile_step",
        recipe=Path(options.recipe).name,
        settings=given,
        seconds=whole,
        parts=parts,
        alone=alone,
        floor=least,
        tokens=trainer.tokens_per_step,
    )


if __name__ == "__main__":
    main()
