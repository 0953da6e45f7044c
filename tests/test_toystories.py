"""The built-in corpus: proofs about its grammar, and tests on sampled stories."""

import hashlib
import math
import random
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations, islice
from pathlib import Path

import pytest

from nanostlm import toystories
from nanostlm.toystories import (
    GRAMMAR,
    REQUIRED,
    TEXT,
    Choice,
    Draw,
    Grammar,
    Ref,
    check,
    derivations,
    expand,
    stories,
)

ROOT = Path(__file__).parents[1]
SAMPLE = list(islice(stories(seed=0), 2000))
KIDS = {row[0] for row in GRAMMAR.lists["kid"]}


# -----------------------------------------------------------------------------------------------------------
# Proofs about the grammar


def rows_of(grammar, source, known):
    """All rows that a Draw may select; `known` maps each variable to its possible rows."""
    if isinstance(source, Ref):
        options = [row[source.column] for row in known[source.var]]
        assert all(isinstance(o, tuple) for o in options), (
            f"{grammar.variables[source.var]}: a column without options"
        )
        assert len({len(o) for o in options}) == 1, (
            f"{grammar.variables[source.var]}: unequal numbers of options"
        )
        return {row for option in options for row in option}
    return set(source)


def walk(grammar, ops, known, rule=""):
    """Check that on every path variables are drawn before their use; return the possible rows after `ops`."""
    for op in ops:
        if isinstance(op, Choice):
            ends = [
                walk(grammar, alternative, dict(known), op.rule or rule) for alternative in op.alternatives
            ]
            known = {
                var: set().union(*(end[var] for end in ends)) for var in set.intersection(*map(set, ends))
            }
        elif isinstance(op, Draw):
            if isinstance(op.source, Ref):
                assert op.source.var in known, f"{rule}: {grammar.variables[op.source.var]} is not drawn yet"
            known[op.var] = rows_of(grammar, op.source, known)
            assert all(isinstance(row[op.column], str) for row in known[op.var]), (
                f"{rule}: a draw has no text"
            )
        elif isinstance(op, Ref):
            assert op.var in known, f"{rule}: {grammar.variables[op.var]} is not drawn yet"
            assert all(isinstance(row[op.column], str) for row in known[op.var]), (
                f"{rule}: {grammar.variables[op.var]} has no column {op.column}"
            )
    return known


def test_variables_are_drawn_before_they_are_used():
    walk(GRAMMAR, [GRAMMAR.start], {})


class Undecided(Exception):
    """Two alternatives ended without a difference, so the text after them has to distinguish them."""


def possible_rows(grammar, var):
    """All rows that a variable can hold."""
    rows = []
    for source in grammar.sources.get(grammar.variables[var], ()):
        owner, _, column = source.partition(".")
        if column:
            owners = possible_rows(grammar, grammar.variables.index(owner))
            column = grammar.columns.index(column)
            rows += [option for row in owners if row[column] for option in row[column]]
        else:
            rows += grammar.lists[source]
    return list(dict.fromkeys(rows))


def recall(grammar, ref, own, shared):
    """The possible rows of a variable, each with the `shared` memory that it implies."""
    for memory in own, shared:
        for var, row in memory:
            if var == ref.var:
                return [(row, shared)]
    lists = set(grammar.sources[grammar.variables[ref.var]])
    taken = [
        row
        for var, row in own + shared
        if lists & set(grammar.sources.get((grammar.variables + [""])[var], ()))
    ]
    return [
        (row, (*shared, (ref.var, row)))
        for row in possible_rows(grammar, ref.var)
        if row[ref.column] and row not in taken
    ]


def heads(grammar, todo, own, shared):
    """Yield (text, todo, own, shared) for each next text that `todo` can produce; text is None at the end.

    `own` has the rows drawn on this side after the choice, `shared` those drawn before it, enumerated lazily.
    """
    while todo and todo[1] == len(todo[0]):
        todo = todo[2]
    if todo is None:
        yield None, None, own, shared
        return
    if todo is False:
        raise Undecided
    ops, i, after = todo
    op, todo = ops[i], (ops, i + 1, after)
    if isinstance(op, str):
        yield op, todo, own, shared
    elif isinstance(op, Choice):
        for alternative in op.alternatives:
            yield from heads(grammar, (alternative, 0, todo), own, shared)
    elif isinstance(op, Ref):
        for row, shared_then in recall(grammar, op, own, shared):
            yield row[op.column], todo, own, shared_then
    else:
        yield from drawn(grammar, op, todo, own, shared)


