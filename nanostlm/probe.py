"""
Probes: what a linear classifier reads from a model's frozen states, layer by layer (arXiv 1610.01644).

    result = probe(subject, "mood.jsonl")             # lines {"text": ..., "label": ...}, optionally "group"
    result = probe(subject, "toystories-pronoun")     # or "toystories-plot": see probe_sets

Each text follows end-of-text, and the states of its tokens are averaged. A logistic regression predicts the
label from the average, standardised. It is cross-validated: every item is predicted by a classifier that has
seen neither the item nor others of its group. To compare with: the same classifier on the counts of the words
of the text (a bag of words), and the most frequent label.
"""

import json
import random
import re
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nanostlm import score, stats
from nanostlm.schema import TEXT, check

FILLED = "text that is not blank", lambda x: TEXT[1](x) and bool(x.strip())
LABEL = "text or a whole number", lambda x: type(x) in (str, int, bool)
GENDERED = re.compile(r"\b(?:girl|boy|s?he|him|her|his)\b", re.IGNORECASE)
SETS = "toystories-plot", "toystories-pronoun"

# ----------------------------------------------------------------------------------------------------------
# Items: {"text", "label", "group"?, "line"?}


def read(path: str | Path) -> list[dict]:
    """The items of a .jsonl file. ValueError names the file and the line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}, and no set of that name: {', '.join(SETS)}")
    items = []
    for line, data in enumerate(Path(path).read_bytes().splitlines(), 1):
        if data.strip():
            try:
                item = json.loads(data.decode())
                check(item, {"text": FILLED, "label": LABEL, "group?": LABEL})
            except (ValueError, RecursionError) as error:
                kinds = {UnicodeDecodeError: "not UTF-8", json.JSONDecodeError: "not JSON"}
                raise ValueError(f"{path}, line {line}: {kinds.get(type(error), error)}") from None
            items.append(item | {"line": line})
    return items


def toystory(seed: int, i: int) -> tuple[str, str, int, tuple | None]:
    """
    Story i of a seed, from none of the corpus' own seeds: its text, the rule of its plot, which wording of
    the opening it has, and the row of its hero, unless that is an animal.
    """
    from nanostlm.toystories import GRAMMAR, expand

    rng, memory, texts, drawn = (
        random.Random(f"probe {seed} {i}"),
        [None] * (len(GRAMMAR.variables) + 1),
        [],
        [],
    )

    def uniform() -> float:
        drawn.append(rng.random())
        return drawn[-1]

    expand((GRAMMAR.start,), memory, texts.append, lambda logprob: None, uniform)
    choice, path = GRAMMAR.start, []
    for u in drawn[:3]:  # the plot, its order of paragraphs, its opening: each begins with the next
        path.append(bisect(choice.cumulative, u))
        choice = choice.alternatives[path[-1]][0]
    plot = GRAMMAR.start.alternatives[path[0]][0].rule
    return "".join(texts), plot, 10 * path[1] + path[2], memory[GRAMMAR.variables.index("hero")]


def probe_sets(name: str, seed: int = 0, n: int = 1000) -> list[dict]:
    """
    n items of new toystories, about something that no single word gives away.

    toystories-plot: the first paragraph; the label is one of the 14 plots. Each plot has at least 3 wordings
    of its opening, which are the groups: a wording is never both in training and in test. Whole stories would
    measure nothing, since the words of a plot are its own: a bag of words is then always right.

    toystories-pronoun: the beginning up to the first word that depends on the hero's gender, where exactly
    one child, the hero, has been named; the label is she or he. The groups are the 12 names: the probe is
    tested on names that it was not trained on, so it must read the gender that the model ascribes to a name.
    A bag of words can only guess.
    """
    from nanostlm.toystories import GRAMMAR

    kids, he, items, i = {row[0] for row in GRAMMAR.lists["kid"]}, GRAMMAR.columns.index("he"), [], 0
    while len(items) < n:
        text, plot, opening, hero = toystory(seed, i)
        i += 1
        if name == "toystories-plot":
            items.append({"text": text.partition("\n")[0], "label": plot, "group": f"{plot} {opening}"})
        elif hero and (gendered := GENDERED.search(text)):
            text = text[: gendered.start()].rstrip()
            if kids & set(re.findall(r"\w+", text)) == {hero[0]}:
                items.append({"text": text, "label": hero[he], "group": hero[0]})
    return items


# ----------------------------------------------------------------------------------------------------------
# States


@torch.no_grad()
def states(model, idx: Tensor, lengths: Tensor) -> list[Tensor]:
    """
    The mean states after the embedder and after each layer, (B, n_embd) each, in float32. Each row of idx
    (B, T) is end-of-text, `lengths` (B,) ids of a text, over which the mean is taken, and padding.

    Of transformers' models, these are `hidden_states`: the last one is after the final norm. ValueError for a
    model with neither GPT's embedder and core.blocks nor `hidden_states`.
    """
    at, means = torch.arange(idx.shape[1], device=idx.device), []
    used = ((at > 0) & (at <= lengths[:, None])).unsqueeze(-1)  # (B, T, 1)

    def keep(x: Tensor) -> None:
        means.append(x.float().masked_fill(~used, 0).sum(dim=1) / lengths[:, None])

    def ask(module, args, kwargs):
        return args, kwargs | {"output_hidden_states": True}

    def keep_all(module, args, output) -> None:
        for x in output.hidden_states:
            keep(x)

    inner = next((m for m in model.modules() if hasattr(m, "get_input_embeddings")), None)
    blocks = getattr(getattr(model, "core", None), "blocks", None)
    if inner is not None:
        hooks = [inner.register_forward_pre_hook(ask, with_kwargs=True)]
        hooks.append(inner.register_forward_hook(keep_all))
    elif blocks is not None and hasattr(model, "embedder"):
        modules = dict.fromkeys([model.embedder, *blocks])  # without repetitions: layers may share a block
        hooks = [module.register_forward_hook(lambda m, args, output: keep(output)) for module in modules]
    else:
        raise ValueError(
            f"a probe needs a model with layers: {type(model).__name__} has no embedder and blocks"
        )
    try:
        model(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return means


def features(model, texts: Sequence[Sequence[int]], eot: int, rows: int = 16) -> np.ndarray:
    """The `states` of texts of at most block_size - 1 ids, (layers + 1, n, n_embd) float32, in batches."""
    c, device = model.config, next(model.parameters()).device
    causal = getattr(c, "causal", True)  # otherwise the states would depend on the padding
    order, found = sorted(range(len(texts)), key=lambda i: -len(texts[i])), {}
    with tqdm(desc="probe", total=len(texts), unit="text", disable=None) as bar:
        while order:
            width = 1 + len(texts[order[0]])
            height = max(1, min(rows, score.MAX_LOGITS // (width * c.vocab_size))) if causal else 1
            batch, order = order[:height], order[height:]
            idx = torch.full((len(batch), width), eot)
            for row, i in zip(idx, batch, strict=True):
                row[1 : 1 + len(texts[i])] = torch.tensor(texts[i])
            lengths = torch.tensor([len(texts[i]) for i in batch], device=device)
            means = torch.stack(states(model, idx.to(device), lengths), dim=1)  # (B, layers + 1, n_embd)
            found |= zip(batch, means.cpu().numpy(), strict=True)
            bar.update(len(batch))
    return np.stack([found[i] for i in range(len(texts))], axis=1)


# ----------------------------------------------------------------------------------------------------------
# Classifiers


def split(items: Sequence[dict], folds: int, seed: int, source: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """
    Stratified folds, as pairs (indices for training, indices for test); groups stay together. ValueError,
    naming the source, unless there are two labels, and of each enough items and groups.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    labels, groups = [str(item["label"]) for item in items], [item.get("group") for item in items]
    counts = Counter(labels)
    if len(counts) < 2:
        raise ValueError(f"{source}: {len(items)} items with {len(counts)} label: a probe needs two labels")
    if None in groups and set(groups) != {None}:
        raise ValueError(f"{source}: some items have a group, and others have none")
    label, n = min(counts.items(), key=lambda pair: pair[1])
    line = items[labels.index(label)].get("line")
    where = f"{source}: label {label!r}" + f", first in line {line}," * (line is not None)
    if n < folds:
        raise ValueError(f"{where} has {n} items: {folds} folds need {folds}")
    if None in groups:
        return list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels))
    too_few = f"{source}: {len(set(groups))} groups are too few for {folds} folds"
    if len(set(groups)) < folds:
        raise ValueError(too_few)
    kind = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    pairs = list(kind.split(labels, labels, list(map(str, groups))))
    for train, test in pairs:
        if missing := {labels[i] for i in test} - {labels[i] for i in train}:
            raise ValueError(f"{too_few}: label {min(missing)!r} has no item outside of one fold")
    return pairs


