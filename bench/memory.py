"""
Peak memory of training at GPT-2's 50,257 ids: our train.py against nanoGPT's.

    python bench/memory.py --nanogpt PATH [--recipe config/tiny.py] [-- --optimizer=adamw ...]

Each runs in its own process: 4 layers, 128 wide, context 256, 12 rows per batch, a few updates, one batch of
evaluation. Measured is peak resident memory, not GPU memory; ours includes the final samples. Arguments after
-- are passed to our train.py. Takes about two minutes.
"""

import tempfile
from pathlib import Path

import common

SHAPE = dict(n_layer=4, n_embd=128, block_size=256, batch_size=12)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    common.nanogpt_option(parser)
    common.data_options(parser, tokenizer="gpt2")
    add = parser.add_argument
    add("--recipe", default=str(common.ROOT / "config" / "tiny.py"))
    add("--steps", type=int, default=5)
    add("--nanogpt_heads", type=int, default=4, help="default %(default)s; ours come from the recipe")
    add("--batch_size", type=int, default=12)
    add("ours", nargs="*", help="after --: further settings of our train.py")
    options = common.parse(parser, argv)
    data = common.load_data(options)
    shape, steps = SHAPE | dict(batch_size=options.batch_size), options.steps
    sizes = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)

        def ours() -> float:
            intervals = dict(max_iters=steps, eval_interval=steps, save_interval=steps, fallback="")
            intervals |= dict(eval_tokens=shape["block_size"] * shape["batch_size"])
            command = common.ours(options.recipe, data, folder / "ours", **shape, **intervals)
            ran = common.run([*command, *options.ours, "--overwrite"])
            sizes["ours"] = ran.find(r"([\d.]+M) parameters")[1][1]
            return ran.peak_mb

        def nanogpt() -> float:
            changes = dict(n_head=options.nanogpt_heads, max_iters=steps, eval_interval=10**6, out_dir="out")
            ran = common.run(common.nanogpt_train(**shape, **changes), peer)
            sizes["nanoGPT"] = ran.find(r"number of parameters: (.*)")[1][1]
            return ran.peak_mb

        sides = {"ours": ours}
        if options.nanogpt:
            peer = common.nanogpt(options.nanogpt, folder / "nanogpt", data)
            sides["nanoGPT"] = nanogpt
        measured = common.in_turn(sides, options.repeats)
    peaks = common.medians(measured)
    base = peaks.get("nanoGPT")
    rows = [[name, sizes[name], peak, base and peak / base] for name, peak in peaks.items()]
    common.table(["side", "parameters", "peak MB", "of nanoGPT's"], rows)
    common.finish(
        "memory",
        ids=data.tokenizer.vocab_size,
        shape=shape,
        peak_mb=peaks,
        parameters=sizes,
        ours_settings=options.ours,
        of_nanogpt=base and peaks["ours"] / base,
    )


if __name__ == "__main__":
    main()
