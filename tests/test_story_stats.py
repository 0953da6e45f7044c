"""Statistics of stories and memorization against slow formulas, hand-made examples and planted stories."""

import math
import random
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from model import GPT, GPTConfig
from nanostlm import generate, memorization, score, story_stats, tokenizer, toystories
from nanostlm.data import Data
from nanostlm.story_stats import balanced, distinct, repetition, self_bleu, stray_names

TOP_P = f"top_p {generate.DEFAULTS['top_p']:g}"
BYTE = tokenizer.get("byte")
NAMES = {"Tim", "Sara", "Lily", "Spot"}
TOYS = [text for text, _ in (next(toystories.stories(seed, start=0)) for seed in range(40))]


class Subject(NamedTuple):
    name: str
    model: object
    tokenizer: object
    data: Data | None
    texts: list[str]


def data_of(train: list[str], dtype="<u2", tok=BYTE, corpus="mini") -> Data:
    ids = tok.encode_stories(train).astype(dtype)
    return Data(ids, ids[:0], {"corpus": corpus}, tok, Path("nowhere"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPTConfig(
        n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=257, init="fan_in", tied=False
    )
    return GPT(config).eval()


@pytest.fixture
def writes(monkeypatch):
    """writes(texts, unended=()): from now on these texts are generated, in this order, one piece each."""

    def set_texts(texts, unended=()):
        left = list(enumerate(texts))

        def write(model, tok, prompts, max_new_tokens, *, seed, **sampling):
            for row in range(len(prompts)):
                i, text = left.pop(0)
                pieces = [text] + [""] * (max_new_tokens if i in unended else 1)
                yield from ((row, piece) for piece in pieces)

        monkeypatch.setattr(story_stats, "write", write)

    return set_texts


def random_words(seed: int, n: int = 8, most: int = 30) -> list[list[str]]:
    rng = random.Random(seed)
    return [rng.choices("abcdefg", k=rng.randint(0, most)) for _ in range(n)]


def by_name(result) -> dict:
    return {figure.name: figure for figure in result.figures}


# ----------------------------------------------------------------------------------------------------------
# Statistics


def slow_distinct(stories, n):
    grams = [tuple(words[i : i + n]) for words in stories for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_and_leaving_out_a_story_match_the_definition(n):
    stories = random_words(n)
    value, left_out = distinct(stories, n)
    assert value == pytest.approx(slow_distinct(stories, n))
    for i in range(len(stories)):
        assert left_out[i] == pytest.approx(slow_distinct(stories[:i] + stories[i + 1 :], n))


def test_distinct_of_examples():
    assert distinct([["a", "b", "a", "b"]], 2)[0] == pytest.approx(2 / 3)
    assert distinct([["a", "b"], ["a", "b"]], 2)[0] == 0.5
    assert math.isnan(distinct([["a"], []], 2)[0])
    assert math.isnan(distinct([], 1)[0])


def slow_self_bleu(stories) -> float:
    """BLEU-4 after Papineni et al. (2002), with 0.1 in place of no matches."""
    total = 0.0
    for i, words in enumerate(stories):
        others, log_p = stories[:i] + stories[i + 1 :], 0.0
        if not set(words) & {word for other in others for word in other}:
            continue
        for n in range(1, 5):

            def counts(words, n=n):
                return Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))

            matches = sum(min(c, max(counts(o)[gram] for o in others)) for gram, c in counts(words).items())
            log_p += math.log((matches or 0.1) / max(1, len(words) - n + 1)) / 4
        closest = min((abs(len(o) - len(words)), len(o)) for o in others)[1]
        total += math.exp(log_p + min(0, 1 - closest / len(words)))
    return total / len(stories)


@pytest.mark.parametrize("seed", range(6))
def test_self_bleu_and_leaving_out_a_story_match_the_definition(seed):
    stories = random_words(seed) + [["zebra"], ["a", "a", "a", "a"]]
    value, left_out = self_bleu(stories)
    assert value == pytest.approx(slow_self_bleu(stories))
    for i in range(len(stories)):
        assert left_out[i] == pytest.approx(slow_self_bleu(stories[:i] + stories[i + 1 :]))


def test_self_bleu_matches_nltk():
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    stories = [story_stats.split_words(text) for text in TOYS[:12]] + random_words(1)
    smooth = bleu.SmoothingFunction().method1
    each = [
        bleu.sentence_bleu(stories[:i] + stories[i + 1 :], words, smoothing_function=smooth)
        for i, words in enumerate(stories)
    ]
    assert self_bleu(stories)[0] == pytest.approx(sum(each) / len(each))


def test_self_bleu_of_equal_stories_is_one_and_of_a_single_one_unknown():
    assert self_bleu([list("abcdef")] * 3)[0] == pytest.approx(1)
    assert self_bleu([[], []])[0] == 0
    assert math.isnan(self_bleu([list("abcdef")])[0]) and math.isnan(self_bleu([])[0])
    figure = story_stats.jackknife("self-BLEU-4", *self_bleu([list("abcdef")] * 2))
    assert figure.value == pytest.approx(1) and math.isnan(figure.low)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(size=30)
    figure = story_stats.jackknife("mean", values.mean(), (values.sum() - values) / 29)
    error = 1.959964 * values.std(ddof=1) / math.sqrt(30)
    assert figure.high - figure.value == pytest.approx(error) == figure.value - figure.low
    assert math.isnan(story_stats.jackknife("one", 1, [1]).low)


def test_repetition_counts_n_grams_that_occurred_before():
    assert repetition("a b c d a b c d".split()) == pytest.approx(1 / 5)
    assert repetition("a a a a a a".split()) == pytest.approx(2 / 3)
    assert repetition("a b c d e f".split()) == 0
    assert repetition([]) == repetition(["one"]) == repetition("a a a".split()) == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No marks.",
        '"Hi," said Tim. "Bye."',
        "“Hi,” said Tim’s mom.",
        "I don't",
        '"A"\n"B"',
        '“A” "B"',
    ],
)
def test_balanced(text):
    assert balanced(text)