def probe(
    subject,
    source: str | Path | Sequence[dict],
    *,
    limit: int | None = None,
    rows: int = 16,
    folds: int = 5,
    seed: int = 0,
) -> stats.Result:
    """
    The cross-validated accuracy at each layer of subject.model, of a bag of words, and of the most frequent
    label. `source` is a .jsonl file, the name of one of `probe_sets`, or items; `limit` of them are drawn at
    random. Where items have groups, the 95% intervals count each group as one observation. `rows` texts per
    batch.
    """
    if not find_spec("sklearn"):
        raise ValueError("scikit-learn is not installed: pip install -r requirements-eval.txt")
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    named = isinstance(source, str | Path)
    items = [*source] if not named else probe_sets(source, seed) if source in SETS else read(source)
    if limit is not None and limit < len(items):
        items = random.Random(seed).sample(items, limit)
    pairs = split(items, folds, seed, str(source) if named else "the items")
    labels, texts = [str(item["label"]) for item in items], [item["text"] for item in items]
    c, tokenizer = subject.model.config, subject.tokenizer
    ids = [tokenizer.encode(text) for text in texts]
    cut = [text[: c.block_size - 1] for text in ids]  # end-of-text comes first

    def predict(x, *steps) -> list[str]:
        pipeline = make_pipeline(*steps, LogisticRegression(max_iter=3000))
        return cross_val_predict(pipeline, x, labels, cv=pairs).tolist()

    layers = features(subject.model, cut, tokenizer.eot, rows)
    found = {f"layer {i}" if i else "embedder": predict(x, StandardScaler()) for i, x in enumerate(layers)}
    found["bag of words"] = predict(texts, CountVectorizer(token_pattern=r"\w+|[^\w\s]"))
    found["most frequent label"] = [Counter(labels).most_common(1)[0][0]] * len(items)
    groups = {item.get("group") for item in items} - {None}
    units, figures = len(groups) or len(items), []
    for name, guesses in found.items():
        accuracy = float(np.mean(np.equal(guesses, labels)))
        figures.append(stats.proportion(name, accuracy * units, units)._replace(n=len(items)))
    counted = f"; no group is in two folds, and the intervals count each of {units} groups once"
    notes = [f"logistic regression on mean states, {folds} folds" + counted * bool(groups)]
    if n_cut := sum(len(text) < len(whole) for text, whole in zip(cut, ids, strict=True)):
        notes.append(f"{n_cut} of {len(items)} texts are cut to their first {c.block_size - 1} tokens")
    guesses = ({"predicted": dict(zip(found, row, strict=True))} for row in zip(*found.values(), strict=True))
    return stats.Result(figures, notes, [item | guess for item, guess in zip(items, guesses, strict=True)])