def drawn(grammar, draw, todo, own, shared):
    if isinstance(draw.source, Ref):
        choices = [(row[draw.source.column], then) for row, then in recall(grammar, draw.source, own, shared)]
    else:
        choices = [(draw.source, shared)]
    for rows, shared_then in choices:
        held = [row for var, row in own + shared_then if var in draw.rivals]
        for row in rows:
            if row not in held:
                yield (
                    row[draw.column],
                    todo,
                    (*(m for m in own if m[0] != draw.var), (draw.var, row)),
                    shared_then,
                )


def position(todo):
    """A position in the grammar, as a hashable key."""
    while todo and todo[1] == len(todo[0]):
        todo = todo[2]
    return (id(todo[0]), todo[1], position(todo[2])) if todo else todo


def prove_different(grammar, left, right, shared, forget):
    """Raise AssertionError if two sides, each (text, todo, own), can expand to the same text.

    `forget` drops the memory wherever both sides agree: this proves more than needed and is faster.
    """
    pairs, seen = [(left, right, shared)], set()
    while pairs:
        left, right, shared = pairs.pop()
        rights = {}  # memory -> first letter -> the heads of the right side
        for a, todo_a, own_a, memory in [(*left, shared)] if left[0] else heads(grammar, *left[1:], shared):
            if memory not in rights:
                rights[memory] = {}
                for head in [(*right, memory)] if right[0] else heads(grammar, *right[1:], memory):
                    rights[memory].setdefault(head[0] and head[0][0], []).append(head)
            for b, todo_b, own_b, both in rights[memory].get(a and a[0], []):
                assert a is not None, "two derivations of one story"
                if a.startswith(b) or b.startswith(a):
                    n = min(len(a), len(b))
                    mine, theirs = own_a, own_b
                    if forget and len(a) == len(b):  # still covers every continuation
                        mine, theirs, both = (), (), ()
                    key = a[n:], position(todo_a), mine, b[n:], position(todo_b), theirs, both
                    if key not in seen:
                        seen.add(key)
                        pairs.append(((a[n:], todo_a, mine), (b[n:], todo_b, theirs), both))
        assert len(seen) < 20_000, "too many states to compare"


def prove_choice(grammar, op, after):
    """Raise AssertionError if two alternatives of a Choice, or rows of a Draw, can give the same text."""
    if isinstance(op, Choice):
        sides = [("", (alternative, 0, after), (), ()) for alternative in op.alternatives]
    else:
        sides = list(drawn(grammar, op, after, (), ()))
    for (*left, shared), (*right, shared_too) in combinations(sides, 2):
        if shared == shared_too:
            prove_different(grammar, left, right, shared, forget=isinstance(op, Choice))


def prove_unambiguous(grammar):
    """Prove each choice in isolation if that suffices, otherwise in every context in the grammar."""
    undecided = {}  # id of an operation -> whether it, or one inside it, needs its context
    proved = set()  # ids of operations proved in isolation

    def decide(op):
        if id(op) not in undecided:
            undecided[id(op)] = False
            try:
                prove_choice(grammar, op, False)
                proved.add(id(op))
            except Undecided:
                undecided[id(op)] = True
            if isinstance(op, Choice):
                inside = [
                    decide(o)
                    for alternative in op.alternatives
                    for o in alternative
                    if isinstance(o, Choice | Draw)
                ]
                undecided[id(op)] |= any(inside)
        return undecided[id(op)]

    def visit(op, after):
        contexts[0] += 1
        if id(op) not in proved:
            prove_choice(grammar, op, after)
        if isinstance(op, Choice):
            for alternative in op.alternatives:
                for i, inner in enumerate(alternative):
                    if undecided.get(id(inner)):
                        visit(inner, (alternative, i + 1, after))

    contexts = [0]
    decide(grammar.start)
    visit(grammar.start, None)
    return contexts[0]


