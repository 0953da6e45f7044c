"""
The time from the start of the command to the end of the first step, on prepared data, without compilation:
ours and nanoGPT's.

    python bench/start.py --nanogpt PATH
    python bench/start.py --imports 12        # also list our slowest imports

Both evaluate before the first step, on one batch (nanoGPT: one per split), with the same layers, width,
context and rows. Takes a minute.
"""

import re
import tempfile
from pathlib import Path

import common

SHAPE = dict(n_layer=4, n_embd=128, block_size=256, batch_size=12)


def slowest_imports(command: list, count: int) -> list[list]:
    """[[module, milliseconds including its imports]], slowest first, from python -X importtime."""
    ran = common.run([command[0], "-X", "importtime", *command[1:]], until=r"^step +1 ")
    lines = [re.match(r"import time: +\d+ \| +(\d+) \|( *)(\S+)", line) for _, line in ran.lines]
    modules = {match[3]: int(match[1]) / 1000 for match in lines if match}
    return [[name, ms] for name, ms in sorted(modules.items(), key=lambda pair: -pair[1])[:count]]


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, repeats=5)
    common.nanogpt_option(parser)
    common.data_options(parser)
    add = parser.add_argument
    add("--recipe", default=str(common.ROOT / "config" / "tiny.py"))
    add("--nanogpt_heads", type=int, default=2)
    add("--imports", type=int, default=0, help="number of our slowest imports to list")
    options = common.parse(parser, argv)
    data = common.load_data(options)
    imports: list[list] = []
    marks = {"machine known, data loaded": r"^machine ", "run set up": r"^run  ", "evaluated": r"^step +0 "}
    parts: dict[str, list[float]] = {name: [] for name in marks}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        settings = SHAPE | dict(
            max_iters=100, compile=False, eval_tokens=SHAPE["block_size"] * SHAPE["batch_size"]
        )
        command = [
            *common.ours(options.recipe, data, folder / "ours", **settings, fallback=""),
            "--overwrite",
        ]

        def ours() -> float:
            ran = common.run(command, until=r"^step +1 ")
            for name, pattern in marks.items():
                parts[name].append(ran.find(pattern)[0])
            return ran.seconds

        def nanogpt() -> float:
            changes = dict(n_head=options.nanogpt_heads, eval_interval=10**6)
            return common.run(common.nanogpt_train(**SHAPE, **changes), peer, until="^iter 0:").seconds

        sides = {"ours": ours}
        if options.nanogpt:
            peer = common.nanogpt(options.nanogpt, folder / "nanogpt", data)
            sides["nanoGPT"] = nanogpt
        measured = common.in_turn(sides, options.repeats)
        if options.imports:
            imports = slowest_imports(command, options.imports)
    times, parts = common.medians(measured), common.medians(parts)
    base = times.get("nanoGPT")
    rows = [[n, t, min(measured[n]), max(measured[n]), base and t / base] for n, t in times.items()]
    common.table(["first step of", "seconds", "min", "max", "of nanoGPT's"], rows)
    print("ours: " + ", ".join(f"{name} at {at:.2f} s" for name, at in parts.items()))
    if imports:
        common.table(["import", "ms with its own imports"], imports)
    common.finish("start", seconds=times, ours_at=parts, imports_ms=dict(imports))


if __name__ == "__main__":
    main()