@pytest.mark.parametrize(
    "text", ['"Hi', '"Hi"" he said', "“Hi", "Hi”", "”Hi“", '“Hi"', '"Hi\n"', "“A “B”", "““A””"]
)
def test_not_balanced(text):
    assert not balanced(text)


START = "Tim had a dog. It was big. "


def test_a_friend_out_of_nowhere_is_a_stray_name():
    assert stray_names(START + "Tim's friend Sara was happy.", NAMES) == ["Sara"]
    assert stray_names(START + 'His mom said, "Lily, come!"', NAMES) == ["Lily"]
    assert stray_names(START + "Lily met Sara.", NAMES) == ["Lily", "Sara"]


@pytest.mark.parametrize(
    "end",
    [
        "He met a girl named Sara.",
        "A girl called Sara came.",
        'She said, "My name is Sara."',
        "It ran off.",
        "Sara came. Sara sang.",
        "He saw Oz.",
        "He can spot it.",
        "He had a friend named Mrs. Sara.",
    ],
)
def test_introduced_names_are_not_stray(end):
    assert stray_names(START + end, NAMES) == []


def test_names_in_the_first_two_sentences_are_not_stray():
    assert stray_names("Tim sat down. Sara sat, too. They ran.", NAMES) == []
    assert stray_names("They sat. They ran! Sara sat.", NAMES) == ["Sara"]
    assert stray_names("", NAMES) == stray_names("Sara", NAMES) == []


def test_words_are_in_lower_case_without_punctuation():
    assert story_stats.split_words("“Don’t!” said Tim's mom. It's 3 o'clock - 'yes'") == [
        "don't",
        "said",
        "tim's",
        "mom",
        "it's",
        "3",
        "o'clock",
        "yes",
    ]


# ----------------------------------------------------------------------------------------------------------
# The training text


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 18])
def test_vocabulary_has_all_words_and_the_names(block, monkeypatch):
    monkeypatch.setattr(memorization, "BLOCK", block)
    train = [
        "A girl named Lily ran",
        "Don’t call a dog named Lily",
        "Max is called Mom. Mom, mom, mom, mom called Mom",
    ]
    train += ["She was named after Sue", "She was named after Sue", "called Max", "Éa café"]
    words, names = memorization.vocabulary(data_of(train))
    assert words == set(
        "a girl named lily ran don't call dog max is called mom she was after sue éa café".split()
    )
    assert names == {"Lily"}  # Max follows "called" once, and mom is mostly in lower case


def shared(text: list[int], stories: list[list[int]]) -> tuple[int, int]:
    """(length of the longest span, number of 8-grams) that the training stories have, by trying all."""
    spans = {tuple(ids[i:k]) for ids in stories for i in range(len(ids)) for k in range(i + 1, len(ids) + 1)}
    mine = [
        (i, k) for i in range(len(text)) for k in range(i + 1, len(text) + 1) if tuple(text[i:k]) in spans
    ]
    return max((k - i for i, k in mine), default=0), sum(k - i == 8 for i, k in mine)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize("block", [1, 10, 33, 1 << 18])
