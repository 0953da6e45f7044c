"""
All checks and measurements on a CUDA GPU: one command, at most ten minutes, no network.

    python bench/gpu.py                               # all parts, on the GPU of this machine
    python bench/gpu.py --only resume,speed/tiny      # some parts
    python bench/gpu.py --nanogpt PATH                # time to quality against nanoGPT
    python bench/gpu.py --dry-run                     # micro models on the CPU, to test this script

    tests       the tests marked `cuda`
    resume      a run that is killed and resumed is bitwise equal to an uninterrupted one
    fp16        a run in float16 with a GradScaler learns
    ranks       one and two processes agree up to rounding, on config/stories10m.py; needs two GPUs
    generation  tokens/s of sample.py with that shape, 1 and 16 stories
    quality     seconds and bits per byte of two recipes on toystories, whose entropy is known; with
                --nanogpt, up to the bits per byte that nanoGPT reaches in 40 s (bench/time_to_quality.py)
    speed       every recipe at its own batch shape and longest window, on random ids: tokens/s, MFU against
                the measured rate of matrix products, peak memory, and the time to compile without a cache

Every job of a part runs in its own process with its own time limit, so a job that fails or hangs does not
stop the others. A job also fails if one of our programs prints a warning, as train.py does when it cannot
compile, or if --minutes have passed before it starts. The exit status is 1 if any job failed. The results of
--dry-run are meaningless; it compiles with the backend aot_eager.
"""

import argparse
import contextlib
import io
import json
import math
import os
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import common
import generation
import numpy as np
import time_to_quality
import torch

import prepare
from nanostlm import data as datasets
from nanostlm import runs

sys.path.insert(0, str(common.ROOT / "tests"))
from helpers import bit_equal, metrics, run_state  # noqa: E402

CONFIG = common.ROOT / "config"
MICRO = dict(n_layer=1, n_head=2, n_embd=32, block_size=32, batch_size=2, gradient_accumulation_steps=2)
MICRO |= dict(device="cpu")  # changes of a recipe in --dry-run
SHORT = dict(stories=0, max_iters=60, log_interval=1, eval_interval=20, eval_tokens=4096, save_interval=10)
SHORT |= dict(sample_interval=0, warmup_iters=10, fallback="")  # of runs that only check something
SAVED = r"^[\d,]+ updates, "  # the first line of train.py's final report, after the last checkpoint
QUALITY = {  # recipe -> updates of our runs, options of time_to_quality.py, our settings
    "tiny": ([200, 400, 800], "--nanogpt_heads 2", ""),
    "stories10m": (
        [250, 500, 1000],
        "--nanogpt_heads 8 --batch_size 64 --nanogpt_compile",
        "--warmup_iters=50",
    ),
}
RESULT = "result: "  # prefix of the line with the results of a job's process
MARK = "NANOSTLM_GPU_JOB"  # an environment variable of a job's process and its descendants
AOT_EAGER = "import gpu; gpu.aot_eager(start=True)"  # in --dry-run, Python runs this before our program

# ----------------------------------------------------------------------------------------------------------
# Functions shared by the parts, in the process of a job. `options.folder` is the folder of the job


def aot_eager(start: bool = False) -> None:
    """Compile with a backend that needs no C++ compiler; with `start`, run the program in sys.argv."""
    compile = torch.compile
    torch.compile = lambda *args, mode=0, options=0, **more: compile(*args, backend="aot_eager", **more)
    if start:
        del sys.argv[0]
        runpy.run_path(sys.argv[0], run_name="__main__")


def run(options, command: list, processes: int = 1, **how) -> common.Ran:
    """Run one of our programs, with torchrun if `processes` > 1, and print its output."""
    if options.dry_run:
        command = [command[0], "-c", AOT_EAGER, *command[1:]]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
        command = [*torchrun, f"--nproc_per_node={processes}", *command]
    return common.run(command, Path(__file__).parent, on_line=partial(print, end="", flush=True), **how)


def corpus(options) -> datasets.Data:
    """The corpus toystories; in --dry-run a small one, as bytes."""
    if not options.dry_run:
        return common.load_data(options)
    return datasets.load_data(prepare.prepare("toystories", "byte", stories=400, data_dir=options.data_dir))


def short_run(options, name: str, recipe: str = "tiny", **settings) -> tuple[list, Path]:
    """The command of a short run of a recipe, and the run's folder."""
    settings = SHORT | settings | (MICRO if options.dry_run else {})
    folder = options.folder / name
    return common.ours(CONFIG / f"{recipe}.py", corpus(options), folder, **settings), folder


