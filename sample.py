"""
Generate text from a checkpoint: continue a prompt.

    python sample.py --prompt "Once upon a time"                     # from the newest run
    python sample.py out/tiny --prompt "One day" --num_samples 16    # 16 stories in one batch
    python sample.py --interactive                                   # one prompt per line, and /help
    python sample.py hf:gpt2 --prompt "One day"                      # a model of transformers, or hf:FOLDER
    python sample.py out/fim --prefix "One day, a" --suffix " sang." # the middle, with objective=fim

The model is given end-of-text and the prompt in one forward pass, then one token at a time, with a KV cache.
Generation stops at end-of-text. The prompt and its continuation go to stdout, all other output to stderr.
From Python, use nanostlm/generate.py.
"""

from nanostlm.entry import script  # first, to handle signals during the other imports
import argparse
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial

import torch

from experiments import name_of
from nanostlm import checkpoint, machine, settings
from nanostlm.fast_decoding import column_major, compile_step, quantize
from nanostlm.generate import DEFAULTS, SAMPLERS, chain, check_range, generate, write

MAX_PROMPT = 10_000_000  # bytes
SEPARATOR = "---------------"  # the line between samples


def parse(argv: list[str]) -> argparse.Namespace:
    """The options. ValueError if one is unknown or invalid."""
    parser = settings.Parser(
        description="Generate text from a checkpoint.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "run",
        nargs="?",
        metavar="RUN",
        help="run directory, checkpoint file or hf:FOLDER_OR_ID; none: the newest run in out/",
    )
    add("--out_dir", help="the same as RUN")
    add(
        *("--prompt", "--start"),
        default="",
        help="beginning of the text; FILE:PATH reads it from a file, - from stdin "
        "(without one final line break)",
    )
    add("--prefix", help="write what follows this text, without a space at its end, and precedes --suffix")
    add("--suffix", help="write what precedes this text (of models trained with objective=fim)")
    add("--num_samples", type=int, default=1, help="number of texts, generated in one batch")
    add("--max_new_tokens", type=int, default=500, help="maximum length of the continuation in tokens")
    add("--temperature", type=float, default=DEFAULTS["temperature"], help="0: the most likely token")
    add("--top_k", type=int, default=0, help="sample from the K most likely tokens; 0: off")
    add(
        "--top_p",
        type=float,
        default=DEFAULTS["top_p"],
        help="nucleus sampling: the smallest set of tokens with total probability P; 1: off",
    )
    add("--min_p", type=float, default=0.0, help="only tokens at least P times as likely as the likeliest")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: repeated tokens become less likely")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    add("--seed", type=int, default=1337, help="a different seed gives different text")
    add("--device", default="auto", help="cpu, cuda, cuda:1 or mps; auto: cuda, else mps, else cpu")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16", "int8"],
        help="dtype of the weights; auto: bfloat16 on CUDA GPUs that support it, else float32; "
        "int8: quantize the linear layers (CPU only)",
    )
    add("--compile", action="store_true", help="compile the decoding step, for long texts or many prompts")
    add(
        "--interactive",
        action="store_true",
        help="read one prompt per line; Ctrl-C stops a story, Ctrl-D exits",
    )
    options = parser.parse_args(argv)
    if options.run and options.out_dir:
        parser.error("RUN and --out_dir are mutually exclusive")
    for name, most in (("num_samples", 100_000), ("max_new_tokens", 1_000_000)):
        n = getattr(options, name)
        check_range(name, n, 1 <= n <= most, f"between 1 and {most:,}")
    options.fill = options.prefix is not None or options.suffix is not None
    if options.fill and (options.prompt or options.interactive):
        parser.error("--prefix and --suffix write a middle: leave out --prompt and --interactive")
    options.sampling = {name: getattr(options, name) for name in SAMPLERS}
    chain(**options.sampling)  # rejects invalid values before the model is loaded
    if options.interactive and (options.prompt or options.num_samples > 1):
        parser.error(
            "--interactive reads its prompts from the keyboard: leave out --prompt and --num_samples"
        )
    return options


def read_prompt(prompt: str) -> str:
    """The prompt: the option's text, the contents of a file, or stdin."""
    if prompt != "-" and not prompt.startswith("FILE:"):
        return prompt
    path = prompt.removeprefix("FILE:")
    try:
        if prompt != "-":
            settings.check_path("the prompt's file", path, "file")
        with nullcontext(sys.stdin.buffer) if prompt == "-" else open(path, "rb") as file:
            text = file.read(MAX_PROMPT + 1)
        if len(text) > MAX_PROMPT:
            raise ValueError(f"the prompt from {prompt} has more than {MAX_PROMPT:,} bytes")
        return text.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt from {prompt} is not UTF-8") from error


