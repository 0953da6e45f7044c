"""
Everything that a CUDA GPU must prove, with one command, within ten minutes and without a network.

    python bench/gpu.py                               # all parts, on the GPU of this machine
    python bench/gpu.py --only resume,speed/tiny      # some parts
    python bench/gpu.py --nanogpt PATH                # time to quality against nanoGPT
    python bench/gpu.py --dry-run                     # micro models on the CPU: tests this script alone

    tests       the tests marked `cuda`
    resume      a run that is killed and resumed equals an undisturbed one to the last bit
    fp16        a run in float16 with a GradScaler learns
    ranks       one and two processes agree within rounding, on config/stories10m.py; needs two GPUs
    generation  tokens/s of sample.py with that shape, 1 and 16 stories
    quality     seconds and bits per byte of two recipes on toystories, whose entropy is known; with --nanogpt
                until the bits per byte that nanoGPT reaches in 40 seconds (bench/time_to_quality.py)
    speed       every recipe at its own batch shape and longest window, on random ids: tokens/s, MFU against
                the measured rate of matrix products, peak memory, and the time to compile without a cache

Every job of a part runs in a process of its own with its own time limit, so that one that fails or hangs does
not hide the others. A job fails, too, if a program of ours warns, as train.py does when it cannot compile, or
if --minutes are over before its turn. The exit status is 1 if any job failed. In --dry-run no figure means
anything; it compiles with the backend aot_eager.
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
from helpers import kept, lines, same  # noqa: E402  comparisons to the last bit

CONFIG = common.ROOT / "config"
MICRO = dict(n_layer=1, n_head=2, n_embd=32, block_size=32, batch_size=2, gradient_accumulation_steps=2)
MICRO |= dict(device="cpu")  # with the rest of a recipe, in --dry-run
SHORT = dict(stories=0, max_iters=60, log_interval=1, eval_interval=20, eval_tokens=4096, save_interval=10)
SHORT |= dict(sample_interval=0, warmup_iters=10, fallback="")  # runs that prove something, but learn little
SAVED = r"^[\d,]+ updates, "  # the first line of train.py's final report: the run is whole and saved
QUALITY = {  # recipe -> the lengths of our runs, options of time_to_quality.py, further settings of ours
    "tiny": ([200, 400, 800], "--nanogpt_heads 2", ""),
    "stories10m": (
        [250, 500, 1000],
        "--nanogpt_heads 8 --batch_size 64 --nanogpt_compile",
        "--warmup_iters=50",
    ),
}
RESULT = "result: "  # begins the line of a job's process that has what the job found
MARK = "NANOSTLM_GPU_JOB"  # an environment variable of a job and of all that it starts
AOT_EAGER = "import gpu; gpu.aot_eager(start=True)"  # what Python does in --dry-run before a program of ours

# ----------------------------------------------------------------------------------------------------------
# What the parts share. They run in the process of a job, and `options.folder` is the job's own


def aot_eager(start: bool = False) -> None:
    """Make torch.compile use a backend that needs no compiler; then start the program on the command line."""
    compile = torch.compile
    torch.compile = lambda *args, mode=0, options=0, **more: compile(*args, backend="aot_eager", **more)
    if start:
        del sys.argv[0]
        runpy.run_path(sys.argv[0], run_name="__main__")


def run(options, command: list, processes: int = 1, **how) -> common.Ran:
    """Run a program of ours, on several processes if wanted, and repeat what it says."""
    if options.dry_run:
        command = [command[0], "-c", AOT_EAGER, *command[1:]]
    if processes > 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
        command = [*torchrun, f"--nproc_per_node={processes}", *command]
    return common.run(command, Path(__file__).parent, on_line=partial(print, end="", flush=True), **how)


def corpus(options) -> datasets.Data:
    """Toystories, in --dry-run a few of them as bytes."""
    if not options.dry_run:
        return common.load_data(options)
    return datasets.load_data(prepare.prepare("toystories", "byte", stories=400, data_dir=options.data_dir))


def short_run(options, name: str, recipe: str = "tiny", **settings) -> tuple[list, Path]:
    """The command of a short run of a recipe, and the run's folder."""
    settings = SHORT | settings | (MICRO if options.dry_run else {})
    folder = options.folder / name
    return common.ours(CONFIG / f"{recipe}.py", corpus(options), folder, **settings), folder


