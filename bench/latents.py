"""
The figure in experiments/README.md: bits per byte against the number and the width of thoughts.py's latents.

    python bench/latents.py [--updates 800] [--out experiments/latents.png]

Trains config/experiments/thoughts.py on toystories once for each pair, and once without context, for the same
number of updates, so the speed of the machine does not matter. A run that is finished is not repeated.
"""

from pathlib import Path

import common

from nanostlm import runs


def final_bpb(folder: Path, options, data, **settings) -> float:
    """Bits per byte at the end of a run in `folder`."""
    if not (folder / "loss.png").exists():
        lengths = dict(
            max_iters=options.updates, eval_interval=options.updates, eval_tokens=options.eval_tokens
        )
        common.run(
            [*common.ours(options.recipe, data, folder, fallback="", **lengths, **settings), "--overwrite"]
        )
    return [line["bpb"] for line in runs.read_metrics(folder) if line["split"] == "val"][-1]


def plot(found: dict[str, float], options, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for n in options.latents:
        bpb = [found[f"{n} x {width}"] for width in options.widths]
        axes.plot(options.widths, bpb, marker="o", label=f"{n} latent{'s' * (n > 1)} of a sentence")
    axes.axhline(found["none"], color="0.5", linestyle="--", label="this sentence only")
    axes.set(xscale="log", xlabel="numbers in each latent", ylabel="bits per byte")
    axes.set_xticks(options.widths, options.widths)
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__, repeats=0)
    common.data_options(parser, "byte")
    parser.set_defaults(dataset="toystories")
    add = parser.add_argument
    add("--recipe", default=str(common.ROOT / "config" / "experiments" / "thoughts.py"))
    add("--updates", type=int, default=800, help="default %(default)s")
    add("--latents", type=int, nargs="+", default=[1, 4], help="default %(default)s")
    add("--widths", type=int, nargs="+", default=[16, 64, 256], help="default %(default)s")
    add("--eval_tokens", type=int, default=65_536, help="validation tokens to score; default %(default)s")
    add("--out_dir", default="out/latents", help="where the runs are; default %(default)s")
    add("--out", default="latents.png", help="default %(default)s")
    options = common.parse(parser, argv)
    data, folder = common.load_data(options), Path(options.out_dir)
    found = {"none": final_bpb(folder / "none", options, data, context="none")}
    for n in options.latents:
        for width in options.widths:
            run = folder / f"{n}x{width}"
            found[f"{n} x {width}"] = final_bpb(run, options, data, latents=n, latent_width=width)
    plot(found, options, Path(options.out))
    common.table(["latents", "bits per byte"], [[name, bpb] for name, bpb in found.items()])
    common.finish("latents", bpb=found)


if __name__ == "__main__":
    main()