@pytest.mark.parametrize("alphabet", ["a", "ab", "abcd"])
def test_memorization_matches_trying_all_spans(dtype, block, alphabet):
    rng = random.Random(f"{block} {alphabet}")
    texts = ["".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(24)]
    train, mine = texts[:12], texts[12:] + ["", "a", "z", texts[0], texts[1] + texts[2]]
    stories = [BYTE.encode(text) for text in train]
    for text, found in zip(mine, memorization.memorization(data_of(train, dtype), mine, block), strict=True):
        longest, n_found = shared(BYTE.encode(text), stories)
        assert (found.tokens, found.longest, found.found) == (len(text), longest, n_found)
        assert found.grams == max(0, len(text) - 7)
        assert text[found.start : found.start + found.longest] in "|".join(train)


def test_memorization_without_texts_and_without_training_text():
    assert memorization.memorization(data_of(["abc"]), []) == []
    assert memorization.memorization(data_of([]), ["abc", ""]) == [(3, 0, 0, 0, 0), (0, 0, 0, 0, 0)]


def test_spans_do_not_cross_end_of_text():
    (found,) = memorization.memorization(data_of(["abcdefgh", "ijklmnop"]), ["abcdefghijklmnop"])
    assert found == (16, 8, 0, 2, 9) or found == (16, 8, 8, 2, 9)


def test_texts_are_encoded_with_the_tokenizer_of_the_data():
    tok = tokenizer.train_bpe(TOYS, 400)
    found = memorization.memorization(data_of(TOYS[:20], tok=tok), [TOYS[3], TOYS[30]])
    assert found[0].longest == found[0].tokens == len(tok.encode(TOYS[3]))
    assert found[0].flagged and not found[1].flagged


def test_spans_that_only_have_the_same_hash_are_not_found():
    code = np.array([3, 5, 5, 7], np.uint64)  # 1 and 2 look alike
    block = memorization.Spans(np.array([0, 1, 3, 0, 2, 0]), code)
    query = memorization.Spans(np.array([0, 2, 3, 0, 2, 0]), code)
    assert query.find(np.array([0, 1]), 3, block).tolist() == [-1, -1]
    assert query.find(np.array([2, 3]), 3, block).tolist() == [2, 3]
    query = memorization.Spans(np.array([0, 1, 0, 2]), code)
    with pytest.raises(RuntimeError, match="same hash"):
        query.find(np.array([0, 2]), 2, block)


def test_memory_does_not_grow_with_the_training_data():
    rng, peaks = np.random.default_rng(0), []
    for n in (100_000, 800_000):
        ids = rng.integers(97, 101, n).astype("<u2")
        ids[::100] = BYTE.eot
        data = data_of([])._replace(train=ids)
        tracemalloc.start()
        memorization.memorization(data, TOYS[:5], 1 << 14)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


# ----------------------------------------------------------------------------------------------------------
# Tasks


def subject(model=None, train=TOYS[:20], texts=TOYS[20:], corpus="toystories") -> Subject:
    return Subject("tiny", model, BYTE, data_of(train, corpus=corpus) if train else None, list(texts))


def test_stories_reports_a_planted_training_story_and_no_other(writes):
    writes([TOYS[30], TOYS[5], TOYS[31], "The end."])
    result = story_stats.stories(subject(texts=TOYS[34:38]), 4)
    assert [item["flagged"] for item in result.items] == [False, True] + [False] * 6
    [note] = [note for note in result.notes if "copied" in note]
    assert note.startswith("story 2 ") and repr(TOYS[5]) in note
    figures = by_name(result)
    assert figures["copied from training"].value == 0.25
    assert figures["copied from training, validation"].value == 0


