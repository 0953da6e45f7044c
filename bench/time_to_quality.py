"""
Time to quality: the time train.py takes to reach the bits per byte that nanoGPT reaches in --seconds.

    python bench/time_to_quality.py --nanogpt PATH --ours_iters 150 200 250
    python bench/time_to_quality.py --target 1.118 --ours_iters 200 -- --muon_lr=0.03

nanoGPT trains on the same ids with the recipe's layers, width and context, its README's settings for a
machine without a GPU, its fastest number of heads, and a schedule that ends after --seconds, by its speed in
a short run. Our schedule also ends with the run, so we train for several lengths, shortest first, and the
first run that reaches the target counts. Time counts from the start of the process to the last evaluation,
including imports and compilation. Evaluation during the runs is minimal; checkpoints are scored afterwards,
in float32, on the same windows of the validation stories. Arguments after -- are passed to our train.py.
Takes (--seconds + our runs) x --repeats.
"""

import re
import statistics
import tempfile
from pathlib import Path

import common
import torch

import train
from nanostlm import checkpoint, settings


def shape(recipe: str, overrides: list[str] = ()) -> dict[str, int]:
    """Layers, width and context of a recipe, with `overrides` from the command line."""
    values = settings.command_line(train.TrainConfig, [recipe, *overrides], {}, "")
    return {name: (values[1] | values[2])[name] for name in ("n_layer", "n_embd", "block_size")}


def step_times(ran: common.Ran) -> list[float]:
    matches = [re.search(r"^iter \d+: .* time ([\d.]+)ms", line) for _, line in ran.lines]
    return [float(match[1]) / 1000 for match in matches if match]


def nanogpt_pace(folder: Path, heads: list[int], **settings) -> tuple[int, float, float]:
    """The fastest number of heads, from short runs -> (heads, seconds per step, seconds before the first)."""
    candidates = []
    for n_head in heads:
        ran = common.run(
            common.nanogpt_train(**settings, n_head=n_head, max_iters=25, out_dir="pace"), folder
        )
        steps = step_times(ran)
        step_s = statistics.median(steps[5:])
        candidates.append((step_s, n_head, ran.find("^iter 0:")[0] - step_s))
        print(f"nanoGPT, {n_head} heads: {step_s * 1000:.0f} ms a step", flush=True)
    step_s, n_head, start = min(candidates)
    return n_head, step_s, start


def nanogpt_side(path: str, folder: Path, data, iters: int, eval_tokens: int, **settings) -> dict:
    """One run of nanoGPT and its score."""
    settings |= dict(max_iters=iters, lr_decay_iters=iters, eval_interval=iters, out_dir="out")
    settings |= dict(always_save_checkpoint=True)
    ran = common.run(common.nanogpt_train(**settings), folder)
    state = torch.load(folder / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    module = common.nanogpt_module(path)
    model = module.GPT(module.GPTConfig(**state["model_args"])).eval()
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
    add("--seconds", type=float, default=600, help="length of nanoGPT's run; default %(default)s")
    add("--target", type=float, help="bits per byte to reach, instead of running nanoGPT")
    add("--nanogpt_heads", type=int, nargs="+", default=[2, 4], help="candidates; the fastest is used")
    add("--nanogpt_compile", action="store_true", help="compile nanoGPT's model")
    add("--batch_size", type=int, default=12, help="nanoGPT's; default %(default)s")
    add("--recipe", default=str(common.ROOT / "config" / "tiny.py"))
    add("--ours_iters", type=int, nargs="+", default=[200, 300, 400, 600, 800, 1200])
    add("--eval_tokens", type=int, default=65_536, help="validation tokens to score; 0: all")
    add("ours", nargs="*", help="after --: further settings of our train.py")
    options = common.parse(parser, argv)
    if not options.nanogpt and not options.target:
        parser.error("give --nanogpt or --target")
    data, sides = common.load_data(options), []
    peer_settings = shape(options.recipe, options.ours)
    peer_settings |= dict(batch_size=options.batch_size, compile=options.nanogpt_compile)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if not options.target:
            peer = common.nanogpt(options.nanogpt, folder / "nanogpt", data)
            peer_settings["n_head"], step_s, start = nanogpt_pace(
                peer, options.nanogpt_heads, **peer_settings
            )
            # nanoGPT's warmup takes 100 updates
            nanogpt_iters = max(101, round((options.seconds - start) / step_s))
        for repeat in range(options.repeats):
            side = {"target": options.target}
            if not options.target:
                arguments = options.nanogpt, peer, data, nanogpt_iters, options.eval_tokens
                side = {"nanogpt": nanogpt_side(*arguments, **peer_settings)}
                side["target"] = side["nanogpt"]["bpb"]
                print("nanoGPT", side["nanogpt"], flush=True)
            attempts = side["ours_tried"] = []
            for iters in sorted(options.ours_iters):
                attempts.append(our_side(options, data, folder, iters, seed=1337 + repeat))
                print("ours", attempts[-1], flush=True)
                if attempts[-1]["bpb"] <= side["target"]:
                    side["ours"] = attempts[-1]
                    side["times"] = side.get("nanogpt", vars(options))["seconds"] / attempts[-1]["seconds"]
                    break
            sides.append(side)
    head = ["run", "", "steps", "seconds", "bits per byte", "parameters", "peak MB"]
    keys, rows = ("iters", "seconds", "bpb", "parameters", "peak_mb"), []
    for i, side in enumerate(sides, 1):
        entries = [("nanoGPT", side.get("nanogpt")), *(("ours", entry) for entry in side["ours_tried"])]
        rows += [[i, name, *(entry[key] for key in keys)] for name, entry in entries if entry]
    common.table(head, rows)
    speedups = [side["times"] for side in sides if "times" in side]
    print(
        f"reached in {len(speedups)} of {len(sides)} runs"
        + (f"; {statistics.median(speedups):.2f} times as fast (median)" if speedups else "")
    )
    common.finish(
        "time_to_quality",
        seconds=options.seconds,
        nanogpt_settings=peer_settings,
        ours_settings=options.ours,
        eval_tokens=options.eval_tokens,
        runs=sides,
        times=statistics.median(speedups) if speedups else None,
    )


if __name__ == "__main__":
    main()