def random_data(ids: int, tokens: int) -> datasets.Data:
    """Random ids in stories of 160, because only toystories' own vocabulary is at hand without a network."""
    rng, tokenizer = np.random.default_rng(0), generation.made_up_tokenizer(ids)
    bins = [rng.integers(0, ids - 1, n, np.uint16) for n in (tokens, 1000)]
    for made in bins:
        made[::160] = tokenizer.eot
    return datasets.Data(*bins, {"corpus": "random", "limit": None}, tokenizer, Path("nowhere"))


# ----------------------------------------------------------------------------------------------------------
# The parts. Each returns what it found; SystemExit says in one line why it failed


def cuda_tests(options) -> dict:
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-n", "0", "--no-header", "tests"]
    ran = common.run(command, common.ROOT, check=False, on_line=partial(print, end="", flush=True))
    summary = ran.find(r"\d+ (passed|failed|skipped|deselected|error)")[1].string.strip(" =")
    if ran.status or "passed" not in summary and not options.dry_run:
        raise SystemExit(summary)
    return {"note": summary}


def resume(options, compiled: bool) -> dict:
    settings = dict(n_layer=2, dropout=0.1, context_schedule="0:0.5, 0.5:1", compile=compiled)

    def go(name: str, *more, until: str = SAVED) -> tuple[common.Ran, Path]:
        command, folder = short_run(options, name, **settings)
        return run(options, [*command, *more], until=until), folder

    def equal(*folders: Path) -> bool:
        return same(*((lines(folder), kept(folder)) for folder in folders))

    _, whole = go("whole")
    go("killed", until="^step +30  loss")
    ran, killed = go("killed", "--resume")
    step = int(ran.find(r"^resuming .* at step ([\d,]+)")[1][1])
    if not 0 < step < 60:
        raise SystemExit(f"killed after step 30, but resumed at step {step}")
    if not equal(whole, killed):
        twice = "are equal" if equal(whole, go("again")[1]) else "differ, too"
        raise SystemExit(f"the resumed run differs from the undisturbed one; two undisturbed runs {twice}")
    return {"note": f"killed after step 30, resumed at step {step}: equal to the last bit"}


def fp16(options) -> dict:
    command, folder = short_run(options, "fp16", dtype="float16", pair_tokens=0, compile=False)
    run(options, command, until=SAVED)
    first, *_, last = (line["loss"] for line in lines(folder, "val"))
    if not last < first:
        raise SystemExit(f"the validation loss went from {first:.3f} to {last:.3f}")
    scale = kept(folder)["scaler"]["scale"]
    return {"note": f"validation loss from {first:.3f} to {last:.3f}, scale {scale:,.0f}"}


def ranks(options) -> dict:
    if not options.dry_run and torch.cuda.device_count() < 2:
        return {"state": "skipped", "note": "needs two GPUs"}
    losses, rates = [], []
    for processes in (1, 2):
        command, folder = short_run(options, f"ranks-{processes}", "stories10m", compile=not options.dry_run)
        run(options, command, processes, until=SAVED)
        found = [line for line in runs.read_metrics(folder) if line["split"] == "train"]
        losses.append([line["loss"] for line in found])
        rates.append(statistics.median(line["tokens_per_s"] for line in found[10:]))
    apart = [abs(a - b) / a for a, b in zip(*losses, strict=True)]
    if not all(share < 0.01 for share in apart):
        raise SystemExit(f"the losses of one and two processes are up to {max(apart):.1%} apart")
    note = f"losses {max(apart):.1e} apart, {rates[1] / rates[0]:.2f} times the speed of one"
    return {"tokens_per_s": rates[1], "note": note}


def generate(options, streams: int, compiled: bool) -> dict:
    c, dtype = common.recipes()["stories10m"].model, "auto-compiled" if compiled else "auto"
    if options.dry_run:
        c = replace(c, **{name: MICRO[name] for name in ("n_layer", "n_head", "n_embd", "block_size")})
    file = generation.save_random(options.folder / "random.pt", c)
    words = generation.sample_command(file, dtype, streams, 8 if options.dry_run else 400, "auto")
    return {"tokens_per_s": generation.sample_rate(run(options, words))}


