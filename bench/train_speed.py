"""
Training throughput on nanoGPT's own architecture: our model and trainer against nanoGPT's model.py.

    python bench/train_speed.py --nanogpt PATH [--shapes 4,4,128 6,6,384] [--compile]

LayerNorm, learned positions, GELU, tied embeddings, no biases; AdamW and the same batches of real stories on
both sides, each in its own process. Prints tokens/s and the share of the machine's measured rate of matrix
products, at 6 FLOPs per weight and 12 x layers x context x width for attention; on a GPU also the share of
the published peak. The rate is the best of several products of square matrices, and of matrices of the
model's shapes (batch x context by width by 4 x width). Takes a minute or two.
"""

import contextlib
import itertools
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import common
import torch

from nanostlm import machine

NANOGPT = dict(norm="layernorm", position="learned", mlp="gelu", tied=True, bias=False)
NANO32, NANO16 = "nanoGPT float32", "nanoGPT bf16 autocast"
BUILT: dict = {}  # set in the process of a side


def nanogpt_step(path: str, trainer, dtype: torch.dtype, compile: bool) -> Callable[[int], None]:
    """One update of nanoGPT's model with its own optimizer, on our trainer's batches."""
    module, c, chosen = common.nanogpt_module(path), trainer.config, trainer.machine
    shape = {name: getattr(c.model, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    config = module.GPTConfig(**shape, vocab_size=c.model.padded_vocab, bias=False, dropout=0.0)
    with contextlib.redirect_stdout(sys.stderr):  # it prints its number of parameters
        model = module.GPT(config).to(chosen.device).train()
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), chosen.device.type)
    compiled = torch.compile(model) if compile else model

    def step(number: int) -> None:
        for idx, targets in trainer.micro_batches(number):
            with chosen._replace(dtype=dtype).autocast():
                loss = compiled(idx, targets)[1]
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def build(options, shape: dict, name: str) -> None:
    """In the process of a side: build and warm up its step, with the memory settings of its own program."""
    if name != "ours":
        machine.keep_freed_memory = lambda: None
    compile = "True" if options.compile else "False"
    data = common.load_data(options)
    trainer = common.trainer("", data, batch_size=options.batch_size, compile=compile, **shape, **NANOGPT)
    trainer.compile()
    dtypes = {"ours": trainer.machine.dtype, NANO32: torch.float32, NANO16: torch.bfloat16}
    step = trainer.train_step
    if name != "ours":
        step = nanogpt_step(options.nanogpt, trainer, dtypes[name], options.compile)
    BUILT.update(step=step, tokens=trainer.tokens_per_step, numbers=itertools.count())
    BUILT["about"] = (
        str(dtypes[name])[6:],
        trainer.model.config.estimate()["flops_per_token"],
        trainer.machine.device.type,
    )
    rate(options)


def rate(options) -> float:
    """In the process of a side: tokens per second over several updates."""
    took = common.seconds(lambda: [BUILT["step"](next(BUILT["numbers"])) for _ in range(options.steps)])
    return options.steps * BUILT["tokens"] / took


def about() -> tuple[str, int, str]:
    """In the process of a side: dtype, FLOPs per token and device type."""
    return BUILT["about"]


def measure(options, layers: int, heads: int, width: int) -> dict:
    """Tokens per second of every side at one shape, and the machine's matrix multiplication rates."""
    shape = dict(n_layer=layers, n_head=heads, n_embd=width, block_size=options.block_size)
    names = ["ours", *([NANO32, NANO16] if options.nanogpt else [])]
    with contextlib.ExitStack() as stack:
        spawn = multiprocessing.get_context("spawn")
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, spawn)) for name in names}
        for name, pool in pools.items():
            pool.submit(build, options, shape, name).result()
        sides = {name: lambda p=pool: p.submit(rate, options).result() for name, pool in pools.items()}
        measured = common.in_turn(sides, options.repeats)
        abouts = {name: pool.submit(about).result() for name, pool in pools.items()}
    _, flops, device = abouts["ours"]
    rows = options.batch_size * options.block_size
    square, model_shape = [options.matrix] * 3, [rows, width, 4 * width]
    bf16, fp32 = torch.bfloat16, torch.float32
    rates = {
        f"{kind} {str(dtype)[6:]}": common.matrix_rate(*sizes, dtype, device)
        for kind, sizes in (("square", square), ("own", model_shape))
        for dtype in (bf16, fp32)
    }
    return {
        "shape": shape,
        "batch_size": options.batch_size,
        "flops_per_token": flops,
        "dtypes": {name: dtype for name, (dtype, *_) in abouts.items()},
        "tokens_per_s": common.medians(measured),
        "spread": {name: [min(values), max(values)] for name, values in measured.items()},
        "matrix_rates": rates,
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    common.nanogpt_option(parser)
    common.data_options(parser)
    add = parser.add_argument
    add("--shapes", nargs="+", default=["4,4,128", "6,6,384"], help="layers,heads,width; default %(default)s")
    add("--batch_size", type=int, default=12)
    add("--block_size", type=int, default=256)
    add("--steps", type=int, default=8, help="updates per measurement")
    add("--matrix", type=int, default=2048, help="side of the square matrices; 8192 for a GPU")
    add("--compile", action="store_true", help="compile both sides' models")
    options = common.parse(parser, argv)
    common.load_data(options)
    shapes = [measure(options, *map(int, shape.split(","))) for shape in options.shapes]
    peak = common.card(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    head = [
        "layers x width",
        "side",
        "tokens/s",
        "TFLOP/s",
        "of square",
        "of own product",
        "of the card",
        "times",
    ]
    rows = []
    for result in shapes:
        base = result["tokens_per_s"].get(NANO32)
        for name, rate in result["tokens_per_s"].items():
            flops_per_s, dtype = rate * result["flops_per_token"], result["dtypes"][name]
            shares = [
                f"{flops_per_s / result['matrix_rates'][f'{kind} {dtype}']:.1%}" for kind in ("square", "own")
            ]
            shares.append(f"{flops_per_s / peak[0] / 1e12:.1%}" if peak else "unknown")
            which = f"{result['shape']['n_layer']} x {result['shape']['n_embd']}"
            rows.append([which, f"{name} ({dtype})", rate, flops_per_s / 1e12, *shares, base and rate / base])
    common.table(head, rows)
    for result in shapes:
        rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in result["matrix_rates"].items())
        print(f"width {result['shape']['n_embd']}: GFLOP/s of matrix products: {rates}")
    common.finish("train_speed", compile=options.compile, card=peak or "unknown", shapes=shapes)


if __name__ == "__main__":
    main()
