"""
Text generation: samplers, batched decoding with a KV cache, and streaming.

    model, tokenizer = checkpoint.load("out/tiny")
    texts = stories(model, tokenizer, "Once upon a time", n=3, temperature=0.9)

`write` and `stories` map text to text; `stream` and `generate` map token ids to token ids and take any
samplers. A sampler is a function (logits (B, vocab_size), history (B, T)) -> logits. `history` holds the ids
that were given to the model: it begins with end-of-text, which also pads shorter prompts on the left.
"""

import codecs
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model import GPT, GPTConfig
from nanostlm.kv_cache import KVCache

Sampler = Callable[[Tensor, Tensor], Tensor]  # (logits, history) -> logits
Stop = Callable[[list[int]], bool]  # the new ids of a row -> whether the row ends after the last of them


# ----------------------------------------------------------------------------------------------------------
# Samplers: each sets the logits of the tokens that it excludes to -inf, independently for each row


def temperature(t: float) -> Sampler:
    """Divide the logits by t. Below 1e-5: the most likely token (the lowest id among equals)."""
    check_range("temperature", t, 0 <= t <= 1e6, "0 (greedy) to 1e6")

    def sampler(logits: Tensor, history: Tensor) -> Tensor:
        return (logits - logits.amax(-1, keepdim=True)) / t  # subtract the maximum to prevent overflow

    return sampler if t >= 1e-5 else greedy


def greedy(logits: Tensor, history: Tensor) -> Tensor:
    """Keep only the most likely token, like temperature(0)."""
    return torch.full_like(logits, -torch.inf).scatter(-1, *logits.max(-1, keepdim=True)[::-1])


def top_k(k: int) -> Sampler:
    """Keep the k most likely tokens and any tied with the k-th, as nanoGPT does (arXiv 1805.04833)."""
    check_range("top_k", k, k >= 0, "0 (all of them) or more")

    def sampler(logits: Tensor, history: Tensor) -> Tensor:
        least = logits.topk(min(k or logits.shape[-1], logits.shape[-1])).values[..., -1:]
        return logits.masked_fill(logits < least, -torch.inf)

    return sampler


def top_p(p: float) -> Sampler:
    """
    Nucleus sampling (arXiv 1904.09751): keep the smallest set of most likely tokens with a total probability
    of at least p. Tokens tied with the last one stay, so that the result does not depend on the sort.
    """
    check_range("top_p", p, 0 <= p <= 1, "between 0 and 1")
    target = p - 1e-6 if p < 1 else math.inf  # rounding may leave the sum slightly below p

    def sampler(logits: Tensor, history: Tensor) -> Tensor:
        total, size, V = logits.logsumexp(-1, keepdim=True), 256, logits.shape[-1]
        while True:  # a few hundred tokens are nearly always enough, and topk is faster than a full sort
            values = logits.topk(min(size, V)).values
            mass = (values - total).exp().cumsum(-1)
            if size >= V or bool((mass[..., -1] >= target).all()):
                break
            size *= 8
        last = (mass < target).sum(-1, keepdim=True).clamp(max=values.shape[-1] - 1)
        return logits.masked_fill(logits < values.gather(-1, last), -torch.inf)

    return sampler


def min_p(p: float) -> Sampler:
    """Keep tokens at least p times as likely as the most likely one (arXiv 2407.01082)."""
    check_range("min_p", p, 0 <= p <= 1, "between 0 and 1")
    margin = math.log(p) if p else -math.inf

    def sampler(logits: Tensor, history: Tensor) -> Tensor:
        return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + margin, -torch.inf)

    return sampler


def repetition_penalty(penalty: float) -> Sampler:
    """
    Divide the positive logits of tokens in the history by the penalty and multiply the negative ones by it
    (CTRL, arXiv 1909.05858). It depends on the signs, so it is applied before temperature. End-of-text is
    exempt: every history begins with it, and penalizing it would keep texts from ending.
    """
    check_range("repetition_penalty", penalty, 1e-3 <= penalty <= 1e3, "between 0.001 and 1000 (1 is off)")

    def sampler(logits: Tensor, history: Tensor) -> Tensor:
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, history, True)
        seen.scatter_(-1, history[:, :1], False)
        return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)

    return sampler