def test_no_text_has_two_derivations():
    contexts = prove_unambiguous(GRAMMAR)
    print(f"proved in {contexts} contexts")


def texts_of(rows, column):
    for row in rows:
        yield from texts_of(row[column], 0) if isinstance(row[column], tuple) else [row[column]]


def test_no_text_of_a_list_is_a_prefix_of_another():
    for name, rows in GRAMMAR.lists.items():
        for column in range(len(GRAMMAR.columns)):
            texts = sorted({text for text in texts_of(rows, column) if text})
            for one, other in zip(texts, texts[1:], strict=False):
                assert not other.startswith(one), f"{name}: {one!r} is a prefix of {other!r}"


def test_proof_fails_for_ambiguous_grammars():
    lists = "kid, name: he\n    Tom, Lily ; she\n"
    for rules, ambiguous in [
        ("story: <hero=kid> ran. | <hero=kid> sat.\n", False),
        ("story: <hero=kid> [very | ] [very | ] glad.\n", True),
        ("story: <hero=kid> ran. | <hero=kid> <run>.\nrun: ran | hid\n", True),
        ("story: <hero=kid> saw a <b>\nb: bee. | bee[tle. | hive.]\n", False),
        (
            "story: <hero=kid> and <friend=kid> sat. {hero}. | <hero=kid> and <friend=kid> sat. {friend}.\n",
            False,
        ),
        ("story: He <hero=kid> sat. {he}. | He <friend=kid> sat. {friend.he}.\n", True),
    ]:
        grammar = Grammar(lists + rules)
        if ambiguous:
            with pytest.raises(AssertionError, match="two derivations"):
                prove_unambiguous(grammar)
        else:
            prove_unambiguous(grammar)


def shortest_and_longest(op, memo):
    """The minimum and maximum number of spaces and line breaks that an operation can produce."""
    if id(op) not in memo:
        if isinstance(op, Choice):
            ends = [
                [sum(n) for n in zip((0, 0), *(shortest_and_longest(o, memo) for o in ops), strict=True)]
                for ops in op.alternatives
            ]
            memo[id(op)] = min(low for low, _ in ends), max(high for _, high in ends)
        else:
            if isinstance(op, str):
                texts = [op]
            elif isinstance(op, Draw) and not isinstance(op.source, Ref):
                texts = [row[op.column] for row in op.source]
            elif isinstance(op, Draw):
                texts = list(texts_of(possible_rows(GRAMMAR, op.source.var), op.source.column))
            else:
                texts = [row[op.column] for row in possible_rows(GRAMMAR, op.var) if row[op.column]]
            counts = [len(re.findall(r"\s", text)) for text in texts if isinstance(text, str)]
            memo[id(op)] = min(counts), max(counts)
    return memo[id(op)]


def test_every_story_has_60_to_250_words():
    low, high = (spaces + 1 for spaces in shortest_and_longest(GRAMMAR.start, {}))
    print(f"{low} to {high} words")
    assert 60 <= low <= high <= 250


def exact_entropy(op, drawn, memo):
    """The entropy of an operation in nats, and the variables that are drawn on every path through it."""
    if isinstance(op, Choice):
        key = id(op), drawn
        if key not in memo:
            total, ends = 0.0, []
            for logprob, ops in zip(op.logprobs, op.alternatives, strict=True):
                known, inside = drawn, 0.0
                for inner in ops:
                    more, known = exact_entropy(inner, known, memo)
                    inside += more
                total += math.exp(logprob) * (inside - logprob)
                ends.append(known)
            memo[key] = total, frozenset.intersection(*ends)
        return memo[key]
    if isinstance(op, Draw):
        if isinstance(op.source, Ref):
            count = next(
                len(row[op.source.column])
                for row in possible_rows(GRAMMAR, op.source.var)
                if isinstance(row[op.source.column], tuple)
            )
        else:
            count = len(op.source) - len(drawn & set(op.rivals))
        return math.log(count), drawn | {op.var}
    return 0.0, drawn


