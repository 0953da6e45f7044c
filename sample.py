"""
Text from a trained model: a checkpoint and a prompt in, a story out.

    python sample.py --prompt "Once upon a time there was a pumpkin."    # the newest run tells a story
    python sample.py --prompt "The dog" --num_samples 16 --seed 7        # 16 stories in one batch
    python sample.py --interactive                                       # a prompt a line; Ctrl-D leaves

The model is fed end-of-text and the prompt in one pass, then one token at a time; keys and values stay in a
cache. A text ends where the model says end-of-text. Prompt and continuation go to stdout, all else to stderr.

From Python: `stories` gives texts; `generate` and `stream` go from ids to ids and take any samplers. A
sampler is a function (logits (B, vocab_size), history (B, T)) -> logits. `history` is what the model was fed:
it begins with end-of-text, which also pads the left of shorter prompts.
"""

import argparse
import codecs
import difflib
import itertools
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from model import GPT
from nanostlm import checkpoint
from nanostlm.kv_cache import KVCache

Sampler = Callable[[Tensor, Tensor], Tensor]  # (logits, history) -> logits
Stop = Callable[[list[int]], bool]  # a row's new ids -> whether it ends with the last of them


# ----------------------------------------------------------------------------------------------------------
# Samplers. A token that they rule out gets -inf; each row is on its own.


def temperature(t: float) -> Sampler:
    """Divide the logits by t. At 0: greedy, the likeliest token alone (of equal ones, the lowest id)."""
    check("temperature", t, 0 <= t < math.inf, "0 (greedy) or more")

    def sampler(logits: Tensor, history: Tensor) -> Tensor:
        return (logits - logits.amax(-1, keepdim=True)) / t  # at most 0, so nothing overflows

    return sampler if t else greedy


def greedy(logits: Tensor, history: Tensor) -> Tensor:
    """temperature(0)."""
    return torch.full_like(logits, -torch.inf).scatter(-1, logits.argmax(-1, keepdim=True), 0.0)


def top_k(k: int) -> Sampler:
    """Keep the k likeliest tokens and all that equal the k-th, as nanoGPT does (arXiv 1805.04833)."""
    check("top_k", k, k >= 0, "0 (all of them) or more")

    def sampler(logits: Tensor, history: Tensor) -> Tensor:
        least = logits.topk(min(k or logits.shape[-1], logits.shape[-1])).values[..., -1:]
        return logits.masked_fill(logits < least, -torch.inf)

    return sampler


def top_p(p: float) -> Sampler:
    """
    Keep the likeliest tokens until their probabilities sum to p, one at least (arXiv 1904.09751), and all
    that equal the last of them, so that nothing hangs on how a sort breaks ties.
    """
    check("top_p", p, 0 <= p <= 1, "between 0 and 1")
    enough = p - 1e-6 if p < 1 else math.inf  # a sum may fall short of p by rounding alone

    def sampler(logits: Tensor, history: Tensor) -> Tensor:
        total, size, V = logits.logsumexp(-1, keepdim=True), 256, logits.shape[-1]
        while True:  # a few hundred tokens nearly always suffice, and finding them is faster than sorting all
            values = logits.topk(min(size, V)).values
            mass = (values - total).exp().cumsum(-1)
            if size >= V or bool((mass[..., -1] >= enough).all()):
                break
            size *= 8
        last = (mass < enough).sum(-1, keepdim=True).clamp(max=values.shape[-1] - 1)
        return logits.masked_fill(logits < values.gather(-1, last), -torch.inf)

    return sampler


def min_p(p: float) -> Sampler:
    """Keep the tokens that are at least p times as likely as the likeliest (arXiv 2407.01082)."""
    check("min_p", p, 0 <= p <= 1, "between 0 and 1")
    drop = math.log(p) if p else -math.inf

    def sampler(logits: Tensor, history: Tensor) -> Tensor:
        return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + drop, -torch.inf)

    return sampler


