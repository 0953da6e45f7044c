"""
Generation in tokens per second: sample.py against nanoGPT's generate() and llama2.c's run.c.

    python bench/generation.py                          # 1 and 16 streams, and without a KV cache
    python bench/generation.py --nanogpt PATH           # and nanoGPT, with a full window and from one token
    python bench/generation.py --llama2c PATH           # and run.c on exported weights, greedy
    python bench/generation.py --llama2c PATH --checkpoint out/llama --data data/tinystories/bpe4096

The first two use 6 layers, 384 wide, context 512, 4,096 ids; --llama2c adds the shape of its 15M model, 288
wide with 32,000 ids, or a trained --checkpoint, and then prints its bits per byte. Weights are random, which
does not change the speed; they are tied, so the most likely token is the previous one and no text ends early.
Ours is the speed that `sample.py --temperature 0` prints for each --dtype ("-" if unsupported); run.c's speed
is what it prints, and includes the prompt's tokens; neither includes loading. With more --tokens than the
context, ours continues with a full sliding window. Takes a few minutes.
"""

import contextlib
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import common
import torch

from model import GPT, GPTConfig
from nanostlm import checkpoint, fast_decoding
from nanostlm import data as datasets
from nanostlm.formats.llama2c import to_llama2c
from nanostlm.tokenizer import Tokenizer

PROMPT = "Once upon a time"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synthetic_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer with `vocab_size` ids: bytes, pairs of bytes, end-of-text."""
    pairs = (bytes([a, b]) for a in range(256) for b in range(256))
    tokens = [bytes([b]) for b in range(256)] + [next(pairs) for _ in range(vocab_size - 257)]
    return Tokenizer(f"bpe{vocab_size}", tokens)


def save_random(file: Path, c: GPTConfig) -> Path:
    """Save a checkpoint with random weights and a vocabulary of config.vocab_size ids."""
    torch.manual_seed(0)
    state = synthetic_tokenizer(c.vocab_size).state()
    checkpoint.save(file, {"model": GPT(c).state_dict(), "model_config": vars(c), "tokenizer": state})
    return file


def sample_command(file: Path, dtype: str, streams: int, tokens: int, device: str) -> list:
    """The command that generates greedy text with sample.py; "float32-compiled" adds --compile."""
    dtype, _, compiled = dtype.partition("-")
    settings = dict(out_dir=file, dtype=dtype, num_samples=streams, max_new_tokens=tokens, device=device)
    settings |= dict(temperature=0, prompt=PROMPT)
    compile_option = ["--compile"] * bool(compiled)
    return [sys.executable, common.ROOT / "sample.py", *common.words(settings), *compile_option]


def sample_rate(ran: common.Ran) -> float:
    """The tokens per second printed by sample.py."""
    return float(ran.find(r" ([\d,]+) tokens/s")[1][1].replace(",", ""))


def ours(file: Path, dtype: str, streams: int, tokens: int, device: str) -> Callable[[], float]:
    """The tokens per second printed by sample.py; nan if it does not support the dtype."""
    command = sample_command(file, dtype, streams, tokens, device)

    def rate() -> float:
        ran = common.run(command, check=False)
        if ran.status == 2 and "--dtype" in ran.lines[-1][1] + ran.lines[-2][1]:
            return math.nan
        return sample_rate(ran)

    return rate


def whole_window(c: GPTConfig, tokens: int) -> Callable[[], float]:
    """Tokens per second of one row without a KV cache, on a full window."""
    model, ids = GPT(c).to(DEVICE).eval(), torch.randint(c.vocab_size, (1, c.block_size), device=DEVICE)

    @torch.inference_mode()
    def generate_tokens() -> None:
        window = ids
        for _ in range(tokens):
            window = torch.cat((window[:, 1:], model(window)[0][:, -1:].argmax(dim=-1)), dim=1)

    return lambda: tokens / common.seconds(generate_tokens)


def nanogpt(path: str, c: GPTConfig, prompt: int, tokens: int) -> Callable[[], float]:
    """Tokens per second of nanoGPT's generate() from a prompt of `prompt` ids."""
    module = common.nanogpt_module(path)
    shape = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, block_size=c.block_size)
    config = module.GPTConfig(**shape, vocab_size=c.vocab_size, bias=False, dropout=0.0)
    with contextlib.redirect_stdout(sys.stderr):  # it prints its number of parameters
        model = module.GPT(config).to(DEVICE).eval()
    ids = torch.randint(c.vocab_size, (1, prompt), device=DEVICE)
    return lambda: tokens / common.seconds(lambda: model.generate(ids, tokens))