def test_entropy_matches_mean_cost_of_samples():
    entropy, _ = exact_entropy(GRAMMAR.start, frozenset(), {})
    costs = [-logprob for _, logprob in SAMPLE]
    mean = sum(costs) / len(costs)
    standard_error = (sum((cost - mean) ** 2 for cost in costs) / len(costs) ** 2) ** 0.5
    print("bits a story:", *(f"{nats / math.log(2):.2f}" for nats in (entropy, mean, standard_error)))
    assert abs(mean - entropy) < 4 * standard_error


def choices(op, found):
    if isinstance(op, Choice) and id(op) not in found:
        found[id(op)] = op
        for ops in op.alternatives:
            for inner in ops:
                choices(inner, found)
    return found.values()


def test_logprobs_match_cumulative_probabilities():
    for choice in choices(GRAMMAR.start, {}):
        probs = [math.exp(logprob) for logprob in choice.logprobs]
        steps = [b - a for a, b in zip((0, *choice.cumulative), (*choice.cumulative, 1), strict=True)]
        assert probs == pytest.approx(steps), choice.rule
    probs = [math.exp(logprob) for logprob in Grammar("story: a | (3) b\n").start.logprobs]
    assert probs == pytest.approx([0.25, 0.75])


def test_draws_from_one_list_differ(monkeypatch):
    lists = "kid, name:\n    Tom, Lily, Max\n"
    grammar = Grammar(lists + "story: <hero=kid> [and <friend=kid> | alone], <third=kid>\n")
    monkeypatch.setattr(toystories, "GRAMMAR", grammar)
    counts = Counter(islice(stories(seed=0), 3000))
    assert len(counts) == 6 + 6
    for (text, logprob), n in counts.items():
        assert logprob == pytest.approx(math.log(1 / 12)), text
        assert len(set(re.findall(r"[A-Z]\w+", text))) == 3 - ("alone" in text)
        assert check(text).logprob == logprob
        assert 180 < n < 330, text  # 250 expected, 15 the standard deviation


def test_names_are_uniformly_distributed():
    names = [row[0] for row in toystories.GRAMMAR.lists["kid"]]
    first = re.compile(rf"\b({'|'.join(names)})\b")
    counts = Counter(match[1] for text, _ in SAMPLE if (match := first.search(text)))
    mean = sum(counts.values()) / len(names)
    chi_square = sum((counts[name] - mean) ** 2 / mean for name in names)
    assert chi_square < 39, counts  # 11 degrees of freedom: 1 in 20,000 exceeds it


# -----------------------------------------------------------------------------------------------------------
# Stories


def test_corpus_has_not_changed():
    texts = "\n\n".join(text for text, _ in SAMPLE[:100])
    digest = hashlib.sha256(texts.encode()).hexdigest()
    expected = "0d626f494899ee9aaf48134f84b975b7f15eff83a84638d2b5272f055d1c0e21"
    assert (toystories.VERSION, digest) == ("5", expected), "a changed corpus needs a new VERSION"


def test_once_upon_a_time_with_and_without_comma():
    counts = Counter(text[16] for text, _ in SAMPLE if text.startswith("Once upon a time"))
    assert set(counts) == {",", " "} and abs(counts[","] - counts[" "]) < 4 * counts.total() ** 0.5, counts
    for comma in ("", ","):
        for rest in (" there was a pumpkin.", " there was a little girl named Lily.", " a huge bear and a"):
            assert check(f"Once upon a time{comma}{rest}").rule == "unfinished"


def test_story_depends_only_on_seed_and_index():
    assert list(islice(stories(0, start=1000), 5)) == SAMPLE[1000:1005]
    assert list(islice(stories(1), 5)) != SAMPLE[:5] != list(islice(stories(-1), 5))