def repetition_penalty(penalty: float) -> Sampler:
    """
    Divide positive logits of tokens in the history by the penalty, multiply negative ones (CTRL, arXiv
    1909.05858); signs matter, so this goes before temperature. End-of-text, with which every history begins,
    is spared, or no story would end.
    """
    check("repetition_penalty", penalty, 0 < penalty < math.inf, "more than 0 (1 changes nothing)")

    def sampler(logits: Tensor, history: Tensor) -> Tensor:
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, history, True)
        seen.scatter_(-1, history[:, :1], False)
        return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    return sampler


SAMPLERS = {  # in the order in which they apply: name -> (the function, the value that changes nothing)
    "repetition_penalty": (repetition_penalty, 1),
    "temperature": (temperature, 1),
    "top_k": (top_k, 0),
    "top_p": (top_p, 1),
    "min_p": (min_p, 0),
}
DEFAULTS = {"temperature": 0.8, "top_p": 0.95}


def chain(**settings: float) -> list[Sampler]:
    """The samplers of such settings as top_k=5, in their order; DEFAULTS for what is not given, else off."""
    unknown = settings.keys() - SAMPLERS
    if unknown:
        raise ValueError(f"there is no sampler {', '.join(unknown)}: there are {', '.join(SAMPLERS)}")
    settings = DEFAULTS | settings
    on = {name: settings[name] for name, (_, off) in SAMPLERS.items() if settings.get(name, off) != off}
    chosen = [SAMPLERS[name][0](value) for name, value in on.items()]
    return chosen[: chosen.index(greedy) + 1] if greedy in chosen else chosen  # after it there is no choice


def check(name: str, value: float, good: bool, want: str) -> None:
    if not good:
        raise ValueError(f"{name} must be {want}, not {value}")


def draw(logits: Tensor, chance: list[random.Random]) -> Tensor:
    """An id for each row of logits (B, V), by the next number of the row's own generator: (B, 1)."""
    sums = logits.softmax(-1).cumsum(-1)
    u = torch.tensor([[generator.random()] for generator in chance], device=logits.device)
    u = u.clamp(max=1 - 2**-23)  # it may have been rounded to 1, where only tokens of probability 0 are
    return torch.searchsorted(sums, u * sums[:, -1:], right=True)


def stop_string(tokenizer, text: str) -> Stop:
    """Whether `text` has just come up in a row, in one token or over several."""
    if not text:
        raise ValueError("a stop string must not be empty")
    found = text.encode()
    return lambda ids: found in tokenizer.decode_bytes(ids[-len(found) :])  # a token is a byte or more


# ----------------------------------------------------------------------------------------------------------
# From ids to ids


class RowLinear(torch.nn.Linear):
    """
    A linear layer for compiled steps on a CPU: with a single row its product is a loop that the compiler
    writes, faster than the library's, in which weights of 16 bits meet activations in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() or x.numel() > x.shape[-1]:
            return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)
        y = (x.unsqueeze(-2) * self.weight.to(x.dtype)).sum(dim=-1)
        return y if self.bias is None else y + self.bias


def widen(x: Tensor) -> Tensor:
    """In float32 or more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def compile_step(model: GPT, **settings) -> None:
    """
    From now on, generation runs the step of a token through torch.compile; the prompt as before. Nothing of
    the model but its weights' values may change then.
    """
    if next(model.parameters()).device.type == "cpu":
        linear = [part for part in model.modules() if type(part) in (torch.nn.Linear, RowLinear)]
        stored = {id(p) for part in linear for p in part.parameters()}
        for part in linear:
            part.__class__ = RowLinear
        for p in model.parameters():
            p.data = p.data if id(p) in stored else widen(p.data)
        model.embedder.register_forward_hook(lambda part, given, x: widen(x))  # it may be a tied head's
        if not settings:  # a small model's step takes less time than calling its kernels from Python would
            trust = torch.compiler.skip_guard_on_all_nn_modules_unsafe
            settings = {"options": {"cpp_wrapper": True, "guard_filter_fn": trust}}
    step = torch.compile(model.forward, dynamic=False, fullgraph=True, isolate_recompiles=True, **settings)
    model.compiled_step = step  # isolated: it must never be another model's