def print_samples(writer: Callable, prompts: list[str], seed: int) -> None:
    """Print the samples on stdout, a single one token by token, and the speed on stderr."""
    pieces = writer(prompts, seed=seed)
    began, texts = time.perf_counter(), list(prompts)
    n_tokens = -len(prompts)  # the last piece of each text is not a token
    single = len(prompts) == 1
    if single:
        print(prompts[0], end="", flush=True)
    try:
        for row, piece in pieces:
            n_tokens += 1
            texts[row] += piece
            if single:
                print(piece, end="", flush=True)
    finally:
        print("" if single else f"\n{SEPARATOR}\n".join(texts), flush=True)
    seconds = time.perf_counter() - began
    print(f"{n_tokens:,} tokens in {seconds:.2f} s: {n_tokens / seconds:,.0f} tokens/s", file=sys.stderr)


HELP = """\
/again            sample again from the last prompt
/temperature T    sample at temperature T from now on; 0: the most likely tokens
/help             this text
Ctrl-C stops a story, Ctrl-D exits. Any other line is a prompt."""


def converse(writer: Callable, seed: int) -> None:
    """Read prompts from stdin and continue each; the seed increases by 1 per prompt."""
    with suppress(ImportError):
        import readline  # noqa: F401  enables line editing and history in input()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    marker, prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else "", ""
    while True:
        try:
            line = input(marker)
            command, *words = line.split() or [""]
            if not command.startswith("/"):
                prompt = line
            elif command == "/temperature" and len(words) == 1:
                temperature = settings.convert("/temperature", float, words[0])
                chain(temperature=temperature)  # rejects invalid values
                writer = partial(writer, temperature=temperature)
                continue
            elif command != "/again" or words:
                print(HELP, file=sys.stderr)
                continue
            print_samples(writer, [prompt], seed)
            seed += 1
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            return


@script
def main(argv: list[str]) -> None:
    options = parse(argv)
    prompt = read_prompt(options.prompt or options.prefix or "")
    suffix = read_prompt(options.suffix or "") if options.fill else None
    path = options.out_dir if options.run is None else options.run
    theirs = str(path).startswith("hf:")
    refused = ["--compile"] * options.compile + ["--dtype int8"] * (options.dtype == "int8")
    refused += ["--suffix"] * options.fill
    if theirs and refused:
        raise ValueError(f"{' and '.join(refused)}: for models of this project only, not for {path}")
    path = path if theirs else checkpoint.find(path)
    device = machine.choose_device(options.device)
    dtype = machine.inference_dtype(options.dtype, device)
    if theirs:
        from experiments import hf

        model, tokenizer = hf.load(path, device, dtype)
    else:
        model, tokenizer = checkpoint.load(path, device)
    if options.compile and (kind := name_of(model)) != "gpt":
        raise ValueError(f"--compile is not for architecture={kind}")
    size, kind = model.config.estimate()["parameters"] / 1e6, str(dtype).removeprefix("torch.")
    print(f"{path}: {size:.1f}M parameters, {tokenizer.name}, {kind} on {device}", file=sys.stderr)
    c, step = model.config, None
    cache = 2 * c.n_layer * c.kv_heads * c.head_dim * c.block_size * dtype.itemsize  # bytes of a sample's
    machine.check_memory(c, device, options.num_samples * cache)
    if dtype == torch.int8:
        quantize(model)
    else:
        model.to(dtype)
    if options.compile:
        began = time.perf_counter()
        step = compile_step(model)
        ids = [tokenizer.encode(prompt)] * options.num_samples
        try:
            generate(model, ids, 2, eot=tokenizer.eot, step=step)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise RuntimeError(f"--compile failed: {machine.compile_failure(error)}") from error
        print(f"compiled in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    elif dtype != torch.int8:
        column_major(model)
    arguments = dict(max_new_tokens=options.max_new_tokens, stop=options.stop, step=step, suffix=suffix)
    writer = partial(write, model, tokenizer, **arguments, **options.sampling)
    if options.interactive:
        converse(writer, options.seed)
    else:
        print_samples(writer, [prompt] * options.num_samples, options.seed)


if __name__ == "__main__":
    sys.exit(main())
