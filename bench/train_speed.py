"""
Training throughput on nanoGPT's own architecture: our model and trainer against nanoGPT's model.py.

    python bench/train_speed.py --nanogpt PATH [--shapes 4,4,128 6,6,384] [--compile]

LayerNorm, learned positions, GELU, tied, no biases; AdamW on both sides, the same batches of real stories.
Beside tokens/s stands the share of the machine's measured matrix rate, with 6 operations a weight and
12 x layers x context x width for attention; on a GPU also the share of the peak that its maker prints. The
machine's rate is that of square matrices and of the model's own product (batch x context by width by
4 x width), the best of some. A minute or two.
"""

import contextlib
import sys
from collections.abc import Callable

import common
import torch

NANOGPT = dict(norm="layernorm", position="learned", mlp="gelu", tied=True, bias=False)


def nanogpt_step(path: str, trainer, dtype: torch.dtype, compile: bool) -> Callable[[int], None]:
    """One update of nanoGPT's model with its own optimizer, on our trainer's batches."""
    theirs, c, machine = common.nanogpt_module(path), trainer.config, trainer.machine
    shape = {name: getattr(c.model, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    config = theirs.GPTConfig(**shape, vocab_size=c.model.padded_vocab, bias=False, dropout=0.0)
    with contextlib.redirect_stdout(sys.stderr):  # it says how many parameters it has
        model = theirs.GPT(config).to(machine.device).train()
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), machine.device.type)
    called = torch.compile(model) if compile else model

    def step(number: int) -> None:
        for idx, targets in trainer.batches(number):
            with machine._replace(dtype=dtype).autocast():
                loss = called(idx, targets)[1]
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def measure(options, data, layers: int, heads: int, width: int) -> dict:
    """Tokens a second of every side at one shape, and the rates of the machine's matrix products."""
    shape = dict(n_layer=layers, n_head=heads, n_embd=width, block_size=options.block_size)
    compile = "True" if options.compile else "False"
    trainer = common.trainer("", data, batch_size=options.batch_size, compile=compile, **shape, **NANOGPT)
    bf16, fp32 = torch.bfloat16, torch.float32
    dtypes = {"ours": trainer.machine.dtype}
    steps = {"ours": trainer.train_step}
    for name, dtype in {"nanoGPT float32": fp32, "nanoGPT bf16 autocast": bf16}.items():
        if options.nanogpt:
            dtypes[name] = dtype
            steps[name] = nanogpt_step(options.nanogpt, trainer, dtype, options.compile)
    numbers = iter(range(10**9))

    def rate(step):
        took = common.seconds(lambda: [step(next(numbers)) for _ in range(options.steps)])
        return options.steps * trainer.tokens_per_step / took

    for step in steps.values():
        rate(step)  # warms up, compiles
    found = common.in_turn({name: lambda s=s: rate(s) for name, s in steps.items()}, options.repeats)
    device, rows = trainer.machine.device.type, options.batch_size * options.block_size
    square, own = [options.matrix] * 3, [rows, width, 4 * width]
    rates = {f"{kind} {str(dtype)[6:]}": common.matrix_rate(*sizes, dtype, device)
             for kind, sizes in (("square", square), ("own", own)) for dtype in (bf16, fp32)}  # fmt: skip
    return {
        "shape": shape,
        "batch_size": options.batch_size,
        "flops_per_token": trainer.model.flops_per_token(),
        "dtypes": {name: str(dtype)[6:] for name, dtype in dtypes.items()},
        "tokens_per_s": common.medians(found),
        "spread": {name: [min(values), max(values)] for name, values in found.items()},
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
    add("--steps", type=int, default=8, help="updates in a measurement")
    add("--matrix", type=int, default=2048, help="side of the square matrices; 8192 for a GPU")
    add("--compile", action="store_true", help="compile both sides' models")
    options = common.parse(parser, argv)
    data = common.load_data(options)
    shapes = [measure(options, data, *map(int, shape.split(","))) for shape in options.shapes]
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
    for made in shapes:
        base = made["tokens_per_s"].get("nanoGPT float32")
        for name, rate in made["tokens_per_s"].items():
            done, dtype = rate * made["flops_per_token"], made["dtypes"][name]
            shares = [f"{done / made['matrix_rates'][f'{kind} {dtype}']:.1%}" for kind in ("square", "own")]
            shares.append(f"{done / peak[0] / 1e12:.1%}" if peak else "unknown")
            which = f"{made['shape']['n_layer']} x {made['shape']['n_embd']}"
            rows.append([which, f"{name} ({dtype})", rate, done / 1e12, *shares, base and rate / base])
    common.table(head, rows)
    for made in shapes:
        rates = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in made["matrix_rates"].items())
        print(f"width {made['shape']['n_embd']}: GFLOP/s of matrix products: {rates}")
    common.finish("train_speed", compile=options.compile, card=peak or "unknown", shapes=shapes)


if __name__ == "__main__":
    main()