class Batch:
    """Lines of ids that grow by a token at a time, and the cache of what the model made of them so far."""

    def __init__(self, model: GPT, prompts: Sequence[Sequence[int]], eot: int):
        self.model, self.context = model, model.config.block_size
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        fed = [[eot, *prompt[max(0, len(prompt) - self.context + 1) :]] for prompt in prompts]
        self.lengths = [len(ids) for ids in fed]  # so many of a line's last tokens count
        padded = [[eot] * (max(self.lengths) - len(ids)) + ids for ids in fed]
        self.history = torch.tensor(padded, device=self.device)  # (B, T)
        self.alike = all(ids == fed[0] for ids in fed)
        self.cache, self.step = None, getattr(model, "compiled_step", None)

    def logits(self) -> Tensor:
        """Of the token to come: (B, vocab_size)."""
        if self.cache is None:
            logits = self.prefill()
        else:
            # a copy, for the strides of a slice grow with the history, and each would be compiled anew
            last = self.history[:, -1:].clone(memory_format=torch.contiguous_format)
            logits = (self.step or self.model)(last, cache=self.cache)[0]
        return logits[:, -1].float()

    def prefill(self) -> Tensor:
        """A new cache, and all that there is into it in one pass; lines that are alike go in once."""
        T, lines = max(self.lengths), 1 if self.alike else len(self.lengths)
        start = torch.tensor([T - n for n in self.lengths[:lines]], device=self.device)  # padding ends here
        padded = len(set(self.lengths[:lines])) > 1
        segments = (torch.arange(T, device=self.device) >= start[:, None]).long()
        self.cache = KVCache(self.model.config, lines, self.device, self.dtype, segmented=False)
        idx = self.history[:lines, -T:]
        given = {"segments": segments} if padded else {}
        logits = self.model(idx, cache=self.cache, last=True, **given)[0]
        if not logits[:, -1].isfinite().all():
            raise RuntimeError("the logits are not finite: the training diverged, or the dtype is too narrow")
        if self.alike:
            logits = logits.expand(len(self.lengths), -1, -1)
            self.cache.select([0] * len(self.lengths))
            self.alike = False
        if self.step is not None:
            self.cache = self.cache.static()
        return logits

    def append(self, ids: Tensor) -> None:
        """One more id for every line: ids (B, 1). Absolute positions may come to their end here."""
        self.history = torch.cat((self.history, ids), dim=1)
        self.lengths = [n + 1 for n in self.lengths]
        if self.model.config.position in ("learned", "sinusoidal") and max(self.lengths) > self.context:
            half = max(1, self.context // 2)
            self.lengths = [half if n > self.context else n for n in self.lengths]
            self.cache = None

    def select(self, lines: list[int]) -> None:
        """Go on with these lines alone."""
        self.history, self.lengths = self.history[lines], [self.lengths[line] for line in lines]
        if self.cache is not None:
            self.cache.select(lines)


@torch.inference_mode()
def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    samplers: Sequence[Sampler] = (),
    *,
    eot: int,
    seed: int = 1337,
    stops: Sequence[Stop] = (),
) -> Iterator[list[tuple[int, int]]]:
    """
    Go on from each prompt, a list of ids that may be empty. Each step yields pairs (row, new id), one for
    each row that still runs; a row ends at end-of-text, which is not yielded, or where one of `stops` says.
    Row i draws from its own generator, (seed, i): in float32 it is the same whatever else is in the batch.

    A prompt longer than the context keeps its end. Past the context's end relative positions (rope, shaw,
    alibi, none) go on, each token seeing the block_size tokens up to itself; absolute ones (learned,
    sinusoidal) keep the last block_size // 2 tokens and start afresh from them.
    """
    if not prompts:
        return
    longest, context = max(map(len, prompts)), model.config.block_size
    if longest >= context:
        message = f"a prompt of {longest} tokens is too long: only its last {context - 1} are used, which"
        warnings.warn(f"{message} after end-of-text fill the context of {context}", stacklevel=2)
    rows = list(range(len(prompts)))  # the row in each line of the batch
    running, said = set(rows), [[] for _ in rows]
    chance = [random.Random(f"{seed} {row}") for row in rows]
    sure = bool(samplers) and samplers[-1] is greedy  # no need to draw then
    training = model.training
    model.eval()
    try:
        batch = Batch(model, prompts, eot)
        for _ in range(max_new_tokens):
            logits = batch.logits()
            for sampler in samplers[:-1] if sure else samplers:
                logits = sampler(logits, batch.history)
            ids = logits.argmax(-1, keepdim=True) if sure else draw(logits, [chance[row] for row in rows])
            batch.append(ids)
            step = [(row, i) for row, i in zip(rows, ids[:, 0].tolist(), strict=True) if row in running]
            for row, i in step:
                said[row].append(i)
                if i == eot or any(stop(said[row]) for stop in stops):
                    running.remove(row)
            yield [(row, i) for row, i in step if i != eot]
            if not running:
                return
            # half of the lines are done: leave them behind, if no smaller step has to be compiled for that
            if 2 * len(running) <= len(rows) and batch.step is None:
                lines = [line for line, row in enumerate(rows) if row in running]
                batch.select(lines)
                rows = [rows[line] for line in lines]
    finally:
        model.train(training)