def random_data(vocab_size: int, tokens: int) -> datasets.Data:
    """Random ids in stories of 160 ids; without a network, only the vocabulary of toystories is available."""
    rng, tokenizer = np.random.default_rng(0), generation.synthetic_tokenizer(vocab_size)
    bins = [rng.integers(0, vocab_size - 1, n, np.uint16) for n in (tokens, 1000)]
    for ids in bins:
        ids[::160] = tokenizer.eot
    return datasets.Data(*bins, {"corpus": "random", "limit": None}, tokenizer, Path("nowhere"))


# ----------------------------------------------------------------------------------------------------------
# The parts. Each returns its results; SystemExit has a one-line reason for a failure


def cuda_tests(options) -> dict:
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-n", "0", "--no-header", "tests"]
    ran = common.run(command, common.ROOT, check=False, on_line=partial(print, end="", flush=True))
    summary = ran.find(r"\d+ (passed|failed|skipped|deselected|error)")[1].string.strip(" =")
    if ran.status or "passed" not in summary and not options.dry_run:
        raise SystemExit(summary)
    return {"note": summary}


def resume(options, compiled: bool) -> dict:
    settings = dict(n_layer=2, dropout=0.1, context_schedule="0:0.5, 0.5:1", compile=compiled)

    def train_run(name: str, *more, until: str = SAVED) -> tuple[common.Ran, Path]:
        command, folder = short_run(options, name, **settings)
        return run(options, [*command, *more], until=until), folder

    def equal(*folders: Path) -> bool:
        return bit_equal(*((metrics(folder), run_state(folder)) for folder in folders))

    _, whole = train_run("whole")
    train_run("killed", until="^step +30  loss")
    ran, killed = train_run("killed", "--resume")
    step = int(ran.find(r"^resuming .* at step ([\d,]+)")[1][1])
    if not 0 < step < 60:
        raise SystemExit(f"killed after step 30, but resumed at step {step}")
    if not equal(whole, killed):
        twice = "are equal" if equal(whole, train_run("again")[1]) else "also differ"
        raise SystemExit(f"the resumed run differs from an uninterrupted one; two uninterrupted runs {twice}")
    return {"note": f"killed after step 30, resumed at step {step}: bitwise equal"}


def fp16(options) -> dict:
    command, folder = short_run(options, "fp16", dtype="float16", pair_tokens=0, compile=False)
    run(options, command, until=SAVED)
    first, *_, last = (line["loss"] for line in metrics(folder, "val"))
    if not last < first:
        raise SystemExit(f"the validation loss went from {first:.3f} to {last:.3f}")
    scale = run_state(folder)["scaler"]["scale"]
    return {"note": f"validation loss from {first:.3f} to {last:.3f}, scale {scale:,.0f}"}


def ranks(options) -> dict:
    if not options.dry_run and torch.cuda.device_count() < 2:
        return {"state": "skipped", "note": "needs two GPUs"}
    losses, rates = [], []
    for processes in (1, 2):
        command, folder = short_run(options, f"ranks-{processes}", "stories10m", compile=not options.dry_run)
        run(options, command, processes, until=SAVED)
        logged = [line for line in runs.read_metrics(folder) if line["split"] == "train"]
        losses.append([line["loss"] for line in logged])
        rates.append(statistics.median(line["tokens_per_s"] for line in logged[10:]))
    differences = [abs(a - b) / a for a, b in zip(*losses, strict=True)]
    if not all(difference < 0.01 for difference in differences):
        raise SystemExit(f"the losses of one and two processes differ by up to {max(differences):.1%}")
    note = f"losses differ by {max(differences):.1e}, {rates[1] / rates[0]:.2f} times the speed of one"
    return {"tokens_per_s": rates[1], "note": note}


def generate(options, streams: int, compiled: bool) -> dict:
    c, dtype = common.recipes()["stories10m"].model, "auto-compiled" if compiled else "auto"
    if options.dry_run:
        c = replace(c, **{name: MICRO[name] for name in ("n_layer", "n_head", "n_embd", "block_size")})
    file = generation.save_random(options.folder / "random.pt", c)
    command = generation.sample_command(file, dtype, streams, 8 if options.dry_run else 400, "auto")
    return {"tokens_per_s": generation.sample_rate(run(options, command))}


