"""
Time to quality: how long train.py takes to the bits per byte that nanoGPT reaches in --seconds.

    python bench/time_to_quality.py --nanogpt PATH --ours_iters 150 200 250
    python bench/time_to_quality.py --target 1.118 --ours_iters 200 -- --muon_lr=0.03

nanoGPT gets the same ids and the recipe's layers, width and context, its README's settings for a machine
without a GPU, the number of heads that is fastest for it, and a schedule that ends with its time, fitted to
its rate in a short run. Our schedule ends with the run, too, so runs of several lengths are made, the
shortest first, and the first that reaches the target counts. Clocks run from the start of the process,
imports and compiling included, to the last evaluation, when the weights are there. Evaluations are cut to
almost nothing on both sides; the checkpoints are scored afterwards, in float32, on the same windows of the
validation stories.
What stands after -- goes to our train.py. Takes (--seconds + our runs) x --repeats.
"""

import re
import statistics
import tempfile
from pathlib import Path

import common
import torch

import train
from nanostlm import checkpoint, settings


def shape(recipe: str, given: list[str] = ()) -> dict[str, int]:
    """Layers, width and context of a recipe with the settings `given` on the command line."""
    values = settings.command_line(train.TrainConfig, [recipe, *given], {}, "")
    return {name: (values[1] | values[2])[name] for name in ("n_layer", "n_embd", "block_size")}


def step_times(ran: common.Ran) -> list[float]:
    found = [re.search(r"^iter \d+: .* time ([\d.]+)ms", line) for _, line in ran.lines]
    return [float(match[1]) / 1000 for match in found if match]


def nanogpt_pace(folder: Path, heads: list[int], **settings) -> tuple[int, float, float]:
    """The fastest number of heads, from short runs -> (heads, seconds per step, seconds before the first)."""
    paces = []
    for n_head in heads:
        ran = common.run(
            common.nanogpt_train(**settings, n_head=n_head, max_iters=25, out_dir="pace"), folder
        )
        steps = step_times(ran)
        pace = statistics.median(steps[5:])
        paces.append((pace, n_head, ran.find("^iter 0:")[0] - pace))
        print(f"nanoGPT, {n_head} heads: {pace * 1000:.0f} ms a step", flush=True)
    pace, n_head, start = min(paces)
    return n_head, pace, start


def nanogpt_side(path: str, folder: Path, data, iters: int, eval_tokens: int, **settings) -> dict:
    """One run of nanoGPT and its score."""
    settings |= dict(max_iters=iters, lr_decay_iters=iters, eval_interval=iters, out_dir="out")
    settings |= dict(always_save_checkpoint=True)
    ran = common.run(common.nanogpt_train(**settings), folder)
    state = torch.load(folder / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    theirs = common.nanogpt_module(path)
    model = theirs.GPT(theirs.GPTConfig(**state["model_args"])).eval()
    model.load_state_dict({name.removeprefix("_orig_mod."): p for name, p in state["model"].items()})
    return {
        "seconds": ran.find("^saving checkpoint")[0],
        "iters": iters,
        "peak_mb": ran.peak_mb,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bpb": common.bits_per_byte(model, data, settings["block_size"], eval_tokens),
    }


def our_side(options, data, folder: Path, iters: int, seed: int) -> dict:
    """One run of ours and its score."""
    changes = dict(max_iters=iters, eval_interval=iters, save_interval=iters, seed=seed)
    changes |= dict(eval_tokens=256, fallback="")
    out = folder / f"ours-{iters}-{seed}"
    ran = common.run([*common.ours(options.recipe, data, out, **changes), *options.ours])
    model, _ = checkpoint.load(out)
    bpb = common.bits_per_byte(model, data, model.config.block_size, options.eval_tokens)
    return {
        "seconds": ran.find(rf"^step +{iters:,}  val loss")[0],
        "iters": iters,
        "peak_mb": ran.peak_mb,
        "parameters": model.config.estimate()["parameters"],
        "bpb": bpb,
    }


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    common.nanogpt_option(parser)
    common.data_options(parser)
    add = parser.add_argument
    add("--seconds", type=float, default=600, help="of nanoGPT's run; default %(default)s")
    add("--target", type=float, help="bits per byte to reach, instead of running nanoGPT")
    add("--nanogpt_heads", type=int, nargs="+", default=[2, 4], help="the fastest is taken")
    add("--nanogpt_compile", action="store_true", help="compile nanoGPT's model")
    add("--batch_size", type=int, default=12, help="of nanoGPT; default %(default)s")
    add("--recipe", default=str(common.ROOT / "config" / "tiny.py"))
    add("--ours_iters", type=int, nargs="+", default=[200, 300, 400, 600, 800, 1200])
    add("--eval_tokens", type=int, default=65_536, help="of the validation file, to score; 0: all")
    add("ours", nargs="*", help="after --: further settings of our train.py")
    options = common.parse(parser, argv)
    if not options.nanogpt and not options.target:
        parser.error("either --nanogpt or --target")
    data, sides = common.load_data(options), []
    theirs = shape(options.recipe, options.ours)
    theirs |= dict(batch_size=options.batch_size, compile=options.nanogpt_compile)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if not options.target:
            peer = common.nanogpt(options.nanogpt, folder / "nanogpt", data)
            theirs["n_head"], pace, start = nanogpt_pace(peer, options.nanogpt_heads, **theirs)
            fitted = max(101, round((options.seconds - start) / pace))  # its warmup takes 100 updates
        for repeat in range(options.repeats):
            side = {"target": options.target}
            if not options.target:
                arguments = options.nanogpt, peer, data, fitted, options.eval_tokens
                side = {"nanogpt": nanogpt_side(*arguments, **theirs)}
                side["target"] = side["nanogpt"]["bpb"]
                print("nanoGPT", side["nanogpt"], flush=True)
            tried = side["ours_tried"] = []
            for iters in sorted(options.ours_iters):
                tried.append(our_side(options, data, folder, iters, seed=1337 + repeat))
                print("ours", tried[-1], flush=True)
                if tried[-1]["bpb"] <= side["target"]:
                    side["ours"] = tried[-1]
                    side["times"] = side.get("nanogpt", vars(options))["seconds"] / tried[-1]["seconds"]
                    break
            sides.append(side)
    head = ["run", "", "steps", "seconds", "bits per byte", "parameters", "peak MB"]
    keys, rows = ("iters", "seconds", "bpb", "parameters", "peak_mb"), []
    for i, side in enumerate(sides, 1):
        made = [("nanoGPT", side.get("nanogpt")), *(("ours", tried) for tried in side["ours_tried"])]
        rows += [[i, name, *(one[key] for key in keys)] for name, one in made if one]
    common.table(head, rows)
    times = [side["times"] for side in sides if "times" in side]
    print(
        f"reached in {len(times)} of {len(sides)} runs"
        + (f"; {statistics.median(times):.2f} times as fast (median)" if times else "")
    )
    common.finish(
        "time_to_quality",
        seconds=options.seconds,
        nanogpt_settings=theirs,
        ours_settings=options.ours,
        eval_tokens=options.eval_tokens,
        runs=sides,
        times=statistics.median(times) if times else None,
    )


if __name__ == "__main__":
    main()