def quality(options, recipe: str) -> dict:
    data, (lengths, theirs, ours) = corpus(options), QUALITY[recipe]
    floor, words = data.meta["floor_bpb"], ["--recipe", CONFIG / f"{recipe}.py", "--repeats", 1]
    words += ["--dataset", "toystories", "--tokenizer", data.folder.name, "--data_dir", options.data_dir]
    seconds, tokens = 40, 16_384
    if options.dry_run:
        lengths, theirs, ours = [2], "--nanogpt_heads 2", " ".join([*common.words(MICRO), ours])
        seconds, tokens = 2, 512
    if options.nanogpt:
        words += ["--nanogpt", options.nanogpt, "--seconds", seconds, *theirs.split()]
    else:
        lengths = lengths[-1:]
        words += ["--target", floor]
    words += ["--eval_tokens", tokens]
    words += ["--ours_iters", *lengths, "--", "--stories=0", *ours.split()]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        time_to_quality.main([str(word) for word in words])
    [found] = json.loads(said.getvalue().splitlines()[-1])["runs"]
    sides = [("nanoGPT", found["nanogpt"])] if options.nanogpt else []
    sides += [(f"{one['iters']:,} updates", one) for one in found["ours_tried"]]
    note = "; ".join(f"{name}: {one['bpb']:.4f} after {one['seconds']:.0f} s" for name, one in sides)
    note += f"; {found['times']:.2f} times as fast" if "times" in found else ""
    return found | {"note": f"bits per byte (entropy {floor:.4f}): {note}"}


def speed(options, recipe: str, compiled: bool) -> dict:
    c, micro = common.recipes()[recipe], MICRO if options.dry_run else {}
    data = random_data(c.model.vocab_size, 1 << 14 if options.dry_run else 1 << 20)
    trainer = common.trainer(CONFIG / f"{recipe}.py", data, compile=str(compiled), **micro)
    stages = [first for first, _ in trainer.config.stages()]  # the first update of each window length
    losses = []

    def step(numbers) -> None:
        losses.extend(trainer.train_step(number)["loss"] for number in numbers)

    cold = common.seconds(lambda: (trainer.compile(), step(stages)))
    warm = common.seconds(lambda: step(stages))
    count = 2 if options.dry_run else min(100, max(3, round(2 * len(stages) / warm)))  # about two seconds
    longest = range(stages[-1], stages[-1] + count)
    took = statistics.median(common.seconds(lambda: step(longest)) for _ in range(3))
    if not all(math.isfinite(loss) for loss in losses):
        raise SystemExit("a loss is not finite")
    rate, matmul = count * trainer.tokens_per_step / took, trainer.machine.matmul_rate()
    flops = rate * trainer.config.model.estimate()["flops_per_token"]
    found = {
        "tokens_per_s": rate,
        "mfu": f"{flops / matmul:.1%}",
        "matmul_rate": matmul,
        "peak_mb": trainer.machine.peak_memory(),
        "note": f"{trainer.tokens_per_step:,} tokens a step; {trainer.machine.description}",
    }
    return found | ({"compile_s": cold - warm} if compiled else {})


def jobs() -> dict[str, tuple[int, Callable[..., dict]]]:
    """Name -> (seconds that it may take, function of the options), in the order in which they run."""
    kinds = {"plain": False, "compiled": True}
    found = {"tests": (120, cuda_tests)}
    found |= {f"resume/{kind}": (150, partial(resume, compiled=on)) for kind, on in kinds.items()}
    found |= {"fp16": (60, fp16), "ranks": (150, ranks)}
    for streams in (1, 16):
        for kind, on in kinds.items():
            found[f"generation/{streams}/{kind}"] = 90, partial(generate, streams=streams, compiled=on)
    found |= {f"quality/{recipe}": (240, partial(quality, recipe=recipe)) for recipe in QUALITY}
    for recipe in common.recipes():  # the largest last: if the time is too short, it is for these
        for kind, on in kinds.items():
            found[f"speed/{recipe}/{kind}"] = 120, partial(speed, recipe=recipe, compiled=on)
    return found


# ----------------------------------------------------------------------------------------------------------
# Running jobs


def job_command(name: str, options) -> list[str]:
    """The command of a job's process: this one's, with the job and the folder for all of them."""
    return [sys.executable, __file__, *options.words, "--job", name, str(options.folder)]


