"""
Generated stories in numbers, each beside the same number for validation stories.

    result = stories(subject, limit=100, seed=1)  # a Result: statistics, memorization, ten stories
    result = sweep(subject, limit=100)            # sampler settings, by their distance to validation stories

Statistics of a set of stories (distinct-n, self-BLEU) depend on the number and length of its texts. Both sets
therefore have the same number of stories, of which only the first 100 words count. Their intervals are
jackknives over the stories. Words are in lower case, without punctuation.
"""

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from nanostlm import sources
from nanostlm.generate import DEFAULTS, check_range, write
from nanostlm.memorization import NAMED, memorization, split_words, vocabulary
from nanostlm.score import score
from nanostlm.stats import Figure, Result, Z, digits, mean, proportion, ratio

QUOTATION = re.compile('"[^"“”]*"|“[^"“”]*”')
SENTENCE_END = re.compile(r"[.!?][\"”'’]*\s")
FIRST = 100  # words of a story that count for distinct-n and self-BLEU
BLEU_STORIES = 1000  # self-BLEU compares every story with every other
BATCH = 64  # stories that are generated at a time


# ----------------------------------------------------------------------------------------------------------
# Statistics of one story


def grams(words: Sequence, n: int) -> list[tuple]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def repetition(words: Sequence[str], n: int = 4) -> float:
    """The share of the story's n-grams that occurred before in the same story; 0 if it has none."""
    found = grams(words, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def balanced(text: str) -> bool:
    """
    Whether quotation marks, straight or curly, come in pairs of the same kind inside each paragraph. Single
    marks are ignored, since most are apostrophes.
    """
    return not any(re.search('["“”]', QUOTATION.sub("", paragraph)) for paragraph in text.split("\n"))


def stray_names(text: str, names: set[str]) -> list[str]:
    """
    Names that were never introduced: they occur once in the story, after its first two sentences, and not
    after words such as "named". A friend who is mentioned once in passing counts as well; a wrong name that
    occurs twice does not.
    """
    mentions = defaultdict(list)
    for match in re.finditer(r"[^\W\d_]+", text):
        if match[0] in names:
            mentions[match[0]].append(match.start())
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    introduced = set(NAMED.findall(text))
    late = {name for name, at in mentions.items() if len(at) == 1 and sum(end <= at[0] for end in ends) >= 2}
    return sorted(late - introduced)


# ----------------------------------------------------------------------------------------------------------
# Statistics of a set of stories: (value, values without each story in turn), for `jackknife`


def jackknife(name: str, value: float, left_out: Sequence[float]) -> Figure:
    """The interval from the values without each story (Efron and Stein, 1981)."""
    n, left_out = len(left_out), np.asarray(left_out)
    margin = Z * math.sqrt((n - 1) * left_out.var()) if n > 1 else math.nan
    return Figure(name, float(value), float(value - margin), float(value + margin), n)


def distinct(stories: Sequence[Sequence[str]], n: int) -> tuple[float, np.ndarray]:
    """The number of different word n-grams, divided by the number of all (arXiv 1510.03055)."""
    counts = np.array([max(0, len(words) - n + 1) for words in stories])
    owner = {}  # n-gram -> the only story that has it, or -1
    for i, words in enumerate(stories):
        for gram in grams(words, n):
            owner[gram] = i if owner.get(gram, i) == i else -1
    only = Counter(owner.values())
    own = np.array([only[i] for i in range(len(stories))])
    with np.errstate(invalid="ignore"):  # no n-grams: nan
        return float(np.divide(len(owner), counts.sum())), (len(owner) - own) / (counts.sum() - counts)


def self_bleu(stories: Sequence[Sequence[str]]) -> tuple[float, np.ndarray]:
    """
    The mean BLEU-4 of each story with all others as references (arXiv 1802.01886): how alike the stories are.
    An n-gram order without a match counts as 0.1 matches (method 1 of Chen and Cherry, 2014), as in the
    authors' code; a story without a single word in common with the others has 0.
    """
    N = len(stories)
    if N < 2:
        return math.nan, np.full(N, math.nan)
    lengths = np.array([len(words) for words in stories])
    log_all, log_left = np.zeros(N), np.zeros((N, N))  # [i, j]: of story i, without reference j
    for n in range(1, 5):
        holders = defaultdict(list)  # n-gram -> (count, story), the highest counts first
        for i, words in enumerate(stories):
            for gram, count in Counter(grams(words, n)).items():
                holders[gram].append((count, i))
        matches, lost = np.zeros(N), np.zeros((N, N))
        for entries in holders.values():
            entries.sort(reverse=True)
            for count, i in entries:
                best, second, *_ = [entry for entry in entries[:3] if entry[1] != i] + [(0, i)] * 2
                matches[i] += min(count, best[0])
                lost[i, best[1]] += min(count, best[0]) - min(count, second[0])
        total = np.maximum(1, lengths - n + 1)
        with np.errstate(divide="ignore"):  # log 0 is -inf: a BLEU of 0
            floor = 0.1 if n > 1 else 0
            log_all += np.log(np.maximum(matches, floor) / total) / 4
            log_left += np.log(np.maximum(matches[:, None] - lost, floor) / total[:, None]) / 4
    # the brevity penalty uses the closest length among the references, the shorter of two
    distance = 2 * np.abs(lengths - lengths[:, None]) + (lengths > lengths[:, None])
    np.fill_diagonal(distance, 1 << 40)
    first, second = np.argsort(distance, axis=1, kind="stable")[:, :2].T
    closest = np.repeat(lengths[first][:, None], N, axis=1)
    closest[np.arange(N), first] = lengths[second]
    own = np.maximum(lengths, 1)
    log_all += np.minimum(0, 1 - lengths[first] / own)
    log_left = np.exp(log_left + np.minimum(0, 1 - closest / own[:, None]))
    np.fill_diagonal(log_left, 0)
    left_out = log_left.sum(axis=0) / (N - 1) if N > 2 else np.full(N, math.nan)
    return float(np.exp(log_all).mean()), left_out


# ----------------------------------------------------------------------------------------------------------
# Tasks

GRID = [  # the settings that `sweep` compares: (sampling, best of n)
    *(({"temperature": t, "top_p": 1}, 1) for t in (0.6, 0.7, 0.8, 0.9, 1.0)),
    *(({"temperature": t, "top_p": p}, 1) for t, p in ((0.8, 0.95), (0.9, 0.95), (1, 0.95), (1, 0.9))),
    *(({"temperature": t, "top_p": 1, "min_p": p}, 1) for t, p in ((1, 0.05), (1, 0.1), (1.2, 0.1))),
    *(({"temperature": t, "top_p": p}, 4) for t, p in ((0.8, 0.95), (1, 0.95), (1, 1))),
]
COLUMNS = ["distinct-3", "repeated 4-grams", "length in words"]  # of the table of `sweep`: the distance
COLUMNS += ["ended by end-of-text", "balanced quotation marks"]  # what the distance does not see
COLUMNS += ["words not in training", "a name never introduced", "valid"]


def generate(
    subject, n: int, seed: int, max_new_tokens: int, title: str = "stories", **sampling: float
) -> list[tuple[str, bool]]:
    """n stories without a prompt, and whether each ended by itself: with end-of-text, not at the limit."""
    texts, lengths = [""] * n, [-1] * n  # one piece per token, and a last one
    with tqdm(total=n, desc=title, unit=" stories", disable=None) as bar:
        for start in range(0, n, BATCH):
            prompts, options = [""] * min(BATCH, n - start), {"seed": seed + 1_000_000 * (start // BATCH)}
            arguments = subject.model, subject.tokenizer, prompts, max_new_tokens
            for i, piece in write(*arguments, **options, **sampling):
                texts[start + i] += piece
                lengths[start + i] += 1
            bar.update(len(prompts))
    return [(text, length < max_new_tokens) for text, length in zip(texts, lengths, strict=True)]


def control_stories(subject, n: int, seed: int, max_new_tokens: int) -> tuple[list[str], int]:
    """Up to n validation stories, drawn with the seed, and the most tokens to generate (see `stories`)."""
    check_range("the number of stories", n, n >= 1, "at least 1")
    check_range("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "0 (automatic) or more")
    control = random.Random(seed).sample(subject.texts, min(n, len(subject.texts)))
    longest = max((len(subject.tokenizer.encode(text)) for text in subject.texts), default=0)
    return control, max_new_tokens or (longest + 1 if longest else subject.model.config.block_size)


def shown(sampling: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in (DEFAULTS | sampling).items())


def check_of(subject) -> Callable | None:
    """The checker of the subject's corpus: text -> Verdict; None if it has none."""
    return sources.corpus(subject.data.meta["corpus"]).check if subject.data else None


def describe(subject, source: str, texts: Sequence[tuple[str, bool]], training, found) -> list[dict]:
    """One dict per story: its text and those statistics for which `training` and `found` are not None."""
    items, check = [], check_of(subject)
    for i, (text, ended) in enumerate(texts):
        words = split_words(text)
        item = {"source": source, "text": text, "ended": ended, "words": len(words)}
        item |= {"repeated_4grams": repetition(words), "balanced": balanced(text)}
        if training:
            item["unseen_words"] = [word for word in words if word not in training[0]]
            item["stray_names"] = stray_names(text, training[1])
        if found:
            item |= found[i]._asdict() | {"flagged": found[i].flagged}
        if check:
            item["broken_rule"] = check(text).rule
        items.append(item)
    return items


def summarize(items: list[dict], k: int) -> list[Figure]:
    """The figures of a set of stories; those that depend on the number of stories are of the first k."""
    first = [split_words(item["text"])[:FIRST] for item in items[:k]]

    def column(key):
        return [item[key] for item in items]

    figures = [jackknife(f"distinct-{n}", *distinct(first, n)) for n in (1, 2, 3)]
    figures.append(jackknife("self-BLEU-4", *self_bleu(first[:BLEU_STORIES])))
    figures.append(mean("repeated 4-grams", column("repeated_4grams")))
    figures.append(mean("length in words", column("words")))
    figures.append(proportion("ended by end-of-text", sum(column("ended")), len(items)))
    figures.append(proportion("balanced quotation marks", sum(column("balanced")), len(items)))
    if "unseen_words" in items[0]:
        unseen = [len(words) for words in column("unseen_words")]
        figures.append(ratio("words not in training", unseen, column("words")))
        stray = sum(map(bool, column("stray_names")))
        figures.append(proportion("a name never introduced", stray, len(items)))
    if "flagged" in items[0]:
        figures.append(mean("longest span in training, tokens", column("longest")))
        figures.append(ratio("8-grams in training", column("found"), column("grams")))
        figures.append(proportion("copied from training", sum(column("flagged")), len(items)))
    if "broken_rule" in items[0]:
        rules = Counter(column("broken_rule"))
        figures.append(proportion("valid", rules.pop(None, 0), len(items)))
        figures += [proportion(f"broken: {rule}", count, len(items)) for rule, count in rules.most_common()]
    return figures


def stories(
    subject, limit: int = 100, *, seed: int = 1337, max_new_tokens: int = 0, **sampling: float
) -> Result:
    """
    Statistics of `limit` stories generated without a prompt, each beside that of as many validation stories.
    `sampling` are settings of generate.chain. max_new_tokens=0 allows the length of the longest validation
    story, or block_size if there are none. Without subject.data, what needs training data is omitted.
    """
    n = limit
    control, most = control_stories(subject, n, seed, max_new_tokens)
    generated, real = generate(subject, n, seed, most, **sampling), [(text, True) for text in control]
    training = found = None
    if subject.data:
        training = vocabulary(subject.data)
        found = memorization(subject.data, [text for text, _ in generated + real])
    items = describe(subject, "generated", generated, training, found)
    items_real = describe(subject, "validation", real, training, found and found[n:])
    k = min(n, len(real)) or n
    controls = {figure.name: figure for figure in summarize(items_real, k)} if real else {}
    figures = []
    for figure in summarize(items, k):
        figures.append(figure)
        if figure.name in controls and figure.name != "ended by end-of-text":
            figures.append(controls[figure.name]._replace(name=f"{figure.name}, validation"))
    notes = [
        f"{n} stories without a prompt, {shown(sampling)}, seed {seed}, at most {most} tokens; "
        f"beside {len(real)} of {len(subject.texts)} validation stories, drawn at random",
        f"distinct-n and self-BLEU-4 are of the first {FIRST} words of {k} stories in each set",
    ]
    if subject.data:
        notes.append(f"spans and 8-grams are counted in tokens of {subject.data.tokenizer.name}")
        for i, item in enumerate(items):
            if item["flagged"]:
                span = subject.data.tokenizer.encode(item["text"])[item["start"] :][: item["longest"]]
                shared = f"{item['longest']} of its {item['tokens']} tokens are one span of the training data"
                notes.append(f"story {i + 1} is copied: {shared}: {subject.data.tokenizer.decode(span)!r}")
    else:
        notes.append("unseen words, names and memorization are omitted: they need prepared training data")
    notes += [f"story {i + 1}: {text}" for i, (text, _) in enumerate(generated[:10])]
    return Result(figures, notes, items + items_real)


def best_of(subject, candidates: list[tuple[str, bool]], n: int) -> list[tuple[str, bool]]:
    """The likeliest of every n candidates in turn: fewest nats per token, end-of-text included."""
    encode, eot = subject.tokenizer.encode, subject.tokenizer.eot
    ids = [encode(text) + [eot] * (ended or not text) for text, ended in candidates]
    nats = [each.mean() for each in score(subject.model, ids, eot)]
    return [candidates[i + int(np.argmin(nats[i : i + n]))] for i in range(0, len(candidates), n)]


def three(words: list[list[str]]) -> list[tuple[float, np.ndarray]]:
    """The statistics that `sweep` compares, as (value, values without each story)."""
    rows = np.array([[repetition(story), len(story)] for story in words])
    left_out = (rows.sum(axis=0) - rows) / max(1, len(rows) - 1)
    means = zip(rows.mean(axis=0), left_out.T, strict=True)
    return [distinct([story[:FIRST] for story in words], 3), *means]


def sweep(
    subject, limit: int = 100, *, seed: int = 1337, max_new_tokens: int = 0, grid: Sequence = GRID
) -> Result:
    """
    Compare sampler settings by the distance of their stories to as many validation stories, the closest
    first: the sum, over distinct-3, repeated 4-grams and length in words, of the absolute difference in
    standard errors of the validation stories' figure. Two sets of validation stories are about 3.4 apart
    (3 times 2 / sqrt(pi)), and one pair in twenty is more than 6 apart: smaller distances are no merit. The
    best of n are by likelihood; see `best_of`. The distance is about diversity, not sense: a weak model at
    temperature 1 is close to the validation stories and writes nonsense, which the other columns show.
    """
    n = limit
    control, most = control_stories(subject, n, seed, max_new_tokens)
    if len(control) < max(2, n):
        raise ValueError(
            f"a sweep of {n} stories needs 2 or more and as many validation stories: there are {len(control)}"
        )
    training = vocabulary(subject.data) if subject.data else None

    def row(setting: str, texts: list[tuple[str, bool]]) -> dict:
        figures = summarize(describe(subject, setting, texts, training, None), n)
        figures = [figure for figure in figures if figure.name in COLUMNS]
        return {
            "setting": setting,
            "statistics": three([split_words(text) for text, _ in texts]),
            "figures": figures,
        }

    real = row("validation", [(text, True) for text in control])
    scale = [(figure.high - figure.value) / Z for figure in real["figures"][:3]]
    if not all(unit > 0 for unit in scale):  # nan: stories of less than three words
        raise ValueError(f"the {n} validation stories do not differ in repetition or length: use more")
    rows = []
    for sampling, candidates in grid:
        setting = shown(sampling)
        setting += f", best of {candidates}" if candidates > 1 else ""
        texts = generate(subject, n * candidates, seed, most, setting, **sampling)
        new = row(setting, best_of(subject, texts, candidates) if candidates > 1 else texts)
        terms = zip(new["statistics"], real["statistics"], scale, strict=True)
        distance = [np.abs(np.append(*pair) - target) / unit for pair, (target, _), unit in terms]
        value, *left_out = sum(distance)
        rows.append(new | {"distance": jackknife(f"distance: {setting}", value, left_out)})
    rows.sort(key=lambda row: row["distance"].value)
    real["distance"] = Figure("distance: validation", 0.0, math.nan, math.nan, n)
    lines, items = [["setting", "distance", *(figure.name for figure in real["figures"])]], []
    for each in [real, *rows]:
        figures = [each["distance"]._replace(name="distance"), *each["figures"]]
        items.append({"setting": each["setting"]} | {f.name: [f.value, f.low, f.high] for f in figures})
        lines.append(
            [each["setting"], *(f"{digits(f.value)} ± {digits((f.high - f.low) / 2)}" for f in figures)]
        )
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    note = (
        f"{n} stories for each setting, without a prompt, seed {seed}, at most {most} tokens; {n} of "
        f"{len(subject.texts)} validation stories. The distance is the sum of the first three differences "
        "in standard errors of the validation figure. Two validation sets are about 3.4 apart, 5% over 6."
    )
    table = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in lines]
    return Result([each["distance"] for each in rows], [note, "\n".join(table)], items)
