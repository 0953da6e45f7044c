"""
The time of each part of a training step, and lower bounds for the step on this machine.

    python bench/profile_step.py [--recipe config/tiny.py] [--compile] [-- --batch_size=12 ...]

The parts of Trainer.train_step are timed where it calls them: data, forward, backward, optimizer; the rest is
clipping and schedules. The head with its loss and the attention of all layers are also timed in isolation,
forward and backward. The lower bounds are FLOPs (6 per weight, 12 x layers x context x width for attention)
over the measured rate of matrix products in the training dtype, and bytes over the measured rate of copying:
weights read twice, gradients written and read, optimizer states read and written, in float32, and activations
written and read in the training dtype, roughly counted.
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
def timed_parts(trainer: train.Trainer, watch: Stopwatch):
    """Inside, the parts of the trainer's steps are timed with `watch`."""
    original = trainer.micro_batches, trainer.parallel, trainer.update, torch.Tensor.backward
    batches = watch.timed("data", lambda step: list(original[0](step)))
    trainer.micro_batches, trainer.parallel = batches, watch.timed("forward", trainer.forward)
    trainer.update = watch.timed("optimizer", original[2])
    torch.Tensor.backward = watch.timed("backward", original[3])
    try:
        yield
    finally:
        trainer.micro_batches, trainer.parallel, trainer.update, torch.Tensor.backward = original


def isolated(trainer: train.Trainer, repeats: int) -> dict[str, float]:
    """Seconds of forward and backward of the head with its loss, and of all attention layers, each alone."""
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
    measured = common.in_turn(sides, repeats + 1)  # the first is a warmup
    model.zero_grad(set_to_none=True)
    return common.medians({name: values[1:] for name, values in measured.items()})


def lower_bounds(trainer: train.Trainer, matrix: int, copied: int) -> dict[str, float]:
    """The minimum time of a step by FLOPs and by bytes, at the measured rates of this machine."""
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
    add("--matrix", type=int, default=2048, help="side of the matrices that measure the rate; 8192 for a GPU")
    add("--copied", type=int, default=1 << 28, help="bytes of the copy that measures the rate")
    add("ours", nargs="*", help="after --: further settings, as for train.py")
    options = common.parse(parser, argv)
    data = common.load_data(options)
    overrides = settings.command_line(train.TrainConfig, options.ours, {}, "")[2]
    changes = {"compile": str(options.compile)} | overrides
    trainer = common.trainer(options.recipe, data, **changes)
    trainer.compile()
    watch, steps = Stopwatch(trainer.machine.device.type), []
    for step in range(3):
        trainer.train_step(step)
    with timed_parts(trainer, watch):
        for step in range(options.repeats):
            watch.parts = {}
            watch.timed("whole step", trainer.train_step)(step + 3)
            steps.append(watch.parts)
    parts = {name: statistics.median(times[name] for times in steps) for name in steps[0]}
    whole = parts.pop("whole step")
    parts["rest"] = whole - sum(parts.values())
    alone = isolated(trainer, options.repeats)
    bounds = lower_bounds(trainer, options.matrix, options.copied)
    rows = [["whole step", whole, whole], *([name, s, whole] for name, s in parts.items())]
    rows += [[f"alone: {name}", s, whole] for name, s in alone.items()]
    rows += [[f"lower bound by {name}", s, whole] for name, s in bounds.items()]
    common.table(["part", "ms", "of the step"], [[name, s * 1000, f"{s / of:.1%}"] for name, s, of in rows])
    print(
        f"{trainer.tokens_per_step:,} tokens a step, {trainer.tokens_per_step / whole:,.0f} tokens/s; "
        f"{trainer.machine.description}"
    )
    common.finish(
        "profile_step",
        recipe=Path(options.recipe).name,
        settings=overrides,
        seconds=whole,
        parts=parts,
        alone=alone,
        floor=bounds,
        tokens=trainer.tokens_per_step,
    )


if __name__ == "__main__":
    main()