def quality(options, recipe: str) -> dict:
    data, (lengths, theirs, ours) = corpus(options), QUALITY[recipe]
    entropy, argv = data.meta["floor_bpb"], ["--recipe", CONFIG / f"{recipe}.py", "--repeats", 1]
    argv += ["--dataset", "toystories", "--tokenizer", data.folder.name, "--data_dir", options.data_dir]
    seconds, tokens = 40, 16_384
    if options.dry_run:
        lengths, theirs, ours = [2], "--nanogpt_heads 2", " ".join([*common.words(MICRO), ours])
        seconds, tokens = 2, 512
    if options.nanogpt:
        argv += ["--nanogpt", options.nanogpt, "--seconds", seconds, *theirs.split()]
    else:
        lengths = lengths[-1:]
        argv += ["--target", entropy]
    argv += ["--eval_tokens", tokens]
    argv += ["--ours_iters", *lengths, "--", "--stories=0", *ours.split()]
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        time_to_quality.main([str(arg) for arg in argv])
    [result] = json.loads(stdout.getvalue().splitlines()[-1])["runs"]
    sides = [("nanoGPT", result["nanogpt"])] if options.nanogpt else []
    sides += [(f"{run['iters']:,} updates", run) for run in result["ours_tried"]]
    note = "; ".join(f"{name}: {side['bpb']:.4f} after {side['seconds']:.0f} s" for name, side in sides)
    note += f"; {result['times']:.2f} times as fast" if "times" in result else ""
    return result | {"note": f"bits per byte (entropy {entropy:.4f}): {note}"}


def speed(options, recipe: str, compiled: bool) -> dict:
    c, micro = common.recipes()[recipe], MICRO if options.dry_run else {}
    data = random_data(c.model.vocab_size, 1 << 14 if options.dry_run else 1 << 20)
    trainer = common.trainer(CONFIG / f"{recipe}.py", data, compile=str(compiled), **micro)
    stages = [first for first, _ in trainer.config.stages()]  # the first update of each window length
    losses = []

    def train_steps(steps) -> None:
        losses.extend(trainer.train_step(step)["loss"] for step in steps)

    cold = common.seconds(lambda: (trainer.compile(), train_steps(stages)))
    warm = common.seconds(lambda: train_steps(stages))
    count = 2 if options.dry_run else min(100, max(3, round(2 * len(stages) / warm)))  # about two seconds
    longest = range(stages[-1], stages[-1] + count)
    took = statistics.median(common.seconds(lambda: train_steps(longest)) for _ in range(3))
    if not all(math.isfinite(loss) for loss in losses):
        raise SystemExit("a loss is not finite")
    rate, matmul = count * trainer.tokens_per_step / took, trainer.machine.matmul_rate()
    flops = rate * trainer.config.model.estimate()["flops_per_token"]
    result = {
        "tokens_per_s": rate,
        "mfu": f"{flops / matmul:.1%}",
        "matmul_rate": matmul,
        "peak_mb": trainer.machine.peak_memory(),
        "note": f"{trainer.tokens_per_step:,} tokens a step; {trainer.machine.description}",
    }
    return result | ({"compile_s": cold - warm} if compiled else {})


def jobs() -> dict[str, tuple[int, Callable[..., dict]]]:
    """Name -> (time limit in seconds, function of the options), in the order in which they run."""
    kinds = {"plain": False, "compiled": True}
    result = {"tests": (120, cuda_tests)}
    result |= {f"resume/{kind}": (150, partial(resume, compiled=on)) for kind, on in kinds.items()}
    result |= {"fp16": (60, fp16), "ranks": (150, ranks)}
    for streams in (1, 16):
        for kind, on in kinds.items():
            result[f"generation/{streams}/{kind}"] = 90, partial(generate, streams=streams, compiled=on)
    result |= {f"quality/{recipe}": (240, partial(quality, recipe=recipe)) for recipe in QUALITY}
    for recipe in common.recipes():  # the largest last, in case there is not enough time
        for kind, on in kinds.items():
            result[f"speed/{recipe}/{kind}"] = 120, partial(speed, recipe=recipe, compiled=on)
    return result


# ----------------------------------------------------------------------------------------------------------
# Running jobs


def job_command(name: str, options) -> list[str]:
    """The command of a job's process: that of this process, with the job and the folder of all jobs."""
    return [sys.executable, __file__, *options.argv, "--job", name, str(options.folder)]