def test_figures_are_those_of_the_stories_and_of_the_control(writes):
    mine = ["One cat. Two. Sara sat", 'Tim said, "Oh', "", "cat cat cat cat cat"]
    train, texts = (
        ["a girl named Sara sat", "a girl named Sara said Oh"],
        ["Tim sat. Sara", "One dog", "Tim", "Oh"],
    )
    writes(mine, unended={1, 2})
    result = story_stats.stories(subject(train=train, texts=texts, corpus="mini"), 4)
    figures = by_name(result)
    assert figures["length in words"].value == (5 + 3 + 0 + 5) / 4
    assert figures["length in words, validation"].value == (3 + 2 + 1 + 1) / 4
    assert figures["ended by end-of-text"].value == 0.5
    assert figures["balanced quotation marks"].value == 0.75
    assert figures["words not in training"].value == pytest.approx(9 / 13)  # one cat two tim, cat 5 times
    assert figures["a name never introduced"].value == 0.25
    assert figures["repeated 4-grams"].value == pytest.approx((0 + 0 + 0 + 1 / 2) / 4)
    words = [story_stats.split_words(text) for text in mine]
    assert figures["distinct-1"].value == pytest.approx(slow_distinct(words, 1))
    assert "valid" not in figures
    names = [figure.name for figure in result.figures]
    for name in names:
        if name.endswith(", validation"):
            assert names[names.index(name) - 1] == name.removesuffix(", validation")
    assert [item["text"] for item in result.items[:4]] == mine
    assert sorted(item["text"] for item in result.items[4:]) == sorted(texts)


def test_only_the_first_hundred_words_count_for_distinct_n(writes):
    writes(
        [" ".join(map(str, range(k, k + 150))) for k in (0, 75)]
    )  # the first 100 words of both: 175 different
    figures = by_name(story_stats.stories(subject(corpus="mini"), 2))
    assert figures["distinct-1"].value == 175 / 200
    assert figures["length in words"].value == 150


def test_sets_are_compared_at_equal_numbers_when_validation_stories_are_few(writes):
    writes(["a a", "a b", "c d", "e f"])
    result = story_stats.stories(subject(texts=["a b", "b c"], corpus="mini"), 4)
    figures = by_name(result)
    assert figures["distinct-1"].value == 2 / 4 and figures["distinct-1"].n == 2
    assert figures["length in words"].n == 4 and figures["length in words, validation"].n == 2


def test_validity_by_broken_rule(writes):
    wrong = TOYS[21].replace(" her ", " his ").replace(" him ", " her ")
    texts = [TOYS[20], wrong, "Tim ran.", TOYS[22]]
    rules = [toystories.check(text).rule for text in texts]
    writes(texts)
    figures = by_name(story_stats.stories(subject(), 4))
    assert figures["valid"].value == rules.count(None) / 4 == 0.5
    assert figures["valid, validation"].value == 1
    broken = {name: figure.value * 4 for name, figure in figures.items() if name.startswith("broken: ")}
    assert broken == {f"broken: {rule}": n for rule, n in Counter(rules).items() if rule}


def test_without_data_or_validation_stories_the_rest_is_reported(writes):
    writes([""])
    result = story_stats.stories(
        subject(GPT(GPTConfig(n_layer=1, n_embd=8, n_head=1, vocab_size=257)), (), ()), 1
    )
    assert by_name(result).keys() == {
        "distinct-1",
        "distinct-2",
        "distinct-3",
        "self-BLEU-4",
        "repeated 4-grams",
        "length in words",
        "ended by end-of-text",
        "balanced quotation marks",
    }
    assert any("omitted" in note for note in result.notes)


def test_stories_show_the_first_ten(writes):
    writes(TOYS[:12])
    notes = story_stats.stories(subject(), 12).notes
    assert [note for note in notes if note.startswith("story ") and "copied" not in note] == [
        f"story {i + 1}: {text}" for i, text in enumerate(TOYS[:10])
    ]


def test_generated_stories_depend_on_the_seed_only(model, monkeypatch):
    monkeypatch.setattr(story_stats, "BATCH", 3)
    texts = story_stats.generate(subject(model), 7, 1, 20)
    assert len(set(texts)) == 7
    assert story_stats.generate(subject(model), 7, 1, 20) == texts
    assert story_stats.generate(subject(model), 4, 1, 20) == texts[:4]
    assert not set(story_stats.generate(subject(model), 7, 2, 20)) & set(texts)
    results = [story_stats.stories(subject(model, corpus="mini"), 3, seed=1, max_new_tokens=20) for _ in "ab"]
    assert results[0].items == results[1].items and results[0].notes == results[1].notes


def test_a_story_ends_by_itself_unless_it_has_as_many_tokens_as_allowed(model):
    samplers = generate.chain(temperature=1, top_p=1)
    ids = generate.generate(model, [[]] * 30, 200, samplers, eot=BYTE.eot, seed=5)
    options = {"temperature": 1, "top_p": 1}
    ended = [ended for _, ended in story_stats.generate(subject(model), 30, 5, 200, **options)]
    assert ended == [len(row) < 200 for row in ids] and 0 < sum(ended) < 30