def generate(model: GPT, prompts: Sequence[Sequence[int]], *arguments, **keywords) -> list[list[int]]:
    """The new ids of each prompt, all at once; the arguments are those of `stream`."""
    rows = [[] for _ in prompts]
    for step in stream(model, prompts, *arguments, **keywords):
        for row, i in step:
            rows[row].append(i)
    return rows


# ----------------------------------------------------------------------------------------------------------
# From text to text


class Story:
    """A row's text while its ids come: never half a character, nothing from a stop string on."""

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop, self.held = tokenizer, [text.encode() for text in stop], b""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, i: int) -> str:
        """What can be shown after one more id; what may turn out to begin a stop string is held back."""
        self.held += self.tokenizer.decode_bytes([i])
        found = [at for text in self.stop if (at := self.held.find(text)) >= 0]
        if found:
            ready, self.held = self.held[: min(found)], b""
        else:
            begun = (n for text in self.stop for n in range(len(text)) if self.held.endswith(text[:n]))
            cut = len(self.held) - max(begun, default=0)
            ready, self.held = self.held[:cut], self.held[cut:]
        return self.decoder.decode(ready)

    def end(self) -> str:
        """What was held back, when no more ids come; the half of a character at the very end is left out."""
        return self.decoder.decode(self.held)


def write(
    model: GPT,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 500,
    *,
    stop: Sequence[str] = (),
    seed: int = 1337,
    **settings,
) -> Iterator[tuple[int, str]]:
    """Go on from each prompt: pairs (row, piece of text) as tokens come; `settings` are those of `chain`."""
    samplers, stops = chain(**settings), [stop_string(tokenizer, text) for text in stop]
    ids, stories = [tokenizer.encode(prompt) for prompt in prompts], [Story(tokenizer, stop) for _ in prompts]

    def pieces():  # apart, so that what is wrong with the arguments shows at the call
        for step in stream(model, ids, max_new_tokens, samplers, eot=tokenizer.eot, seed=seed, stops=stops):
            yield from ((row, stories[row].add(i)) for row, i in step)
        yield from ((row, story.end()) for row, story in enumerate(stories))

    return pieces()


def stories(model: GPT, tokenizer, prompt: str = "", n: int = 1, *arguments, **keywords) -> list[str]:
    """n texts from one prompt, which they begin with, in one batch; the arguments are those of `write`."""
    texts = [prompt] * n
    for row, piece in write(model, tokenizer, [prompt] * n, *arguments, **keywords):
        texts[row] += piece
    return texts


