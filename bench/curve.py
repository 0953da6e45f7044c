"""
The figure in the README: bits per byte against seconds, for nanoGPT and config/tiny.py.

    python bench/curve.py --nanogpt PATH [--seconds 600] [--out bench/curve.png]

nanoGPT trains as in time_to_quality.py: same ids, layers, width and context, with a schedule that ends after
--seconds. Its checkpoints are copied during the run and scored afterwards, so evaluation takes none of its
time; ours evaluates during the run. Time counts from the start of each process. Both are scored on the same
windows of the validation stories. Takes --seconds plus about five minutes.
"""

import re
import shutil
import tempfile
from pathlib import Path

import common
import time_to_quality as quality
import torch

from nanostlm.data import Data

Curve = list[tuple[float, float]]  # (seconds, bits per byte)


def nanogpt_curve(options, folder: Path, data: Data) -> Curve:
    """A run of nanoGPT in `folder`, scored at `--points` checkpoints."""
    settings = quality.shape(options.recipe) | dict(batch_size=options.batch_size, compile=False)
    settings["n_head"], step_s, start = quality.nanogpt_pace(folder, options.nanogpt_heads, **settings)
    iters = max(101, round((options.seconds - start) / step_s))
    settings |= dict(max_iters=iters, lr_decay_iters=iters, out_dir="out", always_save_checkpoint=True)
    copies: list[Path] = []

    def copy(line: str) -> None:
        """Copy each new checkpoint; nanoGPT prints "iter" after it has written one."""
        checkpoint = folder / "out" / "ckpt.pt"
        if line.startswith("iter ") and checkpoint.exists():
            if not copies or checkpoint.stat().st_mtime > copies[-1].stat().st_mtime:
                copies.append(folder / f"{len(copies)}.pt")
                shutil.copy2(checkpoint, copies[-1])

    command = common.nanogpt_train(**settings, eval_interval=max(1, iters // options.points))
    ran = common.run(command, folder, on_line=copy)
    saved = [seconds for seconds, line in ran.lines if line.startswith("saving checkpoint")]
    if len(copies) < len(saved):  # the last one is written after the last "iter"
        copies.append(folder / "out" / "ckpt.pt")
    module, curve = common.nanogpt_module(options.nanogpt), []
    for seconds, file in zip(saved, copies, strict=True):
        state = torch.load(file, map_location="cpu", weights_only=True)
        model = module.GPT(module.GPTConfig(**state["model_args"])).eval()
        model.load_state_dict({name.removeprefix("_orig_mod."): p for name, p in state["model"].items()})
        bpb = common.bits_per_byte(model, data, settings["block_size"], options.eval_tokens)
        curve.append((seconds, bpb))
    return curve


def our_curve(options, folder: Path, data: Data) -> Curve:
    """A run of our recipe, with its own evaluations."""
    interval = max(1, options.iters // options.points)
    settings = dict(
        max_iters=options.iters, eval_interval=interval, eval_tokens=options.eval_tokens, fallback=""
    )
    ran = common.run(common.ours(options.recipe, data, folder / "ours", **settings))
    matches = [
        (seconds, re.match(r"step +[\d,]+  val loss \S+  (\S+) bits", line)) for seconds, line in ran.lines
    ]
    return [(seconds, float(match[1])) for seconds, match in matches if match]


def plot(curves: dict[str, Curve], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker=".", label=name)
    target = curves["nanoGPT"][-1] if "nanoGPT" in curves else None
    if target:
        axes.axhline(target[1], color="0.8", linewidth=1, zorder=0)
    low = min(bpb for curve in curves.values() for _, bpb in curve)
    axes.set(xlabel="seconds from the start of the command", ylabel="bits per byte", ylim=(low - 0.05, 2.2))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=90, bbox_inches="tight")


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, repeats=0)
    common.nanogpt_option(parser)
    common.data_options(parser)
    add = parser.add_argument
    add("--seconds", type=float, default=600, help="length of nanoGPT's run; default %(default)s")
    add("--points", type=int, default=15, help="evaluations of each side; default %(default)s")
    add("--iters", type=int, default=1500, help="updates of our run; default %(default)s")
    add("--nanogpt_heads", type=int, nargs="+", default=[2, 4], help="candidates; the fastest is used")
    add("--batch_size", type=int, default=12, help="nanoGPT's; default %(default)s")
    add("--recipe", default=str(common.ROOT / "config" / "tiny.py"))
    add("--eval_tokens", type=int, default=65_536, help="validation tokens to score; default %(default)s")
    add("--out", default="curve.png", help="default %(default)s")
    options = common.parse(parser, argv)
    data, curves = common.load_data(options), {}
    with tempfile.TemporaryDirectory() as temporary:
        if options.nanogpt:
            peer = common.nanogpt(options.nanogpt, Path(temporary, "nanogpt"), data)
            curves["nanoGPT"] = nanogpt_curve(options, peer, data)
        curves["nanoSTLM, config/tiny.py"] = our_curve(options, Path(temporary), data)
    plot(curves, Path(options.out))
    rows = [[name, seconds, bpb] for name, curve in curves.items() for seconds, bpb in curve]
    common.table(["side", "seconds", "bits per byte"], rows)
    common.finish("curve", curves=curves)


if __name__ == "__main__":
    main()