SAMPLERS = {  # in the order of application: name -> (function, the neutral value)
    "repetition_penalty": (repetition_penalty, 1),
    "temperature": (temperature, 1),
    "top_k": (top_k, 0),
    "top_p": (top_p, 1),
    "min_p": (min_p, 0),
}
DEFAULTS = {"temperature": 1.0, "top_p": 0.9}  # chosen by evaluate.py --sweep: see RESULTS.md


def chain(**sampling: float) -> list[Sampler]:
    """The samplers for settings such as top_k=5, in order. A missing setting has its value in DEFAULTS."""
    if unknown := sampling.keys() - SAMPLERS:
        raise ValueError(f"there is no sampler {', '.join(unknown)}: there are {', '.join(SAMPLERS)}")
    values = {name: off for name, (_, off) in SAMPLERS.items()} | DEFAULTS | sampling
    samplers = [make(values[name]) for name, (make, off) in SAMPLERS.items() if values[name] != off]
    if greedy in samplers:  # one token is left, so later samplers have no effect
        del samplers[samplers.index(greedy) + 1 :]
    return samplers


def check_range(name: str, value: float, valid: bool, wanted: str) -> None:
    if not valid:
        raise ValueError(f"{name} must be {wanted}, not {value}")


def draw(logits: Tensor, rngs: Sequence[random.Random] | None) -> Tensor:
    """
    Sample one id for each row of logits (B, vocab_size), with the row's own generator -> (B, 1). Without
    generators, the most likely ids. RuntimeError if a row has NaN or inf, which samplers keep, or only -inf.
    """
    if rngs is None:
        total, ids = logits.max(-1, keepdim=True)
    else:
        cdf = logits.softmax(-1).cumsum(-1)
        u, total = torch.tensor([[rng.random()] for rng in rngs], device=logits.device), cdf[:, -1:]
        u = u.clamp(max=1 - 2**-23)  # float32 may round it to 1, which selects a token of probability 0
        ids = torch.searchsorted(cdf, u * total, right=True)
    if not all(map(math.isfinite, total.flatten().tolist())):  # an id may be past the vocabulary
        raise RuntimeError("the logits are not finite: the training diverged, or the dtype is too narrow")
    return ids


def stop_string(tokenizer, text: str) -> Stop:
    """Stop as soon as a row's new text contains `text`, within one token or across several."""
    if not text:
        raise ValueError("a stop string must not be empty")
    stop = text.encode()
    return lambda ids: stop in tokenizer.decode_bytes(ids[-len(stop) :])  # each token is at least one byte


# ----------------------------------------------------------------------------------------------------------
# Token ids to token ids