def run_c(path: str, file: Path, folder: Path, tokens: int) -> Callable[[], float]:
    """Tokens per second that run.c reports for the checkpoint's weights."""
    source = common.checkout(path, "run.c") / "run.c"
    compiler = shutil.which("gcc") or shutil.which("cc") or "gcc"
    flags = ["-Ofast", "-fopenmp", "-march=native"]
    subprocess.run([compiler, *flags, "-o", folder / "run", source, "-lm"], check=True)
    vocabulary = to_llama2c(*checkpoint.load(file), folder / "model.bin")
    command = [folder / "run", folder / "model.bin", "-z", vocabulary, "-t", 0, "-n", tokens, "-i", PROMPT]
    return lambda: float(common.run(command).find(r"achieved tok/s: ([\d.]+)")[1][1])


def bits_per_byte(file: Path, dtype: str, data: datasets.Data, eval_tokens: int) -> float:
    model, _ = checkpoint.load(file)
    if dtype == "int8":
        fast_decoding.quantize(model)
    elif dtype in ("float32", "bfloat16", "float16"):
        model.to(getattr(torch, dtype))
    else:
        return math.nan
    return common.bits_per_byte(model, data, model.config.block_size, eval_tokens)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser(__doc__)
    common.nanogpt_option(parser)
    add = parser.add_argument
    add("--llama2c", metavar="PATH", help="a checkout of github.com/karpathy/llama2.c; needs gcc")
    add("--checkpoint", help="a trained run that run.c can read, instead of random weights")
    add("--data", help="a folder written by prepare.py, to score the checkpoint on")
    add("--eval_tokens", type=int, default=65_536, help="validation tokens to score; 0: all")
    add("--streams", type=int, nargs="+", default=[1, 16])
    dtypes = ["float32", "bfloat16", "int8"]
    add(
        "--dtype",
        nargs="+",
        default=dtypes,
        help="passed to sample.py, with --compile for float32-compiled and so on; default %(default)s",
    )
    add("--tokens", type=int, default=500)
    add("--window_tokens", type=int, default=20, help="tokens of the programs without a KV cache")
    add("--n_layer", type=int, default=6)
    add("--n_embd", type=int, default=384, help="6 heads")
    add("--block_size", type=int, default=512)
    options = common.parse(parser, argv)
    c = GPTConfig(options.n_layer, 6, options.n_embd, options.block_size, 4096)
    window_tokens, loss = options.window_tokens, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        own, runs_c = (
            f"{c.n_embd} wide",
            "run.c's weights",
        )  # the first side of each is the baseline
        sides: dict[tuple[str, str], Callable[[], float]] = {}
        if options.nanogpt:
            sides[own, "nanoGPT, full window"] = nanogpt(options.nanogpt, c, c.block_size, window_tokens)
            sides[own, "nanoGPT, from 1 token"] = nanogpt(options.nanogpt, c, 1, options.tokens)
        else:
            sides[own, "ours, without a KV cache"] = whole_window(c, window_tokens)
        files = {own: (save_random(folder / "own.pt", c), options.tokens)}
        if options.llama2c:
            small = GPTConfig(6, 6, 288, 256, 32_000)
            file = checkpoint.find(options.checkpoint or save_random(folder / "small.pt", small))
            count = min(options.tokens, checkpoint.read(file)["model_config"]["block_size"])
            files[runs_c] = file, count
            sides[runs_c, "run.c float32"] = run_c(options.llama2c, file, folder, count)
        for weights, (file, count) in files.items():
            device = DEVICE if weights == own else "cpu"  # like run.c
            for dtype in options.dtype:
                for n in options.streams:
                    name = f"sample.py {dtype}, {n} stream{'s' * (n > 1)}"
                    sides[weights, name] = ours(file, dtype, n, count, device)
        if options.checkpoint and options.data:
            data = datasets.load_data(options.data)
            loss = {
                dtype: bits_per_byte(files[runs_c][0], dtype, data, options.eval_tokens)
                for dtype in options.dtype
                if "-" not in dtype
            }
        measured = common.in_turn(sides, options.repeats)
    rates, rows = common.medians(measured), []
    for (weights, name), rate in rates.items():
        base = next(other for key, other in rates.items() if key[0] == weights)
        runs = measured[weights, name]
        rows.append([weights, name, rate, min(runs), max(runs), rate / base])
    common.table(["weights", "program", "tokens/s", "min", "max", "ratio"], rows)
    for dtype, bpb in loss.items():
        print(f"{options.checkpoint} in {dtype}: {common.show(bpb)} bits per byte")
    keys = ("weights", "program", "tokens_per_s", "least", "most", "times")
    cells = [[None if cell != cell else cell for cell in row] for row in rows]  # JSON has no nan
    common.finish(
        "generation",
        shape=vars(c),
        tokens=options.tokens,
        bits_per_byte=loss,
        rates=[dict(zip(keys, row, strict=True)) for row in cells],
    )


if __name__ == "__main__":
    main()