# ----------------------------------------------------------------------------------------------------------
# The command line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line's settings. ValueError where it is wrong."""

    def wrong(message: str):
        raise ValueError(message)

    parser = argparse.ArgumentParser(
        prog="sample.py", allow_abbrev=False, description="A trained model goes on from a prompt.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.error = wrong
    add = parser.add_argument
    add("--prompt", default="", help="how the text begins; FILE:PATH takes it from a file, - from stdin "
        "(without one line break at the end)")  # fmt: skip
    add("--out_dir", help="a run's folder, or one checkpoint file; without it, the newest run in out/")
    add("--num_samples", type=int, default=1, help="texts to write, all in one batch")
    add("--max_new_tokens", type=int, default=500, help="a text ends here, if not earlier at end-of-text")
    add("--temperature", type=float, default=DEFAULTS["temperature"], help="0: the likeliest token")
    add("--top_k", type=int, default=0, help="draw from the K likeliest tokens; 0: from all")
    add(
        "--top_p", type=float, default=DEFAULTS["top_p"], help="draw from the likeliest P of all; 1: from all"
    )
    add("--min_p", type=float, default=0.0, help="only what is P times as likely as the likeliest")
    add("--repetition_penalty", type=float, default=1.0, help="above 1, what was said becomes less likely")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    add("--seed", type=int, default=1337, help="the same seed gives the same text, another another")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto: cuda, else mps, else cpu")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16", "int8"],
        help="of the weights; auto: bfloat16 on CUDA GPUs that have it, else float32; "
        "int8: of the linear layers, on a CPU only")  # fmt: skip
    add(
        "--compile",
        action="store_true",
        help="compile the step of a token; pays for a long text or many in turn",
    )
    add("--interactive", action="store_true", help="a prompt a line; Ctrl-C stops a story, Ctrl-D leaves")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        name, names = unknown[0].split("=")[0], [f"--{name}" for name in vars(options)]
        near = difflib.get_close_matches(name, names, 1)
        wrong(f"there is no {name}; {f'did you mean {near[0]}?' if near else 'see python sample.py --help'}")
    for name in ("num_samples", "max_new_tokens"):
        check(name, getattr(options, name), getattr(options, name) >= 1, "1 or more")
    chain(**{name: getattr(options, name) for name in SAMPLERS})  # refuses bad values
    if options.interactive and (options.prompt or options.num_samples > 1):
        wrong("--interactive reads its prompts from the keyboard: leave out --prompt and --num_samples")
    return options


def read_prompt(prompt: str) -> str:
    """The text that --prompt stands for."""
    try:
        if prompt == "-":
            return sys.stdin.buffer.read().decode().removesuffix("\n")
        if prompt.startswith("FILE:"):
            return Path(prompt.removeprefix("FILE:")).read_bytes().decode().removesuffix("\n")
    except OSError as error:
        raise ValueError(f"the prompt cannot be read from {prompt}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt from {prompt} is not UTF-8") from error
    return prompt


def choose(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What --device and --dtype stand for on this machine. ValueError where it has no such device."""
    if device == "auto":
        found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        device = next(name for name in found if found[name])
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {device} here: {str(error).splitlines()[0]}") from error
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"
    if dtype == "int8" and not (device == "cpu" and hasattr(torch.ops.aten, "_weight_int8pack_mm")):
        raise ValueError("--dtype int8 needs --device cpu and a PyTorch that has its kernel")
    return torch.device(device), getattr(torch, dtype)


class Int8Linear(torch.nn.Module):
    """A linear layer with weights of 8 bits: whole numbers, and a scale for each row."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1).clamp(min=1e-20) / 127).bfloat16()  # the kernel wants it so
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > 16:  # a prompt: the kernel, made for a few rows, is slower than floats
            return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale[:, None], self.bias)
        y = torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale)
        y = y.view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias


def quantize(model: GPT) -> None:
    """
    Weights of 8 bits in the linear layers, the head too: a CPU reads a quarter as much for each token. Those
    whose sides are no multiples of 16, as LoRA's ranks, stay: the kernel would read past their end.
    """
    made = {}  # a layer that several blocks share stays one
    for name, part in list(model.named_modules(remove_duplicate=False)):
        if isinstance(part, torch.nn.Linear) and not any(side % 16 for side in part.weight.shape):
            model.set_submodule(name, made.setdefault(id(part), Int8Linear(part)))


def lay_out(model: GPT) -> None:
    """
    Lay matrices out by column, in which a CPU multiplies one row by them faster: the same
    numbers, in another order in memory. Not for a model that goes on training: its optimizer would lag.
    """
    for weight in model.parameters():
        if weight.ndim == 2 and weight.device.type == "cpu":
            weight.data = weight.data.t().contiguous().t()


def tell(model: GPT, tokenizer, prompts: list[str], seed: int, options: argparse.Namespace) -> None:
    """Write the samples to stdout, a single one while it comes; the rate to stderr."""
    settings = {name: getattr(options, name) for name in SAMPLERS} | {"stop": options.stop, "seed": seed}
    pieces = write(model, tokenizer, prompts, options.max_new_tokens, **settings)
    begun, texts = time.perf_counter(), list(prompts)
    count = -len(prompts)  # the last piece of each text is no token
    alone = len(prompts) == 1
    if alone:
        print(prompts[0], end="", flush=True)
    try:
        for row, piece in pieces:
            count += 1
            texts[row] += piece
            if alone:
                print(piece, end="", flush=True)
    finally:
        print("" if alone else "\n---------------\n".join(texts), flush=True)
    seconds = time.perf_counter() - begun
    print(f"{count:,} tokens in {seconds:.2f} s: {count / seconds:,.0f} tokens/s", file=sys.stderr)


def converse(model: GPT, tokenizer, options: argparse.Namespace) -> None:
    """A prompt, its story, the next prompt; seed + 1, + 2, ..., so that asking again gives another story."""
    with suppress(ImportError):
        import readline  # noqa: F401  lets input() know the arrow keys
    marker = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    for seed in itertools.count(options.seed):
        try:
            tell(model, tokenizer, [input(marker)], seed, options)
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except EOFError:
            return


def run(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    prompt = read_prompt(options.prompt)
    path = checkpoint.find(options.out_dir or checkpoint.newest_run())
    device, dtype = choose(options.device, options.dtype)
    model, tokenizer = checkpoint.load(path, device)
    size = model.config.estimate()["parameters"] / 1e6
    print(f"{path}: {size:.1f}M parameters, {tokenizer.name}, {str(dtype)[6:]} on {device}", file=sys.stderr)
    if dtype == torch.int8:
        quantize(model)
    elif options.compile:
        model.to(dtype)
    else:
        lay_out(model.to(dtype))
    if options.compile:
        compile_step(model)
        begun, lines = time.perf_counter(), [tokenizer.encode(prompt)] * options.num_samples
        generate(model, lines, 2, eot=tokenizer.eot)
        print(f"compiled in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    if options.interactive:
        converse(model, tokenizer, options)
    else:
        tell(model, tokenizer, [prompt] * options.num_samples, options.seed, options)


def main(arguments: list[str] | None = None) -> int:
    """run(), and the exit status: 1 the machine failed, 2 a mistake in what was given, 130 Ctrl-C."""
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(encoding="utf-8", errors="replace")
    try:
        run(arguments)
        return 0
    except BrokenPipeError:  # as with "| head": the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, FileNotFoundError) as error:
        status, reason = 2, error
    except (OSError, RuntimeError, MemoryError) as error:
        status, reason = 1, error
    print(f"sample.py: {' '.join(str(reason).split()) or type(reason).__name__}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