class Batch:
    """
    Sequences that grow by one token per step, and the cache of their tokens: a KVCache for GPT, what
    new_cache(rows) returns for a model with this method, else none. A cache is given to the model as `cache`
    and has select(rows). A model without one is causal, and each step computes all tokens anew.
    """

    def __init__(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], eot: int, step: Callable | None = None
    ):
        c = model.config
        self.model, self.step, self.context = model, step, c.block_size
        self.slides = isinstance(c, GPTConfig) and c.position not in ("learned", "sinusoidal")
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        ids = [[eot, *prompt[max(0, len(prompt) - self.context + 1) :]] for prompt in prompts]
        self.lengths = [len(row) for row in ids]  # number of tokens of the history that each row attends to
        padded = [[eot] * (max(self.lengths) - len(row)) + row for row in ids]
        self.history = torch.tensor(padded, device=self.device)  # (B, T)
        self.identical = all(row == ids[0] for row in ids)
        separator = getattr(c, "separator", -1)
        self.separator = separator if any(separator in row[1:] for row in ids) else -1
        self.cache: Any = None

    def new_cache(self, rows: int) -> Any:
        if hasattr(self.model, "new_cache"):
            return self.model.new_cache(rows)
        if isinstance(self.model.config, GPTConfig):
            return KVCache(self.model.config, rows, self.device, self.dtype, segmented=False)
        return None

    def logits(self) -> Tensor:
        """Logits of the next token: (B, vocab_size), in float32."""
        if self.cache is None:
            logits = self.prefill()
        else:
            # a contiguous copy: the strides of a slice grow with the history, and each would be compiled anew
            last = self.history[:, -1:].clone(memory_format=torch.contiguous_format)
            logits = (self.step or self.model)(last, cache=self.cache)[0]
        return logits[:, -1].float()

    def prefill(self) -> Tensor:
        """Fill a new cache in one forward pass. Identical prompts are computed once and then repeated."""
        B, T = len(self.lengths), max(self.lengths)
        rows = 1 if self.identical else B
        self.cache = self.new_cache(rows)
        if self.cache is None:
            return self.recompute()
        idx, steps = self.history[:rows, -T:], torch.arange(T, device=self.device)
        start = torch.tensor([[T - n] for n in self.lengths[:rows]], device=self.device)  # (rows, 1)
        begins = (steps == start) | (steps > start) & (idx == self.separator)
        segments = begins.cumsum(dim=1)  # (rows, T): 0 is padding, 1 the first document of the prompt
        segments = None if bool((segments == 1).all()) else segments
        logits = self.model(idx, cache=self.cache, segments=segments, last=True)[0]
        if self.identical:
            logits = logits.expand(B, -1, -1)
            self.cache.select([0] * B)
            self.identical = False
        if self.step is not None:
            self.cache = self.cache.static()
        return logits

    def recompute(self) -> Tensor:
        """Logits of the next token without a cache. Padding is on the right, which a causal model ignores."""
        rows = [row[-n:] for row, n in zip(self.history, self.lengths, strict=True)]
        logits = self.model(nn.utils.rnn.pad_sequence(rows, batch_first=True))[0]
        ends = torch.tensor(self.lengths, device=self.device)[:, None, None] - 1
        return logits.take_along_dim(ends, dim=1)

    def append(self, ids: Tensor) -> None:
        """Append ids (B, 1). Where the window cannot slide past the context, restart with its last half."""
        self.history = torch.cat((self.history, ids), dim=1)
        self.lengths = [n + 1 for n in self.lengths]
        if not self.slides and max(self.lengths) > self.context:
            half = max(1, self.context // 2)
            self.lengths = [half if n > self.context else n for n in self.lengths]
            self.cache = None

    def select(self, rows: list[int]) -> None:
        """Keep only these rows of the batch."""
        self.history, self.lengths = self.history[rows], [self.lengths[row] for row in rows]
        if self.cache is not None:
            self.cache.select(rows)


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
    step: Callable | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """
    Continue each prompt, a list of ids that may be empty. Every step yields a pair (prompt's index, new id)
    for each prompt that is still running. A prompt stops at end-of-text, which is not yielded, or after an
    id at which one of `stops` is true. `step` is what fast_decoding.compile_step returned for it.

    Prompt i draws from its own generator, seeded by (seed, i): in float32, its continuation does not depend
    on the rest of the batch.

    A prompt longer than the context is truncated on the left. Past the context, relative positions (rope,
    shaw, alibi, none) continue with a sliding window of block_size tokens; absolute ones (learned,
    sinusoidal) and models other than GPT restart with the last block_size // 2 tokens.
    """
    if not prompts:
        return
    longest, context = max(map(len, prompts)), model.config.block_size
    if longest >= context:
        message = f"a prompt of {longest} tokens is too long: only its last {context - 1} are used, which"
        warnings.warn(f"{message} after end-of-text fill the context of {context}", stacklevel=2)
    active = list(range(len(prompts)))  # the index of the prompt in each row of the batch
    running, new_ids = set(active), [[] for _ in active]
    rngs = [random.Random(f"{seed} {i}") for i in active]
    deterministic = bool(samplers) and samplers[-1] is greedy  # then argmax replaces it
    training = model.training
    model.eval()
    try:
        batch = Batch(model, prompts, eot, step)
        for _ in range(max_new_tokens):
            logits = batch.logits()
            for sampler in samplers[:-1] if deterministic else samplers:
                logits = sampler(logits, batch.history)
            ids = draw(logits, None if deterministic else [rngs[i] for i in active])
            batch.append(ids)
            new = [(i, token) for i, token in zip(active, ids[:, 0].tolist(), strict=True) if i in running]
            for i, token in new:
                new_ids[i].append(token)
                if token == eot or any(stop(new_ids[i]) for stop in stops):
                    running.remove(i)
            yield [(i, token) for i, token in new if token != eot]
            if not running:
                return
            # shrink the batch once half of it is done, unless that would compile another step
            if 2 * len(running) <= len(active) and step is None:
                rows = [row for row, i in enumerate(active) if i in running]
                batch.select(rows)
                active = [active[row] for row in rows]
    finally:
        model.train(training)


def generate(model: GPT, prompts: Sequence[Sequence[int]], *args, **kwargs) -> list[list[int]]:
    """The new ids of each prompt, as lists. The arguments are those of `stream`."""
    new_ids = [[] for _ in prompts]
    for new in stream(model, prompts, *args, **kwargs):
        for i, token in new:
            new_ids[i].append(token)
    return new_ids


# ----------------------------------------------------------------------------------------------------------
# Text to text


class Story:
    """The text of a growing list of ids, without incomplete characters, up to the first stop string."""

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop, self.pending = tokenizer, [text.encode() for text in stop], b""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The text that one more id completes. Bytes that may begin a stop string are held back."""
        self.pending += self.tokenizer.decode_bytes([token])
        matches = [at for text in self.stop if (at := self.pending.find(text)) >= 0]
        if matches:
            ready, self.pending = self.pending[: min(matches)], b""
        else:
            partial = (n for text in self.stop for n in range(len(text)) if self.pending.endswith(text[:n]))
            cut = len(self.pending) - max(partial, default=0)
            ready, self.pending = self.pending[:cut], self.pending[cut:]
        return self.decoder.decode(ready)

    def end(self) -> str:
        """The text held back, once the ids have ended. An incomplete last character is dropped."""
        return self.decoder.decode(self.pending)


def write(
    model: GPT,
    tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 500,
    *,
    stop: Sequence[str] = (),
    seed: int = 1337,
    step: Callable | None = None,
    suffix: str | None = None,
    **sampling: float,
) -> Iterator[tuple[int, str]]:
    """
    Continue each prompt; yield pairs (prompt's index, piece of text) token by token, then a last piece for
    each prompt. With a suffix, write the text between prompt and suffix, which ends the last piece; the model
    was trained with objective=fim. `sampling` are settings of `chain`; for `step` see `stream`.
    """
    samplers, stops = chain(**sampling), [stop_string(tokenizer, text) for text in stop]
    ids, texts = [tokenizer.encode(prompt) for prompt in prompts], [Story(tokenizer, stop) for _ in prompts]
    if suffix is not None:
        ids = [tokenizer.fill_prompt(prefix, tokenizer.encode(suffix)) for prefix in ids]
        longest, context = 1 + max(map(len, ids), default=0), model.config.block_size
        if longest > context:
            raise ValueError(f"prefix and suffix take {longest} tokens, and the context has {context}")
        max_new_tokens = min(max_new_tokens, context - longest + 1)  # a window that slides loses the suffix

    def pieces():  # an inner generator, so that invalid arguments raise at the call
        options = dict(eot=tokenizer.eot, seed=seed, stops=stops, step=step)
        for new in stream(model, ids, max_new_tokens, samplers, **options):
            yield from ((i, texts[i].add(token)) for i, token in new)
        yield from ((i, text.end() + (suffix or "")) for i, text in enumerate(texts))

    return pieces()


def stories(model: GPT, tokenizer, prompt: str = "", n: int = 1, *args, **kwargs) -> list[str]:
    """n texts that begin with the prompt, generated in one batch. The arguments are those of `write`."""
    texts = [prompt] * n
    for i, piece in write(model, tokenizer, [prompt] * n, *args, **kwargs):
        texts[i] += piece
    return texts