def assert_valid(sample):
    for text, logprob in sample:
        verdict = check(text)
        assert verdict.ok and verdict.logprob == logprob, (text, verdict)
        assert 60 <= len(text.split()) <= 250
        assert text == text.strip() and not re.search(r"  | \n|\n |\n\n| [.,!?]|[<>{}|\[\]]", text), text
        assert not {line.split()[0].strip(",.") for line in text.split("\n")} & KIDS, text
        assert not re.search(r"\b[Aa] (?=[aeio])|\b[Aa]n (?![aeiouh])", text), text
        assert not re.search(r"(?:[.!?]\"? |\n|^)\"?[a-z]", re.sub(r'[!?.]" (?=[a-z])', " ", text)), text


def test_check_agrees_with_the_generator():
    assert_valid(SAMPLE)


@pytest.mark.slow
def test_check_agrees_with_the_generator_100_000_times():
    assert_valid(islice(stories(seed=1), 100_000))


def test_each_story_has_one_derivation():
    for text, logprob in SAMPLE[:500]:
        assert [math.fsum(logprobs) for logprobs in derivations(text)] == [logprob]


def test_surrounding_whitespace_is_ignored():
    text, logprob = SAMPLE[0]
    assert check(f" \n{text}\n").logprob == logprob
    assert check(text.replace("\n", " ")).rule == "not of the grammar"


@pytest.mark.parametrize("count, words", [(2000, 1000), pytest.param(20_000, 1500, marks=pytest.mark.slow)])
def test_stories_are_diverse(count, words):
    start = time.perf_counter()
    texts = [text for text, _ in islice(stories(seed=3), count)]
    rate = sum(map(len, texts)) / (time.perf_counter() - start)
    vocabulary = Counter(word for text in texts for word in re.findall(r"[a-z]+", text.lower()))
    print(f"{rate / 1e6:.1f} MB/s, {len(vocabulary)} words in {count} stories")
    assert len(vocabulary) >= words
    assert len(set(texts)) > 0.999 * count


# -----------------------------------------------------------------------------------------------------------
# Broken stories


def replace_word(text, words, sample):
    """The text with the last of these words replaced by another; None unless that word occurs earlier."""
    matches = [*re.finditer(rf"\b({'|'.join(map(re.escape, words))})\b", text)]
    if len(matches) < 2 or not any(m[0] == matches[-1][0] for m in matches[:-1]):
        return None
    other = next(
        word
        for word in words[sample % len(words) :] + words
        if not re.search(rf"\b{re.escape(word)}\b", text)
    )
    return text[: matches[-1].start()] + other + text[matches[-1].end() :]


NAMES = [row[0] for row in toystories.GRAMMAR.lists["kid"]]
PLACES = [row[0] for row in GRAMMAR.lists["place"]]
TOYS = sorted((row[0] for row in GRAMMAR.lists["toy"]), key=len, reverse=True)


@pytest.mark.parametrize(
    "words, rule, openings",
    [
        (NAMES, "wrong name", r""),
        (PLACES, "wrong place", r""),
        (TOYS, "wrong object", r"coins|never lost|best friends"),
    ],
)
def test_replaced_word_is_reported_with_its_rule(words, rule, openings):
    verdicts = Counter()
    for number, (text, _) in enumerate(SAMPLE[:300]):
        wrong = replace_word(text, words, number) if re.search(openings, text) else None
        if wrong:
            verdicts[check(wrong).rule] += 1
    print(rule, verdicts)
    assert verdicts[rule] >= 0.98 * verdicts.total() > 10, verdicts


def test_replaced_word_from_a_column_is_detected():
    """The word for what mends a thing is in a column that only some lists have."""
    story = next(text for text, _ in SAMPLE if " hours, and with " in text and "they made the" in text)
    before, rest = story.split(" hours, and with ")
    wrong = f"{before} hours, and with soap they made the {rest.split('they made the ')[1]}"
    assert toystories.check(story).ok and not toystories.check(wrong).ok


def test_wrong_pronoun_is_reported():
    verdicts = Counter()
    for text, _ in SAMPLE[:200]:
        matches = [*re.finditer(r"\b(he|she|He|She)\b", text)]
        if matches:
            last = matches[-1]
            other = {"he": "she", "she": "he", "He": "She", "She": "He"}[last[0]]
            verdicts[check(text[: last.start()] + other + text[last.end() :]).rule] += 1
    print(verdicts)
    assert verdicts["wrong pronoun"] >= 0.98 * verdicts.total() > 100, verdicts