def do_job(name: str, folder: str, options) -> None:
    """In the process of a job: do it and print what it found."""
    options.folder = Path(folder, name)
    if options.dry_run:
        options.data_dir = Path(folder, "data")
        aot_eager()
    print(RESULT + json.dumps(jobs()[name][1](options)), flush=True)


def end_marked(mark: str) -> None:
    """End all processes that a job has left, also those outside of its process group, as torchrun's are."""
    for _ in range(100):
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):  # on Linux
            with contextlib.suppress(OSError):
                if f"{MARK}={mark}".encode() in file.read_bytes().split(b"\0"):
                    found.append(int(file.parent.name))
                    os.kill(found[-1], signal.SIGKILL)
        if not found:
            return
        time.sleep(0.05)


def run_job(name: str, limit: float, options) -> dict:
    """Do a job in a process of its own -> state, seconds, what it found, a note such as why it failed."""
    began, folder, mark = time.monotonic(), options.folder / name, f"{os.getpid()}/{name}"
    limit, status = max(0, min(limit, options.end - began)), None
    folder.mkdir(parents=True)
    env = os.environ | {MARK: mark, "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}
    env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if options.dry_run else {}
    with open(folder / "said", "w+", encoding="utf-8", errors="replace") as file:  # a pipe could stay open
        pipes = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        process = subprocess.Popen(job_command(name, options), env=env, **pipes)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
        finally:
            end_marked(mark)
        file.seek(0)
        said = [line for line in file.read().splitlines() if line.strip()]
    found = {"state": "ok", "seconds": time.monotonic() - began}
    warnings = [line for line in said if line.startswith("WARNING: ")]
    results = [line.removeprefix(RESULT) for line in said if line.startswith(RESULT)]
    if status is None:
        found |= {"state": "FAILED", "note": f"stopped after {limit:.0f} s"}
    elif status or warnings or not results:
        found |= {"state": "FAILED", "note": [f"status {status}", *said[-1:], *warnings][-1]}
    else:
        found |= json.loads(results[-1])
    print(f"{name}: {found['state']}, {found['seconds']:.0f} s", flush=True)
    if found["state"] == "FAILED":
        print(*(f"    {line}" for line in said[-20:]), sep="\n", flush=True)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = common.parser(__doc__, repeats=0)
    common.nanogpt_option(parser)
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="PART", help="such as speed or speed/tiny; repeatable")
    add("--minutes", type=float, default=10, help="for everything; default %(default)s")
    add("--data_dir", default="data", help="where toystories is or will be prepared; default %(default)s")
    add("--dry-run", action="store_true", help="micro models on the CPU; measures nothing")
    add("--job", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    parser.set_defaults(dataset="toystories", tokenizer="bpe4096", source=None)
    options = common.parse(parser, argv)
    if options.job:
        do_job(*options.job, options)
        return 0
    known, parts = jobs(), [part for words in options.only for part in words.split(",")]
    chosen = {part: [name for name in known if f"{name}/".startswith(f"{part}/")] for part in parts}
    if unknown := [part for part in parts if not chosen[part]]:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(known)}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA GPU here; --dry-run tests this script without one")
    wanted = [name for name in known if not parts or name in sum(chosen.values(), [])]
    options.words = sys.argv[1:] if argv is None else argv
    options.end = time.monotonic() + 60 * options.minutes
    workers, slower = (2, 2) if options.dry_run else (1, 1)  # a GPU does one thing at a time
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary,
        ThreadPoolExecutor(workers) as pool,
    ):
        options.folder = Path(temporary)
        made = pool.map(lambda name: run_job(name, slower * known[name][0], options), wanted)
        found = dict(zip(wanted, made, strict=True))
    print("\nDRY RUN: micro models on the CPU, NOTHING WAS MEASURED" if options.dry_run else "")
    keys = ("state", "seconds", "tokens_per_s", "mfu", "peak_mb", "compile_s")
    rows = [[name, *map(one.get, keys), one.get("note", "")] for name, one in found.items()]
    common.table(["part", "", "seconds", "tokens/s", "MFU", "peak MB", "s to compile", "note"], rows)
    failed = [name for name, one in found.items() if one["state"] == "FAILED"]
    print(f"{len(failed)} of {len(found)} failed" + (f": {', '.join(failed)}" if failed else ""))
    common.finish("gpu", measured=not options.dry_run, failed=failed, jobs=found)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