def test_the_longest_validation_story_can_be_generated(model):
    control, limit = story_stats.control_stories(subject(texts=["abc", "abcdef"]), 5, 1, 0)
    assert (sorted(control), limit) == (["abc", "abcdef"], 7)  # its end-of-text included
    assert story_stats.control_stories(subject(model, texts=()), 5, 1, 0) == ([], 64)
    assert story_stats.control_stories(subject(), 5, 1, 9)[1] == 9


def test_best_of_n_is_the_likeliest_per_token(model):
    rng = random.Random(0)
    candidates = [
        ("".join(rng.choices("abcdefgh", k=rng.randint(0, 3))), rng.random() < 0.5) for _ in range(60)
    ]

    def nats(text, ended):
        ids = BYTE.encode(text) + [BYTE.eot] * (ended or not text)
        return -score.loglikelihood(model, [BYTE.eot], ids) / len(ids)

    best = [min(candidates[i : i + 3], key=lambda each: nats(*each)) for i in range(0, 60, 3)]
    assert story_stats.best_of(subject(model), candidates, 3) == best


def test_sweep_sorts_settings_by_their_distance_to_validation_stories(writes):
    texts = [text + " " + text[: 50 * i] for i, text in enumerate(TOYS[:6])]
    near, far = TOYS[6:12], ["the cat sat " * 20] * 6
    writes([*far, *near])
    grid = [({"temperature": 0.1}, 1), ({"temperature": 1, "top_p": 0.9}, 1)]
    result = story_stats.sweep(subject(texts=texts), 6, grid=grid)
    assert [figure.name for figure in result.figures] == [
        "distance: temperature 1, top_p 0.9",
        f"distance: temperature 0.1, {TOP_P}",
    ]
    statistics = []  # (distinct-3, repeated 4-grams, length) and the validation stories' standard errors
    for group in (texts, near, far):
        words = [story_stats.split_words(text) for text in group]
        first = [story[:100] for story in words]
        rows = [[repetition(story), len(story)] for story in words]
        statistics.append([slow_distinct(first, 3), *np.mean(rows, axis=0)])
        if group is texts:
            left = [slow_distinct(first[:i] + first[i + 1 :], 3) for i in range(6)]
            errors = [math.sqrt(5 * np.var(left)), *np.std(rows, axis=0, ddof=1) / math.sqrt(6)]
    for figure, each in zip(result.figures, statistics[1:], strict=True):
        assert figure.value == pytest.approx(np.sum(np.abs(np.subtract(each, statistics[0])) / errors))
        assert figure.low < figure.value < figure.high or figure.value > 100  # equal stories: no variance
    assert [item["setting"] for item in result.items] == [
        "validation",
        *(f.name[10:] for f in result.figures),
    ]
    assert result.items[1]["valid"][0] == 1 and result.items[2]["valid"][0] == 0
    lines = result.notes[1].splitlines()
    assert [line.split("  ")[0] for line in lines] == ["setting", *(item["setting"] for item in result.items)]
    assert all(name in lines[0] for name in result.items[0] if name != "setting")
    unseen = [item["words not in training"][0] for item in result.items]
    known = {word for text in TOYS[:20] for word in story_stats.split_words(text)}
    for share, group in zip(unseen, (texts, near, far), strict=True):
        words = [word for text in group for word in story_stats.split_words(text)]
        assert share == pytest.approx(sum(word not in known for word in words) / len(words))


def test_sweep_of_a_model_runs_every_setting(model):
    grid = [({"temperature": 1, "top_p": 1}, 1), ({"temperature": 1, "min_p": 0.1}, 2)]
    result = story_stats.sweep(
        subject(model, texts=["a b c d a b c d", "b c d e", "c"]), 3, max_new_tokens=9, grid=grid
    )
    assert {item["setting"] for item in result.items} == {
        "validation",
        "temperature 1, top_p 1",
        f"temperature 1, {TOP_P}, min_p 0.1, best of 2",
    }


@pytest.mark.parametrize("n", [0, 1, 30])
def test_invalid_numbers_are_refused(n, writes):
    writes(TOYS)
    with pytest.raises(ValueError, match="at least 1" if n == 0 else "validation stories"):
        story_stats.sweep(subject(), n)
    with pytest.raises(ValueError, match="number of stories|max_new_tokens"):
        story_stats.stories(subject(), limit=0 if n == 0 else 1, max_new_tokens=-1)