def run_job_here(name: str, folder: str, options) -> None:
    """In the process of a job: run it and print its results."""
    options.folder = Path(folder, name)
    if options.dry_run:
        options.data_dir = Path(folder, "data")
        aot_eager()
    print(RESULT + json.dumps(jobs()[name][1](options)), flush=True)


def kill_marked(mark: str) -> None:
    """Kill all processes left by a job, also those outside its process group, such as those of torchrun."""
    for _ in range(100):
        pids = []
        for file in Path("/proc").glob("[0-9]*/environ"):  # on Linux
            with contextlib.suppress(OSError):
                if f"{MARK}={mark}".encode() in file.read_bytes().split(b"\0"):
                    pids.append(int(file.parent.name))
                    os.kill(pids[-1], signal.SIGKILL)
        if not pids:
            return
        time.sleep(0.05)


def run_job(name: str, limit: float, options) -> dict:
    """Run a job in its own process -> state, seconds, its results, and a note, such as why it failed."""
    start, folder, mark = time.monotonic(), options.folder / name, f"{os.getpid()}/{name}"
    limit, status = max(0, min(limit, options.end - start)), None
    folder.mkdir(parents=True)
    env = os.environ | {MARK: mark, "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if options.dry_run else {}
    # a file, because a pipe could stay open
    with open(folder / "output", "w+", encoding="utf-8", errors="replace") as file:
        pipes = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        process = subprocess.Popen(job_command(name, options), env=env, **pipes)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
        finally:
            kill_marked(mark)
        file.seek(0)
        output = [line for line in file.read().splitlines() if line.strip()]
    result = {"state": "ok", "seconds": time.monotonic() - start}
    warnings = [line for line in output if line.startswith("WARNING: ")]
    results = [line.removeprefix(RESULT) for line in output if line.startswith(RESULT)]
    if status is None:
        result |= {"state": "FAILED", "note": f"stopped after {limit:.0f} s"}
    elif status or warnings or not results:
        result |= {"state": "FAILED", "note": [f"status {status}", *output[-1:], *warnings][-1]}
    else:
        result |= json.loads(results[-1])
    print(f"{name}: {result['state']}, {result['seconds']:.0f} s", flush=True)
    if result["state"] == "FAILED":
        print(*(f"    {line}" for line in output[-20:]), sep="\n", flush=True)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__doc__, repeats=0)
    common.nanogpt_option(parser)
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="PART", help="e.g. speed or speed/tiny; repeatable")
    add("--minutes", type=float, default=10, help="time limit of all jobs; default %(default)s")
    add("--data_dir", default="data", help="where toystories is or will be prepared; default %(default)s")
    add("--dry-run", action="store_true", help="micro models on the CPU; measures nothing")
    add("--job", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    parser.set_defaults(dataset="toystories", tokenizer="bpe4096", source=None)
    options = common.parse(parser, argv)
    if options.job:
        run_job_here(*options.job, options)
        return 0
    known, parts = jobs(), [part for only in options.only for part in only.split(",")]
    matches = {part: [name for name in known if f"{name}/".startswith(f"{part}/")] for part in parts}
    if unknown := [part for part in parts if not matches[part]]:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(known)}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA GPU; --dry-run tests this script without one")
    names = [name for name in known if not parts or name in sum(matches.values(), [])]
    options.argv = sys.argv[1:] if argv is None else argv
    options.end = time.monotonic() + 60 * options.minutes
    workers, slower = (2, 2) if options.dry_run else (1, 1)  # a GPU does one thing at a time
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary,
        ThreadPoolExecutor(workers) as pool,
    ):
        options.folder = Path(temporary)
        done = pool.map(lambda name: run_job(name, slower * known[name][0], options), names)
        results = dict(zip(names, done, strict=True))
    print("\nDRY RUN: micro models on the CPU, NOTHING WAS MEASURED" if options.dry_run else "")
    keys = ("state", "seconds", "tokens_per_s", "mfu", "peak_mb", "compile_s")
    rows = [[name, *map(result.get, keys), result.get("note", "")] for name, result in results.items()]
    common.table(["part", "", "seconds", "tokens/s", "MFU", "peak MB", "s to compile", "note"], rows)
    failed = [name for name, result in results.items() if result["state"] == "FAILED"]
    print(f"{len(failed)} of {len(results)} failed" + (f": {', '.join(failed)}" if failed else ""))
    common.finish("gpu", measured=not options.dry_run, failed=failed, jobs=results)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
