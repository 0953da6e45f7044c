"""
The tasks of evaluate.py. Each is a function of a Subject that returns a stats.Result.

    subject = Subject("out/tiny", model, tokenizer, data, texts)
    bpb(subject)                       # nats per token, perplexity, bits per byte and per character
    blimp(subject, "blimp/data")       # minimal pairs
    progression(subject)               # real continuations of stories against corrupted ones
    grammar(subject)                   # a corpus whose entropy is known: toystories

The other tasks have their own files: story_stats.py, probe.py, harness.py. All scores come from score.py.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import nn

from nanostlm import corruptions, score, sources, stats
from nanostlm.data import Data
from nanostlm.generate import stories as generate_stories
from nanostlm.memorization import split_words, vocabulary
from nanostlm.schema import TEXT, check, naming
from nanostlm.stats import Result


class Subject(NamedTuple):
    """A model and what it is evaluated on."""

    name: str
    model: nn.Module
    tokenizer: object  # encode(text), decode(ids), eot
    data: Data | None = None  # the training data of the model, or those of --data
    texts: list[str] = []  # the stories to score
    source: str = ""  # where `texts` come from

    def need_texts(self, task: str) -> list[str]:
        if not self.texts:
            raise ValueError(f"task {task} needs texts, and {self.name} has none here: pass --data or --text")
        return self.texts


def validation_texts(data: Data) -> list[str]:
    """The stories of val.bin."""
    ends = np.flatnonzero(data.val == data.tokenizer.eot) + 1
    return [data.tokenizer.decode(ids[:-1]) for ids in np.split(data.val, ends)[:-1]]


# ----------------------------------------------------------------------------------------------------------
# Bits per byte


def validation_loss(model, data: Data, rows: int = 16, limit: int = 0) -> tuple[float, float, int]:
    """
    Nats per token, bits per byte and number of tokens of the validation file, or of its first `limit` tokens.
    `rows` windows per batch.
    """
    ids = data.val[: limit or None]
    nats, n_tokens = score.total(model, [ids], data.tokenizer.eot, rows=rows)
    n_bytes = int(score.token_bytes(data.tokenizer)[ids].sum())
    return nats / n_tokens, score.bits_per_byte(nats, n_bytes), n_tokens


def bpb(subject: Subject, *, stride: int = 0, limit: int = 0, rows: int = 16) -> Result:
    """All stories as one sequence, as in validation_loss; intervals over stories."""
    model, eot = subject.model, subject.tokenizer.eot
    texts = subject.need_texts("bpb")[: limit or None]
    ids = [[*subject.tokenizer.encode(text), eot] for text in texts]
    options = dict(stride=stride, rows=rows, progress="bpb")
    [nats] = score.score(model, [np.concatenate(ids)], eot, **options)
    tokens = [len(story) for story in ids]
    nats = np.add.reduceat(nats, np.cumsum([0, *tokens[:-1]]), dtype=np.float64)
    n_bytes, chars = [len(text.encode()) + 1 for text in texts], [len(text) + 1 for text in texts]
    per_token, bits = stats.ratio("nats per token", nats, tokens), nats / math.log(2)
    window = model.config.block_size
    return Result(
        [
            stats.ratio("bits per byte", bits, n_bytes),
            stats.ratio("bits per character", bits, chars),
            per_token,
            stats.transform("perplexity per token", per_token, math.exp),
        ],
        [
            f"{sum(tokens):,} tokens, {sum(n_bytes):,} bytes of {subject.source}; windows of {window} "
            f"tokens, stride {stride or window}; end-of-text first and after each story, counted as one byte"
        ],
        [{"nats": float(x), "tokens": t, "bytes": n} for x, t, n in zip(nats, tokens, n_bytes, strict=True)],
    )


# ----------------------------------------------------------------------------------------------------------
# Minimal pairs and corrupted continuations


def preferred(margin: np.ndarray) -> np.ndarray:
    """1 where the margin of the better text is positive, 0 where it is negative, 0.5 for a tie."""
    return (np.sign(margin) + 1) / 2


def read_blimp(folder: str | Path, limit: int = 0) -> list[dict]:
    """The first `limit` pairs of every paradigm, a .jsonl file each, in `folder` or in its folder `data`."""
    files = sorted([*Path(folder).glob("*.jsonl"), *Path(folder).glob("data/*.jsonl")])
    if not files:
        raise ValueError(f"{folder} has no .jsonl files: get them from https://github.com/alexwarstadt/blimp")
    pairs, schema = [], {key: TEXT for key in ("sentence_good", "sentence_bad", "linguistics_term", "UID")}
    for file in files:
        with naming(file):
            lines = file.read_text(encoding="utf-8").splitlines()
            found = [json.loads(line) for line in lines[: limit or None]]
            for pair in found:
                check(pair, schema)
        pairs += found
    return pairs


def blimp(subject: Subject, folder: str | Path, *, limit: int = 0, rows: int = 16) -> Result:
    """
    BLiMP (arXiv 1912.00582): the share of pairs in which the model finds the acceptable sentence more likely
    than the unacceptable one. A phenomenon's accuracy is the mean of its paradigms.
    """
    pairs = read_blimp(folder, limit)
    ids = [subject.tokenizer.encode(pair[key]) for pair in pairs for key in ("sentence_good", "sentence_bad")]
    nats = score.score(subject.model, ids, subject.tokenizer.eot, rows=rows, progress="blimp")
    logp = -np.array([x.sum(dtype=np.float64) for x in nats]).reshape(-1, 2)
    right = preferred(logp[:, 0] - logp[:, 1])
    known = vocabulary(subject.data)[0] if subject.data else set()
    words = [split_words(f"{pair['sentence_good']} {pair['sentence_bad']}") for pair in pairs]
    familiar = [known.issuperset(both) for both in words]
    paradigms = {}
    for i, pair in enumerate(pairs):
        paradigms.setdefault((pair["linguistics_term"], pair["UID"]), []).append(i)

    def accuracy(name, chosen=None, phenomenon=None):
        groups = [i for (term, _), i in paradigms.items() if phenomenon in (None, term)]
        return stats.stratified(name, [right[[j for j in i if chosen is None or chosen[j]]] for i in groups])

    figures = [accuracy("all paradigms")]
    notes = ["the log-probability of the whole sentence after end-of-text; a tie counts as a half"]
    if subject.data:
        figures.append(accuracy("pairs whose words are all in the training text", familiar))
    else:
        notes.append("without --data, the pairs whose words are all in the training text are unknown")
    phenomena = sorted({term for term, _ in paradigms})
    figures += [accuracy(term.replace("_", " "), phenomenon=term) for term in phenomena]
    figures += [stats.proportion(uid, right[i].sum(), len(i)) for (_, uid), i in sorted(paradigms.items())]
    items = [
        {"UID": pair["UID"], "good": float(good), "bad": float(bad), "familiar": seen}
        for pair, (good, bad), seen in zip(pairs, logp, familiar, strict=True)
    ]
    return Result(figures, notes, items)


def progression(subject: Subject, *, limit: int = 200, seed: int = 0, rows: int = 16) -> Result:
    """
    For each corruption, the share of stories whose real second half has fewer nats per byte, after the first
    half, than the corrupted one. End-of-text follows both. Stories of fewer than four sentences are skipped.
    """
    texts = subject.need_texts("progression")
    names, kinds = corruptions.known_names(texts), list(corruptions.CORRUPTIONS)
    halves = [(parts, len(parts) // 2) for parts in map(corruptions.sentences, texts) if len(parts) >= 4]
    halves = [("".join(parts[:n]), "".join(parts[n:])) for parts, n in halves[: limit or None]]
    if len(halves) < 2:
        raise ValueError("task progression needs at least two stories of four or more sentences")
    tokenizer, eot = subject.tokenizer, subject.tokenizer.eot
    keys, pairs, n_bytes = [], [], []  # of every scored text; the real continuation has the corruption ""
    for i, (prefix, real) in enumerate(halves):
        begin, other = [eot, *tokenizer.encode(prefix)], halves[(i + 1) % len(halves)][1]
        for name in ("", *kinds):
            text = corruptions.corrupt(name, real, f"{seed} {i}", other, names) if name else real
            if text is not None:
                keys.append((i, name))
                pairs.append((begin, [*tokenizer.encode(text), eot]))
                n_bytes.append(len(text.encode()) + 1)
    logp, _ = score.loglikelihoods(subject.model, pairs, rows=rows, progress="progression")
    scores = dict(zip(keys, logp / np.array(n_bytes), strict=True))
    # nats per byte more than the real continuation has; nan: not applicable
    more = np.array(
        [[scores[i, ""] - scores.get((i, name), np.nan) for name in kinds] for i in range(len(halves))]
    )  # (stories, corruptions)
    columns = {name: x[~np.isnan(x)] for name, x in zip(kinds, more.T, strict=True)}
    figures = [stats.mean("all corruptions", np.nanmean(preferred(more), axis=1))._replace(percent=True)]
    figures += [stats.proportion(name, preferred(x).sum(), len(x)) for name, x in columns.items()]
    figures += [stats.mean(f"{name}: nats per byte more", x) for name, x in columns.items()]
    note = f"second halves of {len(halves):,} stories of {subject.source}, by nats per byte; seed {seed}"
    items = [{"story": i, "corruption": name, "nats_per_byte": -x} for (i, name), x in scores.items()]
    return Result(figures, [note], items)


# ----------------------------------------------------------------------------------------------------------
# Corpora whose entropy is known


def grammar(subject: Subject, *, limit: int = 100, seed: int = 1337, rows: int = 16) -> Result:
    """
    Compare a model with the grammar of its corpus: bits per byte of the stories that fit into the context,
    their entropy, the excess over it, and the fraction of `limit` generated stories that are valid.
    """
    verdict_of = subject.data and sources.corpus(subject.data.meta["corpus"]).check
    if not verdict_of:
        raise ValueError("task grammar is for a corpus of known entropy, such as toystories")
    tokenizer, context = subject.tokenizer, subject.model.config.block_size
    encoded = [(text, [*tokenizer.encode(text), tokenizer.eot]) for text in subject.need_texts("grammar")]
    whole = [(text, ids) for text, ids in encoded if len(ids) <= context]
    scores = score.score(
        subject.model, [ids for _, ids in whole], tokenizer.eot, rows=rows, progress="grammar"
    )
    nats = [x.sum(dtype=np.float64) for x in scores]
    entropy = [-verdict_of(text).logprob for text, _ in whole]
    bits_of_byte = [math.log(2) * (len(text.encode()) + 1) for text, _ in whole]  # with end-of-text
    excess = stats.ratio("excess over the entropy", nats, entropy)
    verdicts = [verdict_of(text) for text in generate_stories(subject.model, tokenizer, "", limit, seed=seed)]
    broken = Counter(verdict.rule for verdict in verdicts if not verdict.ok)
    return Result(
        [
            stats.ratio("bits per byte of whole stories", nats, bits_of_byte),
            stats.ratio("their entropy", entropy, bits_of_byte),
            stats.transform(excess.name, excess, lambda x: x - 1)._replace(percent=True),
            stats.proportion("valid stories", limit - broken.total(), limit),
        ],
        [f"whole stories fit into the context of {context} tokens"]
        + [f"broken rules: {', '.join(f'{n} {rule}' for rule, n in broken.most_common())}"] * bool(broken),
    )