def test_truncated_story_is_unfinished():
    verdicts = Counter()
    for number, (text, _) in enumerate(SAMPLE[:200]):
        cut = text[: 1 + number * 7919 % (len(text) - 1)].rstrip()
        verdict = check(cut)
        verdicts[verdict.rule] += 1
        assert verdict.rule == "unfinished", (cut, verdict)
    assert check("").rule == "unfinished"


def test_missing_required_rule_is_reported():
    """Leave out the sentences of a required rule, for example those in which a thing is found or mended."""
    required = "|".join(REQUIRED)
    marked = Grammar(re.sub(rf"<({required})>", r"#\1 <\1>#", TEXT))
    verdicts = Counter()
    for seed in range(400):
        parts = []
        memory = [None] * (len(marked.variables) + 1)
        expand((marked.start,), memory, parts.append, [].append, random.Random(seed).random)
        before, *rest = re.split(rf"\s?#({required}) ([^#]*)#", "".join(parts))
        if rest:
            rule, left_out, after = rest
            verdict = check(before + after)
            verdicts[rule, verdict.rule] += 1
            assert verdict.rule == REQUIRED[rule], (before, left_out, after, verdict)
    print(verdicts)
    assert min(verdicts[pair] for pair in REQUIRED.items()) > 10, verdicts


OTHER_TEXTS = [
    "the",
    "12345",
    "Once upon a time, there was a little girl named Lily. She loved to play with her toys.",
    "One day, Tom and his mom went to the park. Tom saw a big dog. The dog was nice. They played all day.",
    "<|endoftext|>",
    "a " * 50_000,
    "Once upon a time, " * 5_000,
    "\n\n\nx",
    "{hero} <lost>",
    "\0",
    "🙂",
]


@pytest.mark.parametrize("text", OTHER_TEXTS, ids=lambda text: ascii(text[:12]))
def test_other_text_is_not_of_the_grammar(text):
    start = time.perf_counter()
    assert check(text).rule in ("not of the grammar",)
    assert time.perf_counter() - start < 5


def test_inserted_or_appended_text_is_detected():
    for text, _ in SAMPLE[:40]:
        half = text.index(" ", len(text) // 2)
        assert check(text + " And then the moon sneezed.").rule == "not of the grammar"
        verdict = check(text[:half] + " xyzzy" + text[half:])
        assert not verdict.ok and verdict.rule != "unfinished"
        assert check(text + "\n" + text).rule == "not of the grammar"


def test_every_changed_word_is_checked():
    """After a word is replaced, the story is rejected unless the grammar generates the result too."""
    texts = [text for text, _ in SAMPLE[:150]]
    for number, text in enumerate(texts):
        words = text.split(" ")
        other = texts[number - 1].split(" ")
        i = number * 31 % len(words)
        words[i] = other[i % len(other)]
        verdict = check(" ".join(words))
        if verdict.ok and words != text.split(" "):
            assert [math.fsum(costs) for costs in derivations(" ".join(words))] == [verdict.logprob]
        else:
            assert verdict.ok == (words == text.split(" "))
            assert verdict.ok or verdict.detail


# -----------------------------------------------------------------------------------------------------------
# The command line


def run(*args, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "nanostlm.toystories", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        **kwargs,
    )


def test_command_line(tmp_path):
    generated = run("-n", "4", "--seed", "0")
    assert generated.stdout == "".join(text + "\n\n" for text, _ in SAMPLE[:4])
    assert generated.stderr.count("bits") == 4
    assert run("--check", "-", input=generated.stdout).returncode == 0
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join([SAMPLE[0][0], SAMPLE[1][0][:200]]))
    checked = run("--check", str(path))
    assert checked.returncode == 1 and "1: ok" in checked.stdout and "2: unfinished" in checked.stdout
    missing = run("--check", str(tmp_path / "missing.txt"))
    assert missing.returncode == 2 and "missing.txt" in missing.stderr and "Traceback" not in missing.stderr
